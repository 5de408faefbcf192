"""Tiles: parts of an image that a network computes one after the other, in bounded memory.

Where a logit depends on pixels nearby only, each tile is computed with all the pixels around it that reach it, so
together they are the logits of the whole image (`plan_tiles`, `run_in_tiles`). Where it depends on the whole image,
tiles can but come close: they overlap, and their probabilities are blended (`plan_blended`, `run_blended`).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sscloud.architecture import REACH, STRIDE
from sscloud.upsample import softmax


class Compute(Protocol):
    """Runs a network over pixels."""

    def __call__(self, part: NDArray[np.uint8], /, *, wrap: bool) -> NDArray[np.float32]:
        """(h, w, 3) uint8 → (C, h, w) float32; `wrap`: the columns close to a circle."""


_CELL = 32
"""Pixels. Blended tiles have sides of a multiple of it and begin at one where they can, so that a network of that
stride has nothing to make up and pools the same pixels as in the whole image."""

_SHORTEST = 64
"""Pixels of the shortest side of a blended tile, a multiple of `_CELL`, unless the image's is shorter."""

_OVERLAP = 4
"""Neighbouring blended tiles share at least this part, a fourth, of their length."""

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
    """May reach beyond the image on both sides, where it goes on around the seam. So may `columns` of blended tiles,
    which have nothing around them."""

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
        logits = _compute(image, tile, compute, wrap=wrap)
        if result is None:
            result = np.empty((len(logits), height, width), np.float32)
        result[:, slice(*tile.rows), slice(*tile.columns)] = logits[:, *tile.inside]
    if result is None:
        raise ValueError("There are no tiles.")
    return result


@functools.lru_cache(maxsize=16)
def plan_blended(size_hw: tuple[int, int], *, max_pixels: int, wrap: bool) -> tuple[Tile, ...]:
    """Cut an image into overlapping tiles.

    A network sees no more than its tile, so tiles are chosen whose shorter side is the longest; of those the cheapest,
    and of those the longest.
    They are spread evenly, around the seam where the image goes on there: wherever it is, no edge is there.

    Args:
        size_hw: the network's input.
        max_pixels: of a tile; where not even the smallest tiles keep it, the smallest are made.
        wrap: whether the image goes on around its seam.
    """
    height, width = size_hw
    if height * width <= max_pixels:
        tall, wide = height, width
    else:
        sizes = [(tall, wide) for tall in _sides(height) for wide in _sides(width) if tall * wide <= max_pixels]
        tall, wide = min(
            sizes or [(min(_SHORTEST, height), min(_SHORTEST, width))],
            key=lambda size: (
                -min(size),
                math.prod(size) * _count(height, size[0], around=False) * _count(width, size[1], around=wrap),
                -max(size),
            ),
        )
    return tuple(
        Tile(rows=rows, columns=columns, padded_rows=rows, padded_columns=columns)
        for rows in _spread(height, tall, around=False)
        for columns in _spread(width, wide, around=wrap)
    )


def run_blended(
    image: NDArray[np.uint8], tiles: Sequence[Tile], compute: Compute, *, wrap: bool, temperature: float = 1.0
) -> NDArray[np.float32]:
    """Compute an image's overlapping tiles and blend their probabilities.

    A tile counts less the nearer its edge: its weight falls over `_OVERLAP` as a raised cosine. Logits of several tiles
    must not be averaged themselves: they hold up to a constant, which differs from tile to tile.

    Args:
        image: (h, w, 3) uint8 RGB.
        tiles: that `plan_blended` made of it.
        compute: pixels → (C, h, w) float32 logits.
        wrap: whether the image goes on around its seam.
        temperature: that logits are divided by before they become probabilities.

    Returns:
        (C, h, w) float32 logits of the image: of one tile its own, of several those that become the mean probabilities
        when they are divided by the temperature.
    """
    if len(tiles) == 1:
        return compute(image, wrap=wrap)
    height, width = image.shape[:2]
    total: NDArray[np.float32] = np.zeros((height, width), np.float32)
    blended: NDArray[np.float32] | None = None
    for tile in tiles:
        probabilities = softmax(_compute(image, tile, compute, wrap=wrap) / np.float32(temperature))
        tall, wide = tile.padded_size_hw
        weights = np.outer(_window(tall, cut=tall < height), _window(wide, cut=wide < width))
        probabilities *= weights
        if blended is None:
            blended = np.zeros((len(probabilities), height, width), np.float32)
        rows = slice(*tile.rows)
        for columns, inside in _unrolled(tile.columns, width):
            total[rows, columns] += weights[:, inside]
            blended[:, rows, columns] += probabilities[:, :, inside]
    if blended is None:
        raise ValueError("There are no tiles.")
    blended /= total
    np.maximum(blended, np.finfo(np.float32).tiny, out=blended)  # of a probability of zero there is no logarithm
    np.log(blended, out=blended)
    blended *= np.float32(temperature)
    return blended


def _compute(image: NDArray[np.uint8], tile: Tile, compute: Compute, *, wrap: bool) -> NDArray[np.float32]:
    rows = slice(*tile.padded_rows)
    left, right = tile.padded_columns
    whole = (left, right) == (0, image.shape[1])
    part = image[rows] if whole else image[rows].take(range(left, right), axis=1, mode="wrap")
    return compute(part, wrap=wrap and whole)


def _sides(length: int) -> list[int]:
    """Lengths that a blended tile may have along an image's side."""
    return [*range(min(_SHORTEST, length), length, _CELL), length]


def _count(length: int, part: int, *, around: bool) -> int:
    """Tiles of `part` that cover `length`, each overlapping the next by at least a part of `_OVERLAP`."""
    if part >= length:
        return 1
    step = (part - -(-part // _OVERLAP)) // _CELL * _CELL
    return -(-length // step) if around else -(-(length - part) // step) + 1


def _spread(length: int, part: int, *, around: bool) -> list[tuple[int, int]]:
    """Where `_count` tiles lie, evenly up to `_CELL`."""
    count = _count(length, part, around=around)
    if around:  # the last one overlaps the first
        cell = _CELL if length % _CELL == 0 else 1
        starts = [length // cell * i // count * cell for i in range(count)]
    else:  # the last one ends where the image does
        free = length - part
        starts = [*(-(-free * i // ((count - 1) * _CELL)) * _CELL for i in range(count - 1)), free]
    return [(start, start + part) for start in starts]


def _window(length: int, *, cut: bool) -> NDArray[np.float32]:
    """(length,) weights of a tile's pixels along one side, above 0 and at most 1."""
    weights: NDArray[np.float32] = np.ones(length, np.float32)
    if cut:
        ramp = max(1, length // _OVERLAP)
        rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)
        weights[:ramp] = rise
        weights[-ramp:] = rise[::-1]
    return weights


def _unrolled(columns: tuple[int, int], width: int) -> Iterator[tuple[slice, slice]]:
    """Columns that may go on around the seam, as columns of the image and where they lie in the tile."""
    start, stop = columns
    yield slice(start, min(stop, width)), slice(0, min(stop, width) - start)
    if stop > width:
        yield slice(0, stop - width), slice(width - start, stop - start)
