"""Networks of every family: `sscloud.unet`, and those of segmentation-models-pytorch made fit for panoramas.

segmentation-models-pytorch (https://github.com/qubvel-org/segmentation_models.pytorch) is optional, and imported when a
network of it is built: Unet++ (Zhou et al., 2018), DeepLabV3+ (Chen et al., 2018), FPN (Kirillov et al., 2019) and
SegFormer (Xie et al., 2021), each over an encoder that may have learned from ImageNet before.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sscloud import unet
from sscloud.architecture import Architecture, Family
from sscloud.errors import BundleError, ConfigError
from sscloud.unet import UNet

STRIDE = 32
"""Input pixels a cell of an encoder's innermost level covers; the library's networks take multiples of it only."""

MARGIN = 128
"""Columns of the other side, a multiple of `STRIDE`, that a panorama is shown with beyond its seam: what the ends of
the padded picture do to the logits has faded by then. Convolutions themselves are not wrapped as a UNet's are."""

_CLASSES: Mapping[Family, str] = {
    "unet++": "UnetPlusPlus",
    "deeplabv3+": "DeepLabV3Plus",
    "fpn": "FPN",
    "segformer": "Segformer",
}

# What encoders were shown while they learned from ImageNet, of values in 0..1. The few that learned with other numbers
# see another contrast at first; asking the library for theirs would need a connection whenever a bundle is opened.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class PanoramicNetwork(nn.Module):
    """(N, 3, H, W) float in 0..1 → logits (N, classes, H, W), by a network of segmentation-models-pytorch.

    Pictures are normalised as ImageNet's are, normals panoramas too: a pretrained encoder's first filters expect values
    around 0. Sizes are made up to multiples of 32 and the logits are cut again: rows by repeating the last one, columns
    likewise, or with `wrap` with those of the other side, and `MARGIN` more on both sides.

    Args:
        architecture: what `model` is.
        model: the library's network.
    """

    def __init__(self, architecture: Architecture, model: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = model
        # Not part of the state: bundles hold what was learned.
        self.register_buffer("_mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self._mean: Tensor
        self._std: Tensor

    def forward(self, x: Tensor, *, wrap: bool | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            x: (N, 3, H, W).
            wrap: False for crops, which have no seam; by default as the architecture says.

        Raises:
            ConfigError: a batch that is too small to learn from.
        """
        around = self.architecture.wrap if wrap is None else wrap and self.architecture.wrap
        height, width = x.shape[2:]
        left = MARGIN if around else 0
        padded = _padded((x - self._mean) / self._std, left, around=around)
        try:
            logits: Tensor = self.model(padded)
        except ValueError as error:
            # Statistics of one pooled value: batch norm refuses them while it learns.
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"The network {self.architecture.family!r} cannot learn from batches of {len(x)} picture(s) of "
                f"{width}x{height} pixels: some of its layers see one value each. Set --batch-size 2 or more."
            ) from error
        return logits[:, :, :height, left : left + width]


Network = UNet | PanoramicNetwork


def build_network(architecture: Architecture, *, pretrained: bool = False) -> Network:
    """A new network, with random weights.

    Args:
        architecture: what to build.
        pretrained: whether the encoder starts with what it learned from ImageNet, downloaded from huggingface.co when
            it is not in the cache; a UNet has no such weights.

    Raises:
        ConfigError: segmentation-models-pytorch is missing or broken, has no such encoder for this family, or cannot
            download its weights.
    """
    if architecture.family == "unet":
        return UNet(architecture)
    model = _make(architecture, weights=None)
    if pretrained:
        # timm's encoders ("tu-…") name their weights themselves.
        weights = True if str(architecture.encoder).startswith("tu-") else "imagenet"
        try:
            model = _make(architecture, weights=weights)
        except ConfigError as error:
            raise ConfigError(
                f"The weights that {architecture.encoder} learned from ImageNet cannot be had "
                f"({_reason(error.__cause__)}). They are downloaded from huggingface.co once. Connect this machine, "
                "set HF_HOME to a cache that has them, choose another --encoder, or start from random weights with "
                "--no-pretrained."
            ) from error
    return PanoramicNetwork(architecture, model)


def load_network(architecture: Architecture, state: Mapping[str, object], *, source: str) -> Network:
    """A network of the given weights, in evaluation mode on the CPU; strict. Nothing is downloaded.

    Args:
        architecture: what to build.
        state: parameter name → tensor; taken over, without copies.
        source: named in errors.

    Raises:
        BundleError: names every missing, surplus or misshapen tensor.
        ConfigError: the library that it is built of is missing, or has no such encoder.
    """
    if architecture.family == "unet":
        return unet.build(architecture, state, source=source)
    with torch.random.fork_rng(devices=[]):  # not on the meta device, where some encoders cannot be built
        blank = build_network(architecture)
    return unet.fill(blank, state, source=source)


def last_convolution(model: Network) -> nn.Conv2d:
    """The layer that has a channel a class, `(classes, …)` in its weight and its bias.

    Raises:
        BundleError: the library builds another network than it is known for.
    """
    if isinstance(model, UNet):
        return model.outc.conv
    for layer in model.model.get_submodule("segmentation_head").modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == model.architecture.classes:
            return layer
    raise BundleError(f"The network {model.architecture.family!r} has no layer with a channel a class.")


def _make(architecture: Architecture, *, weights: str | bool | None) -> nn.Module:
    """The library's network, with an encoder of these weights."""
    library = _library(architecture)
    try:
        model: nn.Module = getattr(library, _CLASSES[architecture.family])(
            encoder_name=architecture.encoder, encoder_weights=weights, in_channels=3, classes=architecture.classes
        )
    except Exception as error:  # of the library, timm and the hub: keys, values, connections, …
        raise ConfigError(
            f"segmentation-models-pytorch builds no {architecture.family!r} with the encoder "
            f"{architecture.encoder!r} ({_reason(error)}). Choose another --encoder: resnet34, mit_b0 (segformer, "
            "fpn), tu-convnext_tiny, … as https://smp.readthedocs.io/en/latest/encoders.html lists."
        ) from error
    return model


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _library(architecture: Architecture) -> Any:
    try:
        import segmentation_models_pytorch as smp
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
        raise ConfigError(
            f"The network {architecture.family!r} needs segmentation-models-pytorch, which cannot be imported: "
            f"{error}. Install it with: pip install segmentation-models-pytorch"
        ) from error
    return smp


def _padded(x: Tensor, left: int, *, around: bool) -> Tensor:
    """(N, C, H, W) with columns on the left and on the right, and sizes that are multiples of `STRIDE`."""
    height, width = x.shape[2:]
    below, right = -height % STRIDE, left + -width % STRIDE
    if around and right:
        x = x[..., torch.arange(-left, width + right, device=x.device) % width]
        right = 0
    return F.pad(x, [0, right, 0, below], mode="replicate") if right or below else x
