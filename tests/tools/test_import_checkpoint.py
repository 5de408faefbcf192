"""`sscloud import-checkpoint`: a .pth of milesial/Pytorch-UNet → a bundle with identical masks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sscloud.architecture import Architecture
from sscloud.bundle import ModelBundle
from sscloud.inference import Predictor
from sscloud.unet import UNet
from tools.cli import main


@pytest.fixture
def content(make_unet: Callable[..., UNet]) -> dict[str, Any]:
    model = make_unet(Architecture(classes=9, base_width=4, wrap=False))
    return {**model.state_dict(), "mask_values": [0, 2, 5, 6, 65, 66]}


@pytest.fixture
def checkpoint(content: dict[str, Any], tmp_path: Path) -> Path:
    torch.save(content, tmp_path / "checkpoint_epoch48.pth")
    return tmp_path / "checkpoint_epoch48.pth"


def run(checkpoint: Path, *more: str) -> tuple[int, Path]:
    output = checkpoint.with_name("bundle")
    return main(["import-checkpoint", str(checkpoint), "--output", str(output), *more]), output


def test_everything_it_found_is_in_the_bundle(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(checkpoint, "--scale", "0.1")
    assert status == 0
    manifest = ModelBundle.load(output).manifest
    assert manifest.architecture == Architecture(classes=9, base_width=4, upsampling="transposed", wrap=False)
    assert manifest.label_ids == (0, 2, 5, 6, 65, 66, 0, 0, 0)
    assert (manifest.name, manifest.version, manifest.parent) == ("checkpoint_epoch48", 1, "checkpoint_epoch48.pth")
    assert (manifest.scale, manifest.resample, manifest.encoding) == (0.1, "bicubic", "normals")
    assert (manifest.aspect, manifest.elevation, manifest.azimuth) == (2.0, (90.0, -90.0), None)
    out = capsys.readouterr().out
    named = "0 Фон, 2 Земля, 5 Растительность, 6 Здание, 65 Конструкции, 66 Обстановка"
    assert f"9 channels ({named}; 3 more write 0)" in out
    assert "base width 4, transposed up-sampling, scale 0.1" in out


@pytest.mark.parametrize("scale", [0.1, 0.25])
def test_masks_are_those_of_milesials_predict(
    checkpoint: Path,
    content: dict[str, Any],
    scale: float,
    make_panorama: Callable[..., NDArray[np.uint8]],
    milesial: SimpleNamespace,
) -> None:
    image = make_panorama((200, 400))
    _, output = run(checkpoint, "--scale", str(scale))
    expected = milesial.predict(content, image, scale=scale)
    found = Predictor(ModelBundle.load(output), device="cpu").predict(image)
    # Scaling rounds the other way in one grey value of a thousand: that decides where two logits nearly tie.
    different = found.label_map != expected.label_map
    assert different.mean() < 3e-3
    assert expected.margin[different].max(initial=0) < 0.4  # of logits of some ten


def test_options(checkpoint: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text(
        "labels:\n" + "".join(f"- {{name: класс {i}, id: {i}}}\n" for i in (66, 0, 2, 5, 6, 65)), encoding="utf-8"
    )
    status, output = run(
        checkpoint,
        *("--labels", str(labels), "--scale", "0.5", "--elevation", "90", "-60", "--encoding", "rgb"),
        *("--name", "Двор", "--version", "7"),
    )
    assert status == 0
    manifest = ModelBundle.load(output).manifest
    assert manifest.title == "Двор v7"
    assert manifest.labels.labels[0].name == "класс 66"
    assert (manifest.aspect, manifest.elevation, manifest.encoding) == (2.4, (90.0, -60.0), "rgb")
    assert manifest.label_ids[:6] == (0, 2, 5, 6, 65, 66)


def test_without_mask_values_it_warns(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    del content["mask_values"]
    torch.save(content, tmp_path / "a.pth")
    status, output = run(tmp_path / "a.pth", "--scale", "0.1")
    assert status == 0
    assert ModelBundle.load(output).manifest.label_ids == (0, 2, 5, 6, 65, 66, 0, 0, 0)
    assert "has no mask_values: its channels are given the labels in the order of the schema" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up2.up.weight": torch.zeros(3, 3, 2, 2)}, "up2.up.weight: shape (3, 3, 2, 2), expected (32, 16, 2, 2)"),
        ({"mask_values": [0, 1]}, "writes the label ids [1], which the labels lack"),
        ({"mask_values": list(range(10))}, "names 10 label ids, but the network has only 9 channels"),
    ],
)
def test_what_does_not_fit_is_refused(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    torch.save({**content, **change}, tmp_path / "a.pth")
    status, output = run(tmp_path / "a.pth", "--scale", "0.1")
    assert status == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scale", "0"), "'scale' must be a number above 0, at most 1, found 0"),
        (("--scale", "nan"), "'scale' must be a number above 0, at most 1, found nan"),
        (("--scale", "0.1", "--version", "0"), "'version' must be a whole number from 1, found 0"),
        (("--scale", "0.1", "--elevation", "-60", "90"), "elevation runs from the top down"),
        (("--scale", "0.1", "--elevation", "90", "90"), "elevation runs from the top down"),
        (("--scale", "0.1", "--labels", "no.yaml"), "no.yaml cannot be read"),
    ],
)
def test_wrong_values(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    status, output = run(checkpoint, *flags)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_an_existing_bundle_is_kept(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--scale", "0.1")[0] == 0
    status, output = run(checkpoint, "--scale", "0.2")
    assert status == 2
    assert "exists already" in capsys.readouterr().err
    assert ModelBundle.load(output).manifest.scale == 0.1
    assert run(checkpoint, "--scale", "0.2", "--overwrite")[0] == 0
    assert ModelBundle.load(output).manifest.scale == 0.2
