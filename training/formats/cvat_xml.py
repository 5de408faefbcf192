"""Reader of CVAT for images 1.1: `annotations.xml` with every shape of every image, and the images under `images/`.

The only format that says everything: masks as run lengths, rectangles and ellipses as such with their rotation, z_order
and whether a person or a model drew a shape. Shapes are listed by z_order; with equal ones in the order in which CVAT
paints them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import numpy as np

from sscloud.errors import ArchiveError
from training.formats.archive import ZipArchive
from training.formats.documents import iterate_xml, shown
from training.formats.entry import (
    Contents,
    Entry,
    Size,
    at,
    base_name,
    cannot_be_painted,
    check_count,
    check_reference,
    collect,
    find_image,
    gather,
    image_members,
)
from training.rasterise import (
    EllipseShape,
    PolygonShape,
    RunLengthShape,
    Shape,
    check_ellipse,
    check_polygon,
    rectangle,
)
from training.run_lengths import check_rows, integers

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

PAINTED: Final = frozenset({"polygon", "mask", "box", "ellipse"})
"""Elements that cover pixels; other shapes mark places, boxes in space, or the whole image."""

_Drawn = tuple[str, Mapping[str, str]]
"""Tag and attributes of a shape's element."""


def list_entries(archive: ZipArchive) -> Contents:
    """All images of the XML files of an archive, with their shapes not decoded yet.

    Raises:
        ArchiveError: an export of CVAT for video.
    """
    images = image_members(archive)
    members = sorted(name for name in archive.members if PurePosixPath(name).suffix.lower() == ".xml")
    return gather((found for xml in members for found in _read(archive, xml, images)), images.values())


def _read(archive: ZipArchive, xml: str, images: Mapping[str, str]) -> Iterator[Entry | ArchiveError]:
    task = None
    root: Element | None = None
    try:
        for event, depth, element in iterate_xml(archive.read(xml), xml):
            if root is None:
                root = element
                _check_root(element, xml)
            if event == "start":
                continue
            if element.tag == "track":
                raise _video(xml)
            if element.tag == "task" and depth == 2:  # of <meta>; a project's tasks are named image by image
                task = _number(element.findtext("id"))
            elif element.tag == "image" and depth == 1:
                try:
                    yield _entry(archive, xml, element, images, task)
                except ArchiveError as error:
                    yield error
                root.clear()
    except ArchiveError as error:
        if isinstance(error, _VideoError):
            raise
        yield error


class _VideoError(ArchiveError):
    pass


def _video(xml: str) -> ArchiveError:
    return _VideoError(
        f"{xml} holds tracks: it is an export of 'CVAT for video 1.1', which lists keyframes instead of images. Export "
        "as 'CVAT for images 1.1'; CVAT then draws the shapes of every frame."
    )


def _check_root(root: "Element", xml: str) -> None:
    if root.tag != "annotations":
        raise ArchiveError(
            f"{xml} starts with <{root.tag}>, a file of CVAT with <annotations>. Export as 'CVAT for images 1.1', or "
            "take the file out of the archive."
        )


def _entry(archive: ZipArchive, xml: str, element: "Element", images: Mapping[str, str], task: int | None) -> Entry:
    name = element.get("name", "").replace("\\", "/")
    where = f"{xml}, image {name or element.get('id', '')}"
    if not name:
        raise ArchiveError(f"{where} has no name. Export the archive again.")
    check_reference(where, "name", name)
    check_count(len(element), where)
    drawn = tuple((child.tag, dict(child.attrib)) for child in element if child.tag in PAINTED)
    folder = PurePosixPath(xml).parent
    subset = element.get("subset", "")
    width, height = _number(element.get("width")), _number(element.get("height"))
    return Entry(
        annotations=where,
        name=base_name(name),
        image=find_image(
            archive,
            images,
            (
                at(folder, "images", subset, name),
                at(folder, "images", name),
                at(folder, subset, name),
                at(folder, name),
            ),
        ),
        labels=tuple(attributes.get("label", "") for _, attributes in drawn),
        read_shapes=partial(_read_shapes, where, drawn),
        stated_size_hw=None if width is None or height is None else (height, width),
        skipped=Counter(child.tag for child in element if child.tag not in PAINTED),
        task=_number(element.get("task_id")) or task,
    )


def _read_shapes(where: str, drawn: tuple[_Drawn, ...], size_hw: Size) -> tuple[Shape, ...]:
    def shapes() -> Iterator[Shape]:
        for position, (tag, attributes) in enumerate(drawn):
            object_where = f"{where}, object {position} ({tag}, {attributes.get('label') or 'no label'})"
            try:
                yield _shape(tag, attributes, size_hw)
            except (ValueError, OverflowError) as error:
                raise cannot_be_painted(object_where, error) from error

    return collect(shapes(), where)


def _shape(tag: str, attributes: Mapping[str, str], size_hw: Size) -> Shape:
    label, auto = attributes.get("label", ""), attributes.get("source") == "auto"
    z_order = int(attributes.get("z_order") or 0)
    if tag == "mask":
        return _mask(label, attributes, size_hw, z_order=z_order, auto=auto)
    if tag == "polygon":
        values = attributes.get("points", "").replace(";", ",").split(",")
        if len(values) % 2:
            raise ValueError(f"its points {shown(attributes.get('points'))} are not pairs of numbers")
        polygon = PolygonShape(
            label=label, points=np.array(values, np.float64).reshape(-1, 2), z_order=z_order, auto=auto
        )
        check_polygon(polygon.points, size_hw=size_hw)
        return polygon
    rotation = _float(attributes, "rotation", default="0")
    if tag == "box":
        x1, y1, x2, y2 = (_float(attributes, key) for key in ("xtl", "ytl", "xbr", "ybr"))
        box = rectangle(label, (x1, y1, x2, y2), rotation=rotation, z_order=z_order, auto=auto)
        check_polygon(box.points, size_hw=size_hw)
        return box
    ellipse = EllipseShape(
        label=label,
        centre_xy=(_float(attributes, "cx"), _float(attributes, "cy")),
        radii_xy=(_float(attributes, "rx"), _float(attributes, "ry")),
        rotation=rotation,
        z_order=z_order,
        auto=auto,
    )
    check_ellipse(ellipse, size_hw=size_hw)
    return ellipse


def _mask(label: str, attributes: Mapping[str, str], size_hw: Size, *, z_order: int, auto: bool) -> RunLengthShape:
    left, top, width, height = (int(attributes.get(key, "")) for key in ("left", "top", "width", "height"))
    if not (0 <= left <= left + width <= size_hw[1] and 0 <= top <= top + height <= size_hw[0]):
        raise ValueError(
            f"its box of {width}x{height} pixels at {left}, {top} does not lie in the image of "
            f"{size_hw[1]}x{size_hw[0]}"
        )
    runs = integers(attributes.get("rle", "").split(","))
    check_rows(runs, (height, width))
    return RunLengthShape(
        label=label, box_xyxy=(left, top, left + width, top + height), runs=runs, z_order=z_order, auto=auto
    )


def _float(attributes: Mapping[str, str], key: str, *, default: str = "") -> float:
    value = float(attributes.get(key, default))
    if not math.isfinite(value):
        raise ValueError(f"its {key} is not a finite number")
    return value


def _number(value: str | None) -> int | None:
    return int(value) if value and value.isascii() and value.isdigit() and len(value) < 10 else None
