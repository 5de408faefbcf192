"""What the reader of every format gives: entries that are all listed first, then read one by one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from sscloud.errors import ArchiveError, ImageError
from sscloud.image import SUFFIXES, decode_image
from training.formats.archive import ZipArchive, unsafe_path
from training.rasterise import MaskShape, Shape

MAX_OBJECTS: Final = 20_000
"""Most objects of one image."""
MAX_MASK_PIXELS: Final = 1 << 30
"""Most pixels in the boxes of all masks of one image, a byte each: eight times the largest image that is read."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An image that the archive lists, not read yet."""

    annotations: str
    """Where its annotations are, for messages: a member, with the image's name in it when it describes many."""
    name: str
    """File name of the image, without folders."""
    image: str | None
    """Member with the picture; None when the archive holds none that could be it."""
    labels: tuple[str, ...]
    """The label name of every object that would be painted."""
    read_shapes: Callable[[Size], tuple[Shape, ...]]
    """Image size (H, W) → shapes in painting order; raises `ArchiveError` for objects that cannot be painted."""
    stated_size_hw: Size | None = None
    """What the archive says of the image's size."""
    deleted: int = 0
    """Objects that are marked as deleted."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Type → number of objects that cover no pixels."""
    task: int | None = None
    """CVAT's number of the task, where the format tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What an archive holds."""

    entries: tuple[Entry, ...]
    """Sorted by member name."""
    without_annotations: tuple[str, ...] = ()
    """Images that the annotations do not mention."""
    broken: tuple[ArchiveError, ...] = ()
    """One for each image, or file of annotations, that cannot be read."""
    merged_with_nobody: tuple[str, ...] = ()
    """Labels that the format cannot tell from pixels that nobody drew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An image with its shapes."""

    image: bytes
    """The image file as it is in the archive; it decodes."""
    size_hw: Size
    shapes: tuple[Shape, ...]
    """In painting order."""


def read_entry(archive: ZipArchive, entry: Entry) -> Item:
    """Read one image with its shapes.

    Raises:
        ArchiveError: the annotations, the image or a mask is missing, broken, hostile or of another size; names it.
    """
    if entry.image is None:
        raise ArchiveError(
            f"{entry.annotations}: its image {entry.name!r} is not in the archive. Export again with 'Save images' "
            "switched on."
        )
    image = archive.read(entry.image)
    try:
        height, width = decode_image(image).shape[:2]
    except ImageError as error:
        raise ArchiveError(f"{entry.image}: {error}") from error
    stated = entry.stated_size_hw
    if stated is not None and stated != (height, width):
        raise ArchiveError(
            f"{entry.annotations} was drawn on an image of {stated[1]}x{stated[0]} pixels, {entry.image} has "
            f"{width}x{height}. Put the image that was annotated into the archive."
        )
    return Item(image=image, size_hw=(height, width), shapes=entry.read_shapes((height, width)))


def image_members(archive: ZipArchive) -> dict[str, str]:
    """The archive's pictures: case-folded path → member."""
    return {name.casefold(): name for name in archive.members if is_image(name)}


def find_image(archive: ZipArchive, images: Mapping[str, str], places: Iterable[str]) -> str | None:
    """The first of some places where a picture is; other case is accepted when nothing has the very name.

    Args:
        archive: the archive.
        images: from `image_members`.
        places: paths in the archive. They may come from outside: a path is only ever compared with the archive's own.
    """
    places = list(places)
    for place in places:
        member = archive.find(place)
        if member is not None and is_image(member):
            return member
    return next((images[place.casefold()] for place in places if place.casefold() in images), None)


def gather(found: Iterable[Entry | ArchiveError], images: Iterable[str]) -> Contents:
    """Contents of an archive from what a reader found one by one; see `settle_claims`."""
    entries: list[Entry] = []
    broken: list[ArchiveError] = []
    for one in found:
        if isinstance(one, Entry):
            entries.append(one)
        else:
            broken.append(one)
    return settle_claims(entries, images, broken)


def settle_claims(
    entries: Iterable[Entry],
    images: Iterable[str],
    broken: Iterable[ArchiveError],
    *,
    merged_with_nobody: tuple[str, ...] = (),
) -> Contents:
    """Contents of an archive in which no picture belongs to two entries: the first keeps it."""
    owners: dict[str, Entry] = {}
    kept, problems = [], list(broken)
    for entry in sorted(entries, key=lambda entry: (entry.image or entry.name, entry.annotations)):
        if entry.image is not None and owners.setdefault(entry.image, entry) is not entry:
            problems.append(twice_claimed(entry.annotations, owners[entry.image].annotations, entry.image))
        else:
            kept.append(entry)
    return Contents(
        entries=tuple(kept),
        without_annotations=tuple(sorted(set(images) - owners.keys())),
        broken=tuple(problems),
        merged_with_nobody=merged_with_nobody,
    )


def twice_claimed(one: str, other: str, image: str) -> ArchiveError:
    """The error of two annotations for one picture."""
    return ArchiveError(f"{one} and {other} both belong to {image}. Leave one of them in the archive.")


def check_count(objects: int, where: str) -> None:
    """Refuse more objects in one image than anybody draws.

    Raises:
        ArchiveError: more than `MAX_OBJECTS`.
    """
    if objects > MAX_OBJECTS:
        raise ArchiveError(
            f"{where} lists {objects} objects, at most {MAX_OBJECTS} are read. Join the small ones in CVAT."
        )


def collect(shapes: Iterable[Shape], where: str) -> tuple[Shape, ...]:
    """All shapes of an image, as long as their unfolded masks fit in memory together.

    Raises:
        ArchiveError: their boxes hold more than `MAX_MASK_PIXELS`.
    """
    collected: list[Shape] = []
    pixels = 0
    for shape in shapes:
        pixels += shape.mask.size if isinstance(shape, MaskShape) else 0
        if pixels > MAX_MASK_PIXELS:
            raise ArchiveError(
                f"{where}: the boxes of its masks hold over {MAX_MASK_PIXELS} pixels together. Split the scene's masks "
                "in CVAT into fewer overlapping ones."
            )
        collected.append(shape)
    return tuple(collected)


def cannot_be_painted(where: str, error: Exception) -> ArchiveError:
    """The error of an object that makes no shape."""
    return ArchiveError(f"{where}: {error}. Correct or delete the object in CVAT and export again.")


def check_reference(where: str, what: str, name: str) -> None:
    """Refuse a path of the annotations that leads out of the archive.

    Raises:
        ArchiveError: it does.
    """
    if name and (problem := unsafe_path(name)):
        raise ArchiveError(
            f"{where}: {what} {name!r} {problem}. It has to be a name inside the archive: correct it or export again."
        )


def is_image(name: str) -> bool:
    """Whether a member is a picture by its ending."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def root_of(member: str) -> PurePosixPath:
    """The folder that holds `annotations/`, or the JSON itself where somebody has moved it."""
    folder = PurePosixPath(member).parent
    return folder.parent if folder.name == "annotations" else folder


def base_name(path: str) -> str:
    """The last part of a path of either kind of slashes."""
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def at(folder: PurePosixPath, *parts: str) -> str:
    """A path in the archive."""
    return str(folder.joinpath(*(part for part in parts if part)))
