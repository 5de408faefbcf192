"""Reader of LabelMe 3.0 archives: CVAT's export, and older polygon-only ones.

CVAT writes `<subset>/NAME.xml` beside `<subset>/NAME.jpg`; masks are `<subset>/Masks/NAME_mask_N.png` (RGBA, of the
image's size, transparent where the object is not), named in the XML; a rectangle is a polygon of type `bounding_box`
whose rotation stands in the object's attributes, not in its points. Objects are listed as CVAT lists them; their
z_order is not written, so the order of the list is the order of painting. Parts (CVAT's groups) change nothing: every
object keeps its own label.

Older archives hold an XML and an image whose names differ, and `folder` and `filename` that name a place on somebody
else's machine: the image is then found by the XML's own name, or by being the only one left beside it.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import ArchiveError
from sscloud.image import SUFFIXES
from training.formats.archive import ZipArchive
from training.formats.documents import parse_xml
from training.formats.entry import (
    Contents,
    Entry,
    Size,
    cannot_be_painted,
    check_count,
    check_reference,
    collect,
    find_image,
    image_members,
    twice_claimed,
)
from training.rasterise import MaskShape, PolygonShape, Shape, check_polygon, rectangle

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MASKS_FOLDER: Final = "Masks"
MAX_XML_BYTES: Final = 32 << 20
"""Largest XML. A point of a polygon takes 62 bytes, so this is half a million points for one image."""


def list_entries(archive: ZipArchive) -> Contents:
    """Pair the XML files of an archive with their images.

    An XML's image is the one of its own name, else the one that its `filename` names, else the only image of the folder
    that no other XML has claimed.
    """
    images = {key: name for key, name in image_members(archive).items() if not _is_mask(name)}
    roots: dict[str, Entry] = {}
    pairs: dict[str, str | None] = {}
    owners: dict[str, str] = {}
    broken = []
    for xml in sorted(name for name in archive.members if PurePosixPath(name).suffix.lower() == ".xml"):
        try:
            root = _parse(archive, xml)
            image = _named_image(archive, xml, root, images)
            if image is not None and owners.setdefault(image, xml) != xml:
                broken.append(twice_claimed(xml, owners[image], image))
                continue
            roots[xml] = _entry(archive, xml, root)
        except ArchiveError as error:
            broken.append(error)
            continue
        pairs[xml] = image
    left = set(images.values()) - owners.keys()
    _pair_leftovers(pairs, left)
    return Contents(
        entries=tuple(
            replace(roots[xml], image=image, name=roots[xml].name if image is None else PurePosixPath(image).name)
            for xml, image in pairs.items()
        ),
        without_annotations=tuple(sorted(left - set(pairs.values()))),
        broken=tuple(broken),
    )


def _entry(archive: ZipArchive, xml: str, root: "Element") -> Entry:
    """What an XML says without its image."""
    objects = root.findall("object")
    check_count(len(objects), xml)
    kept = [element for element in objects if not _is_deleted(element)]
    return Entry(
        annotations=xml,
        name=_text(root, "filename") or PurePosixPath(xml).name,
        image=None,
        labels=tuple(_text(element, "name") for element in kept),
        read_shapes=partial(_read_shapes, archive, xml),
        stated_size_hw=_stated_size(root, xml),
        deleted=len(objects) - len(kept),
    )


def _read_shapes(archive: ZipArchive, xml: str, size_hw: Size) -> tuple[Shape, ...]:
    # Parsed a second time: the trees of thousands of frames would not fit in memory together.
    objects = _parse(archive, xml).findall("object")
    kept = [element for element in objects if not _is_deleted(element)]
    return collect(_shapes(archive, xml, kept, size_hw), xml)


def _parse(archive: ZipArchive, xml: str) -> "Element":
    root = parse_xml(archive.read(xml, max_bytes=MAX_XML_BYTES), xml)
    if root.tag != "annotation":
        raise ArchiveError(
            f"{xml} starts with <{root.tag}>, a LabelMe file with <annotation>. Export as 'LabelMe 3.0' from CVAT, or "
            "take the file out of the archive."
        )
    return root


def _named_image(archive: ZipArchive, xml: str, root: "Element", images: Mapping[str, str]) -> str | None:
    """The image of the XML's own name or the one it names; `images` are the archive's, by case-folded name."""
    filename = _text(root, "filename")
    folder = _text(root, "folder").replace("\\", "/").strip("/")
    check_reference(xml, "the filename", filename)
    path = PurePosixPath(xml)
    # `folder` is only ever compared with the archive's own names; one that points elsewhere matches none of them.
    named = [path.parent / folder / filename, path.parent / filename] if filename else []
    own = [path.with_suffix(suffix) for suffix in sorted(SUFFIXES)]
    # Where NAME.jpg and NAME.png both lie beside NAME.xml, `filename` says which of them it is.
    candidates = [place for place in named if place.stem == path.stem] + own + named
    found = find_image(archive, images, map(str, candidates))
    return None if found is None or _is_mask(found) else found


def _pair_leftovers(pairs: dict[str, str | None], images: Iterable[str]) -> None:
    """Give the only XML without an image in a folder the only image there that is left."""
    left: dict[PurePosixPath, list[str]] = {}
    for image in images:
        left.setdefault(PurePosixPath(image).parent, []).append(image)
    waiting: dict[PurePosixPath, list[str]] = {}
    for xml, paired in pairs.items():
        if paired is None:
            waiting.setdefault(PurePosixPath(xml).parent, []).append(xml)
    for folder, xmls in waiting.items():
        if len(xmls) == 1 and len(left.get(folder, [])) == 1:
            pairs[xmls[0]] = left[folder][0]


def _shapes(archive: ZipArchive, xml: str, objects: Sequence["Element"], size_hw: Size) -> Iterator[Shape]:
    for position, element in enumerate(objects):
        label = _text(element, "name")
        where = f"{xml}, object {_text(element, 'id') or position} ({label or 'no name'})"
        polygon, segm = element.find("polygon"), element.find("segm")
        if polygon is not None:
            yield _polygon(where, label, element, polygon, size_hw)
        elif segm is not None:
            yield _mask(archive, xml, where, label, segm, size_hw)
        else:
            inside = ", ".join(f"<{child.tag}>" for child in element) or "nothing"
            raise ArchiveError(
                f"{where} has neither a polygon nor a mask, it holds {inside}. Objects of LabelMe 3.0 are expected"
                + ("; this is Pascal VOC: export as 'LabelMe 3.0'." if element.find("bndbox") is not None else ".")
            )


def _polygon(where: str, label: str, element: "Element", polygon: "Element", size_hw: tuple[int, int]) -> PolygonShape:
    rows = [(point.findtext("x", ""), point.findtext("y", "")) for point in polygon.iter("pt")]
    try:
        points = np.array([(float(x), float(y)) for x, y in rows], np.float64).reshape(-1, 2)
        check_polygon(points, size_hw=size_hw)
        shape = PolygonShape(label=label, points=points)
        if _text(element, "type") == "bounding_box":
            rotation = _rotation(_text(element, "attributes"))
            (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
            shape = rectangle(label, (x1, y1, x2, y2), rotation=rotation)
            check_polygon(shape.points, size_hw=size_hw)
    except ValueError as error:
        raise cannot_be_painted(where, error) from error
    return shape


def _rotation(attributes: str) -> float:
    """Degrees from CVAT's list of attributes, `name=value, …, rotation=30.0`: its own entry is the last one."""
    found = re.findall(r"(?:^|,)\s*rotation=([^,]*)", attributes)
    rotation = float(found[-1]) if found else 0.0
    if not math.isfinite(rotation):
        raise ValueError(f"the rotation {rotation} is not a finite number")
    return rotation


def _mask(
    archive: ZipArchive, xml: str, where: str, label: str, segm: "Element", size_hw: tuple[int, int]
) -> MaskShape:
    name = _text(segm, "mask")
    check_reference(where, "the mask", name)
    # CVAT writes images of subfolders into subfolders, but all masks of a subset into one folder at its top.
    places = [str(folder / MASKS_FOLDER / name) for folder in PurePosixPath(xml).parents] if name else []
    member = next((found for place in places if (found := archive.find(place))), None)
    if member is None:
        raise ArchiveError(
            f"{where}: its mask {MASKS_FOLDER}/{name} is not in the archive. Export again, with the {MASKS_FOLDER} "
            "folder, or delete the object in CVAT."
        )
    drawn = _decode_mask(member, archive.read(member), size_hw)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not rows.size:
        return MaskShape(label=label, box_xyxy=(0, 0, 0, 0), mask=np.zeros((0, 0), np.bool_))
    x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return MaskShape(label=label, box_xyxy=(x1, y1, x2, y2), mask=drawn[y1:y2, x1:x2].copy())


def _decode_mask(member: str, data: bytes, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) bool: pixels with any channel set, as CVAT's importer reads them.

    The size is compared before anything is decompressed, so the mask is bounded by the image.
    """
    height, width = size_hw
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is the size check below
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        found = image.size
        pixels = _pixels(image) if found == (width, height) else None
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ArchiveError(f"{member} is not a readable PNG mask ({error}). Export the archive again.") from error
    if pixels is None:
        raise ArchiveError(
            f"{member} has {found[0]}x{found[1]} pixels, its image {width}x{height}. A mask has the image's size: "
            "export the archive again."
        )
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # as one number: much faster on large panoramas than any(axis=2)
        pixels = np.ascontiguousarray(pixels).view(np.uint32)[..., 0]
    return pixels != 0 if pixels.ndim == 2 else np.asarray((pixels != 0).any(axis=2), np.bool_)


def _pixels(image: Image.Image) -> NDArray[np.uint8 | np.uint32]:
    if image.mode == "P":
        return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
    return np.asarray(image)


def _stated_size(root: "Element", xml: str) -> Size | None:
    rows, columns = root.findtext("imagesize/nrows", "").strip(), root.findtext("imagesize/ncols", "").strip()
    if not rows and not columns:
        return None
    try:
        return int(rows), int(columns)
    except ValueError as error:
        raise ArchiveError(
            f"{xml}: <imagesize> must give whole numbers of rows and columns, found {rows!r} and {columns!r}. Correct "
            "it, or delete the element."
        ) from error


def _is_deleted(element: "Element") -> bool:
    return _text(element, "deleted") in ("1", "true", "yes")


def _is_mask(name: str) -> bool:
    return MASKS_FOLDER in PurePosixPath(name).parent.parts


def _text(element: "Element", tag: str) -> str:
    return (element.findtext(tag) or "").strip()
