"""Training losses: a term by pixel (cross-entropy or focal) and a term by region (Dice, Tversky or Lovász).

Void is left out of all of them. What a class is worth in a region term, it is worth whatever its size; classes that no
known pixel of the batch has do not enter it, so channels beyond the schema's classes do no harm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sscloud.errors import ConfigError
from sscloud.labels import VOID
from training.config import LossName

_HEAVIEST = 8.0
"""Bound on the ratio of a class weight to the mean weight, so that a handful of pixels cannot rule the gradient."""

_FOCUS = 2.0
"""The exponent of the focal loss, as its authors found best."""

_FALSE_POSITIVE, _FALSE_NEGATIVE = 0.3, 0.7
"""Tversky's price of a pixel too many and of one too few, as its authors found best: rare classes are missed rather
than invented."""


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


class Loss(nn.Module):
    """Sum of a term by pixel and, for all names but `ce`, a term by region. Build it with `make_loss`.

    Args:
        by_pixel: the first term.
        by_region: the second one, if any.
        weights: (C,) float32 weights of the classes in the first term.
    """

    def __init__(self, by_pixel: "_PixelTerm", by_region: "_RegionTerm | None", *, weights: Tensor) -> None:
        super().__init__()
        self._by_pixel, self._by_region = by_pixel, by_region
        self.register_buffer("weights", weights, persistent=False)
        self.weights: Tensor

    def forward(self, logits: Tensor, target: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """The loss of a batch, a float32 scalar; computed in float32 under autocast too.

        A batch that is all void gives zero, with gradients of zero.

        Args:
            logits: (N, C, h, w) of any floating type.
            target: (N, h, w) uint8 class indices below C, void 255.
            row_weights: (N, h) floating weights of the rows' pixels (`training.latitude.row_weights` of the rows that
                a crop shows), or None: all pixels count alike. Tversky and Lovász have no weights of pixels and take
                every pixel as one; the term by pixel beside them is weighted.
        """
        with torch.autocast(logits.device.type, enabled=False):
            pixels = _Pixels.of(logits.float(), target, None if row_weights is None else row_weights.float())
            loss = self._by_pixel(pixels, self.weights)
            return loss if self._by_region is None else loss + self._by_region(pixels)


def make_loss(name: LossName, *, weights: Tensor, label_smoothing: float = 0.0) -> Loss:
    """The loss of this name.

    Args:
        name: the term by pixel, and after a plus the term by region.
        weights: (C,) float32 weights of the classes, in cross-entropy and focal loss.
        label_smoothing: share of the truth that cross-entropy spreads evenly over all C channels (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016), from 0 to below 1.

    Raises:
        ConfigError: no such loss, label smoothing that it does not have, or the library kornia is missing.
    """
    if name not in get_args(LossName):
        raise ConfigError(f"--loss must be one of {', '.join(get_args(LossName))}, found {name!r}.")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"--label-smoothing must be from 0 to below 1, found {label_smoothing:g}.")
    pixel_name, _, region_name = name.partition("+")
    if label_smoothing and pixel_name != "ce":
        raise ConfigError(
            f"--label-smoothing {label_smoothing:g} belongs to the cross-entropy, which --loss {name} does not have. "
            "Leave one of them out."
        )
    if name not in ("ce", "ce+dice"):
        _kornia()  # found missing now, not in the first step
    by_pixel = _focal if pixel_name == "focal" else partial(_cross_entropy, smoothing=label_smoothing)
    return Loss(by_pixel, _BY_REGION[region_name] if region_name else None, weights=weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pixels:
    """A batch as the terms need it. No one-hot volume is made: only the true class's plane is looked up."""

    log_probability: Tensor
    """(N, C, h, w)."""
    of_truth: Tensor
    """(N, h, w) log probability of the true class; 0 where void."""
    index: Tensor
    """(N, h, w) int64 true class; 0 where void."""
    known: Tensor
    """(N, h, w) bool, False where void."""
    row_weights: Tensor | None
    """(N, h)."""
    area: Tensor
    """(C,) sum of the weights of the pixels that truly are of a class."""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, row_weights: Tensor | None) -> "_Pixels":
        known = target != VOID
        index = torch.where(known, target, 0).long()
        log_probability = logits.log_softmax(1)
        return cls(
            log_probability=log_probability,
            of_truth=log_probability.gather(1, index[:, None])[:, 0] * known,
            index=index,
            known=known,
            row_weights=row_weights,
            area=_by_class(known.float(), index, row_weights, logits.shape[1]),
        )

    def by_true_class(self, values: Tensor) -> Tensor:
        """(C,) weighted sums of (N, h, w) values, zero where void, over the pixels that truly are of a class."""
        return _by_class(values, self.index, self.row_weights, len(self.area))

    def by_channel(self, values: Tensor) -> Tensor:
        """(C,) weighted sums of (N, C, h, w) values over the known pixels."""
        weights = self.known.float()
        if self.row_weights is not None:
            weights = weights * self.row_weights[..., None]
        # As a product of matrices, for which the weighted values need not be written down.
        return torch.bmm(values.flatten(2), weights.flatten(1)[..., None]).sum((0, 2))

    def known_of_present(self) -> tuple[Tensor, Tensor]:
        """Log probabilities of the K known pixels, (1, P + 1, 1, K), and their true channel, (1, 1, K) int64.

        Channel i is the i-th of the P classes that these pixels have; the last one is the sum of all others, so that
        the softmax over the channels gives the probabilities as they were.
        """
        present = self.area > 0
        columns = self.log_probability.movedim(1, 0)[:, self.known]
        others = columns[~present].logsumexp(0, keepdim=True)
        channel = present.cumsum(0) - 1
        return torch.cat([columns[present], others])[None, :, None], channel[self.index[self.known]][None, None]


_PixelTerm = Callable[[_Pixels, Tensor], Tensor]
_RegionTerm = Callable[[_Pixels], Tensor]

_LEAST = torch.finfo(torch.float32).tiny
"""Stands for a sum of weights that is zero, where what it divides is zero too."""


def _by_class(values: Tensor, index: Tensor, row_weights: Tensor | None, classes: int) -> Tensor:
    # By row first: a single float32 sum stops growing at 2^24 pixels, half a panorama in full size.
    rows = values.new_zeros(*values.shape[:2], classes).scatter_add(2, index, values)
    return (rows if row_weights is None else rows * row_weights[..., None]).sum((0, 1))


def _cross_entropy(pixels: _Pixels, weights: Tensor, *, smoothing: float) -> Tensor:
    """Weighted as torch's cross_entropy: a mean over the pixels by the weight of their true class."""
    entropy = -(weights * pixels.by_true_class(pixels.of_truth)).sum()
    if smoothing:
        spread = -(weights * pixels.by_channel(pixels.log_probability)).sum() / len(weights)
        entropy = (1 - smoothing) * entropy + smoothing * spread
    return entropy / (weights * pixels.area).sum().clamp_min(_LEAST)


def _focal(pixels: _Pixels, weights: Tensor) -> Tensor:
    """Lin et al., "Focal Loss for Dense Object Detection" (2017); the mean as in `_cross_entropy`."""
    columns, truth = pixels.known_of_present()
    if not truth.numel():
        return _nothing(pixels)
    by_channel = _kornia().focal_loss(columns, truth, alpha=None, gamma=_FOCUS, reduction="none")
    values = torch.zeros_like(pixels.of_truth).masked_scatter(pixels.known, by_channel.sum(1))
    return (weights * pixels.by_true_class(values)).sum() / (weights * pixels.area).sum()


def _dice(pixels: _Pixels) -> Tensor:
    """Soft Dice (Milletari et al., "V-Net", 2016) on the sums over the batch, the mean over the classes present."""
    present = pixels.area > 0
    overlap = pixels.by_true_class(pixels.of_truth.exp() * pixels.known)
    total = pixels.by_channel(pixels.log_probability.exp()) + pixels.area
    dice = 2 * overlap / total.clamp_min(_LEAST)
    return torch.where(present, 1 - dice, 0).sum() / present.sum().clamp_min(1)


def _tversky(pixels: _Pixels) -> Tensor:
    """Salehi et al., "Tversky loss function for image segmentation" (2017), on the sums over the batch."""
    columns, truth = pixels.known_of_present()
    if not truth.numel():
        return _nothing(pixels)
    loss: Tensor = _kornia().tversky_loss(columns, truth, _FALSE_POSITIVE, _FALSE_NEGATIVE)
    return loss


def _lovasz(pixels: _Pixels) -> Tensor:
    """Berman et al., "The Lovász-Softmax loss" (2018), over all known pixels of the batch, classes present only.

    Over the batch, because scores are of the whole data set: by image, a class would count as much in a panorama that
    shows ten pixels of it as in one that is full of it.
    """
    columns, truth = pixels.known_of_present()
    if not truth.numel():
        return _nothing(pixels)
    # The library divides by all channels; the last one is no class.
    channels = columns.shape[1]
    weight = columns.new_full((channels,), channels / (channels - 1))
    weight[-1] = 0
    loss: Tensor = _kornia().lovasz_softmax_loss(columns, truth, weight)
    return loss


_BY_REGION: dict[str, _RegionTerm] = {"dice": _dice, "tversky": _tversky, "lovasz": _lovasz}


def _nothing(pixels: _Pixels) -> Tensor:
    """Zero, with gradients of zero."""
    return pixels.of_truth.sum() * 0


def _kornia() -> Any:
    try:
        import kornia.losses
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The focal, Tversky and Lovász losses need kornia: pip install 'sscloud[train]'. Or use --loss ce+dice."
        ) from error
    return kornia.losses
