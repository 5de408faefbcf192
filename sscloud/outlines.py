"""Regions → outlines: the polygons of regions, on pixel edges, with holes, exact or simplified.

Pixel (x, y) is the square [x, x+1] x [y, y+1]. Holes are joined to the outline by bridges of no width (keyholes),
because a CVAT polygon is one ring. Filled by pycocotools, as CVAT fills polygons, an exact outline gives back every
pixel of its region.

Simplified outlines of neighbours still fit each other without a gap or an overlap. The boundary between two regions is
cut into arcs at the points where a third region, the void or the edge of the image joins, and each arc is simplified
once, for both sides (Douglas and Peucker, "Algorithms for the reduction of the number of points required to represent
a digitized line or its caricature", 1973). Where simplified arcs would cross, touch or change places, they keep more
of their points until they do not: no region is ever lost, turned inside out or covered by its neighbour.

Everything works on the regions' runs, for all regions at once; no array ever has the size of the image.
"""

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sscloud.regions import Region

log = logging.getLogger(__name__)

MOST_SIMPLIFIED = 1_000_000
"""Corners of all outlines together that are simplified; more of them stay exact, which bounds the time to seconds."""

_CELL = 16
"""Pixels; chords are looked for near each other in squares of this size."""

_VOID, _OUTSIDE = -1, -2
"""Owners of pixels that belong to no region: within the image, and beyond its edge."""

_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]


def outline(region: Region) -> list[int]:
    """The exact outline of one region as a CVAT polygon.

    Returns:
        flat [x, y, …] on pixel edges, at least 8 numbers.

    Raises:
        ValueError: the region is empty or has several components.
    """
    _, _, right, bottom = region.box_xyxy
    flat: list[int] = outlines([region], (bottom, right))[0].tolist()
    return flat


def outlines(regions: Sequence[Region], size_hw: tuple[int, int], *, tolerance: float = 0.0) -> list[NDArray[np.int32]]:
    """The outlines of an image's regions as CVAT polygons.

    Args:
        regions: regions that do not overlap, each with exactly one 4-connected component; they may have holes.
        size_hw: size of the image.
        tolerance: pixels; how far an outline may be from the exact one, and the exact one from it. 0 keeps every
            corner. The edge of the image stays straight, and the points where three regions meet stay where they are.
            Above `MOST_SIMPLIFIED` corners it is taken for 0.

    Returns:
        for each region (2n,) flat x, y, … on pixel edges, outer rings clockwise as seen on the screen and holes the
        other way; n is at least 4 with tolerance 0, else at least 3.

    Raises:
        ValueError: a region is empty or has several components, or the tolerance is negative or not finite.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"The tolerance is {tolerance}; it is 0 or more pixels.")
    if not regions:
        return []
    grid = _Grid.of(regions, size_hw)
    corners = _corners(grid)
    rings = _rings(corners, len(regions))
    bridges = _bridges(grid, corners, rings)
    if tolerance > 0 and len(corners.x) > MOST_SIMPLIFIED:
        log.warning("Outlines of %d corners are left exact; at most %d are simplified", len(corners.x), MOST_SIMPLIFIED)
    if tolerance == 0 or len(corners.x) > MOST_SIMPLIFIED:
        path = _path(grid, corners, rings, bridges, None)
        kept = None
    else:
        fixed = _fixed(grid, corners, rings, bridges)
        path = _path(grid, corners, rings, bridges, fixed)
        kept = _simplified(path, fixed, grid, tolerance)
    return _joined(path, rings, bridges, kept, len(regions))


def points_json(polygons: Sequence[NDArray[np.int32]]) -> list[str]:
    """Each polygon's numbers as JSON without brackets, `"0,12,3"`, without making a Python integer a number."""
    if not polygons:
        return []
    largest = max(int(polygon.max(initial=0)) for polygon in polygons)
    table = np.array([f"{number},".encode() for number in range(largest + 1)])
    ends = np.array([f"{number}\n".encode() for number in range(largest + 1)])
    text = table[np.concatenate(polygons)]
    lengths = np.array([len(polygon) for polygon in polygons])
    last = np.cumsum(lengths)[lengths > 0] - 1
    text[last] = ends[np.concatenate(polygons)[last]]
    lines = iter(text.tobytes().translate(None, b"\0").decode("ascii").split("\n"))
    return [next(lines) if len(polygon) else "" for polygon in polygons]


class _Grid(NamedTuple):
    """The runs of all regions, one region after the other, on the grid of pixel edges."""

    region: _Ints
    """(n,) number of the run's region."""
    row: _Ints
    start: _Ints
    stop: _Ints
    lines: int
    """Horizontal grid lines: rows + 1."""
    columns: int
    """Vertical grid lines: columns of pixels + 1."""

    @staticmethod
    def of(regions: Sequence[Region], size_hw: tuple[int, int]) -> "_Grid":
        counts = np.array([len(region.rows) for region in regions])
        if not counts.all():
            raise ValueError("A region without pixels has no outline.")
        return _Grid(
            np.repeat(np.arange(len(regions)), counts),
            np.concatenate([region.rows for region in regions]).astype(np.int64),
            np.concatenate([region.starts for region in regions]).astype(np.int64),
            np.concatenate([region.stops for region in regions]).astype(np.int64),
            size_hw[0] + 1,
            size_hw[1] + 1,
        )

    def by_line(self, region: _Ints, x: _Ints, y: _Ints) -> _Ints:
        """A key that sorts by region, then line, then column."""
        return (region * self.lines + y) * self.columns + x

    def by_column(self, region: _Ints, x: _Ints, y: _Ints) -> _Ints:
        """A key that sorts by region, then column, then line."""
        return (region * self.columns + x) * self.lines + y

    def point(self, x: _Ints, y: _Ints) -> _Ints:
        """A number for each grid point."""
        return y * self.columns + x


class _Corners(NamedTuple):
    """The grid points where the boundary of a region turns.

    They are sorted by region, line and column; so corners 2i and 2i+1 are the ends of horizontal side i. Where two
    pixels of a region touch by a corner only, the corner stands twice, once for each pixel, because they are not
    4-connected.
    """

    region: _Ints
    x: _Ints
    y: _Ints
    inside_below: _Bools
    """(n/2,) for each horizontal side: the region is below it (else above)."""
    partner: _Ints
    """(n,) the other end of the vertical side at each corner."""
    uppers: _Ints
    """(n/2,) upper ends of the vertical sides, sorted by region, column and line."""

    def leaving(self) -> _Ints:
        """The corner at the end of each horizontal side, walked with the region on the right hand."""
        return np.arange(0, len(self.x), 2) + self.inside_below


def _corners(grid: _Grid) -> _Corners:
    """Find the corners of all regions.

    Along a grid line, the ends of the runs above it and below it are its corners, except where a run above and one
    below it start (or stop) at the same point: there the boundary goes straight on.
    """
    # Low bits: 2 the end is a start, 1 its run is above the line. At a corner that stands twice, the copy whose
    # horizontal side is on the left comes first this way: a stop above belongs to the pixel at the upper left.
    ends = np.stack([grid.start * 4 + 2, grid.stop * 4], axis=1)
    below = (grid.by_line(grid.region, np.zeros_like(grid.row), grid.row)[:, None] * 4 + ends).ravel()
    events = np.concatenate([below, below + 4 * grid.columns + 1])
    events.sort(kind="stable")  # two sorted halves: merged in linear time
    straight = (events[1:] >> 1) == (events[:-1] >> 1)
    keep = np.ones(len(events), bool)
    keep[1:] &= ~straight
    keep[:-1] &= ~straight
    events = events[keep]
    line, x = np.divmod(events >> 2, grid.columns)
    region, y = np.divmod(line, grid.lines)
    starts, above = (events & 2) > 0, (events & 1) > 0
    # An end of a run above is the lower end of a vertical side, one below the upper end of another.
    down = np.argsort(grid.by_column(region, x, y) * 2 + ~above)
    partner = np.empty_like(down)
    partner[down[0::2]], partner[down[1::2]] = down[1::2], down[0::2]
    return _Corners(region, x, y, starts[0::2] != above[0::2], partner, down[0::2])


class _Rings(NamedTuple):
    """The closed boundaries of the regions, walked with the region on the right hand; of each the outer one first."""

    order: _Ints
    """Numbers of the horizontal sides, ring after ring."""
    place: _Ints
    """(n,) where each horizontal side is in the order."""
    bounds: _Ints
    """(rings + 1,) where each ring begins in the order."""
    first: _Ints
    """(regions + 1,) number of each region's outer ring; its holes follow."""


def _rings(corners: _Corners, regions: int) -> _Rings:
    """Follow the sides.

    Raises:
        ValueError: a region has several outer rings.
    """
    following = (corners.partner[corners.leaving()] >> 1).tolist()
    order: list[int] = []
    begins: list[int] = []
    # A plain loop: linking by array operations takes a pass for each doubling of the longest ring, and was slower.
    for first in range(len(following)):
        if following[first] >= 0:
            begins.append(len(order))
            side = first
            while (after := following[side]) >= 0:
                following[side] = -1
                order.append(side)
                side = after
    sides = np.fromiter(order, np.int64, len(order))
    place = np.empty_like(sides)
    place[sides] = np.arange(len(sides))
    # Sides come line by line, so a ring begins with its topmost: an outer ring has its inside below.
    begin_sides = sides[begins]
    outer = corners.inside_below[begin_sides]
    region = corners.region[2 * begin_sides]
    components = np.bincount(region[outer], minlength=regions)
    if components.max() > 1:
        number = int(components.argmax())
        raise ValueError(
            f"Region {number} has {components[number]} components; an outline is of one. Split it with find_regions."
        )
    return _Rings(sides, place, np.append(begins, len(sides)), np.append(np.flatnonzero(outer), len(outer)))


class _Bridges(NamedTuple):
    """From each hole to a ring further left, along a grid line."""

    ring: _Ints
    """(n,) number of the hole's ring."""
    begin: _Ints
    """(n,) where its leftmost corner, of these the upper one, is among the points of the rings."""
    x: _Ints
    y: _Ints
    """(n,) that corner."""
    land_x: _Ints
    """(n,) where the bridge ends; in line y."""
    leaving: _Ints
    """(n,) the point of the rings behind which, on the vertical side that follows it, the bridge ends."""


def _bridges(grid: _Grid, corners: _Corners, rings: _Rings) -> _Bridges:
    """A hole's leftmost corner looks left along its grid line, through the region, to the first vertical side.

    The ring that the side belongs to reaches further left than the hole does: so bridges never form a circle.
    """
    outer = np.zeros(len(rings.bounds) - 1, bool)
    outer[rings.first[:-1]] = True
    holes = np.flatnonzero(~outer)
    if not len(holes):
        return _Bridges(*(np.empty(0, np.int64) for _ in range(6)))
    place = _leftmost(corners, rings)[holes]
    corner = 2 * rings.order[place]
    region, x, y = corners.region[corner], corners.x[corner], corners.y[corner]
    # The pixels to its left, above and below the line, are in the region: so the runs that they are in say how far.
    key = grid.by_line(grid.region, grid.start, grid.row)
    start_above = grid.start[np.searchsorted(key, grid.by_line(region, x - 1, y - 1), side="right") - 1]
    start_below = grid.start[np.searchsorted(key, grid.by_line(region, x - 1, y), side="right") - 1]
    land_x = np.maximum(start_above, start_below)
    row = np.where(start_below >= start_above, y, y - 1)
    leaving = _vertical_side(grid, corners, rings, region, land_x, row)
    # The top side of a hole is walked to the left: the corner is where it is left.
    return _Bridges(holes, 2 * place + 1, x, y, land_x, leaving)


def _leftmost(corners: _Corners, rings: _Rings) -> _Ints:
    """(rings,) where in the order is the horizontal side whose left end is each ring's leftmost corner, the upper."""
    left = 2 * rings.order
    reach = corners.x[left] * (int(corners.y.max()) + 1) + corners.y[left]
    least = np.minimum.reduceat(reach, rings.bounds[:-1])
    found = np.flatnonzero(reach == np.repeat(least, np.diff(rings.bounds)))
    ring = np.searchsorted(rings.bounds, found, side="right") - 1
    places = np.empty(len(least), np.int64)
    places[ring] = found
    return places


def _vertical_side(grid: _Grid, corners: _Corners, rings: _Rings, region: _Ints, x: _Ints, row: _Ints) -> _Ints:
    """The point of the rings that begins the vertical side of a region at a column, beside the pixel in a row."""
    keys = grid.by_column(corners.region[corners.uppers], corners.x[corners.uppers], corners.y[corners.uppers])
    upper = corners.uppers[np.searchsorted(keys, grid.by_column(region, x, row), side="right") - 1]
    leaves = corners.leaving()
    begin = np.where(leaves[upper >> 1] == upper, upper, corners.partner[upper])
    places: _Ints = 2 * rings.place[begin >> 1] + 1
    return places


class _Fixed(NamedTuple):
    """What simplifying must leave where it is."""

    points: _Ints
    """Sorted numbers of grid points: junctions, corners of the image, and both ends of every link."""
    links: _Ints
    """(n, 2) grid points that are joined along their line, the right one first: the bridges, and what joins regions
    that nothing touches to a neighbour. With them all boundaries hang together, so that no island can slip through
    the outline beside it unnoticed."""
    straight: tuple[_Ints, _Ints, _Ints, _Bools]
    """Region, x, y and direction (true: horizontal) of the points among them that lie on a side of a region, not at a
    corner of it."""


def _fixed(grid: _Grid, corners: _Corners, rings: _Rings, bridges: _Bridges) -> _Fixed:
    owner_key = grid.row * grid.columns + grid.start
    by_row = np.argsort(owner_key)
    owner_key, owner_stop = owner_key[by_row], (grid.row * grid.columns + grid.stop)[by_row]
    owner_region = grid.region[by_row]

    def owners(x: _Ints, y: _Ints) -> _Ints:
        """The region of each pixel."""
        pixel = y * grid.columns + x
        run = np.maximum(np.searchsorted(owner_key, pixel, side="right") - 1, 0)
        owner = np.where((owner_key[run] <= pixel) & (pixel < owner_stop[run]), owner_region[run], _VOID)
        owner[(x < 0) | (y < 0) | (x >= grid.columns - 1) | (y >= grid.lines - 1)] = _OUTSIDE
        return owner

    # A region that neither touches another at the left of its leftmost corner nor the edge of the image is linked to
    # what it sees there.
    corner = 2 * rings.order[_leftmost(corners, rings)[rings.first[:-1]]]
    x, y = corners.x[corner], corners.y[corner]
    floats = (owners(x - 1, y) == _VOID) & (owners(x - 1, y - 1) < 0)
    x, y = x[floats], y[floats]
    sight = np.zeros_like(x)
    for row in (y - 1, y):
        run = np.searchsorted(owner_key, row * grid.columns + x, side="left") - 1
        seen = np.where(run >= 0, owner_stop[np.maximum(run, 0)] - row * grid.columns, 0)
        np.maximum(sight, seen, out=sight)
    links = np.stack(
        [
            np.concatenate([grid.point(bridges.x, bridges.y), grid.point(x, y)]),
            np.concatenate([grid.point(bridges.land_x, bridges.y), grid.point(sight, y)]),
        ],
        axis=1,
    )

    def around(points: _Ints) -> tuple[_Ints, _Ints, _Ints, _Ints]:
        """The owners of the upper left, upper right, lower left and lower right pixel."""
        y, x = np.divmod(points, grid.columns)
        return owners(x - 1, y - 1), owners(x, y - 1), owners(x - 1, y), owners(x, y)

    points = _distinct(grid.point(corners.x, corners.y))
    a, b, c, d = around(points)
    edges = (a != b).view(np.int8) + (b != d) + (d != c) + (c != a)
    y, x = np.divmod(points, grid.columns)
    frame = ((x == 0) | (x == grid.columns - 1)) & ((y == 0) | (y == grid.lines - 1))
    points = _distinct(np.concatenate([points[(edges >= 3) | frame], links.ravel()]))
    a, b, c, d = around(points)
    y, x = np.divmod(points, grid.columns)
    parts = [
        (one[on], x[on], y[on], np.full(np.count_nonzero(on), horizontal))
        for one, two, other, another, horizontal in (
            (a, b, c, d, True),
            (c, d, a, b, True),
            (a, c, b, d, False),
            (b, d, a, c, False),
        )
        for on in [(one == two) & (one >= 0) & (other != one) & (another != one)]
    ]
    region, x, y, horizontal = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _Fixed(points, links, (region, x, y, horizontal))


def _distinct(numbers: _Ints) -> _Ints:
    """Sorted, each once; `np.unique` hashes, which takes several times as long as sorting."""
    ordered = np.sort(numbers)
    return ordered[np.diff(ordered, prepend=-1) > 0]


class _Path(NamedTuple):
    """The points of all rings, ring after ring, and the points on their sides that matter."""

    x: _Ints
    y: _Ints
    bounds: _Ints
    """(rings + 1,) where each ring begins."""
    begins: _Ints
    """(bridges,) where each hole's leftmost corner is."""
    landings: _Ints
    """(bridges,) where each bridge ends."""


def _path(grid: _Grid, corners: _Corners, rings: _Rings, bridges: _Bridges, fixed: _Fixed | None) -> _Path:
    leaves = corners.leaving()
    points = np.stack([leaves ^ 1, leaves], axis=1)[rings.order].ravel()
    behind, x, y = bridges.leaving, bridges.land_x, bridges.y
    if fixed is not None:
        region, side_x, side_y, horizontal = fixed.straight
        flat = np.flatnonzero(horizontal)
        keys = grid.by_line(corners.region[0::2], corners.x[0::2], corners.y[0::2])
        side = np.searchsorted(keys, grid.by_line(region[flat], side_x[flat], side_y[flat]), side="right") - 1
        more = _vertical_side(grid, corners, rings, region, side_x, side_y)
        more[flat] = 2 * rings.place[side]
        behind, x, y = (np.concatenate(pair) for pair in ((behind, more), (x, side_x), (y, side_y)))
    # Along a side in the direction in which it is walked; each side is walked in one direction of one coordinate.
    ahead = np.abs(x - corners.x[points[behind]]) + np.abs(y - corners.y[points[behind]])
    order = np.lexsort((ahead, behind))
    inserted = behind[order]
    spot = np.empty(len(order), np.int64)
    spot[order] = inserted + 1 + np.arange(len(order))

    def shifted(point: _Ints) -> _Ints:
        return point + np.searchsorted(inserted, point, side="left")

    return _Path(
        np.insert(corners.x[points], inserted + 1, x[order]),
        np.insert(corners.y[points], inserted + 1, y[order]),
        shifted(2 * rings.bounds),
        shifted(bridges.begin),
        spot[: len(bridges.ring)],
    )


def _joined(
    path: _Path, rings: _Rings, bridges: _Bridges, kept: _Bools | None, regions: int
) -> list[NDArray[np.int32]]:
    """One closed walk a region, over all its rings, entering and leaving every hole over the same bridge.

    The rings are cut into stretches at their beginnings, behind the points where bridges end, and before the leftmost
    corners of holes. What follows each stretch is known from the cuts alone; so following them takes a step for each
    stretch, not for each point. Behind the last stretch of a hole comes the way back over its bridge.
    """
    points, holes = int(path.bounds[-1]), len(bridges.ring)
    cuts = _distinct(np.concatenate([path.bounds[:-1], path.landings + 1, path.begins, [points]]))
    stretches = len(cuts) - 1
    number = np.empty(points + 1, np.int64)  # of the stretch that begins at a point
    number[cuts] = np.arange(stretches + 1)
    # What follows each point, bridges that end there aside: on its ring, or the way back before a leftmost corner.
    after = np.arange(1, points + 1)
    after[path.bounds[1:] - 1] = path.bounds[:-1]
    on_ring = number.copy()
    on_ring[path.begins] = stretches + np.arange(holes)
    following = np.append(on_ring[after[cuts[1:] - 1]], on_ring[after[path.landings]])
    following[number[path.landings + 1] - 1] = number[path.begins]
    successor = following.tolist()
    walked: list[int] = []
    ends: list[int] = []
    for first in np.searchsorted(cuts, path.bounds[rings.first[:-1]]).tolist():
        step = first
        while True:
            walked.append(step)
            step = successor[step]
            if step == first:
                break
        ends.append(len(walked))
    # A way back has two points: the hole's leftmost corner again, and the end of the bridge.
    places = np.append(np.arange(points), np.stack([path.begins, path.landings], axis=1))
    starts = np.append(cuts[:-1], points + 2 * np.arange(holes))
    lengths = np.append(np.diff(cuts), np.full(holes, 2))
    order = np.fromiter(walked, np.int64, len(walked))
    places = places[_ranges(starts[order], lengths[order])]
    region = np.repeat(np.repeat(np.arange(regions), np.diff(ends, prepend=0)), lengths[order])
    if kept is not None:
        places, region = places[kept[places]], region[kept[places]]
    begins = np.searchsorted(region, np.arange(regions + 1))
    before = np.arange(len(places)) - 1
    before[begins[:-1]] = begins[1:] - 1
    x, y = path.x[places], path.y[places]
    moved = np.flatnonzero((x != x[before]) | (y != y[before]))  # a bridge may end on a corner
    flat = np.stack([x[moved].astype(np.int32), y[moved].astype(np.int32)], axis=1).ravel()
    bounds = 2 * np.searchsorted(moved, begins)
    return [flat[begin:end] for begin, end in pairwise(bounds.tolist())]


def _ranges(start: _Ints, lengths: _Ints) -> _Ints:
    """start[0], start[0] + 1, … (lengths[0] numbers), start[1], …"""
    return np.arange(int(lengths.sum())) + np.repeat(start - np.cumsum(lengths) + lengths, lengths)


class _Arcs(NamedTuple):
    """Stretches of boundary between fixed points, each of them once, whatever regions it parts."""

    x: _Ints
    y: _Ints
    """The points; an arc is a stretch of them with both its ends."""
    begin: _Ints
    end: _Ints
    """(arcs,) first and last point of each."""


def _arcs(path: _Path, is_fixed: _Bools, columns: int) -> _Arcs:
    """Cut the rings at the fixed points. Every ring has one: links join it to what is around it."""
    sizes = np.diff(path.bounds)
    ring = np.repeat(np.arange(len(sizes)), sizes)
    fixed = np.flatnonzero(is_fixed)
    turn = fixed[np.searchsorted(ring[fixed], np.arange(len(sizes)))] - path.bounds[:-1]
    # Turned so that it begins with a fixed point, and closed with it.
    step = _ranges(np.zeros_like(sizes), sizes + 1)
    around = np.repeat(path.bounds[:-1], sizes + 1) + (step + np.repeat(turn, sizes + 1)) % np.repeat(sizes, sizes + 1)
    x, y = path.x[around], path.y[around]
    cuts = np.flatnonzero(is_fixed[around])
    begin, end = cuts[:-1], cuts[1:]
    same_ring = ring[around[begin]] == ring[around[end]]
    moves = (x[begin] != x[begin + 1]) | (y[begin] != y[begin + 1])
    begin, end = begin[same_ring & moves], end[same_ring & moves]
    # Both sides of an arc have the same first and last unit edge, in one order or the other: of two, that is taken
    # which begins with the lower number, so that nothing depends on the order of the regions.
    first, last = _edge(x, y, begin, begin + 1, columns), _edge(x, y, end, end - 1, columns)
    edge = np.minimum(first, last)
    order = np.lexsort((first > last, edge))
    once = order[np.diff(edge[order], prepend=-1) > 0]
    return _Arcs(x, y, begin[once], end[once])


def _edge(x: _Ints, y: _Ints, here: _Ints, there: _Ints, columns: int) -> _Ints:
    """A number for the unit edge at `here` on the side towards `there`."""
    left = x[here] - (x[there] < x[here])
    top = y[here] - (y[there] < y[here])
    number: _Ints = 2 * (top * columns + left) + (x[there] == x[here])
    return number


def _simplified(path: _Path, fixed: _Fixed, grid: _Grid, tolerance: float) -> _Bools:
    """Which points of the path stay."""
    number = grid.point(path.x, path.y)
    is_fixed = np.isin(number, fixed.points)
    arcs = _arcs(path, is_fixed, grid.columns)
    begin, end = _close_enough(arcs, arcs.begin, arcs.end, tolerance)
    at_end = np.zeros(len(arcs.x), bool)
    at_end[arcs.begin] = at_end[arcs.end] = True
    links_y, links_x = np.divmod(fixed.links, grid.columns)
    links = np.stack([links_x[:, 0], links_y[:, 0], links_x[:, 1], links_y[:, 1]], axis=1)
    fresh = np.ones(len(begin), bool)
    while True:
        chords = np.stack([arcs.x[begin], arcs.y[begin], arcs.x[end], arcs.y[end]], axis=1)
        wrong = _meeting(np.concatenate([chords, links]), np.append(fresh, np.zeros(len(links), bool)))[: len(begin)]
        wrong |= _swapped(arcs, begin, end, at_end, links)
        wrong &= end > begin + 1
        if not wrong.any():
            break
        middle, _ = _farthest(arcs, begin[wrong], end[wrong])
        halves = np.concatenate([begin[wrong], middle]), np.concatenate([middle, end[wrong]])
        halves = _close_enough(arcs, *halves, tolerance)  # half a stretch may be farther from its chord than the whole
        begin, end = np.concatenate([begin[~wrong], halves[0]]), np.concatenate([end[~wrong], halves[1]])
        fresh = np.arange(len(begin)) >= np.count_nonzero(~wrong)
    # A point between the ends of an arc is in no other arc: it stays for both its sides or for none.
    return is_fixed | np.isin(number, grid.point(arcs.x[begin], arcs.y[begin]))


def _close_enough(arcs: _Arcs, begin: _Ints, end: _Ints, tolerance: float) -> tuple[_Ints, _Ints]:
    """Cut chords, given by their first and last points, until each is within the tolerance of what it stands for."""
    done = [(begin[:0], end[:0])]
    while len(begin):
        side = end == begin + 1
        done.append((begin[side], end[side]))
        begin, end = begin[~side], end[~side]
        if not len(begin):
            break
        middle, distance = _farthest(arcs, begin, end)
        # An arc that ends where it begins has no chord: it is cut in any case.
        closed = (arcs.x[begin] == arcs.x[end]) & (arcs.y[begin] == arcs.y[end])
        near = (distance <= tolerance) & ~closed
        done.append((begin[near], end[near]))
        begin, middle, end = begin[~near], middle[~near], end[~near]
        begin, end = np.concatenate([begin, middle]), np.concatenate([middle, end])
    return np.concatenate([pair[0] for pair in done]), np.concatenate([pair[1] for pair in done])


def _farthest(arcs: _Arcs, begin: _Ints, end: _Ints) -> tuple[_Ints, NDArray[np.float64]]:
    """Of each chord the point between its ends that is farthest from it, and how far. Each has such a point."""
    inner = end - begin - 1
    points = _ranges(begin + 1, inner)
    x, y = arcs.x[begin].astype(np.float64), arcs.y[begin].astype(np.float64)
    along_x, along_y = arcs.x[end] - x, arcs.y[end] - y
    square = along_x**2 + along_y**2
    away_x, away_y = arcs.x[points] - np.repeat(x, inner), arcs.y[points] - np.repeat(y, inner)
    along_x, along_y = np.repeat(along_x, inner), np.repeat(along_y, inner)
    share = (away_x * along_x + away_y * along_y) / np.repeat(np.maximum(square, 1), inner)
    np.clip(share, 0, 1, out=share)
    distance = (away_x - share * along_x) ** 2 + (away_y - share * along_y) ** 2
    first = np.cumsum(inner) - inner
    largest = np.maximum.reduceat(distance, first)
    found = np.flatnonzero(distance == np.repeat(largest, inner))
    _, once = np.unique(np.searchsorted(first, found, side="right"), return_index=True)
    return points[found[once]], np.sqrt(largest)


def _meeting(segments: _Ints, fresh: _Bools) -> _Bools:
    """Which segments share more with another one than a common end; only pairs with a fresh one are looked at.

    Args:
        segments: (n, 4) x, y, x, y.
        fresh: (n,) segments that were not looked at before.
    """
    wrong = np.zeros(len(segments), bool)
    one, two = _near(segments, fresh)
    ax, ay, bx, by = segments[one].T
    cx, cy, dx, dy = segments[two].T
    apart = (
        (np.maximum(ax, bx) < np.minimum(cx, dx))
        | (np.maximum(cx, dx) < np.minimum(ax, bx))
        | (np.maximum(ay, by) < np.minimum(cy, dy))
        | (np.maximum(cy, dy) < np.minimum(ay, by))
    )
    one, two = one[~apart], two[~apart]
    ax, ay, bx, by = segments[one].T
    cx, cy, dx, dy = segments[two].T
    side_c = np.sign((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
    side_d = np.sign((bx - ax) * (dy - ay) - (by - ay) * (dx - ax))
    side_a = np.sign((dx - cx) * (ay - cy) - (dy - cy) * (ax - cx))
    side_b = np.sign((dx - cx) * (by - cy) - (dy - cy) * (bx - cx))
    meet = (side_c * side_d <= 0) & (side_a * side_b <= 0)
    ac, ad = (ax == cx) & (ay == cy), (ax == dx) & (ay == dy)
    bc, bd = (bx == cx) & (by == cy), (bx == dx) & (by == dy)
    common = ac | ad | bc | bd
    # With one common end they may only overlap: the other ends lie on one line and on the same side of it.
    px, py = np.where(ac | ad, ax, bx), np.where(ac | ad, ay, by)
    inner = (ax + bx - 2 * px) * (cx + dx - 2 * px) + (ay + by - 2 * py) * (cy + dy - 2 * py)
    overlap = (side_c == 0) & (side_d == 0) & (inner > 0)
    meet &= ~common | overlap
    wrong[one[meet]] = wrong[two[meet]] = True
    return wrong


def _near(segments: _Ints, fresh: _Bools) -> tuple[_Ints, _Ints]:
    """Pairs of segments that pass through a common cell, at least one of them fresh."""
    # Cut into pieces no longer than a cell, so that the boxes of the pieces stay close to the segments.
    reach = np.maximum(np.abs(segments[:, 2] - segments[:, 0]), np.abs(segments[:, 3] - segments[:, 1]))
    pieces = reach // _CELL + 1
    owner = np.repeat(np.arange(len(segments)), pieces)
    step = _ranges(np.zeros_like(pieces), pieces)
    cells = []
    for axis in (0, 1):
        start, length = segments[owner, axis], segments[owner, axis + 2] - segments[owner, axis]
        one, two = start + length * step / pieces[owner], start + length * (step + 1) / pieces[owner]
        low, high = np.minimum(one, two), np.maximum(one, two)
        cells.append((np.floor(low).astype(np.int64) // _CELL, np.ceil(high).astype(np.int64) // _CELL))
    (left, right), (top, bottom) = cells
    pitch = int(right.max()) + 1
    members, places = [], []
    for beyond_x in range(int((right - left).max()) + 1):
        for beyond_y in range(int((bottom - top).max()) + 1):
            reached = (left + beyond_x <= right) & (top + beyond_y <= bottom)
            members.append(owner[reached])
            places.append((top[reached] + beyond_y) * pitch + left[reached] + beyond_x)
    entry = _distinct(np.concatenate(places) * len(segments) + np.concatenate(members))
    cell, member = np.divmod(entry, len(segments))
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    sizes = np.diff(first, append=len(cell))
    busy = np.logical_or.reduceat(fresh[member], first) & (sizes > 1)
    first, sizes = first[busy], sizes[busy]
    # Each entry with those behind it in its cell.
    entries = _ranges(first, sizes)
    behind = np.repeat(first + sizes, sizes) - entries - 1
    one = member[np.repeat(entries, behind)]
    two = member[_ranges(entries + 1, behind)]
    either = fresh[one] | fresh[two]
    return one[either], two[either]


def _swapped(arcs: _Arcs, begin: _Ints, end: _Ints, at_end: _Bools, links: _Ints) -> _Bools:
    """Which chords leave a fixed point in another order around it than the boundaries do that they stand for."""
    chord = np.concatenate([np.flatnonzero(at_end[begin]), np.flatnonzero(at_end[end])])
    forward = np.arange(len(chord)) < np.count_nonzero(at_end[begin])
    here = np.where(forward, begin[chord], end[chord])
    there = np.where(forward, end[chord], begin[chord])
    next_to = np.where(forward, here + 1, here - 1)
    x, y = arcs.x, arcs.y
    # Towards the right, down, left, up: 0, 1, 2, 3; links go to the left from their first end.
    edge = np.where(y[next_to] == y[here], np.where(x[next_to] > x[here], 0, 2), np.where(y[next_to] > y[here], 1, 3))
    angle = np.arctan2(y[there] - y[here], x[there] - x[here])
    count = len(links)
    points = np.concatenate([np.stack([x[here], y[here]], axis=1), links[:, :2], links[:, 2:]])
    edge = np.concatenate([edge, np.full(count, 2), np.zeros(count, np.int64)])
    angle = np.concatenate([angle, np.full(count, np.pi), np.zeros(count)])
    order = np.lexsort((edge, points[:, 0], points[:, 1]))
    points, angle = points[order], angle[order]
    first = np.flatnonzero(np.append(True, np.any(points[1:] != points[:-1], axis=1)))
    sizes = np.diff(first, append=len(points))
    after = np.arange(len(points)) + 1
    after[first + sizes - 1] = first
    turns = np.add.reduceat((angle[after] - angle) % (2 * np.pi), first) / (2 * np.pi)
    bad = np.empty(len(points), bool)
    bad[order] = np.repeat((np.rint(turns) != 1) & (sizes > 2), sizes)
    wrong = np.zeros(len(begin), bool)
    wrong[chord[bad[: len(chord)]]] = True
    return wrong
