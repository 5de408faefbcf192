"""Does a confidence of 0.8 mean right in 80 of 100 pixels? The error of calibration, and the temperature against it.

C. Guo, G. Pleiss, Y. Sun, K. Weinberger: On Calibration of Modern Neural Networks (2017).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sscloud.inference import Segmentation
from sscloud.labels import VOID
from sscloud.upsample import Interpolated

BINS = 15
"""Of equal width over 0 to 1, as in the paper."""

TEMPERATURES = tuple(0.25 * 2 ** (5 * step / 24) for step in range(25))
"""The grid that a temperature is looked for on: 0.25 to 8, in equal ratios."""

PIXELS_PER_UPDATE = 16384
"""Pixels of a batch that a temperature is fitted to: neighbours tell the same, so more would only cost time."""

_STRIP_PIXELS = 1 << 20
"""Pixels of full size that are worked on together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Pixels by the confidence of their best class; sums of it over panoramas are those of the data set."""

    count: NDArray[np.int64]
    """(BINS,) pixels."""
    right: NDArray[np.int64]
    """(BINS,) pixels whose class is the true one."""
    confidence: NDArray[np.float64]
    """(BINS,) sum of the pixels' confidences."""

    def __add__(self, other: Self) -> "Reliability":
        return Reliability(
            count=self.count + other.count,
            right=self.right + other.right,
            confidence=self.confidence + other.confidence,
        )

    @classmethod
    def nothing(cls) -> "Reliability":
        """No pixel yet."""
        return cls(count=np.zeros(BINS, np.int64), right=np.zeros(BINS, np.int64), confidence=np.zeros(BINS))

    @property
    def error(self) -> float:
        """The expected calibration error: mean distance of confidence and share of right pixels; NaN of no pixel."""
        total = int(self.count.sum())
        return float(np.abs(self.confidence - self.right).sum() / total) if total else math.nan


def reliability(segmentation: Segmentation, truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> Reliability:
    """Count the pixels of one panorama by their confidence, without an array of full size.

    Args:
        segmentation: says how sure the model is.
        truth: (H, W) uint8 class indices; 255 is void and not counted.
        predicted: class indices of the segmentation, same shape.
    """
    result = Reliability.nothing()
    for rows, confidence in _strips(segmentation.confidence):
        counted = truth[rows] != VOID
        sure = confidence[counted]
        right = (truth[rows] == predicted[rows])[counted]
        # Rounding may lift a probability a little above 1.
        place = np.minimum((sure * np.float32(BINS)).astype(np.int64), BINS - 1)
        count = np.bincount(place, minlength=BINS)
        result += Reliability(
            count=count,
            right=np.bincount(place[right], minlength=BINS),
            confidence=np.bincount(place, weights=sure, minlength=BINS).astype(np.float64),
        )
    return result


def _strips(values: Interpolated) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """`Interpolated.full`, a strip of rows at a time: (rows, values of these rows)."""
    (height, width), (source_height, source_width) = values.size_hw, values.values.shape
    upper, lower, down = _neighbours(source_height, height, wrap=False)
    left, right, across = _neighbours(source_width, width, wrap=values.wrap)
    step = max(1, _STRIP_PIXELS // width)
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        first, second = values.values[upper[rows]], values.values[lower[rows]]
        strip = first + (second - first) * down[rows, None]
        first, second = strip[:, left], strip[:, right]
        yield rows, first + (second - first) * across


def _neighbours(
    source: int, target: int, *, wrap: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The two centres that each of `target` pixels lies between, and the second one's weight (half-pixel centres)."""
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(position).astype(np.int64)
    weight = (position - first).astype(np.float32)
    if wrap:
        return first % source, (first + 1) % source, weight
    return first.clip(min=0), (first + 1).clip(max=source - 1), weight


class TemperatureGrid:
    """Finds the temperature under which a model's probabilities are likeliest, while it is being validated.

    Keeps one sum of negative log-likelihoods for each of `TEMPERATURES`, so that the sums of several processes add up
    to those of one.

    Args:
        device: of the sums, where the logits are too.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=device)
        """(25,) float64: negative log-likelihood of the counted pixels at each temperature."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        """Pixels counted."""

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count up to `PIXELS_PER_UPDATE` pixels of a batch, the same ones whenever it comes.

        Args:
            logits: (N, C, h, w) of the network, any floating type.
            target: (N, h, w) uint8 class indices below C; 255 is void and not counted.
        """
        target = target.flatten()
        places = (target != VOID).nonzero().squeeze(1)
        if len(places) > PIXELS_PER_UPDATE:
            # At random: every n-th pixel would be the same few columns.
            chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:PIXELS_PER_UPDATE]
            places = places[chosen.to(places.device)]
        pixels = logits.detach().movedim(1, -1).flatten(0, -2)[places].float()
        classes = target[places].long()
        self.sums += torch.stack(
            [F.cross_entropy(pixels / temperature, classes, reduction="sum").double() for temperature in TEMPERATURES]
        )
        self.count += len(places)

    @staticmethod
    def best(sums: Tensor, count: Tensor | float) -> float:
        """The temperature of the smallest sum, between the grid's by a parabola; 1.0 when nothing was counted.

        Args:
            sums: (25,) of one process, or added up.
            count: pixels, likewise.
        """
        values = sums.detach().cpu().double().numpy()
        if not float(count) > 0 or not np.isfinite(values).all():
            return 1.0
        middle = int(values.argmin())
        if middle in (0, len(values) - 1):
            return TEMPERATURES[middle]
        before, least, after = values[middle - 1 : middle + 2]
        bend = before - 2 * least + after
        shift = 0.5 * (before - after) / bend if bend > 0 else 0.0
        return float(TEMPERATURES[middle] * (TEMPERATURES[1] / TEMPERATURES[0]) ** shift)
