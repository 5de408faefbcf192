"""The budget of an answer: regions whose crops are too large are split, and only then sent as polygons.

What a mask costs CVAT grows with the pixels of its crop, set or not. A region that sprawls (a frame, a long slanted
bar) has a crop much larger than itself: cut in two where it is thin, its pieces have smaller crops. A region that fills
its crop gains nothing by that; if there are too many such pixels, the largest regions go as polygons.

Everything works on runs, gives the same pieces for the same regions, and ends: pieces, and the runs that cuts go
through, are counted.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sscloud.regions import Region, components

MAX_PIECES = 256
"""Most pieces that cutting adds to an answer."""

_MAX_RUNS = 4_000_000
"""Runs that all cuts of one answer may go through; bounds the time, some 0.2 s a million."""

_CELLS, _SMALLEST_CELL = 32, 16
"""What splitting can reach is estimated in a grid of so many cells each way, of so many pixels at least."""

_WORTH_IT, _LEAST_SAVED = 7 / 8, 1 << 14
"""A region is split only if its pieces could do with less than this share of its crop, and save so many pixels."""

_CUT_COST = 16
"""Pixels of crop that are given for each pixel of the region that a cut does not go through: thin parts first."""

_SMALL_GAIN = 1 / 16
"""Share of the crop; if the best cut gains less (through a ring, say), the region is halved first."""

_SMALL_PIECE = 1 / 64
"""Share of the region; smaller pieces that a cut would leave stay with what they hang on, unless that makes the crops
larger by more than this share."""

_MOST_OF_A_CUT = 64
"""Most pieces that one cut leaves; a line with more of them is not cut along."""

_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetResult:
    """How the regions of an answer are sent."""

    masks: list[Region]
    """Regions and pieces of regions to send as masks, largest first. The pieces of a region are 4-connected, do not
    overlap, and are together the region; they have its label and its confidence."""
    polygons: list[Region]
    """Whole regions to send as polygons, in the order in which they were given."""
    splits: int
    """Regions that are sent in pieces."""


def crop_area(region: Region) -> int:
    """Pixels of a region's box."""
    height, width = region.crop_hw
    return height * width


def within_budget(regions: Sequence[Region], *, max_crop_area: int) -> BudgetResult:
    """Keep the sum of the masks' crops within a budget.

    The piece that wastes most of its crop is cut first, and only as long as the sum is above the budget. What cutting
    cannot bring within it (at most `MAX_PIECES` pieces more) goes as polygons: the regions with the largest crops,
    whole.

    Args:
        regions: regions, each with exactly one 4-connected component.
        max_crop_area: pixels; the most that the crops of all masks have together.
    """
    cutter = _Cutter()
    polygons: set[int] = set()
    least = [cutter.reachable(region) for region in regions]
    while True:
        rest = [number for number in range(len(regions)) if number not in polygons]
        # What no cutting could ever save goes first, or else regions would be split in vain.
        sizes = {number: least[number] for number in rest}
        pieces = [[regions[number]] for number in rest]
        excess = sum(sizes.values()) - max_crop_area
        if excess <= 0:
            pieces, total = cutter.split([regions[number] for number in rest], max_crop_area)
            sizes = {number: sum(map(crop_area, parts)) for number, parts in zip(rest, pieces, strict=True)}
            excess = total - max_crop_area
        if excess <= 0:
            break
        for number in sorted(rest, key=lambda number: (-sizes[number], number)):
            if excess <= 0:
                break
            polygons.add(number)
            excess -= sizes[number]
    return BudgetResult(
        masks=sorted((piece for parts in pieces for piece in parts), key=lambda piece: -piece.area),
        polygons=[regions[number] for number in sorted(polygons)],
        splits=sum(len(parts) > 1 for parts in pieces),
    )


class _Cutter:
    """Cuts regions, and remembers their pieces: trying again with fewer regions costs nothing."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[Region]] = {}
        self._reachable: dict[int, int] = {}
        self._seen: list[Region] = []  # an id stays a region's own as long as the region lives
        self._runs_left = _MAX_RUNS

    def reachable(self, region: Region) -> int:
        """About how many pixels the crops of its pieces have together, if it is split as far as makes sense."""
        found = self._reachable.get(id(region))
        if found is None:
            found = area = crop_area(region)
            useful = min(_WORTH_IT * area, area - _LEAST_SAVED)
            if region.area < useful:
                covered = _covered(region)
                found = covered if covered < useful else area
            self._reachable[id(region)] = found
            self._seen.append(region)
        return found

    def split(self, regions: Sequence[Region], max_crop_area: int) -> tuple[list[list[Region]], int]:
        """The pieces of each region, and the sum of their crops; largest waste first, until the sum is small enough."""
        parts = [{0: region} for region in regions]
        total = sum(map(crop_area, regions))
        count = 0
        queue: list[tuple[int, int, int]] = []

        def add(number: int, key: int, piece: Region) -> None:
            saved = crop_area(piece) - self.reachable(piece)
            if saved > 0:
                heapq.heappush(queue, (-saved, number, key))

        for number, region in enumerate(regions):
            add(number, 0, region)
        while queue and total > max_crop_area:
            _, number, key = heapq.heappop(queue)
            whole = parts[number][key]
            pieces = self._cut(whole)
            added = len(pieces) - 1
            if added == 0 or count + added > MAX_PIECES:
                continue
            count += added
            del parts[number][key]
            total += sum(map(crop_area, pieces)) - crop_area(whole)
            for piece in pieces:
                following = max(parts[number], default=key) + 1
                parts[number][following] = piece
                add(number, following, piece)
        return [list(found.values()) for found in parts], total

    def _cut(self, region: Region) -> list[Region]:
        pieces = self._pieces.get(id(region))
        if pieces is None:
            if len(region.rows) > self._runs_left:
                return [region]
            self._runs_left -= len(region.rows)
            pieces = self._pieces[id(region)] = _cut(region)
        return pieces


def _covered(region: Region) -> int:
    """Pixels of the cells of a grid over the region's box that it has a part in."""
    height, width = region.crop_hw
    left, top, _, _ = region.box_xyxy
    tall, wide = (max(_SMALLEST_CELL, -(-length // _CELLS)) for length in (height, width))
    down, across = -(-height // tall), -(-width // wide)
    line = (region.rows.astype(np.int64) - top) // tall * (across + 1)
    size = down * (across + 1) + 1
    opened = np.bincount(line + (region.starts - left) // wide, minlength=size)
    closed = np.bincount(line + (region.stops - left - 1) // wide + 1, minlength=size)
    covered = np.cumsum(opened - closed)[:-1].reshape(down, across + 1)[:, :-1] > 0
    heights = np.minimum(tall, height - tall * np.arange(down))
    widths = np.minimum(wide, width - wide * np.arange(across))
    return int(heights @ covered @ widths)


class _Profile(NamedTuple):
    """The rows of a region, or its columns: what lies in each of them, relative to its box."""

    first: _Ints
    """The first pixel."""
    last: _Ints
    """The pixel behind the last."""
    pixels: _Ints
    """How many."""

    def crops(self) -> _Ints:
        """Sum of the two boxes' areas after a cut between each two neighbours."""
        before: _Ints = np.maximum.accumulate(self.last) - np.minimum.accumulate(self.first)
        after: _Ints = (np.maximum.accumulate(self.last[::-1]) - np.minimum.accumulate(self.first[::-1]))[::-1]
        length = np.arange(1, len(self.first))
        both: _Ints = before[:-1] * length + after[1:] * (len(self.first) - length)
        return both

    def through(self) -> _Ints:
        """At most so many pixels are cut off their neighbours."""
        return np.minimum(self.pixels[:-1], self.pixels[1:])


def _row_profile(region: Region) -> _Profile:
    begin = np.flatnonzero(np.diff(region.rows, prepend=-1))
    end = np.append(begin[1:], len(region.rows)) - 1
    left = region.box_xyxy[0]
    starts, stops = region.starts.astype(np.int64) - left, region.stops.astype(np.int64) - left
    return _Profile(starts[begin], stops[end], np.add.reduceat(stops - starts, begin))


def _column_profile(region: Region) -> _Profile:
    """As `_row_profile`, without going through pixels.

    A run is covered by two stretches whose length is a power of two; the extremes of such stretches are handed down
    to their halves, and at last to columns.
    """
    height, width = region.crop_hw
    left, top, _, _ = region.box_xyxy
    rows = region.rows.astype(np.int64) - top
    starts, stops = region.starts.astype(np.int64) - left, region.stops.astype(np.int64) - left
    power = np.frexp(stops - starts)[1] - 1  # of two, the largest that fits the run
    order = np.argsort(power, kind="stable")
    highest = int(power.max())
    bounds = np.searchsorted(power[order], np.arange(highest + 2))
    first, last = np.full(width, height), np.zeros(width, np.int64)
    for exponent in range(highest, -1, -1):
        length = 1 << exponent
        if exponent < highest:  # until here for stretches twice as long
            first[length:] = np.minimum(first[length:], first[:-length])
            last[length:] = np.maximum(last[length:], last[:-length])
        part = order[bounds[exponent] : bounds[exponent + 1]]
        for begin in (starts[part], stops[part] - length):
            np.minimum.at(first, begin, rows[part])
            np.maximum.at(last, begin, rows[part] + 1)
    steps = np.bincount(starts, minlength=width + 1) - np.bincount(stops, minlength=width + 1)
    return _Profile(first, last, np.cumsum(steps)[:-1])


def _cut(region: Region) -> list[Region]:
    """Cut a region in two by a line between two rows or columns; the parts of each side that hang together are pieces.

    Returns:
        the pieces, from the top; the region itself if no cut leaves two pieces of some size.
    """
    height, width = region.crop_hw
    rows, columns = _row_profile(region), _column_profile(region)
    best: list[tuple[int, bool, int]] = []
    for profile, across in ((rows, True), (columns, False)):
        if len(profile.first) > 1:
            cost = profile.crops() + _CUT_COST * profile.through()
            at = int(cost.argmin())
            best.append((int(cost[at]), across, at + 1))
    cost_of_best, across, line = min(best)
    if cost_of_best > (1 - _SMALL_GAIN) * height * width:
        # No cut makes the crops smaller yet: halve the longer side, near its middle, where it is thinnest.
        across = height >= width
        through = (rows if across else columns).through()
        third = len(through) // 3
        line = third + int(through[third : len(through) - third].argmin()) + 1
    left, top, _, _ = region.box_xyxy
    return _pieces(region, across=across, line=line + (top if across else left))


def _pieces(region: Region, *, across: bool, line: int) -> list[Region]:
    """The pieces of a region that is cut above row `line` (across), or to the left of column `line`."""
    rows, starts, stops = region.rows, region.starts, region.stops
    if across:
        second = rows >= line
        here = np.flatnonzero(rows == line - 1)
        there = np.flatnonzero(rows == line)
        one, two = _overlaps(starts[here], stops[here], starts[there], stops[there])
        one, two = here[one], there[two]
    else:
        divided = np.flatnonzero((starts < line) & (stops > line))
        rows, starts, stops = (np.insert(values, divided, values[divided]) for values in (rows, starts, stops))
        one = divided + np.arange(len(divided))
        two = one + 1
        stops[one] = starts[two] = line
        second = starts >= line
    part = components(rows, starts, stops, labels=second.view(np.uint8))
    found = _regions(region, part, rows, starts, stops)
    group = _together(region, found, part[one], part[two])
    count = int(group.max()) + 1
    if count == 1 or count > _MOST_OF_A_CUT:
        return [region]
    return found if count == len(found) else _regions(region, group[part], rows, starts, stops)


def _regions(
    whole: Region,
    part: _Ints,
    rows: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
) -> list[Region]:
    """The parts 0, 1, … of a region as regions; runs of one part that a cut divided are joined again."""
    order = np.argsort(part, kind="stable")
    part, rows, starts, stops = part[order], rows[order], starts[order], stops[order]
    apart = (part[1:] != part[:-1]) | (rows[1:] != rows[:-1]) | (starts[1:] != stops[:-1])
    begins, ends = np.append(True, apart), np.append(apart, True)
    part, rows, starts, stops = part[begins], rows[begins], starts[begins], stops[ends]
    bounds = np.searchsorted(part, np.arange(int(part[-1]) + 2))
    lefts, rights = np.minimum.reduceat(starts, bounds[:-1]), np.maximum.reduceat(stops, bounds[:-1])
    areas = np.add.reduceat(stops.astype(np.int64) - starts, bounds[:-1])
    return [
        Region(
            label_id=whole.label_id,
            box_xyxy=(int(left), int(rows[begin]), int(right), int(rows[end - 1]) + 1),
            rows=rows[begin:end],
            starts=starts[begin:end],
            stops=stops[begin:end],
            confidence=whole.confidence,
            area=int(area),
        )
        for begin, end, left, right, area in zip(bounds[:-1], bounds[1:], lefts, rights, areas, strict=True)
    ]


def _together(whole: Region, parts: Sequence[Region], one: _Ints, two: _Ints) -> _Ints:
    """Leave small parts with what they hang on, unless their crops are much smaller apart.

    Args:
        whole: what was cut.
        parts: what it fell into.
        one: parts on one side of the cut, and
        two: parts on the other, which touch them.

    Returns:
        (parts,) number of the piece that each part belongs to, from 0, in the order of their first parts.
    """
    areas = np.array([part.area for part in parts])
    touching = np.unique(np.concatenate([one * len(parts) + two, two * len(parts) + one]))
    here, there = np.divmod(touching, len(parts))
    small = areas[here] < _SMALL_PIECE * whole.area
    here, there = here[small], there[small]
    order = np.lexsort((-areas[there], here))
    here, there = here[order], there[order]
    first = np.append(True, here[1:] != here[:-1])[: len(here)]
    into = list(range(len(parts)))

    def root(part: int) -> int:
        while into[part] != part:
            into[part] = part = into[into[part]]
        return part

    for ours, theirs in zip(here[first].tolist(), there[first].tolist(), strict=True):
        box, other = parts[ours].box_xyxy, parts[theirs].box_xyxy
        width = max(box[2], other[2]) - min(box[0], other[0])
        height = max(box[3], other[3]) - min(box[1], other[1])
        saved = width * height - crop_area(parts[ours]) - crop_area(parts[theirs])
        if saved < _SMALL_PIECE * crop_area(whole):
            a, b = sorted((root(ours), root(theirs)))
            into[b] = a
    _, group = np.unique([root(part) for part in range(len(parts))], return_inverse=True)
    return group


def _overlaps(
    upper_starts: NDArray[np.int32],
    upper_stops: NDArray[np.int32],
    lower_starts: NDArray[np.int32],
    lower_stops: NDArray[np.int32],
) -> tuple[_Ints, _Ints]:
    """Pairs of runs of two neighbouring rows that touch."""
    begin = np.searchsorted(lower_stops, upper_starts, side="right")
    counts = np.maximum(np.searchsorted(lower_starts, upper_stops, side="left") - begin, 0)
    upper = np.repeat(np.arange(len(counts)), counts)
    return upper, np.arange(len(upper)) + np.repeat(begin - np.cumsum(counts) + counts, counts)
