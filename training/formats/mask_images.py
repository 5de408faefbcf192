"""What Segmentation mask, CamVid and Cityscapes share: images in which a colour or a number stands for a label.

Such an image keeps the label on top of every pixel and nothing else: no shapes, no order, nobody's name. Each label
becomes one mask. Pixels of the background belong to no shape.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import ArchiveError
from sscloud.image import MAX_PIXELS
from training.formats.archive import ZipArchive
from training.formats.entry import Size
from training.rasterise import MaskShape

BACKGROUND: Final = "background"
"""The name that CVAT's exports give to what nobody drew."""
MAX_LABELS: Final = 254
"""Most labels of a map."""

_NOBODY, _UNKNOWN = 0, 255
_ROWS = 256
"""Rows that are looked up at once: their codes take 8 MB of a panorama of 8192 columns."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMap:
    """Which colour stands for which label."""

    names: tuple[str, ...]
    """In the order of the file; `BACKGROUND` may be among them."""
    colours: tuple[Colour, ...]

    @property
    def merged_with_nobody(self) -> tuple[str, ...]:
        """Labels of the background's colour: their pixels cannot be told from pixels that nobody drew."""
        nobody = self._nobody
        return tuple(
            name
            for name, colour in zip(self.names, self.colours, strict=True)
            if colour in nobody and name.casefold() != BACKGROUND
        )

    @property
    def _nobody(self) -> frozenset[Colour]:
        named = {colour for name, colour in zip(self.names, self.colours, strict=True) if name.casefold() == BACKGROUND}
        return frozenset({(0, 0, 0), *named})

    def by_colour(self, where: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        """(2^24,) uint8: 24-bit colour → place of its label, 0 for nobody, 255 for colours of no label; and the names.

        Raises:
            ArchiveError: two labels have one colour.
        """
        table = np.full(1 << 24, _UNKNOWN, np.uint8)
        names = [BACKGROUND]
        owners: dict[Colour, str] = {}
        for name, colour in zip(self.names, self.colours, strict=True):
            if colour in self._nobody:
                continue
            if owners.setdefault(colour, name) != name:
                raise ArchiveError(
                    f"{where}: the labels {owners[colour]!r} and {name!r} have one colour {colour}, so that masks "
                    "cannot tell them apart. Give them different colours in CVAT, or export as 'CVAT for images 1.1'."
                )
            table[_code(colour)] = len(names)
            names.append(name)
        for colour in self._nobody:
            table[_code(colour)] = _NOBODY
        return table, tuple(names)


def label_map(rows: list[tuple[str, Colour]], where: str) -> LabelMap:
    """A label map from its lines.

    Raises:
        ArchiveError: no labels, too many, or one name twice.
    """
    names = [name for name, _ in rows]
    if not names or len(names) > MAX_LABELS:
        raise ArchiveError(f"{where} lists {len(names)} labels, 1 to {MAX_LABELS} are expected. Export again.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ArchiveError(f"{where} lists the label {twice[0]!r} twice. Give labels different names in CVAT.")
    return LabelMap(names=tuple(names), colours=tuple(colour for _, colour in rows))


def colour(values: list[str], where: str) -> Colour:
    """Three numbers from 0 to 255.

    Raises:
        ArchiveError: they are something else.
    """
    if len(values) != 3 or not all(v.isascii() and v.isdigit() and len(v) <= 3 and int(v) <= 255 for v in values):
        raise ArchiveError(
            f"{where}: a colour is three numbers from 0 to 255, found {' '.join(values)[:40]!r}. Export again."
        )
    red, green, blue = map(int, values)
    return red, green, blue


def read_colours(
    archive: ZipArchive, member: str, table: NDArray[np.uint8], *, size_hw: Size | None = None
) -> NDArray[np.uint8]:
    """(H, W) uint8 places of the labels of a mask image in RGB.

    Args:
        archive: holds the image.
        member: the PNG.
        table: from `LabelMap.by_colour`.
        size_hw: the size that the mask must have; None before the image is read.

    Raises:
        ArchiveError: no PNG, of another size, or with a colour of no label.
    """
    rgba = _decode(archive, member, "RGBA", size_hw)
    codes = np.ascontiguousarray(rgba).view("<u4")[..., 0]  # four bytes as one number: no copies of a panorama
    places = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), _ROWS):
        np.take(table, codes[top : top + _ROWS] & 0xFFFFFF, out=places[top : top + _ROWS])
    if (places == _UNKNOWN).any():
        y, x = np.unravel_index(np.argmax(places == _UNKNOWN), places.shape)
        raise ArchiveError(
            f"{member}: the pixel {x}, {y} has the colour {tuple(rgba[y, x, :3].tolist())}, which the label map lacks. "
            "Export the archive again: a mask must not be scaled or saved as JPEG."
        )
    return places


def read_numbers(archive: ZipArchive, member: str, count: int, *, size_hw: Size | None = None) -> NDArray[np.uint8]:
    """(H, W) uint8 places of the labels of a mask image that holds them as they are.

    Args:
        archive: holds the image.
        member: the PNG.
        count: number of places there are.
        size_hw: the size that the mask must have; None before the image is read.

    Raises:
        ArchiveError: no PNG of one 8-bit channel, of another size, or with a place that there is not.
    """
    places = _decode(archive, member, "L", size_hw)
    if (largest := int(places.max(initial=0))) >= count:
        raise ArchiveError(f"{member} holds the label {largest}, the label map has {count}. Export the archive again.")
    return places


def present(places: NDArray[np.uint8]) -> list[int]:
    """The places that a mask holds, without nobody's."""
    counts = np.zeros(256, np.int64)
    for row in places:  # row by row: bincount widens its input to 64 bits
        counts += np.bincount(row, minlength=256)
    return [place for place in np.flatnonzero(counts).tolist() if place != _NOBODY]


def read_shapes(
    archive: ZipArchive, member: str | None, table: NDArray[np.uint8], names: tuple[str, ...], size_hw: Size
) -> tuple[MaskShape, ...]:
    """The masks of an image from the colours of `member`; none when there is no such member."""
    return () if member is None else _masks(read_colours(archive, member, table, size_hw=size_hw), names)


def read_numbered_shapes(
    archive: ZipArchive, member: str | None, names: tuple[str, ...], size_hw: Size
) -> tuple[MaskShape, ...]:
    """The masks of an image from the numbers of `member`; none when there is no such member."""
    return () if member is None else _masks(read_numbers(archive, member, len(names), size_hw=size_hw), names)


def _masks(places: NDArray[np.uint8], names: tuple[str, ...]) -> tuple[MaskShape, ...]:
    """One mask for every label of a (H, W) uint8 image of places."""
    shapes = []
    for place in present(places):
        mask = places == place
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        shapes.append(MaskShape(label=names[place], box_xyxy=(x1, y1, x2, y2), mask=mask[y1:y2, x1:x2].copy()))
    return tuple(shapes)


def _decode(archive: ZipArchive, member: str, mode: str, size_hw: Size | None) -> NDArray[np.uint8]:
    data = archive.read(member)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is the size check below
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        width, height = image.size
        problem = None
        if size_hw is not None and (height, width) != size_hw:
            problem = f"{width}x{height} pixels, its image {size_hw[1]}x{size_hw[0]}. A mask has the image's size"
        elif width * height > MAX_PIXELS:
            problem = f"{width}x{height} pixels, at most {MAX_PIXELS} are read"
        elif image.mode not in (("L", "P") if mode == "L" else ("RGB", "RGBA", "P", "L")):
            problem = f"pixels of mode {image.mode}, {mode} is expected"
        # Palette indices are the numbers; as colours the palette's entries count.
        pixels = None if problem else np.asarray(image if mode == "L" else image.convert(mode))
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ArchiveError(f"{member} is not a readable PNG mask ({error}). Export the archive again.") from error
    if pixels is None:
        raise ArchiveError(f"{member} has {problem}: export the archive again.")
    return pixels


def _code(colour: Colour) -> int:
    """The place of a colour in a table: red in the lowest byte, as four bytes of RGBA are read."""
    return colour[0] | colour[1] << 8 | colour[2] << 16
