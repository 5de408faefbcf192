"""Tiles: parts of an image that a network computes one after the other, in bounded memory.

Each is computed with all the pixels around it that reach it, so together they are the logits of the whole image.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sscloud.architecture import REACH, STRIDE


class Compute(Protocol):
    """Runs a network over pixels."""

    def __call__(self, part: NDArray[np.uint8], /, *, wrap: bool) -> NDArray[np.float32]:
        """(h, w, 3) uint8 → (C, h, w) float32; `wrap`: the columns close to a circle."""


MAX_BYTES = 4 << 30
"""Memory for a tile's activations, unless a device has less: 8192x4096 at scale 0.1 takes an eighth of it."""

_COPIES = 6.5
"""Values a pixel and channel of the first level that are alive at once where levels are joined whole: the skip, what
came up, both joined, the output, and what the deeper levels hold. In strips of rows it is less: 3.8 at scale 0.4 in
benchmarks/serving.md."""


def pixels_within(max_bytes: int, *, base_width: int, value_bytes: int) -> int:
    """The pixels of a tile whose activations take that much memory.

    Args:
        max_bytes: the memory.
        base_width: channels of the network's first level.
        value_bytes: of one value.
    """
    return int(max_bytes / (_COPIES * base_width * value_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A part of an image, and what is computed for it. Pixels, half-open."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    padded_rows: tuple[int, int]
    """Within the image."""
    padded_columns: tuple[int, int]
    """May reach beyond the image on both sides, where it goes on around the seam."""

    @property
    def inside(self) -> tuple[slice, slice]:
        """Where the part lies in what is computed."""
        return (
            slice(self.rows[0] - self.padded_rows[0], self.rows[1] - self.padded_rows[0]),
            slice(self.columns[0] - self.padded_columns[0], self.columns[1] - self.padded_columns[0]),
        )

    @property
    def padded_size_hw(self) -> tuple[int, int]:
        """Size of what is computed."""
        return (
            self.padded_rows[1] - self.padded_rows[0],
            self.padded_columns[1] - self.padded_columns[0],
        )


@functools.lru_cache(maxsize=16)
def plan_tiles(size_hw: tuple[int, int], *, max_pixels: int, wrap: bool) -> tuple[Tile, ...]:
    """Cut an image into the tiles that cost the least in all.

    Tiles begin at multiples of `STRIDE`, so that poolings fall as in the whole image. Around the seam that holds only
    where the width is such a multiple too: other widths are cut into rows alone.

    Args:
        size_hw: the network's input.
        max_pixels: of a tile with what is around it; where not even the smallest tiles keep it, the smallest are made.
        wrap: whether the image goes on around its seam.
    """
    height, width = size_hw
    cut_columns = not wrap or width % STRIDE == 0
    best: tuple[tuple[bool, int], int, int] | None = None
    for tall in range(STRIDE, height + STRIDE, STRIDE):
        for wide in range(STRIDE, width + STRIDE, STRIDE) if cut_columns else (width,):
            whole = wide >= width
            pixels = min(tall + 2 * REACH, height) * (width if whole else wide + 2 * REACH)
            count = -(-height // tall) * -(-width // wide)
            cost = (pixels > max_pixels, pixels if pixels > max_pixels else pixels * count)
            if best is None or cost < best[0]:
                best = cost, tall, min(wide, width)
    if best is None:
        raise ValueError(f"An image of {width}x{height} pixels has no tiles.")
    _, tall, wide = best

    def spans(length: int, part: int, *, around: bool) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        for start in range(0, length, part):
            stop = min(start + part, length)
            if part >= length:
                yield (0, length), (0, length)
            elif around:
                yield (start, stop), (start - REACH, -(-stop // STRIDE) * STRIDE + REACH)
            else:
                yield (start, stop), (max(0, start - REACH), min(length, stop + REACH))

    return tuple(
        Tile(rows=rows, columns=columns, padded_rows=padded_rows, padded_columns=padded_columns)
        for rows, padded_rows in spans(height, tall, around=False)
        for columns, padded_columns in spans(width, wide, around=wrap)
    )


def run_in_tiles(
    image: NDArray[np.uint8], tiles: Sequence[Tile], compute: Compute, *, wrap: bool
) -> NDArray[np.float32]:
    """Compute an image's tiles and put them together.

    Args:
        image: (h, w, 3) uint8 RGB.
        tiles: that `plan_tiles` made of it.
        compute: pixels → (C, h, w) float32 logits.
        wrap: whether the image goes on around its seam.

    Returns:
        (C, h, w) float32 logits of the image.
    """
    if len(tiles) == 1:
        return compute(image, wrap=wrap)
    height, width = image.shape[:2]
    result: NDArray[np.float32] | None = None
    # Tiles of one size follow each other: a network may have to be prepared for each size.
    for tile in sorted(tiles, key=lambda tile: tile.padded_size_hw):
        rows = slice(*tile.padded_rows)
        left, right = tile.padded_columns
        whole = (left, right) == (0, width)
        part = image[rows] if whole else image[rows].take(range(left, right), axis=1, mode="wrap")
        logits = compute(part, wrap=wrap and whole)
        if result is None:
            result = np.empty((len(logits), height, width), np.float32)
        result[:, slice(*tile.rows), slice(*tile.columns)] = logits[:, *tile.inside]
    if result is None:
        raise ValueError("There are no tiles.")
    return result
