"""Regions, outlines on pixel edges, masks as JSON, and an answer painted back."""

import json
import re
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from sscloud.shapes import find_regions, mask_json, outline, paint_answer

Mask = NDArray[np.bool_]


def draw(art: str) -> Mask:
    return np.array([[c == "#" for c in line] for line in art.split()], np.bool_)


def fill(points: list[int], size_hw: tuple[int, int]) -> Mask:
    """The polygon as CVAT fills it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools sets the shape of an array in place
        decoded = coco.decode(coco.frPyObjects([points], *size_hw))
    return np.asarray(decoded[..., 0], np.bool_)


def signed_area(points: list[int]) -> float:
    x, y = np.array(points[0::2]), np.array(points[1::2])
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def check_outline(mask: Mask, offset_xy: tuple[int, int] = (0, 0)) -> None:
    points = outline(mask, offset_xy=offset_xy)
    assert all(type(value) is int for value in points)
    assert len(points) >= 8
    assert len(points) % 2 == 0
    corners = np.array(points).reshape(-1, 2)
    steps = np.roll(corners, -1, axis=0) - corners
    assert np.all((steps != 0).sum(axis=1) == 1), "every side is horizontal or vertical, and none has no length"
    # Holes run the other way around: whatever a fill rule counts, the area is that of the pixels.
    assert signed_area(points) == mask.sum()
    height, width = mask.shape[0] + offset_xy[1], mask.shape[1] + offset_xy[0]
    expected = np.zeros((height, width), np.bool_)
    expected[offset_xy[1] :, offset_xy[0] :] = mask
    assert np.array_equal(fill(points, (height, width)), expected)


def components(mask: Mask) -> Iterator[Mask]:
    found = find_regions(mask.astype(np.uint8), np.ones(mask.shape, np.float32), background_ids=(0,))
    for region in found.regions:
        yield region.mask


class TestOutline:
    @pytest.mark.parametrize(
        ("art", "expected"),
        [
            ("#", "0,0 1,0 1,1 0,1"),
            ("### ###", "0,0 3,0 3,2 0,2"),
            ("#. ##", "0,0 1,0 1,1 2,1 2,2 0,2"),
            (".# ##", "1,0 2,0 2,2 0,2 0,1 1,1"),
            # A ring: along the bridge (0,1)-(1,1) into the hole, around it the other way, and back.
            ("### #.# ###", "0,0 3,0 3,3 0,3 0,1 1,1 1,2 2,2 2,1 1,1 0,1"),
        ],
    )
    def test_goldens(self, art: str, expected: str) -> None:
        points = outline(draw(art))
        assert " ".join(f"{x},{y}" for x, y in zip(points[0::2], points[1::2], strict=True)) == expected

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
        ],
    )
    def test_shapes_are_filled_back(self, art: str) -> None:
        for mask in components(draw(art)):
            check_outline(mask)

    def test_a_region_inside_a_hole_is_another_region(self) -> None:
        nested = draw("####### #.....# #.###.# #.#.#.# #.###.# #.....# #######")
        rings = sorted(components(nested), key=lambda mask: -mask.sum())
        assert [int(mask.sum()) for mask in rings] == [24, 8]
        for mask in rings:
            check_outline(mask)

    def test_pixels_that_touch_by_a_corner_are_apart(self) -> None:
        assert len(list(components(draw("#. .#")))) == 2
        with pytest.raises(ValueError, match=r"The mask has 2 components.*Split it with find_regions"):
            outline(draw("#. .#"))

    def test_several_components_and_none(self) -> None:
        with pytest.raises(ValueError, match="The mask has 3 components"):
            outline(draw("#.#.#"))
        with pytest.raises(ValueError, match="An empty mask has no outline"):
            outline(np.zeros((3, 3), np.bool_))
        with pytest.raises(ValueError, match="The mask has 2 components"):
            outline(draw("##### #...# #.#.# #...# #####"))

    def test_offset(self) -> None:
        assert outline(draw("##"), offset_xy=(10, 20)) == [10, 20, 12, 20, 12, 21, 10, 21]
        check_outline(draw("### #.# ###"), (7, 3))

    @pytest.mark.parametrize("shape", [(3, 3), (2, 5), (4, 3), pytest.param((4, 4), marks=pytest.mark.slow)])
    def test_every_small_mask(self, shape: tuple[int, int]) -> None:
        seen: set[tuple[tuple[int, ...], bytes]] = set()
        for bits in range(1, 2 ** (shape[0] * shape[1])):
            mask = (bits >> np.arange(shape[0] * shape[1]) & 1).astype(np.bool_).reshape(shape)
            for component in components(mask):
                key = (component.shape, component.tobytes())
                if key not in seen:
                    seen.add(key)
                    check_outline(component)
        assert len(seen) > 50

    @pytest.mark.parametrize("density", [0.4, 0.55, 0.65, 0.8, 0.95])
    def test_random_masks(self, density: float) -> None:
        rng = np.random.default_rng(int(density * 100))
        for _ in range(15):
            mask = rng.random((rng.integers(1, 30), rng.integers(1, 40))) < density
            for component in components(mask):
                check_outline(component, (int(rng.integers(0, 9)), int(rng.integers(0, 9))))

    def test_thousands_of_holes(self) -> None:
        rng = np.random.default_rng(0)
        mask = rng.random((150, 300)) < 0.8
        check_outline(max(components(mask), key=lambda part: int(part.sum())))


def flood(label_map: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(label id, area) of every 4-connected component, by a plain flood fill."""
    height, width = label_map.shape
    seen = np.zeros((height, width), np.bool_)
    found = []
    for y in range(height):
        for x in range(width):
            if seen[y, x]:
                continue
            stack, area = [(y, x)], 0
            seen[y, x] = True
            while stack:
                a, b = stack.pop()
                area += 1
                for c, d in ((a - 1, b), (a + 1, b), (a, b - 1), (a, b + 1)):
                    inside = 0 <= c < height and 0 <= d < width
                    if inside and not seen[c, d] and label_map[c, d] == label_map[y, x]:
                        seen[c, d] = True
                        stack.append((c, d))
            found.append((int(label_map[y, x]), area))
    return found


class TestFindRegions:
    LABELS = np.array(
        [
            [2, 2, 0, 6, 6],
            [2, 0, 0, 0, 6],
            [0, 2, 2, 6, 0],
            [6, 0, 2, 2, 0],
        ],
        np.uint8,
    )
    CONFIDENCE = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)

    def test_boxes_masks_and_areas(self) -> None:
        regions, specks, surplus = find_regions(self.LABELS, self.CONFIDENCE, background_ids=(0,))
        assert (specks, surplus) == (0, 0)
        found = [(r.label_id, r.box_xyxy, r.area, r.mask.astype(int).tolist()) for r in regions]
        assert found == [
            (2, (1, 2, 4, 4), 4, [[1, 1, 0], [0, 1, 1]]),
            (2, (0, 0, 2, 2), 3, [[1, 1], [1, 0]]),
            (6, (3, 0, 5, 2), 3, [[1, 1], [0, 1]]),
            (6, (3, 2, 4, 3), 1, [[1]]),
            (6, (0, 3, 1, 4), 1, [[1]]),
        ]
        for region in regions:
            assert region.mask.dtype == np.bool_
            left, top, right, bottom = region.box_xyxy
            assert region.confidence == pytest.approx(self.CONFIDENCE[top:bottom, left:right][region.mask].mean())

    def test_without_background_ids_everything_is_a_region(self) -> None:
        regions = find_regions(self.LABELS, self.CONFIDENCE).regions
        assert sum(region.area for region in regions) == 20
        assert {region.label_id for region in regions} == {0, 2, 6}

    def test_threshold_drops_pixels_below_it_and_keeps_those_at_it(self) -> None:
        confidence = np.full((4, 5), 0.5, np.float32)
        confidence[0, 4] = confidence[2, 2] = 0.49
        regions = find_regions(self.LABELS, confidence, background_ids=(0,), threshold=0.5).regions
        assert sorted((r.label_id, r.area) for r in regions) == [(2, 1), (2, 2), (2, 3), (6, 1), (6, 1), (6, 1), (6, 1)]
        assert find_regions(self.LABELS, confidence, threshold=0.51).regions == []

    def test_min_area_counts_the_specks(self) -> None:
        regions, specks, surplus = find_regions(self.LABELS, self.CONFIDENCE, background_ids=(0,), min_area=3)
        assert [region.area for region in regions] == [4, 3, 3]
        assert (specks, surplus) == (2, 0)

    @pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 9])
    def test_max_regions_keeps_the_largest_and_counts_the_rest(self, limit: int) -> None:
        regions, specks, surplus = find_regions(
            self.LABELS, self.CONFIDENCE, background_ids=(0,), min_area=1, max_regions=limit
        )
        assert [region.area for region in regions] == [4, 3, 3, 1, 1][:limit]
        assert (specks, surplus) == (0, max(0, 5 - limit))

    def test_counts_agree_with_a_flood_fill(self) -> None:
        rng = np.random.default_rng(4)
        for _ in range(6):
            label_map = rng.choice(np.array([0, 2, 255], np.uint8), (20, 30))
            expected = [(i, area) for i, area in flood(label_map) if i != 0]
            regions, specks, surplus = find_regions(
                label_map, np.ones((20, 30), np.float32), background_ids=(0,), min_area=4, max_regions=8
            )
            large = sorted((area for _, area in expected if area >= 4), reverse=True)
            assert [region.area for region in regions] == large[:8]
            assert specks == sum(area < 4 for _, area in expected)
            assert surplus == max(0, len(large) - 8)

    def test_regions_rebuild_the_label_map(self) -> None:
        label_map = np.random.default_rng(1).choice(np.array([0, 2, 5, 66], np.uint8), (64, 128))
        back = np.zeros_like(label_map)
        for region in find_regions(label_map, np.ones((64, 128), np.float32), background_ids=(0,)).regions:
            left, top, right, bottom = region.box_xyxy
            assert not back[top:bottom, left:right][region.mask].any()
            assert region.area == region.mask.sum()
            back[top:bottom, left:right][region.mask] = region.label_id
        assert np.array_equal(back, label_map)

    def test_nothing_there(self) -> None:
        empty = find_regions(np.zeros((4, 5), np.uint8), self.CONFIDENCE, background_ids=(0,))
        assert empty == ([], 0, 0)


class TestMaskJson:
    @pytest.mark.parametrize("art", ["#", ".", "#.# .#.", "...."])
    def test_is_the_list_without_brackets(self, art: str) -> None:
        mask = draw(art)
        assert json.loads(f"[{mask_json(mask)}]") == mask.astype(int).ravel().tolist()

    def test_golden(self) -> None:
        assert mask_json(draw("#.. .##")) == "1,0,0,0,1,1"

    def test_views_and_empty_masks(self) -> None:
        mask = np.random.default_rng(0).random((9, 7)) < 0.5
        for view in (mask.T, mask[::-1], mask[2:5, 1:3]):
            assert json.loads(f"[{mask_json(view)}]") == view.astype(int).ravel().tolist()
        assert mask_json(np.zeros((0, 0), np.bool_)) == ""


class TestPaintAnswer:
    def paint(self, *items: tuple[str, list[int]]) -> list[list[int]]:
        answer = [{"label": label, "mask": mask} for label, mask in items]
        found = paint_answer(answer, (3, 4), label_id_of={"a": 2, "b": 66}.__getitem__, fill=9)
        assert found.dtype == np.uint8
        assert found.shape == (3, 4)
        rows: list[list[int]] = found.tolist()
        return rows

    def test_boxes_are_inclusive_and_later_items_cover_earlier_ones(self) -> None:
        assert self.paint(("a", [1, 1, 1, 0, 1, 1, 0, 0, 2, 1]), ("b", [1, 2, 0, 2, 0])) == [
            [2, 2, 66, 9],
            [9, 2, 2, 9],
            [9, 9, 9, 9],
        ]

    def test_no_item_leaves_the_fill(self) -> None:
        assert self.paint() == [[9] * 4] * 3

    def test_the_whole_image(self) -> None:
        assert self.paint(("b", [1] * 12 + [0, 0, 3, 2])) == [[66] * 4] * 3

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([1, 1, 1, 0, 0, 1, 1], "A mask of 3 pixels with the box x 0-1, y 0-1 does not fit an image of 4x3"),
            ([1, 4, 0, 4, 0], "the box x 4-4, y 0-0 does not fit"),
            ([1, 0, 3, 0, 3], "the box x 0-0, y 3-3 does not fit"),
            ([1, -1, 0, -1, 0], "the box x -1--1, y 0-0 does not fit"),
            ([2, 1, 1, 0], "A mask of 0 pixels with the box x 2-1, y 1-0 does not fit"),
        ],
    )
    def test_masks_that_do_not_fit(self, mask: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.paint(("a", mask))

    def test_round_trip_of_regions(self) -> None:
        label_map = np.random.default_rng(1).choice(np.array([0, 2, 66], np.uint8), (16, 24))
        regions = find_regions(label_map, np.ones((16, 24), np.float32), background_ids=(0,)).regions
        items = []
        for region in regions:
            left, top, right, bottom = region.box_xyxy
            mask = [*json.loads(f"[{mask_json(region.mask)}]"), left, top, right - 1, bottom - 1]
            items.append({"label": str(region.label_id), "mask": mask})
        assert np.array_equal(paint_answer(items, (16, 24), label_id_of=int, fill=0), label_map)
