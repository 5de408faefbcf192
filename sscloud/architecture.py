"""What a network is built of: all of `sscloud.unet.UNet` that can be said without PyTorch."""

from dataclasses import dataclass
from typing import Literal

from sscloud.errors import BundleError

Upsampling = Literal["transposed", "bilinear", "bilinear-aligned"]

STRIDE = 16
"""Input pixels a cell of the innermost level covers along each side; also the smallest input."""

REACH = 144
"""Input pixels, a multiple of `STRIDE`, beyond which nothing changes a logit.

Two convolutions a level reach 2 · (1 + 2 + 4 + 8 + 16) pixels down and 2 · (8 + 4 + 2 + 1) up, bilinear up-sampling
another 16 + 8 + 4 + 2, and a pooling's cell up to 15: 137 in all. Not so for `bilinear-aligned`, where every logit
depends on the whole size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """All that is needed to build a `UNet`; part of a bundle's manifest."""

    classes: int
    """Output channels."""
    base_width: int = 64
    """Channels of the first level; doubles with each level. 64 in the original."""
    upsampling: Upsampling = "transposed"
    """`bilinear-aligned` is milesial's bilinear variant (align_corners=True), which cannot wrap."""
    wrap: bool = True
    """Whether panoramas are convolved around their seam."""

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= 256:
            raise BundleError(f"A network has 1 to 256 classes, found {self.classes}.")
        if not 1 <= self.base_width <= 512:
            raise BundleError(f"The base width is 1 to 512 channels, found {self.base_width}.")
        if self.wrap and self.upsampling == "bilinear-aligned":
            raise BundleError(
                "milesial's bilinear up-sampling (align_corners=True) moves columns by a distance that depends on "
                "where they are, so it cannot wrap. Use upsampling 'bilinear', or wrap off."
            )
