"""Reader of Segmentation mask 1.1: colours in `SegmentationClass/NAME.png`, their names in `labelmap.txt`.

It is PASCAL VOC's layout. `ImageSets/Segmentation/SUBSET.txt` lists the images; one without annotations has no mask.
"""

from functools import partial
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import ArchiveError
from sscloud.image import SUFFIXES
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
from training.formats.mask_images import LabelMap

LABEL_MAP, MASKS, IMAGES, LISTS = "labelmap.txt", "SegmentationClass", "JPEGImages", ("ImageSets", "Segmentation")


def list_entries(archive: ZipArchive) -> Contents:
    """All images that a list or a mask names.

    Raises:
        ArchiveError: the label map is missing or wrong.
    """
    label_file = next((name for name in sorted(archive.members) if base_name(name) == LABEL_MAP), None)
    if label_file is None:
        raise ArchiveError(
            f"{archive.path} has masks but no {LABEL_MAP}, which says what their colours mean. Export it again as "
            "'Segmentation mask 1.1', or put the file back."
        )
    folder = PurePosixPath(label_file).parent
    label_map = _label_map(archive, label_file)
    table, names = label_map.by_colour(label_file)
    pictures = {
        key: name for key, name in image_members(archive).items() if PurePosixPath(name).is_relative_to(folder / IMAGES)
    }
    entries, broken = [], []
    for stem in sorted({*_listed(archive, folder), *_masked(archive, folder)}):
        try:
            check_reference(label_file, "the image", stem)
            entries.append(_entry(archive, folder, stem, pictures, table, names))
        except ArchiveError as error:
            broken.append(error)
    return settle_claims(entries, pictures.values(), broken, merged_with_nobody=label_map.merged_with_nobody)


def _entry(
    archive: ZipArchive,
    folder: PurePosixPath,
    stem: str,
    pictures: dict[str, str],
    table: NDArray[np.uint8],
    names: tuple[str, ...],
) -> Entry:
    mask = archive.find(at(folder, MASKS, f"{stem}.png"))
    image = find_image(archive, pictures, (at(folder, IMAGES, stem + suffix) for suffix in sorted(SUFFIXES)))
    labels = [] if mask is None else mask_images.present(mask_images.read_colours(archive, mask, table))
    return Entry(
        annotations=mask or at(folder, *LISTS),
        name=base_name(image or stem),
        image=image,
        labels=tuple(names[place] for place in labels),
        read_shapes=partial(mask_images.read_shapes, archive, mask, table, names),
    )


def _label_map(archive: ZipArchive, member: str) -> LabelMap:
    rows = []
    for line in read_lines(archive, member):
        if line.startswith("#"):
            continue
        # name:r,g,b:parts:actions; the name may hold colons itself
        fields = line.rsplit(":", 3)
        if len(fields) != 4:
            raise ArchiveError(
                f"{member}: a line is 'name:r,g,b:parts:actions', found {line[:80]!r}. Export the archive again."
            )
        rows.append((fields[0], mask_images.colour(fields[1].split(","), member)))
    return mask_images.label_map(rows, member)


def _listed(archive: ZipArchive, folder: PurePosixPath) -> set[str]:
    place = folder.joinpath(*LISTS)
    lists = [name for name in archive.members if PurePosixPath(name).parent == place and name.endswith(".txt")]
    # Names with spaces stand in quotes.
    return {line.strip('"') for name in lists for line in read_lines(archive, name)}


def _masked(archive: ZipArchive, folder: PurePosixPath) -> set[str]:
    place = folder / MASKS
    paths = (PurePosixPath(name) for name in archive.members if name.lower().endswith(".png"))
    return {str(path.relative_to(place).with_suffix("")) for path in paths if path.is_relative_to(place)}
