import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.bundle import ModelBundle
from sscloud.labels import LabelSchema
from tools.cli import main
from training.dataset import open_dataset
from training.evaluate import evaluate
from training.folds import CrossValidation
from training.manifest import DatasetWriter
from training.splits import SplitPlan

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")


@pytest.fixture
def data(tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """One panorama whose mask holds ground and, below, void."""
    root = tmp_path / "data"
    (root / "imgs").mkdir(parents=True)
    (root / "masks").mkdir()
    Image.fromarray(make_panorama()).save(root / "imgs/1.png")
    mask = np.full((64, 128), 2, np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(root / "masks/1.png")
    return root


def test_prints_a_table_and_writes_json(
    data: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out/scores.json"

    assert main(["evaluate", str(tiny_bundle.path), str(data), "--device", "cpu", "-o", str(output)]) == 0

    printed = capsys.readouterr().out
    assert printed.startswith(f"Улица v3 on {data}: 1 panorama(s)\n")
    assert "Растительность" in printed
    assert printed.endswith(f"Written to {output}\n")
    text = output.read_text(encoding="utf-8")
    assert "NaN" not in text
    scores = json.loads(text)
    by_name = {entry["name"]: entry for entry in scores["classes"]}
    assert by_name["Земля"]["share"] == 1
    assert by_name["Здание"]["recall"] is None
    assert sum(map(sum, scores["confusion"])) == 32 * 128


def test_frozen_splits(
    data: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2, 7):
        pixels = np.asarray(Image.open(data / "imgs/1.png"))
        Image.fromarray(np.roll(pixels, number, axis=1)).save(data / f"imgs/{number}.png")
        shutil.copy(data / "masks/1.png", data / f"masks/{number}.png")
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=17, test=33))
        writer.commit()
    output = tmp_path / "scores.json"
    command = ["evaluate", str(tiny_bundle.path), str(data), "--device", "cpu", "-o", str(output)]

    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"Улица v3 on the test part of {data}: 2 panorama(s)\n")
    assert json.loads(output.read_bytes())["split"] == "test"
    for name, count in (("train", 3), ("validation", 1), ("all", 6)):
        assert main([*command, "--overwrite", "--split", name]) == 0
        assert f": {count} panorama(s)\n" in capsys.readouterr().out


def test_no_such_split(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_bundle.path), str(data), "--split", "test"]) == 2
    assert "no panoramas in the split test (it has no frozen splits)" in capsys.readouterr().err


def test_other_labels(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    labels = data.parent / "labels.yaml"
    labels.write_text("labels: [{name: Земля, id: 2}, {name: Забор, id: 9}]\n", encoding="utf-8")

    status = main(["evaluate", str(tiny_bundle.path), str(data), "--labels", str(labels), "--device", "cpu"])

    assert status == 0
    assert "Забор" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_count_the_same(
    data: Path, tiny_bundle: ModelBundle, tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]]
) -> None:
    for number in (2, 3):
        Image.fromarray(make_panorama(seed=number)).save(data / f"imgs/{number}.png")
        shutil.copy(data / "masks/1.png", data / f"masks/{number}.png")
    command = ["evaluate", str(tiny_bundle.path), str(data), "--device", "cpu", "-o"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun sets, without the seconds that it takes to start.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}

    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.cli", *command, str(tmp_path / f"rank-{rank}.json")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=200) for process in processes]

    assert [process.returncode for process in processes] == [0, 0], printed
    assert main([*command, str(tmp_path / "one.json")]) == 0
    assert printed[0][0].startswith(f"Улица v3 on {data}: 3 panorama(s)\n")
    assert printed[1][0] == ""
    assert not (tmp_path / "rank-1.json").exists()
    one, two = (_without_times(tmp_path / name) for name in ("one.json", "rank-0.json"))
    assert [entry["name"] for entry in two["panoramas"]] == ["1", "2", "3"]
    assert two == one


def _without_times(file: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads(file.read_bytes())
    for entry in scores["panoramas"]:
        assert entry.pop("seconds") > 0
    return scores


def test_groups_by_name(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("12", "2"):
        shutil.copy(data / "imgs/1.png", data / f"imgs/{name}.png")
        shutil.copy(data / "masks/1.png", data / f"masks/{name}.png")
    command = ["evaluate", str(tiny_bundle.path), str(data), "--device", "cpu"]

    assert main([*command, "--group-by", r"^(\d)"]) == 0
    assert "resamples of 2 groups of panoramas" in capsys.readouterr().out
    assert main(command) == 0
    assert "resamples of 3 groups of panoramas" in capsys.readouterr().out
    assert main([*command, "--group-by", "1"]) == 2
    assert "--group-by '1' does not match 1 file name(s): 2.png" in capsys.readouterr().err


def test_folds_are_no_splits(
    data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", str(tiny_bundle.path.parent), str(data), "--folds", "2"]

    assert main([*command, "--split", "all"]) == 2
    assert "Leave --split out" in capsys.readouterr().err
    assert main(command) == 2
    assert f"{tiny_bundle.path.parent} is no run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "Start it without torchrun" in capsys.readouterr().err


def test_prints_each_fold(
    data: Path,
    tiny_bundle: ModelBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def cross_validate(run: Path, dataset: Path, **options: Any) -> CrossValidation:
        asked.update(options, run=run)
        evaluation = evaluate(tiny_bundle, open_dataset(dataset), device="cpu")
        return CrossValidation(pooled=evaluation, folds=(evaluation, evaluation))

    monkeypatch.setattr("training.folds.cross_validate", cross_validate)
    run, output = tmp_path / "run", tmp_path / "scores.json"

    assert main(["evaluate", str(run), str(data), "--folds", "2", "--turns", "3", "-o", str(output)]) == 0

    out = capsys.readouterr().out
    assert asked["run"] == run
    assert asked["output"] == run / "folds"
    assert (asked["count"], asked["turns"], asked["group_by"]) == (2, 3, None)
    assert out.startswith(f"The recipe of {run} on 2 folds of {data}: 1 panorama(s)\n")
    scores = json.loads(output.read_bytes())
    shown = f"{scores['miou']:.3f}"
    assert f"mIoU of each fold: {shown}  {shown}\n" in out
    assert scores["folds"] == [{"miou": scores["miou"], "panoramas": ["1"]}] * 2


def test_errors_are_one_message(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(data), str(data)]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err
    (data / "masks/1.png").unlink()
    assert main(["evaluate", str(tiny_bundle.path), str(data)]) == 2
    assert "1.png: has no mask masks/1.png" in capsys.readouterr().err
