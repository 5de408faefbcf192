"""Seeded networks, bundles and panoramas for every test, and milesial/Pytorch-UNet written down a second time."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.labels import LabelSchema
from sscloud.unet import UNet

if TYPE_CHECKING:
    from cvat_standin import CvatStandin, Site  # imported where used: cvat-sdk takes its time


class Predicted(NamedTuple):
    """What the reference makes of an image."""

    label_map: NDArray[np.uint8]
    margin: NDArray[np.float32]
    """(H, W) distance of the two largest logits: where it is tiny, rounding decides."""


@pytest.fixture(autouse=True)
def no_foreign_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves the address of the last store in the environment; the next test has a store of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are tiny: threads that wait for each other cost many times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quick_mlflow_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New tracking stores are copies of one: MLflow replays the migrations of years for each, which takes seconds."""
    import mlflow.store.db.utils as stores  # takes its time: only where something is trained

    real, template = stores._initialize_tables, tmp_path_factory.mktemp("mlflow") / "template.db"

    def initialize(engine: Any) -> None:
        if template.exists():
            engine.dispose()
            shutil.copy(template, engine.url.database)
        else:
            real(engine)
            shutil.copy(engine.url.database, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_initialize_tables", initialize)
        yield


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet]:
    """An untrained network in evaluation mode whose class maps are varied, with statistics as after training."""

    def make(architecture: Architecture | None = None, *, seed: int = 0, contrast: float = 5) -> UNet:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = UNet(architecture or Architecture(classes=6, base_width=4))
            norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
            patches = F.interpolate(torch.rand(2, 3, 8, 16), scale_factor=8)
            for norm in norms:
                norm.momentum = 1.0  # take the statistics of one batch, so that no layer is dead
            model.train()(patches)
            model.eval()
            for norm in norms:
                norm.momentum = 0.1
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(std=0.3)
            model.outc.conv.weight.normal_(std=contrast)
            assert model.outc.conv.bias is not None
            model.outc.conv.bias -= model(patches).mean(dim=(0, 2, 3))
        return model

    return make


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """A manifest of a full sphere with the users' labels; any field can be given."""

    def make(architecture: Architecture, **fields: Any) -> Manifest:
        schema = LabelSchema.default()
        values = {
            "name": "Улица",
            "version": 3,
            "architecture": architecture,
            "labels": schema,
            "label_ids": schema.class_ids,
            "scale": 0.5,
            "resample": "valid-area",
            "encoding": "normals",
            "aspect": 2.0,
            "elevation": (90.0, -90.0),
        }
        return Manifest(**{**values, **fields})

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> ModelBundle:
    """A wrapping bundle of base width 4 with the users' six labels, scale 0.5. Not to be changed."""
    model = make_unet()
    return save_bundle(tmp_path_factory.mktemp("bundles") / "tiny", model, make_manifest(model.architecture))


@pytest.fixture(scope="session")
def make_panorama() -> Callable[..., NDArray[np.uint8]]:
    """A seeded normals panorama of flat patches, some without a return → (H, W, 3) uint8."""

    def make(size_hw: tuple[int, int] = (64, 128), *, seed: int = 0, black: float = 0.2) -> NDArray[np.uint8]:
        height, width = size_hw
        rng = np.random.default_rng(seed)
        normals = rng.normal(size=(-(-height // 8), -(-width // 8), 3))
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        patches = np.rint((normals * 0.5 + 0.5) * 255).astype(np.uint8)
        patches[rng.random(patches.shape[:2]) < black] = 0
        return np.repeat(np.repeat(patches, 8, axis=0), 8, axis=1)[:height, :width].copy()

    return make


def _reference_logits(state: Mapping[str, Tensor], x: Tensor, *, bilinear: bool) -> Tensor:
    """milesial's UNet in evaluation mode, as functions of its state dict."""

    def block(prefix: str, x: Tensor) -> Tensor:
        for index in (0, 3):
            x = F.conv2d(x, state[f"{prefix}.double_conv.{index}.weight"], padding=1)
            norm = f"{prefix}.double_conv.{index + 1}"
            mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
            x = F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"])
            x = F.relu(x)
        return x

    levels = [block("inc", x)]
    for n in (1, 2, 3, 4):
        levels.append(block(f"down{n}.maxpool_conv.1", F.max_pool2d(levels[-1], 2)))
    x = levels.pop()
    for n in (1, 2, 3, 4):
        skip = levels.pop()
        if bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = F.conv_transpose2d(x, state[f"up{n}.up.weight"], state[f"up{n}.up.bias"], stride=2)
        dy, dx = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        x = block(f"up{n}.conv", torch.cat([skip, x], dim=1))
    return F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])


def _reference_predict(content: Mapping[str, Any], image: NDArray[np.uint8], *, scale: float) -> Predicted:
    """milesial's predict.py on a loaded checkpoint: bicubic, /255, network, bilinear, argmax, mask_values."""
    state = {name: value for name, value in content.items() if name != "mask_values"}
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(scale * width), int(scale * height)), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(small).transpose(2, 0, 1) / 255.0).float()[None]
    with torch.no_grad():
        output = _reference_logits(state, x, bilinear="up1.up.weight" not in state)
        output = F.interpolate(output, (height, width), mode="bilinear")[0]
    best = output.topk(2, dim=0).values
    classes = output.argmax(0).numpy()
    label_map = np.zeros((height, width), np.uint8)
    for index, value in enumerate(content["mask_values"]):
        label_map[classes == index] = value
    return Predicted(label_map, (best[0] - best[1]).numpy())


@pytest.fixture(scope="session")
def milesial() -> SimpleNamespace:
    """The reference: `logits(state, x, bilinear=…)` and `predict(checkpoint, image, scale=…)`."""
    return SimpleNamespace(logits=_reference_logits, predict=_reference_predict)


@pytest.fixture
def cvat_server() -> "Iterator[CvatStandin]":
    """A stand-in for a CVAT server, empty; `cvat_standin` says what it can do."""
    from cvat_standin import CvatStandin

    with CvatStandin() as server:
        yield server


@pytest.fixture(params=["stand-in", pytest.param("live", marks=pytest.mark.live)])
def cvat_site(request: pytest.FixtureRequest) -> "Iterator[Site]":
    """A CVAT server with a login: the stand-in; with `-m live` the one that the environment names."""
    from cvat_standin import Site

    if request.param == "stand-in":
        server: CvatStandin = request.getfixturevalue("cvat_server")
        yield server.site
        return
    names = ("CVAT_URL", "CVAT_USERNAME", "CVAT_PASSWORD")
    url, username, password = (os.environ.get(name, "") for name in names)
    if "live" not in request.config.getoption("markexpr"):
        pytest.skip("makes projects on a live server: only with -m live")
    if not (url and username and password):
        pytest.skip(f"needs a live server in {', '.join(names)}")
    site = Site(url=url, username=username, password=password, live=True)
    try:
        yield site
    finally:
        site.delete_projects()
