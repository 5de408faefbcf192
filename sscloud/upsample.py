"""Logits at model scale → class map at full size, exact, in bounded memory; and what else is read between the centres.

The class map is that of `F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)`, with `wrap` of
the logits padded by one wrapped column on each side. Full-size logits never exist, and few pixels are computed at all:

- The pixels between four neighbouring centres of the model's grid form a cell. Bilinear weights are not negative and
  add up to one, so where one class is the best at all four corners it is the best in the whole cell.
- In the other cells, the mixed ones, a class whose largest corner is below another class's smallest corner wins
  nowhere. Two or three candidates usually remain, and only these are interpolated.

Where two interpolated logits are equal up to single precision's rounding, either may win; everywhere else the result is
the same to the pixel.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

_BAND_BYTES = 8 << 20
"""Logits of a band of the model's rows; the bands are worked on one after the other, which bounds the memory."""
_CORNER_BYTES = 4 << 20
"""Logits of mixed cells' corners that are compared together."""
_BLOCK_PIXELS = 1 << 15
"""Pixels of mixed cells that are computed together: as many as stay in a processor's cache."""
_STRIP_BYTES = 1 << 20
"""Part of an array of full size that is computed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """How the pixels of one axis lie between the model's centres: `source + 1` cells, the outer two of half a size.

    Cell j lies between the centres j - 1 and j. In the outer two cells both are the outermost centre or, on an axis
    that wraps, the last and the first one.
    """

    first: NDArray[np.int64]
    """(cells,) centre on the cell's left or upper side."""
    second: NDArray[np.int64]
    """(cells,) centre on the other side; the same as `first` where all pixels of the cell lie on that."""
    start: NDArray[np.int64]
    """(cells + 1,) first pixel of each cell; the last entry is the number of pixels."""
    cell: NDArray[np.int64]
    """(pixels,) the cell of each pixel."""
    fraction: NDArray[np.float32]
    """(pixels,) weight of `second`."""

    @classmethod
    def of(cls, source: int, target: int, *, wrap: bool) -> Self:
        """`target` pixels over `source` centres (half-pixel centres, as align_corners=False)."""
        number = np.arange(source + 1)
        if wrap:
            # Exact, so that rolling the centres rolls the weights.
            whole, rest = np.divmod((2 * np.arange(target) + 1) * source - target, 2 * target)
            cell, fraction = whole + 1, (rest / (2 * target)).astype(np.float32)
            first, second = (number - 1) % source, number % source
        else:
            # As F.interpolate: the scale in single precision, and of the position one rounding (multiply-add).
            scale = np.float64(np.float32(source) / np.float32(target))
            position = ((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32)
            cell = np.floor(position).astype(np.int64) + 1
            fraction = np.where((cell > 0) & (cell < source), position - np.floor(position), np.float32(0))
            first, second = (number - 1).clip(min=0), number.clip(max=source - 1)
        between = np.zeros(source + 1, bool)
        between[cell[fraction > 0]] = True
        return cls(
            first=first,
            second=np.where(between, second, first),
            start=np.searchsorted(cell, np.arange(source + 2)),
            cell=cell,
            fraction=fraction,
        )

    @property
    def counts(self) -> NDArray[np.int64]:
        """(cells,) pixels of each cell."""
        return np.diff(self.start)

    def padded(self) -> NDArray[np.int64]:
        """(longest, cells) pixels of each cell, all as many as the longest one has: the last one of a cell repeats."""
        steps = np.arange(self.counts.max())[:, None]
        pixels = self.start[:-1] + np.minimum(steps, np.maximum(self.counts - 1, 0))
        return np.minimum(pixels, len(self.cell) - 1)  # behind the last pixel there may be cells without any


def class_map(logits: NDArray[np.float32], size_hw: tuple[int, int], *, wrap: bool) -> NDArray[np.uint8]:
    """Interpolate logits to full size and take the best channel of each pixel.

    It takes one thread: more would gain little, and on a busy machine waiting for each other costs many times that.

    Args:
        logits: (C, h, w), C at most 256, in any layout. Near a NaN any channel may come out, and no error.
        size_hw: full size.
        wrap: the columns close to a full turn.

    Returns:
        (H, W) channel of the largest interpolated logit.
    """
    rows = _Axis.of(logits.shape[1], size_hw[0], wrap=False)
    columns = _Axis.of(logits.shape[2], size_hw[1], wrap=wrap)
    labels = np.empty((len(rows.cell), len(columns.cell)), np.uint8)
    fill = _Mixed.of(rows, columns, labels)
    step = max(1, _BAND_BYTES // (4 * logits.shape[0] * logits.shape[2]))
    for start in range(0, len(rows.first), step):
        stop = min(start + step, len(rows.first))
        cells = slice(start, stop)
        top, bottom = rows.first[cells], rows.second[cells]
        above = top[0]
        band = np.ascontiguousarray(logits[:, above : bottom[-1] + 1])
        best = _best_channel(band)
        tl, tr, bl, br = (
            best[row - above][:, column] for row in (top, bottom) for column in (columns.first, columns.second)
        )
        labels[rows.start[start] : rows.start[stop]] = np.repeat(tl[:, columns.cell], rows.counts[cells], axis=0)
        mixed = (tl != tr) | (tl != bl) | (tl != br)
        mixed &= (rows.counts[cells] > 0)[:, None] & (columns.counts > 0)
        y, x = np.nonzero(mixed)
        fill(band, above, start + y, x)
    return labels


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, h, w) logits → probabilities; NaN where a logit is infinite or no number."""
    with np.errstate(invalid="ignore"):
        result: NDArray[np.float32] = logits - logits.max(axis=0)
    np.exp(result, out=result)
    result /= result.sum(axis=0)
    return result


def top_probability(logits: NDArray[np.float32], *, temperature: float = 1.0) -> NDArray[np.float32]:
    """The largest softmax at model scale: (C, h, w) → (h, w).

    Args:
        logits: of the network.
        temperature: that they are divided by first (Guo et al., "On Calibration of Modern Neural Networks", 2017).
    """
    result = np.empty(logits.shape[1:], np.float32)
    step = max(1, _BAND_BYTES // (4 * logits.shape[0] * logits.shape[2]))
    for start in range(0, len(result), step):
        part = logits[:, start : start + step]
        band = part - part.max(0)
        if temperature != 1:
            band /= np.float32(temperature)
        result[start : start + step] = 1 / np.exp(band, out=band).sum(0)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolated:
    """Something known at model scale and read at full size, by bilinear interpolation as of `class_map`."""

    values: NDArray[np.float32]
    """(h, w)"""
    size_hw: tuple[int, int]
    """Full size."""
    wrap: bool
    """The columns close to a full turn."""

    def full(self) -> NDArray[np.float32]:
        """(H, W) values of all pixels."""
        rows, columns = self._axes()
        across = _between(
            self.values[:, columns.first[columns.cell]], self.values[:, columns.second[columns.cell]], columns.fraction
        )
        result = np.empty(self.size_hw, np.float32)
        step = max(1, _STRIP_BYTES // (4 * self.size_hw[1]))
        for start in range(0, self.size_hw[0], step):
            part = slice(start, start + step)
            cell = rows.cell[part]
            result[part] = _between(across[rows.first[cell]], across[rows.second[cell]], rows.fraction[part, None])
        return result

    def at_least(self, threshold: float) -> NDArray[np.bool_]:
        """(H, W) whether a pixel's value reaches the threshold."""
        # The same question as which of two classes is the better one; the first one where they are equal.
        pair = np.stack([self.values, np.full_like(self.values, threshold)])
        below = class_map(pair, self.size_hw, wrap=self.wrap)
        return np.equal(below, 0, out=below.view(np.bool_))

    def run_sums(
        self, rows: NDArray[np.integer], starts: NDArray[np.integer], stops: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Sums over runs of pixels, without an array of full size: one call for all runs is the fastest.

        Within a cell, the sum from its first pixel up to a pixel is a mean of the two centres' values weighted with
        sums of fractions; whole cells are summed up once per row of the model's grid. A full-size row is a mean of two
        of these rows.

        Args:
            rows: (n,) row of each run.
            starts: (n,) its first column.
            stops: (n,) the column behind its last one.

        Returns:
            (n,) sum of the values of each run.
        """
        vertical, horizontal = self._axes()
        values = self.values.astype(np.float64)
        first, second = values[:, horizontal.first], values[:, horizontal.second]
        # Sum of the fractions of a cell's pixels that lie before a pixel; before the end: those of the last cell.
        running = np.concatenate([[0], np.cumsum(horizontal.fraction, dtype=np.float64)])
        cell = np.append(horizontal.cell, len(horizontal.first) - 1)
        of_second = running - running[horizontal.start[cell]]
        of_first = np.arange(self.size_hw[1] + 1) - horizontal.start[cell] - of_second
        whole_second = running[horizontal.start[1:]] - running[horizontal.start[:-1]]
        whole = np.cumsum(first * (horizontal.counts - whole_second) + second * whole_second, axis=1)
        before = np.concatenate([np.zeros((len(values), 1)), whole[:, :-1]], axis=1)

        def up_to(row: NDArray[np.int64], column: NDArray[np.integer]) -> NDArray[np.float64]:
            at = row, cell[column]
            sums: NDArray[np.float64] = before[at] + of_first[column] * first[at] + of_second[column] * second[at]
            return sums

        between = vertical.cell[rows]
        upper, lower = (
            up_to(row, stops) - up_to(row, starts) for row in (vertical.first[between], vertical.second[between])
        )
        weight = vertical.fraction[rows].astype(np.float64)
        sums: NDArray[np.float64] = (1 - weight) * upper + weight * lower
        return sums

    def _axes(self) -> tuple[_Axis, _Axis]:
        height, width = self.values.shape
        return _Axis.of(height, self.size_hw[0], wrap=False), _Axis.of(width, self.size_hw[1], wrap=self.wrap)


def _best_channel(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(C, h, w) → (h, w), the first one of equals. As argmax, which is slow along the first axis."""
    largest = logits[0].copy()
    best = np.zeros(largest.shape, np.uint8)
    for channel in range(1, len(logits)):
        better = logits[channel] > largest
        np.maximum(best, better * np.uint8(channel), out=best)
        np.maximum(largest, logits[channel], out=largest)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixed:
    """Writes the best channel of the pixels of mixed cells. Tables by cell, padded to the longest one."""

    labels: NDArray[np.uint8]
    """(H * W,) written to."""
    top: NDArray[np.int64]
    """(rows of cells,) the model's row on a cell's upper side."""
    bottom: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    y: NDArray[np.int64]
    """(longest, rows of cells) full-size rows, as offsets into `labels`."""
    x: NDArray[np.int64]
    """(longest, columns of cells)"""
    down: NDArray[np.float32]
    """Like `y`: weight of the lower centres."""
    across: NDArray[np.float32]
    """Like `x`: weight of the right centres."""

    @classmethod
    def of(cls, rows: _Axis, columns: _Axis, labels: NDArray[np.uint8]) -> Self:
        """The tables of two axes; `labels` is (H, W), contiguous."""
        y, x = rows.padded(), columns.padded()
        return cls(
            labels=labels.reshape(-1),
            top=rows.first,
            bottom=rows.second,
            left=columns.first,
            right=columns.second,
            y=y * labels.shape[1],
            x=x,
            down=rows.fraction[y],
            across=columns.fraction[x],
        )

    def __call__(self, logits: NDArray[np.float32], above: int, y: NDArray[np.int64], x: NDArray[np.int64]) -> None:
        """Args: logits (C, rows, w) of the model's rows from `above` on; row and column (n,) of the cells."""
        channels, _, width = logits.shape
        flat = logits.reshape(channels, -1)
        at_once = max(1, _CORNER_BYTES // (4 * 4 * channels))
        per_block = max(1, _BLOCK_PIXELS // (len(self.y) * len(self.x)))
        for start in range(0, len(y), at_once):
            some = slice(start, start + at_once)
            corners = [
                flat.take((row[y[some]] - above) * width + column[x[some]], axis=1)
                for row in (self.top, self.bottom)
                for column in (self.left, self.right)
            ]
            candidates = _candidates(corners)
            counts = np.count_nonzero(candidates, axis=0)
            order = np.argsort(-counts)  # cells with the same number of candidates together
            counts = counts[order]
            # Their channels, ascending, cell after cell; and where a cell's begin.
            listed = np.nonzero(candidates[:, order].T)[1]
            begin = np.cumsum(counts) - counts
            for block in range(0, len(order), per_block):
                part = slice(block, block + per_block)
                at = order[part]
                self._block(corners, at, y[some][at], x[some][at], listed, begin[part], counts[part])

    def _block(
        self,
        corners: list[NDArray[np.float32]],
        at: NDArray[np.int64],
        y: NDArray[np.int64],
        x: NDArray[np.int64],
        listed: NDArray[np.int64],
        begin: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """Cells with more candidates first; `at` says which of the corners' columns they are."""
        lower, right = self.down[:, y], self.across[:, x]
        upper, left = 1 - lower, 1 - right
        # The cells are the last axis: long rows of numbers, of which a processor takes many at a time.
        shape = len(self.y), len(self.x), len(at)
        largest = np.empty(shape, np.float32)
        best = np.zeros(shape, np.uint8)  # NaN leaves cells without candidates
        buffers = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for turn in range(counts[0]):
            n = np.count_nonzero(counts > turn)
            channel = listed[begin[:n] + turn]
            tl, tr, bl, br = (corner[channel, at[:n]] for corner in corners)
            top = left[:, :n] * tl + right[:, :n] * tr
            bottom = left[:, :n] * bl + right[:, :n] * br
            value, part = buffers[0][..., :n], buffers[1][..., :n]
            np.multiply(upper[:, None, :n], top, out=value)
            np.multiply(lower[:, None, :n], bottom, out=part)
            np.add(value, part, out=value if turn else largest[..., :n])
            if not turn:
                best[..., :n] = channel
                continue
            # A later channel has the larger number: the best one is the largest of those that were better.
            better = value > largest[..., :n]
            np.maximum(best[..., :n], better * channel.astype(np.uint8), out=best[..., :n])
            np.maximum(largest[..., :n], value, out=largest[..., :n])
        self.labels[self.y[:, y][:, None] + self.x[:, x]] = best


def _candidates(corners: list[NDArray[np.float32]]) -> NDArray[np.bool_]:
    """Four times (C, n) → (C, n): whether a channel can be the best one anywhere between the four."""
    tl, tr, bl, br = corners
    smallest = np.minimum(np.minimum(tl, tr), np.minimum(bl, br)).max(0)
    found: NDArray[np.bool_] = np.maximum(np.maximum(tl, tr), np.maximum(bl, br)) >= smallest
    return found


def _between(
    first: NDArray[np.float32], second: NDArray[np.float32], fraction: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The mean of two arrays, weighted as F.interpolate does it."""
    result = first * (1 - fraction)
    result += second * fraction
    return result
