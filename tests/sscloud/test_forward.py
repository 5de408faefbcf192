"""TorchForward: the logits of the plain network, whole and in tiles, in every precision, and when memory runs out."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sscloud.architecture import REACH, STRIDE, Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import load_model, save_bundle
from sscloud.errors import ConfigError
from sscloud.forward import TorchForward, find_dtype, to_input
from sscloud.tiles import Tile, plan_blended, plan_tiles
from sscloud.unet import UNet

CPU = torch.device("cpu")

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Unable to find an engine to execute this computation"),
]

MakeBundle = Callable[[Architecture], ModelBundle]


@pytest.fixture
def make_bundle(
    tmp_path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> Callable[[Architecture], ModelBundle]:
    return lambda architecture: save_bundle(tmp_path / "bundle", make_unet(architecture), make_manifest(architecture))


def noise(size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)


def plain_logits(bundle: ModelBundle, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
    """The network as it was trained: batch norm apart, one image, no tiles."""
    with torch.no_grad():
        logits = load_model(bundle)(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, wrap=wrap)[0]
    found: NDArray[np.float32] = logits.numpy()
    return found


def limit(forward: TorchForward, max_pixels: int) -> TorchForward:
    forward._max_pixels = max_pixels
    return forward


class TestLogits:
    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("wrap", [False, True])
    @pytest.mark.parametrize("size_hw", [(16, 16), (33, 65), (50, 17)])
    def test_are_the_plain_networks(
        self, make_bundle: MakeBundle, upsampling: str, wrap: bool, size_hw: tuple[int, int]
    ) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=4, upsampling=upsampling, wrap=wrap))  # type: ignore[arg-type]
        found = TorchForward(bundle, device=CPU, precision="fp32").logits(noise(size_hw), wrap=wrap)
        assert found.shape == (6, *size_hw)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, plain_logits(bundle, noise(size_hw), wrap=wrap), rtol=1e-4, atol=1e-3)

    def test_half_precision_is_close(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=4))
        found = TorchForward(bundle, device=CPU, precision="bf16").logits(noise((64, 128)), wrap=True)
        expected = plain_logits(bundle, noise((64, 128)), wrap=True)
        assert found.dtype == np.float32
        assert not np.array_equal(found, expected)
        assert np.abs(found - expected).max() < 0.05 * np.ptp(expected)

    def test_the_bundle_is_left_alone(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=2))
        TorchForward(bundle, device=CPU)
        ModelBundle.load(bundle.path)


class TestTiles:
    @pytest.mark.parametrize(
        ("upsampling", "wrap", "size_hw", "max_pixels"),
        [
            ("transposed", False, (400, 655), 200_000),
            ("transposed", True, (413, 640), 150_000),
            ("transposed", True, (500, 413), 1),
            ("bilinear", False, (333, 700), 130_000),
            ("bilinear", True, (330, 640), 130_000),
        ],
    )
    def test_change_nothing(
        self, make_bundle: MakeBundle, upsampling: str, wrap: bool, size_hw: tuple[int, int], max_pixels: int
    ) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=2, upsampling=upsampling, wrap=wrap))  # type: ignore[arg-type]
        forward = TorchForward(bundle, device=CPU, precision="fp32")
        whole = forward.logits(noise(size_hw), wrap=wrap)
        assert len(plan_tiles(size_hw, max_pixels=max_pixels, wrap=wrap)) > 1
        cut = limit(forward, max_pixels).logits(noise(size_hw), wrap=wrap)
        np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)

    def test_reach_is_needed(self, make_bundle: MakeBundle) -> None:
        """A pixel changes logits as far away as a good part of `REACH`, and none beyond it."""
        bundle = make_bundle(Architecture(classes=6, base_width=4, upsampling="bilinear", wrap=False))
        forward = TorchForward(bundle, device=CPU, precision="fp32")
        image = noise((32, 640))
        changed = image.copy()
        changed[:, 320] ^= 255
        columns = np.flatnonzero((forward.logits(image, wrap=False) != forward.logits(changed, wrap=False)).any((0, 1)))
        assert REACH / 2 < max(320 - columns.min(), columns.max() - 320) <= REACH

    def test_aligned_upsampling_is_blended_where_memory_is_short(self, make_bundle: MakeBundle) -> None:
        """There every logit depends on the size of the whole: no tile has the exact ones."""
        bundle = make_bundle(Architecture(classes=6, base_width=2, upsampling="bilinear-aligned", wrap=False))
        image = noise((128, 160)).repeat(4, axis=0).repeat(4, axis=1)
        whole = plain_logits(bundle, image, wrap=False)
        forward = TorchForward(bundle, device=CPU, precision="fp32")
        np.testing.assert_allclose(forward.logits(image, wrap=False), whole, rtol=1e-4, atol=1e-3)
        tiles = plan_blended((512, 640), max_pixels=300 * 300, wrap=False)
        assert len(tiles) > 1
        found = limit(forward, 300 * 300).logits(image, wrap=False)
        np.testing.assert_allclose(np.exp(found).sum(axis=0), 1, rtol=1e-5)
        assert 0.8 < (found.argmax(axis=0) == whole.argmax(axis=0)).mean() < 1

    def test_one_where_everything_fits(self) -> None:
        (tile,) = plan_tiles((409, 819), max_pixels=409 * 819, wrap=True)
        assert tile == Tile(rows=(0, 409), columns=(0, 819), padded_rows=(0, 409), padded_columns=(0, 819))

    @pytest.mark.parametrize("wrap", [False, True])
    @pytest.mark.parametrize("size_hw", [(409, 819), (1600, 3200), (17, 4000)])
    @pytest.mark.parametrize("max_pixels", [1, 200_000, 1_000_000])
    def test_cover_every_pixel_once(self, size_hw: tuple[int, int], max_pixels: int, wrap: bool) -> None:
        height, width = size_hw
        count = np.zeros(size_hw, np.uint8)
        for tile in plan_tiles(size_hw, max_pixels=max_pixels, wrap=wrap):
            count[slice(*tile.rows), slice(*tile.columns)] += 1
            top, bottom = tile.padded_rows
            assert top % STRIDE == tile.padded_columns[0] % STRIDE == 0
            assert top in (0, tile.rows[0] - REACH) or tile.rows[0] < REACH
            assert bottom == min(height, tile.rows[1] + REACH)
            assert tile.inside[0].stop <= bottom - top
            if max_pixels > 200_000 and not (wrap and width % STRIDE):
                assert (bottom - top) * (tile.padded_columns[1] - tile.padded_columns[0]) <= max_pixels
        assert (count == 1).all()


class TestOutOfMemory:
    @pytest.fixture
    def forward(self, make_bundle: MakeBundle) -> TorchForward:
        return TorchForward(
            make_bundle(Architecture(classes=6, base_width=2, wrap=False)), device=CPU, precision="fp32"
        )

    @pytest.fixture(params=[ERRORS[0], *(pytest.param(error, marks=pytest.mark.slow) for error in ERRORS[1:])], ids=str)
    def full(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        """Makes the network fail on inputs above so many pixels, as a device of that memory would."""
        plain = UNet.forward

        def above(pixels: int) -> None:
            def fail(model: UNet, x: torch.Tensor, *, wrap: bool | None = None) -> torch.Tensor:
                if x.shape[2] * x.shape[3] > pixels:
                    raise request.param
                return plain(model, x, wrap=wrap)

            monkeypatch.setattr(UNet, "forward", fail)

        return above

    def test_smaller_tiles_give_the_same(
        self, forward: TorchForward, full: Callable[[int], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        image = noise((700, 500))
        whole = forward.logits(image, wrap=False)
        full(200_000)
        with caplog.at_level(logging.WARNING):
            np.testing.assert_allclose(forward.logits(image, wrap=False), whole, rtol=1e-5, atol=1e-5)
        assert "going on with tiles of half the size" in caplog.text
        caplog.clear()
        forward.logits(image, wrap=False)
        assert caplog.text == "", "what fits is remembered"

    def test_an_image_that_never_fits(self, forward: TorchForward, full: Callable[[int], None]) -> None:
        full(0)
        with pytest.raises(MemoryError, match="An image of 40x32 pixels does not fit into memory"):
            forward.logits(noise((32, 40)), wrap=False)

    def test_a_device_that_never_fits_leaves_it_to_the_cpu(
        self, forward: TorchForward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        image = noise((32, 40))
        expected = forward.logits(image, wrap=False)
        plain, first = UNet.forward, forward._model

        def fail(model: UNet, x: torch.Tensor, *, wrap: bool | None = None) -> torch.Tensor:
            if model is first:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return plain(model, x, wrap=wrap)

        monkeypatch.setattr(UNet, "forward", fail)
        monkeypatch.setattr(forward, "_device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(forward.logits(image, wrap=False), expected)
        assert "the CPU computes this image" in caplog.text

    def test_other_errors_are_raised(self, forward: TorchForward, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(UNet, "forward", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            forward.logits(noise((32, 40)), wrap=False)


class TestPrecision:
    def test_numbers_beyond_it_are_computed_again(
        self, make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=2, wrap=False))
        forward = TorchForward(bundle, device=CPU, precision="bf16")
        with torch.no_grad():
            forward._model.outc.conv.bias.fill_(float("inf"))
        with caplog.at_level(logging.WARNING):
            found = forward.logits(noise((32, 40)), wrap=False)
        np.testing.assert_allclose(found, plain_logits(bundle, noise((32, 40)), wrap=False), rtol=1e-4, atol=1e-3)
        assert "Numbers beyond bf16" in caplog.text

    @pytest.mark.parametrize("name", ["fp16", "int8", "half", ""])
    def test_those_of_other_devices_are_refused(self, name: str) -> None:
        with pytest.raises(
            ConfigError, match=f"The precision '{name}' is none of cpu's: choose one of auto, fp32, bf16"
        ):
            find_dtype(CPU, name)

    @pytest.mark.parametrize(("found", "expected"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
    def test_auto_follows_the_cpu(self, monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        assert find_dtype(CPU, "auto") == getattr(torch, expected)

    def test_is_described(self, make_bundle: MakeBundle) -> None:
        bundle = make_bundle(Architecture(classes=6, base_width=2))
        assert TorchForward(bundle, device=CPU, precision="bf16").describe() == "torch cpu bf16"


def test_to_input() -> None:
    batch = to_input(np.array([[[0, 51, 255]]], np.uint8), CPU, torch.float32)
    assert batch.shape == (1, 3, 1, 1)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch.flatten(), torch.tensor([0, 0.2, 1]))
