"""How much memory a training step needs, counted without running it."""

import torch
from torch import Tensor

from sscloud.architecture import STRIDE, Architecture
from sscloud.image import scaled_size
from sscloud.unet import UNet

_PARAMETER_COPIES = 4
"""Weights, gradients and the two moments of AdamW."""

_WORKSPACE = 1.2
"""Measured peak over counted bytes: gradients in flight and the convolutions' workspace."""


def step_bytes(architecture: Architecture, batch_size: int, size_hw: tuple[int, int], *, amp: bool) -> int:
    """Memory of one training step, by counting what autograd keeps for the backward pass on PyTorch's meta device.

    Args:
        architecture: the network.
        batch_size: panoramas a step.
        size_hw: their size at model scale.
        amp: mixed precision.
    """
    dtype = torch.bfloat16 if amp else torch.float32
    with torch.device("meta"):
        model = UNet(architecture).to(dtype)
        images = torch.empty(batch_size, 3, *size_hw, dtype=dtype)
    parameters = sum(p.numel() * 4 for p in model.parameters())  # kept in float32 also with mixed precision
    owned = {_storage(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its storage's address from being used again

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in owned:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images).float().softmax(1).sum()
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return int(_PARAMETER_COPIES * parameters + activations * _WORKSPACE)


def advise(
    architecture: Architecture,
    batch_size: int,
    full_hw: tuple[int, int],
    scale: float,
    *,
    amp: bool,
    available: int,
) -> str:
    """Which scale and batch size would fit, as a sentence for a person.

    Args:
        full_hw: size of the panoramas before scaling.
        available: bytes the device has for training.
    """

    def needs(batch: int, at: float, *, amp: bool = amp) -> int:
        return step_bytes(architecture, batch, scaled_size(full_hw, at), amp=amp)

    def possible(at: float) -> bool:
        """Whether the network takes this size; normalisation needs two values at its innermost level."""
        height, width = scaled_size(full_hw, at)
        return min(height, width) >= STRIDE and batch_size * (height // STRIDE) * (width // STRIDE) > 1

    wanted = needs(batch_size, scale)
    text = (
        f"A step at --scale {scale:g} --batch-size {batch_size}{' --amp' if amp else ''} needs about "
        f"{wanted / 2**30:.1f} GiB; the device has {available / 2**30:.1f} GiB."
    )
    options = []
    if batch_size > 1 and needs(1, scale) <= available:
        largest = next(batch for batch in range(batch_size - 1, 0, -1) if needs(batch, scale) <= available)
        options.append(f"--batch-size {largest} --scale {scale:g}")
    scales = [step / 100 for step in range(int(scale * 100), 0, -1) if step / 100 < scale and possible(step / 100)]
    fitting = next((at for at in scales if needs(batch_size, at) <= available), None)
    if fitting is not None:
        options.append(f"--batch-size {batch_size} --scale {fitting:g}")
    if not amp and needs(batch_size, scale, amp=True) <= available:
        options.append(f"--amp at --scale {scale:g} --batch-size {batch_size}")
    if not options:
        return f"{text} No scale fits this device; a smaller --base-width would."
    return f"{text} These would fit: {'; or '.join(options)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch means that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
