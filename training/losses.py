"""The training loss: cross-entropy plus soft Dice, void left out of both."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sscloud.labels import VOID

_HEAVIEST = 8.0
"""Bound on the ratio of a class weight to the mean weight, so that a handful of pixels cannot rule the gradient."""


def class_weights(shares: NDArray[np.float64]) -> Tensor:
    """(classes,) float32 weights, smoothed: inversely proportional to the square root of a class's share of pixels.

    Absent classes weigh as much as the mean. The weights average to 1 over the pixels of the data set.
    """
    present = shares > 0
    weights = np.ones_like(shares)
    if present.any():
        weights[present] = 1 / np.sqrt(shares[present])
        weights[present] /= (weights[present] * shares[present]).sum()
        weights = np.minimum(weights, _HEAVIEST)
    return torch.from_numpy(weights.astype(np.float32))


def segmentation_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy plus soft Dice over the classes present in the batch.

    Soft Dice is Milletari et al., "V-Net" (2016), on the sums over the batch, per class.

    Args:
        logits: (N, C, h, w).
        target: (N, h, w) int64 class indices, void 255.
        weights: (C,) of the cross-entropy.
    """
    logits = logits.float()
    known = target != VOID
    if not known.any():
        return logits.sum() * 0
    cross_entropy = F.cross_entropy(logits, target, weights, ignore_index=VOID)
    one_hot = F.one_hot(torch.where(known, target, 0), logits.shape[1]).movedim(-1, 1) * known[:, None]
    probability = logits.softmax(1) * known[:, None]
    overlap = (probability * one_hot).sum((0, 2, 3))
    total = probability.sum((0, 2, 3)) + one_hot.sum((0, 2, 3))
    present = one_hot.sum((0, 2, 3)) > 0
    return cross_entropy + 1 - (2 * overlap[present] / total[present]).mean()
