"""Outlines on pixel edges: exact ones give back every pixel, simplified ones still fit their neighbours."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from sscloud.outlines import outline, outlines, points_json
from sscloud.regions import Region, find_regions

Mask = NDArray[np.bool_]
Points = NDArray[np.int32]


def draw(art: str) -> Mask:
    return np.array([[c == "#" for c in line] for line in art.split()], np.bool_)


def letters(art: str) -> NDArray[np.uint8]:
    """A label map: a letter is a label, a dot is void."""
    return np.array([[0 if c == "." else ord(c) for c in line] for line in art.split()], np.uint8)


def regions_of(label_map: NDArray[np.generic], min_area: int = 1) -> list[Region]:
    return find_regions(label_map.astype(np.uint8), background_ids=(0,), min_area=min_area).regions


def written(points: Sequence[int] | Points) -> str:
    return " ".join(f"{x},{y}" for x, y in zip(points[0::2], points[1::2], strict=True))


def fill(points: Sequence[int] | Points, size_hw: tuple[int, int]) -> Mask:
    """The polygon as CVAT fills it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools sets the shape of an array in place
        decoded = coco.decode(coco.frPyObjects([[float(value) for value in points]], *size_hw))
    return np.asarray(decoded[..., 0], np.bool_)


def signed_area(points: Sequence[int] | Points) -> float:
    x, y = np.array(points[0::2], np.float64), np.array(points[1::2], np.float64)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def check_exact(region: Region, size_hw: tuple[int, int], points: Points) -> None:
    assert len(points) >= 8
    assert len(points) % 2 == 0
    corners = points.reshape(-1, 2)
    steps = np.roll(corners, -1, axis=0) - corners
    assert np.all((steps != 0).sum(axis=1) == 1), "every side is horizontal or vertical, and none has no length"
    # Holes run the other way around: whatever a fill rule counts, the area is that of the pixels.
    assert signed_area(points) == region.area
    expected = np.zeros(size_hw, np.bool_)
    left, top, right, bottom = region.box_xyxy
    expected[top:bottom, left:right] = region.mask
    assert np.array_equal(fill(points, size_hw), expected)


def check_all_exact(label_map: NDArray[np.generic]) -> None:
    regions = regions_of(label_map)
    size_hw = label_map.shape[0], label_map.shape[1]
    for region, points in zip(regions, outlines(regions, size_hw), strict=True):
        check_exact(region, size_hw, points)


class TestExact:
    @pytest.mark.parametrize(
        ("art", "expected"),
        [
            ("#", "0,0 1,0 1,1 0,1"),
            ("### ###", "0,0 3,0 3,2 0,2"),
            ("#. ##", "0,0 1,0 1,1 2,1 2,2 0,2"),
            (".# ##", "1,0 2,0 2,2 0,2 0,1 1,1"),
            # A ring: along the bridge (0,1)-(1,1) into the hole, around it the other way, and back.
            ("### #.# ###", "0,0 3,0 3,3 0,3 0,1 1,1 1,2 2,2 2,1 1,1 0,1"),
            # Two holes beside each other: the right one hangs on the left one.
            ("##### #.#.# #####", "0,0 5,0 5,3 0,3 0,1 1,1 1,2 2,2 2,1 3,1 3,2 4,2 4,1 3,1 2,1 1,1 0,1"),
        ],
    )
    def test_goldens(self, art: str, expected: str) -> None:
        (region,) = regions_of(draw(art))
        points = outline(region)
        assert written(points) == expected
        assert all(type(value) is int for value in points)

    @pytest.mark.parametrize(
        "art",
        [
            "##### #...# #...# #####",  # a wide hole
            "####### #.#.#.# #######",  # three holes in a row
            "##### #.#.# ##### #.#.# #####",  # four holes
            "#### #.## ##.# ####",  # holes that touch by a corner
            "##.. #.#. ##.# .### ####",  # a hole, a notch and a corner touch
            "#.# ### #.#",
            "######### #.......# #.#####.# #.#...#.# #.#.#.#.# #.#.#####",  # a spiral
            "##..## .####. ##..## #....# ######",
            ".#. ### .#.",
            "####### #.....# #.###.# #.#.#.# #.###.# #.....# #######",  # a ring within a ring
        ],
    )
    def test_shapes_are_filled_back(self, art: str) -> None:
        check_all_exact(draw(art))

    def test_in_the_coordinates_of_the_image(self) -> None:
        canvas = np.zeros((30, 40), np.bool_)
        canvas[20:21, 10:12] = True
        (region,) = regions_of(canvas)
        assert outline(region) == [10, 20, 12, 20, 12, 21, 10, 21]

    def test_several_components_and_none(self) -> None:
        def merged(art: str) -> Region:
            parts = regions_of(draw(art))
            order = np.lexsort([np.concatenate([getattr(r, name) for r in parts]) for name in ("starts", "rows")])
            rows, starts, stops = (
                np.concatenate([getattr(r, name) for r in parts])[order] for name in ("rows", "starts", "stops")
            )
            return Region(
                label_id=35, box_xyxy=(0, 0, 9, 9), rows=rows, starts=starts, stops=stops, confidence=1, area=9
            )

        for art, count in (("#. .#", 2), ("#.#.#", 3), ("##### #...# #.#.# #...# #####", 2)):
            with pytest.raises(ValueError, match=f"Region 0 has {count} components.*Split it with find_regions"):
                outline(merged(art))
        nothing = np.empty(0, np.int32)
        with pytest.raises(ValueError, match="A region without pixels has no outline"):
            outline(
                Region(
                    label_id=1, box_xyxy=(0, 0, 1, 1), rows=nothing, starts=nothing, stops=nothing, confidence=1, area=0
                )
            )

    def test_no_regions(self) -> None:
        assert outlines([], (4, 5)) == []
        assert outlines([], (4, 5), tolerance=1) == []

    @pytest.mark.parametrize(
        "shape", [(3, 3), (2, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((4, 3), (4, 4)))]
    )
    def test_every_small_mask(self, shape: tuple[int, int]) -> None:
        seen: set[tuple[tuple[int, ...], bytes]] = set()
        for bits in range(1, 2 ** (shape[0] * shape[1])):
            for region in regions_of((bits >> np.arange(shape[0] * shape[1]) & 1).reshape(shape)):
                mask = region.mask
                if (mask.shape, mask.tobytes()) not in seen:
                    seen.add((mask.shape, mask.tobytes()))
                    check_exact(region, shape, np.array(outline(region), np.int32))
        assert len(seen) > 50

    @pytest.mark.parametrize("density", [0.4, 0.55, 0.65, 0.8, 0.95])
    def test_random_masks(self, density: float) -> None:
        rng = np.random.default_rng(int(density * 100))
        for _ in range(15):
            check_all_exact(rng.random((rng.integers(1, 30), rng.integers(1, 40))) < density)

    def test_thousands_of_holes(self) -> None:
        mask = np.random.default_rng(0).random((150, 300)) < 0.8
        region = regions_of(mask)[0]
        check_exact(region, (150, 300), np.array(outline(region), np.int32))

    def test_one_by_one_and_together_are_the_same(self) -> None:
        regions = regions_of(np.random.default_rng(3).integers(0, 4, (40, 60)))
        for region, points in zip(regions, outlines(regions, (40, 60)), strict=True):
            assert points.dtype == np.int32
            assert outline(region) == points.tolist()


def edges_of(polygons: Sequence[Points]) -> Counter[tuple[int, int, int, int]]:
    """How often each directed side occurs in the polygons, without those walked in both directions by one (bridges)."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    for points in polygons:
        corners = points.reshape(-1, 2)
        own = Counter(map(tuple, np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1).tolist()))
        for (a, b, c, d), count in own.items():
            bridged = own.get((c, d, a, b), 0)
            if count > bridged:
                found[a, b, c, d] += count - bridged
    return found


def distance(points: NDArray[np.float64], segments: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 2) points, (m, 4) segments → (n,) distance of each point to the nearest segment."""
    start, along = segments[:, :2], segments[:, 2:] - segments[:, :2]
    away = points[:, None] - start
    share = np.clip((away * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-9), 0, 1)
    nearest: NDArray[np.float64] = np.sqrt(((away - share[..., None] * along) ** 2).sum(-1)).min(axis=1)
    return nearest


def sides(points: Points) -> NDArray[np.float64]:
    corners = points.reshape(-1, 2).astype(np.float64)
    return np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1)


def covered(polygons: Sequence[Points], at: NDArray[np.float64]) -> NDArray[np.int64]:
    """(polygons, n) how often each polygon winds around each point."""
    turns = np.zeros((len(polygons), len(at)), np.int64)
    for number, points in enumerate(polygons):
        for x1, y1, x2, y2 in sides(points):
            if y1 != y2:
                crosses = (y1 <= at[:, 1]) != (y2 <= at[:, 1])
                right = x1 + (at[:, 1] - y1) * (x2 - x1) / (y2 - y1) > at[:, 0]
                turns[number] += (crosses & right) * (1 if y2 > y1 else -1)
    return turns


def check_simplified(label_map: NDArray[np.generic], tolerance: float, min_area: int = 1) -> None:
    """Everything that simplified outlines promise, on geometry alone."""
    regions = regions_of(label_map, min_area)
    size_hw = height, width = label_map.shape[0], label_map.shape[1]
    polygons = outlines(regions, size_hw, tolerance=tolerance)
    exact = outlines(regions, size_hw)
    if not regions:
        assert polygons == []
        return
    owner = np.full(size_hw, -1)
    for number, region in enumerate(regions):
        left, top, right, bottom = region.box_xyxy
        owner[top:bottom, left:right][region.mask] = number
    for points, before in zip(polygons, exact, strict=True):
        assert len(points) >= 6
        assert len(points) % 2 == 0
        assert signed_area(points) > 0, "no region collapses or turns inside out"
        # Corners stay corners; both ways no farther than the tolerance.
        assert {*map(tuple, points.reshape(-1, 2).tolist())} <= {
            (x, y) for x in range(width + 1) for y in range(height + 1)
        }
        ends, sided = before.reshape(-1, 2).astype(np.float64), sides(points)
        assert distance(ends, sided).max() <= tolerance + 1e-9
        along = np.linspace(0, 1, 9)[:, None, None]
        walked = (sided[:, :2] + along * (sided[:, 2:] - sided[:, :2])).reshape(-1, 2)
        assert distance(walked, sides(before)).max() <= tolerance + 1e-9
    # Each side is in two polygons, in opposite directions, or in one, beside void or on the edge of the image.
    found = edges_of(polygons)
    assert not found or max(found.values()) == 1
    alone = [edge for edge in found if (edge[2], edge[3], edge[0], edge[1]) not in found]
    full = min_area == 1 and bool((label_map != 0).all())
    for x1, y1, x2, y2 in alone:
        on_edge = x1 == x2 in (0, width) or y1 == y2 in (0, height)
        assert on_edge or not full
    # No point is in two polygons, and between neighbours none is in no polygon.
    spots = (np.indices((height * 2, width * 2))[::-1].reshape(2, -1).T + np.array([0.437, 0.571])) / 2
    turns = covered(polygons, spots)
    assert set(np.unique(turns)) <= {0, 1}
    assert turns.sum(axis=0).max(initial=0) <= 1
    if full:
        assert turns.sum(axis=0).min() == 1
    # Far from every boundary each region is where it was.
    boundary = np.concatenate([sides(points) for points in exact])
    deep = distance(spots, boundary) > tolerance
    pixel = owner[spots[deep, 1].astype(int), spots[deep, 0].astype(int)]
    inside = np.where(turns[:, deep].any(axis=0), turns[:, deep].argmax(axis=0), -1)
    assert np.array_equal(pixel, inside)


def blobs(rng: np.random.Generator, size_hw: tuple[int, int], labels: int, smooth: int) -> NDArray[np.uint8]:
    """A random label map with rounded regions; label 0 is void."""
    fields = rng.random((labels, *size_hw))
    for _ in range(smooth):
        fields = fields + np.roll(fields, 1, 1) + np.roll(fields, -1, 1)
        fields = fields + np.roll(fields, 1, 2) + np.roll(fields, -1, 2)
    return fields.argmax(axis=0).astype(np.uint8)


class TestSimplified:
    @pytest.mark.parametrize(
        ("art", "tolerance", "expected"),
        [
            # A staircase becomes its diagonal; both sides keep the same two points.
            (
                "abbb aabb aaab aaaa",
                1.0,
                "0,0 1,0 4,3 4,4 0,4 | 1,0 4,0 4,3",
            ),
            # The edge of the image and the points where three regions meet stay.
            (
                "aab aab ccb",
                1.0,
                "0,0 2,0 2,2 0,2 | 2,0 3,0 3,3 2,3 2,2 | 0,2 2,2 2,3 0,3",
            ),
            # The bottom of a notch of one pixel is one pixel away from the line over it.
            ("....... aaa.aaa aaaaaaa", 1.0, "0,1 7,1 7,3 0,3"),
            ("....... aaa.aaa aaaaaaa", 0.9, "0,1 3,1 3,2 7,1 7,3 0,3"),
        ],
    )
    def test_goldens(self, art: str, tolerance: float, expected: str) -> None:
        label_map = letters(art)
        regions = sorted(regions_of(label_map), key=lambda region: region.label_id)
        size_hw = label_map.shape[0], label_map.shape[1]
        assert " | ".join(map(written, outlines(regions, size_hw, tolerance=tolerance))) == expected

    @pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.0, 5.0])
    @pytest.mark.parametrize(
        "art",
        [
            "a",
            "aaa aba aaa",  # an island of one pixel
            "...... .aaaa. .a..a. .abca. .aaaa. ......",
            "aaaaaaaa bbbbbbbb aaaaaaaa",  # a strip of one pixel
            "aaaa...a abba..aa aaaa.aaa",
            "a.a.a .a.a. a.a.a",  # corners touch
            "ab ba",
            "........ .aaaaaa. .a....a. .a.bb.a. .a.bb.a. .a....a. .aaaaaa. ........",  # in the void in a hole
            "........ .aaa.... .a...b.. .aaa.... ........",  # a pixel in front of a bay
            "aaaaaaaaab aaaaaaabbb aaaaabbbbb aaabbbbbbb abbbbbbbbb",
            "abbbbbbbbb aabbbbbbbb caaabbbbbb ccccaaabbb ccccccccaa",  # a thin wedge
            # Half of a chord that is cut because it meets another may be too far away where the whole one was not.
            "bbbbb baabb dd... dddd. dddd. ddddd",
            # An island in a bay: the chord over the bay meets neither.
            ".....aaaaa .....aaaaa ........aa ......b.aa ........aa .....aaaaa .....aaaaa",
            # An arch between a and c: the chord under it meets nothing, but a would be below c.
            "aaaaaaaaaaa aabbbbbbbaa aabcccccbaa aabccdccbaa aabcccccbaa ccccccccccc",
        ],
    )
    def test_shapes(self, art: str, tolerance: float) -> None:
        check_simplified(letters(art), tolerance)

    @pytest.mark.parametrize("tolerance", [0.7, 1.0, 2.0, 4.0])
    def test_random_label_maps(self, tolerance: float) -> None:
        rng = np.random.default_rng(int(10 * tolerance))
        for smooth in (0, 1, 2, 3):
            check_simplified(blobs(rng, (16, 24), 4, smooth), tolerance)
            check_simplified(blobs(rng, (16, 24), 3, smooth) + 1, tolerance)
            check_simplified(blobs(rng, (16, 24), 4, smooth), tolerance, min_area=5)

    @pytest.mark.slow
    @pytest.mark.parametrize("tolerance", [0.5, 1.0, 1.5, 3.0, 8.0])
    def test_many_random_label_maps(self, tolerance: float) -> None:
        rng = np.random.default_rng(int(10 * tolerance) + 1)
        for turn in range(400):
            size_hw = int(rng.integers(1, 28)), int(rng.integers(1, 28))
            label_map = blobs(rng, size_hw, int(rng.integers(1, 6)), turn % 4) + rng.integers(0, 2)
            check_simplified(label_map, tolerance, min_area=int(rng.choice([1, 1, 4])))

    def test_no_tolerance_keeps_every_corner(self) -> None:
        regions = regions_of(blobs(np.random.default_rng(0), (40, 60), 4, 2))
        exact, close = outlines(regions, (40, 60)), outlines(regions, (40, 60), tolerance=1e-6)
        for region, before, after in zip(regions, exact, close, strict=True):
            assert {*map(tuple, before.reshape(-1, 2).tolist())} <= {*map(tuple, after.reshape(-1, 2).tolist())}
            check_region = np.zeros((40, 60), np.bool_)
            left, top, right, bottom = region.box_xyxy
            check_region[top:bottom, left:right] = region.mask
            assert np.array_equal(fill(after, (40, 60)), check_region)

    def test_fewer_points_and_nearly_all_pixels(self) -> None:
        label_map = np.kron(blobs(np.random.default_rng(5), (16, 32), 4, 2), np.ones((8, 8), np.uint8)) + 1
        rows, columns = np.indices(label_map.shape)
        label_map = label_map[rows, (columns + (6 * np.sin(rows / 9)).astype(int)) % label_map.shape[1]]
        regions = regions_of(label_map, 100)
        size_hw = label_map.shape
        exact, simple = outlines(regions, size_hw), outlines(regions, size_hw, tolerance=1)
        assert sum(map(len, simple)) < 0.6 * sum(map(len, exact))
        painted, twice = np.zeros(size_hw, np.bool_), np.zeros(size_hw, np.bool_)
        for before, after in zip(exact, simple, strict=True):
            old, new = fill(before, size_hw), fill(after, size_hw)
            assert np.count_nonzero(old & new) >= 0.95 * np.count_nonzero(old)
            twice |= painted & new
            painted |= new
        missing = np.any([fill(points, size_hw) for points in exact], axis=0) & ~painted
        assert missing.mean() < 0.002
        assert twice.mean() < 0.002

    def test_neighbours_do_not_depend_on_the_order_of_the_regions(self) -> None:
        regions = regions_of(blobs(np.random.default_rng(9), (40, 60), 4, 2))
        once = outlines(regions, (40, 60), tolerance=1)
        again = outlines(regions[::-1], (40, 60), tolerance=1)[::-1]
        assert edges_of(once) == edges_of(again)
        repeated = outlines(regions, (40, 60), tolerance=1)
        assert all(np.array_equal(a, b) for a, b in zip(once, repeated, strict=True))

    def test_noise_stays_exact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        regions = regions_of(blobs(np.random.default_rng(0), (40, 60), 4, 2))
        exact, close = outlines(regions, (40, 60)), outlines(regions, (40, 60), tolerance=2)
        assert sum(map(len, close)) < sum(map(len, exact))
        monkeypatch.setattr("sscloud.outlines.MOST_SIMPLIFIED", 100)
        noisy = outlines(regions, (40, 60), tolerance=2)
        assert all(np.array_equal(a, b) for a, b in zip(exact, noisy, strict=True))

    @pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
    def test_tolerances_that_make_no_sense(self, tolerance: float) -> None:
        with pytest.raises(ValueError, match=r"The tolerance is .*; it is 0 or more pixels"):
            outlines(regions_of(draw("#")), (1, 1), tolerance=tolerance)


class TestPointsJson:
    def test_is_the_list_without_brackets(self) -> None:
        polygons = [np.array(values, np.int32) for values in ([0, 9, 10, 99, 100, 8192], [], [0], [65535, 0])]
        assert points_json(polygons) == ["0,9,10,99,100,8192", "", "0", "65535,0"]
        assert points_json([]) == []
        assert points_json(polygons[1:2]) == [""]

    def test_of_outlines(self) -> None:
        polygons = outlines(regions_of(blobs(np.random.default_rng(0), (64, 128), 4, 1)), (64, 128))
        for polygon, text in zip(polygons, points_json(polygons), strict=True):
            assert json.loads(f"[{text}]") == polygon.tolist()
