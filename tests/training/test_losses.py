import builtins
import copy
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sscloud.errors import ConfigError
from training.config import LossName
from training.losses import class_weights, make_loss

NAMES: tuple[LossName, ...] = get_args(LossName)
Array = NDArray[np.float64]


def batch(
    *, images: int = 2, channels: int = 5, classes: int = 3, size_hw: tuple[int, int] = (6, 9), void: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits of so many channels, and a target with fewer classes; void at random."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(images, channels, *size_hw, generator=generator)
    target = torch.randint(0, classes, (images, *size_hw), generator=generator)
    target[torch.rand(target.shape, generator=generator) < void] = 255
    return logits, target.to(torch.uint8)


def known(logits: Tensor, target: Tensor, rows: Tensor | None) -> tuple[Array, NDArray[np.int64], Array]:
    """(K, C) probabilities, (K,) classes and (K,) weights of the known pixels, in NumPy."""
    values = logits.double().numpy().transpose(0, 2, 3, 1)
    values = np.exp(values - values.max(-1, keepdims=True))
    values /= values.sum(-1, keepdims=True)
    weights = np.ones(target.shape) if rows is None else np.broadcast_to(rows.numpy()[..., None], target.shape)
    mask = target.numpy() != 255
    return values[mask], target.numpy()[mask].astype(np.int64), weights[mask]


def pixel_mean(values: Array, truth: NDArray[np.int64], weights: Array, by_class: Array) -> float:
    weights = weights * by_class[truth]
    return float((weights * values).sum() / weights.sum())


def cross_entropy(p: Array, truth: NDArray[np.int64], weights: Array, by_class: Array) -> float:
    return pixel_mean(-np.log(p[np.arange(len(truth)), truth]), truth, weights, by_class)


def focal(p: Array, truth: NDArray[np.int64], weights: Array, by_class: Array) -> float:
    of_truth = p[np.arange(len(truth)), truth]
    return pixel_mean(-((1 - of_truth) ** 2) * np.log(of_truth), truth, weights, by_class)


def dice(p: Array, truth: NDArray[np.int64], weights: Array) -> float:
    scores = []
    for c in np.unique(truth):
        true = truth == c
        overlap = (weights * p[:, c])[true].sum()
        scores.append(2 * overlap / ((weights * p[:, c]).sum() + weights[true].sum()))
    return 1 - float(np.mean(scores))


def tversky(p: Array, truth: NDArray[np.int64], _weights: Array) -> float:
    scores = []
    for c in np.unique(truth):
        true = truth == c
        overlap = p[true, c].sum()
        scores.append(overlap / (overlap + 0.3 * p[~true, c].sum() + 0.7 * (1 - p[true, c]).sum()))
    return 1 - float(np.mean(scores))


def lovasz(p: Array, truth: NDArray[np.int64], _weights: Array) -> float:
    """The definition: what each pixel adds to the Jaccard loss when pixels go wrong in the order of their errors."""
    losses = []
    for c in np.unique(truth):
        true = truth == c
        errors = np.where(true, 1 - p[:, c], p[:, c])
        wrong = np.zeros_like(true)
        loss = before = 0.0
        for i in np.argsort(-errors):
            wrong[i] = True
            jaccard = 1 - (true & ~wrong).sum() / (true | wrong).sum()
            loss += errors[i] * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return float(np.mean(losses))


PIXEL = {"ce": cross_entropy, "focal": focal}
REGION = {"dice": dice, "tversky": tversky, "lovasz": lovasz}


@pytest.mark.parametrize("weighted_rows", [False, True])
@pytest.mark.parametrize("void", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition(name: LossName, void: float, weighted_rows: bool) -> None:
    logits, target = batch(void=void)
    rows = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0])

    found = make_loss(name, weights=weights)(logits, target, rows if weighted_rows else None)

    by_pixel, _, by_region = name.partition("+")
    pixels = known(logits, target, rows if weighted_rows else None)
    expected = PIXEL[by_pixel](*pixels, weights.double().numpy())
    expected += REGION[by_region](*pixels) if by_region else 0
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    logits, target = batch()
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.7])

    found = make_loss("ce", weights=weights, label_smoothing=smoothing)(logits.requires_grad_(), target)

    expected = F.cross_entropy(logits, target.long(), weights, ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_weigh_like_repeated_rows() -> None:
    logits, target = batch(images=1, size_hw=(3, 8))
    rows = torch.tensor([[1.0, 2.0, 3.0]])
    times = torch.tensor([1, 2, 3])
    loss = make_loss("ce+dice", weights=torch.ones(5), label_smoothing=0.1)

    repeated = loss(logits.repeat_interleave(times, 2), target.repeat_interleave(times, 1))

    torch.testing.assert_close(loss(logits, target, rows), repeated)
    assert abs(loss(logits, target) - repeated) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_of_known_pixels_only(name: LossName) -> None:
    logits, target = batch()
    logits[0, 0] = 200.0  # sure of one class: probabilities of exactly 0 and 1
    logits.requires_grad_()

    make_loss(name, weights=torch.ones(5))(logits, target).backward()

    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    moved = (logits.grad != 0).any(1)
    assert not moved[target == 255].any()
    assert moved[1][target[1] != 255].all()


@pytest.mark.parametrize("name", NAMES)
def test_void_changes_nothing(name: LossName) -> None:
    logits, target = batch()
    other = torch.where(target[:, None] == 255, 50.0, logits)
    loss = make_loss(name, weights=torch.ones(5))

    torch.testing.assert_close(loss(other, target), loss(logits, target))


@pytest.mark.parametrize("name", NAMES)
def test_all_void_gives_zero_with_a_gradient(name: LossName) -> None:
    logits = torch.full((1, 3, 4, 4), 1e4, dtype=torch.float16, requires_grad=True)  # whose sum overflows

    loss = make_loss(name, weights=torch.ones(3))(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8))
    loss.backward()

    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_channels_without_a_class_only_take_their_probability(name: LossName) -> None:
    logits, target = batch(channels=3)
    many = torch.cat([logits, torch.full((2, 65, 6, 9), -40.0)], 1)

    few = make_loss(name, weights=torch.ones(3))(logits, target)

    torch.testing.assert_close(make_loss(name, weights=torch.ones(68))(many, target), few)


@pytest.mark.parametrize("name", NAMES)
def test_perfect_and_worst_predictions(name: LossName) -> None:
    target = (torch.arange(64).reshape(1, 8, 8) % 4).to(torch.uint8)
    perfect = F.one_hot(target.long(), 4).movedim(-1, 1) * 30.0
    loss = make_loss(name, weights=torch.ones(4))

    assert loss(perfect, target).item() == pytest.approx(0, abs=1e-6)
    assert loss(-perfect, target).item() > 10


@pytest.mark.parametrize("name", NAMES)
def test_one_class_has_nothing_to_learn(name: LossName) -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)

    loss = make_loss(name, weights=torch.ones(1))(logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    loss.backward()

    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_full(name: LossName) -> None:
    logits, target = batch()
    loss = make_loss(name, weights=torch.ones(5))
    half = logits.bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        found = loss(half, target)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(half.float(), target))


@pytest.mark.slow
def test_sums_over_many_pixels_keep_their_digits() -> None:
    target = torch.zeros(1, 4097, 4096, dtype=torch.uint8)  # above 2^24, where float32 stops counting
    loss = make_loss("ce+dice", weights=torch.ones(2))

    found = loss(torch.zeros(1, 2, 1, 1).expand(1, 2, 4097, 4096), target)

    assert found.item() == pytest.approx(math.log(2) + 1 - 2 / 3, rel=5e-5)


def test_a_region_term_is_over_the_batch_not_by_image() -> None:
    logits, target = batch(void=0)
    target[1] = 0
    for name in ("ce+dice", "ce+tversky", "ce+lovasz"):
        loss = make_loss(name, weights=torch.ones(5))

        # Side by side as one image.
        torch.testing.assert_close(
            loss(logits, target), loss(torch.cat(list(logits), 2)[None], torch.cat(list(target), 1)[None])
        )


def test_weights_are_no_part_of_the_state() -> None:
    loss = make_loss("focal+dice", weights=torch.ones(3))

    assert not loss.state_dict()
    assert copy.deepcopy(loss).double().weights.dtype == torch.float64  # but go where the module goes


@pytest.mark.parametrize(
    ("name", "smoothing", "reason"),
    [
        ("dice", 0.0, r"--loss must be one of ce\+dice, ce, .*found 'dice'"),
        ("ce", 1.0, "--label-smoothing must be from 0 to below 1, found 1"),
        ("ce", -0.1, "--label-smoothing must be from 0 to below 1, found -0.1"),
        ("focal+dice", 0.1, r"--label-smoothing 0\.1 belongs to the cross-entropy, which --loss focal\+dice"),
    ],
)
def test_what_there_is_not(name: Any, smoothing: float, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_loss(name, weights=torch.ones(3), label_smoothing=smoothing)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_library_is_found_before_training(name: LossName, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(module: str, *rest: Any) -> Any:
        if module.startswith("kornia"):
            raise ModuleNotFoundError(name="kornia")
        return imported(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)

    if name in ("ce", "ce+dice"):
        make_loss(name, weights=torch.ones(3))
    else:
        with pytest.raises(ConfigError, match=r"need kornia: pip install 'sscloud\[train\]'"):
            make_loss(name, weights=torch.ones(3))


def test_class_weights_are_smoothed() -> None:
    shares = np.array([0.64, 0.32, 0.04])

    weights = class_weights(shares)

    assert weights.dtype == torch.float32
    assert float(weights[2] / weights[0]) == pytest.approx(4)  # the root of 16
    assert float((weights * torch.from_numpy(shares)).sum()) == pytest.approx(1, rel=1e-6)


def test_class_weights_of_absent_and_rare_classes() -> None:
    assert class_weights(np.array([0.5, 0.0, 0.5])).tolist() == [1, 1, 1]
    assert class_weights(np.zeros(3)).tolist() == [1, 1, 1]
    assert class_weights(np.array([1 - 1e-6, 1e-6]))[1] == 8
