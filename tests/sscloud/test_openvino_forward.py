"""The network in OpenVINO against the one in PyTorch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sscloud.architecture import Architecture, Upsampling
from sscloud.bundle import WEIGHTS, Manifest, ModelBundle
from sscloud.checkpoint import load_model, save_bundle
from sscloud.errors import BundleError, ConfigError
from sscloud.openvino_forward import RANGES, OpenVinoForward, build_graph, quantised, read_ranges, write_ranges
from sscloud.tiles import pixels_within, plan_tiles
from sscloud.unet import UNet

SIZES = [(16, 16), (16, 17), (31, 47), (33, 65), (50, 99), (64, 128)]
"""Squares and panoramas; odd at every level of the network."""

SMALL = 10_000_000
"""Memory, bytes, that takes some 190,000 pixels of a network of width 2."""


@pytest.fixture(scope="module")
def make_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: Callable[..., Manifest]
) -> Callable[..., ModelBundle]:
    """A bundle whose batch norms have something to fold and whose logits spread over some units."""

    def make(*, upsampling: Upsampling = "transposed", wrap: bool = True, width: int = 8) -> ModelBundle:
        torch.manual_seed(0)
        architecture = Architecture(classes=6, base_width=width, upsampling=upsampling, wrap=wrap)
        model = UNet(architecture).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                    module.running_var.uniform_(0.05, 0.2)  # type: ignore[union-attr]
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)
        return save_bundle(tmp_path_factory.mktemp("openvino") / "bundle", model, make_manifest(architecture))

    return make


def torch_logits(bundle: ModelBundle, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
    with torch.inference_mode():
        batch = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        logits: NDArray[np.float32] = load_model(bundle)(batch, wrap=wrap)[0].numpy()
    return logits


def picture(size_hw: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def measured_ranges(bundle: ModelBundle, image: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
    import openvino as ov

    model = build_graph(bundle, (image.shape[0], image.shape[1]), wrap=True, measured=True)
    _, *extremes = ov.Core().compile_model(model, "CPU")(image[None]).values()
    names = quantised(bundle.manifest.architecture)
    return {
        name: (float(low), float(high)) for name, low, high in zip(names, extremes[::2], extremes[1::2], strict=True)
    }


class TestParity:
    @pytest.mark.parametrize("wrap", [True, False])
    @pytest.mark.parametrize(
        ("upsampling", "network_wraps"),
        [("transposed", True), ("transposed", False), ("bilinear", True), ("bilinear-aligned", False)],
    )
    def test_of_every_size(
        self, make_bundle: Callable[..., ModelBundle], upsampling: Upsampling, network_wraps: bool, wrap: bool
    ) -> None:
        bundle = make_bundle(upsampling=upsampling, wrap=network_wraps)
        forward = OpenVinoForward(bundle, precision="fp32")
        for size_hw in SIZES:
            image = picture(size_hw)
            expected = torch_logits(bundle, image, wrap=wrap)
            found = forward.logits(image, wrap=wrap)
            assert found.shape == (6, *size_hw)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"{size_hw}")
            assert np.ptp(expected) > 1, "nothing to compare"

    def test_a_roll_of_a_panorama_rolls_the_logits(self, make_bundle: Callable[..., ModelBundle]) -> None:
        forward = OpenVinoForward(make_bundle(), precision="fp32")
        image = picture((32, 64))
        rolled = forward.logits(np.roll(image, 16, axis=1), wrap=True)
        np.testing.assert_allclose(rolled, np.roll(forward.logits(image, wrap=True), 16, axis=2), atol=1e-4)

    def test_results_are_the_callers_own(self, make_bundle: Callable[..., ModelBundle]) -> None:
        forward = OpenVinoForward(make_bundle(), precision="fp32")
        first = forward.logits(picture((32, 64)), wrap=True)
        kept = first.copy()
        forward.logits(picture((32, 64), seed=1), wrap=True)
        np.testing.assert_array_equal(first, kept)

    def test_a_view_of_a_larger_image(self, make_bundle: Callable[..., ModelBundle]) -> None:
        forward = OpenVinoForward(make_bundle(), precision="fp32")
        image = picture((40, 70))[3:35, 5:69]
        np.testing.assert_array_equal(forward.logits(image, wrap=False), forward.logits(image.copy(), wrap=False))

    @pytest.mark.parametrize(("width", "wrap"), [(640, True), (500, True), (500, False)])
    def test_in_tiles(self, make_bundle: Callable[..., ModelBundle], width: int, wrap: bool) -> None:
        bundle, image = make_bundle(width=2), picture((400, width))
        pixels = pixels_within(SMALL, base_width=2, value_bytes=4)
        assert 1 < len(plan_tiles(image.shape[:2], max_pixels=pixels, wrap=wrap)) < 8
        whole = OpenVinoForward(bundle, precision="fp32").logits(image, wrap=wrap)
        tiled = OpenVinoForward(bundle, precision="fp32", max_bytes=SMALL).logits(image, wrap=wrap)
        np.testing.assert_allclose(tiled, whole, atol=1e-5)

    def test_a_network_that_cannot_be_tiled(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle, image = make_bundle(width=2, upsampling="bilinear-aligned", wrap=False), picture((400, 500))
        tiled = OpenVinoForward(bundle, precision="fp32", max_bytes=SMALL).logits(image, wrap=False)
        np.testing.assert_allclose(tiled, torch_logits(bundle, image, wrap=False), atol=1e-4)

    @pytest.mark.slow
    def test_at_full_size(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle = make_bundle(width=64)
        image = picture((409, 819))
        expected = torch_logits(bundle, image, wrap=True)
        found = OpenVinoForward(bundle, precision="fp32").logits(image, wrap=True)
        assert (found.argmax(0) == expected.argmax(0)).mean() >= 0.99999
        np.testing.assert_allclose(found, expected, atol=1e-3)


class TestInt8:
    def test_it_is_near_and_not_the_same(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle, image = make_bundle(), picture((64, 128))
        write_ranges(bundle, measured_ranges(bundle, image))
        expected = torch_logits(bundle, image, wrap=True)
        forward = OpenVinoForward(bundle)
        assert forward.describe() == "openvino cpu int8"
        found = forward.logits(image, wrap=True)
        error = np.abs(found - expected)
        assert 0 < error.mean() < 0.05 * expected.std(), error.mean() / expected.std()
        assert OpenVinoForward(bundle, precision="fp32").describe() == "openvino cpu fp32"

    def test_ranges_come_back(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle = make_bundle(upsampling="bilinear")
        ranges = measured_ranges(bundle, picture((32, 64)))
        assert read_ranges(bundle) is None
        write_ranges(bundle, ranges)
        assert read_ranges(bundle) == ranges
        OpenVinoForward(bundle, precision="int8").logits(picture((33, 65)), wrap=True)

    def test_without_ranges(self, make_bundle: Callable[..., ModelBundle]) -> None:
        with pytest.raises(ConfigError, match=r"no int8\.json, which int8 needs.*--calibrate"):
            OpenVinoForward(make_bundle(), precision="int8")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "is damaged"),
            ('{"weights_sha256": "", "ranges": {"a": [1, 0]}}', "empty or not finite"),
            ('{"weights_sha256": "", "ranges": {"a": [0, NaN]}}', "empty or not finite"),
            ('{"weights_sha256": "", "ranges": {"a": [0, 1]}}', "another network"),
        ],
    )
    def test_damaged_ranges(self, make_bundle: Callable[..., ModelBundle], text: str, message: str) -> None:
        bundle = make_bundle()
        (bundle.path / RANGES).write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            OpenVinoForward(bundle, precision="fp32")

    def test_ranges_of_other_weights(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle = make_bundle()
        write_ranges(bundle, measured_ranges(bundle, picture((32, 64))))
        data = json.loads((bundle.path / RANGES).read_text(encoding="utf-8"))
        (bundle.path / RANGES).write_text(json.dumps({**data, "weights_sha256": "0" * 64}), encoding="utf-8")
        with pytest.raises(BundleError, match="measured with another network"):
            OpenVinoForward(bundle)


class TestPrecision:
    def test_bf16_is_near_and_not_the_same(self, make_bundle: Callable[..., ModelBundle]) -> None:
        bundle, image = make_bundle(), picture((64, 128))
        forward = OpenVinoForward(bundle, precision="bf16")
        expected = torch_logits(bundle, image, wrap=True)
        error = np.abs(forward.logits(image, wrap=True) - expected)
        assert forward.describe() == "openvino cpu bf16"
        assert 0 < error.mean() < 0.02 * expected.std()

    def test_auto_takes_what_the_cpu_multiplies(self, make_bundle: Callable[..., ModelBundle]) -> None:
        found = torch.cpu.get_capabilities()
        half = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
        assert OpenVinoForward(make_bundle()).describe() == f"openvino cpu {'bf16' if half else 'fp32'}"


class TestTrouble:
    def test_an_unknown_precision(self, make_bundle: Callable[..., ModelBundle]) -> None:
        with pytest.raises(ConfigError, match="The precision is 'fp16'"):
            OpenVinoForward(make_bundle(), precision="fp16")

    @pytest.mark.parametrize("damage", ["missing", "broken", "another network"])
    def test_weights_that_changed_after_loading(
        self, make_bundle: Callable[..., ModelBundle], tmp_path: Path, damage: str
    ) -> None:
        bundle = make_bundle()
        forward = OpenVinoForward(bundle)
        file = bundle.path / WEIGHTS
        if damage == "missing":
            file.unlink()
        elif damage == "broken":
            file.write_bytes(file.read_bytes()[:100])
        else:
            shutil.copyfile(make_bundle(upsampling="bilinear").path / WEIGHTS, file)
        with pytest.raises(BundleError, match=r"cannot be read|do not fit the network"):
            forward.logits(picture((32, 64)), wrap=True)

    def test_another_number_of_classes(
        self, make_bundle: Callable[..., ModelBundle], make_manifest: Callable[..., Manifest]
    ) -> None:
        bundle = make_bundle()
        other = make_manifest(Architecture(classes=5, base_width=8))
        with pytest.raises(BundleError, match="it gives 6 classes, expected 5"):
            build_graph(ModelBundle(path=bundle.path, manifest=other), (32, 64), wrap=True)
