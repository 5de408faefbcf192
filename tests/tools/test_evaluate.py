import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.bundle import ModelBundle
from sscloud.labels import LabelSchema
from tools.cli import main
from training.manifest import DatasetWriter
from training.splits import SplitPlan


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
    assert printed.startswith(f"Улица v3 on {data}: 1 panoramas\n")
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
    assert capsys.readouterr().out.startswith(f"Улица v3 on the test part of {data}: 2 panoramas\n")
    assert json.loads(output.read_bytes())["split"] == "test"
    for name, count in (("train", 3), ("validation", 1), ("all", 6)):
        assert main([*command, "--split", name]) == 0
        assert f": {count} panoramas\n" in capsys.readouterr().out


def test_no_such_split(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_bundle.path), str(data), "--split", "test"]) == 2
    assert "no panoramas in the split test (it has no frozen splits)" in capsys.readouterr().err


def test_other_labels(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    labels = data.parent / "labels.yaml"
    labels.write_text("labels: [{name: Земля, id: 2}, {name: Забор, id: 9}]\n", encoding="utf-8")

    status = main(["evaluate", str(tiny_bundle.path), str(data), "--labels", str(labels), "--device", "cpu"])

    assert status == 0
    assert "Забор" in capsys.readouterr().out


def test_errors_are_one_message(data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(data), str(data)]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err
    (data / "masks/1.png").unlink()
    assert main(["evaluate", str(tiny_bundle.path), str(data)]) == 2
    assert "1.png: has no mask masks/1.png" in capsys.readouterr().err
