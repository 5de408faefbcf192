"""The old scripts, run as people run them: from a folder with data/, by path."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.checkpoint import save_checkpoint
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.sample.archives import ArchiveItem, write_labelme
from training.sample.generate import encode_image, render

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with street.zip: a LabelMe export of three small scenes."""
    folder = tmp_path_factory.mktemp("home")
    items = []
    for index in (1, 2, 3):
        scan = render(5, index, width=128)
        name = f"{index}_normals.jpg"
        items.append(ArchiveItem(name=name, image_jpeg=encode_image(scan.image), label_map=scan.label_map))
    write_labelme(folder / "street.zip", items, schema=LabelSchema.default())
    return folder


@pytest.fixture(scope="module")
def converted(home: Path) -> Path:
    for name in ("convert_labelme.py", "_convert_labelme.py"):
        done = script(name, "street.zip", cwd=home)
        assert done.returncode == 0, done.stderr
    return home


def test_convert_fills_the_old_folders(converted: Path) -> None:
    for folder in ("data", "data/test"):
        assert sorted(file.name for file in (converted / folder / "imgs").iterdir()) == [
            "1_normals.jpg",
            "2_normals.jpg",
            "3_normals.jpg",
        ]
        mask = np.asarray(Image.open(converted / folder / "masks/2_normals.png"))
        assert np.array_equal(mask, render(5, 2, width=128).label_map)


@pytest.mark.slow
def test_train_writes_checkpoints_that_predict_reads(converted: Path) -> None:
    flags = ["--epochs", "1", "--batch-size", "1", "--scale", "0.5", "--amp", "--classes", "68", "--base-width", "4"]
    done = script("train.py", *flags, cwd=converted)
    assert done.returncode == 0, done.stderr
    assert (converted / "checkpoints/checkpoint_epoch1.pth").is_file()
    done = script(
        "predict.py",
        *["-m", "checkpoints/checkpoint_epoch1.pth", "-i", "data/test/imgs", "-o", "data/test/predictions"],
        *["--scale", "0.5", "--classes", "68"],
        cwd=converted,
    )
    assert done.returncode == 0, done.stderr
    mask = np.asarray(Image.open(converted / "data/test/predictions/1_normals.png"))
    assert mask.shape == (64, 128)
    assert set(np.unique(mask)) <= {0, 2, 5, 6, 65, 66}
    for name, folder in (("_visualize_prediction.py", "data/test"), ("visualize_prediction.py", "data")):
        done = script(name, cwd=converted)
        assert done.returncode == 0, done.stderr
        assert (converted / folder / "overlays/1_normals_overlay.jpg").is_file()


def test_predict_names_its_output_as_before(converted: Path) -> None:
    save_checkpoint(
        converted / "old.pth", UNet(Architecture(classes=3, base_width=4, wrap=False)), label_ids=[0, 2, 65]
    )
    done = script("predict.py", "-m", "old.pth", "-i", "data/imgs/1_normals.jpg", "-s", "0.5", cwd=converted)
    assert done.returncode == 0, done.stderr
    assert (converted / "data/imgs/1_normals_OUT.png").is_file()
    (converted / "data/imgs/1_normals_OUT.png").unlink()


@pytest.mark.slow
def test_predict_says_when_the_classes_differ(converted: Path) -> None:
    save_checkpoint(
        converted / "three.pth", UNet(Architecture(classes=3, base_width=4, wrap=False)), label_ids=[0, 2, 65]
    )
    done = script("predict.py", "-m", "three.pth", "-i", "data/imgs", "-s", "0.5", "-c", "68", cwd=converted)
    assert done.returncode == 2
    assert "has 3 channels, --classes says 68" in done.stderr


@pytest.mark.parametrize("name", ["train.py", "predict.py", "convert_labelme.py", "visualize_prediction.py"])
def test_help_teaches(name: str, tmp_path: Path) -> None:
    done = script(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "examples:" in done.stdout
