"""Blended tiles: where they lie, and what becomes of a network that sees no more than its tile."""

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.tiles import Compute, Tile, plan_blended, run_blended

Logits = NDArray[np.float32]


def noise(size_hw: tuple[int, int], *, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), np.uint8)


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64))
    return np.asarray(powers / powers.sum(axis=0))


def pointwise(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
    """Four logits of each pixel by itself."""
    red, green, blue = part.transpose(2, 0, 1).astype(np.float32) / 64
    return np.stack([red, green - blue, red * blue / 4, np.zeros_like(red)])


def contextual(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
    """As with global pooling: what the tile holds decides everywhere."""
    logits = pointwise(part, wrap=wrap)
    return logits + 5 * (logits.mean(axis=(1, 2), keepdims=True) - 1.5)


def starts_of(tiles: tuple[Tile, ...]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return sorted({tile.rows for tile in tiles}), sorted({tile.columns for tile in tiles})


SIZES = [(409, 819), (1600, 3200), (64, 4096), (2000, 70), (33, 900), (65, 65)]


class TestPlan:
    @pytest.mark.parametrize("wrap", [False, True])
    @pytest.mark.parametrize("size_hw", SIZES)
    @pytest.mark.parametrize("max_pixels", [1, 10_000, 100_000, 1_000_000])
    def test_tiles_cover_and_overlap(self, size_hw: tuple[int, int], max_pixels: int, wrap: bool) -> None:
        height, width = size_hw
        tiles = plan_blended(size_hw, max_pixels=max_pixels, wrap=wrap)
        rows, columns = starts_of(tiles)
        assert Counter((t.rows, t.columns) for t in tiles) == Counter((r, c) for r in rows for c in columns)
        assert (rows[0][0], rows[-1][1]) == (0, height)
        assert columns[0][0] == 0
        for spans, length, around in ((rows, height, False), (columns, width, wrap)):
            part = spans[0][1] - spans[0][0]
            if part == length:
                assert spans == [(0, length)]
                continue
            following = [*spans[1:], (length, length + part)] if around else spans[1:]
            assert all(stop - start == part for start, stop in spans)
            assert all(
                0 < after[0] - before[0] <= part - part / 4 for before, after in zip(spans, following, strict=False)
            )
            assert part % 32 == 0
            if around:
                assert len(spans) > 1
                assert width % 32 or all(start % 32 == 0 for start, _ in spans)
            else:
                assert spans[-1][1] == length
                assert all(start % 32 == 0 for start, _ in spans[:-1])
        (pixels,) = {np.prod(tile.padded_size_hw) for tile in tiles}
        assert pixels <= max(max_pixels, min(64, height) * min(64, width))
        assert all((t.rows, t.columns) == (t.padded_rows, t.padded_columns) for t in tiles)

    @pytest.mark.parametrize("wrap", [False, True])
    def test_one_where_everything_fits(self, wrap: bool) -> None:
        (tile,) = plan_blended((409, 819), max_pixels=409 * 819, wrap=wrap)
        assert (tile.rows, tile.columns) == ((0, 409), (0, 819))

    def test_context_on_every_side_comes_first(self) -> None:
        (tile, *_) = plan_blended((1600, 3200), max_pixels=1_000_000, wrap=True)
        assert tile.padded_size_hw == (992, 992)

    def test_then_cost(self) -> None:
        """All rows, and as few columns as two tiles need: not as many as would fit."""
        tiles = plan_blended((128, 384), max_pixels=128 * 352, wrap=False)
        assert [tile.columns for tile in tiles] == [(0, 224), (160, 384)]
        assert {tile.rows for tile in tiles} == {(0, 128)}


def window(length: int, whole: int) -> NDArray[np.float64]:
    """A tile's weights along a side, written down pixel by pixel."""
    if length == whole:
        return np.ones(length)
    ramp = length // 4
    distances = [min(i, length - 1 - i) + 0.5 for i in range(length)]
    return np.array([np.sin(np.pi / 2 * min(1, d / ramp)) ** 2 for d in distances])


def blended(image: NDArray[np.uint8], tiles: tuple[Tile, ...], compute: Compute) -> NDArray[np.float64]:
    """Mean probabilities, by the book."""
    height, width = image.shape[:2]
    total, weights = np.zeros((4, height, width)), np.zeros((height, width))
    for tile in tiles:
        y, x = np.arange(*tile.rows), np.arange(*tile.columns) % width
        cell = np.ix_(y, x)
        weight = window(len(y), height)[:, None] * window(len(x), width)
        total[:, *cell] += weight * softmax(compute(image[cell], wrap=False))
        weights[cell] += weight
    return total / weights


class TestRun:
    @pytest.mark.parametrize("wrap", [False, True])
    @pytest.mark.parametrize("size_hw", [(96, 256), (70, 300), (200, 65)])
    def test_a_network_that_sees_single_pixels(self, size_hw: tuple[int, int], wrap: bool) -> None:
        image = noise(size_hw)
        tiles = plan_blended(size_hw, max_pixels=1, wrap=wrap)
        assert len(tiles) > 3
        found = run_blended(image, tiles, pointwise, wrap=wrap)
        assert found.shape == (4, *size_hw)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.exp(found), softmax(pointwise(image, wrap=wrap)), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("wrap", [False, True])
    @pytest.mark.parametrize("size_hw", [(96, 256), (70, 300), (64, 130)])
    def test_are_weighted_mean_probabilities(self, size_hw: tuple[int, int], wrap: bool) -> None:
        image = noise(size_hw)
        image[:, 40:100] //= 4  # tiles differ
        tiles = plan_blended(size_hw, max_pixels=1, wrap=wrap)
        found = run_blended(image, tiles, contextual, wrap=wrap)
        np.testing.assert_allclose(np.exp(found), blended(image, tiles, contextual), rtol=1e-4, atol=1e-6)

    def test_a_single_tile_is_left_alone(self) -> None:
        image = noise((40, 50))
        seen: list[bool] = []

        def compute(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
            seen.append(wrap)
            return pointwise(part, wrap=wrap)

        found = run_blended(image, plan_blended((40, 50), max_pixels=2000, wrap=True), compute, wrap=True)
        np.testing.assert_array_equal(found, pointwise(image, wrap=True))
        assert seen == [True]

    @pytest.mark.parametrize(("max_pixels", "wraps"), [(1, False), (64 * 256, True)])
    def test_only_a_whole_turn_wraps(self, max_pixels: int, wraps: bool) -> None:
        seen: list[tuple[int, bool]] = []

        def compute(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
            seen.append((part.shape[0] * part.shape[1], wrap))
            return pointwise(part, wrap=wrap)

        size_hw = (1000, 64) if wraps else (96, 256)
        run_blended(noise(size_hw), plan_blended(size_hw, max_pixels=max_pixels, wrap=True), compute, wrap=True)
        assert len(seen) > 3
        assert {wrap for _, wrap in seen} == {wraps}
        assert max(pixels for pixels, _ in seen) <= max(max_pixels, 64 * 64)

    def test_a_roll_by_the_distance_of_tiles_rolls_the_logits(self) -> None:
        image = noise((96, 256))
        image[:, 40:100] //= 4
        tiles = plan_blended((96, 256), max_pixels=1, wrap=True)
        _, columns = starts_of(tiles)
        step = columns[1][0]
        assert len(columns) * step == 256
        whole = run_blended(image, tiles, contextual, wrap=True)
        for turns in (1, 3):
            found = run_blended(np.roll(image, turns * step, axis=1), tiles, contextual, wrap=True)
            np.testing.assert_allclose(found, np.roll(whole, turns * step, axis=2), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("wrap", [False, True])
    def test_tiles_that_disagree_leave_no_edge(self, wrap: bool) -> None:
        """A tile that is sure of one class beside one that is sure of another: probabilities move in small steps."""
        answers = iter(range(1000))

        def compute(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
            logits = np.zeros((2, *part.shape[:2]), np.float32)
            logits[next(answers) % 2] = 50
            return logits

        size_hw = (400, 1280)
        tiles = plan_blended(size_hw, max_pixels=400 * 512, wrap=wrap)
        found = np.exp(run_blended(noise(size_hw), tiles, compute, wrap=wrap))
        assert np.ptp(found[0]) > 0.9
        steps = np.abs(np.diff(found, axis=2, append=found[:, :, :1] if wrap else found[:, :, -1:]))
        assert steps.max() < 0.04
        assert np.abs(np.diff(found, axis=1)).max() < 0.04

    def test_numbers_that_are_none_stay_so(self) -> None:
        def compute(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
            logits = pointwise(part, wrap=wrap)
            logits[2, 5, 7] = np.inf
            return logits

        found = run_blended(noise((64, 130)), plan_blended((64, 130), max_pixels=1, wrap=False), compute, wrap=False)
        assert np.isnan(found[:, 5, 7]).all()
        assert np.isfinite(found[:, 6]).all()

    def test_no_probability_is_a_finite_logit(self) -> None:
        def compute(part: NDArray[np.uint8], *, wrap: bool) -> Logits:
            logits = np.zeros((2, *part.shape[:2]), np.float32)
            logits[1] = -1000
            return logits

        found = run_blended(noise((64, 130)), plan_blended((64, 130), max_pixels=1, wrap=False), compute, wrap=False)
        np.testing.assert_allclose(found[0], 0, atol=1e-6)
        np.testing.assert_allclose(found[1], np.log(np.finfo(np.float32).tiny), rtol=1e-6)

    def test_no_tiles(self) -> None:
        with pytest.raises(ValueError, match="There are no tiles"):
            run_blended(noise((64, 64)), (), pointwise, wrap=False)
