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
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from tools.cli import DEFECT, main
from tools.commands import gate as command
from training.manifest import DatasetWriter
from training.splits import SplitPlan


@pytest.fixture
def data(tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """Six panoramas of ground, two of them frozen for the test."""
    root = tmp_path / "data"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 7):
        Image.fromarray(make_panorama(seed=number)).save(root / f"imgs/{number}.png")
        Image.fromarray(np.full((64, 128), 2, np.uint8)).save(root / f"masks/{number}.png")
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=17, test=33))
        writer.commit()
    return root


@pytest.fixture
def other(tmp_path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]) -> ModelBundle:
    """Finds no ground at all."""
    return biased(tmp_path / "other", -1e4, make_unet, make_manifest, version=4)


@pytest.fixture
def good(tmp_path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]) -> ModelBundle:
    """Finds nothing but ground."""
    return biased(tmp_path / "good", 1e4, make_unet, make_manifest, version=3)


def biased(
    path: Path, by: float, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest], *, version: int
) -> ModelBundle:
    model = make_unet(Architecture(classes=6, base_width=4))
    assert model.outc.conv.bias is not None
    model.outc.conv.bias.data[1] = by
    return save_bundle(path, model, make_manifest(model.architecture, version=version))


def test_refused_with_a_page(
    data: Path, good: ModelBundle, other: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["gate", str(good.path), str(other.path), str(data), "--device", "cpu", "-o", str(output)]
    arguments += ["--min-groups", "2"]

    assert main(arguments) == 1

    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Улица v4 is refused: Улица v3 stays."
    assert out[1].startswith("  ✗ Overall it may be worse: IoU of the only judged class 1.000 → 0.000")
    assert out[2].startswith("  ! There are only 2 groups of test panoramas")
    assert out[3].startswith("  ✗ Земля falls too far: IoU 1.000")
    assert out[-2] == "  ✓ It has learned from none of the 2 test panoramas."
    assert out[-1] == f"Written to {output}"
    assert sorted(file.name for file in output.iterdir()) == ["gate.html", "gate.json"]
    decision = json.loads((output / "gate.json").read_bytes())
    assert decision["accepted"] is False
    assert decision["panoramas"] == 2
    assert "data:image/jpeg" in (output / "gate.html").read_text(encoding="utf-8")

    assert main(arguments) == 2
    assert f"{output} exists already" in capsys.readouterr().err


def test_accepted_by_a_wider_floor(
    data: Path, tiny_bundle: ModelBundle, other: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["gate", str(tiny_bundle.path), str(other.path), str(data), "--device", "cpu", "--json"]

    wider = [*arguments, "--margin", "0.9", "--class-floor", "Земля=1"]
    assert main([*wider, "--min-groups", "2"]) == 0
    decision = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert decision["accepted"] is True
    rules = {"margin": 0.9, "level": 0.95, "floor": 0.05, "floors": {"Земля": 1.0}, "min_groups": 2}
    assert decision["rules"] == rules

    assert main(wider) == 1
    (refusal,) = json.loads(capsys.readouterr().out.splitlines()[-1])["refusals"]
    assert "The 2 test panoramas are of only 2 groups, and the gate asks for 5" in refusal


def test_a_defect_does_not_look_like_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(command, "run", run)
    assert main(["gate", "-", "a", "b"]) == DEFECT == 70
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err


def test_the_first_model(data: Path, other: ModelBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "-", str(other.path), str(data), "--device", "cpu"]) == 1
    assert "There is no champion to compare with; not better than to call everything Земля" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class-floor", "Вода=0.1"], "Floors are set for 'Вода', but the labels are Фон, "),
        (["--level", "0.3"], "The gate's level must be at least 0.5"),
        (["--min-groups", "1"], "The gate's min_groups must be 2 or above"),
    ],
)
def test_errors(
    flags: list[str], message: str, data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(tiny_bundle.path), str(tiny_bundle.path), str(data), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--class-floor", "0.1"], ["--margin", "-1"], ["--floor", "nan"]])
def test_flags_are_checked(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["gate", "-", "a", "b", *flags])
    assert flags[0] in capsys.readouterr().err


def test_without_frozen_test_panoramas(
    data: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "manifest.json").unlink()

    assert main(["gate", "-", str(tiny_bundle.path), str(data)]) == 2
    assert "has no frozen test panoramas" in capsys.readouterr().err
