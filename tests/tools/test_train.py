import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.bundle import ModelBundle
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from tools.cli import main
from training.manifest import DatasetWriter
from training.splits import SplitPlan

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

QUICK = ["--scale", "0.5", "--base-width", "4", "--device", "cpu", "--no-augment"]


@pytest.fixture
def data(tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two panoramas; the working folder is beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "data"
    (root / "imgs").mkdir(parents=True)
    (root / "masks").mkdir()
    for seed in (1, 2):
        image = make_panorama(seed=seed)
        Image.fromarray(image).save(root / f"imgs/{seed}.png")
        Image.fromarray(np.where(image[..., 2] > 128, 2, 6).astype(np.uint8)).save(root / f"masks/{seed}.png")
    return root


def test_from_data_to_masks(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--epochs", "1", "--pth-checkpoints", "checkpoints", "--no-wrap", "--resample", "bicubic", *QUICK]

    assert main(["train", "data", "--name", "Улица", "--version", "2", *flags]) == 0

    (run,) = [path for path in Path("runs").iterdir() if path.is_dir()]
    printed = capsys.readouterr().out
    assert f"The best model is in {run / 'bundle'} (epoch 1, mIoU 0." in printed
    assert f"sscloud evaluate {run / 'bundle'}" in printed
    assert ModelBundle.load(run / "bundle").manifest.title == "Улица v2"
    assert json.loads((run / "config.json").read_bytes())["config"]["dataset"] == str(data)

    command = ["import-checkpoint", "checkpoints/checkpoint_epoch1.pth", "--scale", "0.5", "-o", "imported"]
    assert main(command) == 0
    for bundle in (run / "bundle", Path("imported")):
        assert main(["predict", str(bundle), "data/imgs/1.png", "-o", f"out-{bundle.name}", "--device", "cpu"]) == 0
    masks = [read_label_map(next(Path(f"out-{name}").glob("*.png"))) for name in ("bundle", "imported")]
    assert (masks[0] == masks[1]).all()

    assert main(["export", str(run), "-o", "models/a", "--name", "Двор", "--version", "5"]) == 0
    assert "Двор v5 in models/a (epoch 1" in capsys.readouterr().out


def test_resume(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "data", "--resume"]) == 2
    assert "There is no run in runs/ to resume" in capsys.readouterr().err
    assert main(["train", "data", "-o", "runs/a", "--resume", "--epochs", "1", *QUICK]) == 2
    assert "There is no run in runs/a to go on with" in capsys.readouterr().err
    assert main(["train", "data", "-o", "runs/a", "--epochs", "1", *QUICK]) == 0
    assert "runs/a: 1 panoramas to learn from, 1 to choose the epoch by, so few" in capsys.readouterr().err
    metrics = Path("runs/a/metrics.csv").read_bytes()
    assert main(["train", "data", "--resume", "--device", "cpu"]) == 0  # the latest run, which is done
    assert "Going on with runs/a." in capsys.readouterr().err
    assert Path("runs/a/metrics.csv").read_bytes() == metrics

    assert main(["train", "data", "-o", "runs/a", "--resume", "--epochs", "9", "--scale", "0.25"]) == 2
    assert "runs/a goes on as it was started (epochs was 1, not 9; scale was 0.5, not 0.25)" in capsys.readouterr().err
    assert main(["train", "data", "-o", "runs/a", *QUICK]) == 2
    assert "runs/a holds a run already" in capsys.readouterr().err


def test_frozen_splits(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=50, test=0))
        writer.commit()
        snapshot = writer.manifest.snapshot

    assert main(["train", "data", "--validation", "10", *QUICK]) == 2
    assert "--validation 10 cannot be used: the splits of" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["train", "data", "-o", "runs/a", "--epochs", "1", *QUICK]) == 0
    stored = json.loads(Path("runs/a/config.json").read_bytes())
    assert stored["facts"]["snapshot"] == snapshot
    assert ModelBundle.load(Path("runs/a/bundle")).manifest.snapshot == snapshot
    assert main(["train", "data", "-o", "runs/a", "--resume", "--device", "cpu"]) == 0


def test_errors_before_training(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["nowhere"], "nowhere/imgs is missing"),
        (["data", "--scale", "0.1"], "128x64 at scale 0.1 is 12x6; the network needs at least 16 pixels"),
        (["data", "--epochs", "0"], "--epochs must be at least 1, found 0"),
        (["data", "--load", "missing.pth", *QUICK], "missing.pth cannot be read"),
        (["data", "--frame", "view", "--pth-checkpoints", "pth"], "A .pth file cannot say that its network sees"),
    ):
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sscloud train: ")
        assert message in error
    assert not Path("runs").exists()


def test_what_fits_is_chosen_and_kept(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-o", "runs/a", "--epochs", "1", "--base-width", "4", "--device", "cpu", "--no-augment"]

    assert main(["train", "data", "--scale", "auto", "--batch-size", "auto", "--memory", "1", *flags]) == 0

    printed = capsys.readouterr().err
    assert "Planned for 1.0 GiB" in printed
    assert "Chosen: --scale 1 --batch-size 8" in printed
    stored = json.loads(Path("runs/a/config.json").read_bytes())["config"]
    assert (stored["scale"], stored["batch_size"], stored["crop"]) == (1, 8, None)
    again = ["train", "data", "-o", "runs/a", "--resume", "--scale", "auto", "--device", "cpu"]
    assert main(again) == 0  # as it was planned
    assert "Planned" not in capsys.readouterr().err
    assert main(["train", "data", "-o", "runs/b", "--scale", "auto", "--memory", "0.1"]) == 2
    assert "take 0.9 GiB, more than 80% of the 0.1 GiB that may be used. Give --memory at" in capsys.readouterr().err


def test_crops_and_the_frame_of_checkpoints(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "dataset.yaml").write_text("azimuth: {direction: 1, column_0: 0.0}\n", encoding="utf-8")
    crops = ["--crop", "32", "--rare-crops", "0.9", "--loss", "focal+dice", "--latitude-weights", "--ema", "0.5"]

    assert main(["train", "data", "-o", "runs/a", "--epochs", "1", *QUICK, *crops]) == 0
    assert main(["train", "data", "-o", "runs/b", "--epochs", "1", *QUICK, "--pth-checkpoints", "pth"]) == 0

    stored = json.loads(Path("runs/a/config.json").read_bytes())["config"]
    assert (stored["crop"], stored["rare_crops"], stored["ema"]) == ([32, 32], 0.9, 0.5)
    manifests = [ModelBundle.load(Path("runs") / name / "bundle").manifest for name in "ab"]
    # A .pth file cannot say that its network sees normals in another frame.
    assert [manifest.frame for manifest in manifests] == ["view", "scanner"]
    with pytest.raises(SystemExit):
        main(["train", "data", "--crop", "1x2x3"])
    assert "argument --crop: expected a number of pixels or HxW, found 1x2x3" in capsys.readouterr().err


def test_a_bundle_brings_its_settings(data: Path) -> None:
    assert main(["train", "data", "-o", "runs/a", "--epochs", "1", "--bilinear", *QUICK]) == 0

    again = ["train", "data", "-o", "runs/b", "--epochs", "1", "--device", "cpu", "--no-augment"]
    assert main([*again, "--load", "runs/a/bundle"]) == 0

    stored = json.loads(Path("runs/b/config.json").read_bytes())["config"]
    assert (stored["scale"], stored["base_width"], stored["bilinear"]) == (0.5, 4, True)


def test_going_on_with_a_data_set_that_was_moved(data: Path) -> None:
    assert main(["train", "data", "-o", "runs/a", "--epochs", "1", *QUICK]) == 0
    data.rename(data.with_name("moved"))

    assert main(["train", "moved", "-o", "runs/a", "--resume", "--device", "cpu"]) == 0


def test_several_processes_need_a_name(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert main(["train", "data"]) == 2
    assert "Several processes need one run folder: name it with --output" in capsys.readouterr().err
