"""Regions within a budget of crop pixels: split where they are thin, sent as polygons where nothing else helps."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud import budget
from sscloud.budget import BudgetResult, crop_area, within_budget
from sscloud.regions import Region, find_regions

Labels = NDArray[np.uint8]


def regions_of(label_map: NDArray[np.generic]) -> list[Region]:
    return find_regions(label_map.astype(np.uint8), background_ids=(0,)).regions


def draw(art: str, pixel: int = 1) -> Labels:
    """A label map of characters, each drawn as a square of pixels."""
    small = np.array([[0 if c == "." else 1 for c in line] for line in art.split()], np.uint8)
    return np.kron(small, np.ones((pixel, pixel), np.uint8))


def crops(regions: Sequence[Region]) -> int:
    return sum(map(crop_area, regions))


def check(regions: Sequence[Region], size_hw: tuple[int, int], limit: int) -> BudgetResult:
    """Everything that a result promises."""
    result = within_budget(regions, max_crop_area=limit)
    assert crops(result.masks) <= limit
    assert all(any(polygon is region for region in regions) for polygon in result.polygons), "whole regions"
    assert len(result.masks) + len(result.polygons) <= len(regions) + budget.MAX_PIECES
    areas = [piece.area for piece in result.masks]
    assert areas == sorted(areas, reverse=True)
    owner = np.full(size_hw, -1)
    for number, region in enumerate(regions):
        left, top, right, bottom = region.box_xyxy
        owner[top:bottom, left:right][region.mask] = number
    times = np.zeros(size_hw, int)
    pieces_of = [0] * len(regions)
    for piece in [*result.masks, *result.polygons]:
        left, top, right, bottom = piece.box_xyxy
        mask = piece.mask
        assert mask.any(axis=0).all(), "the box is tight"
        assert mask.any(axis=1).all(), "the box is tight"
        assert mask.sum() == piece.area
        (own,) = set(owner[top:bottom, left:right][mask].tolist())
        whole = regions[own]
        pieces_of[own] += 1
        assert (piece.label_id, piece.confidence) == (whole.label_id, whole.confidence)
        times[top:bottom, left:right] += mask
        # 4-connected, and in maximal runs: found again as one and the same region.
        (again,) = regions_of(mask)
        for ours, theirs, offset in (
            (piece.rows, again.rows, top),
            (piece.starts, again.starts, left),
            (piece.stops, again.stops, left),
        ):
            assert ours.dtype == np.int32
            assert np.array_equal(ours - offset, theirs)
    assert np.array_equal(times == 1, owner >= 0)
    assert times.max(initial=0) <= 1
    assert result.splits == sum(count > 1 for count in pieces_of)
    return result


class TestGoldens:
    @pytest.mark.parametrize(
        ("art", "expected"),
        [
            # Two arms: cut where they meet.
            ("#..... #..... #..... ######", ["0,0 1,4", "1,3 6,4"]),
            # A bar with an antenna, thinner than any piece that would be worth a mask of its own: still cut off.
            ("....#.... ....#.... ....#.... ######### #########", ["4,0 5,3", "0,3 9,5"]),
            # A ring: halved first, for no single cut makes the crops smaller.
            ("###### #....# #....# #....# #....# ######", None),
            # Steps.
            ("##.... ##.... .##... .###.. ..##.. ..####", None),
            ("##.... .##... ..##.. ...##. ....##", None),
        ],
    )
    def test_sprawling_shapes(self, art: str, expected: list[str] | None) -> None:
        label_map = draw(art, pixel=80)
        size_hw = label_map.shape[0], label_map.shape[1]
        regions = regions_of(label_map)
        result = check(regions, size_hw, crops(regions) * 2 // 3)
        assert result.polygons == []
        assert result.splits == 1
        if expected is not None:
            boxes = sorted(
                ((left, top, right, bottom) for left, top, right, bottom in (r.box_xyxy for r in result.masks)),
                key=lambda box: (box[1], box[0]),
            )
            assert [f"{a // 80},{b // 80} {c // 80},{d // 80}" for a, b, c, d in boxes] == expected

    def test_below_the_budget_nothing_changes(self) -> None:
        regions = regions_of(draw("#..... #..... ######", pixel=80))
        result = within_budget(regions, max_crop_area=crops(regions))
        assert result == BudgetResult(masks=regions, polygons=[], splits=0)
        assert within_budget([], max_crop_area=0) == BudgetResult(masks=[], polygons=[], splits=0)

    def test_it_stops_as_soon_as_the_budget_holds(self) -> None:
        label_map = draw("#...#...#...# #...#...#...# #############", pixel=80)
        (comb,) = regions_of(label_map)
        numbers = [
            len(check([comb], label_map.shape, crop_area(comb) * share // 100).masks) for share in (100, 90, 80, 70)
        ]
        assert numbers[0] == 1
        assert numbers == sorted(set(numbers))

    def test_what_fills_its_crop_goes_as_polygon_the_largest_first(self) -> None:
        label_map = draw("####.###.##", pixel=100)
        regions = regions_of(label_map)
        for limit, sent in (
            (90_000, []),
            (89_999, [40_000]),
            (49_999, [40_000, 30_000]),
            (0, [40_000, 30_000, 20_000]),
        ):
            result = check(regions, label_map.shape, limit)
            assert [polygon.area for polygon in result.polygons] == sent
            assert result.splits == 0

    def test_a_region_that_cutting_helps_is_not_sent_as_polygon(self) -> None:
        label_map = draw("#....#### #....#### #........ #########", pixel=80)
        regions = regions_of(label_map)
        result = check(regions, label_map.shape, int(1.2 * sum(region.area for region in regions)))
        assert result.polygons == []

    def test_crumbs_stay_with_what_they_hang_on(self) -> None:
        label_map = draw("#..... #..... #..... ######", pixel=80)
        rng = np.random.default_rng(0)
        label_map[rng.random(label_map.shape) < 0.2] = 0
        regions = regions_of(label_map)[:1]
        result = check(regions, label_map.shape, crops(regions) * 2 // 3)
        assert len(result.masks) == 2

    def test_a_sponge_is_not_cut_in_vain(self) -> None:
        label_map = (np.random.default_rng(0).random((300, 600)) < 0.75).astype(np.uint8)
        regions = regions_of(label_map)[:1]
        result = check(regions, label_map.shape, crops(regions) - 1)
        assert (result.masks, result.polygons, result.splits) == ([], regions, 0)

    def test_pieces_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        label_map = np.kron(np.eye(20, dtype=np.uint8) + np.eye(20, k=1, dtype=np.uint8), np.ones((40, 40), np.uint8))
        regions = regions_of(label_map)
        limit = 2 * regions[0].area
        assert check(regions, label_map.shape, limit).polygons == []
        monkeypatch.setattr(budget, "MAX_PIECES", 3)
        assert check(regions, label_map.shape, limit).polygons == regions
        monkeypatch.setattr(budget, "MAX_PIECES", 256)
        monkeypatch.setattr(budget, "_MAX_RUNS", 2000)
        assert check(regions, label_map.shape, limit).polygons == regions


def blobs(rng: np.random.Generator, size_hw: tuple[int, int], labels: int, smooth: int) -> Labels:
    """A random label map with rounded regions; label 0 is void."""
    fields = rng.random((labels, *size_hw))
    for _ in range(smooth):
        fields = fields + np.roll(fields, 1, 1) + np.roll(fields, -1, 1)
        fields = fields + np.roll(fields, 1, 2) + np.roll(fields, -1, 2)
    return fields.argmax(axis=0).astype(np.uint8)


class TestRandom:
    @pytest.mark.parametrize("smooth", [1, 3, 6])
    def test_nothing_is_lost(self, smooth: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "_SMALLEST_CELL", 4)
        monkeypatch.setattr(budget, "_LEAST_SAVED", 1)
        rng = np.random.default_rng(smooth)
        label_map = blobs(rng, (48, 96), 3, smooth)
        regions = regions_of(label_map)
        split = 0
        for share in (0.9, 0.7, 0.5, 0.2):
            split += check(regions, (48, 96), int(share * crops(regions))).splits
        assert split > 0

    @pytest.mark.slow
    def test_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(budget, "_LEAST_SAVED", 1)
        rng = np.random.default_rng(1)
        for turn in range(600):
            monkeypatch.setattr(budget, "_SMALLEST_CELL", int(rng.choice([1, 2, 4, 8])))
            size_hw = int(rng.integers(1, 60)), int(rng.integers(1, 60))
            regions = regions_of(blobs(rng, size_hw, int(rng.integers(1, 5)), turn % 7))
            check(regions, size_hw, int(rng.random() * crops(regions)))

    def test_the_same_regions_give_the_same_pieces(self) -> None:
        label_map = np.kron(blobs(np.random.default_rng(2), (24, 48), 3, 4), np.ones((32, 32), np.uint8))
        results = []
        for _ in range(2):
            regions = regions_of(label_map)
            results.append(within_budget(regions, max_crop_area=crops(regions) // 2))
        once, again = results
        assert once.splits == again.splits > 0
        for ours, theirs in ((once.masks, again.masks), (once.polygons, again.polygons)):
            assert [piece.box_xyxy for piece in ours] == [piece.box_xyxy for piece in theirs]
            assert all(np.array_equal(a.starts, b.starts) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("smooth", [0, 2, 5])
    def test_the_profiles_that_cuts_are_chosen_by(self, smooth: int) -> None:
        for region in regions_of(blobs(np.random.default_rng(smooth), (40, 70), 3, smooth))[:40]:
            mask = region.mask
            for profile, lines in ((budget._row_profile(region), mask), (budget._column_profile(region), mask.T)):
                assert profile.first.tolist() == lines.argmax(axis=1).tolist()
                assert profile.last.tolist() == (lines.shape[1] - lines[:, ::-1].argmax(axis=1)).tolist()
                assert profile.pixels.tolist() == lines.sum(axis=1).tolist()
                for cut, area in enumerate(profile.crops().tolist(), start=1):
                    assert area == sum(
                        len(part) * int(np.ptp(np.flatnonzero(part.any(axis=0))) + 1)
                        for part in (lines[:cut], lines[cut:])
                    )
