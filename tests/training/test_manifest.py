import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sscloud.errors import DatasetError, ImageError, SchemaError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from training import manifest
from training.manifest import (
    DatasetWriter,
    Manifest,
    ManifestItem,
    make_item,
    read_manifest,
    settle_if_free,
)
from training.splits import SplitPlan

SCHEMA = LabelSchema.default()
MakeDataset = Callable[..., Path]


def picture(seed: int, size_hw: tuple[int, int] = (8, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size_hw, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def described(name: str, *, seed: int = 0, paint: int = 2, recipe: str = "r", task: int = 1) -> tuple[Any, ...]:
    """(item, image, mask) of a panorama of 16x8 whose lower half is painted, of that one row by a model."""
    label_map = np.zeros((8, 16), np.uint8)
    label_map[4:] = paint
    source_map = np.zeros((8, 16), np.uint8)
    source_map[4:], source_map[7] = 1, 2
    image = picture(seed)
    source = {"kind": "cvat", "server": "https://cvat.test", "project": 1, "task": task, "job": 3, "frame": seed}
    item, mask = make_item(
        image_name=name,
        image=image,
        label_map=label_map,
        source_map=source_map,
        source={**source, "name": f"улица/{name}"},
        recipe=recipe,
        group=f"task:https://cvat.test#{task}",
    )
    return item, image, mask


def put(writer: DatasetWriter, name: str, **values: Any) -> ManifestItem:
    item, image, mask = described(name, **values)
    writer.stage(item, image=image, mask=mask)
    found = writer.get(item.name)
    assert found is not None
    return found


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def stored(root: Path) -> Manifest:
    found = read_manifest(root)
    assert found is not None
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three committed items of three tasks with frozen splits."""
    path = tmp_path / "data"
    with DatasetWriter(path, schema=SCHEMA) as writer:
        for number in range(3):
            put(writer, f"{number}.png", seed=number, task=number)
        writer.set_jobs({"https://cvat.test#3": {"updated": "2026-01-01", "empty": [1, 2]}})
        writer.freeze_splits(SplitPlan())
        writer.commit()
    return path


def test_make_item() -> None:
    item, image, mask = described("1_улица.png", paint=65)

    assert (item.name, item.image, item.mask, item.size_hw) == ("1_улица", "1_улица.png", "1_улица.png", (8, 16))
    assert item.pixels == {0: 64, 65: 64}
    assert (item.people_pixels, item.auto_pixels, item.split) == (48, 16, None)
    assert np.asarray(Image.open(io.BytesIO(mask))).dtype == np.uint8
    assert described("1_улица.png", paint=65) == (item, image, mask)


def test_make_item_refuses_what_does_not_fit() -> None:
    values: dict[str, Any] = {"image_name": "1.png", "source": {"kind": "x"}, "recipe": "", "group": ""}
    small = np.zeros((4, 4), np.uint8)
    with pytest.raises(DatasetError, match=r"1\.png: the image is 16x8, its annotations are for 4x4"):
        make_item(image=picture(0), label_map=small, source_map=small, **values)
    with pytest.raises(ImageError, match=r"3 bytes are not a picture"):
        make_item(image=b"xxx", label_map=small, source_map=small, **values)


def test_what_is_committed_is_read_back(root: Path) -> None:
    found = stored(root)

    assert [item.name for item in found.items] == ["0", "1", "2"]
    assert found.items[1].source["name"] == "улица/1.png"
    assert {item.split for item in found.items} == {"train", "validation", "test"}
    assert found.jobs == {"https://cvat.test#3": {"updated": "2026-01-01", "empty": [1, 2]}}
    assert found.plan == SplitPlan()
    assert found.schema == SCHEMA
    assert set(tree(root)) == {
        "manifest.json",
        "labels.yaml",
        *(f"{folder}/{number}.png" for folder in ("imgs", "masks") for number in range(3)),
    }
    assert (read_label_map(root / "masks/1.png")[4:] == 2).all()
    text = (root / "manifest.json").read_text(encoding="utf-8")
    assert "улица/1.png" in text
    assert json.loads(text)["version"] == 1
    with DatasetWriter(root, schema=SCHEMA) as writer:
        assert writer.manifest == found


def test_bytes_do_not_depend_on_the_way(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for number in (2, 0, 1):
        with DatasetWriter(other, schema=SCHEMA) as writer:
            put(writer, f"{number}.png", seed=number, task=number, paint=5)
            put(writer, f"{number}.png", seed=number, task=number)
            writer.commit()
    with DatasetWriter(other, schema=SCHEMA) as writer:
        put(writer, "9.png", seed=9)
        writer.set_jobs({"https://cvat.test#3": {"empty": [1, 2], "updated": "2026-01-01"}, "x#1": {}})
        writer.commit()
        writer.remove(["9", "nobody"])
        writer.set_jobs({"x#1": None, "y#1": None})
        writer.freeze_splits(SplitPlan())
        writer.commit()

    assert tree(other) == tree(root)


def test_snapshot(root: Path) -> None:
    before = stored(root)
    assert len(before.snapshot) == 16

    def after(change: Callable[[DatasetWriter], object]) -> str:
        copy = root.with_name("copy")
        shutil.copytree(root, copy)
        with DatasetWriter(copy, schema=SCHEMA) as writer:
            change(writer)
            writer.commit()
        snapshot = stored(copy).snapshot
        shutil.rmtree(copy)
        return snapshot

    assert after(lambda writer: writer.set_jobs({"a#1": {"updated": "now"}})) == before.snapshot
    assert after(lambda writer: put(writer, "1.png", seed=1, task=1, recipe="other")) == before.snapshot
    changed = {
        after(lambda writer: put(writer, "1.png", seed=1, task=1, paint=5)),
        after(lambda writer: put(writer, "1.png", seed=7, task=1)),
        after(lambda writer: put(writer, "4.png", seed=4)),
        after(lambda writer: writer.remove(["1"])),
        before.snapshot,
    }
    assert len(changed) == 5


def test_nothing_is_visible_before_the_commit(root: Path) -> None:
    before = tree(root)
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "1.png", seed=1, paint=66)
        put(writer, "new.png", seed=8)
        writer.remove(["2"])
        during = tree(root)
        assert {name: data for name, data in during.items() if not name.startswith(".staged/")} == before

    assert tree(root) == before
    assert not (root / ".staged").exists()


def test_replacing_and_removing(root: Path) -> None:
    image = Image.open(root / "imgs/0.png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    label_map = read_label_map(root / "masks/0.png")
    item, mask = make_item(
        image_name="0.jpg",
        image=buffer.getvalue(),
        label_map=label_map,
        source_map=label_map,
        source={"kind": "cvat"},
        recipe="",
        group="",
    )
    with DatasetWriter(root, schema=SCHEMA) as writer:
        writer.stage(item, image=buffer.getvalue(), mask=mask)
        writer.remove(["2"])
        put(writer, "3.png", seed=3)
        writer.remove(["3"])  # staged, and withdrawn before the commit
        writer.commit()

    assert [path.name for path in sorted((root / "imgs").iterdir())] == ["0.jpg", "1.png"]
    assert [path.name for path in sorted((root / "masks").iterdir())] == ["0.png", "1.png"]
    assert [item.image for item in stored(root).items] == ["0.jpg", "1.png"]


def test_only_the_mask_or_only_the_facts(root: Path) -> None:
    item, image, mask = described("1.png", seed=1, paint=66, task=1)
    with DatasetWriter(root, schema=SCHEMA) as writer:
        writer.stage(item, image=None, mask=mask)
        writer.commit()
        assert (read_label_map(root / "masks/1.png")[4:] == 66).all()
        writer.stage(described("1.png", seed=1, paint=66, task=1, recipe="same")[0], image=None, mask=None)
        writer.commit()
        assert stored(root).items[1].recipe == "same"
        with pytest.raises(DatasetError, match=r"masks/1\.png of that content is not in .*data yet, so its bytes are"):
            writer.stage(described("1.png", seed=1, paint=5)[0], image=None, mask=None)
        with pytest.raises(DatasetError, match=r"imgs/7\.png of that content is not in .* yet"):
            writer.stage(described("7.png")[0], image=None, mask=mask)
        with pytest.raises(DatasetError, match=r"imgs/1\.png: these are not the bytes that were described"):
            writer.stage(item, image=image + b"x", mask=mask)


def test_names_in_the_way(root: Path) -> None:
    (root / "imgs/own.png").write_bytes(picture(5))
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "Straße.png", seed=4)
        with pytest.raises(DatasetError, match=r"STRASSE\.png would share its mask's name with Straße"):
            put(writer, "STRASSE.png", seed=5)
        with pytest.raises(DatasetError, match=r"imgs/own\.png is in the way: the manifest does not name it"):
            put(writer, "own.png", seed=6)
        (root / "masks/other.png").write_bytes(b"")
        with pytest.raises(DatasetError, match=r"masks/other\.png is in the way"):
            put(writer, "other.png", seed=7)
        put(writer, "after.png", seed=6)
        writer.commit()

    assert (root / "imgs/own.png").read_bytes() == picture(5)
    assert not (root / "imgs/other.png").exists()
    assert [item.name for item in stored(root).items] == ["0", "1", "2", "Straße", "after"]


def test_an_image_seen_before_gets_its_split_back(root: Path) -> None:
    splits = {item.name: item.split for item in stored(root).items}
    with DatasetWriter(root, schema=SCHEMA) as writer:
        writer.remove(["0", "1", "2"])
        writer.commit()
        assert stored(root).items == ()
        for number in range(3):
            assert put(writer, f"again {number}.png", seed=number, task=50).split == splits[str(number)]
        assert put(writer, "never seen.png", seed=77).split is None


def test_freezing_goes_by_the_plans_groups(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, schema=SCHEMA) as writer:
        for number in range(12):
            put(writer, f"site{number % 4}_{number}.png", seed=number)
        assert writer.freeze_splits(SplitPlan()).too_few is not None
        assert {item.split for item in writer.manifest.items} == {None}
        with pytest.raises(DatasetError, match=r"does not match 12 file name\(s\): улица/site0_0\.png, улица/site0_4"):
            writer.freeze_splits(SplitPlan(group_by="x"))
        assert writer.freeze_splits(SplitPlan(group_by=r"site\d+")).too_few is None
        found = {(item.group, item.split) for item in writer.manifest.items}
        assert len(found) == 4
        assert {group for group, _ in found} == {f"name:site{number}" for number in range(4)}
        with pytest.raises(DatasetError, match=r"made with --group-by site.d\+ and are frozen: by image they would"):
            writer.freeze_splits(SplitPlan(group_by="image"))


def test_labels_yaml(root: Path) -> None:
    text = "# ours\n" + SCHEMA.to_yaml()
    (root / "labels.yaml").write_text(text, encoding="utf-8")
    with DatasetWriter(root, schema=SCHEMA) as writer:
        writer.commit()
    assert (root / "labels.yaml").read_text(encoding="utf-8") == text

    data = SCHEMA.to_dict()
    data["labels"][1].update(name="Грунт", aliases=["Земля"])
    renamed = LabelSchema.from_dict(data, source="")
    with DatasetWriter(root, schema=renamed) as writer:
        writer.commit()
    assert LabelSchema.from_yaml(root / "labels.yaml") == renamed
    assert stored(root).schema == renamed
    data["labels"][1].update(name="Вода", aliases=[])
    with pytest.raises(DatasetError, match=r"painted by other labels: 2 is 'Грунт' there, 'Вода' in the new labels"):
        DatasetWriter(root, schema=LabelSchema.from_dict(data, source="")).__enter__()
    del data["labels"][1]
    with pytest.raises(DatasetError, match=r"2 is 'Грунт' there, 'nothing' in the new labels\. Keep the ids"):
        DatasetWriter(root, schema=LabelSchema.from_dict(data, source="")).__enter__()
    unused = [entry for entry in renamed.to_dict()["labels"] if entry["id"] != 66]
    with DatasetWriter(root, schema=LabelSchema.from_dict({"labels": unused}, source="")):
        pass


def test_one_writer_at_a_time(root: Path) -> None:
    code = "import sys, pathlib; from training.manifest import *; from sscloud.labels import LabelSchema\n"
    code += "with DatasetWriter(pathlib.Path(sys.argv[1]), schema=LabelSchema.default()): print('writing')"
    command = [sys.executable, "-c", code, str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with DatasetWriter(root, schema=SCHEMA):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "Another sscloud fetch or convert is writing to" in result.stderr
        with pytest.raises(DatasetError, match=r"is writing to .*data\. Wait until it has ended"):
            DatasetWriter(root, schema=SCHEMA).__enter__()
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "writing\n"


def test_readers_do_not_disturb_a_writer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_PATIENCE_S", 0.05)
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "3.png", seed=3)
        settle_if_free(root)
        writer.commit()
    assert (root / "imgs/3.png").read_bytes() == picture(3)


def test_a_commit_that_fails_half_way_is_finished_later(root: Path) -> None:
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "3.png", seed=3)
        put(writer, "4.png", seed=4)
        (root / "masks/3.png").mkdir()
        with pytest.raises(DatasetError, match=r"masks/3\.png.* cannot be written: Is a directory.*start .* again"):
            writer.commit()
    assert (root / ".staged/masks/3.png").is_file()
    with pytest.raises(DatasetError, match="cannot be written"):
        DatasetWriter(root, schema=SCHEMA).__enter__()
    (root / "masks/3.png").rmdir()

    settle_if_free(root)

    assert not (root / ".staged").exists()
    assert (read_label_map(root / "masks/3.png")[4:] == 2).all()
    assert [item.name for item in stored(root).items] == ["0", "1", "2", "3", "4"]


def test_a_full_disk_changes_nothing(root: Path) -> None:
    before = tree(root)
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "3.png", seed=3)
        shutil.rmtree(root / ".staged")
        (root / ".staged").write_bytes(b"")
        with pytest.raises(DatasetError, match=r"cannot be written: (Not a directory|File exists)"):
            put(writer, "4.png", seed=4)
        (root / ".staged").unlink()
    assert tree(root) == before


def test_hostile_staging_folder(root: Path, tmp_path: Path) -> None:
    before = tree(root)
    victim = tmp_path / "victim.png"
    victim.write_bytes(b"precious")
    staged = root / ".staged"
    (staged / "imgs").mkdir(parents=True)
    (staged / "imgs/0.png").symlink_to(victim)
    (staged / "imgs/1.png").write_bytes(b"other bytes than the manifest names")
    (staged / "imgs/deep").mkdir()
    for listed in ('["../victim.png", "imgs/../../victim.png", "imgs/0.png", 7, "labels.yaml"]', "{", '"imgs/0.png"'):
        staged.mkdir(exist_ok=True)
        (staged / "obsolete.json").write_text(listed)
        with DatasetWriter(root, schema=SCHEMA):
            pass
        assert tree(root) == before
    assert victim.read_bytes() == b"precious"


def test_a_folder_without_a_manifest_is_taken_over(make_dataset: MakeDataset) -> None:
    root = make_dataset(4)
    files = tree(root)
    with DatasetWriter(root, schema=SCHEMA) as writer:
        put(writer, "new.png", seed=3)
        writer.freeze_splits(SplitPlan(group_by="image"))
        writer.commit()

    found = stored(root)
    assert [item.name for item in found.items] == [*(f"{n}_normals" for n in range(1, 5)), "new"]
    assert found.items[0].source == {"kind": "folder", "name": "1_normals.png"}
    assert found.items[0].pixels[5] == 20 * 24
    assert None not in {item.split for item in found.items}
    assert {name: data for name, data in tree(root).items() if name in files} == files


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "masks/1_normals.png").unlink(), r"are no pairs of .*\(1_normals\.png\)"),
        (lambda root: (root / "imgs/2_normals.png").unlink(), r"are no pairs of .*\(2_normals\.png\)"),
        (lambda root: shutil.copy(root / "imgs/1_normals.png", root / "imgs/1_normals.jpg"), r"differ in case only"),
        (lambda root: (root / "imgs/1_normals.png").rename(root / "imgs/a:b.png"), r"a:b\.png"),
        (lambda root: Image.new("L", (8, 8)).save(root / "masks/1_normals.png"), r"1_normals\.png: .*differ in size"),
    ],
)
def test_folders_that_cannot_be_taken_over(
    make_dataset: MakeDataset, spoil: Callable[[Path], object], message: str
) -> None:
    root = make_dataset(2)
    spoil(root)
    before = tree(root)
    with pytest.raises(DatasetError, match=message):
        DatasetWriter(root, schema=SCHEMA).__enter__()
    assert tree(root) == before


def test_labels_of_a_folder_without_a_manifest_hold(make_dataset: MakeDataset) -> None:
    root = make_dataset(1)
    (root / "labels.yaml").write_text("labels: [{name: Вода, id: 2}, {name: a, id: 5}, {name: b, id: 6}]\nvoid: [0]\n")
    with pytest.raises(DatasetError, match=r"2 is 'Вода' there, 'Земля' in the new labels"):
        DatasetWriter(root, schema=SCHEMA).__enter__()
    (root / "labels.yaml").write_text("labels: []")
    with pytest.raises(SchemaError, match=r"'labels' must be a list"):
        DatasetWriter(root, schema=SCHEMA).__enter__()


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((root / "manifest.json").read_bytes())
    change(data)
    (root / "manifest.json").write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), r"'version' is 2, this sscloud reads 1"),
        (lambda d: d.update(extra=1), r"the manifest must have the keys .*unknown are \['extra'\], missing \[\]"),
        (lambda d: d.pop("jobs"), r"unknown are \[\], missing \['jobs'\]"),
        (lambda d: d.update(items={}), r"'items' must be a list, found \{\}"),
        (lambda d: d["items"].append(d["items"][0]), r"the images 0\.png and 0\.png would share a mask"),
        (lambda d: d["items"].append([]), r"item 4 must be a mapping, found \[\]"),
        (lambda d: d["items"][0].update(colour=1), r"item 1 must have the keys .*unknown are \['colour'\]"),
        (lambda d: d["items"][0].update(image="../0.png"), r"'image' of item 1 is no file name of a picture: '\.\./0"),
        (lambda d: d["items"][0].update(image="/etc/passwd"), r"'image' of item 1 is no file name"),
        (lambda d: d["items"][0].update(image=7), r"'image' of item 1 is no file name of a picture: 7"),
        (lambda d: d["items"][0].update(size_hw=[8]), r"'size_hw' of 0\.png must be \[height, width\], found \[8\]"),
        (lambda d: d["items"][0].update(size_hw=[8, True]), r"'size_hw' of 0\.png must be"),
        (lambda d: d["items"][0].update(size_hw=[10**9, 10**9]), r"is 1000000000000000000 pixels, at most"),
        (lambda d: d["items"][0].update(image_sha256="AB"), r"'image_sha256' of 0\.png must be 64 hex digits"),
        (
            lambda d: d["items"][0].update(mask_sha256=None),
            r"'mask_sha256' of 0\.png must be 64 hex digits, found None",
        ),
        (lambda d: d["items"][0].update(pixels={"0": 64}), r"'pixels' of 0\.png must give 128 pixels by label id"),
        (lambda d: d["items"][0].update(pixels={"256": 128}), r"'pixels' of 0\.png must give 128"),
        (lambda d: d["items"][0].update(pixels={"0": 129, "1": -1}), r"'pixels' of 0\.png must give 128"),
        (lambda d: d["items"][0].update(people_pixels=129), r"'people_pixels' of 0\.png must be a number of pixels up"),
        (lambda d: d["items"][0].update(auto_pixels=0.5), r"'auto_pixels' of 0\.png must be"),
        (lambda d: d["items"][0].update(source={"kind": []}), r"'source' of 0\.png may hold texts and whole numbers"),
        (lambda d: d["items"][0].update(recipe=None), r"'recipe' of 0\.png must be a text, found None"),
        (lambda d: d["items"][0].update(group=1), r"'group' of 0\.png must be a text"),
        (
            lambda d: d["items"][0].update(split="holdout"),
            r"the split of '0\.png' must be one of train, validation, te",
        ),
        (lambda d: d.update(jobs=[]), r"'jobs' must be a mapping"),
        (lambda d: d.update(jobs={"a": 1}), r"the job 'a' must be a mapping, found 1"),
        (lambda d: d["splits"]["images"].update(x="train"), r"a key of 'splits\.images' must be 64 hex digits"),
        (lambda d: d["splits"]["groups"].update(x="all"), r"the split of 'x' must be one of"),
        (lambda d: d["splits"].update(pinned={}), r"'splits\.pinned' must be a list"),
        (lambda d: d["splits"].update(pinned=["x"]), r"an entry of 'splits\.pinned' must be 64 hex digits"),
        (lambda d: d.update(plan={"group_by": "task"}), r"'plan' must have the keys"),
        (lambda d: d["plan"].update(test="10"), r"'plan' must hold a text and two percentages"),
        (lambda d: d["plan"].update(test=99), r"'plan': --validation 10 and --test 99 leave nothing"),
        (lambda d: d.update(labels={"labels": []}), r"'labels' must be a list with at least one label"),
    ],
)
def test_manifests_changed_by_hand(root: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(root, change)
    with pytest.raises(DatasetError, match=rf"manifest\.json cannot be used: (?s:.*){message}(?s:.*)Put back the file"):
        read_manifest(root)
    before = tree(root)
    with pytest.raises(DatasetError, match=message):
        DatasetWriter(root, schema=SCHEMA).__enter__()
    assert tree(root) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"is not JSON"),
        (b"\xff\xfe{}", r"is not JSON"),
        (b'{"version": NaN}', r"is not JSON: NaN is no number"),
        (b'{"version": 1, "version": 1}', r"a key stands twice among \['version', 'version'\]"),
        (b"[" * 100_000, r"is not JSON|cannot be used"),
        (b"[]", r"the manifest must be a mapping, found \[\]"),
    ],
)
def test_files_that_are_no_manifest(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DatasetError, match=message):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DatasetError, match=r"manifest\.json cannot be read: Is a directory"):
        read_manifest(tmp_path)


def test_half_characters_survive(tmp_path: Path) -> None:
    item, image, mask = described("1.png")
    source = {"kind": "cvat", "name": "half \ud800 a character"}
    odd = ManifestItem(**{**{name: getattr(item, name) for name in item.__slots__}, "source": source})
    with DatasetWriter(tmp_path, schema=SCHEMA) as writer:
        writer.stage(odd, image=image, mask=mask)
        writer.commit()
    assert stored(tmp_path).items[0].source == source


# --- killed at any moment -----------------------------------------------------------------------------------------

SESSION = """
import io, os, signal, sys
from pathlib import Path
import numpy as np
from PIL import Image
from sscloud.labels import LabelSchema
from training.manifest import DatasetWriter, make_item
from training.splits import SplitPlan

LabelSchema.default(), Image.preinit()


def panorama(name, seed, paint, task):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 16, 3), np.uint8)).save(buffer, "PNG")
    label_map = np.full((8, 16), paint, np.uint8)
    item, mask = make_item(image_name=name, image=buffer.getvalue(), label_map=label_map, source_map=label_map // 255,
                           source={"kind": "cvat", "server": "s", "task": task}, recipe=str(paint), group="")
    return item, buffer.getvalue(), mask


def first(root):
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        for number in range(4):
            item, image, mask = panorama(f"{number}.png", number, 2, number)
            writer.stage(item, image=image, mask=mask)
        writer.set_jobs({"s#1": {"updated": 1}})
        writer.freeze_splits(SplitPlan())
        writer.commit()


def second(root):
    data = LabelSchema.default().to_dict()
    data["labels"][2]["name"] = "Зелень"
    with DatasetWriter(root, schema=LabelSchema.from_dict(data, source="")) as writer:
        have = {item.name: item for item in writer.manifest.items}
        wanted = [("0.png", 0, 6, 0), ("1.png", 1, 2, 1), ("2.jpg", 12, 2, 2), ("4.png", 4, 6, 4)]
        for name, seed, paint, task in wanted:
            item, image, mask = panorama(name, seed, paint, task)
            old = have.get(item.name)
            if old is None or (old.image_sha256, old.recipe) != (item.image_sha256, item.recipe):
                writer.stage(item, image=image, mask=mask)
                writer.commit()
        writer.remove(["3"])
        writer.set_jobs({"s#1": {"updated": 2}, "s#2": {"updated": 2}})
        writer.freeze_splits(SplitPlan())
        writer.commit()


def killed_at(event):
    count = 0

    def hook(name, _arguments):
        nonlocal count
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


base = Path(sys.argv[1])
first(base / "before")
first(base / "after")
second(base / "after")
event, status = 0, 1
while status:
    event += 1
    root = base / f"killed-{event}"
    first(root)
    child = os.fork()
    if child == 0:
        killed_at(event)
        second(root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders whose second writer was killed at its 1st, 2nd, … touch of the file system."""
    if not hasattr(os, "fork"):
        pytest.skip("killing at an exact moment needs fork")
    base = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SESSION, str(base)], env=environment, check=True)
    yield base
    shutil.rmtree(base)


def whole(root: Path) -> dict[str, tuple[bytes, bytes]]:
    """Item → its files, each checked against the manifest; nothing else lies about."""
    found = stored(root)
    files = {
        item.name: ((root / "imgs" / item.image).read_bytes(), (root / "masks" / item.mask).read_bytes())
        for item in found.items
    }
    names = {f"imgs/{item.image}" for item in found.items} | {f"masks/{item.mask}" for item in found.items}
    assert set(tree(root)) == {"manifest.json", "labels.yaml", *names}
    assert LabelSchema.from_yaml(root / "labels.yaml") == found.schema
    for item in found.items:
        hashes = tuple(hashlib.sha256(data).hexdigest() for data in files[item.name])
        assert hashes == (item.image_sha256, item.mask_sha256)
    return files


def test_killed_anywhere_every_item_is_old_or_new(killed: Path, tmp_path: Path) -> None:
    old, new = whole(killed / "before"), whole(killed / "after")
    places = [shutil.copytree(place, tmp_path / place.name) for place in killed.glob("killed-*")]
    states = set()
    for root in places:
        settle_if_free(root)
        for leftover in root.glob(".writing-*"):  # of the manifest itself: removed by the next writer
            leftover.unlink()
        found = whole(root)
        assert all(files in (old.get(name), new.get(name)) for name, files in found.items()), root
        assert found.keys() >= old.keys() & new.keys(), root
        states.add(frozenset(found.items()))
    assert len(places) > 60
    assert len(states) == 5  # before, and after each of the four commits that change files


def test_killed_anywhere_and_started_again_ends_in_the_same_bytes(killed: Path) -> None:
    places = list(killed.glob("killed-*"))
    rerun = SESSION[: SESSION.index("base = Path")] + "for root in sys.argv[1:]: second(Path(root))\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", rerun, *map(str, places)], env=environment, check=True)

    expected = tree(killed / "after")
    for root in places:
        assert tree(root) == expected, root
        assert not (root / ".staged").exists()
