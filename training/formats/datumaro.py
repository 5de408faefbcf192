"""Reader of Datumaro 1.0: `annotations/SUBSET.json` with all shapes, the images under `images/SUBSET/`.

Masks are compressed run lengths, polygons, rectangles and ellipses are written as such, each with its z_order. Only who
drew a shape is not written. The package datumaro is not used: it would bring many others, some in old versions, to read
a JSON.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final

from sscloud.errors import ArchiveError
from sscloud.image import SUFFIXES
from training.formats import objects
from training.formats.archive import ZipArchive
from training.formats.documents import listing, mapping, parse_json, shown, text, whole
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
    image_members,
    root_of,
    settle_claims,
)
from training.rasterise import EllipseShape, Shape, check_ellipse

PAINTED: Final = frozenset({"polygon", "mask", "bbox", "ellipse"})
"""Types that cover pixels."""
_KINDS: Final = {"label": "tag"}
"""What CVAT calls the others, where Datumaro calls them something else."""

_Object = Mapping[str, Any]


def list_entries(archive: ZipArchive) -> Contents:
    """All items that the files of the subsets list."""
    images = image_members(archive)
    entries: list[Entry] = []
    broken: list[ArchiveError] = []
    for member in sorted(name for name in archive.members if PurePosixPath(name).suffix.lower() == ".json"):
        try:
            data = parse_json(archive, member)
            names = _label_names(data, member)
            items = listing(data, "items", member)
        except ArchiveError as error:
            broken.append(error)
            continue
        for item in items:
            try:
                entries.append(_entry(archive, member, mapping(item, f"{member}, an item"), names, images))
            except ArchiveError as error:
                broken.append(error)
    return settle_claims(entries, images.values(), broken)


def _entry(archive: ZipArchive, member: str, item: _Object, names: Sequence[str], images: Mapping[str, str]) -> Entry:
    where = f"{member}, item {shown(item.get('id'))}"
    drawn = [mapping(value, f"{where}, an annotation") for value in listing(item, "annotations", where)]
    check_count(len(drawn), where)
    painted = tuple(value for value in drawn if value.get("type") in PAINTED)
    for value in painted:
        if not 0 <= whole(value, "label_id", where, default=-1) < len(names):
            raise ArchiveError(
                f"{where} has a shape of the label {shown(value.get('label_id'))}, the file lists {len(names)} labels. "
                "Give it a label in CVAT, or export again."
            )
    picture = mapping(item.get("image") or {}, f"{where}, 'image'")
    stem = text(item, "id", where)
    path = text(picture, "path", where).replace("\\", "/")
    for name in (stem, path):
        check_reference(where, "the path", name)
    folder, subset = root_of(member), PurePosixPath(member).stem
    wanted = [path] if path else [stem + suffix for suffix in sorted(SUFFIXES)]
    return Entry(
        annotations=where,
        name=base_name(path or stem),
        image=find_image(
            archive,
            images,
            [at(place, name) for name in wanted for place in (folder / "images" / subset, folder / "images", folder)],
        ),
        labels=tuple(names[value["label_id"]] for value in painted),
        read_shapes=partial(_read_shapes, where, painted, names),
        stated_size_hw=_size(picture, where),
        skipped=Counter(
            _KINDS.get(kind, kind) for value in drawn if (kind := text(value, "type", where)) not in PAINTED
        ),
    )


def _size(picture: _Object, where: str) -> Size | None:
    values = picture.get("size")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 2 or not all(type(value) is int for value in values):
        raise ArchiveError(f"{where}: the image's size must be [height, width], found {shown(values)}. Export again.")
    return values[0], values[1]


def _read_shapes(where: str, drawn: Sequence[_Object], names: Sequence[str], size_hw: Size) -> tuple[Shape, ...]:
    def shapes() -> Iterator[Shape]:
        for position, value in enumerate(drawn):
            label = names[value["label_id"]]
            try:
                yield _shape(value, label, size_hw)
            except ValueError as error:
                raise cannot_be_painted(f"{where}, object {position} ({value['type']}, {label})", error) from error

    return collect(shapes(), where)


def _shape(value: _Object, label: str, size_hw: Size) -> Shape:
    z_order, attributes = value.get("z_order", 0), value.get("attributes") or {}
    if type(z_order) is not int or not isinstance(attributes, dict):
        raise ValueError(f"its z_order is {shown(z_order)} and its attributes {shown(attributes)}")
    if value["type"] == "mask":
        return objects.mask(value.get("rle"), label=label, size_hw=size_hw, z_order=z_order)
    if value["type"] == "polygon":
        return objects.polygon(value.get("points"), label=label, size_hw=size_hw, z_order=z_order)
    if value["type"] == "bbox":
        return objects.box(value.get("bbox"), attributes, label=label, size_hw=size_hw, z_order=z_order)
    points = objects.numbers(value.get("points"))
    if len(points) != 4:
        raise ValueError(f"an ellipse has 4 numbers, the corners of its box, found {len(points)}")
    x1, y1, x2, y2 = points.tolist()
    ellipse = EllipseShape(
        label=label,
        centre_xy=((x1 + x2) / 2, (y1 + y2) / 2),
        radii_xy=((x2 - x1) / 2, (y2 - y1) / 2),
        rotation=objects.rotation(attributes),
        z_order=z_order,
    )
    check_ellipse(ellipse, size_hw=size_hw)
    return ellipse


def _label_names(data: Mapping[str, Any], member: str) -> list[str]:
    labels = mapping(mapping(data.get("categories", {}), member).get("label", {}), f"{member}, the labels")
    return [
        text(mapping(value, f"{member}, a label"), "name", f"{member}, a label")
        for value in listing(labels, "labels", f"{member}, the labels")
    ]
