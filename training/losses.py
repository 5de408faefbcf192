"""The training loss: cross-entropy plus soft Dice, void left out of both."""

import numpy as np
import torch
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
    known = target != VOID
    if not known.any():
        return logits.sum().float() * 0
    log_probability = logits.float().log_softmax(1)
    classes = log_probability.shape[1]
    index = torch.where(known, target, 0)
    # Only the true class's plane enters the cross-entropy and the overlap: no one-hot volume is made.
    of_truth = log_probability.gather(1, index[:, None])[:, 0]
    weight = weights[index] * known
    cross_entropy = -(of_truth * weight).sum() / weight.sum()
    overlap = torch.zeros_like(weights).index_add(0, index.flatten(), (of_truth.exp() * known).flatten())
    true = torch.bincount(index[known], minlength=classes)
    total = (log_probability.exp() * known[:, None]).sum((0, 2, 3)) + true
    present = true > 0
    return cross_entropy + 1 - (2 * overlap[present] / total[present]).mean()
