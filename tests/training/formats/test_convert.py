"""Archive → dataset: names, ids, unknown labels, adding to a dataset, nothing half-written; and the verb over it."""

import argparse
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sscloud.errors import ArchiveError, ConfigError, DatasetError, SchemaError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from tools.commands import convert as verb
from training.formats.convert import Summary, convert_archive
from training.manifest import read_manifest
from training.rasterise import MAX_OUTLINE
from training.splits import SplitPlan

SCHEMA = LabelSchema.default()
SIZE = (64, 128)


def jpeg(value: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*SIZE, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def square(name: str, x1: int, y1: int, x2: int, y2: int, *, deleted: int = 0) -> str:
    corners = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)))
    return f"<object><name>{name}</name><deleted>{deleted}</deleted><polygon>{corners}</polygon></object>"


def annotation(filename: str, *objects: str) -> str:
    return f"<annotation><filename>{filename}</filename><folder></folder>{''.join(objects)}</annotation>"


def pack(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pair(stem: str, *objects: str, image: bytes | None = None) -> dict[str, str | bytes]:
    name = stem.rsplit("/", 1)[-1]
    return {f"{stem}.xml": annotation(f"{name}.jpg", *objects), f"{stem}.jpg": jpeg() if image is None else image}


def convert(tmp_path: Path, members: dict[str, str | bytes], **options: Any) -> Summary:
    options = {"schema": SCHEMA, "empty": "background", **options}
    return convert_archive(pack(tmp_path / "a.zip", members), tmp_path / "data", **options)


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a dataset, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def mask(tmp_path: Path, stem: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return read_label_map(tmp_path / "data" / "masks" / f"{stem}.png")


def test_a_dataset_is_written(tmp_path: Path) -> None:
    summary = convert(tmp_path, pair("default/скан", square("Земля", 0, 32, 128, 64), square("Здание", 0, 0, 64, 48)))
    assert set(tree(tmp_path / "data")) == {"imgs/скан.jpg", "masks/скан.png", "labels.yaml", "manifest.json"}
    assert (tmp_path / "data/imgs/скан.jpg").read_bytes() == jpeg()
    expected = np.zeros(SIZE, np.uint8)
    expected[32:] = 2
    expected[:48, :64] = 6  # listed later, so on top
    np.testing.assert_array_equal(mask(tmp_path, "скан"), expected)
    assert LabelSchema.from_yaml(tmp_path / "data/labels.yaml") == SCHEMA
    assert (summary.images, summary.shapes, summary.unchanged) == (1, 2, 0)
    assert summary.pixel_shares == pytest.approx({0: 0.25, 2: 0.375, 6: 0.375})
    assert summary.unknown == summary.broken == summary.warnings == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "data"]


def test_the_older_dialect_of_polygons_only(tmp_path: Path) -> None:
    xml = annotation("чужое имя.jpg", square("Земля", 0, 0, 128, 64)).replace("<folder>", "<folder>users/ivan")
    summary = convert(tmp_path, {"скан 1.xml": xml, "image-000.jpg": jpeg()})
    assert (summary.layout, summary.images) == ("LabelMe 3.0", 1)
    assert (mask(tmp_path, "image-000") == 2).all()


def test_names_are_matched_by_alias_without_case_and_white_space(tmp_path: Path) -> None:
    convert(
        tmp_path,
        pair("a", square("  ТРАНСПОРТ ", 0, 0, 10, 10), square("человек", 20, 0, 30, 10), square("Фон", 5, 0, 8, 10)),
    )
    row = mask(tmp_path, "a")[0]
    assert (row[:5] == 66).all()
    assert (row[5:8] == 0).all()
    assert (row[20:30] == 66).all()


def test_unknown_names_are_listed_once_and_nothing_is_written(tmp_path: Path) -> None:
    members = {
        **pair("a", square("Забор", 0, 0, 9, 9), square("забор ", 0, 0, 9, 9), square("Земля", 0, 0, 9, 9)),
        **pair("b", square("Забор", 0, 0, 9, 9), square('Столб "А"', 0, 0, 9, 9), square("нет", 0, 0, 9, 9, deleted=1)),
    }
    with pytest.raises(SchemaError, match=r"2 label names that the schema lacks\. Nothing was written") as caught:
        convert(tmp_path, members)
    message = str(caught.value)
    assert message.count("абор") == 2  # the name, and the line to add
    assert 'Забор: 3 shapes in 2 images; to add:  - {name: "Забор", id: 1}' in message
    assert r'Столб "А": 1 shape in 1 image; to add:  - {name: "Столб \"А\"", id: 3}' in message
    assert "нет" not in message
    assert not tree(tmp_path / "data")


def test_the_lines_to_add_are_a_schema(tmp_path: Path) -> None:
    members = pair("a", square("Столб: угол", 0, 0, 128, 64))
    with pytest.raises(SchemaError, match="to add") as caught:
        convert(tmp_path, members)
    line = next(line for line in str(caught.value).splitlines() if "to add:" in line).split("to add:")[1]
    path = tmp_path / "labels.yaml"
    path.write_text(f"labels:\n{line}\n", encoding="utf-8")
    convert(tmp_path, members, schema=LabelSchema.from_yaml(path), empty="skip")
    assert (mask(tmp_path, "a") == 1).all()


@pytest.mark.parametrize(("unknown", "value"), [("void", 255), ("background", 0)])
def test_unknown_names_are_painted_when_told(tmp_path: Path, unknown: str, value: int) -> None:
    members = pair("a", square("Земля", 0, 0, 128, 64), square("Забор", 0, 0, 10, 10))
    summary = convert(tmp_path, members, unknown=unknown)
    assert (mask(tmp_path, "a")[:10, :10] == value).all()
    assert (mask(tmp_path, "a")[10:] == 2).all()
    assert [(label.name, label.shapes, label.images) for label in summary.unknown] == [("Забор", 1, 1)]


def test_without_a_background_the_rest_is_void(tmp_path: Path) -> None:
    schema = LabelSchema.from_dict({"labels": [{"name": "Земля", "id": 2}]}, source="test")
    convert(tmp_path, pair("a", square("земля", 0, 0, 128, 32)), schema=schema, empty="skip")
    assert (mask(tmp_path, "a")[:32] == 2).all()
    assert (mask(tmp_path, "a")[32:] == 255).all()
    with pytest.raises(ConfigError, match="no label of the schema is marked 'background: true'"):
        convert(tmp_path, pair("a"), schema=schema, empty="skip", unknown="background")
    with pytest.raises(ConfigError, match="Frames without shapes cannot become background"):
        convert(tmp_path, pair("a"), schema=schema)


def test_frames_without_shapes_are_left_out_unless_told(tmp_path: Path) -> None:
    members = {**pair("a", square("Земля", 0, 0, 9, 9), square("Земля", 9, 0, 19, 9, deleted=1)), **pair("empty")}
    summary = convert(tmp_path, {**members, "alone.jpg": jpeg()}, empty="skip")
    assert summary.images == 1
    assert summary.warnings == (
        "1 shape marked as deleted left out",
        "1 image without shapes, left out; --empty takes them: empty.jpg",
        "1 image without annotations, not converted: alone.jpg",
    )
    assert not (tmp_path / "data/imgs/empty.jpg").exists()


@pytest.mark.parametrize(("empty", "value"), [("void", 255), ("background", 0)])
def test_frames_without_shapes_are_taken_as_told(tmp_path: Path, empty: str, value: int) -> None:
    summary = convert(tmp_path, {**pair("a", square("Земля", 0, 0, 9, 9)), **pair("b")}, empty=empty)
    assert summary.warnings == (f"1 image without shapes, taken as all {empty}: b.jpg",)
    assert (mask(tmp_path, "b") == value).all()
    assert mask(tmp_path, "a")[20, 20] == 0  # what nobody drew in a frame with shapes is the background all the same


def test_an_archive_without_a_single_shape_is_not_taken_silently(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"none of its 2 images has a shape\. Nothing was written\..*--empty"):
        convert(tmp_path, {**pair("a"), **pair("b")}, empty="skip")
    assert not tree(tmp_path / "data")


def test_the_manifest_says_where_items_come_from_and_who_drew_them(tmp_path: Path) -> None:
    summary = convert(tmp_path, pair("default/скан", square("Земля", 0, 32, 128, 64), square("Здание", 0, 0, 64, 48)))
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    assert manifest.snapshot == summary.manifest.snapshot
    (item,) = manifest.items
    assert item.source == {
        "kind": "archive",
        "archive": "a.zip",
        "format": "LabelMe 3.0",
        "member": "default/скан.jpg",
        "name": "скан.jpg",
        "task": None,
    }
    assert item.pixels == {0: 2048, 2: 3072, 6: 3072}
    assert (item.people_pixels, item.auto_pixels) == (6144, 0)


def test_equal_shapes_have_equal_recipes_and_others_have_others(tmp_path: Path) -> None:
    def recipe(*objects: str, **options: Any) -> str:
        item = convert(tmp_path, pair("a", *objects), overwrite=True, **options).manifest.items[0]
        return item.recipe

    first = recipe(square("Земля", 0, 0, 9, 9), square("Земля", 0, 0, 99, 9))
    assert recipe(square("Земля", 0, 0, 9, 9), square("Земля", 0, 0, 99, 9)) == first
    assert recipe(square("Земля", 0, 0, 98, 9)) != first
    assert recipe(square("Здание", 0, 0, 99, 9)) != first


def test_splits_are_made_once_by_the_rule_asked_for(tmp_path: Path) -> None:
    members = {
        name: data
        for site in "abcd"
        for number in "12"
        for name, data in pair(
            f"{site}_{number}", square("Земля", 0, 0, 9, 9), image=jpeg(2 * ord(site) + int(number))
        ).items()
    }
    plan = SplitPlan(group_by="^([a-z])_", validation=25, test=25)
    first = {item.name: item.split for item in convert(tmp_path, members, plan=plan).manifest.items}
    assert sorted(first.values(), key=str) == ["test"] * 2 + ["train"] * 4 + ["validation"] * 2
    assert all(first[f"{site}_1"] == first[f"{site}_2"] for site in "abcd")
    more = {**members, **pair("a_3", square("Земля", 0, 0, 9, 9), image=jpeg(3))}
    second = {item.name: item.split for item in convert(tmp_path, more).manifest.items}
    assert second == {**first, "a_3": first["a_1"]}
    with pytest.raises(DatasetError, match=r"are frozen: by \^x they would straddle"):
        convert(tmp_path, more, plan=SplitPlan(group_by="^x"))
    with pytest.raises(DatasetError, match=r"--group-by '\^x' does not match 9 file name"):
        convert_archive(tmp_path / "a.zip", tmp_path / "other", schema=SCHEMA, plan=SplitPlan(group_by="^x"))


def test_equal_names_in_subfolders_get_a_number(tmp_path: Path) -> None:
    members = {
        **pair("one/scan", square("Земля", 0, 0, 128, 64), image=jpeg(10)),
        **pair("two/scan", square("Здание", 0, 0, 128, 64), image=jpeg(20)),
        **pair("two/scan_1", square("Конструкции", 0, 0, 128, 64), image=jpeg(30)),
    }
    summary = convert(tmp_path, members)
    assert {stem: int(mask(tmp_path, stem)[0, 0]) for stem in ("scan", "scan_1", "scan_2")} == {
        "scan": 2,
        "scan_1": 65,
        "scan_2": 6,
    }
    assert (tmp_path / "data/imgs/scan_2.jpg").read_bytes() == jpeg(20)
    assert summary.warnings == (
        "1 image renamed, because the name is taken or not a safe file name: two/scan.jpg → scan_2.jpg",
    )


def test_archives_can_be_added_and_equal_files_are_skipped(tmp_path: Path) -> None:
    first = pair("a", square("Земля", 0, 0, 128, 64))
    convert(tmp_path, first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*/*")}
    summary = convert(tmp_path, {**first, **pair("b", square("Здание", 0, 0, 128, 64))})
    assert (summary.images, summary.unchanged) == (2, 1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert set(tree(tmp_path / "data")) == {
        "imgs/a.jpg", "imgs/b.jpg", "masks/a.png", "masks/b.png", "labels.yaml", "manifest.json"
    }  # fmt: skip


def test_other_content_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    convert(tmp_path, pair("a", square("Земля", 0, 0, 128, 64)))
    before = tree(tmp_path / "data")
    corrected = {**pair("a", square("Здание", 0, 0, 128, 64)), **pair("b")}
    with pytest.raises(DatasetError, match=r"already has 1 of these files with other content(.|\n)*masks/a\.png"):
        convert(tmp_path, corrected)
    assert tree(tmp_path / "data") == before
    summary = convert(tmp_path, corrected, overwrite=True)
    assert (mask(tmp_path, "a") == 6).all()
    assert summary.unchanged == 0


def test_a_dataset_of_another_schema_is_not_mixed(tmp_path: Path) -> None:
    convert(tmp_path, pair("a"))
    other = LabelSchema.from_dict({"labels": [{"name": "Земля", "id": 2, "background": True}]}, source="test")
    with pytest.raises(DatasetError, match="were painted by other labels: 0 is 'Фон' there"):
        convert(tmp_path, pair("b"), schema=other)


def test_comments_in_the_datasets_schema_stay(tmp_path: Path) -> None:
    convert(tmp_path, pair("a"))
    labels = tmp_path / "data" / "labels.yaml"
    labels.write_text("# ours\n" + labels.read_text(encoding="utf-8"), encoding="utf-8")
    convert(tmp_path, pair("b"))
    assert labels.read_text(encoding="utf-8").startswith("# ours")


def test_a_second_file_of_the_same_stem_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "imgs").mkdir(parents=True)
    (tmp_path / "data" / "imgs" / "a.png").write_bytes(b"old")
    with pytest.raises(DatasetError, match=r"holds pictures but no manifest\.json"):
        convert(tmp_path, pair("a"), overwrite=True)
    assert set(tree(tmp_path / "data")) == {"imgs/a.png"}


def test_broken_images_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    members = {
        **pair("good", square("Земля", 0, 0, 9, 9)),
        **pair("torn", image=jpeg()[:200]),
        "bad.xml": "<annotation>",
        **pair(
            "thin", square("Земля", 0, 0, 9, 9).replace("<pt><x>0</x><y>9</y></pt>", "").replace("<x>9</x>", "<x/>")
        ),
    }
    with pytest.raises(ArchiveError, match=r"3 of 4 images cannot be read\. Nothing was written") as caught:
        convert(tmp_path, members)
    message = str(caught.value)
    for member in ("torn.jpg", "bad.xml", "thin.xml"):
        assert member in message
    assert message.endswith("leave these images out with --skip-broken.")
    assert not tree(tmp_path / "data")


def test_broken_images_can_be_left_out(tmp_path: Path) -> None:
    members = {**pair("good", square("Земля", 0, 0, 9, 9)), **pair("torn", image=jpeg()[:200])}
    summary = convert(tmp_path, members, skip_broken=True)
    assert (summary.images, len(summary.broken)) == (1, 1)
    assert "torn.jpg" in summary.broken[0]
    assert set(tree(tmp_path / "data")) == {"imgs/good.jpg", "masks/good.png", "labels.yaml", "manifest.json"}


def test_an_archive_with_nothing_readable_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"1 of 1 image cannot be read.*(.|\n)*Correct the archive\.$"):
        convert(tmp_path, {"bad.xml": "<annotation>"}, skip_broken=True)
    assert not tree(tmp_path / "data")


def test_other_exports_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"looks like an export of Pascal VOC 1\.1, which is not read\. .*Also read"):
        convert(tmp_path, {"Annotations/a.xml": "<annotation/>", "ImageSets/Main/default.txt": "a"})
    with pytest.raises(ArchiveError, match="holds no annotations that are known"):
        convert(tmp_path, {"a.jpg": jpeg()})


def test_an_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DatasetError, match=r"data cannot be written: File exists\. Name another folder"):
        convert(tmp_path, pair("a"))


def test_an_outline_too_long_to_fill_is_reported_by_name(tmp_path: Path) -> None:
    points = "<pt><x>0</x><y>0</y></pt><pt><x>128</x><y>64</y></pt>" * (MAX_OUTLINE // 256 + 2)
    xml = annotation("a.jpg", f"<object><name>Земля</name><polygon>{points}</polygon></object>")
    with pytest.raises(ArchiveError, match=r"a\.xml, object 0 \(Земля\): the outline of a polygon is \d+ pixels long"):
        convert(tmp_path, {"a.xml": xml, "a.jpg": jpeg()})


# The verb


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_verb_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = pack(
        tmp_path / "a.zip",
        pair("a", square("Земля", 0, 0, 128, 32), square("Забор", 0, 32, 64, 64)) | pair("b", image=jpeg(9)),
    )
    options = ("--unknown", "void", "--empty", "background", "--group-by", "image", "--validation", "50", "--test", "0")
    assert run(archive, "-o", tmp_path / "data", *options) == 0
    captured = capsys.readouterr()
    assert "images         2" in captured.out
    assert "shapes         2" in captured.out
    assert "Земля             2   25.000%" in captured.out
    assert "void (255)      255   12.500%" in captured.out
    assert "warning: unknown label 'Забор': 1 shape in 1 image painted as void" in captured.err
    assert "warning: 1 image without shapes" in captured.err
    assert "LabelMe 3.0" in captured.out
    assert re.search(r"\nvalidation +1 +1 ", captured.out.replace("\n  ", "\n"))


def test_the_verb_takes_the_schema_of_the_dataset(tmp_path: Path) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("labels: [{name: Забор, id: 9}]\n", encoding="utf-8")
    archive = pack(tmp_path / "a.zip", pair("a", square("Забор", 0, 0, 128, 64)))
    assert run(archive, "-o", tmp_path / "data", "--labels", labels) == 0
    more = pack(tmp_path / "b.zip", pair("b", square("забор", 0, 0, 128, 64)))
    assert run(more, "-o", tmp_path / "data") == 0
    assert (mask(tmp_path, "b") == 9).all()


def test_the_verb_tells_when_images_were_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = pack(tmp_path / "a.zip", {**pair("good", square("Земля", 0, 0, 9, 9)), **pair("torn", image=b"x")})
    assert run(archive, "-o", tmp_path / "data", "--skip-broken") == 1
    assert "warning: left out: torn.jpg: " in capsys.readouterr().err


def command_line(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "convert", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=Path(verb.__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def test_the_command_line(tmp_path: Path) -> None:
    members = pair("скан", square("Забор", 0, 0, 128, 64))
    refused = command_line(pack(tmp_path / "a.zip", members), "-o", tmp_path / "data")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert 'Забор: 1 shape in 1 image; to add:  - {name: "Забор", id: 1}' in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not tree(tmp_path / "data")
    done = command_line(tmp_path / "a.zip", "-o", tmp_path / "data", "--unknown", "background")
    assert done.returncode == 0
    assert (tmp_path / "data/imgs/скан.jpg").exists()
    assert "images         1" in done.stdout


def test_help_teaches_by_example() -> None:
    shown = command_line("--help")
    assert shown.returncode == 0
    assert "sscloud convert street.zip -o dataset --unknown void" in shown.stdout


def test_only_items_of_the_same_origin_are_replaced_unasked(tmp_path: Path) -> None:
    convert(tmp_path, pair("a", square("Земля", 0, 0, 64, 32)), origin="https://cvat task 1")
    before = mask(tmp_path, "a").copy()
    convert(tmp_path, pair("a", square("Здание", 0, 0, 64, 32)), origin="https://cvat task 1")
    assert not np.array_equal(mask(tmp_path, "a"), before)
    after = tree(tmp_path / "data")
    with pytest.raises(DatasetError, match="already has 1 of these files with other content"):
        convert(tmp_path, pair("a", square("Земля", 0, 0, 64, 32)), origin="https://cvat task 2")
    assert tree(tmp_path / "data") == after


def test_an_image_with_only_lines_is_not_taken_for_empty(tmp_path: Path) -> None:
    xml = (
        '<annotations><image id="0" name="a.jpg" width="128" height="64"><polyline label="Земля" points="1,1;2,2"/>'
        '</image><image id="1" name="b.jpg" width="128" height="64"></image></annotations>'
    )
    members = {"annotations.xml": xml, "images/a.jpg": jpeg(), "images/b.jpg": jpeg(80)}
    summary = convert(tmp_path, members, empty="background")
    assert [item.name for item in summary.manifest.items] == ["b"]
    assert any("none makes a mask, left out: a.jpg" in warning for warning in summary.warnings)
