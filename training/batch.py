"""What the network learns from at a time: panoramas or crops of them, and where they were cut."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """N panoramas, or N crops of one size, on one device."""

    images: Tensor
    """(N, 3, h, w) float32 RGB, 0 to 1; normals in the scanner's frame."""
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
        """Whether the images are crops, which have no seam."""
        return tuple(self.images.shape[2:]) != self.whole_hw


DRAWS = 8
"""Random numbers an item comes with."""
