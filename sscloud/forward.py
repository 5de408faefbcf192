"""The network as PyTorch runs it: batch norm folded, channels last, in the hardware's best precision, in tiles."""

import logging
import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import ConfigError
from sscloud.networks import Network, last_convolution
from sscloud.tiles import MAX_BYTES, Tile, pixels_within, plan_blended, plan_tiles, run_blended, run_in_tiles
from sscloud.unet import UNet, fold_batch_norm

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TorchForward:
    """A bundle's network in PyTorch. One image at a time.

    Args:
        bundle: a loaded bundle.
        device: a torch device.
        precision: `auto` takes bf16 where the hardware is made for it (AVX512_BF16 or AMX; NVIDIA from Ampere on),
            fp16 on older NVIDIA cards, and fp32 elsewhere.
        max_bytes: memory for a tile's activations; None: 4 GiB, or most of what a GPU has free.

    Raises:
        BundleError: the weights do not fit.
        ConfigError: the device cannot compute in that precision.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        device: torch.device,
        precision: str = "auto",
        max_bytes: int | None = None,
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._dtype = find_dtype(device, precision)
        self._model = self._load(device, self._dtype)
        self._spare: Network | None = None
        whole_first = max_bytes is None
        if max_bytes is None:
            max_bytes = MAX_BYTES if device.type == "cpu" else int(0.8 * torch.cuda.mem_get_info(device)[0])
        architecture = bundle.manifest.architecture
        self._is_local = architecture.is_local
        # Other families have a base width of 64 too: they take 160 to 450 values a pixel, measured; such a UNet 416.
        self._max_pixels = pixels_within(
            max_bytes, base_width=architecture.base_width, value_bytes=self._dtype.itemsize
        )
        if architecture.upsampling == "bilinear-aligned" and whole_first:
            self._max_pixels = sys.maxsize  # a blend of tiles would not be what milesial's network computes

    @property
    def tuned_to_size(self) -> bool:
        """Whether the first image of a size takes longer: a GPU chooses its algorithms and takes its memory then."""
        return self._device.type == "cuda"

    def describe(self) -> str:
        """Library, device and precision, for a log."""
        return f"torch {self._device} {_NAMES[self._dtype]}"

    def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        """Logits of an image; see `sscloud.inference.Forward`.

        When memory runs out the image is cut into smaller tiles, and in the end computed by the CPU: CVAT gives up a
        whole task for one frame without an answer. Tiles of a network that is not local (`Architecture.is_local`)
        overlap and are blended; the logits are those of the blend.

        Args:
            image: (h, w, 3) uint8 RGB, at least 16 pixels on each side.
            wrap: whether its columns are a full turn.

        Raises:
            MemoryError: not even the smallest tiles fit.
        """
        while True:
            tiles = self._plan(image, self._max_pixels, wrap=wrap)
            try:
                logits = self._run(self._model, image, tiles, wrap=wrap)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                if self._dtype == torch.float32 or np.isfinite(logits).all():
                    return logits
                log.warning("Numbers beyond %s; this image is computed in fp32 by the CPU", _NAMES[self._dtype])
                return self._run_spare(image, wrap=wrap)
            # Only here is the memory free that the error's traceback held.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if tiles == self._plan(image, 1, wrap=wrap):
                break
            self._max_pixels = max(math.prod(tile.padded_size_hw) for tile in tiles) // 2
            log.warning("Out of memory on %s; going on with tiles of half the size: %s", self._device, reason)
        if self._device.type == "cpu":
            raise MemoryError(f"An image of {image.shape[1]}x{image.shape[0]} pixels does not fit into memory.")
        log.warning("Not even the smallest tiles fit into the memory of %s: the CPU computes this image", self._device)
        return self._run_spare(image, wrap=wrap)

    def _plan(self, image: NDArray[np.uint8], max_pixels: int, *, wrap: bool) -> tuple[Tile, ...]:
        plan = plan_tiles if self._is_local else plan_blended
        return plan((image.shape[0], image.shape[1]), max_pixels=max_pixels, wrap=wrap)

    def _run(
        self, model: Network, image: NDArray[np.uint8], tiles: Sequence[Tile], *, wrap: bool
    ) -> NDArray[np.float32]:
        weight = next(model.parameters())

        def compute(part: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
            with torch.inference_mode():
                return _to_host(model(to_input(part, weight.device, weight.dtype), wrap=wrap)[0].float())

        if self._is_local:
            return run_in_tiles(image, tiles, compute, wrap=wrap)
        return run_blended(image, tiles, compute, wrap=wrap, temperature=self._bundle.manifest.temperature)

    def _run_spare(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        if self._spare is None:
            self._spare = self._load(torch.device("cpu"), torch.float32)
        width = self._bundle.manifest.architecture.base_width
        max_pixels = pixels_within(MAX_BYTES, base_width=width, value_bytes=4)
        return self._run(self._spare, image, self._plan(image, max_pixels, wrap=wrap), wrap=wrap)

    def _load(self, device: torch.device, dtype: torch.dtype) -> Network:
        model = load_model(self._bundle)
        if isinstance(model, UNet):
            fold_batch_norm(model)
        model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        if dtype != torch.float32:
            # The last layer decides between close classes, and costs next to nothing.
            last = last_convolution(model)
            last.float()
            last.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        return model


def to_input(image: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(h, w, 3) uint8 → (1, 3, h, w) in 0..1, channels last: what the network sees."""
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return pixels.permute(2, 0, 1)[None].to(torch.float32).div_(255).to(dtype)


def find_device(name: str) -> torch.device:
    """Resolve a device name.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(
            f"The device {name!r} cannot be used here. Choose auto, cpu, or cuda (cuda:1 for a second GPU)."
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"The device {name!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Choose cpu or auto."
        ) from error
    return device


def find_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type that a device computes in.

    Raises:
        ConfigError: unknown, or one that the device is not made for.
    """
    if device.type == "cuda":
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        half = torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    types = {"auto": half, **_DTYPES}
    if device.type == "cpu":
        del types["fp16"]
    if precision not in types:
        hint = {
            "fp16": " fp16 is for GPUs.",
            "int8": " int8 needs a function made with `sscloud package --backend openvino --calibrate IMAGE…`.",
        }.get(precision, "")
        raise ConfigError(
            f"The precision {precision!r} is none of {device.type}'s: choose one of {', '.join(types)}.{hint}"
        )
    return types[precision]


def _to_host(logits: Tensor) -> NDArray[np.float32]:
    if logits.device.type == "cpu":
        return logits.numpy()
    host = torch.empty(logits.shape, pin_memory=True)
    return host.copy_(logits).numpy()


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; elsewhere they are emulated, slower than fp32."""
    # Older versions of PyTorch do not tell; fp32 is right everywhere.
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


_OUT_OF_MEMORY = (
    "can't allocate memory",  # PyTorch's allocator for the CPU
    "out of memory",  # the CUDA driver, pinned memory
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "unable to find an engine",  # cuDNN, when no algorithm's workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part.lower() in text for part in _OUT_OF_MEMORY)
