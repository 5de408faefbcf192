"""The network in OpenVINO: on CPUs faster than PyTorch, and without it.

The graph is built from a bundle's weights, operation by operation as in `sscloud.unet`, for the size of the image at
hand. Nothing is traced: a trace would keep the paddings of one size for all. Batch norm is folded into the weights.

Precisions: fp32; bf16, where the CPU multiplies it; int8, when the bundle's folder says how far its activations reach
(`RANGES`; Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018): weights are then rounded to 8 bits per channel, what goes into a convolution to 8 bits per tensor.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from safetensors import SafetensorError, safe_open

from sscloud.architecture import Architecture, Upsampling
from sscloud.bundle import WEIGHTS, ModelBundle
from sscloud.errors import BundleError, ConfigError
from sscloud.files import atomic_write
from sscloud.inference import Precision
from sscloud.tiles import MAX_BYTES, pixels_within, plan_tiles, run_in_tiles

PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16", "int8")
"""Those that can be had here."""

RANGES = "int8.json"
"""File beside a bundle's weights: `{"weights_sha256": …, "ranges": {tensor: [least, largest]}}`."""

_EPSILON = 1e-5
"""Of batch norm: torch.nn.BatchNorm2d's default."""

_ROWS, _COLUMNS = 2, 3
"""Axes of (N, C, H, W)."""

_END = np.iinfo(np.int64).max


class OpenVinoForward:
    """A bundle's network in OpenVINO, on the CPU. One image at a time.

    Compiling for another size of images takes about a tenth of a run; the last size stays compiled.

    Args:
        bundle: a loaded bundle.
        precision: `auto` takes int8 when the bundle's folder has ranges, else bf16 where the CPU multiplies it, else
            fp32.
        max_bytes: memory for activations; larger images are cut into tiles.

    Raises:
        BundleError: the ranges are damaged or do not fit the weights.
        ConfigError: the network is no UNet, or the precision is unknown or cannot be had here.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        precision: Precision = "auto",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        architecture = bundle.manifest.architecture
        if architecture.family != "unet":
            raise ConfigError(
                f"{bundle.path} holds a network {architecture.family!r}; OpenVINO computes unets only here. Package "
                "the bundle with --backend torch."
            )
        self._bundle = bundle
        self._core = ov.Core()
        ranges = read_ranges(bundle)
        self._precision = self._find_precision(precision, ranges)
        self._ranges = ranges if self._precision == "int8" else None
        self._config = {
            "INFERENCE_PRECISION_HINT": "bf16" if self._precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # several workers would all be pinned to the first cores
        }
        self._max_pixels = pixels_within(max_bytes, base_width=architecture.base_width, value_bytes=4)
        if architecture.upsampling == "bilinear-aligned":  # every logit depends on the whole size
            self._max_pixels = sys.maxsize
        self._compiled: tuple[tuple[int, int, bool], ov.InferRequest] | None = None

    @property
    def tuned_to_size(self) -> bool:
        """Whether the first image of a size takes longer."""
        return True

    def describe(self) -> str:
        """Library, device and precision, for a log."""
        return f"openvino cpu {self._precision}"

    def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        """Logits of an image.

        Args:
            image: (h, w, 3) uint8 RGB, at least 16 pixels on each side.
            wrap: whether its columns are a full turn.

        Returns:
            (C, h, w) float32.

        Raises:
            BundleError: the weights cannot be read or do not fit.
        """
        around = wrap and self._bundle.manifest.architecture.wrap
        tiles = plan_tiles((image.shape[0], image.shape[1]), max_pixels=self._max_pixels, wrap=around)
        return run_in_tiles(image, tiles, self._run, wrap=around)

    def _run(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        height, width = image.shape[:2]
        request = self._request((height, width), wrap=wrap)
        result: NDArray[np.float32] = np.empty(
            (1, self._bundle.manifest.architecture.classes, height, width), np.float32
        )
        request.set_output_tensor(ov.Tensor(result, shared_memory=True))
        request.infer([np.ascontiguousarray(image)[None]], share_inputs=True, share_outputs=True)
        logits: NDArray[np.float32] = result[0]
        return logits

    def _request(self, size_hw: tuple[int, int], *, wrap: bool) -> ov.InferRequest:
        key = (*size_hw, wrap)
        if self._compiled is None or self._compiled[0] != key:
            self._compiled = None  # before memory is taken for the next one
            model = build_graph(self._bundle, size_hw, wrap=wrap, ranges=self._ranges)
            self._compiled = key, self._core.compile_model(model, "CPU", self._config).create_infer_request()
        return self._compiled[1]

    def _find_precision(self, precision: Precision, ranges: Mapping[str, tuple[float, float]] | None) -> Precision:
        if precision not in PRECISIONS:
            raise ConfigError(f"The precision is {precision!r}. With OpenVINO, choose one of {', '.join(PRECISIONS)}.")
        if precision == "int8" and ranges is None:
            raise ConfigError(
                f"{self._bundle.path} has no {RANGES}, which int8 needs. Package the bundle with --calibrate, or "
                "choose another precision."
            )
        if precision == "auto" and ranges is not None:
            return "int8"
        if precision == "auto":
            return "bf16" if "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
        return precision


def build_graph(
    bundle: ModelBundle,
    size_hw: tuple[int, int],
    *,
    wrap: bool,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    measured: bool = False,
) -> ov.Model:
    """The network for images of one size: (1, h, w, 3) uint8 → (1, C, h, w) float32 logits.

    Args:
        bundle: a loaded bundle.
        size_hw: of the images, at least 16 on each side.
        wrap: whether columns are a full turn.
        ranges: what `read_ranges` gives, for int8.
        measured: further outputs, the least and the largest value that go into each of the
            convolutions that `quantised` names, in that order.

    Raises:
        BundleError: the weights cannot be read or do not fit.
    """
    file, architecture = bundle.path / WEIGHTS, bundle.manifest.architecture
    try:
        with safe_open(file, "numpy") as weights:
            builder = _Builder(weights, architecture, wrap=wrap, ranges=ranges or {})
            image = ops.parameter([1, *size_hw, 3], np.uint8, name="image")
            logits = builder.network(image.output(0))
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}. Copy the bundle again.") from error
    except (SafetensorError, RuntimeError) as error:  # OpenVINO compares shapes, and raises RuntimeError
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"The tensors of {file} do not fit the network: {reason}") from error
    if logits.shape[1] != architecture.classes:
        raise BundleError(
            f"The tensors of {file} do not fit the network: it gives {logits.shape[1]} classes, expected "
            f"{architecture.classes}."
        )
    everywhere = np.arange(4)
    extremes = [
        reduce(x, everywhere).output(0)
        for x in (builder.inputs if measured else ())
        for reduce in (ops.reduce_min, ops.reduce_max)
    ]
    return ov.Model([logits, *extremes], [image])


def quantised(architecture: Architecture) -> tuple[str, ...]:
    """The convolutions that int8 rounds, in the order of the graph.

    The first two and the last one decide most and cost least: they stay float.
    """
    layers: tuple[str, ...] = ("conv.double_conv.0", "conv.double_conv.3")
    if architecture.upsampling == "transposed":
        layers = ("up", *layers)
    return (
        *(f"down{level}.maxpool_conv.1.double_conv.{index}" for level in range(1, 5) for index in (0, 3)),
        *(f"up{level}.{layer}" for level in range(1, 5) for layer in layers),
    )


def read_ranges(bundle: ModelBundle) -> dict[str, tuple[float, float]] | None:
    """What `write_ranges` wrote beside a bundle's weights; None without such a file.

    Raises:
        BundleError: damaged, or of other weights.
    """
    file = bundle.path / RANGES
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}. Package the bundle again.") from error
    try:
        sha256, ranges = data["weights_sha256"], data["ranges"]
        found = {str(name): (float(least), float(largest)) for name, (least, largest) in ranges.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BundleError(f"{file} is damaged ({error!r}). Package the bundle again.") from error
    if not all(-math.inf < least < largest < math.inf for least, largest in found.values()):
        raise BundleError(f"{file} is damaged: a range is empty or not finite. Package the bundle again.")
    if sha256 != bundle.manifest.weights_sha256 or found.keys() != set(quantised(bundle.manifest.architecture)):
        raise BundleError(f"{file} was measured with another network. Package the bundle again.")
    return found


def write_ranges(bundle: ModelBundle, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Put ranges beside a bundle's weights, for `precision="int8"`."""
    data = {"weights_sha256": bundle.manifest.weights_sha256, "ranges": ranges}
    atomic_write(bundle.path / RANGES, (json.dumps(data, indent=2) + "\n").encode())


class _Builder:
    """Writes the operations of one graph.

    Args:
        weights: an open safetensors file.
        architecture: what to build.
        wrap: whether columns are a full turn.
        ranges: as of `build_graph`.
    """

    def __init__(
        self, weights: Any, architecture: Architecture, *, wrap: bool, ranges: Mapping[str, tuple[float, float]]
    ) -> None:
        self._weights = weights
        self._upsampling: Upsampling = architecture.upsampling
        self._wrap = wrap
        self._ranges = ranges
        self._quantised = quantised(architecture)
        self.inputs: list[ov.Output] = []
        """What goes into each convolution that int8 rounds, in that order."""

    def network(self, image: ov.Output) -> ov.Output:
        """(1, h, w, 3) uint8 → (1, C, h, w) float32."""
        pixels = ops.transpose(ops.convert(image, "f32"), np.array([0, 3, 1, 2]))
        skips = [self._double_conv(ops.divide(pixels, np.float32(255)).output(0), "inc")]
        for level in range(1, 5):
            skips.append(self._double_conv(self._pool(skips[-1]), f"down{level}.maxpool_conv.1"))
        x = skips.pop()
        for level in range(1, 5):
            skip = skips.pop()
            joined = ops.concat([skip, self._up(x, skip, f"up{level}.up")], 1)
            x = self._double_conv(joined.output(0), f"up{level}.conv")
        kernel, bias = self._weights.get_tensor("outc.conv.weight"), self._weights.get_tensor("outc.conv.bias")
        return self._conv(x, "outc.conv", kernel, bias, columns=0, rows=0)

    def _double_conv(self, x: ov.Output, name: str) -> ov.Output:
        # One column more on each side than a convolution needs is what the second one needs.
        x = self._around(x, 2)
        for index in (0, 3):
            layer = f"{name}.double_conv.{index}"
            kernel, bias = self._folded(layer, f"{name}.double_conv.{index + 1}")
            x = ops.relu(self._conv(x, layer, kernel, bias, columns=0 if self._wrap else 1, rows=1)).output(0)
        return x

    def _conv(
        self,
        x: ov.Output,
        name: str,
        kernel: NDArray[np.float32],
        bias: NDArray[np.float32],
        *,
        columns: int,
        rows: int,
    ) -> ov.Output:
        x = self._rounded(x, name)
        padding = [rows, columns]
        product = ops.convolution(x, self._constant(kernel, name, 0), [1, 1], padding, padding, [1, 1])
        return ops.add(product, ops.constant(bias.reshape(1, -1, 1, 1))).output(0)

    def _pool(self, x: ov.Output) -> ov.Output:
        if self._wrap and x.shape[_COLUMNS] % 2:
            x = ops.concat([x, self._columns(x, 0, 1)], _COLUMNS).output(0)
        return ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)

    def _up(self, x: ov.Output, skip: ov.Output, name: str) -> ov.Output:
        """`x` at twice its size, cut or padded with zeros to the size of `skip`."""
        height, width = skip.shape[_ROWS], skip.shape[_COLUMNS]
        if self._upsampling == "transposed":
            kernel, bias = self._weights.get_tensor(f"{name}.weight"), self._weights.get_tensor(f"{name}.bias")
            x = self._rounded(x, name)
            product = ops.convolution_backprop_data(x, self._constant(kernel, name, 1), [2, 2])
            x = ops.add(product, ops.constant(bias.reshape(1, -1, 1, 1))).output(0)
        else:
            x = self._around(x, 1)
            corners = "align_corners" if self._upsampling == "bilinear-aligned" else "half_pixel"
            size = np.array([2 * x.shape[_ROWS], 2 * x.shape[_COLUMNS]])
            axes = np.array([_ROWS, _COLUMNS])
            x = ops.interpolate(
                x, size, "linear_onnx", "sizes", coordinate_transformation_mode=corners, axes=axes
            ).output(0)
            if self._wrap:
                x = self._columns(x, 2, -2)
        if self._wrap and x.shape[_COLUMNS] > width:
            x = self._columns(x, 0, width)
        missing = np.array([0, 0, height - x.shape[_ROWS], width - x.shape[_COLUMNS]])
        if not missing.any():
            return x
        return ops.pad(x, missing // 2, missing - missing // 2, "constant", np.float32(0)).output(0)

    def _around(self, x: ov.Output, columns: int) -> ov.Output:
        """With columns of the other side on each side, where columns are a full turn."""
        if not self._wrap:
            return x
        if x.shape[_COLUMNS] >= columns:
            return ops.concat([self._columns(x, -columns, _END), x, self._columns(x, 0, columns)], _COLUMNS).output(0)
        return ops.concat([x] * (2 * columns + 1), _COLUMNS).output(0)  # a single column: it is its own neighbour

    @staticmethod
    def _columns(x: ov.Output, start: int, stop: int) -> ov.Output:
        return ops.slice(x, np.array([start]), np.array([stop]), np.array([1]), np.array([_COLUMNS])).output(0)

    def _folded(self, conv: str, norm: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Kernel and bias of a convolution with the batch norm behind it."""
        get = self._weights.get_tensor
        scale = get(f"{norm}.weight") / np.sqrt(get(f"{norm}.running_var").astype(np.float64) + _EPSILON)
        bias = get(f"{norm}.bias") - get(f"{norm}.running_mean") * scale
        return get(f"{conv}.weight") * scale.astype(np.float32)[:, None, None, None], bias.astype(np.float32)

    def _rounded(self, x: ov.Output, name: str) -> ov.Output:
        """`x`, rounded to 256 steps where there is a range for it."""
        if name in self._quantised:
            self.inputs.append(x)
        if name not in self._ranges:
            return x
        least, largest = (np.float32(value) for value in self._ranges[name])
        return ops.fake_quantize(x, least, largest, least, largest, 256).output(0)

    def _constant(self, kernel: NDArray[np.float32], name: str, channels: int) -> ov.Output:
        """A kernel; rounded to 255 steps per output channel (axis `channels`) where its input is rounded too."""
        if name not in self._ranges:
            return ops.constant(np.ascontiguousarray(kernel)).output(0)
        others = tuple(axis for axis in range(4) if axis != channels)
        step = np.abs(kernel).max(others, keepdims=True) / np.float32(127)
        step[step == 0] = 1
        steps = np.rint(kernel / step).astype(np.int8)
        return ops.multiply(ops.convert(ops.constant(steps), "f32"), ops.constant(step)).output(0)
