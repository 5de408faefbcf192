"""Label map → regions: 4-connected components of one label, held as horizontal runs.

A run is a stretch of one row with one label. A panorama of 8192x4096 pixels has some hundred thousand of them, so all
that follows (components, masks, outlines) costs a fraction of what it costs on pixels.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sscloud.upsample import Interpolated

MAX_REGIONS = 1000
"""Most regions of one image, unless a setting says otherwise."""

_STRIP_PIXELS = 1 << 21
"""Pixels that are compared at once: small enough for a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A 4-connected component of one label."""

    label_id: int
    box_xyxy: tuple[int, int, int, int]
    """Half-open box in the image."""
    rows: NDArray[np.int32]
    """(n,) row of each run; runs are sorted by row, then column."""
    starts: NDArray[np.int32]
    """(n,) first column of each run."""
    stops: NDArray[np.int32]
    """(n,) column behind each run; no two runs of a row touch."""
    confidence: float
    """Mean probability of its pixels, 0 to 1."""
    area: int
    """Pixels."""

    @property
    def crop_hw(self) -> tuple[int, int]:
        """Height and width of its box."""
        left, top, right, bottom = self.box_xyxy
        return bottom - top, right - left

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(h, w) bool: its box, true where it is."""
        begin, end = self.crop_runs()
        height, width = self.crop_hw
        steps = np.zeros(height * width + 1, np.int8)
        steps[begin] += 1
        steps[end] -= 1
        return np.add.accumulate(steps[:-1], out=steps[:-1]).view(np.bool_).reshape(height, width)

    def crop_runs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Its runs as begin and end (half-open) among the pixels of its box, counted row by row."""
        left, top, right, _ = self.box_xyxy
        line = (self.rows.astype(np.int64) - top) * (right - left) - left
        return line + self.starts, line + self.stops


class Regions(NamedTuple):
    """What `find_regions` found, and what it left out."""

    regions: list[Region]
    """Largest first; of equal size by label id, then from the top."""
    specks: int
    """Regions left out because they are smaller than the minimum area."""
    surplus: int
    """Regions left out, smallest first, because there were more than the limit."""


def smallest_region(scale: float) -> int:
    """Pixels of the smallest region that a model of this scale can mean: one pixel of what it sees."""
    return max(1, round(scale**-2))


def find_regions(
    label_map: NDArray[np.uint8],
    confidence: Interpolated | None = None,
    *,
    background_ids: Collection[int] = (),
    threshold: float = 0.0,
    min_area: int = 1,
    max_regions: int | None = None,
) -> Regions:
    """Split a label map into 4-connected regions.

    Args:
        label_map: (H, W) uint8 label ids.
        confidence: probability of each pixel's label; None where the map is certain.
        background_ids: labels that make no regions.
        threshold: pixels with a probability below it belong to no region.
        min_area: regions with fewer pixels are left out.
        max_regions: only that many of the largest are kept.
    """
    sure = confidence.at_least(threshold) if confidence is not None and threshold > 0 else None
    wanted = np.ones(256, bool)
    wanted[list(background_ids)] = False
    labels, rows, starts, stops = _runs(label_map, wanted, sure)
    component = components(rows, starts, stops, labels=labels)
    areas = np.bincount(component, weights=stops - starts).astype(np.int64)
    # Components are numbered by their first run, so a stable order of equals is from the top.
    first = np.zeros(len(areas), np.int64)
    first[component[::-1]] = np.arange(len(component))[::-1]
    order = np.lexsort((labels[first], -areas))
    large = order[: np.count_nonzero(areas >= min_area)]
    kept = large[:max_regions]
    place = np.full(len(areas), len(kept), np.int64)
    place[kept] = np.arange(len(kept))
    place_of_run = place[component]
    chosen = np.flatnonzero(place_of_run < len(kept))
    chosen = chosen[np.argsort(place_of_run[chosen], kind="stable")]
    rows, starts, stops = rows[chosen], starts[chosen], stops[chosen]
    bounds = np.searchsorted(place_of_run[chosen], np.arange(len(kept) + 1))
    if confidence is None or not len(kept):
        sums = areas[kept].astype(np.float64)
    else:
        sums = np.add.reduceat(confidence.run_sums(rows, starts, stops), bounds[:-1])
    regions = [
        Region(
            label_id=int(labels[first[number]]),
            box_xyxy=(int(starts[part].min()), int(rows[begin]), int(stops[part].max()), int(rows[end - 1]) + 1),
            rows=rows[part],
            starts=starts[part],
            stops=stops[part],
            confidence=float(np.clip(total / areas[number], 0, 1)),
            area=int(areas[number]),
        )
        for number, begin, end, total in zip(kept, bounds[:-1], bounds[1:], sums, strict=True)
        for part in [slice(begin, end)]
    ]
    return Regions(regions, specks=len(areas) - len(large), surplus=len(large) - len(kept))


def components(
    rows: NDArray[np.int32],
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    *,
    labels: NDArray[np.uint8] | None = None,
) -> NDArray[np.int64]:
    """Number the 4-connected components of runs.

    Args:
        rows: (n,) row of each run; runs are sorted by row, then column, and do not overlap.
        starts: (n,) first columns.
        stops: (n,) columns behind the runs.
        labels: (n,) label of each run; runs of different labels are never connected. None: all are of one label.

    Returns:
        (n,) component of each run, counted from 0 in the order of their first runs.
    """
    count = len(rows)
    if count == 0:
        return np.empty(0, np.int64)
    pitch = int(stops.max())
    begin = rows.astype(np.int64) * pitch + starts
    end = rows.astype(np.int64) * pitch + stops
    # The runs below run k that overlap it follow each other: the first that ends behind its start, and those after it
    # that start before its end.
    below = np.searchsorted(end, begin + pitch, side="right")
    overlaps = np.searchsorted(begin, end + pitch, side="left") - below
    np.maximum(overlaps, 0, out=overlaps)
    upper = np.repeat(np.arange(count), overlaps)
    lower = np.arange(len(upper)) + np.repeat(below - (np.cumsum(overlaps) - overlaps), overlaps)
    if labels is not None:
        same = labels[upper] == labels[lower]
        upper, lower = upper[same], lower[same]
    return _numbered(_roots(count, upper, lower))


def _roots(count: int, upper: NDArray[np.int64], lower: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest member of each one's component, in a graph of `count` nodes with edges upper-lower.

    Every root takes over the smallest root beside it, then all paths are shortened: the number of rounds grows with
    the logarithm of the components' sizes (Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm", 1982).
    """
    parent = np.arange(count)
    while len(upper):
        ours, theirs = parent[upper], parent[lower]
        apart = ours != theirs
        upper, lower, ours, theirs = upper[apart], lower[apart], ours[apart], theirs[apart]
        np.minimum.at(parent, np.maximum(ours, theirs), np.minimum(ours, theirs))
        while True:
            shorter = parent[parent]
            if np.array_equal(shorter, parent):
                break
            parent = shorter
    return parent


def _numbered(roots: NDArray[np.int64]) -> NDArray[np.int64]:
    is_root = roots == np.arange(len(roots))
    return (np.cumsum(is_root) - 1)[roots]


def _runs(
    label_map: NDArray[np.uint8], wanted: NDArray[np.bool_], sure: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Label, row, start and stop of every run of a wanted label; `sure` is (H, W), runs are where it is true."""
    height, width = label_map.shape
    strip = max(1, _STRIP_PIXELS // max(width, 1))
    labels = [np.empty(0, np.uint8)]
    rows, starts, stops = ([np.empty(0, np.int32)] for _ in range(3))
    for top in range(0, height, strip):
        part = label_map[top : top + strip]
        turns = np.ones(part.shape, bool)
        np.not_equal(part[:, 1:], part[:, :-1], out=turns[:, 1:])
        if sure is not None:
            certain = sure[top : top + strip]
            turns[:, 1:] |= certain[:, 1:] != certain[:, :-1]
        begin = np.flatnonzero(turns)
        end = np.append(begin[1:], turns.size)
        label = part.ravel()[begin]
        keep = wanted[label] if sure is None else wanted[label] & certain.ravel()[begin]
        begin, end = begin[keep], end[keep]
        row = begin // max(width, 1)
        labels.append(label[keep])
        rows.append((row + top).astype(np.int32))
        starts.append((begin - row * width).astype(np.int32))
        stops.append((end - row * width).astype(np.int32))
    return np.concatenate(labels), np.concatenate(rows), np.concatenate(starts), np.concatenate(stops)
