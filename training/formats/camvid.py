"""Reader of CamVid 1.0: `SUBSET.txt` pairs images with masks of colours, whose names stand in `label_colors.txt`.

An image without annotations is listed without a mask.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import ArchiveError
from training.formats import mask_images
from training.formats.archive import ZipArchive
from training.formats.documents import read_lines
from training.formats.entry import (
    Contents,
    Entry,
    at,
    base_name,
    check_reference,
    find_image,
    image_members,
    settle_claims,
)

LABEL_COLOURS = "label_colors.txt"

_QUOTED = re.compile(r'"([^"]*)"\s*"([^"]*)"')


def list_entries(archive: ZipArchive) -> Contents:
    """All images that the lists of the subsets name.

    Raises:
        ArchiveError: the label colours or a list are wrong.
    """
    label_file = label_colours_member(archive)
    folder = PurePosixPath(label_file).parent
    label_map = mask_images.label_map(read_label_colours(archive, label_file), label_file)
    table, names = label_map.by_colour(label_file)
    pictures = {key: name for key, name in image_members(archive).items() if not _is_mask(name, folder)}
    entries, broken = [], []
    for listing, image, mask in _pairs(archive, folder, label_file):
        try:
            check_reference(listing, "the image", image)
            check_reference(listing, "the mask", mask)
            entries.append(_entry(archive, folder, image, mask, pictures, table, names, listing))
        except ArchiveError as error:
            broken.append(error)
    return settle_claims(entries, pictures.values(), broken, merged_with_nobody=label_map.merged_with_nobody)


def label_colours_member(archive: ZipArchive) -> str:
    """The member that says what colours mean.

    Raises:
        ArchiveError: there is none.
    """
    member = next((name for name in sorted(archive.members) if base_name(name) == LABEL_COLOURS), None)
    if member is None:
        raise ArchiveError(
            f"{archive.path} has masks but no {LABEL_COLOURS}, which says what they mean. Export it again, or put the "
            "file back."
        )
    return member


def read_label_colours(archive: ZipArchive, member: str) -> list[tuple[str, mask_images.Colour]]:
    """Name and colour of every line `r g b name` of a label_colors.txt.

    Raises:
        ArchiveError: a line says something else.
    """
    rows = []
    for line in read_lines(archive, member):
        if line.startswith("#"):
            continue
        fields = line.split(None, 3)
        if len(fields) != 4:
            raise ArchiveError(f"{member}: a line is 'r g b name', found {line[:80]!r}. Export the archive again.")
        rows.append((fields[3], mask_images.colour(fields[:3], member)))
    return rows


def _entry(
    archive: ZipArchive,
    folder: PurePosixPath,
    image: str,
    mask: str,
    pictures: dict[str, str],
    table: NDArray[np.uint8],
    names: tuple[str, ...],
    listing: str,
) -> Entry:
    member = archive.find(at(folder, mask)) if mask else None
    if mask and member is None:
        raise ArchiveError(f"{listing} names the mask {mask}, which is not in the archive. Export it again.")
    labels = [] if member is None else mask_images.present(mask_images.read_colours(archive, member, table))
    return Entry(
        annotations=member or f"{listing}, image {image}",
        name=base_name(image),
        image=find_image(archive, pictures, [at(folder, image)]),
        labels=tuple(names[place] for place in labels),
        read_shapes=partial(mask_images.read_shapes, archive, member, table, names),
    )


def _pairs(archive: ZipArchive, folder: PurePosixPath, label_file: str) -> Iterator[tuple[str, str, str]]:
    """List, image and mask ("" without one) of every line of the lists."""
    lists = [
        name
        for name in sorted(archive.members)
        if PurePosixPath(name).parent == folder and name.endswith(".txt") and name != label_file
    ]
    for listing in lists:
        for line in read_lines(archive, listing):
            if quoted := _QUOTED.fullmatch(line):  # names with spaces
                image, mask = quoted.groups()
            else:
                image, _, mask = line.partition(" ")
            # Images are written as if from the root of a disk.
            yield listing, image.lstrip("/"), mask.strip().lstrip("/")


def _is_mask(name: str, folder: PurePosixPath) -> bool:
    parts = PurePosixPath(name).relative_to(folder).parts if PurePosixPath(name).is_relative_to(folder) else ()
    return len(parts) > 1 and parts[0].endswith("annot")
