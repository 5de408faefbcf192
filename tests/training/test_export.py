import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sscloud.architecture import Architecture
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import BundleError, ConfigError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.config import RunFacts, TrainConfig, write_config
from training.export import export_bundle


@pytest.fixture
def run(tmp_path: Path, make_unet: Callable[..., UNet]) -> Path:
    """A run folder as training leaves it."""
    model = make_unet()
    schema = LabelSchema.default()
    facts = RunFacts(
        snapshot="0123456789abcdef",
        architecture=model.architecture,
        labels=schema,
        label_ids=schema.class_ids,
        encoding="normals",
        aspect=2.4,
        elevation=(90.0, -60.0),
        azimuth=None,
        parent="street v1",
    )
    folder = tmp_path / "run"
    write_config(folder, TrainConfig(dataset="data", scale=0.25, resample="bicubic", base_width=4), facts)
    (folder / "checkpoints").mkdir()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": {**state, "weights": torch.ones(6)}}, folder / "checkpoints/best.ckpt")
    with (folder / "metrics.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["epoch", "train_loss", "miou"], [1, 2.0, 0.4], [2, 1.5, 0.6], [3, 1.0, 0.6]])
    return folder


def test_a_bundle_of_the_best_epoch(run: Path, tmp_path: Path, make_unet: Callable[..., UNet]) -> None:
    export_bundle(run, tmp_path / "bundle", name="Двор", version=3)

    bundle = ModelBundle.load(tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.title == "Двор v3"
    assert manifest.metrics == {"epoch": 2, "train_loss": 1.5, "validation_miou": 0.6}
    assert (manifest.scale, manifest.resample, manifest.aspect) == (0.25, "bicubic", 2.4)
    assert (manifest.elevation, manifest.parent, manifest.azimuth) == ((90.0, -60.0), "street v1", None)
    for name, tensor in make_unet().state_dict().items():
        assert torch.equal(load_model(bundle).state_dict()[name], tensor), name


def test_without_validation_the_last_epoch_counts(run: Path, tmp_path: Path) -> None:
    (run / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n2,0.7\n")

    bundle = export_bundle(run, tmp_path / "bundle", name="a", version=1)
    assert bundle.manifest.metrics == {"epoch": 2, "train_loss": 0.7}


def test_the_metrics_are_those_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints/best.ckpt"
    state = torch.load(best, weights_only=True)
    torch.save({**state, "epoch": 2}, best)

    bundle = export_bundle(run, tmp_path / "bundle", name="a", version=1)

    assert bundle.manifest.metrics == {"epoch": 3, "train_loss": 1.0, "validation_miou": 0.6}
    torch.save({**state, "epoch": 7}, best)
    with pytest.raises(BundleError, match=r"has no readable row of epoch 8, which .*Bring the file back, or train on"):
        export_bundle(run, tmp_path / "other", name="a", version=1)


def test_the_frame_and_the_temperature_of_the_run(run: Path, tmp_path: Path) -> None:
    (run / "metrics.csv").write_text("epoch,train_loss,temperature,seconds,images_per_second\n2,0.7,1.25,3.0,9.0\n")

    manifest = export_bundle(run, tmp_path / "bundle", name="a", version=1).manifest

    assert (manifest.frame, manifest.temperature) == ("scanner", 1.25)
    assert manifest.metrics == {"epoch": 2, "train_loss": 0.7, "temperature": 1.25}


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    export_bundle(run, tmp_path / "bundle", name="a", version=1)
    with pytest.raises(ConfigError, match=r"bundle exists already.*--overwrite"):
        export_bundle(run, tmp_path / "bundle", name="a", version=2)
    export_bundle(run, tmp_path / "bundle", name="a", version=2, overwrite=True)

    assert ModelBundle.load(tmp_path / "bundle").manifest.version == 2


def test_no_run_and_no_epoch(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run"):
        export_bundle(tmp_path, tmp_path / "bundle", name="a", version=1)
    (run / "checkpoints/best.ckpt").unlink()
    with pytest.raises(BundleError, match=r"has no checkpoints/best\.ckpt yet: no epoch has ended"):
        export_bundle(run, tmp_path / "bundle", name="a", version=1)
    assert not (tmp_path / "bundle").exists()


def test_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints/best.ckpt"
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"best\.ckpt cannot be read"):
        export_bundle(run, tmp_path / "bundle", name="a", version=1)
    other = UNet(Architecture(classes=6, base_width=8)).state_dict()
    torch.save({"epoch": 0, "state_dict": {f"model.{name}": tensor for name, tensor in other.items()}}, best)
    with pytest.raises(BundleError, match=r"best\.ckpt do not fit the network: inc\.double_conv\.0\.weight: shape"):
        export_bundle(run, tmp_path / "bundle", name="a", version=1)


def test_version_from_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'version' must be a whole number from 1, found 0"):
        export_bundle(run, tmp_path / "bundle", name="a", version=0)
