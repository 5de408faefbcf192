"""UNet with the parameter names and shapes of milesial/Pytorch-UNet, and convolutions that may wrap around a panorama.

The architecture is Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015), in the
padded, batch-normalised form of https://github.com/milesial/Pytorch-UNet, whose state dicts load here.

Wrapping: column 0 and column W-1 of a panorama are neighbours. With `wrap`, every operation that looks sideways takes
its missing columns from the other side, so a roll of the input by a multiple of 16 columns rolls the output (where 16
divides the width). At widths that a pooling does not divide, it completes its last cell with the first column; on the
way up that surplus column is cut again. Without `wrap`, everything is as in milesial's network.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from sscloud.architecture import Architecture, Upsampling
from sscloud.errors import BundleError

_Module = TypeVar("_Module", bound=nn.Module)

_STRIP_ROWS = 64
"""Rows of a level on the way up that are computed at once without gradients; even."""


class UNet(nn.Module):
    """(N, 3, H, W) float in 0..1 → logits (N, classes, H, W).

    Args:
        architecture: what to build.

    With `checkpointing` set, training keeps the outputs of the levels only and computes what lies between again in the
    backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): the same gradients and
    statistics, at 0.4 times the memory and a third more computing. It is a way to compute, not part of the weights.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.checkpointing = False
        width, upsampling = architecture.base_width, architecture.upsampling
        factor = 1 if upsampling == "transposed" else 2
        self.inc = _DoubleConv(3, width)
        self.down1 = _Down(width, width * 2)
        self.down2 = _Down(width * 2, width * 4)
        self.down3 = _Down(width * 4, width * 8)
        self.down4 = _Down(width * 8, width * 16 // factor)
        self.up1 = _Up(width * 16, width * 8 // factor, upsampling)
        self.up2 = _Up(width * 8, width * 4 // factor, upsampling)
        self.up3 = _Up(width * 4, width * 2 // factor, upsampling)
        self.up4 = _Up(width * 2, width, upsampling)
        self.outc = _OutConv(width, architecture.classes)

    def forward(self, x: Tensor, *, wrap: bool | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            x: (N, 3, H, W), H and W at least 16.
            wrap: False for crops, which have no seam; by default as the architecture says.
        """
        around = self.architecture.wrap if wrap is None else wrap and self.architecture.wrap
        x1 = self._level(self.inc, x, wrap=around)
        x2 = self._level(self.down1, x1, wrap=around)
        x3 = self._level(self.down2, x2, wrap=around)
        x4 = self._level(self.down3, x3, wrap=around)
        x5 = self._level(self.down4, x4, wrap=around)
        x = self._level(self.up1, x5, x4, wrap=around)
        x = self._level(self.up2, x, x3, wrap=around)
        x = self._level(self.up3, x, x2, wrap=around)
        if self._recomputes:
            # This level is the largest: in halves, so that never the whole of it is there at once.
            x = self._level(self.up4.first, x, x1, wrap=around)
            logits: Tensor = self.outc(self._level(self.up4.conv.second, x, wrap=around))
            return logits
        return _stacked([self.outc(strip) for strip in self.up4.strips(x, x1, wrap=around)])

    @property
    def _recomputes(self) -> bool:
        return self.checkpointing and torch.is_grad_enabled()

    def _level(self, level: Callable[..., Tensor], *inputs: Tensor, wrap: bool) -> Tensor:
        if not self._recomputes:
            return level(*inputs, wrap=wrap)
        y: Tensor = checkpoint(
            level,
            *inputs,
            wrap=wrap,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(self)),
        )
        return y


class _DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, mid_channels: int | None = None) -> None:
        super().__init__()
        mid = mid_channels or out_channels
        # The indices in this Sequential are part of the parameter names.
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid, 3, padding=1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, *, wrap: bool) -> Tensor:
        return self.second(self.first(x, wrap=wrap), wrap=wrap)

    def first(self, x: Tensor, *, wrap: bool) -> Tensor:
        for layer in list(self.double_conv)[:3]:
            x = _applied(layer, x, wrap=wrap)
        return x

    def second(self, x: Tensor, *, wrap: bool) -> Tensor:
        for layer in list(self.double_conv)[3:]:
            x = _applied(layer, x, wrap=wrap)
        return x


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(in_channels, out_channels))

    def forward(self, x: Tensor, *, wrap: bool) -> Tensor:
        if wrap and x.shape[3] % 2:
            x = torch.cat([x, x[..., :1]], dim=3)
        pool, conv = self.maxpool_conv
        y: Tensor = conv(pool(x), wrap=wrap)
        return y


class _Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, upsampling: Upsampling) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.up: nn.Module
        if upsampling == "transposed":
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = _DoubleConv(in_channels, out_channels)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=upsampling == "bilinear-aligned")
            self.conv = _DoubleConv(in_channels, out_channels, in_channels // 2)

    def forward(self, below: Tensor, skip: Tensor, *, wrap: bool) -> Tensor:
        return _stacked(list(self.strips(below, skip, wrap=wrap)))

    def strips(self, below: Tensor, skip: Tensor, *, wrap: bool) -> Iterator[Tensor]:
        """The level's output, without gradients in strips of rows: joined inputs take most of a network's memory.

        Two convolutions look two rows further, and a transposed one doubles each row by itself, so the values are the
        same.
        """
        height = skip.shape[2]
        if torch.is_grad_enabled() or self.upsampling != "transposed":
            yield self._whole(below, skip, wrap=wrap)
            return
        for top in range(0, height, _STRIP_ROWS):
            first, last = max(0, top - 2), min(height, top + _STRIP_ROWS + 2)
            part = self._whole(below[:, :, first // 2 : last // 2], skip[:, :, first:last], wrap=wrap)
            yield part[:, :, top - first : top - first + _STRIP_ROWS]

    def _whole(self, below: Tensor, skip: Tensor, *, wrap: bool) -> Tensor:
        y: Tensor = self.conv.second(self.first(below, skip, wrap=wrap), wrap=wrap)
        return y

    def first(self, below: Tensor, skip: Tensor, *, wrap: bool) -> Tensor:
        """Up to the first of the two convolutions."""
        y: Tensor = self.conv.first(self._joined(below, skip, wrap=wrap), wrap=wrap)
        return y

    def _joined(self, below: Tensor, skip: Tensor, *, wrap: bool) -> Tensor:
        if wrap and self.upsampling != "transposed":
            x = self.up(_wrapped(below, 1))[..., 2:-2]
        else:
            x = self.up(below)
        if wrap:
            x = x[..., : skip.shape[3]]  # the way down completed its last cell with the first column
        missing_y = skip.shape[2] - x.shape[2]
        missing_x = skip.shape[3] - x.shape[3]
        if missing_y or missing_x:  # even padding by nothing makes a copy
            x = F.pad(x, [missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2])
        return torch.cat([skip, x], dim=1)


class _OutConv(nn.Module):
    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """While activations are computed again: normalise as before, and do not count the batch twice."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    counts = [norm.num_batches_tracked for norm in norms]
    before = [
        (norm.momentum, None if count is None else count.clone()) for norm, count in zip(norms, counts, strict=True)
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def _stacked(strips: list[Tensor]) -> Tensor:
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


def _applied(layer: nn.Module, x: Tensor, *, wrap: bool) -> Tensor:
    y: Tensor = _convolved_around(x, layer) if wrap and isinstance(layer, nn.Conv2d) else layer(x)
    return y


def _convolved_around(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of columns that close to a circle."""
    if torch.is_grad_enabled() or x.shape[3] < 2:
        return F.conv2d(_wrapped(x, 1), layer.weight, layer.bias, padding=(1, 0))
    # Without gradients the two columns at the seam are set right afterwards, instead of copying the whole input.
    y = F.conv2d(x, layer.weight, layer.bias, padding=1)
    seam = torch.cat([x[..., -2:], x[..., :2]], dim=3)
    y[..., [-1, 0]] = F.conv2d(seam, layer.weight, layer.bias, padding=(1, 0))
    return y


def _wrapped(x: Tensor, columns: int) -> Tensor:
    # F.pad(mode="circular") takes twice as long, forward and backward: python -m benchmarks.wrapping
    return torch.cat([x[..., -columns:], x, x[..., :columns]], dim=3)


def architecture_of(state: Mapping[str, object], *, wrap: bool, source: str) -> Architecture:
    """Find the architecture that fits a milesial state dict.

    Args:
        state: parameter name → tensor, without `mask_values`.
        wrap: put into the result.
        source: named in errors.

    Raises:
        BundleError: a tensor that decides is missing, no tensor, or has an impossible shape.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        tensor = state.get(name)
        if not isinstance(tensor, Tensor) or tensor.dim() != dimensions:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise BundleError(
                f"{source} is not a checkpoint of milesial's UNet: tensor {name!r} should have {dimensions} "
                f"dimensions, found {'none of that name' if tensor is None else found}. "
                f"Its first keys are {list(state)[:3]}."
            )
        return tensor.shape

    transposed = any(name.startswith("up1.up.") for name in state)
    return Architecture(
        classes=shape("outc.conv.weight", 4)[0],
        base_width=shape("inc.double_conv.0.weight", 4)[0],
        upsampling="transposed" if transposed else "bilinear-aligned",
        wrap=wrap,
    )


def build(architecture: Architecture, state: Mapping[str, object], *, source: str) -> UNet:
    """A network of the given weights, in evaluation mode on the CPU; strict. It takes the tensors over, without copies.

    Raises:
        BundleError: names every missing, surplus or misshapen tensor.
    """
    with torch.device("meta"):
        blank = UNet(architecture)
    return fill(blank, state, source=source)


def fill(blank: _Module, state: Mapping[str, object], *, source: str) -> _Module:
    """Give a network its weights, as `build` does.

    Args:
        blank: a network whose own weights do not matter; those on the meta device take no memory.
        state: parameter name → tensor.
        source: named in errors.

    Returns:
        `blank`, in evaluation mode.

    Raises:
        BundleError: names every missing, surplus or misshapen tensor.
    """
    blanks = blank.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in blanks.items()}
    problems = [f"{name}: missing" for name in expected if name not in state]
    problems += [f"{name}: not part of the network" for name in state if name not in expected]
    for name, size in expected.items():
        if name not in state:
            continue
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            problems.append(f"{name}: is a {type(tensor).__name__}, not a tensor")
        elif tuple(tensor.shape) != size:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, expected {size}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds values that are not finite")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise BundleError(f"The tensors of {source} do not fit the network: {'; '.join(problems[:8])}{more}.")
    # Assigned: no second copy, and no random numbers to be thrown away.
    own = {name: tensor.to(blanks[name].dtype) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    blank.load_state_dict(own, assign=True)
    return blank.eval()


def fold_batch_norm(model: UNet) -> None:
    """Work the batch normalisation of an evaluated network into its convolutions: the same logits but for rounding.

    The network can be trained no more. Its parameters are copies afterwards, apart from those of any other network.
    """
    for module in model.modules():
        if isinstance(module, _DoubleConv):
            layers = module.double_conv
            for index in (0, 3):
                convolution, norm = layers[index], layers[index + 1]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    layers[index] = fuse_conv_bn_eval(convolution, norm)
                    layers[index + 1] = nn.Identity()
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            for parameter in module.parameters():
                parameter.data = parameter.detach().clone()
    model.requires_grad_(False)  # noqa: FBT003
