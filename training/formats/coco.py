"""Reader of COCO 1.0: `annotations/instances_SUBSET.json` with all objects, the images under `images/SUBSET/`.

CVAT writes masks and ellipses as run lengths, polygons as such, and a rectangle as its box with the rotation in the
attributes. Objects are listed by z_order, which is not written: the order of the list is the order of painting. CVAT
joins a group to one object, with the label of its largest shape and without its rectangles, and lists it last.

pycocotools' own reader is not used: it takes paths, trusts every number, and prints.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from sscloud.errors import ArchiveError
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
    gather,
    image_members,
    root_of,
)
from training.rasterise import Shape

_Object = Mapping[str, Any]


def list_entries(archive: ZipArchive) -> Contents:
    """All images that the files of objects list."""
    images = image_members(archive)
    members = sorted(name for name in archive.members if is_annotations(name))
    return gather((found for member in members for found in _read(archive, member, images)), images.values())


def is_annotations(member: str) -> bool:
    """Whether a member is a JSON of objects by its name; keypoints and captions cover no pixels."""
    name = base_name(member).casefold()
    return name.endswith(".json") and not name.startswith(("person_keypoints", "captions", "image_info", "labels_"))


def _read(archive: ZipArchive, member: str, images: Mapping[str, str]) -> Iterator[Entry | ArchiveError]:
    try:
        data = parse_json(archive, member)
        names = _category_names(data, member)
        drawn: dict[int, list[_Object]] = {}
        for value in listing(data, "annotations", member):
            found = mapping(value, f"{member}, an annotation")
            drawn.setdefault(whole(found, "image_id", f"{member}, an annotation", default=-1), []).append(found)
        listed = [mapping(value, f"{member}, an image") for value in listing(data, "images", member)]
        by_id = {whole(image, "id", f"{member}, an image", default=-1): image for image in listed}
    except ArchiveError as error:
        yield error
        return
    if len(by_id) != len(listed):
        yield ArchiveError(f"{member}: two images have one id. Export the archive again.")
        return
    if lost := sorted(drawn.keys() - by_id.keys()):
        yield ArchiveError(f"{member} has objects of the image {lost[0]}, which it does not list. Export again.")
    for image_id, image in by_id.items():
        try:
            yield _entry(archive, member, image, drawn.get(image_id, []), names, images)
        except ArchiveError as error:
            yield error


def _entry(
    archive: ZipArchive,
    member: str,
    image: _Object,
    drawn: Sequence[_Object],
    names: Mapping[int, str],
    images: Mapping[str, str],
) -> Entry:
    path = text(image, "file_name", f"{member}, an image").replace("\\", "/")
    where = f"{member}, image {path}"
    check_reference(where, "the name", path)
    check_count(len(drawn), where)
    painted = tuple(value for value in drawn if _covers_pixels(value))
    lost = sorted({whole(v, "category_id", where, default=-1) for v in painted} - names.keys())
    if lost:
        raise ArchiveError(
            f"{where} has objects of the category {lost[0]}, which the file does not list. Export again."
        )
    width, height = whole(image, "width", where), whole(image, "height", where)
    folder = root_of(member)
    subset = PurePosixPath(member).stem.partition("_")[2]
    return Entry(
        annotations=where,
        name=base_name(path),
        image=find_image(
            archive,
            images,
            (
                at(folder, "images", subset, path),
                at(folder, "images", path),
                at(folder, path),
                at(folder, subset, path),
            ),
        ),
        labels=tuple(names[value["category_id"]] for value in painted),
        read_shapes=partial(_read_shapes, where, painted, names),
        stated_size_hw=(height, width) if height and width else None,
        skipped=Counter("keypoints" for _ in range(len(drawn) - len(painted))),
    )


def _covers_pixels(value: _Object) -> bool:
    return bool(value.get("segmentation")) or bool(value.get("bbox") and "keypoints" not in value)


def _read_shapes(where: str, drawn: Sequence[_Object], names: Mapping[int, str], size_hw: Size) -> tuple[Shape, ...]:
    def shapes() -> Iterator[Shape]:
        for value in drawn:
            label = names[value["category_id"]]
            try:
                yield from _shapes(value, label, size_hw)
            except ValueError as error:
                raise cannot_be_painted(f"{where}, object {shown(value.get('id'))} ({label})", error) from error

    return collect(shapes(), where)


def _shapes(value: _Object, label: str, size_hw: Size) -> Iterator[Shape]:
    segmentation = value.get("segmentation")
    if isinstance(segmentation, dict):
        yield objects.mask(segmentation, label=label, size_hw=size_hw)
    elif isinstance(segmentation, list) and segmentation:
        for part in segmentation:
            yield objects.polygon(part, label=label, size_hw=size_hw)
    elif segmentation:
        raise ValueError(f"its segmentation is {shown(segmentation)}, polygons or run lengths are expected")
    else:
        attributes = value.get("attributes") or {}
        if not isinstance(attributes, dict):
            raise ValueError(  # noqa: TRY004 - what is wrong is the file
                f"its attributes are {shown(attributes)}, an object of JSON is expected"
            )
        yield objects.box(value["bbox"], attributes, label=label, size_hw=size_hw)


def _category_names(data: Mapping[str, Any], member: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for value in listing(data, "categories", member):
        where = f"{member}, a category"
        category = mapping(value, where)
        number = whole(category, "id", where, default=-1)
        if names.setdefault(number, text(category, "name", where)) != text(category, "name", where):
            raise ArchiveError(f"{member}: two categories have the id {number}. Export the archive again.")
    return names
