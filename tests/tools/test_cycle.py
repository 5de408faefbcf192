"""`sscloud cycle` as people run it: its settings, its output, and processes that are killed at any moment."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
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
from training.journal import Journal, read_journals

SETTINGS: dict[str, Any] = {
    "name": "street",
    "device": "cpu",
    "min_new": 2,
    "group_by": r"^(site\d+)",
    "validation": 17,
    "test": 34,
    "train": {"epochs": 6, "scale": 0.5, "base_width": 4, "learning_rate": 0.03, "seed": 1},
    "finetune": {"epochs": 2, "learning_rate": 0.01},
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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(make_town: Callable[[str], Town]) -> None:
    """Ten kills in a cycle that begins from nothing, ten in the next one."""
    whole, killed = make_town("whole"), make_town("killed")
    rng = random.Random(20)
    for cycle in (1, 2):
        began = time.monotonic()
        whole.run()
        took = time.monotonic() - began
        kills = 0
        while kills < 10:
            process = killed.start()
            time.sleep(rng.uniform(0, took / 6))
            with contextlib.suppress(ProcessLookupError):  # it has come to its end
                os.kill(process, signal.SIGKILL)
            kills += killed.nursery.wait() == -signal.SIGKILL
        killed.run()
        journal = killed.journal
        assert journal is not None
        assert (journal.number, journal.is_open) == (cycle, False)
        assert whole.looks() == killed.looks()
        for town in (whole, killed):
            town.go_on_labelling()


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
