"""Label map → regions → CVAT masks and polygons, and back.

Outlines follow pixel edges: pixel (x, y) is the square [x, x+1] x [y, y+1]. Holes are joined to the outline by bridges
of no width (keyholes), because a CVAT polygon is one ring. Filled by pycocotools, as CVAT fills polygons, an outline
gives back every pixel of its region.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from sscloud.labels import count_ids

ATTRIBUTES = ("model", "confidence")
"""Text attributes that every region carries. CVAT keeps those that the function's spec and the task's label declare."""

MAX_REGIONS = 1000
"""Most regions of one image, unless a setting says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A 4-connected component of one label."""

    label_id: int
    box_xyxy: tuple[int, int, int, int]
    """Half-open box in the image."""
    mask: NDArray[np.bool_]
    """(h, w) crop of the box."""
    confidence: float
    """Mean probability of its pixels, 0 to 1."""
    area: int
    """Pixels set in the mask."""


class Regions(NamedTuple):
    """What `find_regions` found, and what it left out."""

    regions: list[Region]
    """Largest first."""
    specks: int
    """Regions left out because they are smaller than the minimum area."""
    surplus: int
    """Regions left out, smallest first, because there were more than the limit."""


def smallest_region(scale: float) -> int:
    """Pixels of the smallest region that a model of this scale can mean: one pixel of what it sees."""
    return max(1, round(scale**-2))


def find_regions(
    label_map: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    *,
    background_ids: Collection[int] = (),
    threshold: float = 0.0,
    min_area: int = 1,
    max_regions: int | None = None,
) -> Regions:
    """Split a label map into 4-connected regions.

    Args:
        label_map: (H, W) uint8 label ids.
        confidence: (H, W) float32 probability of each pixel's label.
        background_ids: labels that make no regions.
        threshold: pixels with a probability below it belong to no region.
        min_area: regions with fewer pixels are left out.
        max_regions: only that many of the largest are kept.
    """
    kept: list[Region] = []
    specks = surplus = 0
    sure = confidence >= threshold if threshold > 0 else None
    for label_id in np.flatnonzero(count_ids(label_map)):
        if int(label_id) in background_ids:
            continue
        binary = (label_map == label_id).view(np.uint8)
        if sure is not None:
            binary &= sure
        count, components, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=4)
        areas = stats[1:count, cv2.CC_STAT_AREA]
        order = np.argsort(-areas, kind="stable")
        large = order[areas[order] >= min_area]
        specks += len(order) - len(large)
        surplus += 0 if max_regions is None else max(0, len(large) - max_regions)
        for index in large[:max_regions]:
            left, top, width, height, area = (int(value) for value in stats[index + 1])
            crop = slice(top, top + height), slice(left, left + width)
            mask = components[crop] == index + 1
            kept.append(
                Region(
                    label_id=int(label_id),
                    box_xyxy=(left, top, left + width, top + height),
                    mask=mask,
                    confidence=float(confidence[crop][mask].mean(dtype=np.float64)),
                    area=area,
                )
            )
    kept.sort(key=lambda region: -region.area)
    if max_regions is not None:
        surplus += max(0, len(kept) - max_regions)
        kept = kept[:max_regions]
    return Regions(kept, specks, surplus)


def mask_json(mask: NDArray[np.bool_]) -> str:
    """(h, w) bool → the digits of CVAT's mask crop, `"0,1,1"`, row-major, without making a Python integer a pixel."""
    text = np.full(max(2 * mask.size - 1, 0), ord(","), np.uint8)
    text[::2] = mask.ravel().view(np.uint8)
    text[::2] += ord("0")
    return text.tobytes().decode("ascii")


def paint_answer(
    items: Sequence[Mapping[str, Any]],
    size_hw: tuple[int, int],
    *,
    label_id_of: Callable[[str], int],
    fill: int,
) -> NDArray[np.uint8]:
    """Turn the function's answer back into a label map, later items over earlier ones, as CVAT draws them.

    Args:
        items: the parsed answer; each has `label` and `mask` (flat 0/1 crop, then the inclusive box).
        size_hw: size of the image that was sent.
        label_id_of: label name → label id.
        fill: label id of pixels that no item covers.

    Returns:
        (H, W) uint8 label ids.

    Raises:
        ValueError: a crop whose pixels do not fill its box, or a box outside the image.
    """
    label_map = np.full(size_hw, fill, np.uint8)
    for item in items:
        *pixels, left, top, right, bottom = item["mask"]
        height, width = bottom - top + 1, right - left + 1
        inside = 0 <= left <= right < size_hw[1] and 0 <= top <= bottom < size_hw[0]
        if not inside or len(pixels) != height * width:
            raise ValueError(
                f"A mask of {len(pixels)} pixels with the box x {left}-{right}, y {top}-{bottom} does not fit an image "
                f"of {size_hw[1]}x{size_hw[0]} pixels."
            )
        crop = np.array(pixels, np.uint8).reshape(height, width).astype(bool)
        label_map[top : bottom + 1, left : right + 1][crop] = label_id_of(item["label"])
    return label_map


def outline(mask: NDArray[np.bool_], *, offset_xy: tuple[int, int] = (0, 0)) -> list[int]:
    """The outline of one region as a CVAT polygon.

    Args:
        mask: (h, w) bool with exactly one 4-connected component; it may have holes.
        offset_xy: added to every point.

    Returns:
        flat [x, y, …] on pixel edges, at least 8 numbers.

    Raises:
        ValueError: the mask is empty or has several components.
    """
    padded = np.pad(mask, 1)
    rings = _trace(padded)
    if len(rings.corners) == 0:
        raise ValueError("An empty mask has no outline.")
    points = np.array(_joined(padded, rings), np.int64)
    points = points[np.any(points != np.roll(points, 1, axis=0), axis=1)]  # a bridge may end on a corner
    flat: list[int] = (points + np.array(offset_xy)).ravel().tolist()
    return flat


class _Rings(NamedTuple):
    """The closed boundaries of a mask."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    """Corners, in the coordinates of the mask without its padding."""
    corners: list[list[int]]
    """Corner numbers around each ring, horizontal and vertical sides in turn, horizontal first; outer ring first."""
    sides: NDArray[np.int64]
    """(n, 2) corner numbers of the vertical sides, upper corner first, sorted by x, then y."""


def _trace(padded: NDArray[np.bool_]) -> _Rings:
    """Find the boundaries of a mask padded by one empty pixel.

    A corner is a grid point where the boundary turns. Along each grid line the corners pair up to the sides between
    them; following horizontal and vertical sides in turn walks the rings. Where two pixels touch by a corner only, the
    corner stands twice, once for each pixel, because they are not 4-connected.
    """
    cells = padded.view(np.uint8)
    # Bits: 1 upper left, 2 upper right, 4 lower left, 8 lower right pixel of a grid point.
    code = cells[:-1, :-1] | cells[:-1, 1:] << 1 | cells[1:, :-1] << 2 | cells[1:, 1:] << 3
    copies_of = np.zeros(16, np.uint8)
    copies_of[[1, 2, 4, 8, 7, 11, 13, 14]] = 1
    copies_of[[6, 9]] = 2
    y, x = np.nonzero(copies_of[code])
    copies = copies_of[code[y, x]]
    y, x = np.repeat(y, copies), np.repeat(x, copies)
    # Of a double corner the first copy has the side to the left, the second the one to the right. Whether the first
    # has the upper or the lower side depends on which pixels touch (code 6: upper right and lower left).
    second = np.zeros(len(y), np.int64)
    second[1:] = (y[1:] == y[:-1]) & (x[1:] == x[:-1])
    down = np.lexsort((np.where(code[y, x] == 6, 1 - second, second), y, x))
    below = np.empty_like(down)
    below[down[0::2]], below[down[1::2]] = down[1::2], down[0::2]

    corners: list[list[int]] = []
    outer = 0
    partner = below.tolist()
    seen = bytearray(len(partner))
    for start in range(len(partner)):
        if seen[start]:
            continue
        # Corners come row by row, so this one is topmost in its ring: an outer ring has its inside below.
        inside_below = int(code[y[start], x[start]]) >> 3
        outer += inside_below
        ring: list[int] = []
        corner = start
        while not seen[corner]:
            across = corner ^ 1  # row by row, neighbours in the list are the two ends of a horizontal side
            seen[corner] = seen[across] = 1
            ring += (corner, across)
            corner = partner[across]
        # Holes run the other way around, so that fill rules that count turns leave them empty too.
        corners.append(ring if inside_below else ring[::-1])
    if outer > 1:
        raise ValueError(f"The mask has {outer} components; an outline is of one. Split it with find_regions.")
    return _Rings(x, y, corners, np.stack([down[0::2], down[1::2]], axis=1))


def _joined(padded: NDArray[np.bool_], rings: _Rings) -> list[tuple[int, int]]:
    """One closed walk over all rings, entering and leaving every hole over the same bridge."""
    x, y, corners, sides = rings
    leaves_vertically = np.zeros(len(x), bool)
    for ring in corners:
        leaves_vertically[ring[1::2]] = True
    keys = x[sides[:, 0]] * len(padded) + y[sides[:, 0]]
    column_of, row_of = x.tolist(), y.tolist()
    bridges: dict[int, list[tuple[int, int, list[int]]]] = {}
    # A hole's leftmost corner sees, to the left along its grid line, a vertical side of a ring that reaches further
    # left than the hole does: so bridges never form a circle.
    for ring in corners[1:]:
        hole = _from_leftmost(ring, column_of, row_of)
        column, line = column_of[hole[0]], row_of[hole[0]]
        # Grid line y lies between rows y and y+1 of the padded mask, grid column x to the right of its column x.
        above, below = padded[line, column::-1], padded[line + 1, column::-1]
        run = int(np.argmin(above & below))
        row = line - 1 if below[run] else line
        upper, lower = sides[np.searchsorted(keys, (column - run) * len(padded) + row, side="right") - 1].tolist()
        leaving = upper if leaves_vertically[upper] else lower
        bridges.setdefault(leaving, []).append((line, column - run, hole))

    def steps(ring: list[int]) -> Iterator[tuple[int, int] | list[int]]:
        """The points of a ring, and in between the holes to walk around first."""
        for place, corner in enumerate(ring):
            yield column_of[corner], row_of[corner]
            if corner in bridges:
                upwards = row_of[ring[(place + 1) % len(ring)]] < row_of[corner]
                for line, column, hole in sorted(bridges[corner], key=lambda entry: entry[0], reverse=upwards):
                    yield column, line
                    yield hole
                    yield column_of[hole[0]], line
                    yield column, line

    path: list[tuple[int, int]] = []
    stack = [steps(corners[0])]
    while stack:
        for step in stack[-1]:
            if isinstance(step, list):
                stack.append(steps(step))
                break
            path.append(step)
        else:
            stack.pop()
    return path


def _from_leftmost(ring: list[int], column_of: list[int], row_of: list[int]) -> list[int]:
    """Turn a ring so that it begins with its leftmost corner, of these the upper one."""
    start = min(range(len(ring)), key=lambda place: (column_of[ring[place]], row_of[ring[place]]))
    return ring[start:] + ring[:start]
