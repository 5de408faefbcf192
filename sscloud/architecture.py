"""What a network is built of: all of it that can be said without PyTorch."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sscloud.errors import BundleError

Family = Literal["unet", "unet++", "deeplabv3+", "fpn", "segformer"]
"""`unet` is `sscloud.unet`; the others are those of segmentation-models-pytorch, which `sscloud.networks` wraps."""

Upsampling = Literal["transposed", "bilinear", "bilinear-aligned"]

STRIDE = 16
"""Input pixels a cell of the innermost level covers along each side; also the smallest input."""

REACH = 144
"""Input pixels, a multiple of `STRIDE`, beyond which nothing changes a logit.

Two convolutions a level reach 2 · (1 + 2 + 4 + 8 + 16) pixels down and 2 · (8 + 4 + 2 + 1) up, bilinear up-sampling
another 16 + 8 + 4 + 2, and a pooling's cell up to 15: 137 in all. Not so where `Architecture.is_local` is False."""

# Without a colon or a slash: timm takes those for places to download a network from.
_ENCODER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """All that is needed to build a network; part of a bundle's manifest."""

    classes: int
    """Output channels."""
    base_width: int = 64
    """Channels of a UNet's first level; doubles with each level. 64 in the original."""
    upsampling: Upsampling = "transposed"
    """A UNet's. `bilinear-aligned` is milesial's bilinear variant (align_corners=True), which cannot wrap."""
    wrap: bool = True
    """Whether panoramas are convolved around their seam."""
    family: Family = "unet"
    encoder: str | None = None
    """What a network of another family than `unet` finds features with: a name of segmentation-models-pytorch's, as
    `resnet34`, `mit_b0`, `tu-convnext_tiny`."""

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
        if self.family not in get_args(Family):
            raise BundleError(f"Unknown network {self.family!r}. Known are {', '.join(get_args(Family))}.")
        if self.family == "unet":
            if self.encoder is not None:
                raise BundleError(f"A unet has no encoder to choose, found {self.encoder!r}. Leave it out.")
            return
        if not isinstance(self.encoder, str) or not _ENCODER.fullmatch(self.encoder):
            raise BundleError(
                f"The network {self.family!r} needs the name of an encoder (resnet34, say), found {self.encoder!r}."
            )
        if (self.base_width, self.upsampling) != (64, "transposed"):
            raise BundleError(
                f"Base width and up-sampling are choices of a unet; of the network {self.family!r} the encoder decides "
                f"about its size. Found {self.base_width} and {self.upsampling}: leave them out."
            )

    @property
    def is_local(self) -> bool:
        """Whether no pixel further away than `REACH` changes a logit.

        Not so in `bilinear-aligned` UNets, where the size of the whole moves every column, nor with the global pooling
        and the attention of other families.
        """
        return self.family == "unet" and self.upsampling != "bilinear-aligned"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; without the family of a UNet, so that what knows no other family can read it."""
        data = asdict(self)
        if self.family == "unet":
            del data["family"], data["encoder"]
        return data
