"""A stand-in for the library segmentation-models-pytorch: its constructors, its errors, and tiny networks.

Put it into `sys.modules` under the library's name. The networks look less far than `sscloud.networks.MARGIN`, so that
what wraps does so exactly; DeepLabV3Plus pools the whole picture besides, as the real one does.
"""

import warnings

import torch
from torch import Tensor, nn

STRIDE = 32


class Hub:
    """Where weights come from."""

    online = True


class _Encoder(nn.Module):
    def __init__(self, name: str, weights: str | bool | None) -> None:
        super().__init__()
        if name.startswith("tu-"):
            if not isinstance(weights, bool | None):
                warnings.warn("For 'tu-' encoders, `encoder_weights` should be set to True or None", stacklevel=2)
        elif name not in ("resnet34", "mit_b0"):
            raise KeyError(f"Wrong encoder name `{name}`, supported encoders: ['resnet34', 'mit_b0']")
        self.conv = nn.Conv2d(3, 4, STRIDE, stride=STRIDE)
        self.norm = nn.BatchNorm2d(4)
        if weights is not None:
            if not Hub.online:
                raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")
            nn.init.constant_(self.conv.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.norm(self.conv(x)))
        return y


class _Model(nn.Module):
    pools = False

    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        in_channels: int = 3,
        classes: int = 1,
    ) -> None:
        super().__init__()
        self.arguments = (encoder_name, encoder_weights, in_channels, classes)
        self.encoder = _Encoder(encoder_name, encoder_weights)
        self.decoder = nn.Conv2d(4, 4, 3, padding=1)
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)) if self.pools else None
        self.segmentation_head = nn.Sequential(nn.Conv2d(4 + 3, classes, 3, padding=1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % STRIDE or width % STRIDE:
            raise RuntimeError(f"Wrong input shape height={height}, width={width}.")
        y = self.decoder(self.encoder(x))
        if self.pooling is not None:
            y = y + self.pooling(y)
        y = nn.functional.interpolate(y, scale_factor=STRIDE, mode="nearest")
        logits: Tensor = self.segmentation_head(torch.cat([x, y], dim=1))
        return logits


class UnetPlusPlus(_Model):
    def __init__(self, encoder_name: str = "resnet34", **options: object) -> None:
        if encoder_name.startswith("mit_b"):
            raise ValueError(f"UnetPlusPlus is not support encoder_name={encoder_name}")
        super().__init__(encoder_name, **options)  # type: ignore[arg-type]


class DeepLabV3Plus(_Model):
    pools = True


class FPN(_Model):
    pass


class Segformer(_Model):
    pass
