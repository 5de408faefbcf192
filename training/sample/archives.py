"""Archives as a CVAT server would export them, of scenes with known label maps: LabelMe 3.0 and CVAT for images 1.1.

Element names, their order, member names and number formats are those of exports made by a CVAT 2.73 server. Most
regions are written as masks and some as polygons on pixel edges, so that readers of both are exercised; either way,
reading the archive gives back the label map, pixel for pixel. The same scenes make the same bytes.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import ConfigError, SchemaError
from sscloud.labels import VOID, Label, LabelSchema
from sscloud.outlines import outline
from sscloud.regions import find_regions

MIN_AREA = 16
"""Smaller regions, pixels, are joined to one mask per label: nobody draws them one by one."""
MAX_REGIONS = 60
"""Most regions of an image that are shapes of their own; the smallest beyond it are joined as well."""
POLYGON_EVERY = 3
"""Every third region is a polygon."""
MAX_POLYGON_POINTS = 2000
"""Regions with a longer outline stay masks, as people would leave them."""

_SUBSET = "default"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_XML_TIME = "2026-01-01 00:00:00.000000+00:00"
_MASK_RGBA = (0, 203, 255, 153)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveItem:
    """One annotated scene."""

    name: str
    """File name of the image with its suffix, `1_normals.jpg`; no folders."""
    image_jpeg: bytes
    label_map: NDArray[np.uint8]
    """(H, W) uint8 label ids, of the image's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A region as somebody drew it."""

    label: Label
    box_xyxy: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    polygon: list[int] | None
    """Flat [x, y, …], when it was drawn as a polygon."""


def write_labelme(path: Path, items: Iterable[ArchiveItem], *, schema: LabelSchema, overwrite: bool = False) -> None:
    """Write a LabelMe 3.0 zip: `default/NAME.xml`, `default/NAME.jpg` and `default/Masks/NAME_mask_N.png`.

    Args:
        path: the zip, written atomically.
        items: may be made one by one; only one is held at a time.
        schema: names of the labels; the background is not drawn.
        overwrite: replace the file if there is one.

    Raises:
        ConfigError: `path` exists and `overwrite` is not set.
        SchemaError: a label map holds an id that no label has.
    """
    with _new_zip(path, overwrite=overwrite) as archive:
        for item in items:
            stem = PurePosixPath(item.name).stem
            root = ET.Element("annotation")
            _text(root, "filename", item.name)
            _text(root, "folder")
            source = ET.SubElement(root, "source")
            _text(source, "sourceImage")
            _text(source, "sourceAnnotation", "Datumaro")
            size = ET.SubElement(root, "imagesize")
            _text(size, "nrows", str(item.label_map.shape[0]))
            _text(size, "ncols", str(item.label_map.shape[1]))
            masks: dict[str, _Drawn] = {}
            for number, drawn in enumerate(_draw(item.label_map, schema)):
                mask_name = f"{stem}_mask_{number}.png"
                _labelme_object(root, number, drawn, mask_name)
                if drawn.polygon is None:
                    masks[mask_name] = drawn
            _add(archive, f"{_SUBSET}/{stem}.xml", _xml(root, declaration=False))
            _add(archive, f"{_SUBSET}/{item.name}", item.image_jpeg)
            for mask_name, drawn in masks.items():
                _add(archive, f"{_SUBSET}/Masks/{mask_name}", _mask_png(drawn, item.label_map.shape))


def write_cvat_for_images(
    path: Path, items: Iterable[ArchiveItem], *, schema: LabelSchema, overwrite: bool = False
) -> None:
    """Write a CVAT for images 1.1 zip: `annotations.xml` and `images/default/NAME.jpg`.

    Args and errors are those of `write_labelme`; masks are run lengths in the XML.
    """
    with _new_zip(path, overwrite=overwrite) as archive:
        images = []
        for number, item in enumerate(items):
            height, width = item.label_map.shape
            image = ET.Element(
                "image",
                {
                    "id": str(number),
                    "name": item.name,
                    "subset": _SUBSET,
                    "task_id": "1",
                    "width": str(width),
                    "height": str(height),
                },
            )
            image.extend(_cvat_shape(drawn) for drawn in _draw(item.label_map, schema))
            if len(image) == 0:
                image.text = "\n  "
            images.append(image)
            _add(archive, f"images/{_SUBSET}/{item.name}", item.image_jpeg)
        root = ET.Element("annotations")
        _text(root, "version", "1.1")
        root.append(_cvat_meta(schema, len(images)))
        root.extend(images)
        _add(archive, "annotations.xml", _xml(root, declaration=True))


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """(h, w) bool → lengths of the runs in row-major order, starting with a run of zeros (of length 0 if need be)."""
    flat = mask.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths: list[int] = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return [0, *lengths] if flat[0] else lengths


def _draw(label_map: NDArray[np.uint8], schema: LabelSchema) -> Iterator[_Drawn]:
    """The regions of a label map, largest first, then what is left of each label as one mask."""
    undrawn = VOID if schema.background is None else schema.background.id
    present = [int(label_id) for label_id in np.unique(label_map) if label_id != undrawn]
    if strangers := [label_id for label_id in present if schema.by_id(label_id) is None]:
        raise SchemaError(
            f"The label map holds the ids {strangers}, which no label of the schema has. They cannot be written by "
            "name: add labels for them."
        )
    regions = find_regions(
        label_map,
        background_ids={undrawn},
        min_area=MIN_AREA,
        max_regions=MAX_REGIONS,
    ).regions
    left = label_map.copy()
    labels = {label.id: label for label in schema.labels}
    for number, region in enumerate(regions):
        x1, y1, x2, y2 = region.box_xyxy
        mask = region.mask
        left[y1:y2, x1:x2][mask] = undrawn
        polygon = outline(region) if number % POLYGON_EVERY == 1 else None
        if polygon is not None and len(polygon) > 2 * MAX_POLYGON_POINTS:
            polygon = None
        yield _Drawn(label=labels[region.label_id], box_xyxy=region.box_xyxy, mask=mask, polygon=polygon)
    for label in schema.labels:
        if label.id == undrawn:
            continue
        mask = left == label.id
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if rows.size:
            x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
            yield _Drawn(label=label, box_xyxy=(x1, y1, x2, y2), mask=mask[y1:y2, x1:x2], polygon=None)


def _labelme_object(root: ET.Element, number: int, drawn: _Drawn, mask_name: str) -> None:
    element = ET.SubElement(root, "object")
    _text(element, "name", drawn.label.name)
    _text(element, "deleted", "0")
    _text(element, "verified", "0")
    _text(element, "occluded", "no")
    _text(element, "date")
    _text(element, "id", str(number))
    parts = ET.SubElement(element, "parts")
    _text(parts, "hasparts")
    _text(parts, "ispartof")
    if drawn.polygon is not None:
        shape = ET.SubElement(element, "polygon")
        for x, y in _pairs(drawn.polygon):
            point = ET.SubElement(shape, "pt")
            _text(point, "x", f"{x:.2f}")
            _text(point, "y", f"{y:.2f}")
    else:
        shape = ET.SubElement(element, "segm")
        _text(shape, "mask", mask_name)
        box = ET.SubElement(shape, "box")
        x1, y1, x2, y2 = drawn.box_xyxy
        for tag, value in (("xmin", x1), ("ymin", y1), ("xmax", x2 - 1), ("ymax", y2 - 1)):
            _text(box, tag, f"{value:.2f}")
    _text(shape, "username")
    _text(element, "attributes")


def _cvat_shape(drawn: _Drawn) -> ET.Element:
    common = {"label": drawn.label.name, "source": "manual", "occluded": "0"}
    if drawn.polygon is not None:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in _pairs(drawn.polygon))
        element = ET.Element("polygon", {**common, "points": points, "z_order": "0"})
    else:
        x1, y1, x2, y2 = drawn.box_xyxy
        element = ET.Element(
            "mask",
            {
                **common,
                "rle": ", ".join(map(str, run_lengths(drawn.mask))),
                "left": str(x1),
                "top": str(y1),
                "width": str(x2 - x1),
                "height": str(y2 - y1),
                "z_order": "0",
            },
        )
    return element


def _cvat_meta(schema: LabelSchema, images: int) -> ET.Element:
    meta = ET.Element("meta")
    project = ET.SubElement(meta, "project")
    _text(project, "id", "1")
    _text(project, "name", "sample")
    _text(project, "bugtracker")
    _text(project, "created", _XML_TIME)
    _text(project, "updated", _XML_TIME)
    task = ET.SubElement(ET.SubElement(project, "tasks"), "task")
    for tag, text in (
        ("id", "1"),
        ("name", "sample"),
        ("size", str(images)),
        ("mode", "annotation"),
        ("overlap", "0"),
        ("bugtracker", ""),
        ("created", _XML_TIME),
        ("updated", _XML_TIME),
        ("subset", _SUBSET),
        ("start_frame", "0"),
        ("stop_frame", str(max(0, images - 1))),
        ("frame_filter", ""),
    ):
        _text(task, tag, text)
    segment = ET.SubElement(ET.SubElement(task, "segments"), "segment")
    for tag, text in (("id", "1"), ("start", "0"), ("stop", str(max(0, images - 1))), ("url", "")):
        _text(segment, tag, text)
    _person(task)
    _text(project, "subsets", _SUBSET)
    _person(project)
    labels = ET.SubElement(project, "labels")
    for label in schema.labels:
        element = ET.SubElement(labels, "label")
        _text(element, "name", label.name)
        _text(element, "color", "#{:02x}{:02x}{:02x}".format(*label.color))
        _text(element, "type", "any")
        _text(element, "attributes", "\n" + 10 * " ")
    _text(meta, "dumped", _XML_TIME)
    return meta


def _person(parent: ET.Element) -> None:
    owner = ET.SubElement(parent, "owner")
    _text(owner, "username", "sample")
    _text(owner, "email")
    _text(parent, "assignee")


def _mask_png(drawn: _Drawn, size_hw: Sequence[int]) -> bytes:
    pixels = np.zeros((size_hw[0], size_hw[1], 4), np.uint8)
    x1, y1, x2, y2 = drawn.box_xyxy
    pixels[y1:y2, x1:x2][drawn.mask] = _MASK_RGBA
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _pairs(flat: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _text(parent: ET.Element, tag: str, text: str = "") -> None:
    ET.SubElement(parent, tag).text = text


def _xml(root: ET.Element, *, declaration: bool) -> bytes:
    """As CVAT writes it: two spaces a level, UTF-8, no <tag/> for empty elements."""
    ET.indent(root)
    body = ET.tostring(root, encoding="unicode", short_empty_elements=False)
    head = '<?xml version="1.0" encoding="utf-8"?>\n' if declaration else ""
    return f"{head}{body}\n".encode()


@contextlib.contextmanager
def _new_zip(path: Path, *, overwrite: bool) -> Iterator[zipfile.ZipFile]:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already. Name another file, or allow overwriting it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with temporary.open("xb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                yield archive
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _ZIP_TIME)
    info.create_system = 3  # Unix, whatever this runs on
    info.external_attr = 0o100644 << 16
    archive.writestr(info, data)
