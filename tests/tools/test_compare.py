import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.unet import UNet
from tools.cli import main


@pytest.fixture
def data(tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """Three panoramas of ground."""
    root = tmp_path / "data"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    for number in (1, 2, 3):
        Image.fromarray(make_panorama(seed=number)).save(root / f"imgs/{number}.png")
        Image.fromarray(np.full((64, 128), 2, np.uint8)).save(root / f"masks/{number}.png")
    return root


@pytest.fixture
def other(tmp_path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]) -> ModelBundle:
    model = make_unet(Architecture(classes=6, base_width=4), seed=1)
    return save_bundle(tmp_path / "other", model, make_manifest(model.architecture, version=4))


def test_table_json_and_pictures(
    data: Path, tiny_bundle: ModelBundle, other: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["compare", str(tiny_bundle.path), str(other.path), str(data), "--device", "cpu", "-o", str(output)]

    assert main(command) == 0

    out = capsys.readouterr().out
    assert out.startswith(f"A: Улица v3 ({tiny_bundle.path})\nB: Улица v4 ({other.path})\nOn {data}: 3 panoramas\n")
    assert "Intervals hold 95% of 1000 resamples of 3 groups" in out
    scores = json.loads((output / "compare.json").read_bytes())
    assert scores["split"] == "all"
    assert scores["conclusion"] in out
    assert sorted(file.name for file in output.iterdir()) == ["1.jpg", "2.jpg", "3.jpg", "compare.json"]

    assert main(command) == 2
    assert f"{output} exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_without_output_nothing_is_written(
    data: Path, tiny_bundle: ModelBundle, other: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    assert main(["compare", str(tiny_bundle.path), str(other.path), str(data), "--group-by", "image"]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing(
    data: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((64, 128), 77, np.uint8)).save(data / "masks/3.png")
    before = sorted(tmp_path.rglob("*"))

    command = ["compare", str(tiny_bundle.path), str(tiny_bundle.path), str(data), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    assert "3.png holds ids [77]" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
