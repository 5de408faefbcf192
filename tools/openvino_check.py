"""Before a bundle is packaged for OpenVINO: does its network compute there what it computes in PyTorch?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray

from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import BundleError, ImageError
from sscloud.image import read_image
from sscloud.inference import network_input
from sscloud.openvino_forward import OpenVinoForward, build_graph, quantised, write_ranges

LARGEST_ERROR = 1e-3
"""Of fp32, as a share of the largest logit: rounding stays a hundred times below it, a wrong operation far above."""

LEAST_EQUAL = 0.995
"""Share of pixels that keep their label in int8; trained networks keep 99.9 %."""

SEEN = 1e-3
"""Share of the pixels from which on a class is looked at by itself."""

_ROWS = 145
"""Of the panoramas that are compared: odd at every level of the network, where paddings come in."""
_CROP_HW = (113, 131)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How a network's maps agree with those that PyTorch's fp32 gives."""

    equal: float
    """Share of pixels with the same label, 0 to 1."""
    worst_iou: float
    """Least intersection over union of a class with itself, of the classes with at least `SEEN` of the pixels."""
    worst_class: int
    """Its channel."""


def check_parity(bundle: ModelBundle) -> float:
    """Compare fp32 logits of a panorama and of a crop with PyTorch's.

    Returns:
        the largest difference, as a share of the largest logit.

    Raises:
        BundleError: it is above `LARGEST_ERROR`.
    """
    model = load_model(bundle)
    forward = OpenVinoForward(bundle, precision="fp32")
    rng = np.random.default_rng(0)
    worst = 0.0
    for height, width in ((_ROWS, round(_ROWS * bundle.manifest.aspect)), _CROP_HW):
        blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        image = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
        wrap = (height, width) != _CROP_HW
        with torch.inference_mode():
            batch = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
            expected: NDArray[np.float32] = model(batch, wrap=wrap)[0].numpy()
        difference = float(np.abs(forward.logits(image, wrap=wrap) - expected).max() / np.abs(expected).max())
        worst = max(worst, difference)
    if not worst <= LARGEST_ERROR:  # nor NaN
        raise BundleError(
            f"{bundle.manifest.title}: OpenVINO's logits differ from PyTorch's by {worst:.1e} of the largest one, at "
            f"most {LARGEST_ERROR:.0e} was expected. Package it with --backend torch, and report this."
        )
    return worst


def calibrate(bundle: ModelBundle, files: Sequence[Path]) -> Agreement:
    """Measure how far the activations of some images reach, and put that beside the bundle's weights for int8.

    Args:
        bundle: a bundle; its folder is written to.
        files: images such as the network will see, some of every kind.

    Raises:
        ImageError: an image that cannot be used.
        BundleError: too many pixels get another label than in fp32.
    """
    manifest = bundle.manifest
    names = quantised(manifest.architecture)
    least, largest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    expected = []
    core = ov.Core()
    compiled: tuple[object, ov.CompiledModel] | None = None
    for file in files:
        image, wrap = _network_input(bundle, file)
        if compiled is None or compiled[0] != (image.shape, wrap):
            model = build_graph(bundle, (image.shape[0], image.shape[1]), wrap=wrap, measured=True)
            compiled = (image.shape, wrap), core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        logits, *extremes = compiled[1](image[None]).values()
        expected.append(logits[0].argmax(0).astype(np.uint8))
        least, largest = np.minimum(least, extremes[::2]), np.maximum(largest, extremes[1::2])
    ranges = {name: _with_zero(float(low), float(high)) for name, low, high in zip(names, least, largest, strict=True)}
    write_ranges(bundle, ranges)
    forward = OpenVinoForward(bundle, precision="int8")
    classes = manifest.architecture.classes
    confusion = np.zeros((classes, classes), np.int64)
    for file, true in zip(files, expected, strict=True):
        image, wrap = _network_input(bundle, file)
        found = forward.logits(image, wrap=wrap).argmax(0)
        confusion += np.bincount(true.ravel() * np.int64(classes) + found.ravel(), minlength=classes**2).reshape(
            classes, classes
        )
    agreement = _agreement(confusion)
    if agreement.equal < LEAST_EQUAL:
        raise BundleError(
            f"{bundle.manifest.title}: in int8 only {agreement.equal:.2%} of the pixels keep their label, at least "
            f"{LEAST_EQUAL:.1%} were expected. Give --calibrate more images, of every kind, or leave it out."
        )
    return agreement


def _agreement(confusion: NDArray[np.int64]) -> Agreement:
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    seen = confusion.sum(1) >= SEEN * confusion.sum()
    iou = np.divide(right, union, out=np.ones(len(right)), where=seen)
    return Agreement(
        equal=float(right.sum() / confusion.sum()), worst_iou=float(iou.min()), worst_class=int(iou.argmin())
    )


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """A range moved by less than a step, so that zero, which paddings are made of, is one of its 256 steps."""
    low, high = min(low, 0.0), max(high, 1e-6)
    step = (high - low) / 255
    below = round(-low / step)
    return -below * step, (255 - below) * step


def _network_input(bundle: ModelBundle, file: Path) -> tuple[NDArray[np.uint8], bool]:
    """An image as the network sees it, and whether it is a full turn."""
    image = read_image(file)
    try:
        return network_input(image, bundle.manifest, size_hw=(image.shape[0], image.shape[1]))
    except ImageError as error:
        raise ImageError(f"{file}: {error} Leave it out.") from error
