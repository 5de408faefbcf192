"""Archives of known scenes: the structure of CVAT's exports, exact round trips, the same bytes every time."""

import io
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import ConfigError, SchemaError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from training.formats.convert import convert_archive
from training.sample.archives import ArchiveItem, run_lengths, write_cvat_for_images, write_labelme

SCHEMA = LabelSchema.default()


def jpeg(size_hw: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size_hw, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def scene(seed: int, size_hw: tuple[int, int] = (64, 128)) -> NDArray[np.uint8]:
    """Overlapping blocks of all labels with holes, touching corners and specks."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    label_map = np.zeros(size_hw, np.uint8)
    for label_id in rng.choice([0, 2, 5, 6, 65, 66], 60):
        y, x = rng.integers(0, height), rng.integers(0, width)
        label_map[y : y + rng.integers(1, 24), x : x + rng.integers(1, 40)] = label_id
    specks = rng.random(size_hw) < 0.02
    label_map[specks] = rng.choice([0, 2, 5, 6, 65, 66], int(specks.sum()))
    return label_map


def items(count: int = 3) -> list[ArchiveItem]:
    return [
        ArchiveItem(name=f"{i}_normals.jpg", image_jpeg=jpeg((64, 128), i), label_map=scene(i)) for i in range(count)
    ]


def paths(element: ET.Element, prefix: str = "") -> set[str]:
    here = f"{prefix}/{element.tag}"
    return {here}.union(*(paths(child, here) for child in element))


def test_labelme_round_trip_is_exact(tmp_path: Path) -> None:
    write_labelme(tmp_path / "a.zip", items(), schema=SCHEMA)
    summary = convert_archive(tmp_path / "a.zip", tmp_path / "data", schema=SCHEMA)
    assert summary.images == 3
    for item in items():
        stem = item.name.removesuffix(".jpg")
        np.testing.assert_array_equal(read_label_map(tmp_path / "data" / "masks" / f"{stem}.png"), item.label_map)
        assert (tmp_path / "data" / "imgs" / item.name).read_bytes() == item.image_jpeg


def test_labelme_has_the_structure_of_cvats_export(tmp_path: Path) -> None:
    write_labelme(tmp_path / "a.zip", items(1), schema=SCHEMA)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        text = archive.read("default/0_normals.xml").decode()
        root = ET.fromstring(text)
        masks = [element.text for element in root.iter("mask")]
        with Image.open(io.BytesIO(archive.read(f"default/Masks/{masks[0]}"))) as mask:
            assert mask.mode == "RGBA"
            assert mask.size == (128, 64)
            assert sorted(color for _, color in mask.getcolors() or []) == [(0, 0, 0, 0), (0, 203, 255, 153)]
    assert {"default/0_normals.xml", "default/0_normals.jpg"} <= set(names)
    assert {f"default/Masks/{name}" for name in masks} == {name for name in names if "/Masks/" in name}
    assert masks[0] == "0_normals_mask_0.png"
    assert [child.tag for child in root][:5] == ["filename", "folder", "source", "imagesize", "object"]
    objects = root.findall("object")
    head = ["name", "deleted", "verified", "occluded", "date", "id", "parts"]
    assert {tuple(child.tag for child in element) for element in objects} == {
        (*head, "segm", "attributes"),
        (*head, "polygon", "attributes"),
    }
    assert text.startswith("<annotation>\n  <filename>0_normals.jpg</filename>\n  <folder></folder>\n")
    assert root.findtext("object/polygon/pt/x", "").endswith(".00")
    assert not any(element.findtext("name") == "Фон" for element in objects)


def test_the_labelme_box_is_inclusive(tmp_path: Path) -> None:
    label_map = np.zeros((64, 128), np.uint8)
    label_map[10:20, 30:50] = 6
    item = ArchiveItem(name="a.jpg", image_jpeg=jpeg((64, 128)), label_map=label_map)
    write_labelme(tmp_path / "a.zip", [item], schema=SCHEMA)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        box = ET.fromstring(archive.read("default/a.xml")).find("object/segm/box")
    assert box is not None
    assert [child.text for child in box] == ["30.00", "10.00", "49.00", "19.00"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_cvat_for_images_round_trip_is_exact(tmp_path: Path) -> None:
    from pycocotools import mask as coco

    write_cvat_for_images(tmp_path / "a.zip", items(), schema=SCHEMA)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        root = ET.fromstring(archive.read("annotations.xml"))
        assert archive.read("images/default/1_normals.jpg") == items()[1].image_jpeg
    for item, image in zip(items(), root.findall("image"), strict=True):
        assert image.get("name") == item.name
        label_map = np.zeros((64, 128), np.uint8)
        for shape in image:
            label = SCHEMA.find(shape.attrib["label"])
            assert label is not None
            if shape.tag == "mask":
                left, top, width, height = (int(shape.attrib[key]) for key in ("left", "top", "width", "height"))
                lengths = [int(length) for length in shape.attrib["rle"].split(", ")]
                assert sum(lengths) == width * height
                crop = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)
                label_map[top : top + height, left : left + width][crop] = label.id
            else:
                flat = [float(v) for point in shape.attrib["points"].split(";") for v in point.split(",")]
                label_map[coco.decode(coco.frPyObjects([flat], 64, 128)[0]).astype(bool)] = label.id
        np.testing.assert_array_equal(label_map, item.label_map)
    assert root.find("image/mask") is not None
    assert root.find("image/polygon") is not None


def test_cvat_for_images_has_the_structure_of_cvats_export(tmp_path: Path) -> None:
    empty = ArchiveItem(name="e.jpg", image_jpeg=jpeg((64, 128)), label_map=np.zeros((64, 128), np.uint8))
    write_cvat_for_images(tmp_path / "a.zip", [*items(1), empty], schema=SCHEMA)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        text = archive.read("annotations.xml").decode()
    root = ET.fromstring(text)
    assert text.startswith(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n'
    )
    assert {
        "/annotations/meta/project/tasks/task/segments/segment/stop",
        "/annotations/meta/project/labels/label/color",
        "/annotations/meta/dumped",
    } <= paths(root)
    assert [label.findtext("name") for label in root.iter("label")] == [label.name for label in SCHEMA.labels]
    assert root.findtext("meta/project/labels/label/color") == "#1f2430"
    mask, polygon = root.find("image/mask"), root.find("image/polygon")
    assert mask is not None
    assert polygon is not None
    assert list(mask.attrib) == ["label", "source", "occluded", "rle", "left", "top", "width", "height", "z_order"]
    assert list(polygon.attrib) == ["label", "source", "occluded", "points", "z_order"]
    assert '<image id="1" name="e.jpg" subset="default" task_id="1" width="128" height="64">\n  </image>' in text


@pytest.mark.parametrize("write", [write_labelme, write_cvat_for_images])
def test_the_same_scenes_make_the_same_bytes(tmp_path: Path, write: object) -> None:
    assert callable(write)
    write(tmp_path / "a.zip", items(2), schema=SCHEMA)
    write(tmp_path / "b.zip", items(2), schema=SCHEMA)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


@pytest.mark.parametrize("write", [write_labelme, write_cvat_for_images])
def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path, write: object) -> None:
    assert callable(write)
    (tmp_path / "a.zip").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"a\.zip exists already"):
        write(tmp_path / "a.zip", items(1), schema=SCHEMA)
    assert (tmp_path / "a.zip").read_bytes() == b"precious"
    write(tmp_path / "a.zip", items(1), schema=SCHEMA, overwrite=True)
    assert zipfile.is_zipfile(tmp_path / "a.zip")


def test_ids_without_a_label_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    label_map = scene(0)
    label_map[0, 0] = 77
    item = ArchiveItem(name="a.jpg", image_jpeg=jpeg((64, 128)), label_map=label_map)
    with pytest.raises(SchemaError, match=r"the ids \[77\], which no label of the schema has"):
        write_labelme(tmp_path / "a.zip", [item], schema=SCHEMA)
    assert not list(tmp_path.iterdir())


def test_without_a_background_void_is_what_nobody_drew(tmp_path: Path) -> None:
    schema = LabelSchema.from_dict({"labels": [{"name": "a", "id": 0}, {"name": "b", "id": 7}]}, source="test")
    label_map = np.full((64, 128), 255, np.uint8)
    label_map[5:30, 5:60] = 0
    label_map[20:50, 90:120] = 7
    item = ArchiveItem(name="a.jpg", image_jpeg=jpeg((64, 128)), label_map=label_map)
    write_labelme(tmp_path / "a.zip", [item], schema=schema)
    convert_archive(tmp_path / "a.zip", tmp_path / "data", schema=schema)
    np.testing.assert_array_equal(read_label_map(tmp_path / "data" / "masks" / "a.png"), label_map)


@pytest.mark.parametrize(
    ("row", "lengths"), [("0011", [2, 2]), ("1100", [0, 2, 2]), ("1", [0, 1]), ("0", [1]), ("0110", [1, 2, 1])]
)
def test_run_lengths_start_with_zeros(row: str, lengths: list[int]) -> None:
    assert run_lengths(np.array([[digit == "1" for digit in row]])) == lengths
