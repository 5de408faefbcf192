"""One scene, written as CVAT writes it in all seven formats: the same masks, and a table of what each format loses.

The writers here were checked against real exports. The truth is painted a second time, as CVAT's export does it: every
shape filled on a whole image by pycocotools or OpenCV, in the order of z_order.
"""

import io
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_masks

from sscloud.errors import ArchiveError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from training.formats.convert import READERS, Summary, convert_archive

SIZE = (64, 128)
H, W = SIZE
COLOURS = {
    "Фон": (0, 0, 0),
    "Земля": (139, 90, 43),
    "Растительность": (46, 139, 87),
    "Здание": (178, 34, 34),
    "Конструкции": (70, 130, 180),
    "Обстановка": (218, 165, 32),
}
NAMES = tuple(COLOURS)
SCHEMA = LabelSchema.default()
STRICT = LabelSchema.from_dict(
    {"labels": [{k: v for k, v in entry.items() if k != "background"} for entry in SCHEMA.to_dict()["labels"]]},
    source="the test",
)
"""Without a background: what nobody drew is void, and a drawn Фон is a label like any other."""

Members = dict[str, bytes]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A shape as CVAT's API lists it, with its geometry in plain numbers."""

    kind: str
    label: str
    numbers: tuple[float, ...] = ()
    mask: Mask | None = None
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    rotation: float = 0.0
    z: int = 0
    auto: bool = False


def ring(height: int, width: int) -> Mask:
    mask = np.ones((height, width), np.bool_)
    mask[2:-2, 3:-3] = False
    mask[0, 0] = False
    return mask


SCENE = (  # sorted by z, as CVAT's exports list shapes
    Drawn(kind="polygon", label="Земля", numbers=(0.2, 40.3, 127.6, 37.5, 128.0, 63.9, 0.0, 64.0), z=-1),
    Drawn(kind="mask", label="Растительность", mask=ring(20, 30), box=(10, 25, 40, 45), auto=True),
    Drawn(kind="polygon", label="Здание", numbers=(60.7, 10.1, 100.31, 12.9, 93.5, 45.3, 75.25, 22.1), auto=True),
    Drawn(kind="polygon", label="Растительность", numbers=(88.1, 30.3, 120.7, 30.3, 104.5, 58.9)),
    Drawn(kind="rectangle", label="Обстановка", numbers=(30.5, 35.25, 50.75, 50.5), z=1),
    Drawn(kind="rectangle", label="Конструкции", numbers=(70.5, 40.25, 100.75, 50.5), rotation=30.0, z=1),
    Drawn(kind="ellipse", label="Обстановка", numbers=(110.4, 20.6, 9.5, 4.2), rotation=25.0, z=1),
    Drawn(kind="mask", label="Здание", mask=np.ones((9, 5), np.bool_), box=(0, 20, 5, 29), z=1),
    Drawn(kind="mask", label="Здание", mask=np.ones((9, 7), np.bool_), box=(121, 20, 128, 29), z=1),
    Drawn(kind="polygon", label="Фон", numbers=(20.0, 50.0, 40.0, 50.0, 40.0, 60.0, 20.0, 60.0), z=2),
)
FRAMES: Mapping[str, tuple[Drawn, ...]] = {"скан 1.jpg": SCENE, "скан 2.jpg": SCENE[:4], "пусто.jpg": ()}


def corners(drawn: Drawn) -> list[float]:
    if drawn.kind == "polygon":
        return list(drawn.numbers)
    x1, y1, x2, y2 = drawn.numbers
    turn, cx, cy = math.radians(drawn.rotation), (x1 + x2) / 2, (y1 + y2) / 2
    points: list[float] = []
    for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)):
        points.append(cx + (x - cx) * math.cos(turn) - (y - cy) * math.sin(turn))
        points.append(cy + (x - cx) * math.sin(turn) + (y - cy) * math.cos(turn))
    return points


def filled(drawn: Drawn) -> Mask:
    """(H, W) bool: the shape on a whole image."""
    whole = np.zeros(SIZE, np.uint8)
    if drawn.mask is not None:
        x1, y1, x2, y2 = drawn.box
        whole[y1:y2, x1:x2] = drawn.mask
    elif drawn.kind == "ellipse":
        cx, cy, rx, ry = (round(number) for number in drawn.numbers)
        cv2.ellipse(whole, (cx, cy), (rx, ry), drawn.rotation, 0, 360, 1, thickness=-1)
    else:
        points = np.round(corners(drawn), 2).astype(np.float32).tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            whole = np.asarray(coco_masks.decode(coco_masks.frPyObjects([points], H, W)[0]))
    return whole.astype(np.bool_)


def painted(frame: Sequence[Drawn], value_of: Callable[[Drawn], int], *, fill: int) -> NDArray[np.uint8]:
    values = np.full(SIZE, fill, np.uint8)
    for drawn in sorted(frame, key=lambda drawn: drawn.z):
        values[filled(drawn)] = value_of(drawn)
    return values


def label_id(drawn: Drawn) -> int:
    label = SCHEMA.find(drawn.label)
    assert label is not None
    return label.id


# The writers


def jpeg(seed: int, size_hw: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size_hw, 3), seed, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def runs(flat: Mask) -> list[int]:
    lengths, value = [0], False
    for pixel in flat.tolist():
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def noisy(numbers: Sequence[float]) -> list[float]:
    """As JSON holds them after they were rounded to hundredths and kept as 32-bit floats."""
    return np.round(numbers, 2).astype(np.float32).astype(np.float64).tolist()


def flat_label_map(frame: Sequence[Drawn]) -> NDArray[np.uint8]:
    """(H, W) uint8: 0 background, then labels in the order of their names, as in colour maps."""
    order = sorted(NAMES)
    return painted(frame, lambda drawn: 1 + order.index(drawn.label), fill=0)


def cvat_xml(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    def element(drawn: Drawn) -> str:
        common = f'label={quoteattr(drawn.label)} source="{"auto" if drawn.auto else "manual"}" occluded="0"'
        turned = f' rotation="{drawn.rotation:.2f}"' if drawn.rotation else ""
        if drawn.mask is not None:
            x1, y1, x2, y2 = drawn.box
            rle = ", ".join(map(str, runs(drawn.mask.ravel())))
            place = f'rle="{rle}" left="{x1}" top="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
            return f'<mask {common} {place} z_order="{drawn.z}"><attribute name="model">x</attribute></mask>'
        if drawn.kind == "polygon":
            pairs = zip(drawn.numbers[::2], drawn.numbers[1::2], strict=True)
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in pairs)
            return f'<polygon {common} points="{points}" z_order="{drawn.z}"></polygon>'
        tag, keys = ("box", ("xtl", "ytl", "xbr", "ybr")) if drawn.kind == "rectangle" else (
            "ellipse", ("cx", "cy", "rx", "ry")
        )  # fmt: skip
        numbers = " ".join(f'{key}="{value:.2f}"' for key, value in zip(keys, drawn.numbers, strict=True))
        return f'<{tag} {common} {numbers}{turned} z_order="{drawn.z}"></{tag}>'

    images = "".join(
        f'<image id="{number}" name={quoteattr(name)} subset="default" task_id="8" width="{W}" height="{H}">'
        + "".join(map(element, frame))
        + "</image>"
        for number, (name, frame) in enumerate(frames.items())
    )
    text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{images}</annotations>'
    return {"annotations.xml": text.encode()}


def coco(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    annotations: list[dict[str, Any]] = []
    for image_id, frame in enumerate(frames.values(), 1):
        for drawn in frame:
            attributes: dict[str, Any] = {"occluded": False}
            bbox, segmentation = [0.0, 0.0, 1.0, 1.0], []  # type: tuple[list[float], Any]
            if drawn.kind in ("mask", "ellipse"):
                segmentation = {"counts": runs(filled(drawn).ravel(order="F")), "size": [H, W]}
            elif drawn.kind == "polygon":
                segmentation = [noisy(drawn.numbers)]
            else:
                x1, y1, x2, y2 = drawn.numbers
                bbox, attributes = [x1, y1, x2 - x1, y2 - y1], {"occluded": False, "rotation": drawn.rotation}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": NAMES.index(drawn.label) + 1,
                    "segmentation": segmentation,
                    "bbox": bbox,
                    "iscrowd": int(isinstance(segmentation, dict)),
                    "attributes": attributes,
                }
            )
    images = [{"id": i, "width": W, "height": H, "file_name": name} for i, name in enumerate(frames, 1)]
    categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(NAMES, 1)]
    data = {"licenses": [], "categories": categories, "images": images, "annotations": annotations}
    return {"annotations/instances_default.json": json.dumps(data).encode()}


def datumaro(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    def shape(drawn: Drawn) -> dict[str, Any]:
        common: dict[str, Any] = {
            "id": 0,
            "attributes": {"occluded": False},
            "group": 0,
            "label_id": NAMES.index(drawn.label),
            "z_order": drawn.z,
        }
        if drawn.kind == "mask":
            counts = coco_masks.encode(np.asfortranarray(filled(drawn).astype(np.uint8)))["counts"].decode()
            return {**common, "type": "mask", "rle": {"counts": counts, "size": [H, W]}}
        if drawn.kind == "polygon":
            return {**common, "type": "polygon", "points": noisy(drawn.numbers)}
        common["attributes"]["rotation"] = drawn.rotation
        a, b, c, d = drawn.numbers
        if drawn.kind == "rectangle":
            return {**common, "type": "bbox", "bbox": noisy((a, b, c - a, d - b))}
        return {**common, "type": "ellipse", "points": noisy((a - c, b - d, a + c, b + d))}

    items = [
        {
            "id": name.removesuffix(".jpg"),
            "annotations": [shape(drawn) for drawn in frame],
            "attr": {"frame": number},
            "image": {"path": name, "size": [H, W]},
        }
        for number, (name, frame) in enumerate(frames.items())
    ]
    labels = [{"name": name, "parent": "", "attributes": []} for name in NAMES]
    data = {"dm_format_version": "1.0", "infos": {}, "categories": {"label": {"labels": labels}}, "items": items}
    return {"annotations/default.json": json.dumps(data).encode()}


def labelme(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    members: Members = {}
    for name, frame in frames.items():
        stem = name.removesuffix(".jpg")
        objects = []
        for number, drawn in enumerate(frame):
            kind, attributes = "", f"model=, rotation={drawn.rotation}"
            if drawn.kind in ("mask", "ellipse"):
                mask_name = f"{stem}_mask_{number}.png"
                pixels = np.zeros((H, W, 4), np.uint8)
                pixels[filled(drawn)] = (255, 203, 0, 153)
                members[f"default/Masks/{mask_name}"] = png(pixels)
                body = f"<segm><mask>{mask_name}</mask></segm>"
            else:
                flat = corners(replace(drawn, rotation=0.0))
                pairs = zip(flat[::2], flat[1::2], strict=True)
                points = "".join(f"<pt><x>{x:.2f}</x><y>{y:.2f}</y></pt>" for x, y in pairs)
                kind = "<type>bounding_box</type>" if drawn.kind == "rectangle" else ""
                body = f"{kind}<polygon>{points}</polygon>"
            objects.append(
                f"<object><name>{drawn.label}</name><deleted>0</deleted><id>{number}</id>{body}"
                f"<attributes>{attributes}</attributes></object>"
            )
        size = f"<imagesize><nrows>{H}</nrows><ncols>{W}</ncols></imagesize>"
        text = f"<annotation><filename>{name}</filename><folder></folder>{size}{''.join(objects)}</annotation>"
        members[f"default/{stem}.xml"] = text.encode()
    return members


def coloured(frame: Sequence[Drawn]) -> bytes:
    table = np.array([(0, 0, 0), *(COLOURS[name] for name in sorted(NAMES))], np.uint8)
    return png(table[flat_label_map(frame)])


def segmentation_mask(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    lines += [f"{name}:{','.join(map(str, COLOURS[name]))}::" for name in sorted(NAMES)]
    stems = [name.removesuffix(".jpg") for name in frames]
    listed = "".join(f'"{stem}"\n' if " " in stem else f"{stem}\n" for stem in stems)
    masks = {f"SegmentationClass/{n.removesuffix('.jpg')}.png": coloured(f) for n, f in frames.items() if f}
    return {
        "labelmap.txt": "\n".join(lines).encode(),
        "ImageSets/Segmentation/default.txt": listed.encode(),
        **masks,
    }


def camvid(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    lines, members = [], {}
    for name, frame in frames.items():
        mask = f"defaultannot/{name.removesuffix('.jpg')}.png" if frame else ""
        lines.append(f'"/default/{name}" "{mask}"' if " " in name else f"/default/{name} {mask}")
        if frame:
            members[mask] = coloured(frame)
    colours = "".join(f"{' '.join(map(str, COLOURS[name]))} {name}\n" for name in sorted(NAMES))
    return {"label_colors.txt": colours.encode(), "default.txt": "\n".join(lines).encode(), **members}


def cityscapes(frames: Mapping[str, Sequence[Drawn]]) -> Members:
    colours = "".join(f"{' '.join(map(str, COLOURS[name]))} {name}\n" for name in sorted(NAMES))
    members = {"label_colors.txt": f"0 0 0 background\n{colours}".encode()}
    for name, frame in frames.items():
        if frame:
            stem = f"gtFine/default/{name.removesuffix('.jpg')}_gtFine"
            members[f"{stem}_labelIds.png"] = png(flat_label_map(frame))
            members[f"{stem}_color.png"] = coloured(frame)
    return members


@dataclass(frozen=True, kw_only=True)
class Format:
    """How CVAT writes a format, and what is left of the annotations in it."""

    write: Callable[[Mapping[str, Sequence[Drawn]]], Members]
    images: str
    """Place of an image; {stem} is its name."""
    objects: bool = True
    """Every shape by itself; else one flat picture."""
    z_order: bool = False
    """Written with each shape; else only in the order of the list."""
    who: bool = False
    """Tells what a model drew."""
    task: bool = False
    """Tells the task of an image."""
    drawn_background: bool = True
    """Tells a drawn black label from what nobody drew."""


# This is the table of docs/formats.md.
FORMATS: Mapping[str, Format] = {
    "CVAT for images 1.1": Format(
        write=cvat_xml, images="images/default/{stem}.jpg", z_order=True, who=True, task=True
    ),
    "Datumaro 1.0": Format(write=datumaro, images="images/default/{stem}.jpg", z_order=True),
    "COCO 1.0": Format(write=coco, images="images/default/{stem}.jpg"),
    "LabelMe 3.0": Format(write=labelme, images="default/{stem}.jpg"),
    "Cityscapes 1.0": Format(
        write=cityscapes, images="imgsFine/leftImg8bit/default/{stem}_leftImg8bit.jpg", objects=False
    ),
    "Segmentation mask 1.1": Format(
        write=segmentation_mask, images="JPEGImages/{stem}.jpg", objects=False, drawn_background=False
    ),
    "CamVid 1.0": Format(write=camvid, images="default/{stem}.jpg", objects=False, drawn_background=False),
}
ALL = pytest.mark.parametrize("name", FORMATS)


def pack(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return path


def export(name: str, frames: Mapping[str, Sequence[Drawn]] = FRAMES, *, images: bool = True) -> Members:
    """An archive's members, as CVAT exports these frames."""
    members = FORMATS[name].write(frames)
    for seed, image in enumerate(frames, 50):
        if images:
            members[FORMATS[name].images.format(stem=image.removesuffix(".jpg"))] = jpeg(seed)
    return members


def convert(tmp_path: Path, members: Mapping[str, bytes], **options: Any) -> Summary:
    archive = pack(tmp_path / "export.zip", members)
    return convert_archive(archive, tmp_path / "data", **{"schema": SCHEMA, **options})


def masks(tmp_path: Path) -> dict[str, NDArray[np.uint8]]:
    return {path.stem: read_label_map(path) for path in sorted((tmp_path / "data" / "masks").iterdir())}


# The table


def test_every_format_that_is_read_is_in_the_table() -> None:
    assert set(FORMATS) == set(READERS)


@ALL
def test_the_same_annotations_give_the_same_masks(tmp_path: Path, name: str) -> None:
    summary = convert(tmp_path, export(name))
    assert summary.layout == name
    found = masks(tmp_path)
    assert list(found) == ["скан 1", "скан 2"]
    for stem, label_map in found.items():
        np.testing.assert_array_equal(label_map, painted(FRAMES[f"{stem}.jpg"], label_id, fill=0))
    assert set(np.unique(found["скан 1"])) == {0, 2, 5, 6, 65, 66}
    assert (tmp_path / "data/imgs/скан 1.jpg").read_bytes() == jpeg(50)
    assert summary.broken == summary.unknown == ()


@ALL
def test_frames_without_annotations_are_listed_and_left_out_until_asked_for(tmp_path: Path, name: str) -> None:
    assert convert(tmp_path, export(name)).warnings == (
        "1 image without shapes, left out; --empty takes them: пусто.jpg",
    )
    convert(tmp_path, export(name), empty="void")
    assert (masks(tmp_path)["пусто"] == 255).all()


@ALL
def test_who_drew_what(tmp_path: Path, name: str) -> None:
    item = convert(tmp_path, export(name)).manifest.items[0]
    truth = painted(SCENE, lambda drawn: 2 if drawn.auto and FORMATS[name].who else 1, fill=0)
    if not FORMATS[name].drawn_background:
        truth[painted(SCENE, label_id, fill=255) == 0] = 0
    assert item.people_pixels == (truth == 1).sum()
    assert item.auto_pixels == (truth == 2).sum()
    assert (item.auto_pixels > 0) == FORMATS[name].who


@ALL
def test_the_task_of_an_image(tmp_path: Path, name: str) -> None:
    source = convert(tmp_path, export(name)).manifest.items[0].source
    assert (source["task"] == 8) == FORMATS[name].task
    assert source["name"] == "скан 1.jpg"


@ALL
def test_a_drawn_background_and_what_nobody_drew(tmp_path: Path, name: str) -> None:
    summary = convert(tmp_path, export(name), schema=STRICT)
    kept = FORMATS[name].drawn_background
    truth = painted(SCENE, label_id, fill=255)
    np.testing.assert_array_equal(masks(tmp_path)["скан 1"], np.where((truth == 0) & (not kept), 255, truth))
    assert any("the label 'Фон' has the colour of the background" in text for text in summary.warnings) != kept


@ALL
def test_how_many_shapes_there_were(tmp_path: Path, name: str) -> None:
    shapes = convert(tmp_path, export(name, {"скан 1.jpg": SCENE})).shapes
    flat = 6 if FORMATS[name].drawn_background else 5
    assert shapes == (len(SCENE) if FORMATS[name].objects else flat)


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.objects])
def test_z_order_where_the_list_has_another_order(tmp_path: Path, name: str) -> None:
    convert(tmp_path, export(name, {"a.jpg": SCENE[::-1]}))
    listed = [replace(drawn, z=drawn.z if FORMATS[name].z_order else 0) for drawn in SCENE[::-1]]
    np.testing.assert_array_equal(masks(tmp_path)["a"], painted(listed, label_id, fill=0))


@ALL
def test_unknown_labels_are_those_that_are_used(tmp_path: Path, name: str) -> None:
    few = LabelSchema.from_dict({"labels": [{"name": "земля", "id": 2}, {"name": "ЗДАНИЕ", "id": 6}]}, source="test")
    summary = convert(tmp_path, export(name, {"a.jpg": (*SCENE[:1], *SCENE[2:4])}), schema=few, unknown="void")
    assert [(label.name, label.shapes, label.images) for label in summary.unknown] == [("Растительность", 1, 1)]


@ALL
def test_an_export_that_was_packed_again_with_its_folder(tmp_path: Path, name: str) -> None:
    convert(tmp_path, {f"выгрузка/{member}": data for member, data in export(name).items()})
    assert list(masks(tmp_path)) == ["скан 1", "скан 2"]


@ALL
def test_an_export_without_images_says_what_to_switch_on(tmp_path: Path, name: str) -> None:
    members = export(name, {"a.jpg": SCENE}, images=False)
    with pytest.raises(ArchiveError, match=r"annotations of 1 image, but not the images\. .*'Save images' switched on"):
        convert(tmp_path, members)
    assert not (tmp_path / "data").exists()


# Hostile and broken input


def fails(tmp_path: Path, members: Mapping[str, bytes], message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        convert(tmp_path, members)
    assert not (tmp_path / "data" / "imgs").exists()


LISTS = {
    "CVAT for images 1.1": "annotations.xml",
    "Datumaro 1.0": "annotations/default.json",
    "COCO 1.0": "annotations/instances_default.json",
    "LabelMe 3.0": "default/a.xml",
    "Cityscapes 1.0": "label_colors.txt",
    "Segmentation mask 1.1": "labelmap.txt",
    "CamVid 1.0": "label_colors.txt",
}
"""The member that says what the others mean, in an archive of one image a.jpg."""
ONE = {"a.jpg": SCENE}


@pytest.mark.parametrize(
    ("name", "member", "old", "new"),
    [
        ("CVAT for images 1.1", "annotations.xml", 'name="a.jpg"', 'name="../../a.jpg"'),
        ("Datumaro 1.0", "annotations/default.json", '"path": "a.jpg"', '"path": "C:\\\\a.jpg"'),
        ("Datumaro 1.0", "annotations/default.json", '"id": "a"', '"id": "../a"'),
        ("COCO 1.0", "annotations/instances_default.json", '"a.jpg"', '"/etc/a.jpg"'),
        ("LabelMe 3.0", "default/a.xml", "<mask>", "<mask>../"),
        ("Segmentation mask 1.1", "ImageSets/Segmentation/default.txt", "a\n", "a\n../../b\n"),
        ("CamVid 1.0", "default.txt", "/default/a.jpg", "/../a.jpg"),
        ("CamVid 1.0", "default.txt", "defaultannot", "../defaultannot"),
    ],
)
def test_names_that_lead_out_of_the_archive(tmp_path: Path, name: str, member: str, old: str, new: str) -> None:
    members = export(name, ONE)
    changed = members[member].decode().replace(old, new)
    assert changed != members[member].decode()
    fails(tmp_path, {**members, member: changed.encode()}, r"leads out of the archive with '\.\.'|is an absolute path")


@ALL
def test_a_list_that_is_cut_off(tmp_path: Path, name: str) -> None:
    members = export(name, ONE)
    member = LISTS[name]
    data = members[member]
    fails(tmp_path, {**members, member: data[: len(data) * 2 // 3]}, f"{member}.*(Export|not expected|found)")


@ALL
def test_a_list_that_is_not_text(tmp_path: Path, name: str) -> None:
    member = LISTS[name]
    beginning = {"annotations.xml": b"<annotations>"}.get(
        member, b'{"images": [' if name == "COCO 1.0" else b'{"items": ['
    )
    fails(tmp_path, {**export(name, ONE), member: beginning + b"\xff\xfe\x00\x81"}, f"{member} is not")


@pytest.mark.parametrize("name", ["CVAT for images 1.1", "LabelMe 3.0"])
def test_entities_are_refused(tmp_path: Path, name: str) -> None:
    members = export(name, ONE)
    text = members[LISTS[name]].decode()
    root = "annotations" if name.startswith("CVAT") else "annotation"
    bomb = '<!DOCTYPE x [<!ENTITY a "haha"><!ENTITY b "&a;&a;&a;&a;">]>'
    bombed = text.replace(f"<{root}>", f"{bomb}<{root}>&b;")
    fails(tmp_path, {**members, LISTS[name]: bombed.encode()}, "declares a document type or entities")


JSON = ("COCO 1.0", "Datumaro 1.0")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        *((name, '"a.jpg"', "[" * 200_000, "is nested too deeply") for name in JSON),
        *((name, '"a.jpg"', "NaN", "is not JSON .*NaN is no number") for name in JSON),
        *((name, '"a.jpg"', "1" * 5000, "is not JSON") for name in JSON),
        *((name, '"a.jpg"', "7", "must be a text, found 7") for name in JSON),
        *((name, '"a.jpg"', '["a.jpg"]', "must be a text, found list of 1") for name in JSON),
        *((name, '"rotation": 30.0', '"rotation": "30"', "its rotation is '30', a number") for name in JSON),
        *((name, f'"size": [{H}, ', f'"size": [9, {H}, ', "list of 3|found list of 3") for name in JSON),
        ("COCO 1.0", '"category_id": 2', '"category_id": 99', "the category 99, which the file does not list"),
        ("COCO 1.0", '"category_id": 2', '"category": 2', "the category -1, which the file does not list"),
        ("COCO 1.0", '"image_id": 1', '"image_id": 5', "objects of the image 5, which it does not list"),
        ("COCO 1.0", '"image_id": 1', '"image_id": 1.5', "'image_id' must be a whole number, found 1.5"),
        ("COCO 1.0", '"images": [', '"images": [3, ', "expected an object of JSON, found 3"),
        ("COCO 1.0", '"annotations": [', '"annotations": {}, "x": [', "'annotations' must be a list, found dict of 0"),
        ("COCO 1.0", '{"id": 2, "name"', '{"id": 1, "name"', "two categories have the id 1"),
        ("Datumaro 1.0", '"label_id": 1', '"label_id": 99', "a shape of the label 99, the file lists 6 labels"),
        ("Datumaro 1.0", '"label_id": 1', '"label_id": null', "'label_id' must be a whole number, found None"),
        ("Datumaro 1.0", '"z_order": -1', '"z_order": 1e400', "its z_order is inf"),
        ("Datumaro 1.0", '"items": [', '"items": [[], ', "expected an object of JSON, found list of 0"),
    ],
)
def test_json_that_says_something_else(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    members = export(name, ONE)
    text = members[LISTS[name]].decode()
    assert old in text
    fails(tmp_path, {**members, LISTS[name]: text.replace(old, new, 1).encode()}, message)


@pytest.mark.parametrize("name", JSON)
def test_json_is_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.formats.documents.MAX_JSON_OBJECTS", 10)
    fails(tmp_path, export(name, ONE), r"holds \d+ objects and lists, at most 10 are read")
    monkeypatch.setattr("training.formats.documents.MAX_JSON_BYTES", 100)
    fails(tmp_path, export(name, ONE), r"has \d+ bytes, at most 100 are read")


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"counts": [0, 5], "size": [H, W]}, "run lengths add up to 5 pixels, an image of 128x64 has 8192"),
        ({"counts": [-1, 8193], "size": [H, W]}, "a run of -1 pixels is not possible"),
        ({"counts": [1 << 62, 1 << 62], "size": [H, W]}, "whole numbers|is not possible"),
        ({"counts": [8192.5], "size": [H, W]}, "run lengths are whole numbers"),
        ({"counts": ["x"], "size": [H, W]}, "run lengths are whole numbers"),
        ({"counts": [[8192]], "size": [H, W]}, "run lengths are whole numbers"),
        ({"counts": "!!", "size": [H, W]}, "hold a character that they cannot hold"),
        ({"counts": "земля", "size": [H, W]}, "hold a character that they cannot hold"),
        ({"counts": "oo", "size": [H, W]}, "end in the middle of a number"),
        ({"counts": "ooooooooooo0", "size": [H, W]}, "a number of more than 35 bits"),
        ({"counts": "0", "size": [H, W]}, "run lengths add up to 0 pixels"),
        ({"counts": [8192], "size": [W, H]}, r"is made for the size list of 2, the image has \[64, 128\]"),
        ({"counts": [1 << 40], "size": [1 << 20, 1 << 20]}, "is made for the size"),
        ({"counts": 5, "size": [H, W]}, "must hold 'size' and 'counts'"),
        ({"size": [H, W]}, "must hold 'size' and 'counts'"),
    ],
)
@pytest.mark.parametrize("name", JSON)
def test_run_lengths_that_do_not_fit(tmp_path: Path, name: str, rle: Any, message: str) -> None:
    members = export(name, ONE)
    data = json.loads(members[LISTS[name]])
    if name == "COCO 1.0":
        data["annotations"][1]["segmentation"] = rle
    else:
        data["items"][0]["annotations"][1]["rle"] = rle
    fails(tmp_path, {**members, LISTS[name]: json.dumps(data).encode()}, f"(object 1|object 2) .*{message}")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, 2, 3, 4], "a polygon of 2 points encloses nothing"),
        ([1, 2, 3, 4, 5, 6, 7], "its 7 numbers are no pairs"),
        ([1, 2, 3, 4, 5, "x"], "are not all numbers"),
        ([1, 2, 3, 4, 5, 1e300], "far outside the image of 128x64"),
        ("12", "a list of numbers is expected, found '12'"),
        ({"x": 1}, "a list of numbers is expected, found dict of 1"),
    ],
)
def test_polygons_that_are_none(tmp_path: Path, name: str, numbers: Any, message: str) -> None:
    members = export(name, ONE)
    data = json.loads(members[LISTS[name]])
    if name == "COCO 1.0":
        data["annotations"][0]["segmentation"] = [numbers]
    else:
        data["items"][0]["annotations"][0]["points"] = numbers
    fails(tmp_path, {**members, LISTS[name]: json.dumps(data).encode()}, f"a.*(object 0|object 1) .*{message}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'rle="1, ',
            'rle="2, ',
            r"object 1 \(mask, Растительность\): run lengths add up to 601 pixels, a mask of 30x20",
        ),
        ('rle="1, ', 'rle="-1, ', "a run of -1 pixels is not possible"),
        ('rle="1, ', 'rle="x, ', "run lengths are whole numbers"),
        ('rle="1, ', 'rle="99999999999999999999, ', "run lengths are whole numbers"),
        ('left="10"', 'left="110"', r"its box of 30x20 pixels at 110, 25 does not lie in the image of 128x64"),
        ('width="30"', 'width="-30"', "does not lie in the image"),
        ('height="20"', 'height="99999999"', "does not lie in the image"),
        ('left="10"', "", "object 1 .*invalid literal"),
        ('points="0.20,40.30;', 'points="0.20;', "are not pairs of numbers"),
        ('points="0.20,', 'points="nan,', "a coordinate that is not a finite number"),
        ('points="0.20,', 'points="1e99,', "far outside the image"),
        ('xtl="30.50"', 'xtl="inf"', "its xtl is not a finite number"),
        ('rx="9.50"', 'rx="-9.50"', "has the radii -9.5 and 4.2; none is negative"),
        ('rotation="25.00"', 'rotation="x"', "could not convert"),
        ('z_order="-1"', 'z_order="low"', "object 0 .*invalid literal"),
        (f'width="{W}" height="{H}"', 'width="256" height="128"', "drawn on an image of 256x128 pixels, .* has 128x64"),
        ('name="a.jpg"', "", "image 0 has no name"),
        ("<image ", "<track id='0'></track><image ", "an export of 'CVAT for video 1.1'.*as 'CVAT for images 1.1'"),
    ],
)
def test_xml_that_says_something_else(tmp_path: Path, old: str, new: str, message: str) -> None:
    members = export("CVAT for images 1.1", ONE)
    text = members["annotations.xml"].decode()
    assert old in text
    fails(tmp_path, {**members, "annotations.xml": text.replace(old, new, 1).encode()}, message)


COLOUR_MASKS = {
    "Segmentation mask 1.1": "SegmentationClass/a.png",
    "CamVid 1.0": "defaultannot/a.png",
    "Cityscapes 1.0": "gtFine/default/a_gtFine_labelIds.png",
}


@pytest.mark.parametrize("name", COLOUR_MASKS)
def test_masks_that_are_none(tmp_path: Path, name: str) -> None:
    members, mask = export(name, ONE), COLOUR_MASKS[name]
    shape = SIZE if name == "Cityscapes 1.0" else (*SIZE, 3)
    fails(tmp_path, {**members, mask: members[mask][:300]}, f"{mask} is not a readable PNG")
    fails(tmp_path, {**members, mask: jpeg(0)}, f"{mask} is not a readable PNG")
    fails(tmp_path, {**members, mask: png(np.zeros((32, *shape[1:]), np.uint8))}, "128x32 pixels, its image 128x64")
    unknown = "holds the label 200, the label map has 7" if len(shape) == 2 else r"the colour \(200, 200, 200\), which"
    fails(tmp_path, {**members, mask: png(np.full(shape, 200, np.uint8))}, unknown)


def test_xml_of_endless_nesting_is_not_read_to_its_end(tmp_path: Path) -> None:
    text = "<annotations>" + "<image>" * 100_000 + "</image>" * 100_000 + "</annotations>"
    fails(tmp_path, {**export("CVAT for images 1.1", ONE), "annotations.xml": text.encode()}, "nested too deeply")


@pytest.mark.parametrize("name", COLOUR_MASKS)
@pytest.mark.parametrize(("side", "message"), [(100_000, "exceeds limit"), (12_000, "12000x12000 pixels, at most")])
def test_a_mask_of_an_absurd_size_is_not_decoded(tmp_path: Path, name: str, side: int, message: str) -> None:
    buffer = io.BytesIO()
    Image.new("L" if name == "Cityscapes 1.0" else "RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    fails(tmp_path, {**export(name, ONE), COLOUR_MASKS[name]: bytes(data)}, message)


def test_masks_of_the_wrong_mode(tmp_path: Path) -> None:
    members = export("Cityscapes 1.0", ONE)
    mask = COLOUR_MASKS["Cityscapes 1.0"]
    fails(tmp_path, {**members, mask: png(np.zeros((*SIZE, 3), np.uint8))}, "pixels of mode RGB, L is expected")


@pytest.mark.parametrize("name", ["Segmentation mask 1.1", "CamVid 1.0", "Cityscapes 1.0"])
@pytest.mark.parametrize(
    ("colour", "message"),
    [
        ("139 90 43 Земля", "lists the label 'Земля' twice"),
        ("1 2 300 Забор", "three numbers from 0 to 255"),
        ("1 -2 3 Забор", "three numbers from 0 to 255"),
        ("1 2 Забор", "a line is|three numbers"),
    ],
)
def test_label_maps_that_are_none(tmp_path: Path, name: str, colour: str, message: str) -> None:
    members, member = export(name, ONE), LISTS[name]
    *numbers, label = colour.split()
    line = f"{label}:{','.join(numbers)}::" if member == "labelmap.txt" else colour
    fails(tmp_path, {**members, member: members[member] + f"\n{line}\n".encode()}, message)


@pytest.mark.parametrize("name", ["Segmentation mask 1.1", "CamVid 1.0"])
def test_two_labels_of_one_colour_cannot_be_told_apart(tmp_path: Path, name: str) -> None:
    members, member = export(name, ONE), LISTS[name]
    line = "Забор:139,90,43::" if member == "labelmap.txt" else "139 90 43 Забор"
    fails(
        tmp_path, {**members, member: members[member] + f"\n{line}\n".encode()}, "'Земля' and 'Забор' have one colour"
    )


@pytest.mark.parametrize("name", COLOUR_MASKS)
def test_a_missing_label_map(tmp_path: Path, name: str) -> None:
    members = export(name, ONE)
    del members[LISTS[name]]
    fails(tmp_path, members, "no (labelmap|label_colors).txt|holds no annotations that are known")


def test_a_listed_mask_that_is_missing(tmp_path: Path) -> None:
    members = export("CamVid 1.0", ONE)
    del members["defaultannot/a.png"]
    fails(tmp_path, members, r"default\.txt names the mask defaultannot/a\.png, which is not in the archive")


@ALL
def test_a_picture_that_is_broken_costs_only_itself(tmp_path: Path, name: str) -> None:
    members = export(name)
    broken = FORMATS[name].images.format(stem="скан 2")
    members[broken] = members[broken][:100]
    fails(tmp_path, members, r"1 of 3 images cannot be read\. Nothing was written(.|\n)*leave these images out")
    summary = convert(tmp_path, members, skip_broken=True)
    assert list(masks(tmp_path)) == ["скан 1"]
    assert len(summary.broken) == 1
    assert broken in summary.broken[0]


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.objects])
def test_the_number_of_objects_and_their_masks_are_bounded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "CVAT for images 1.1":  # its masks stay run lengths until they are painted, one by one
        monkeypatch.setattr("training.formats.entry.MAX_MASK_PIXELS", 100)
        fails(tmp_path, export(name, ONE), "the boxes of its masks hold over 100 pixels together")
    monkeypatch.setattr("training.formats.entry.MAX_OBJECTS", 3)
    fails(tmp_path, export(name, ONE), "lists 10 objects, at most 3 are read")


# What covers no pixels, and what only some formats have


def test_shapes_that_cover_no_pixels_are_counted_by_kind(tmp_path: Path) -> None:
    members = export("CVAT for images 1.1", {"a.jpg": SCENE, "b.jpg": SCENE})
    others = '<polyline points="1,1;2,2"/><tag label="x"/><points points="1,1"/><polyline points="1,1;2,2"/>'
    text = members["annotations.xml"].decode()
    once = text.replace("</image>", f"{others}</image>", 1).replace('name="b.jpg"', 'name="b.jpg" ')
    both = once.replace("</image></annotations>", "<skeleton/><polyline/></image></annotations>")
    assert convert(tmp_path, {**members, "annotations.xml": both.encode()}).warnings == (
        "1 object of type points in 1 image left out: only shapes that cover an area make a mask",
        "3 objects of type polyline in 2 images left out: only shapes that cover an area make a mask",
        "1 object of type skeleton in 1 image left out: only shapes that cover an area make a mask",
        "1 object of type tag in 1 image left out: only shapes that cover an area make a mask",
    )


def test_datumaro_calls_tags_labels(tmp_path: Path) -> None:
    members = export("Datumaro 1.0", ONE)
    data = json.loads(members[LISTS["Datumaro 1.0"]])
    data["items"][0]["annotations"] += [{"type": "label", "label_id": 0}, {"type": "polyline", "label_id": 1}]
    summary = convert(tmp_path, {**members, LISTS["Datumaro 1.0"]: json.dumps(data).encode()})
    assert [text.split(" left")[0] for text in summary.warnings] == [
        "1 object of type polyline in 1 image",
        "1 object of type tag in 1 image",
    ]


def test_a_coco_object_of_several_parts_is_one_label_and_compressed_masks_are_read(tmp_path: Path) -> None:
    members = export("COCO 1.0", {"a.jpg": SCENE[:2]})
    data = json.loads(members[LISTS["COCO 1.0"]])
    parts = [[0, 0, 10, 0, 10, 10, 0, 10], [20, 0, 30, 0, 30, 10, 20, 10]]
    data["annotations"][0]["segmentation"] = parts
    counts = coco_masks.encode(np.asfortranarray(filled(SCENE[1]).astype(np.uint8)))["counts"].decode()
    data["annotations"][1]["segmentation"]["counts"] = counts
    convert(tmp_path, {**members, LISTS["COCO 1.0"]: json.dumps(data).encode()})
    label_map = masks(tmp_path)["a"]
    assert (label_map[:10, :10] == 2).all()
    assert (label_map[:10, 20:30] == 2).all()
    assert not label_map[:10, 10:20].any()
    np.testing.assert_array_equal(label_map[25:45, 10:40] == 5, ring(20, 30))


@pytest.mark.parametrize("name", JSON)
def test_a_json_that_was_moved_out_of_its_folder(tmp_path: Path, name: str) -> None:
    members = export(name, ONE)
    moved = {"выгрузка/result.json": members[LISTS[name]], "выгрузка/images/a.jpg": jpeg(50)}
    assert convert(tmp_path, moved).layout == name
    np.testing.assert_array_equal(masks(tmp_path)["a"], painted(SCENE, label_id, fill=0))


def test_the_task_of_a_tasks_own_export(tmp_path: Path) -> None:
    members = export("CVAT for images 1.1", ONE)
    text = members["annotations.xml"].decode().replace(' task_id="8"', "").replace(' subset="default"', "")
    text = text.replace("<version>", "<meta><task><id>31</id></task></meta><version>")
    images = {"images/a.jpg": members.pop("images/default/a.jpg")}
    summary = convert(tmp_path, {**images, "annotations.xml": text.encode()})
    assert summary.manifest.items[0].source["task"] == 31


def test_images_that_no_list_names_are_pointed_out(tmp_path: Path) -> None:
    members = {**export("COCO 1.0", ONE), "images/default/alone.jpg": jpeg(1)}
    assert convert(tmp_path, members).warnings == (
        "1 image without annotations, not converted: images/default/alone.jpg",
    )


def test_an_image_that_is_listed_twice(tmp_path: Path) -> None:
    members = export("CVAT for images 1.1", ONE)
    text = members["annotations.xml"].decode()
    image = text[text.index("<image") : text.index("</annotations>")]
    doubled = text.replace("</annotations>", f"{image}</annotations>")
    fails(tmp_path, {**members, "annotations.xml": doubled.encode()}, r"both belong to images/default/a\.jpg")
