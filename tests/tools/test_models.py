"""`sscloud models`: what people see of the registry, and what they may put into service."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from sscloud.volume import pointed
from tools import promotion
from tools.cli import main
from tools.promotion import FunctionUpdate
from training import gate
from training.dataset import digest, open_dataset
from training.gate import Decision
from training.manifest import DatasetWriter
from training.registry import Registry, default_uri
from training.splits import SplitPlan

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores", "no_server")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    quick_mlflow_stores: None,
    tiny_bundle: ModelBundle,
    make_unet: Callable[..., UNet],
) -> Path:
    """A workspace with three versions: a model, one that predicts the same, and one that predicts something else."""
    folder = tmp_path_factory.mktemp("filled")
    registry = Registry(default_uri(folder), name="Улица")
    registry.import_bundle(tiny_bundle, metrics={"miou": 0.5, "iou/Земля": 0.25}, test_snapshot="t1")
    same = save_bundle(folder / "same", make_unet(), replace(tiny_bundle.manifest, parent="Улица v1", temperature=1.5))
    registry.import_bundle(same, metrics={"miou": 0.75, "iou/Земля": float("nan")}, test_snapshot="t1")
    other = save_bundle(folder / "other", make_unet(Architecture(classes=6, base_width=4), seed=1), same.manifest)
    registry.import_bundle(other)
    return folder


@pytest.fixture
def workspace(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, without a champion."""
    return Path(shutil.copytree(filled, tmp_path / "work"))


@pytest.fixture
def dataset(tmp_path: Path, tiny_bundle: ModelBundle, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """Panoramas for test, labelled as version 1 labels them."""
    root = tmp_path / "data"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    predictor = Predictor(tiny_bundle, device="cpu")
    for number in range(1, 7):
        image = make_panorama(seed=number)
        Image.fromarray(image).save(root / f"imgs/{number}.png")
        Image.fromarray(predictor.predict(image).label_map).save(root / f"masks/{number}.png")
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        writer.freeze_splits(SplitPlan(group_by="image", validation=0, test=83))
        writer.commit()
    assert [item.split for item in open_dataset(root).items].count("test") == 5
    return root


def models(*arguments: object) -> int:
    return main(["models", *map(str, arguments)])


def test_list_and_show(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", workspace)
    assert models("promote", "v1", *where) == 0
    capsys.readouterr()

    assert models("list", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Улица"
    assert lines[1].split() == ["made", "mIoU", "decision", "learned", "parent"]
    assert [line.split()[0] for line in lines[2:]] == ["v1", "v2", "v3"]
    assert lines[2].endswith("champion")
    assert " 0.750 " in lines[3]
    assert lines[3].endswith("Улица v1")

    assert models("list", *where, "--json") == 0
    versions = json.loads(capsys.readouterr().out)
    assert [version["title"] for version in versions] == ["Улица v1", "Улица v2", "Улица v3"]
    assert versions[1]["metrics"] == {"miou": 0.75, "iou/Земля": None}

    assert models("show", 2, *where) == 0
    out = capsys.readouterr().out
    assert out.startswith("Улица v2\n")
    for text in ("Imported: Улица v3.", "parent     Улица v1", versions[1]["weights_sha256"], "panoramas t1", "miou"):
        assert text in out
    assert models("show", 9, *where) == 2
    assert "Улица has no version 9" in capsys.readouterr().err


def test_a_spoilt_tag_does_not_stand_in_the_way(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the champion that is to be left least of all."""
    where = ("--workspace", workspace)
    assert models("promote", 1, *where) == 0
    assert models("promote", 3, *where, "--force", "Стены лучше") == 0
    uri = default_uri(workspace)
    for version in ("2", "3"):
        MlflowClient(uri, uri).set_model_version_tag("Улица", version, "sscloud.metrics", "nothing")
    capsys.readouterr()

    assert models("list", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["damaged" in line for line in lines[2:]] == [False, True, True]
    assert models("show", 3, *where) == 2
    captured = capsys.readouterr()
    assert (captured.out, "its tags were changed" in captured.err) == ("", True)
    assert models("show", 3, *where, "--json") == 2
    assert "its tags were changed" in json.loads(capsys.readouterr().out)["problem"]
    assert models("promote", 2, *where, "--force", "Again") == 2
    assert "its tags were changed" in capsys.readouterr().err

    assert models("rollback", *where) == 0
    assert capsys.readouterr().out == "Улица v1 is served in place of Улица v3.\n"


def test_show_names_damage(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", workspace)
    shutil.rmtree(workspace / "runs/artifacts")
    assert models("show", 1, *where) == 2
    captured = capsys.readouterr()
    assert "files      damaged" in captured.out
    assert "The files of Улица v1 cannot be used" in captured.err
    assert models("show", 1, *where, "--json") == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["bundle"] is None
    assert "cannot be used" in shown["problem"]


def test_compare(workspace: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", workspace)
    assert models("compare", 1, 2, *where) == 0
    out = capsys.readouterr().out
    assert out.startswith("A: Улица v1   B: Улица v2\n\nThe configurations are the same.\n")
    assert ["miou", "0.500", "0.750", "+0.250"] in [line.split() for line in out.splitlines()]
    assert ["Земля", "0.250", "—", "—"] in [line.split() for line in out.splitlines()]

    assert models("compare", 1, 3, *where) == 0
    assert "not measured on the same test panoramas: --dataset measures both now" in capsys.readouterr().out

    assert models("compare", 1, 3, *where, "--dataset", dataset) == 0
    assert "B (Улица v3) is worse than A (Улица v1)" in capsys.readouterr().out
    assert models("compare", 1, 3, *where, "--dataset", dataset, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["comparison"]["miou"]["verdict"] == "worse"
    assert (data["same_test"], data["learned"]) == (False, {"both": 0, "a": 0, "b": 0})


def test_compare_needs_two(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models("compare", 1, "v1", "--workspace", workspace) == 2
    assert "name two different versions" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("list",), ("list", "--name", "street"), ("show", 1), ("rollback",)])
def test_no_workspace(tmp_path: Path, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert models(*arguments, "--workspace", tmp_path) == 2
    assert "it has no runs/mlflow.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_promote_by_force_and_roll_back(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", workspace)
    assert models("promote", 1, *where) == 0
    assert capsys.readouterr().out == "Улица v1 is served.\n"
    first = pointed(workspace / "served")

    assert models("promote", 3, *where) == 2
    err = capsys.readouterr().err
    assert "Улица v3 is not promoted: the gate has not compared it with the champion, Улица v1. Ask the gate" in err
    assert models("promote", 3, *where, "--force", " ") == 2
    assert "--force needs a reason" in capsys.readouterr().err
    assert pointed(workspace / "served") == first

    assert models("promote", 3, *where, "--force", "Стены лучше") == 0
    assert capsys.readouterr().out == "Улица v3 is served in place of Улица v1.\n"
    now = pointed(workspace / "served")
    assert now is not None
    assert "-v3-" in now.bundle
    assert models("promote", 3, *where) == 0  # once more changes nothing
    assert capsys.readouterr().out == "Улица v3 is served.\n"
    assert pointed(workspace / "served") == now
    assert models("show", 3, *where) == 0
    out = capsys.readouterr().out
    assert out.startswith("Улица v3 (champion)\n")
    assert "in place of Улица v1\n    Стены лучше\n" in out

    assert models("rollback", *where, "--json") == 0
    back = pointed(workspace / "served")
    assert back is not None
    assert first is not None
    assert back.bundle == first.bundle
    assert json.loads(capsys.readouterr().out) == {
        "champion": "Улица v1", "previous": "Улица v3", "folder": first.bundle, "seconds": None, "notes": [],
    }  # fmt: skip
    assert models("rollback", *where) == 2
    assert "none to go back to" in capsys.readouterr().err


def test_promote_asks_the_gate(workspace: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", workspace, "--dataset", dataset)
    assert models("promote", 1, "--workspace", workspace) == 0
    assert models("promote", 3, *where) == 2
    err = capsys.readouterr().err
    assert "Улица v3 is refused: Улица v1 stays." in err
    assert "--force" in err

    assert models("promote", 2, *where) == 0
    assert capsys.readouterr().out == "Улица v2 is served in place of Улица v1.\n"
    (approval,) = Registry(default_uri(workspace), name="Улица").get(2).approvals
    assert (approval.against, approval.forced) == ("Улица v1", False)


def test_promote_measures_as_the_cycle_does(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its labels and rules; and what the gate says of one champion does not hold for the next one."""
    settings = "name: Улица\nlabels: own.yaml\ngate: {min_groups: 3}\n"
    (workspace / "cycle.yaml").write_text(settings, encoding="utf-8")
    registry = Registry(default_uri(workspace), name="Улица")
    for version in (3, 1):
        registry.set_champion(version)
    asked: dict[str, Any] = {}

    def test_part(dataset: Path, *, labels: Path | None = None) -> str:
        asked.update(labels=labels)
        return "the test part"

    def decide(champion: ModelBundle, challenger: ModelBundle, test: object, **arguments: Any) -> Decision:
        asked.update(arguments, test=test)
        registry.set_champion(3)
        return Decision(
            accepted=True, reasons=(), champion=champion.manifest.title, challenger=challenger.manifest.title,
            test_snapshot="", panoramas=0, metrics={}, champion_metrics={},
        )  # fmt: skip

    monkeypatch.setattr(gate, "test_part", test_part)
    monkeypatch.setattr(gate, "decide", decide)
    assert models("promote", 2, "--workspace", workspace, "--dataset", "data") == 2

    assert "approved in place of Улица v1, but meanwhile Улица v3 is the champion" in capsys.readouterr().err
    assert registry.get(2).approvals == ()
    assert (asked["labels"], asked["test"], asked["rules"].min_groups) == (workspace / "own.yaml", "the test part", 3)
    assert [version.version for version in asked["earlier"]] == [3]


@pytest.mark.parametrize(
    ("settings", "flags", "expected"),
    [
        ("", [], (None, False)),
        ("", ["--function", "street", "--gpu"], (FunctionUpdate(name="street", gpu=True), False)),
        (
            "name: Улица\nfunction: {name: yard, gpu: true}\nnew_labels: true\n",
            [],
            (FunctionUpdate(name="yard", gpu=True), True),
        ),
        ("function: {name: yard}\n", ["--redeploy"], (FunctionUpdate(name="yard", redeploy=True), False)),
        ("function: {name: yard}\n", ["--function", "street"], (FunctionUpdate(name="street"), False)),
    ],
)
def test_flags_win_over_the_cycle_s_settings(
    settings: str, flags: list[str], expected: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "cycle.yaml").write_text(settings, encoding="utf-8")
    asked: dict[str, Any] = {}

    def promote(registry: Registry, version: int, **arguments: Any) -> promotion.Promotion:
        asked.update(arguments)
        champion = registry.get(version)
        return promotion.Promotion(champion=champion, previous=None, folder="", seconds=1.25, notes=("Note.",))

    monkeypatch.setattr(promotion, "promote", promote)
    assert models("promote", 1, "--workspace", workspace, *flags) == 0
    assert (asked["function"], asked["new_labels"]) == expected
    assert asked["volume"] == workspace / "served"


def test_a_function_s_flags_need_its_name(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models("rollback", "--workspace", workspace, "--redeploy") == 2
    assert "--redeploy goes with --function" in capsys.readouterr().err


def test_import_measures(
    tmp_path: Path, dataset: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("import", tiny_bundle.path, "--workspace", tmp_path, "--name", "street", "--dataset", dataset)
    where = ("--workspace", tmp_path, "--name", "street")
    for already in ("", " already"):
        assert models(*arguments) == 0
        hint = f"Next: sscloud models promote 1 --workspace {tmp_path} --name street\n"
        assert capsys.readouterr().out == f"{tiny_bundle.path} is street v1{already}. {hint}"
    assert models("promote", 1, *where) == 0
    capsys.readouterr()
    assert models("import", tiny_bundle.path, *where) == 0
    told = "street v1 already, and the champion: there is nothing more to do."
    assert capsys.readouterr().out == f"{tiny_bundle.path} is {told}\n"
    version = Registry(default_uri(tmp_path), name="street").get(1)
    assert version.metrics["miou"] == 1
    assert version.test_snapshot
    assert len(version.reasons) == 1  # nothing speaks against its scores


def test_import_keeps_what_its_scores_are_worth(
    tmp_path: Path, dataset: Path, tiny_bundle: ModelBundle, make_unet: Callable[..., UNet],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    learned = tuple(digest(item) for item in open_dataset(dataset).items)
    known = save_bundle(tmp_path / "known", make_unet(), replace(tiny_bundle.manifest, learned=learned))
    assert models("import", known.path, "--workspace", tmp_path, "--name", "street", "--dataset", dataset) == 0
    text = "It has learned from 5 of the 5 test panoramas"
    assert text in capsys.readouterr().err
    version = Registry(default_uri(tmp_path), name="street").get(1)
    assert (version.decision, version.reasons[0]) == (None, f"Imported: {tiny_bundle.manifest.title}.")
    assert version.reasons[1].startswith(text)


@pytest.mark.slow
def test_in_a_process_of_its_own(workspace: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", "models", *map(str, arguments)],
            capture_output=True, text=True, encoding="utf-8", check=False, cwd=workspace,
            env={**environment, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = run("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Улица\n")


@pytest.mark.parametrize("text", ["0", "-1", "x", "v", "²", "1.5"])
def test_what_is_no_version(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        models("show", "--", text)
    assert "expected the number of a version" in capsys.readouterr().err


def test_every_flag_is_explained() -> None:
    from tools.commands import models as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    actions = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert list(actions.choices) == ["list", "show", "compare", "promote", "rollback", "import"]
    for name, each in actions.choices.items():
        for action in each._actions:
            assert action.help, f"{name}: {action.dest} has no help"
