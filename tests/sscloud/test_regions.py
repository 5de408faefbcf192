"""Regions as runs: components, limits, confidence, and the label map that they rebuild."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.regions import components, find_regions, smallest_region
from sscloud.upsample import Interpolated


def exact(confidence: NDArray[np.float32]) -> Interpolated:
    """A probability that is known for every pixel."""
    return Interpolated(values=confidence, size_hw=(confidence.shape[0], confidence.shape[1]), wrap=False)


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
        regions, specks, surplus = find_regions(self.LABELS, exact(self.CONFIDENCE), background_ids=(0,))
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
        regions = find_regions(self.LABELS, exact(self.CONFIDENCE)).regions
        assert sum(region.area for region in regions) == 20
        assert {region.label_id for region in regions} == {0, 2, 6}

    def test_threshold_drops_pixels_below_it_and_keeps_those_at_it(self) -> None:
        confidence = np.full((4, 5), 0.5, np.float32)
        confidence[0, 4] = confidence[2, 2] = 0.49
        regions = find_regions(self.LABELS, exact(confidence), background_ids=(0,), threshold=0.5).regions
        assert sorted((r.label_id, r.area) for r in regions) == [(2, 1), (2, 2), (2, 3), (6, 1), (6, 1), (6, 1), (6, 1)]
        assert find_regions(self.LABELS, exact(confidence), threshold=0.51).regions == []

    def test_min_area_counts_the_specks(self) -> None:
        regions, specks, surplus = find_regions(self.LABELS, exact(self.CONFIDENCE), background_ids=(0,), min_area=3)
        assert [region.area for region in regions] == [4, 3, 3]
        assert (specks, surplus) == (2, 0)

    @pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 9])
    def test_max_regions_keeps_the_largest_and_counts_the_rest(self, limit: int) -> None:
        regions, specks, surplus = find_regions(
            self.LABELS, exact(self.CONFIDENCE), background_ids=(0,), min_area=1, max_regions=limit
        )
        assert [region.area for region in regions] == [4, 3, 3, 1, 1][:limit]
        assert (specks, surplus) == (0, max(0, 5 - limit))

    def test_counts_agree_with_a_flood_fill(self) -> None:
        rng = np.random.default_rng(4)
        for _ in range(6):
            label_map = rng.choice(np.array([0, 2, 255], np.uint8), (20, 30))
            expected = [(i, area) for i, area in flood(label_map) if i != 0]
            regions, specks, surplus = find_regions(label_map, background_ids=(0,), min_area=4, max_regions=8)
            large = sorted((area for _, area in expected if area >= 4), reverse=True)
            assert [region.area for region in regions] == large[:8]
            assert specks == sum(area < 4 for _, area in expected)
            assert surplus == max(0, len(large) - 8)

    def test_regions_rebuild_the_label_map(self) -> None:
        label_map = np.random.default_rng(1).choice(np.array([0, 2, 5, 66], np.uint8), (64, 128))
        back = np.zeros_like(label_map)
        for region in find_regions(label_map, background_ids=(0,)).regions:
            left, top, right, bottom = region.box_xyxy
            assert not back[top:bottom, left:right][region.mask].any()
            assert region.area == region.mask.sum()
            back[top:bottom, left:right][region.mask] = region.label_id
        assert np.array_equal(back, label_map)

    def test_nothing_there(self) -> None:
        empty = find_regions(np.zeros((4, 5), np.uint8), exact(self.CONFIDENCE), background_ids=(0,))
        assert empty == ([], 0, 0)

    @pytest.mark.parametrize("wrap", [False, True])
    def test_confidence_is_the_mean_of_the_interpolated_pixels(self, wrap: bool) -> None:
        rng = np.random.default_rng(2)
        label_map = rng.choice(np.array([2, 5], np.uint8), (40, 90), p=[0.7, 0.3])
        confidence = Interpolated(values=rng.random((4, 9), np.float32), size_hw=(40, 90), wrap=wrap)
        full = confidence.full()
        for region in find_regions(label_map, confidence).regions:
            left, top, right, bottom = region.box_xyxy
            assert region.confidence == pytest.approx(full[top:bottom, left:right][region.mask].mean(), abs=1e-6)

    def test_a_threshold_cuts_inside_a_run(self) -> None:
        confidence = exact(np.array([[0.9, 0.2, 0.9, 0.9]], np.float32))
        regions = find_regions(np.full((1, 4), 2, np.uint8), confidence, threshold=0.5).regions
        assert [region.box_xyxy for region in regions] == [(2, 0, 4, 1), (0, 0, 1, 1)]

    def test_runs_are_maximal_and_in_order(self) -> None:
        label_map = np.random.default_rng(3).choice(np.array([0, 2], np.uint8), (32, 48))
        for region in find_regions(label_map, background_ids=(0,)).regions:
            begin, end = region.crop_runs()
            assert (begin < end).all()
            assert (region.rows[1:] * 1000 + region.starts[1:] > region.rows[:-1] * 1000 + region.stops[:-1]).all()
            assert (end - begin).sum() == region.area
            assert region.rows.dtype == region.starts.dtype == region.stops.dtype == np.int32

    def test_strips_of_rows_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        label_map = np.random.default_rng(5).choice(np.array([0, 2, 5], np.uint8), (33, 20))
        confidence = exact(np.random.default_rng(6).random((33, 20), np.float32))

        def found() -> list[tuple[int, tuple[int, ...], int, float]]:
            regions = find_regions(label_map, confidence, threshold=0.3).regions
            return [(r.label_id, r.box_xyxy, r.area, r.confidence) for r in regions]

        whole = found()
        monkeypatch.setattr("sscloud.regions._STRIP_PIXELS", 1)
        assert found() == whole


class TestComponents:
    def test_a_spiral_is_one(self) -> None:
        art = ["#######", "......#", "#####.#", "#...#.#", "#.###.#", "#.....#", "#######"]
        mask = np.array([[c == "#" for c in line] for line in art], np.uint8)
        assert len(find_regions(mask, background_ids=(0,)).regions) == 1

    def test_without_labels_all_runs_are_alike(self) -> None:
        rows, starts, stops = (np.array(values, np.int32) for values in ([0, 0, 1, 3], [0, 5, 1, 1], [2, 9, 6, 2]))
        assert components(rows, starts, stops).tolist() == [0, 0, 0, 1]

    def test_touching_by_a_corner_is_apart(self) -> None:
        rows, starts, stops = (np.array(values, np.int32) for values in ([0, 1], [0, 2], [2, 4]))
        assert components(rows, starts, stops).tolist() == [0, 1]

    def test_none(self) -> None:
        none = np.empty(0, np.int32)
        assert components(none, none, none).tolist() == []


@pytest.mark.parametrize(("scale", "pixels"), [(1, 1), (0.5, 4), (0.1, 100)])
def test_smallest_region(scale: float, pixels: int) -> None:
    assert smallest_region(scale) == pixels
