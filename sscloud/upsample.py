"""Logits at model scale → class map and confidence at full size, in strips, so that full-size logits never exist.

The result is that of `F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)`, with `wrap` of the
logits padded by one wrapped column on each side. Ties between classes aside, it is the same to the pixel.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_STRIP_BYTES = 64 << 20
"""Size of a strip's logits at full width; bounds the memory, and larger strips were no faster."""


class FullSize(NamedTuple):
    """What `classify` gives back."""

    class_map: NDArray[np.uint8]
    """(H, W) channel of the largest interpolated logit."""
    confidence: NDArray[np.float32]
    """(H, W) largest softmax at model scale, interpolated bilinearly."""


def classify(logits: Tensor, size_hw: tuple[int, int], *, wrap: bool) -> FullSize:
    """Interpolate logits to full size and take the best channel of each pixel.

    Args:
        logits: (C, h, w) float32, C at most 256.
        size_hw: full size.
        wrap: the columns close to a full turn.
    """
    height, width = size_hw
    channels = logits.shape[0]
    probability = logits.softmax(0).amax(0, keepdim=True)
    planes = torch.cat([logits, probability])
    top, bottom, fraction = _rows(planes.shape[1], height)
    class_map = torch.empty(height, width, dtype=torch.uint8)
    confidence = torch.empty(height, width)
    rows = max(1, _STRIP_BYTES // (4 * width * planes.shape[0]))
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        strip = torch.lerp(planes[:, top[part]], planes[:, bottom[part]], fraction[part, None].to(planes.device))
        full = _columns(strip, width, wrap=wrap)
        class_map[part] = full[:channels].argmax(0).to(torch.uint8)
        confidence[part] = full[channels]
    return FullSize(class_map.numpy(), confidence.numpy())


def _rows(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each target row, the two source rows it lies between and the share of the lower one (half-pixel centres)."""
    position = ((torch.arange(target, dtype=torch.float32) + 0.5) * (source / target) - 0.5).clamp_(min=0)
    top = position.floor().long().clamp_(max=source - 1)
    return top, (top + 1).clamp_(max=source - 1), position - top


def _columns(strip: Tensor, width: int, *, wrap: bool) -> Tensor:
    """(C, r, w) → (C, r, width)."""
    if not wrap:
        return F.interpolate(strip[None], size=(strip.shape[1], width), mode="bilinear", align_corners=False)[0]
    # A position left of the first column's centre or right of the last one's lies between these two.
    source = strip.shape[2]
    position = (torch.arange(width, dtype=torch.float32) + 0.5) * (source / width) - 0.5
    left = position.floor()
    fraction = (position - left).to(strip.device)
    index = left.long() % source
    return torch.lerp(strip[..., index], strip[..., (index + 1) % source], fraction)
