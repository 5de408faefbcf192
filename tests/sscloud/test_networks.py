"""Other families' networks: built, padded, wrapped, kept in bundles; of a stand-in for the library and the real one."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_standin as standin
import torch
from numpy.typing import NDArray
from torch import Tensor

from sscloud.architecture import Architecture
from sscloud.bundle import MANIFEST, Manifest, ModelBundle
from sscloud.checkpoint import load_model, save_bundle
from sscloud.errors import BundleError, ConfigError
from sscloud.forward import TorchForward
from sscloud.inference import Predictor
from sscloud.networks import MARGIN, STRIDE, Network, PanoramicNetwork, build_network, last_convolution
from sscloud.openvino_forward import OpenVinoForward
from sscloud.unet import UNet

LIBRARY = "segmentation_models_pytorch"
CLASSES = {"unet++": "UnetPlusPlus", "deeplabv3+": "DeepLabV3Plus", "fpn": "FPN", "segformer": "Segformer"}
CPU = torch.device("cpu")

MakeManifest = Callable[..., Manifest]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes the library's place."""
    monkeypatch.setitem(sys.modules, LIBRARY, standin)


def of(family: str = "fpn", encoder: str = "resnet34", **more: Any) -> Architecture:
    return Architecture(**{"classes": 6, "family": family, "encoder": encoder, **more})


def built(architecture: Architecture) -> PanoramicNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_network(architecture)
    assert isinstance(model, PanoramicNetwork)
    return model.eval()


def picture(size_hw: tuple[int, int], *, count: int = 1) -> Tensor:
    return torch.rand((count, 3, *size_hw), generator=torch.Generator().manual_seed(0))


class TestArchitecture:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"family": "unet3+"},
                r"Unknown network 'unet3\+'\. Known are unet, unet\+\+, deeplabv3\+, fpn, segformer",
            ),
            ({"family": None}, "Unknown network None"),
            ({"encoder": "resnet34"}, "A unet has no encoder to choose, found 'resnet34'"),
            ({"family": "fpn"}, "The network 'fpn' needs the name of an encoder .*, found None"),
            ({"family": "fpn", "encoder": 34}, "needs the name of an encoder .*, found 34"),
            ({"family": "fpn", "encoder": "tu-hf-hub:someone/network"}, "needs the name of an encoder"),
            ({"family": "fpn", "encoder": "../x"}, "needs the name of an encoder"),
            ({"family": "fpn", "encoder": "resnet34", "base_width": 32}, "choices of a unet.*Found 32 and transposed"),
            ({"family": "fpn", "encoder": "resnet34", "upsampling": "bilinear"}, "Found 64 and bilinear"),
        ],
    )
    def test_what_does_not_fit_is_named(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(BundleError, match=message):
            Architecture(classes=6, **values)

    @pytest.mark.parametrize(
        ("architecture", "local"),
        [
            (Architecture(classes=2), True),
            (Architecture(classes=2, upsampling="bilinear"), True),
            (Architecture(classes=2, upsampling="bilinear-aligned", wrap=False), False),
            (of("unet++"), False),
        ],
    )
    def test_is_local(self, architecture: Architecture, local: bool) -> None:
        assert architecture.is_local is local

    def test_of_a_unet_only_what_older_readers_know(self) -> None:
        names = {"classes", "base_width", "upsampling", "wrap"}
        assert Architecture(classes=2).to_dict().keys() == names
        assert of().to_dict().keys() == names | {"family", "encoder"}
        assert Architecture(**of("segformer", "mit_b0").to_dict()) == of("segformer", "mit_b0")


@pytest.mark.usefixtures("library")
class TestBuild:
    @pytest.mark.parametrize("family", CLASSES)
    def test_every_family(self, family: str) -> None:
        model = built(of(family))
        assert type(model.model) is getattr(standin, CLASSES[family])
        assert model.model.arguments == ("resnet34", None, 3, 6)
        for wrap in (False, True):
            assert model(picture((50, 75), count=2), wrap=wrap).shape == (2, 6, 50, 75)

    def test_a_unet_needs_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, LIBRARY, None)
        assert isinstance(build_network(Architecture(classes=2, base_width=2), pretrained=True), UNet)

    @pytest.mark.parametrize(("encoder", "weights"), [("resnet34", "imagenet"), ("tu-resnet18", True)])
    def test_pretrained(self, encoder: str, weights: object) -> None:
        """timm's encoders warn of a name of weights; warnings are errors here."""
        model = build_network(of(encoder=encoder), pretrained=True)
        assert model.model.arguments == (encoder, weights, 3, 6)
        assert (model.model.encoder.conv.weight == 0.25).all()

    def test_pretrained_without_a_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(standin.Hub, "online", False)
        reason = r"learned from ImageNet cannot be had \(OSError: We couldn't connect to 'https://huggingface.co'\)\."
        with pytest.raises(ConfigError, match=rf"weights that resnet34 {reason}.*--no-pretrained"):
            build_network(of(), pretrained=True)

    @pytest.mark.parametrize(
        ("family", "encoder", "reason"),
        [("fpn", "resnet3", "KeyError: .*Wrong encoder name `resnet3`"), ("unet++", "mit_b0", "ValueError: Unet")],
    )
    @pytest.mark.parametrize("pretrained", [False, True])
    def test_an_encoder_that_does_not_fit(self, family: str, encoder: str, reason: str, pretrained: bool) -> None:
        with pytest.raises(ConfigError, match=rf"with the encoder '{encoder}' \({reason}.*Choose another --encoder"):
            build_network(of(family, encoder), pretrained=pretrained)

    def test_a_library_without_the_family(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(standin, "Segformer")
        with pytest.raises(ConfigError, match=r"builds no 'segformer' .*AttributeError"):
            build_network(of("segformer"))

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("import torchvision_that_is_missing", "No module named 'torchvision_that_is_missing'"),
            ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms"),
        ],
    )
    def test_a_library_that_cannot_be_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
    ) -> None:
        (tmp_path / f"{LIBRARY}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, LIBRARY)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=rf"'fpn' needs seg.*: {reason}.*pip install segmentation-models-pytorch"):
            build_network(of())

    def test_last_convolution(self) -> None:
        unet, other = UNet(Architecture(classes=5, base_width=2)), built(of(classes=5))
        assert last_convolution(unet) is unet.outc.conv
        assert last_convolution(other) is other.model.segmentation_head[0]  # type: ignore[index]
        other.model.segmentation_head[0] = torch.nn.Identity()  # type: ignore[index, operator]
        with pytest.raises(BundleError, match="'fpn' has no layer with a channel a class"):
            last_convolution(other)


def seen_by(model: PanoramicNetwork, x: Tensor, *, wrap: bool) -> NDArray[np.float32]:
    """What the library's network is given."""
    found: list[Tensor] = []
    handle = model.model.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.inference_mode():
        model(x, wrap=wrap)
    handle.remove()
    values: NDArray[np.float32] = found[0].numpy()
    return values


@pytest.mark.usefixtures("library")
class TestPanorama:
    @pytest.mark.parametrize("size_hw", [(64, 128), (50, 75), (1, 5), (32, 33)])
    @pytest.mark.parametrize("wrap", [False, True])
    def test_what_the_network_sees(self, size_hw: tuple[int, int], wrap: bool) -> None:
        x = picture(size_hw)
        found = seen_by(built(of()), x, wrap=wrap)
        height, width = size_hw
        below, left = -height % STRIDE, MARGIN if wrap else 0
        right = left + -width % STRIDE
        normalised = (x.numpy() - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape(
            [0.229, 0.224, 0.225], (3, 1, 1)
        )
        expected = np.pad(normalised, ((0, 0), (0, 0), (0, 0), (left, right)), mode="wrap" if wrap else "edge")
        expected = np.pad(expected, ((0, 0), (0, 0), (0, below), (0, 0)), mode="edge")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["unet++", "fpn", "segformer"])
    def test_a_roll_of_the_input_rolls_the_logits(self, family: str) -> None:
        model, x = built(of(family)), picture((64, 256))
        with torch.inference_mode():
            for wrap in (True, False):
                found, expected = model(x.roll(96, 3), wrap=wrap), model(x, wrap=wrap).roll(96, 3)
                assert torch.allclose(found, expected, atol=1e-5) is wrap

    def test_logits_lie_where_their_pixels_do(self) -> None:
        """Inside, whether it wraps or not changes nothing."""
        model, x = built(of()), picture((50, 300))
        with torch.inference_mode():
            wrapped, plain = model(x, wrap=True), model(x, wrap=False)
        torch.testing.assert_close(wrapped[..., 96:192], plain[..., 96:192], rtol=0, atol=1e-5)
        assert not torch.allclose(wrapped[..., :16], plain[..., :16])

    def test_the_architecture_decides(self) -> None:
        x = picture((32, 64))
        with torch.inference_mode():
            model = built(of(wrap=False))
            assert torch.equal(model(x, wrap=True), model(x, wrap=False))
            assert torch.equal(model(x), model(x, wrap=False))
            model = built(of())
            assert torch.equal(model(x), model(x, wrap=True))

    def test_it_learns(self) -> None:
        model, x = built(of()).train(), picture((50, 75), count=2)
        model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.segmentation_head.parameters())
        assert model.model.encoder.conv.weight.grad.abs().sum() > 0  # type: ignore[union-attr]

    def test_a_batch_too_small_to_learn_from(self) -> None:
        model = built(of("deeplabv3+")).train()
        with pytest.raises(ConfigError, match=r"'deeplabv3\+' cannot learn from batches of 1 .*40x20.*--batch-size 2"):
            model(picture((20, 40)))
        assert model(picture((20, 40), count=2)).shape == (2, 6, 20, 40)

    def test_other_errors_are_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ValueError("a defect")

        monkeypatch.setattr(standin.FPN, "forward", fail)
        with pytest.raises(ValueError, match="a defect"):
            built(of())(picture((32, 32)))


@pytest.mark.usefixtures("library")
class TestBundle:
    @pytest.fixture
    def bundle(self, tmp_path: Path, make_manifest: MakeManifest) -> ModelBundle:
        architecture = of("unet++")
        model = built(architecture)
        with torch.no_grad():
            last = last_convolution(model)
            last.weight *= 10
        return save_bundle(tmp_path / "bundle", model, make_manifest(architecture))

    @pytest.mark.parametrize("family", CLASSES)
    def test_round_trip(self, tmp_path: Path, make_manifest: MakeManifest, family: str) -> None:
        model = build_network(of(family), pretrained=True)
        written = save_bundle(tmp_path / "bundle", model, make_manifest(model.architecture))
        found = ModelBundle.load(written.path)
        assert found == written
        state = torch.get_rng_state()
        loaded = load_model(found)
        assert torch.equal(torch.get_rng_state(), state), "loading draws no random numbers that others miss"
        assert isinstance(loaded, PanoramicNetwork)
        assert not loaded.training
        assert loaded.model.arguments == ("resnet34", None, 3, 6), "nothing is downloaded"
        assert_same(loaded, model)

    def test_another_network_is_refused(self, bundle: ModelBundle) -> None:
        file = bundle.path / MANIFEST
        data = json.loads(file.read_text(encoding="utf-8"))
        data["architecture"]["family"] = "deeplabv3+"
        file.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(BundleError, match=r"do not fit the network: model\.pooling\.1\.weight: missing"):
            load_model(ModelBundle.load(bundle.path))

    def test_a_unets_bundle_is_no_other(self, bundle: ModelBundle, tiny_bundle: ModelBundle, tmp_path: Path) -> None:
        manifest = dataclasses.replace(bundle.manifest, architecture=of("fpn"))
        with pytest.raises(
            BundleError, match=r"describes Architecture\(.*'fpn'.*the model is Architecture\(.*base_width=4"
        ):
            save_bundle(tmp_path / "other", load_model(tiny_bundle), manifest)

    def test_without_the_library(self, bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, LIBRARY, None)
        with pytest.raises(ConfigError, match=r"pip install segmentation-models-pytorch"):
            load_model(ModelBundle.load(bundle.path))

    def test_predictor(self, bundle: ModelBundle, make_panorama: Callable[..., NDArray[np.uint8]]) -> None:
        image = make_panorama((64, 128))
        found = Predictor(bundle, device="cpu", precision="fp32").predict(image)
        assert found.wrapped
        assert found.class_map.shape == (64, 128)
        assert len(np.unique(found.class_map)) > 1
        rolled = Predictor(bundle, device="cpu", precision="fp32").predict(np.roll(image, 64, axis=1))
        assert (np.roll(found.class_map, 64, axis=1) == rolled.class_map).mean() > 0.99  # ties at the class borders

    def test_logits_in_half_precision(
        self, bundle: ModelBundle, make_panorama: Callable[..., NDArray[np.uint8]]
    ) -> None:
        image = make_panorama((40, 72))
        exact = TorchForward(bundle, device=CPU, precision="fp32").logits(image, wrap=True)
        with torch.inference_mode():
            x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
            np.testing.assert_allclose(exact, load_model(bundle)(x, wrap=True)[0].numpy(), rtol=1e-4, atol=1e-4)
        half = TorchForward(bundle, device=CPU, precision="bf16")
        assert last_convolution(half._model).weight.dtype == torch.float32
        found = half.logits(image, wrap=True)
        assert found.dtype == np.float32
        assert 0 < np.abs(found - exact).max() < 0.05 * np.ptp(exact)

    def test_large_images_are_blended(
        self, bundle: ModelBundle, make_panorama: Callable[..., NDArray[np.uint8]]
    ) -> None:
        forward = TorchForward(bundle, device=CPU, precision="fp32")
        image = make_panorama((128, 512))
        whole = forward.logits(image, wrap=True)
        forward._max_pixels = 128 * 192  # four tiles, a quarter of a turn apart
        found = forward.logits(image, wrap=True)
        np.testing.assert_allclose(np.exp(found).sum(axis=0), 1, rtol=1e-5)
        assert (found.argmax(0) == whole.argmax(0)).mean() > 0.9
        rolled = forward.logits(np.roll(image, 128, axis=1), wrap=True)
        np.testing.assert_allclose(np.roll(found, 128, axis=2), rolled, rtol=1e-4, atol=1e-4)

    def test_openvino_is_for_unets(self, bundle: ModelBundle) -> None:
        with pytest.raises(ConfigError, match=r"network 'unet\+\+'; OpenVINO computes unets only.*--backend torch"):
            OpenVinoForward(bundle)


def assert_same(loaded: Network, model: Network) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


class TestRealLibrary:
    @pytest.mark.parametrize(
        ("family", "encoder"),
        [("unet++", "resnet18"), ("deeplabv3+", "resnet18"), ("fpn", "tu-resnet18"), ("segformer", "mit_b0")],
    )
    def test_every_family(self, tmp_path: Path, make_manifest: MakeManifest, family: str, encoder: str) -> None:
        pytest.importorskip(LIBRARY)
        model = built(of(family, encoder))
        bundle = save_bundle(tmp_path / "bundle", model, make_manifest(model.architecture))
        assert_same(load_model(ModelBundle.load(bundle.path)), model)
        assert last_convolution(model).weight.shape[0] == 6
        with torch.inference_mode():
            assert model(picture((51, 102)), wrap=True).shape == (1, 6, 51, 102)
        found = Predictor(bundle, device="cpu").predict(np.zeros((64, 128, 3), np.uint8))
        assert found.class_map.shape == (64, 128)
