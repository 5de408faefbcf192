"""How much memory a training step needs, counted without running it, and what to choose so that it fits."""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sscloud.architecture import STRIDE, Architecture
from sscloud.errors import TrainingError
from sscloud.image import scaled_size
from sscloud.networks import Network, build_network
from sscloud.unet import UNet
from training.config import LossName
from training.crops import clipped
from training.losses import make_loss

SCALES = (1.0, 0.5, 0.25, 0.2, 0.1)
"""What a plan chooses the scale from."""

_PARAMETER_COPIES = 4
"""Weights, gradients and the two moments of AdamW."""

_SPARE = 400 << 20
"""Scratch of the libraries and gaps between allocations: the most that was measured beyond the counted bytes, with
`python -m benchmarks.memory`."""

_SHARE = 0.8
"""Of the available memory that a plan may use: other programs breathe, and pictures are loaded meanwhile."""

_LARGEST_BATCH = 8

_LEAST_CROP = 512
"""Rows of the smallest planned crop."""

_LEAST_VIEW = 1 / 4
"""Of a panorama's height, that a crop must show where the plan chooses the scale: detail without its surroundings is
not worth the time."""

_COUNTED_LOSS: LossName = "ce+dice"
"""Of a counted step, which has no contents to choose pixels by; what other losses need beyond it is added."""

_COUNTED_BATCH = 2
"""Images in a counted step; normalisation needs two values."""

_EVEN, _ODD = 512, 511
"""Pixels of the sides of a counted step: pooled evenly at every level, and at none."""


def step_bytes(
    architecture: Architecture,
    batch_size: int,
    size_hw: tuple[int, int],
    *,
    amp: bool,
    checkpointing: bool = False,
    has_seam: bool = True,
    ema: bool = False,
    loss: LossName = "ce+dice",
) -> int:
    """Most memory that a training step with AdamW holds at once.

    The step runs on tensors without contents, and what is alive is added up at every operation: activations, the loss's
    probabilities, gradients in flight. A fixed spare part stands for what the libraries use inside their operations.

    Args:
        architecture: the network.
        batch_size: images whose gradients are computed at once.
        size_hw: their size at model scale.
        amp: mixed precision, in 16 bits.
        checkpointing: activations are computed twice.
        has_seam: whether the network may wrap; crops may not.
        ema: whether a moving average of the weights is kept.
        loss: what is trained with.
    """
    counted = _count(architecture, size_hw, loss, amp=amp, checkpointing=checkpointing, has_seam=has_seam)
    return _fixed(counted, amp=amp, ema=ema) + batch_size * counted.image


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """A step's memory, bytes."""

    parameters: int
    """Of the weights alone, in float32."""
    image: int
    """Of all that grows with the batch, for one image."""


def _fixed(counted: _Counted, *, amp: bool, ema: bool) -> int:
    """Bytes that do not depend on the images."""
    in_16_bits = counted.parameters // 2 if amp else 0
    return counted.parameters * (_PARAMETER_COPIES + ema) + in_16_bits + _SPARE


def _count(
    architecture: Architecture,
    size_hw: tuple[int, int],
    loss: LossName,
    *,
    amp: bool,
    checkpointing: bool,
    has_seam: bool,
) -> _Counted:
    """Count a step of another size with a UNet, and take it as many times as this one has pixels.

    Memory a pixel depends on whether poolings divide the sides (else copies are padded), so that many sizes share one
    count. Other networks are counted as they are: they pad by fixed amounts.
    """
    sample = size_hw
    if architecture.family == "unet":
        height, width = (_ODD if side % STRIDE else _EVEN for side in size_hw)
        sample = height, width
    found = _count_once(architecture, sample, amp=amp, checkpointing=checkpointing, has_seam=has_seam)
    image = -(-found.image * size_hw[0] * size_hw[1] // (sample[0] * sample[1]))
    more = max(0, _loss_bytes(loss, architecture.classes) - _loss_bytes(_COUNTED_LOSS, architecture.classes))
    return _Counted(parameters=found.parameters, image=image + more * size_hw[0] * size_hw[1])


@lru_cache(maxsize=256)
def _count_once(
    architecture: Architecture, size_hw: tuple[int, int], *, amp: bool, checkpointing: bool, has_seam: bool
) -> _Counted:
    mode = FakeTensorMode()
    if architecture.family == "unet":
        with mode:
            model: Network = build_network(architecture)
    else:  # some encoders compute with numbers while they are built, which fakes do not have
        with torch.random.fork_rng(devices=[]):
            real = build_network(architecture)
        with FakeCopyMode(mode):
            model = copy.deepcopy(real)
    with mode:
        if isinstance(model, UNet):
            model.checkpointing = checkpointing
        loss = make_loss(_COUNTED_LOSS, weights=torch.ones(architecture.classes))
        images = torch.empty(_COUNTED_BATCH, 3, *size_hw, dtype=torch.uint8)
        class_maps = torch.empty(_COUNTED_BATCH, *size_hw, dtype=torch.uint8)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]
        live = _LiveBytes([*model.parameters(), *model.buffers(), *loss.buffers()])
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                inputs = (images.float() / 255).to(memory_format=torch.channels_last)
                value = loss(model(inputs, wrap=has_seam), class_maps)
            value.backward()
    return _Counted(
        parameters=sum(4 * parameter.numel() for parameter in model.parameters()),
        image=-(-live.peak // _COUNTED_BATCH),
    )


@lru_cache
def _loss_bytes(name: LossName, classes: int) -> int:
    """Most bytes a pixel that a loss holds beside the logits. With contents: some losses choose pixels by them."""
    pixels = 64 * 64
    loss = make_loss(name, weights=torch.ones(classes))
    logits = torch.zeros(1, classes, 64, 64, requires_grad=True)
    class_map = (torch.arange(pixels) % classes).view(1, 64, 64).to(torch.uint8)
    live = _LiveBytes([logits, class_map, *loss.buffers()])
    with live:
        loss(logits, class_map).backward()
    return -(-live.peak // pixels)


def _forget_gradient(parameter: Tensor) -> None:
    """Gradients of weights are counted with the weights: they do not grow with the images."""
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that exist, while it is entered.

    Args:
        ignored: tensors that are not counted.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def available_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to train with so that it fits, and why."""

    scale: float
    panorama_hw: tuple[int, int]
    """At this scale."""
    crop: tuple[int, int] | None
    """(h, w), pixels at model scale; None: whole panoramas."""
    batch_size: int
    """Images whose gradients are computed at once."""
    accumulate: int
    """Batches whose gradients are added up, so that a step has as many images as were asked for."""
    checkpointing: bool
    needed: int
    """Counted bytes of a step."""
    available: int
    """Bytes of the device."""
    reasons: tuple[str, ...]
    """Sentences: what was considered before, and what it would need."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Of the images that enter the network."""
        return self.crop or self.panorama_hw

    @property
    def has_seam(self) -> bool:
        """Whether the images show all columns."""
        return self.size_hw[1] == self.panorama_hw[1]

    def describe(self) -> str:
        """The plan and its reasons, for a person: several lines."""
        flags = [f"--scale {self.scale:g}"]
        if self.crop is not None:
            flags.append(f"--crop {self.crop[0]}x{self.crop[1]}")
        flags.append(f"--batch-size {self.batch_size}")
        if self.accumulate > 1:
            flags.append(f"--accumulate {self.accumulate}")
        if self.checkpointing:
            flags.append("--checkpointing")
        considered = "".join(f"  {reason}\n" for reason in self.reasons)
        return (
            f"Planned for {_gib(self.available)}, of which {_SHARE:.0%} may be used:\n{considered}"
            f"  Chosen: {' '.join(flags)}, {_gib(self.needed)} a step."
        )


def plan(
    architecture: Architecture,
    *,
    full_hw: tuple[int, int],
    available: int,
    amp: bool,
    scale: float | None = None,
    batch_size: int | None = None,
    crop: tuple[int, int] | None = None,
    checkpointing: bool = False,
    ema: bool = False,
    loss: LossName = "ce+dice",
) -> Plan:
    """Choose what was left open so that a step needs at most 80 % of the memory.

    As much of a panorama at once as fits: whole panoramas, then crops of half, a quarter … of their height, at least
    512 rows. Each of them with activations kept, then computed twice (a third more time costs less than seeing less).
    A scale that is left open becomes the largest one at which a crop shows a quarter of the height; a batch, the
    largest power of two up to 8. A given batch that does not fit is divided, and its gradients added up.

    Args:
        architecture: the network.
        full_hw: size of the largest panorama before scaling.
        available: bytes the device has for training.
        amp: mixed precision.
        scale: None to choose one.
        batch_size: images a step; None to choose.
        crop: (h, w), pixels at model scale; None to cut only where whole panoramas do not fit.
        checkpointing: compute activations twice in any case; else where that is needed.
        ema: whether a moving average of the weights is kept.
        loss: what is trained with.

    Raises:
        TrainingError: nothing fits.
    """
    budget = int(_SHARE * available)
    one = _count_once(architecture, (_EVEN, _EVEN), amp=amp, checkpointing=False, has_seam=True)
    least = _fixed(one, amp=amp, ema=ema)
    if least >= budget:
        raise TrainingError(
            f"The weights with their gradients and moments, and what PyTorch itself needs, take {_gib(least)}, more "
            f"than {_SHARE:.0%} of the {_gib(available)} that may be used. Give --memory at least "
            f"{math.ceil(10 * least / _SHARE / 2**30) / 10 + 0.1:.1f}."
        )
    recomputing = (True,) if checkpointing else (False, True) if architecture.family == "unet" else (False,)
    reasons: list[str] = []
    for tried, panorama_hw, size_hw in _sizes(full_hw, scale, crop):
        what = f"{'whole panoramas' if size_hw == panorama_hw else 'crops'} of {size_hw[1]}x{size_hw[0]}"
        needs: list[str] = []
        for recompute in recomputing:
            has_seam = size_hw[1] == panorama_hw[1]
            counted = _count(architecture, size_hw, loss, amp=amp, checkpointing=recompute, has_seam=has_seam)
            fixed = _fixed(counted, amp=amp, ema=ema)
            needs.append(f"{_gib(fixed + counted.image)}{' with activations computed twice' if recompute else ''}")
            most = (budget - fixed) // counted.image
            if most < 1:
                continue
            batch = _power_of_two(min(most, _LARGEST_BATCH)) if batch_size is None else _divisor(batch_size, most)
            reasons.append(f"Scale {tried:g}: {what} need {', '.join(needs)}: {_fitting(most)}.")
            return Plan(
                scale=tried,
                panorama_hw=panorama_hw,
                crop=None if size_hw == panorama_hw else size_hw,
                batch_size=batch,
                accumulate=1 if batch_size is None else batch_size // batch,
                checkpointing=recompute,
                needed=fixed + batch * counted.image,
                available=available,
                reasons=tuple(reasons),
            )
        reasons.append(f"Scale {tried:g}: {what} need {', '.join(needs)}.")
    considered = "\n".join(f"  {reason}" for reason in reasons)
    raise TrainingError(
        f"Nothing fits {_gib(available)}, of which {_SHARE:.0%} may be used:\n{considered}\n"
        f"A smaller {_size_flag(architecture)} needs less"
        f"{'' if amp else ', and so does --amp'}."
    )


def _sizes(
    full_hw: tuple[int, int], scale: float | None, crop: tuple[int, int] | None
) -> Iterator[tuple[float, tuple[int, int], tuple[int, int]]]:
    """Scale, size of the panorama at that scale, size of the images: all that a plan tries, the best first."""
    for tried in SCALES if scale is None else (scale,):
        panorama_hw = scaled_size(full_hw, tried)
        if crop is not None:
            yield tried, panorama_hw, clipped(crop, panorama_hw)
            continue
        for size_hw in [panorama_hw, *_crops(panorama_hw)]:
            if scale is not None or size_hw[0] >= _LEAST_VIEW * panorama_hw[0]:
                yield tried, panorama_hw, size_hw


def _crops(panorama_hw: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) of the crops to plan with, the largest first, in a panorama's aspect; multiples of 16 pool evenly."""
    height, width = panorama_hw
    if height <= _LEAST_CROP:
        return [(height, _rounded_up(width / 2))] if width > height else []
    crops = []
    rows = height
    while rows > _LEAST_CROP:
        rows = max(_LEAST_CROP, _rounded_up(rows / 2))
        crops.append((rows, min(width, _rounded_up(width * rows / height))))
    return crops


def _rounded_up(pixels: float) -> int:
    return -int(-pixels // STRIDE) * STRIDE


def _fitting(most: int) -> str:
    return f"{most} at a time fit" if most <= _LARGEST_BATCH else f"more than {_LARGEST_BATCH} at a time fit"


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _divisor(number: int, most: int) -> int:
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


def _size_flag(architecture: Architecture) -> str:
    return "--base-width" if architecture.family == "unet" else "--encoder"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def advise(
    architecture: Architecture,
    batch_size: int,
    full_hw: tuple[int, int],
    scale: float,
    *,
    amp: bool,
    available: int,
    crop: tuple[int, int] | None = None,
    checkpointing: bool = False,
    ema: bool = False,
    loss: LossName = "ce+dice",
) -> str:
    """What would fit instead, as a sentence for a person.

    Args:
        architecture: the network.
        batch_size: images whose gradients are computed at once.
        full_hw: size of the panoramas before scaling.
        scale: as asked for.
        amp: mixed precision.
        available: bytes the device has for training.
        crop: (h, w) as asked for; None for whole panoramas.
        checkpointing: as asked for.
        ema: whether a moving average of the weights is kept.
        loss: what is trained with.
    """

    def needs(batch: int, at: float, cut: tuple[int, int] | None = crop, **changed: bool) -> int:
        panorama_hw = scaled_size(full_hw, at)
        size_hw = panorama_hw if cut is None else clipped(cut, panorama_hw)
        return step_bytes(
            architecture,
            batch,
            size_hw,
            **{"amp": amp, "checkpointing": checkpointing, "ema": ema, **changed},
            has_seam=size_hw[1] == panorama_hw[1],
            loss=loss,
        )

    def possible(at: float) -> bool:
        """Whether the network takes this size; normalisation needs two values at its innermost level."""
        height, width = scaled_size(full_hw, at)
        return min(height, width) >= STRIDE and batch_size * (height // STRIDE) * (width // STRIDE) > 1

    asked = "".join(
        (
            f" --crop {crop[0]}x{crop[1]}" if crop else "",
            " --amp" if amp else "",
            " --checkpointing" if checkpointing else "",
        )
    )
    text = (
        f"A step at --scale {scale:g} --batch-size {batch_size}{asked} needs about {_gib(needs(batch_size, scale))}; "
        f"the device has {_gib(available)}."
    )
    options = []
    largest = next((batch for batch in range(batch_size - 1, 0, -1) if needs(batch, scale) <= available), None)
    if largest is not None:
        options.append(f"--batch-size {largest} --scale {scale:g}")
    can_recompute = architecture.family == "unet" and not checkpointing
    if can_recompute and needs(batch_size, scale, checkpointing=True) <= available:
        options.append(f"--checkpointing at --scale {scale:g} --batch-size {batch_size}")
    panorama_hw = scaled_size(full_hw, scale)
    smaller = [size for size in _crops(panorama_hw) if crop is None or size[0] * size[1] < crop[0] * crop[1]]
    cut = next((size for size in smaller if needs(batch_size, scale, size) <= available), None)
    if cut is not None:
        options.append(f"--crop {cut[0]}x{cut[1]} at --scale {scale:g} --batch-size {batch_size}")
    scales = [step / 100 for step in range(1, 101) if step / 100 < scale and possible(step / 100)]
    fitting = _last_that(lambda at: needs(batch_size, at) <= available, scales)
    if fitting is not None:
        options.append(f"--batch-size {batch_size} --scale {fitting:g}")
    if not amp and needs(batch_size, scale, amp=True) <= available:
        options.append(f"--amp at --scale {scale:g} --batch-size {batch_size}")
    if not options:
        return f"{text} No scale fits this device; a smaller {_size_flag(architecture)} would."
    return f"{text} These would fit: {'; or '.join(options)}."


def _last_that(holds: Callable[[float], bool], ascending: list[float]) -> float | None:
    """The largest value that something holds for, found by halving: it holds for all below."""
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) // 2
        if holds(ascending[middle]):
            low = middle + 1
        else:
            high = middle
    return ascending[low - 1] if low else None
