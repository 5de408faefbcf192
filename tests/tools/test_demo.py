"""The demo at a size that teaches nothing, but goes the whole way."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError
from tools.demo import MARKER, DemoConfig, demo

SMALL = ["--scenes", "3", "--unseen", "2", "--width", "128", "--scale", "0.5", "--epochs", "1", "--base-width", "4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "Демо"
    command = [sys.executable, "-m", "tools.cli", "demo", "-o", str(output), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return output, done.stdout


@pytest.mark.slow
def test_leaves_every_artefact(finished: tuple[Path, str]) -> None:
    output, _ = finished
    assert (output / "scenes/imgs/3_normals.jpg").is_file()
    assert ModelBundle.load(output / "run/bundle").manifest.name == "demo"
    assert (output / "function/function-gpu.yaml").is_file()


@pytest.mark.slow
def test_prints_scores_and_times(finished: tuple[Path, str]) -> None:
    _, text = finished
    assert re.search(r"mIoU \d\.\d{3}", text)
    assert "Растительность" in text
    for stage in ("sample", "train", "evaluate", "package", "serve", "request", "total"):
        assert re.search(rf"^  {stage} +\d+\.\d s", text, re.MULTILINE), stage


@pytest.mark.slow
def test_answers_are_the_predictions(finished: tuple[Path, str]) -> None:
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "the same, byte for byte" in page
    assert re.search(r"differ from the predicted label maps in 0 of \d+ pixels", page)


@pytest.mark.slow
def test_unseen_scenes_are_other_scenes(finished: tuple[Path, str]) -> None:
    learned = {file.read_bytes() for file in (finished[0] / "scenes/imgs").iterdir()}
    assert not learned & {file.read_bytes() for file in (finished[0] / "unseen/imgs").iterdir()}


def test_keeps_peoples_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds files that no demo made"):
        demo(DemoConfig(output=tmp_path, overwrite=True))
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_does_not_run_twice_unasked(tmp_path: Path) -> None:
    (tmp_path / MARKER).touch()
    with pytest.raises(ConfigError, match="Add --overwrite"):
        demo(DemoConfig(output=tmp_path))
