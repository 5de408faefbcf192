"""`sscloud cycle` as people run it: its settings, its output, and processes that are killed at any moment."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cvat_sdk import Client
from miniature import Miniature, looks
from nursery import Nursery

from cvat_standin import CvatStandin
from sscloud.errors import ConfigError
from tools.cli import main
from tools.cycle import function_update, settings_of
from training.cvat import Server, find_account
from training.journal import Journal, StepName, read_journals
from training.workspace import Workspace, has_learned

SETTINGS: dict[str, Any] = {
    "name": "street",
    "device": "cpu",
    "min_new": 2,
    "group_by": r"^(site\d+)",
    "validation": 17,
    "test": 34,
    "train": {"epochs": 6, "scale": 0.5, "base_width": 4, "learning_rate": 0.03, "seed": 1},
    "finetune": {"epochs": 2, "learning_rate": 0.01},
    "gate": {"min_groups": 2},
    "select": {"count": 2},
}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_flags_win_over_assignments_and_these_over_the_file(tmp_path: Path) -> None:
    text = yaml.safe_dump({"project": 7, "min_new": 3, "gate": {"floor": 0.2, "margin": 0.1}, "train": {"epochs": 9}})
    (tmp_path / "cycle.yaml").write_text(text)
    flags = {"min_new": 1, "gate.margin": 0.3}
    config = settings_of(tmp_path, flags, ["min_new=2", "train.amp=true", "finetune.epochs=4", "gate.margin=0.2"])
    assert (config.project, config.min_new) == (7, 1)
    assert (config.gate.floor, config.gate.margin) == (0.2, 0.3)
    assert config.train == {"epochs": 9, "amp": True}
    assert config.finetune == {"epochs": 4}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["epochs"], "--set 'epochs' is no KEY=VALUE"),
        (["train={"], "is no value of YAML"),
        (["train.epoch=3"], r"Did you mean 'epochs'\?"),
        (["train=3", "train.epochs=2"], r"'train\.epochs' cannot be set: 'train' is 3, not a mapping"),
        (["function={gpu: true}"], "'function' must name the function"),
        (["function={name: a, gpu: 1}"], r"'function\.gpu' must be true or false, found 1"),
        (["function={name: 3}"], r"'function\.name' must be a text, found 3"),
        (["function={nam: a}"], r"'function' has no key 'nam'.*Did you mean 'name'\?"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, {"project": 7}, assignments)


def test_the_function(tmp_path: Path) -> None:
    assert function_update(settings_of(tmp_path, {"project": 7})) is None
    update = function_update(settings_of(tmp_path, {"project": 7}, ["function={name: sscloud-street, gpu: true}"]))
    assert update is not None
    assert (update.name, update.gpu, update.platform) == ("sscloud-street", True, "local")


# --- processes --------------------------------------------------------------------------------------------------------


class Town:
    """A project on a stand-in, and the workspace in which processes learn from it."""

    def __init__(self, cvat: CvatStandin, client: Client, nursery: Nursery, root: Path, store: Path) -> None:
        self.cvat, self.nursery, self.root = cvat, nursery, root
        self.people = Miniature(cvat.site, client)
        (root / "dataset").mkdir(parents=True)
        (root / "dataset" / "dataset.yaml").write_text("azimuth: {direction: 1, column_0: 0.0}\n")
        settings = {**SETTINGS, "project": self.people.project}
        (root / "cycle.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        (root / "runs").mkdir()
        shutil.copy(store, root / "runs" / "mlflow.db")  # migrations take their time
        self.log = root.parent / f"{root.name}.log"
        self.people.label(self.people.jobs[:10])

    def start(self, *arguments: str) -> int:
        return self.nursery.start(["cycle", *arguments], cwd=self.root, log=self.log)

    def run(self, *arguments: str) -> str:
        """The last line of what it prints."""
        self.start(*arguments)
        assert self.nursery.wait() == 0, self.log.read_text(encoding="utf-8")
        return self.log.read_text(encoding="utf-8").splitlines()[-1]

    @property
    def journal(self) -> Journal | None:
        journals = read_journals(self.root / "cycles")
        return journals[-1] if journals else None

    def go_on_labelling(self) -> None:
        """Correct what was handed out, and one more site."""
        assert self.journal is not None
        self.people.label(self.journal.step("select").facts.get("jobs", ()))
        self.people.label(self.people.add_site(6))

    def looks(self) -> dict[str, Any]:
        with Server.connect(find_account(self.cvat.site.environment())) as server:
            return looks(self.root, self.people, server, name="street")


@pytest.fixture
def make_town(cvat_server: CvatStandin, tmp_path: Path, quick_mlflow_stores: None) -> Iterator[Callable[[str], Town]]:
    from mlflow.tracking import MlflowClient

    store = tmp_path / "template.db"
    MlflowClient(f"sqlite:///{store}").search_experiments()
    with cvat_server.site.client() as client, Nursery(cvat_server.site.environment()) as nursery:
        yield lambda name: Town(cvat_server, client, nursery, tmp_path / name, store)


def stop_when(town: Town, condition: Callable[[Journal], bool], *, by: signal.Signals, status: int) -> None:
    """Send a cycle a signal as soon as its journal says so."""
    process = town.start()
    deadline = time.monotonic() + 120
    while (journal := town.journal) is None or not condition(journal):
        assert time.monotonic() < deadline, town.log.read_text(encoding="utf-8")
        time.sleep(0.005)
    os.kill(process, by)
    assert town.nursery.wait() == status, town.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_stopped_in_the_middle(make_town: Callable[[str], Town]) -> None:
    whole, killed = make_town("whole"), make_town("killed")
    result = json.loads(whole.run("--json"))
    assert (result["outcome"], result["champion"]) == ("accepted", "street v1")

    metrics = killed.root / "runs" / "cycle-0001" / "metrics.csv"
    kill: dict[str, Any] = {"by": signal.SIGKILL, "status": -signal.SIGKILL}
    stop_when(killed, lambda journal: journal.step("train").state == "running" and metrics.exists(), **kill)
    stop_when(killed, lambda journal: journal.step("gate").state == "running", by=signal.SIGINT, status=130)
    stop_when(killed, lambda journal: journal.step("prelabel").state == "running", **kill)
    assert json.loads(killed.run("--json"))["outcome"] == "accepted"
    assert whole.looks() == killed.looks()
    assert json.loads(killed.run("--json"))["outcome"] == "nothing"
    killed.run("--dry-run")
    assert "champion       street v1" in killed.log.read_text(encoding="utf-8")


TARGETS: tuple[StepName, ...] = (
    "fetch", "check", "train", "train", "train", "gate", "register", "deploy", "select", "prelabel",
)  # fmt: skip
"""Where a cycle is killed, in this order: in its training before and after it has a checkpoint."""


def kill_in(town: Town, step: StepName, *, checkpoint: bool, delay: float) -> str | None:
    """Kill a cycle in a step, or as soon as it is past it.

    Args:
        town: where.
        step: its name.
        checkpoint: wait until the training has one.
        delay: seconds from the step's beginning to the kill.

    Returns:
        The step that was running, with "+" behind it after the first checkpoint; None where the cycle was over before.
    """
    process = town.start()
    running = town.root / "cycles" / "running.json"
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, town.log.read_text(encoding="utf-8")
        with contextlib.suppress(OSError, ValueError):
            journal = town.journal
            if journal is not None and json.loads(running.read_bytes())["pid"] == process:
                present = journal.next_step
                if present is None or (journal.step(step).is_over and present.state == "running"):
                    break
                is_there = present.name == step and present.state == "running"
                if is_there and (not checkpoint or has_learned(Workspace(town.root).run(journal.number))):
                    break
        time.sleep(0.002)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):  # it has come to its end
        os.kill(process, signal.SIGKILL)
    if town.nursery.wait() != -signal.SIGKILL:
        return None
    journal = town.journal
    assert journal is not None
    left = journal.next_step
    if left is None or left.state != "running":
        return "between"
    return left.name + ("+" if has_learned(Workspace(town.root).run(journal.number)) else "")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(make_town: Callable[[str], Town]) -> None:
    """Ten kills in a cycle that begins from nothing, ten in the next one; every step is hit."""
    whole, killed = make_town("whole"), make_town("killed")
    rng = random.Random(20)
    hit: Counter[str | None] = Counter()
    for cycle in (1, 2):
        whole.run()
        undisturbed = whole.journal
        assert undisturbed is not None
        for place, step in enumerate(TARGETS):
            checkpoint = step == "train" and TARGETS[:place].count("train") > 0
            name = step + ("+" if checkpoint or TARGETS.index("train") + 1 < place else "")
            # In the second cycle what the first one has missed is killed at its beginning.
            longest = undisturbed.step(step).seconds * (0.3 if step == "train" else 0.8)
            delay = 0.01 if cycle == 2 and not hit[name] else rng.uniform(0.01, max(0.02, longest))
            hit[kill_in(killed, step, checkpoint=checkpoint, delay=delay)] += 1
        killed.run()
        journal = killed.journal
        assert journal is not None
        assert (journal.number, journal.is_open) == (cycle, False)
        assert whole.looks() == killed.looks()
        for town in (whole, killed):
            town.go_on_labelling()
    assert {"train+", "gate+", "register+", "deploy+", "select+", "prelabel+"} <= set(hit), hit
    assert {"fetch", "check", "train"} & set(hit), hit


# --- here -------------------------------------------------------------------------------------------------------------


def test_the_command(
    cvat_server: CvatStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    with cvat_server.site.client() as client:
        project = Miniature(cvat_server.site, client, sites=1).project
    command = ["cycle", "--workspace", str(tmp_path / "work"), "--project", str(project), "--json"]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "work").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("on the server  0 frames of completed jobs")
    assert json.loads(lines[-1])["enough"] is False
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Nothing to do: project")
    assert json.loads(captured.out.splitlines()[-1])["outcome"] == "nothing"
    assert main([*command, "--set", "projekt=3"]) == 2
    assert "Did you mean 'project'?" in capsys.readouterr().err
