import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error

from sscloud.inference import Segmentation
from sscloud.upsample import Interpolated
from training import calibration
from training.calibration import BINS, PIXELS_PER_UPDATE, TEMPERATURES, Reliability, TemperatureGrid, reliability


def segmentation(values: NDArray[np.float32], size_hw: tuple[int, int], *, wrap: bool) -> Segmentation:
    return Segmentation(
        class_map=np.zeros(size_hw, np.uint8),
        confidence=Interpolated(values=values, size_hw=size_hw, wrap=wrap),
        label_ids=(0,),
        wrapped=wrap,
    )


@pytest.mark.parametrize("wrap", [True, False])
def test_error_equals_torchmetrics(wrap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_STRIP_PIXELS", 700)
    rng = np.random.default_rng(1)
    values = rng.uniform(0.3, 1, (16, 32)).astype(np.float32)
    sure = segmentation(values, (50, 101), wrap=wrap)
    predicted = rng.integers(0, 3, (50, 101), dtype=np.uint8)
    truth = np.where(rng.random(predicted.shape) < 0.6, predicted, (predicted + 1) % 3).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255

    counts = reliability(sure, truth, predicted)

    valid = truth != 255
    confidence, right = sure.confidence.full()[valid], (truth == predicted)[valid]
    expected = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(right).int(), n_bins=BINS)
    assert counts.error == pytest.approx(float(expected), abs=1e-5)
    assert counts.error > 0.05
    assert counts.count.sum() == valid.sum()
    assert counts.right.sum() == right.sum()
    assert counts.confidence.sum() == pytest.approx(confidence.sum(), rel=1e-6)
    assert [array.shape for array in (counts.count, counts.right, counts.confidence)] == [(BINS,)] * 3


def test_by_hand_and_sums() -> None:
    sure = segmentation(np.full((16, 16), 0.9, np.float32), (16, 16), wrap=False)
    truth = np.zeros((16, 16), np.uint8)
    truth[:4] = 1
    truth[4:8] = 255

    counts = reliability(sure, truth, np.zeros_like(truth))

    assert counts.error == pytest.approx(0.9 - 2 / 3)
    certain = segmentation(np.full((16, 16), 1 + 1e-7, np.float32), (16, 16), wrap=False)
    perfect = reliability(certain, np.zeros_like(truth), np.zeros_like(truth))
    assert perfect.error == pytest.approx(0, abs=1e-6)
    assert perfect.count[-1] == 256
    assert (counts + perfect).error == pytest.approx((192 * (0.9 - 2 / 3)) / (192 + 256))
    assert math.isnan(Reliability.nothing().error)


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Logits whose softmax is the very distribution that the targets are drawn from, then multiplied by `factor`."""

    def make(factor: float, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(2, 4, 64, 96, generator=generator)
        flat = logits.movedim(1, -1).reshape(-1, 4)
        target = torch.multinomial(flat.softmax(-1), 1, generator=generator).reshape(2, 64, 96).to(torch.uint8)
        return factor * logits, target

    return make


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 3.0])
def test_the_factor_of_the_logits_is_found(
    factor: float, batch: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    grid = TemperatureGrid()
    for seed in (1, 2):
        grid.update(*batch(factor, seed=seed))

    assert grid.sums.shape == (25,)
    assert grid.sums.dtype == torch.float64
    assert grid.count == 2 * min(PIXELS_PER_UPDATE, 2 * 64 * 96)
    assert TemperatureGrid.best(grid.sums, grid.count) == pytest.approx(factor, rel=0.03)


def test_a_fitted_temperature_lowers_the_calibration_error(
    batch: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    grid = TemperatureGrid()
    grid.update(*batch(3.0, seed=1))
    temperature = grid.best(grid.sums, grid.count)
    logits, target = batch(3.0, seed=2)

    def error(probability: torch.Tensor) -> float:
        confidence, best = probability[0].max(0)
        sure = segmentation(confidence.numpy(), (64, 96), wrap=True)
        return reliability(sure, target[0].numpy(), best.to(torch.uint8).numpy()).error

    before, after = error(logits.softmax(1)), error((logits / temperature).softmax(1))
    assert before > 0.1
    assert after < 0.02


def test_sums_are_negative_log_likelihoods_without_void(
    batch: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    logits, target = batch(1.0)
    target[:, :20] = 255
    grid = TemperatureGrid()

    grid.update(logits, target)

    for index in (0, 13, 24):
        expected = F.cross_entropy(logits / TEMPERATURES[index], target.long(), ignore_index=255, reduction="sum")
        assert float(grid.sums[index]) == pytest.approx(float(expected), rel=1e-5)
    assert (TEMPERATURES[0], TEMPERATURES[-1]) == pytest.approx((0.25, 8))


def test_many_pixels_are_thinned_out_alike(
    batch: Callable[..., tuple[torch.Tensor, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "PIXELS_PER_UPDATE", 500)
    first, again, both = TemperatureGrid(), TemperatureGrid(), TemperatureGrid()
    first.update(*batch(1.0, seed=1))
    again.update(*batch(1.0, seed=2))
    both.update(*batch(1.0, seed=1))
    both.update(*batch(1.0, seed=2))

    assert both.count == 1000
    torch.testing.assert_close(both.sums, first.sums + again.sums)


def test_without_a_minimum() -> None:
    assert TemperatureGrid.best(torch.zeros(25, dtype=torch.float64), 0) == 1.0
    assert TemperatureGrid.best(torch.full((25,), torch.nan), 10) == 1.0
    assert TemperatureGrid.best(torch.arange(25.0), 10) == TEMPERATURES[0]
    assert TemperatureGrid.best(-torch.arange(25.0), 10) == TEMPERATURES[-1]
    void = TemperatureGrid()
    void.update(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8))
    assert void.best(void.sums, void.count) == 1.0
