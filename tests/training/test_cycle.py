"""A cycle against the stand-in: what it comes to, and what becomes of one that is stopped anywhere."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cvat_sdk import Client
from executioner import Killed
from miniature import Miniature, looks

from cvat_standin import CvatStandin, set_state
from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, CycleError, DeployError
from sscloud.labels import LabelSchema
from training import cycle as module
from training.config import Place, TrainConfig
from training.cvat import Server, find_account
from training.cycle import CycleResult, Deploy, held_changes, origin_of, run_cycle
from training.cycle_config import CycleConfig
from training.cycle_data import selection_of
from training.cycle_plan import plan_cycle
from training.fetch import fetch
from training.gate import Decision
from training.journal import STEPS, Journal, StepName, StepRecord, read_journals, write_journal
from training.manifest import read_manifest
from training.prelabel import Report
from training.prelabel_store import PrelabelStore
from training.registry import Registry
from training.rule import Rule
from training.workspace import Workspace, open_registry

pytestmark = [
    pytest.mark.usefixtures("quick_mlflow_stores"),
]

SETTINGS: dict[str, Any] = {
    "name": "street",
    "device": "cpu",
    "min_new": 2,
    "group_by": r"^(site\d+)",
    "validation": 17.0,
    "test": 34.0,
    "train": {"epochs": 6, "scale": 0.5, "base_width": 4, "learning_rate": 0.03, "seed": 1},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
    "gate": {"min_groups": 2},
    "select": {"count": 2},
}
AZIMUTH = "azimuth: {direction: 1, column_0: 0.0}\n"


class Street:
    """A project, and a workspace that learns from it."""

    def __init__(self, cvat: CvatStandin, client: Client, server: Server, root: Path, *, sites: int = 6) -> None:
        self.cvat, self.client, self.server, self.root = cvat, client, server, root
        self.people = Miniature(cvat.site, client, sites=sites)
        self.place = Workspace(root)
        self.said: list[str] = []
        self.place.dataset.mkdir(parents=True)
        (self.place.dataset / "dataset.yaml").write_text(AZIMUTH)
        self.deploy: Deploy = lambda registry, version, *, expected: registry.set_champion(version)

    def config(self, **changes: Any) -> CycleConfig:
        settings = {"project": self.people.project, **SETTINGS, **changes}
        return CycleConfig.from_dict(settings, source="the test")

    def cycle(self, config: CycleConfig | None = None, **arguments: Any) -> CycleResult:
        return run_cycle(
            self.server,
            self.root,
            config or self.config(),
            deploy=self.deploy,
            say=self.said.append,
            quiet=True,
            **arguments,
        )

    @property
    def journal(self) -> Journal:
        return read_journals(self.place.cycles)[-1]

    @property
    def registry(self) -> Registry:
        return open_registry(self.place, self.config(), None)

    def states(self) -> dict[str, str]:
        return {step.name: step.state for step in self.journal.steps}

    def looks(self) -> dict[str, Any]:
        """All that a cycle leaves."""
        return {**looks(self.root, self.people, self.server, name="street"), "states": self.states()}


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[CvatStandin, Client, Server]]:
    """A stand-in for all tests; each has a project of its own."""
    with CvatStandin() as cvat, cvat.site.client() as client:
        account = dataclasses.replace(find_account(cvat.site.environment()))
        with Server.connect(account) as server:
            yield cvat, client, server


@pytest.fixture
def make_street(site: tuple[CvatStandin, Client, Server], tmp_path: Path) -> Iterator[Callable[..., Street]]:
    cvat, *_ = site

    def make(name: str = "work", **arguments: Any) -> Street:
        return Street(*site, tmp_path / name, **arguments)

    yield make
    cvat.heal()


@pytest.fixture(scope="module")
def learned(site: tuple[CvatStandin, Client, Server], tmp_path_factory: pytest.TempPathFactory) -> Street:
    """A street after its first cycle; ten of its twelve scans are labelled. Not to be changed."""
    street = Street(*site, tmp_path_factory.mktemp("learned"))
    street.people.label(street.people.jobs[:10])
    street.first = street.cycle()  # type: ignore[attr-defined]
    return street


@pytest.fixture
def quick(learned: Street, monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Trainings that take what was learned before, and a gate that lets everything pass; told the configurations."""
    done: list[TrainConfig] = []

    def train(config: TrainConfig, place: Place) -> ModelBundle:
        done.append(config)
        shutil.copytree(learned.place.run(1), place.run, dirs_exist_ok=True)
        (place.run / "mlflow_run_id").unlink()
        return ModelBundle.load(place.run / "bundle")

    def decide(champion: ModelBundle | None, challenger: ModelBundle, *_: Any, **__: Any) -> Decision:
        return Decision(
            accepted=True,
            reasons=("It is liked.",),
            champion=None if champion is None else champion.manifest.title,
            challenger=challenger.manifest.title,
            test_snapshot="0" * 16,
            panoramas=4,
            metrics={"miou": 0.5},
            champion_metrics={},
        )

    monkeypatch.setattr("training.train.train", train)
    monkeypatch.setattr(module, "decide", decide)
    monkeypatch.setattr(module, "write_gate_page", lambda path, *_: path.write_text("why"))
    return done


def failing(error: BaseException) -> Deploy:
    def deploy(registry: Registry, version: int, *, expected: int | None) -> None:
        raise error

    return deploy


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.decide
    monkeypatch.setattr(
        module, "decide", lambda *args, **more: dataclasses.replace(real(*args, **more), accepted=False)
    )


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_the_first_cycle(learned: Street) -> None:
    result: CycleResult = learned.first  # type: ignore[attr-defined]
    assert (result.outcome, result.number, result.champion) == ("accepted", 1, "street v1")
    assert result.new == 4  # of ten, four are for the test, and two for validation
    assert result.metrics["miou"] > 0.09  # the trivial answer's
    assert set(result.seconds) == set(STEPS)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["challenger"] == "street v1"
    assert learned.registry.champion() == learned.registry.get(1)
    assert set(result.jobs) <= set(learned.people.jobs[10:])
    assert len(result.jobs) in (1, 2)  # the second scan may show nothing new
    shapes = [learned.cvat.shapes(job) for job in result.jobs]
    assert all(shape["source"] == "auto" for found in shapes for shape in found)
    assert any(shapes)
    assert learned.journal.outcome == "accepted"
    assert [line.split()[0] for line in learned.said] == list(STEPS)
    page = result.report
    assert page is not None
    text = page.read_text(encoding="utf-8")
    assert 'href="gate.html"' in text
    assert 'href="select.html"' in text
    frames = learned.journal.step("select").facts["frames"]
    assert all(frame in text for frame in frames)
    assert ", ".join(map(str, result.jobs)) in text
    assert 'href="../../runs/cycle-0001/report.html"' in text
    assert all((page.parent / name).is_file() for name in ("gate.html", "gate.json", "select.html", "frames.json"))


def test_the_second_cycle(learned: Street, tmp_path: Path) -> None:
    """People correct what was handed out; the champion is trained on, and what they changed is measured."""
    root = tmp_path / "again"
    shutil.copytree(learned.root, root)
    street = Street.__new__(Street)
    street.__dict__.update({**learned.__dict__, "root": root, "place": Workspace(root), "said": []})
    assert street.cycle().outcome == "nothing"
    assert [path.name for path in street.place.cycles.iterdir() if path.is_dir()] == ["0001"]
    plan = plan_cycle(street.server, root, street.config(), quiet=True)
    assert (plan.is_enough, plan.champion, plan.new, plan.changed) == (False, "street v1", 0, 0)
    handed = learned.first.jobs  # type: ignore[attr-defined]
    street.people.label(handed)
    new = street.people.add_site(6)
    street.people.label(new)
    plan = plan_cycle(street.server, root, street.config(), quiet=True)
    assert plan.is_enough
    assert plan.changed == len(handed) + len(new)
    assert "from street v1" in "\n".join(plan.lines())
    result = street.cycle()
    assert result.number == 2
    facts = street.journal.step("effort").facts
    assert facts["frames"] == len(handed)
    assert 0 <= facts["changed"] <= 1
    assert street.journal.step("train").facts["from"] == "street v1"
    assert result.challenger == "street v2"
    assert result.champion == ("street v2" if result.outcome == "accepted" else "street v1")
    assert result.report is not None
    text = result.report.read_text(encoding="utf-8")
    assert "The cycles so far" in text
    assert 'aria-label="mIoU on the test panoramas by cycle"' in text


# --- what there is to do ----------------------------------------------------------------------------------------------


def test_nobody_has_finished_anything(make_street: Callable[..., Street]) -> None:
    street = make_street(sites=1)
    result = street.cycle()
    assert result.outcome == "nothing"
    assert "no frame that counts yet (2 jobs of state new)" in result.summary
    assert read_journals(street.place.cycles) == []


def test_too_little_to_learn_from(make_street: Callable[..., Street], quick: list[TrainConfig]) -> None:
    street = make_street()
    street.people.label(street.people.jobs[:6])
    before = sorted(street.root.rglob("*"))
    plan = plan_cycle(street.server, street.root, street.config(), quiet=True)
    assert sorted(street.root.rglob("*")) == before
    assert (plan.is_enough, plan.finished, plan.changed, plan.champion, plan.pool) == (True, 6, 6, None, 6)
    assert "6 of them would come in" in plan.lines()[0]
    assert "if at least 2 of these are to learn from" in plan.lines()[3]
    assert "from scratch, because there is no champion" in plan.lines()[4]
    assert plan.to_dict()["enough"] is True
    result = street.cycle(street.config(min_new=10))
    assert result.outcome == "nothing"
    assert "and 'min_new' asks for 10." in result.summary
    assert f"({6 - result.new} others to validate or test)" in result.summary
    assert read_manifest(street.place.dataset) is not None
    assert not list(street.place.cycles.glob("0*"))
    plan = plan_cycle(street.server, street.root, street.config(min_new=10), quiet=True)
    assert f"nothing to do: at most {result.new} new or corrected, and 'min_new' asks for 10" in "\n".join(plan.lines())
    assert quick == []


def test_without_test_panoramas_nothing_is_trained(
    make_street: Callable[..., Street], quick: list[TrainConfig]
) -> None:
    street = make_street(sites=1)
    street.people.label(street.people.jobs)
    with pytest.raises(CycleError, match=r"step check: .*nobody"):
        street.cycle(street.config(select={"assignee": "nobody"}))
    with pytest.raises(CycleError, match=r"(?s)step check: .*too few.*The gate needs test panoramas"):
        street.cycle()
    assert street.states()["check"] == "failed"
    assert quick == []


def test_a_test_part_is_asked_for_before_anything_is_fetched(
    make_street: Callable[..., Street], quick: list[TrainConfig]
) -> None:
    street = make_street(sites=3)
    street.people.label(street.people.jobs)
    none = street.config(test=0)
    with pytest.raises(CycleError, match=r"step fetch: 'test' is 0 percent.*Leave 'test' out"):
        street.cycle(none)
    assert read_manifest(street.place.dataset) is None
    fetch(street.server, street.place.dataset, selection=selection_of(none), rule=Rule(schema=LabelSchema.default()),
          plan=none.split_plan(None), quiet=True)  # fmt: skip
    with pytest.raises(ConfigError, match=r"'test' is 0 percent.*dataset are frozen.*complete jobs of further groups"):
        plan_cycle(street.server, street.root, none, quiet=True)
    with pytest.raises(CycleError, match=r"step check: There are no test panoramas\. The splits of .* are frozen"):
        street.cycle()
    street.people.label(street.people.add_site(3))
    assert street.cycle(street.config(min_new=0, gate={})).outcome == "accepted"
    assert "warning: There are only 2 test panoramas, of 1 group (sites, as a rule): what" in "\n".join(street.said)
    assert len(quick) == 1


# --- where it goes on -------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(make_street: Callable[..., Street], quick: list[TrainConfig]) -> Street:
    """A street with enough to learn from, where training and gate take no time."""
    street = make_street()
    street.people.label(street.people.jobs[:10])
    return street


def test_stopped_and_failed_steps_are_tried_again(ready: Street, quick: list[TrainConfig]) -> None:
    """All in one, because it takes a cycle: Ctrl-C, a defect, an error; then what may be changed, and what not."""
    deploy = ready.deploy
    ready.deploy = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ready.cycle()
    assert ready.states()["deploy"] == "pending"
    ready.deploy = failing(ZeroDivisionError("a defect of http://anna:secret@store"))
    with pytest.raises(CycleError, match=r"(?s)step deploy: ZeroDivisionError: a defect of http://store .*goes on"):
        ready.cycle()
    cause = (ready.place.cycles / "0001" / "traceback.txt").read_text(encoding="utf-8")
    assert "in deploy\n" in cause
    assert "secret" not in cause
    ready.deploy = failing(DeployError("Nuclio is away."))
    with pytest.raises(CycleError, match=r"(?s)Cycle 1 failed in its step deploy: Nuclio is away\..*goes on serving"):
        ready.cycle()
    record = ready.journal.step("deploy")
    assert (record.state, record.error) == ("failed", "Nuclio is away.")
    assert ready.journal.is_open
    assert ready.registry.champion() is None
    plan = plan_cycle(ready.server, ready.root, ready.config(), quiet=True)
    assert (plan.unfinished, plan.step) == (1, "deploy")
    assert "cycle 1 is unfinished and would go on at deploy" in "\n".join(plan.lines())

    other = ready.config(train={**SETTINGS["train"], "epochs": 9}, gate={"margin": 0.5})
    with pytest.raises(ConfigError, match=r"(?s)Cycle 1 is unfinished.*gate was .*; train was .*--restart"):
        ready.cycle(other)
    plan = plan_cycle(ready.server, ready.root, other, quiet=True)
    assert [text.split()[0] for text in plan.differing] == ["gate", "train"]
    assert "would not go on: gate was" in "\n".join(plan.lines())
    journal = ready.place.cycles / "0001" / "journal.json"
    text = journal.read_text(encoding="utf-8")
    journal.write_text(text.replace(ready.server.url, "https://cvat.example.org"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the server was https://cvat\.example\.org, not http"):
        ready.cycle()
    journal.write_text(text, encoding="utf-8")

    def deploy_alone(registry: Registry, version: int, *, expected: int | None) -> None:
        with pytest.raises(ConfigError, match=r"Another `sscloud cycle` works in .*process \d+, since"):
            ready.cycle()
        plan = plan_cycle(ready.server, ready.root, ready.config(), quiet=True)
        assert "nothing while another `sscloud cycle` works here (process" in "\n".join(plan.lines())
        assert expected is None
        deploy(registry, version, expected=expected)

    ready.deploy = deploy_alone
    # What is still to come may be changed.
    result = ready.cycle(ready.config(select={"count": 0}, device="auto", new_labels=True, function={"name": "unet"}))
    assert (result.champion, result.jobs) == ("street v1", ())
    assert "Going on with cycle 1 at deploy." in ready.said
    assert ready.journal.step("select").error == "no frame was asked for ('select.count' is 0)"
    assert ready.states()["prelabel"] == "skipped"
    assert len(quick) == 1


def test_a_refused_challenger_changes_nothing(
    ready: Street, quick: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch)
        result = ready.cycle()
    assert (result.outcome, result.champion, result.metrics) == ("refused", None, {})
    assert ready.states() == {
        **dict.fromkeys(STEPS, "done"),
        **dict.fromkeys(("effort", "deploy", "select", "prelabel"), "skipped"),
    }
    assert ready.journal.step("deploy").error == "the gate refused the challenger"
    challenger = ready.registry.challenger()
    assert challenger is not None
    assert (challenger.version, challenger.decision) == (1, "refused")
    assert ready.cycle().outcome == "nothing"  # the same data would come to the same
    assert len(quick) == 1


def test_before_anything_is_learned_settings_are_free(
    ready: Street, quick: list[TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: TrainConfig, place: Place) -> None:
        place.run.mkdir(parents=True)
        (place.run / "config.json").write_text("{}")
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("training.train.train", fail)
        with pytest.raises(CycleError, match="step train: MemoryError: no room"):
            ready.cycle()

    check = module._Cycle._check

    def check_and_change(self: Any) -> dict[str, Any]:
        facts = check(self)
        manifest = ready.place.dataset / "manifest.json"
        data = manifest.read_text(encoding="utf-8")
        manifest.write_text(data.replace('"split": "train"', '"split": "validation"', 1), encoding="utf-8")
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(module._Cycle, "_check", check_and_change)
        with pytest.raises(CycleError, match=r"(?s)step train: .*has changed since this cycle fetched it.*--restart"):
            ready.cycle(ready.config(min_new=0))
    assert ready.journal.number == 1
    assert quick == []

    (ready.root / "own.yaml").write_text(LabelSchema.default().to_yaml(), encoding="utf-8")
    ready.cycle(ready.config(train={**SETTINGS["train"], "epochs": 9}, labels="own.yaml"), restart=True)
    assert "Cycle 1 is given up." in ready.said
    assert [journal.outcome for journal in read_journals(ready.place.cycles)] == ["abandoned", "accepted"]
    assert (quick[0].epochs, quick[0].labels) == (9, str(ready.root / "own.yaml"))


def test_a_champion_that_somebody_else_made(ready: Street, learned: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays; and it is what draws, here as the function in CVAT."""
    imported = ready.registry.import_bundle(learned.registry.bundle(1)).version
    asked: dict[str, Any] = {}

    def by_server(server: Server, store: Any, *, report: Report, **arguments: Any) -> None:
        report.failed.append("task 1, frame 0: it is broken")
        report.drawn = len(asked)
        asked.update(arguments)

    monkeypatch.setattr(module, "prelabel_by_server", by_server)
    config = ready.config(prelabel={"via": "server", "function": "unet", "threshold": 0.25})

    def interfere(registry: Registry, version: int, *, expected: int | None) -> None:
        registry.set_champion(imported)
        raise DeployError("Nuclio is away.")

    ready.deploy = interfere
    with pytest.raises(CycleError, match="Nuclio is away"):
        ready.cycle(config)
    with pytest.raises(CycleError, match="no frame could be pre-labelled; the first one: task 1, frame 0: it"):
        ready.cycle(config)

    handed = set(ready.journal.step("select").facts["jobs"])
    untouched, opened = ready.people.add_site(6)
    set_state(ready.client, opened, state="in progress")
    with PrelabelStore(ready.place.prelabels, server=ready.server.url) as store:
        for job in (untouched, opened):
            store.path(job).touch()
    result = ready.cycle(config)
    assert result.outcome == "refused"
    assert (result.champion, result.challenger, result.metrics) == ("street v1", "street v2", {})
    assert "street v2 was not deployed: the gate compared it with another champion (none" in result.summary
    assert f"`sscloud models promote 2 --dataset {ready.place.dataset}`" in result.summary
    assert ready.registry.get(2).against is None
    assert (asked["function"], asked["threshold"], asked["replace_auto"]) == ("unet", 0.25, True)
    assert set(asked["selection"].jobs) == {*handed, untouched}  # nothing is redrawn under somebody's hands
    assert result.report is not None
    text = result.report.read_text(encoding="utf-8")
    assert "task 1, frame 0: it is broken" in text
    assert "Cycle 1: street v2 was not deployed" in text


@pytest.mark.parametrize("way", ["jobs", pytest.param("task", marks=pytest.mark.slow)])
def test_killed_after_every_step(make_street: Callable[..., Street], quick: list[TrainConfig], way: str) -> None:
    """Each step is done twice: what it did before it was killed is found again, and not done anew."""
    whole, killed = make_street("whole"), make_street("killed")
    for street in (whole, killed):
        street.people.label(street.people.jobs[:10])
    choice = {"select": {"count": 2, "way": way}}
    whole.cycle(whole.config(**choice))
    for name in STEPS:
        with pytest.raises(Killed), killing_when(lambda journal, name=name: journal.step(name).is_over):
            killed.cycle(killed.config(**choice))
    with pytest.raises(Killed), killing_when(lambda journal: not journal.is_open):
        killed.cycle(killed.config(**choice))
    killed.cycle(killed.config(**choice))
    assert whole.looks() == killed.looks()


@contextlib.contextmanager
def killing_when(condition: Callable[[Journal], bool]) -> Iterator[None]:
    """Kill a cycle when it is about to write down such a journal."""
    real = module.write_journal

    def killing(cycles: Path, journal: Journal) -> None:
        if condition(journal):
            raise Killed
        real(cycles, journal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_journal", killing)
        yield


# --- an unfinished cycle ----------------------------------------------------------------------------------------------


def unfinished(root: Path, *done: StepName, facts: Mapping[StepName, dict[str, Any]]) -> Journal:
    """A cycle whose training has begun, as it was left in a workspace."""
    place = Workspace(root)
    for name in ("config.json", "checkpoints/last.ckpt"):
        file = place.run(1) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    journal = Journal(number=1, started="2026-01-01T00:00:00+00:00", server="http://cvat", config={"project": 7})
    for name in done:
        journal = journal.put(StepRecord(name=name, state="done", facts=facts.get(name, {})))
    write_journal(place.cycles, journal)
    return journal


def test_an_accepted_model_is_not_forgotten_by_a_restart(tmp_path: Path) -> None:
    facts: dict[StepName, dict[str, Any]] = {
        "gate": {"accepted": True},
        "register": {"version": 3, "title": "street v3"},
    }
    unfinished(tmp_path, "train", "gate", "register", facts=facts)
    said: list[str] = []
    module._begin(Workspace(tmp_path), "http://cvat", CycleConfig(project=7), restart=True, say=said.append)
    (line,) = said
    assert line.startswith("Cycle 1 is given up. The gate accepted its model, street v3, and it was not deployed")
    assert "`sscloud models promote 3`" in line
    for accepted, done in ((False, ("train", "gate", "register")), (True, ("train", "gate", "register", "deploy"))):
        journal = unfinished(tmp_path, *done, facts={**facts, "gate": {"accepted": accepted}})
        assert module._stranded(journal) == ""


def test_what_an_unfinished_cycle_holds_on_to(tmp_path: Path) -> None:
    place, begun = Workspace(tmp_path), CycleConfig(project=7)
    journal = unfinished(tmp_path, facts={})  # settings that its journal lacks were the defaults
    assert held_changes(place, journal, "http://cvat", begun) == []
    free = dataclasses.replace(
        begun, max_hours=3.0, new_labels=True, function={"name": "unet"}, device="cpu", min_new=9
    )
    assert held_changes(place, journal, "http://cvat", free) == []
    journal = journal.put(StepRecord(name="train", state="done"))
    assert held_changes(place, journal, "http://cvat", free) == ["max_hours was None, not 3.0"]
    journal = journal.put(StepRecord(name="deploy", state="done"))
    changed = held_changes(place, journal, "http://other", free)
    assert [text.split()[0] for text in changed] == ["the", "function", "max_hours", "new_labels"]


def test_a_plan_downloads_nothing_into_the_workspace(
    tmp_path: Path, learned: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Path] = []
    real = Registry.__init__

    def note(self: Registry, uri: str, *, name: str, cache: Path) -> None:
        caches.append(cache)
        real(self, uri, name=name, cache=cache)

    monkeypatch.setattr(Registry, "__init__", note)
    plan_cycle(learned.server, learned.root, learned.config(), quiet=True)
    assert [cache.is_relative_to(learned.root) for cache in caches] == [False]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_what_training_starts_from(learned: Street) -> None:
    champion = learned.registry.bundle(1)
    assert origin_of(learned.config(), None) == (None, "there is no champion")
    assert origin_of(learned.config(), champion) == (champion, "street v1 is the champion")
    assert origin_of(learned.config(start="scratch"), champion) == (None, "'start' is scratch")
    wider = learned.config(train={"base_width": 8})
    origin, why = origin_of(wider, champion)
    assert origin is None
    assert "another network than street v1 is (base_width 8, not 4)" in why
    assert origin_of(learned.config(train={"base_width": 8}, start="champion"), champion)[0] is champion
    with pytest.raises(ConfigError, match="'start' is champion, but there is none yet"):
        origin_of(learned.config(start="champion"), None)
