"""Binary masks as run lengths: CVAT's rows, COCO's columns.

Both list the lengths of alternating runs of 0 and 1, the first of zeros. CVAT's run along the rows of the mask's box;
COCO's run down the columns of the whole image, as numbers or compressed into text, six bits a character. Nothing is
handed to pycocotools' decoder: it trusts sizes and sums, and fills a whole image for every shape.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

_FIRST_CHARACTER = 48
_MORE = 0x20
_SIGN = 0x10
_MAX_CHARACTERS = 7  # of one number: 35 bits


def decode_rows(counts: NDArray[np.int64], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """CVAT's runs along rows → (H, W) bool.

    Raises:
        ValueError: a negative run, or runs that do not add up to the mask's pixels.
    """
    check_rows(counts, size_hw)
    height, width = size_hw
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width)


def check_rows(counts: NDArray[np.int64], size_hw: tuple[int, int]) -> None:
    """Refuse what `decode_rows` cannot unfold.

    Raises:
        ValueError: a negative run, or runs that do not add up to the mask's pixels.
    """
    height, width = size_hw
    _check(counts, height * width, f"a mask of {width}x{height}")


def decode_columns(
    counts: NDArray[np.int64], size_hw: tuple[int, int]
) -> tuple[tuple[int, int, int, int], NDArray[np.bool_]]:
    """COCO's runs down the columns of an image → the box of the ones, half-open x1, y1, x2, y2, and its pixels.

    Only the columns that hold ones are unfolded. Without a one, the box is empty and lies at the origin.

    Raises:
        ValueError: a negative run, or runs that do not add up to the image's pixels.
    """
    height, width = size_hw
    _check(counts, height * width, f"an image of {width}x{height}")
    ends = np.cumsum(counts)[1::2]
    lengths = counts[1::2]
    ends, lengths = ends[lengths > 0], lengths[lengths > 0]
    if not len(ends):
        return (0, 0, 0, 0), np.zeros((0, 0), np.bool_)
    starts = ends - lengths
    first, last = int(starts[0]) // height, int(ends[-1] - 1) // height
    top, bottom = starts % height, (ends - 1) % height
    wraps = bool((starts // height != (ends - 1) // height).any())  # a run goes on in the next column
    y1, y2 = (0, height) if wraps else (int(top.min()), int(bottom.max()) + 1)
    edges = np.stack([starts, ends], axis=1).ravel() - first * height
    runs = np.diff(edges, prepend=0, append=(last + 1 - first) * height)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(-1, height)
    if wraps:
        rows = np.flatnonzero(columns.any(axis=0))
        y1, y2 = int(rows[0]), int(rows[-1]) + 1
    turned = cv2.transpose(columns[:, y1:y2].view(np.uint8))  # NumPy takes four times as long
    return (first, y1, last + 1, y2), turned.view(np.bool_)


def decompress(text: bytes) -> NDArray[np.int64]:
    """COCO's compressed run lengths → run lengths.

    A number is written in groups of five bits, the lowest first, each in a character whose sixth bit says that more
    follow; from the fourth on, the difference from the number two places before is written.

    Raises:
        ValueError: other characters, a number without an end or of more than 35 bits.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST_CHARACTER
    if not len(codes):
        return np.zeros(0, np.int64)
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("compressed run lengths hold a character that they cannot hold")
    is_last = (codes & _MORE) == 0
    if not is_last[-1]:
        raise ValueError("compressed run lengths end in the middle of a number")
    starts = np.concatenate(([0], np.flatnonzero(is_last)[:-1] + 1))
    sizes = np.diff(starts, append=len(codes))
    if sizes.max() > _MAX_CHARACTERS:
        raise ValueError("compressed run lengths hold a number of more than 35 bits")
    place = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[is_last] & _SIGN) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * sizes), 0)
    # Numbers 1, 3, 5, … and 2, 4, 6, … are two chains of differences; number 0 stands alone.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def integers(values: Sequence[object]) -> NDArray[np.int64]:
    """(N,) int64 of numbers, or of their texts, that are whole.

    Raises:
        ValueError: something else among them.
    """
    try:
        numbers = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("run lengths are whole numbers, and others are among them") from error
    if numbers.ndim != 1 or not (np.abs(numbers) < 1 << 53).all() or (numbers != np.floor(numbers)).any():
        raise ValueError("run lengths are whole numbers, and others are among them")
    return numbers.astype(np.int64)


def _check(counts: NDArray[np.int64], pixels: int, what: str) -> None:
    if len(counts) and (counts.min() < 0 or counts.max() > pixels):
        raise ValueError(f"a run of {counts.min() if counts.min() < 0 else counts.max()} pixels is not possible")
    total = int(counts.sum())
    if total != pixels:
        raise ValueError(f"run lengths add up to {total} pixels, {what} has {pixels}")
