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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import defusedxml.ElementTree
import numpy as np
from defusedxml import DefusedXmlException
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import ArchiveError, ImageError
from sscloud.image import decode_image
from training.formats.archive import ZipArchive, unsafe_path
from training.rasterise import MaskShape, PolygonShape, Shape, check_polygon, rectangle

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MASKS_FOLDER: Final = "Masks"
MAX_XML_BYTES: Final = 32 << 20
"""Largest XML. A point of a polygon takes 62 bytes, so this is half a million points for one image."""
MAX_OBJECTS: Final = 20_000
"""Most objects of one image."""
MAX_MASK_PIXELS: Final = 1 << 30
"""Most pixels in the boxes of all masks of one image, a byte each: eight times the largest image that is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An annotated image in the archive, not read yet."""

    xml: str
    """Member with the annotations."""
    image: str | None
    """Member with the picture; None when the archive holds none that could be it."""
    labels: tuple[str, ...]
    """The label name of every object that is not deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An annotated image."""

    name: str
    """File name of the image, without its folder."""
    image: bytes
    """The image file as it is in the archive; it decodes."""
    size_hw: tuple[int, int]
    shapes: tuple[Shape, ...]
    """In painting order, deleted objects left out."""
    deleted: int
    """Number of objects marked as deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What an archive holds."""

    entries: tuple[Entry, ...]
    """Sorted by member name."""
    without_annotations: tuple[str, ...]
    """Images that no XML belongs to."""
    broken: tuple[ArchiveError, ...]
    """One for each XML that cannot be read."""


def list_entries(archive: ZipArchive) -> Contents:
    """Pair the XML files of an archive with their images.

    An XML's image is the one of its own name, else the one that its `filename` names, else the only image of the folder
    that no other XML has claimed.
    """
    images = {name for name in archive.members if _is_image(name)}
    folded = {name.casefold(): name for name in images}
    pairs: dict[str, str | None] = {}
    owners: dict[str, str] = {}
    labels: dict[str, tuple[str, ...]] = {}
    broken = []
    for xml in sorted(name for name in archive.members if PurePosixPath(name).suffix.lower() == ".xml"):
        try:
            root = _parse(archive, xml)
            image = _named_image(archive, xml, root, folded)
        except ArchiveError as error:
            broken.append(error)
            continue
        if image is not None and owners.setdefault(image, xml) != xml:
            broken.append(
                ArchiveError(f"{xml} and {owners[image]} both belong to {image}. Leave one of them in the archive.")
            )
            continue
        pairs[xml] = image
        labels[xml] = tuple(_text(element, "name") for element in root.findall("object") if not _is_deleted(element))
    taken = set(owners)
    _pair_leftovers(pairs, images - taken)
    taken.update(image for image in pairs.values() if image)
    return Contents(
        entries=tuple(Entry(xml=xml, image=image, labels=labels[xml]) for xml, image in pairs.items()),
        without_annotations=tuple(sorted(images - taken)),
        broken=tuple(broken),
    )


def read_entry(archive: ZipArchive, entry: Entry) -> Item:
    """Read one image with its shapes.

    Raises:
        ArchiveError: the XML, the image or a mask is missing, broken, hostile or of another size; names the member.
    """
    root = _parse(archive, entry.xml)
    if entry.image is None:
        raise ArchiveError(
            f"{entry.xml}: its image {_text(root, 'filename')!r} is not in the archive. Export again with "
            "'Save images' switched on, or put the image beside the XML under the XML's name."
        )
    image = archive.read(entry.image)
    try:
        height, width = decode_image(image).shape[:2]
    except ImageError as error:
        raise ArchiveError(f"{entry.image}: {error}") from error
    size_hw = (height, width)
    _check_size(entry, root, size_hw)
    objects = root.findall("object")
    if len(objects) > MAX_OBJECTS:
        raise ArchiveError(
            f"{entry.xml} lists {len(objects)} objects, at most {MAX_OBJECTS} are read. Join the small ones in CVAT."
        )
    kept = [element for element in objects if not _is_deleted(element)]
    return Item(
        name=PurePosixPath(entry.image).name,
        image=image,
        size_hw=size_hw,
        shapes=tuple(_shapes(archive, entry.xml, kept, size_hw)),
        deleted=len(objects) - len(kept),
    )


def _parse(archive: ZipArchive, xml: str) -> "Element":
    data = archive.read(xml, max_bytes=MAX_XML_BYTES)
    try:
        root: Element = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        raise ArchiveError(
            f"{xml} declares a document type or entities ({type(error).__name__}), which LabelMe never does and which "
            "can be an attack. Delete everything from '<!DOCTYPE' to its closing '>' or export again."
        ) from error
    except (SyntaxError, ValueError, LookupError) as error:  # SyntaxError is the base of ElementTree's ParseError
        raise ArchiveError(f"{xml} is not well-formed XML ({error}). Export the archive again.") from error
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
    _check_reference(xml, "filename", filename)
    path = PurePosixPath(xml)
    # `folder` is only ever compared with the archive's own names; one that points elsewhere matches none of them.
    named = [path.parent / folder / filename, path.parent / filename] if filename else []
    own = [path.with_suffix(suffix) for suffix in sorted(IMAGE_SUFFIXES)]
    # Where NAME.jpg and NAME.png both lie beside NAME.xml, `filename` says which of them it is.
    candidates = [place for place in named if place.stem == path.stem] + own + named
    for place in candidates:
        member = archive.find(str(place))
        if member is not None and _is_image(member):
            return member
    return next((images[key] for place in candidates if (key := str(place).casefold()) in images), None)


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


def _shapes(archive: ZipArchive, xml: str, objects: Sequence["Element"], size_hw: tuple[int, int]) -> list[Shape]:
    shapes: list[Shape] = []
    mask_pixels = 0
    for position, element in enumerate(objects):
        label = _text(element, "name")
        where = f"{xml}, object {_text(element, 'id') or position} ({label or 'no name'})"
        polygon, segm = element.find("polygon"), element.find("segm")
        if polygon is not None:
            shapes.append(_polygon(where, label, element, polygon, size_hw))
        elif segm is not None:
            mask = _mask(archive, xml, where, label, segm, size_hw)
            mask_pixels += mask.mask.size
            if mask_pixels > MAX_MASK_PIXELS:
                raise ArchiveError(
                    f"{xml}: the boxes of its masks hold over {MAX_MASK_PIXELS} pixels together. Split the scene's "
                    "masks in CVAT into fewer overlapping ones."
                )
            shapes.append(mask)
        else:
            inside = ", ".join(f"<{child.tag}>" for child in element) or "nothing"
            raise ArchiveError(
                f"{where} has neither a polygon nor a mask, it holds {inside}. Objects of LabelMe 3.0 are expected"
                + ("; this is Pascal VOC: export as 'LabelMe 3.0'." if element.find("bndbox") is not None else ".")
            )
    return shapes


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
        raise ArchiveError(f"{where}: {error}. Correct or delete the object in CVAT and export again.") from error
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
    _check_reference(where, "mask", name)
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


def _check_size(entry: Entry, root: "Element", size_hw: tuple[int, int]) -> None:
    stated = (root.findtext("imagesize/nrows", "").strip(), root.findtext("imagesize/ncols", "").strip())
    if any(stated) and stated != (str(size_hw[0]), str(size_hw[1])):
        raise ArchiveError(
            f"{entry.xml} was drawn on an image of {stated[1]}x{stated[0]} pixels, {entry.image} has "
            f"{size_hw[1]}x{size_hw[0]}. Put the image that was annotated into the archive."
        )


def _check_reference(where: str, tag: str, name: str) -> None:
    if name and (problem := unsafe_path(name)):
        raise ArchiveError(
            f"{where}: <{tag}> {name!r} {problem}. It has to be a name inside the archive: correct the XML or export "
            "again."
        )


def _is_deleted(element: "Element") -> bool:
    return _text(element, "deleted") in ("1", "true", "yes")


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and MASKS_FOLDER not in path.parent.parts


def _text(element: "Element", tag: str) -> str:
    return (element.findtext(tag) or "").strip()
