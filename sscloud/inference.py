"""Predictor: a panorama → class map and confidence at its full size, as the bundle says."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sscloud.bundle import ModelBundle, channels_to_label_map
from sscloud.errors import ConfigError, ImageError
from sscloud.image import MAX_PIXELS, decode_image, read_image, resize_image, scaled_size
from sscloud.unet import STRIDE
from sscloud.upsample import classify

ASPECT_TOLERANCE = 0.02
"""Relative deviation of an image's aspect from the bundle's up to which it is taken for a panorama."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What the model says of every pixel."""

    class_map: NDArray[np.uint8]
    """(H, W) channel of the network."""
    confidence: NDArray[np.float32]
    """(H, W) probability of that channel, 0 to 1."""
    label_ids: tuple[int, ...]
    """The label id that each channel writes."""
    wrapped: bool
    """Whether the image was taken for a full turn."""

    @property
    def label_map(self) -> NDArray[np.uint8]:
        """(H, W) label ids."""
        return channels_to_label_map(self.class_map, self.label_ids)


class Predictor:
    """Runs a bundle's network. One at a time: calls from several threads must take turns.

    Args:
        bundle: a loaded bundle.
        device: `auto` (the GPU when there is one), `cpu`, `cuda`, `cuda:1`, …

    Raises:
        ConfigError: the device does not exist here.
        BundleError: the weights do not fit.
    """

    def __init__(self, bundle: ModelBundle, *, device: str = "auto") -> None:
        self.bundle = bundle
        self.device = find_device(device)
        self._model = bundle.model().to(self.device)
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def warm_up(self) -> None:
        """Run the network once, so that the first request does not pay for lazy initialisation."""
        side = int(np.ceil(STRIDE / self.bundle.manifest.scale)) + 1
        self.predict(np.zeros((side, max(side, round(side * self.bundle.manifest.aspect)), 3), np.uint8))

    def predict_file(self, path: Path) -> Segmentation:
        """`predict` of a file; errors name it."""
        image = read_image(path)
        try:
            return self.predict(image)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error

    def predict(self, image: bytes | NDArray[np.uint8], *, max_pixels: int = MAX_PIXELS) -> Segmentation:
        """Segment one image.

        Args:
            image: an encoded picture, or (H, W, 3) uint8 RGB.
            max_pixels: bound on encoded pictures.

        Raises:
            ImageError: not decodable, too large, or too small for the model.
        """
        pixels = decode_image(image, max_pixels=max_pixels) if isinstance(image, bytes) else image
        manifest = self.bundle.manifest
        size_hw = (pixels.shape[0], pixels.shape[1])
        input_hw = scaled_size(size_hw, manifest.scale)
        if min(input_hw) < STRIDE:
            least = int(np.ceil(STRIDE / manifest.scale))
            raise ImageError(
                f"The image is {size_hw[1]}x{size_hw[0]} pixels, too small for this model: at scale {manifest.scale:g} "
                f"it needs at least {least} pixels on each side."
            )
        wrap = manifest.architecture.wrap and is_panorama(size_hw, manifest.aspect)
        scaled = resize_image(pixels, input_hw, resample=manifest.resample, encoding=manifest.encoding)
        with torch.inference_mode():
            batch = to_input(scaled[None]).to(self.device, memory_format=torch.channels_last)
            logits = self._model(batch, wrap=wrap)[0].float()
            full = classify(logits, size_hw, wrap=wrap)
        return Segmentation(
            class_map=full.class_map, confidence=full.confidence, label_ids=manifest.label_ids, wrapped=wrap
        )


def is_panorama(size_hw: tuple[int, int], aspect: float) -> bool:
    """Whether an image of this size is a full turn rather than a crop, by its aspect."""
    return abs(size_hw[1] / size_hw[0] / aspect - 1) <= ASPECT_TOLERANCE


def to_input(images: NDArray[np.uint8]) -> torch.Tensor:
    """(N, h, w, 3) uint8 → (N, 3, h, w) float32 in 0..1, what the network sees."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32).div(255)


def find_device(name: str) -> torch.device:
    """Resolve a device name.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"The device {name!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Use --device cpu or "
            "auto."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Devices of type {device.type!r} are not supported, only cpu and cuda. Use --device auto.")
    return device
