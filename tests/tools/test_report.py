import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.bundle import ModelBundle
from tools.cli import main
from training.config import RunFacts, TrainConfig, write_config


@pytest.fixture
def run(tmp_path: Path, tiny_bundle: ModelBundle, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """A run on a data set of two panoramas, all ground."""
    data, run = tmp_path / "data", tmp_path / "run"
    for folder in (data / "imgs", data / "masks"):
        folder.mkdir(parents=True)
    for number in (1, 2):
        Image.fromarray(make_panorama(seed=number)).save(data / f"imgs/{number}.png")
        Image.fromarray(np.full((64, 128), 2, np.uint8)).save(data / f"masks/{number}.png")
    manifest = tiny_bundle.manifest
    facts = RunFacts(
        snapshot="0123456789abcdef",
        architecture=manifest.architecture,
        labels=manifest.labels,
        label_ids=manifest.label_ids,
        encoding="normals",
        aspect=2.0,
        elevation=(90.0, -90.0),
        azimuth=None,
        parent=None,
    )
    write_config(run, TrainConfig(dataset=str(data), epochs=1), facts)
    (run / "metrics.csv").write_text("epoch,train_loss,miou\n1,0.5,0.25\n")
    shutil.copytree(tiny_bundle.path, run / "bundle")
    return run


def test_the_runs_own_data_and_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", str(run), "--device", "cpu"]
    for _ in range(2):  # written anew
        assert main(command) == 0
        out = capsys.readouterr().out
        assert out.startswith("mIoU 0.")
        assert out.endswith(f" on 1 panorama of the part validation.\nWritten to {run / 'report.html'}\n")
    assert "Растительность" in (run / "report.html").read_text(encoding="utf-8")


def test_another_data_set_and_place(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = run.parent / "другие", run.parent / "page.html"
    (run.parent / "data").rename(data)
    command = ["report", str(run), str(data), "--split", "all", "--device", "cpu", "-o", str(output)]
    assert main(command) == 0
    assert "on 2 panoramas of the part all." in capsys.readouterr().out
    before = output.read_bytes()
    assert main(command) == 2
    assert f"{output} exists already. Name another file, or add --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0


def test_a_data_set_that_is_gone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.parent / "data")
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "No data set was at hand" in out
    assert f"The run's data set {run.parent / 'data'} is gone: nothing is measured. Name it after the run." in err


def test_labels(run: Path) -> None:
    labels = run.parent / "labels.yaml"
    labels.write_text("labels: [{name: Земля, id: 2}, {name: Забор, id: 9}]\n", encoding="utf-8")
    assert main(["report", str(run), "--labels", str(labels), "--split", "all", "--device", "cpu"]) == 0
    assert "Забор" in (run / "report-all.html").read_text(encoding="utf-8")


def test_errors_are_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.parent)]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["report", str(run), "--split", "test"]) == 2
    assert "no panoramas in the split test" in capsys.readouterr().err
