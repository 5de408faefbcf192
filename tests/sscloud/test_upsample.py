"""Logits → full size: equal to F.interpolate and argmax, however it is cut into strips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sscloud import upsample
from sscloud.upsample import classify

SIZES = [
    ((9, 17), (90, 170)),
    ((13, 31), (64, 128)),
    ((40, 81), (409, 819)),
    ((32, 64), (32, 64)),
    ((33, 64), (16, 21)),  # down
    ((50, 60), (77, 31)),  # up and down
    ((1, 1), (5, 7)),
    ((1, 9), (3, 90)),
    ((9, 1), (30, 4)),
]


def reference(logits: Tensor, size_hw: tuple[int, int], *, wrap: bool) -> Tensor:
    """F.interpolate; with `wrap` of the planes padded by one wrapped column on each side (in double precision)."""
    height, width = size_hw
    if not wrap:
        return F.interpolate(logits[None], size=size_hw, mode="bilinear", align_corners=False)[0]
    planes = logits.double()[None]
    source = planes.shape[3]
    padded = torch.cat([planes[..., -1:], planes, planes[..., :1]], dim=3)
    rows = F.interpolate(padded, size=(height, source + 2), mode="bilinear", align_corners=False)[0]
    position = (torch.arange(width, dtype=torch.float64) + 0.5) * source / width - 0.5 + 1
    left = position.floor().long()
    return torch.lerp(rows[..., left], rows[..., left + 1], position - left)


def random_logits(channels: int, size_hw: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(channels, *size_hw, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("source_hw", "size_hw"), SIZES)
@pytest.mark.parametrize("channels", [2, 6])
def test_equals_interpolate_and_argmax(
    channels: int, source_hw: tuple[int, int], size_hw: tuple[int, int], wrap: bool
) -> None:
    logits = random_logits(channels, source_hw)
    found = classify(logits, size_hw, wrap=wrap)
    assert found.class_map.dtype == np.uint8
    assert found.confidence.dtype == np.float32
    assert found.class_map.shape == found.confidence.shape == size_hw
    full = reference(logits, size_hw, wrap=wrap)
    best = full.topk(2, dim=0).values
    # Single precision knows where a pixel lies to 6e-5 of a cell; F.interpolate rounds in the same way.
    clear = ((best[0] - best[1]) > (1e-3 if wrap else 1e-5)).numpy()
    assert clear.mean() > 0.99
    assert np.array_equal(found.class_map[clear], full.argmax(0).numpy()[clear])
    probability = reference(logits.softmax(0).amax(0, keepdim=True), size_hw, wrap=wrap)[0].numpy()
    np.testing.assert_allclose(found.confidence, probability, atol=5e-5 if wrap else 2e-6)


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_wrap_is_interpolate_of_the_padded_planes_cut_to_size(factor: int) -> None:
    """At whole factors the padded planes can be interpolated as a whole and cut."""
    logits = random_logits(5, (12, 20))
    padded = torch.cat([logits[..., -1:], logits, logits[..., :1]], dim=2)[None]
    full = F.interpolate(padded, scale_factor=factor, mode="bilinear", align_corners=False)[0][..., factor:-factor]
    best = full.topk(2, dim=0).values
    clear = ((best[0] - best[1]) > 1e-5).numpy()
    found = classify(logits, (12 * factor, 20 * factor), wrap=True).class_map
    assert np.array_equal(found[clear], full.argmax(0).numpy()[clear])


def test_wrap_differs_at_the_seam_only() -> None:
    logits = random_logits(4, (8, 16))
    flat, around = (classify(logits, (80, 160), wrap=wrap).confidence for wrap in (False, True))
    np.testing.assert_allclose(flat[:, 5:-5], around[:, 5:-5], atol=2e-6)
    assert not np.allclose(flat[:, :5], around[:, :5], atol=1e-3)
    assert not np.allclose(flat[:, -5:], around[:, -5:], atol=1e-3)


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_rolling_the_logits_rolls_the_result(factor: int) -> None:
    logits = random_logits(5, (12, 20))
    plain = classify(logits, (12 * factor, 20 * factor), wrap=True)
    rolled = classify(logits.roll(3, 2), (12 * factor, 20 * factor), wrap=True)
    assert np.array_equal(rolled.class_map, np.roll(plain.class_map, 3 * factor, axis=1))
    assert np.array_equal(rolled.confidence, np.roll(plain.confidence, 3 * factor, axis=1))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("strip_bytes", [1, 4 * 170 * 7 * 3, 4 * 170 * 7 * 7 + 5, 4 * 170 * 7 * 89])
def test_strips_do_not_matter(monkeypatch: pytest.MonkeyPatch, wrap: bool, strip_bytes: int) -> None:
    logits = random_logits(6, (9, 17))
    whole = classify(logits, (90, 170), wrap=wrap)
    monkeypatch.setattr(upsample, "_STRIP_BYTES", strip_bytes)
    strips = classify(logits, (90, 170), wrap=wrap)
    assert np.array_equal(strips.class_map, whole.class_map)
    assert np.array_equal(strips.confidence, whole.confidence)


def test_256_channels_keep_their_numbers() -> None:
    logits = torch.zeros(256, 2, 2)
    logits[255, 0, 0] = logits[128, 0, 1] = logits[0, 1, 0] = logits[7, 1, 1] = 9
    assert classify(logits, (2, 2), wrap=False).class_map.tolist() == [[255, 128], [0, 7]]


def test_one_channel_is_sure() -> None:
    found = classify(random_logits(1, (4, 8)), (8, 16), wrap=True)
    assert not found.class_map.any()
    assert (found.confidence == 1).all()
