"""Batch normalisation over all processes of a run, on GPUs and on processors alike.

With one panorama a process, each process's own statistics are those of a single scan; over all processes they are those
of the whole batch, so that a run gives the same whether its batch lies in one process or in several.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

log = logging.getLogger(__name__)


def synchronise(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Replace the batch normalisation of a network by a synchronised one with the same parameters and buffers.

    Without a process group, in evaluation, and in a single process it computes what it did before. Layers derived from
    `nn.BatchNorm2d`, which may do more than normalise, are left as they are, with a warning.

    Args:
        model: changed in place, unless it is a layer to be replaced itself.
        device: where the network will run. On CUDA it gets PyTorch's own layer, which is faster there, takes no other
            tensors, and keeps a network from being distributed over processors.

    Returns:
        The network.
    """
    if type(model) is nn.BatchNorm2d:
        if device.type != "cuda":
            return SyncBatchNorm2d.of(model)
        on_gpu: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return on_gpu
    if isinstance(model, nn.BatchNorm2d):
        log.warning("%s layers are normalised in each process by itself.", type(model).__name__)
    for name, child in model.named_children():
        model.add_module(name, synchronise(child, device=device))
    return model


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes, on any device and backend, gloo on processors among them.

    Ioffe & Szegedy, "Batch Normalization" (2015), with the statistics of the union of the processes' pixels. The
    processes may hold different numbers of pixels. It has to be affine and to track statistics with a fixed momentum,
    as is the default.
    """

    momentum: float

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> "SyncBatchNorm2d":
        """A synchronised layer that shares the parameters and buffers of `layer`."""
        synchronised = cls(layer.num_features, layer.eps, layer.momentum)
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            setattr(synchronised, name, value)
        return synchronised.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) floating → the same, normalised by channel; statistics in float32 at least."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance, count = _statistics(wide)
        self._remember(mean.detach(), variance.detach(), count)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        # Keeps the input for the way back, as plain batch normalisation does, and nothing else of its size.
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.num_batches_tracked is not None:  # None while activations are computed again
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) mean and (C,) biased variance over the pixels of all processes, and their number.

    The processes' variances are joined by Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances" (1979): a difference of sums of squares would lose all digits where the mean is large.
    """
    here = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    sums = _summed(torch.cat([mean * here, mean.new_tensor([here])]))
    count = sums[-1].detach()
    total_mean = sums[:-1] / count
    squares = _summed(here * (variance + (mean - total_mean) ** 2))
    return total_mean, squares / count, count


def _summed(values: Tensor) -> Tensor:
    """The sum over all processes; gradients are summed over them too, as every process uses the result."""
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: FunctionCtx, *gradients: Any) -> Tensor:
        total: Tensor = gradients[0].clone()
        dist.all_reduce(total)
        return total
