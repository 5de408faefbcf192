"""Reader of Cityscapes 1.0: `gtFine/SUBSET/NAME_gtFine_labelIds.png` holds line numbers of `label_colors.txt`.

Line 0 is the background. An image without annotations has no mask.
"""

from functools import partial
from pathlib import PurePosixPath

from sscloud.errors import ArchiveError
from training.formats import mask_images
from training.formats.archive import ZipArchive
from training.formats.camvid import label_colours_member, read_label_colours
from training.formats.entry import Contents, Entry, image_members, settle_claims

MASKS, IMAGES = "gtFine", ("imgsFine", "leftImg8bit")
MASK_ENDING, IMAGE_ENDING = "_gtFine_labelIds.png", "_leftImg8bit"


def list_entries(archive: ZipArchive) -> Contents:
    """All images, and all masks whose image is missing.

    Raises:
        ArchiveError: the label colours are missing or wrong, or there are no label ids.
    """
    label_file = label_colours_member(archive)
    folder = PurePosixPath(label_file).parent
    label_map = mask_images.label_map(read_label_colours(archive, label_file), label_file)
    pictures = {_stem(name, folder): name for name in image_members(archive).values() if _is_picture(name, folder)}
    masks = {}
    for name in archive.members:
        path = PurePosixPath(name)
        if name.endswith(MASK_ENDING) and path.is_relative_to(folder / MASKS):
            masks[str(path.relative_to(folder / MASKS)).removesuffix(MASK_ENDING)] = name
    if not masks:
        raise ArchiveError(
            f"{archive.path} has no masks named *{MASK_ENDING}. Export it again as 'Cityscapes 1.0', with annotations."
        )
    entries, broken = [], []
    for stem in sorted(pictures.keys() | masks.keys()):
        try:
            entries.append(_entry(archive, stem, pictures.get(stem), masks.get(stem), label_map.names))
        except ArchiveError as error:
            broken.append(error)
    first = label_map.names[0]
    merged = () if first.casefold() == mask_images.BACKGROUND else (first,)
    return settle_claims(entries, pictures.values(), broken, merged_with_nobody=merged)


def _entry(archive: ZipArchive, stem: str, image: str | None, mask: str | None, names: tuple[str, ...]) -> Entry:
    labels = [] if mask is None else mask_images.present(mask_images.read_numbers(archive, mask, len(names)))
    suffix = "" if image is None else PurePosixPath(image).suffix
    return Entry(
        annotations=mask or str(image),
        name=PurePosixPath(stem).name + suffix,
        image=image,
        labels=tuple(names[place] for place in labels),
        read_shapes=partial(mask_images.read_numbered_shapes, archive, mask, names),
    )


def _is_picture(name: str, folder: PurePosixPath) -> bool:
    path = PurePosixPath(name)
    return path.is_relative_to(folder.joinpath(*IMAGES)) and path.stem.endswith(IMAGE_ENDING)


def _stem(name: str, folder: PurePosixPath) -> str:
    path = PurePosixPath(name).relative_to(folder.joinpath(*IMAGES))
    return str(path.with_suffix("")).removesuffix(IMAGE_ENDING)
