import math

import numpy as np
import pytest
import torch

from training.losses import class_weights, segmentation_loss


def reference(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> float:
    """The loss as a loop over pixels."""
    images, classes, height, width = logits.shape
    entropy = weight_sum = 0.0
    overlap, probability, truth = ([0.0] * classes for _ in range(3))
    for n in range(images):
        for y in range(height):
            for x in range(width):
                label = int(target[n, y, x])
                if label == 255:
                    continue
                exponentials = [math.exp(float(v)) for v in logits[n, :, y, x]]
                p = [value / sum(exponentials) for value in exponentials]
                entropy -= float(weights[label]) * math.log(p[label])
                weight_sum += float(weights[label])
                truth[label] += 1
                overlap[label] += p[label]
                probability = [a + b for a, b in zip(probability, p, strict=True)]
    dice = [2 * overlap[c] / (probability[c] + truth[c]) for c in range(classes) if truth[c]]
    return entropy / weight_sum + 1 - sum(dice) / len(dice)


@pytest.mark.parametrize("void", [0.0, 0.4])
def test_equals_the_definition(void: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    target = torch.randint(0, 3, (2, 5, 6), generator=generator)  # class 3 is absent
    target[torch.rand(2, 5, 6, generator=generator) < void] = 255
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])

    assert segmentation_loss(logits, target, weights).item() == pytest.approx(
        reference(logits, target, weights), rel=1e-5
    )


def test_void_changes_nothing() -> None:
    logits = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    target = torch.arange(32).reshape(1, 4, 8) % 3
    target[:, :, 4:] = 255
    other = logits.clone()
    other[..., 4:] = 50.0
    other.requires_grad_()

    loss = segmentation_loss(other, target, torch.ones(3))
    loss.backward()

    assert loss.item() == pytest.approx(segmentation_loss(logits, target, torch.ones(3)).item(), rel=1e-6)
    assert other.grad is not None
    assert (other.grad[..., 4:] == 0).all()
    assert (other.grad[..., :4] != 0).all()


def test_all_void_gives_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)

    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255), torch.ones(3))
    loss.backward()

    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_perfect_and_worst_predictions() -> None:
    target = torch.arange(64).reshape(1, 8, 8) % 4
    perfect = torch.nn.functional.one_hot(target, 4).movedim(-1, 1) * 30.0

    assert segmentation_loss(perfect, target, torch.ones(4)).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(-perfect, target, torch.ones(4)).item() > 10


def test_half_precision_is_computed_in_full() -> None:
    target = torch.zeros(1, 300, 300, dtype=torch.int64)  # its pixel sums overflow float16
    loss = segmentation_loss(torch.zeros(1, 2, 300, 300, dtype=torch.float16), target, torch.ones(2))

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2) + 1 - 2 / 3, rel=1e-5)


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
