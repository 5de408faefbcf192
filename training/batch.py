"""What the network learns from at a time: panoramas or crops of them, and where they were cut."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 8
"""Random numbers an item comes with."""


class Batch(NamedTuple):
    """N panoramas, or N crops of one size, on one device."""

    images: Tensor
    """(N, 3, h, w) RGB; normals in the scanner's frame. uint8 as loaded; float32 from 0 to 1 once on the device."""
    class_maps: Tensor
    """(N, h, w) uint8 class indices, void 255."""
    origins: Tensor
    """(N, 2) float32: row and column of the upper left corner in the whole panorama, pixels at model scale."""
    whole_hw: tuple[int, int]
    """Size of the whole panorama at model scale; equal to (h, w) when nothing was cut."""
    draws: Tensor
    """(N, DRAWS) float32 random numbers, uniform in 0 to 1, that augmentation is made of: the same for the same seed,
    epoch and item on every device."""

    @property
    def is_cropped(self) -> bool:
        """Whether the images are crops."""
        return tuple(self.images.shape[2:]) != self.whole_hw

    @property
    def has_seam(self) -> bool:
        """Whether the first column and the last one are neighbours."""
        return self.images.shape[3] == self.whole_hw[1]

    def parts(self, size: int) -> Iterator["Batch"]:
        """The batch in parts of at most `size` items."""
        for start in range(0, len(self.images), size):
            part = slice(start, start + size)
            yield Batch(
                images=self.images[part],
                class_maps=self.class_maps[part],
                origins=self.origins[part],
                whole_hw=self.whole_hw,
                draws=self.draws[part],
            )


def collate(samples: Sequence[Batch]) -> Batch:
    """Put items of one size together."""
    return Batch(
        images=torch.cat([sample.images for sample in samples]),
        class_maps=torch.cat([sample.class_maps for sample in samples]),
        origins=torch.cat([sample.origins for sample in samples]),
        whole_hw=samples[0].whole_hw,
        draws=torch.cat([sample.draws for sample in samples]),
    )
