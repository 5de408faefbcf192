"""Predictor: a panorama → class map and confidence, as the bundle says."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sscloud.architecture import STRIDE
from sscloud.bundle import Manifest, ModelBundle, channels_to_label_map
from sscloud.errors import ConfigError, ImageError
from sscloud.frame import to_view_frame
from sscloud.image import MAX_PIXELS, decode_image, image_size_of, read_image, resize_image, scaled_size
from sscloud.stages import Stages
from sscloud.turns import TurnedForward
from sscloud.upsample import Interpolated, class_map, top_probability

log = logging.getLogger(__name__)

ASPECT_TOLERANCE = 0.02
"""Relative deviation of an image's aspect from the bundle's up to which it is taken for a panorama."""

LARGEST_WIDTH = 8192
"""Columns of the largest panoramas that scanners write."""

Backend = Literal["torch", "openvino"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]


class Forward(Protocol):
    """Runs a bundle's network over images, one at a time."""

    @property
    def tuned_to_size(self) -> bool:
        """Whether the first image of a size takes longer."""

    def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        """(h, w, 3) uint8 RGB, at least 16 pixels on each side → (C, h, w) float32 logits."""

    def describe(self) -> str:
        """Library, device and precision, for a log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What the model says of every pixel."""

    class_map: NDArray[np.uint8]
    """(H, W) channel of the network."""
    confidence: Interpolated
    """Probability of a pixel's best channel, 0 to 1."""
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
        precision: `auto` (the fastest that the hardware is made for), `fp32`, `bf16`, `fp16` or `int8`.
        backend: the library that computes; OpenVINO needs a CPU, and no PyTorch.
        turns: times that the network sees a panorama, turned and mirrored; the mean counts. Crops are seen once.

    Raises:
        ConfigError: the device does not exist here, or cannot compute in that precision; or the bundle's panoramas
            cannot be turned.
        BundleError: the weights do not fit.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        backend: Backend = "torch",
        turns: int = 1,
    ) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        _check_turns(manifest, turns)
        self._forward = make_forward(bundle, device=device, precision=precision, backend=backend)
        if turns > 1:
            self._forward = TurnedForward(
                self._forward,
                turns=turns,
                encoding=manifest.encoding,
                frame=manifest.frame,
                azimuth=manifest.azimuth,
                temperature=manifest.temperature,
            )

    def describe(self) -> str:
        """Library, device and precision, for a log."""
        return self._forward.describe()

    def warm_up(self) -> None:
        """Run the network once, so that the first request does not pay for lazy initialisation.

        What is tuned to a size is shown the largest panorama.
        """
        aspect = self.bundle.manifest.aspect
        least = math.ceil(STRIDE / self.bundle.manifest.scale) + 1
        height = max(least, round(LARGEST_WIDTH / aspect)) if self._forward.tuned_to_size else least
        self.predict(np.zeros((height, max(least, round(height * aspect)), 3), np.uint8))

    def predict_file(self, path: Path) -> Segmentation:
        """`predict` of a file; errors name it."""
        image = read_image(path)
        try:
            return self.predict(image)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error

    def predict(
        self,
        image: bytes | NDArray[np.uint8],
        *,
        max_pixels: int = MAX_PIXELS,
        draft: bool = False,
        stages: Stages | None = None,
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: an encoded picture, or (H, W, 3) uint8 RGB.
            max_pixels: bound on encoded pictures.
            draft: decode JPEGs at a fraction of their size, no less than twice the network's input: faster, and
                worse for small classes.
            stages: told how long decode, resize, forward and upsample take.

        Raises:
            ImageError: not decodable, too large, or too small for the model.
        """
        clock = stages or Stages()
        manifest = self.bundle.manifest
        with clock("decode"):
            full_hw: tuple[int, int] | None = None
            if isinstance(image, bytes):
                least_hw: tuple[int, int] | None = None
                if draft:
                    full_hw = image_size_of(image, max_pixels=max_pixels)
                    least_hw = scaled_size(full_hw, min(1.0, 2 * manifest.scale))
                image = decode_image(image, max_pixels=max_pixels, least_hw=least_hw)
            size_hw = full_hw or (image.shape[0], image.shape[1])
        with clock("resize"):
            scaled, wrap = network_input(image, manifest, size_hw=size_hw)
            del image  # the largest array of all, and needed no more
        with clock("forward"):
            logits = self._forward.logits(scaled, wrap=wrap)
        with clock("upsample"):
            probability = top_probability(logits, temperature=manifest.temperature)
            return Segmentation(
                class_map=class_map(logits, size_hw, wrap=wrap),
                confidence=Interpolated(values=probability, size_hw=size_hw, wrap=wrap),
                label_ids=manifest.label_ids,
                wrapped=wrap,
            )


def network_input(
    image: NDArray[np.uint8], manifest: Manifest, *, size_hw: tuple[int, int]
) -> tuple[NDArray[np.uint8], bool]:
    """An image as a bundle's network sees it.

    Args:
        image: (H, W, 3) uint8 RGB, perhaps decoded at a fraction of its size.
        manifest: of the bundle.
        size_hw: the image's size before that.

    Returns:
        (h, w, 3) uint8, and whether its columns are a full turn for the network.

    Raises:
        ImageError: too small for the model.
    """
    input_hw = scaled_size(size_hw, manifest.scale)
    if min(input_hw) < STRIDE:
        least = math.ceil(STRIDE / manifest.scale)
        raise ImageError(
            f"The image is {size_hw[1]}x{size_hw[0]} pixels, too small for this model: at scale {manifest.scale:g} "
            f"it needs at least {least} pixels on each side."
        )
    scaled = resize_image(image, input_hw, resample=manifest.resample, encoding=manifest.encoding)
    whole = is_panorama(size_hw, manifest.aspect)
    if manifest.frame == "view" and manifest.azimuth is not None:
        if whole:
            scaled = to_view_frame(scaled, manifest.azimuth)
        else:
            log.warning(
                "An image of %dx%d pixels is no whole panorama of aspect %g: the azimuth of its columns is not known, "
                "and its normals stay in the scanner's frame, which %s has not learned.",
                size_hw[1], size_hw[0], manifest.aspect, manifest.title,
            )  # fmt: skip
    return scaled, whole and manifest.architecture.wrap


def is_panorama(size_hw: tuple[int, int], aspect: float) -> bool:
    """Whether an image of this size is a full turn rather than a crop, by its aspect."""
    return abs(size_hw[1] / size_hw[0] / aspect - 1) <= ASPECT_TOLERANCE


def _check_turns(manifest: Manifest, turns: int) -> None:
    if turns < 1:
        raise ConfigError(f"The turns to average over must be 1 or more, found {turns}.")
    if turns == 1:
        return
    if not manifest.architecture.wrap:
        raise ConfigError(
            f"{manifest.title} does not wrap at the seam, so turning its panoramas would only move where it errs. "
            "Leave the turns at 1, or train without --no-wrap."
        )
    if manifest.encoding == "normals" and manifest.azimuth is None:
        raise ConfigError(
            f"{manifest.title} does not say how columns relate to directions, so normals cannot be turned. Leave the "
            "turns at 1, or state the azimuth in dataset.yaml and train again."
        )


def make_forward(bundle: ModelBundle, *, device: str, precision: Precision, backend: Backend) -> Forward:
    """A bundle's network, ready to run; imports the one library that is needed. See `Predictor`."""
    if backend == "openvino":
        if device not in ("auto", "cpu"):
            raise ConfigError(f"The device is {device!r}, but OpenVINO computes on the CPU here. Set auto or cpu.")
        from sscloud.openvino_forward import OpenVinoForward

        return OpenVinoForward(bundle, precision=precision)
    from sscloud.forward import TorchForward, find_device

    return TorchForward(bundle, device=find_device(device), precision=precision)
