"""The loop as one thing: from finished corrections to a better model in CVAT, and to what people label next.

    fetch → effort → check → train → gate → register → deploy → select → prelabel → report

Every step leaves something whole behind and is written down (`training.journal`), so a cycle that is killed anywhere,
or fails, goes on at its next start with the step that is not over, and ends as if nothing had happened. Until training
has a first checkpoint there is nothing to lose, and the next start begins with `fetch` once more. A new model becomes
the champion only in `deploy`, and only through the gate: whatever fails before that, the old one goes on serving.

WORKSPACE/
  dataset/ runs/ served/ prelabels/     what the single commands know
  cycles/0001/                          journal.json, frames.json, gate.html, select.html, report.html, traceback.txt
"""

import csv
import json
import logging
import math
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, CycleError, DatasetError, ServerError, SSCloudError, UnreachableError
from sscloud.files import atomic_write
from training.bootstrap import groups_of
from training.config import CONFIG, Place, TrainConfig, inherited, read_run
from training.cvat import Server
from training.cycle_config import SETTINGS, CycleConfig, changes
from training.cycle_data import (
    FRAMES,
    effort_since,
    last_frames,
    new_items,
    no_test_part,
    pair_of,
    require_test_part,
    selection_of,
    to_learn_from,
)
from training.cycle_report import serving_metrics, verdict, write_cycle_page
from training.detector import Detector
from training.effort import measure_effort
from training.effort_records import read_effort
from training.effort_summary import percent
from training.export import BUNDLE, METRICS
from training.fetch import fetch
from training.gate import PAGE as GATE_PAGE
from training.gate import Decision, decide, says_little, test_part, too_few_groups, write_gate_page
from training.handout import hand_out
from training.journal import (
    STEPS,
    Journal,
    Outcome,
    StepName,
    StepRecord,
    cycle_folder,
    cycle_lock,
    drop_cycle,
    now,
    read_journals,
    write_journal,
)
from training.jury import jury_of
from training.manifest import Manifest, read_manifest
from training.page import plural, seconds_text
from training.prelabel import Report, prelabel
from training.prelabel import Selection as PrelabelSelection
from training.prelabel_server import prelabel_by_server
from training.prelabel_store import PrelabelStore
from training.registry import ModelVersion, Registry, objection, without_login
from training.rule import Rule
from training.selection import Selection as Chosen
from training.selection import read_selection
from training.selection_choice import NothingToChooseError, choose
from training.survey import survey
from training.workspace import Workspace, has_learned, open_registry

log = logging.getLogger(__name__)

DECISION: Final = "gate.json"
REPORT: Final = "report.html"
TRACEBACK: Final = "traceback.txt"
"""In a cycle's folder: where an error came from that nobody has foreseen."""

_GATHERING: Final[tuple[StepName, ...]] = ("fetch", "effort", "check")
"""They are cheap and repeat no download: as long as nothing was learned, a cycle begins with them again."""

_HELD_FROM: Final[Mapping[str, StepName]] = {
    "max_hours": "train",
    "gate": "gate",
    "function": "deploy",
    "new_labels": "deploy",
    "select": "select",
    "prelabel": "prelabel",
}
"""Settings that may change until a later step is over; all others are held from the first checkpoint on."""

_NOT_HELD: Final = frozenset({"device", "min_new"})

Say = Callable[[str], None]


class Deploy(Protocol):
    """Makes a version the champion that is served: the alias and what the function reads."""

    def __call__(self, registry: Registry, version: int, *, expected: int | None) -> object:
        """Do it, again after a kill; refuse where the champion is no longer the one that was `expected`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleResult:
    """What a cycle came to."""

    outcome: Literal["accepted", "refused", "nothing"]
    """`nothing`: there was too little to learn from, and the cycle has left nothing behind."""
    summary: str
    """In words."""
    number: int | None = None
    new: int = 0
    """New or corrected panoramas since the last training."""
    champion: str | None = None
    """Title of the model that serves now; not looked up where there was nothing to do."""
    challenger: str | None = None
    """Title of the model that was trained."""
    reasons: tuple[str, ...] = ()
    """Of the gate."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """On the test panoramas, of the model that serves now; empty where there is none."""
    jobs: tuple[int, ...] = ()
    """Handed out to people."""
    report: Path | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Step → duration."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "outcome": self.outcome,
            "summary": self.summary,
            "cycle": self.number,
            "new": self.new,
            "champion": self.champion,
            "challenger": self.challenger,
            "reasons": list(self.reasons),
            "metrics": dict(self.metrics),
            "jobs": list(self.jobs),
            "report": None if self.report is None else str(self.report),
            "seconds": dict(self.seconds),
        }


def run_cycle(
    server: Server,
    workspace: Path,
    config: CycleConfig,
    *,
    deploy: Deploy,
    say: Say,
    tracking_uri: str | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> CycleResult:
    """Run a cycle, or go on with the one that is unfinished.

    Args:
        server: logged in.
        workspace: the folder; made when it is not there.
        config: the settings.
        deploy: makes a version the served champion.
        say: told a line a step.
        tracking_uri: the MLflow store; None: a SQLite file in the workspace.
        restart: give up a cycle that is unfinished, and begin a new one.
        quiet: no progress bars.

    Returns:
        What came of it. A challenger that the gate refuses is a normal outcome.

    Raises:
        ConfigError: another process runs a cycle here; or an unfinished one was begun with other settings.
        CycleError: a step failed; the champion goes on serving, and the next start tries the step again.
    """
    place = Workspace(workspace.resolve())
    with cycle_lock(place.cycles):
        journal = _begin(place, server.url, config, restart=restart, say=say)
        cycle = _Cycle(server, place, journal, deploy=deploy, say=say, tracking_uri=tracking_uri, quiet=quiet)
        return cycle.run()


def _begin(place: Workspace, server: str, config: CycleConfig, *, restart: bool, say: Say) -> Journal:
    """The unfinished cycle, or a new one."""
    journals = read_journals(place.cycles)
    last = journals[-1] if journals else None
    if last is not None and last.is_open and restart:
        write_journal(place.cycles, replace(last, ended=now(), outcome="abandoned"))
        say(f"Cycle {last.number} is given up.{_stranded(last)}")
    elif last is not None and last.is_open:
        return _continued(place, last, server, config, say=say)
    number = last.number + 1 if last is not None else 1
    while has_learned(place.run(number)):  # the run of a cycle whose journal is gone: not this one's
        number += 1
    new = Journal(number=number, started=now(), server=server, config=config.to_dict())
    write_journal(place.cycles, new)
    return new


def _continued(place: Workspace, journal: Journal, server: str, config: CycleConfig, *, say: Say) -> Journal:
    """An unfinished cycle, with the settings that it does not hold on to as they are given now.

    Raises:
        ConfigError: settings that it holds on to are given otherwise.
    """
    given = config.to_dict()
    if not has_learned(place.run(journal.number)):
        steps = tuple(StepRecord(name=step.name, seconds=step.seconds) for step in journal.steps)
        fresh = replace(journal, server=server, config=given, steps=steps)
        write_journal(place.cycles, fresh)
        return fresh
    differing = held_changes(place, journal, server, config)
    if differing:
        raise ConfigError(
            f"Cycle {journal.number} is unfinished, and goes on as it was begun ({'; '.join(differing)}). Give the "
            f"settings back to it ({SETTINGS}, flags), or give it up and begin a new one with --restart."
        )
    step = journal.next_step
    say(f"Going on with cycle {journal.number}" + (f" at {step.name}." if step else "."))
    kept = replace(journal, config={**journal.config, **given})
    write_journal(place.cycles, kept)
    return kept


def held_changes(place: Workspace, journal: Journal, server: str, config: CycleConfig) -> list[str]:
    """Where settings differ from those that an unfinished cycle holds on to: a phrase each.

    Args:
        place: the workspace.
        journal: of the unfinished cycle.
        server: address of the CVAT server.
        config: as given now.

    Raises:
        ConfigError: the cycle's own settings mean nothing any more.
    """
    if not has_learned(place.run(journal.number)):
        return []
    given = config.to_dict()
    # A journal of an earlier version may lack settings; then it went by what is their default now.
    begun = CycleConfig.from_dict(journal.config, source=f"cycle {journal.number}").to_dict()
    held = {
        name
        for name in given.keys() - _NOT_HELD
        if name not in _HELD_FROM or journal.step(_HELD_FROM[name]).is_over
    }  # fmt: skip
    differing = changes({name: begun[name] for name in held}, {name: given[name] for name in held})
    if journal.server != server:
        differing.insert(0, f"the server was {journal.server}, not {server}")
    return differing


def _stranded(journal: Journal) -> str:
    """What a cycle that is given up leaves behind, where that would be forgotten: its data counts as learned."""
    register = journal.step("register")
    if register.state != "done" or journal.step("deploy").is_over or not journal.step("gate").facts["accepted"]:
        return ""
    return (
        f" The gate accepted its model, {register.facts['title']}, and it was not deployed: "
        f"`sscloud models promote {register.facts['version']}` does that."
    )


class _SkipError(Exception):
    """A step that has nothing to do, and why."""

    def __init__(self, why: str, **facts: Any) -> None:
        super().__init__(why)
        self.facts = facts


class _NothingError(Exception):
    """The cycle has nothing to do."""

    def __init__(self, why: str, *, new: int = 0) -> None:
        super().__init__(why)
        self.new = new


class _Cycle:
    """One cycle while it runs."""

    def __init__(
        self,
        server: Server,
        place: Workspace,
        journal: Journal,
        *,
        deploy: Deploy,
        say: Say,
        tracking_uri: str | None,
        quiet: bool,
    ) -> None:
        self._server, self._place, self._journal = server, place, journal
        self._deploy, self._say, self._tracking_uri, self._quiet = deploy, say, tracking_uri, quiet
        self._config = CycleConfig.from_dict(journal.config, source=f"cycle {journal.number}")
        self._folder = cycle_folder(place.cycles, journal.number)
        self._run_folder = place.run(journal.number)
        self._registry = open_registry(place, self._config, tracking_uri)

    def run(self) -> CycleResult:
        """All steps that are not over."""
        steps: Mapping[StepName, Callable[[], dict[str, Any]]] = {
            "fetch": self._fetch,
            "effort": self._effort,
            "check": self._check,
            "train": self._train,
            "gate": self._gate,
            "register": self._register,
            "deploy": self._deploy_challenger,
            "select": self._select,
            "prelabel": self._prelabel,
            "report": self._report,
        }
        try:
            for name in STEPS:
                if not self._journal.step(name).is_over:
                    self._do(name, steps[name])
        except _NothingError as nothing:
            drop_cycle(self._place.cycles, self._journal.number)
            return CycleResult(outcome="nothing", summary=str(nothing), new=nothing.new)
        result = self._result()
        outcome: Outcome = "accepted" if result.outcome == "accepted" else "refused"
        self._save(replace(self._journal, ended=now(), outcome=outcome))
        return result

    def _do(self, name: StepName, work: Callable[[], dict[str, Any]]) -> None:
        before = self._journal.step(name)
        running = replace(before, state="running", started=now(), ended=None, facts={}, error=None)
        self._save(self._journal.put(running))
        began = time.monotonic()

        def over(**values: Any) -> None:
            spent = before.seconds + time.monotonic() - began
            self._save(self._journal.put(replace(running, ended=now(), seconds=round(spent, 2), **values)))

        def shown(text: str) -> None:
            self._say(f"{name:9} {seconds_text(time.monotonic() - began):>9}  {text}")

        try:
            facts = work()
        except _SkipError as why:
            over(state="skipped", error=str(why), facts=why.facts)
            shown(f"skipped: {why}")
        except _NothingError:
            raise
        except KeyboardInterrupt:
            over(state="pending")
            raise
        except Exception as error:  # whatever it is: a later step that fails must not hide what was done before
            what = self._what_failed(error)
            over(state="failed", error=what)
            raise CycleError(
                f"Cycle {self._journal.number} failed in its step {name}: {what}\nWhat served before goes on serving. "
                "Once that is put right, `sscloud cycle` goes on with this step."
            ) from error
        else:
            over(state="done", facts=facts)
            shown(str(facts["text"]))

    def _what_failed(self, error: Exception) -> str:
        """An error in words; where it is none of those that are raised on purpose, its origin is kept in a file."""
        if isinstance(error, SSCloudError | OSError):
            return without_login(str(error))
        path = self._folder / TRACEBACK
        text = without_login("".join(traceback.format_exception(error)))
        atomic_write(path, text.encode(errors="backslashreplace"))
        return f"{type(error).__name__}: {without_login(str(error))} (where it happened is in {path})"

    def _save(self, journal: Journal) -> None:
        write_journal(self._place.cycles, journal)
        self._journal = journal

    def _facts(self, name: StepName) -> Mapping[str, Any]:
        return self._journal.step(name).facts

    # What came in

    def _fetch(self) -> dict[str, Any]:
        config, dataset = self._config, self._place.dataset
        before = read_manifest(dataset)
        require_test_part(before, config, dataset)
        selection = selection_of(config)
        if before is None and not (found := survey(self._server, selection, quiet=self._quiet)).wanted:
            raise _NothingError(
                f"Nothing to do: project {config.project} has no frame that counts yet "
                f"({_left_out(found.jobs_left_out)}). Label some frames, and set their jobs to completed."
            )
        summary = fetch(
            self._server,
            dataset,
            selection=selection,
            rule=Rule(schema=self._place.schema(config), unknown=config.unknown, empty=config.empty),
            plan=config.split_plan(before.plan if before else None),
            quiet=self._quiet,
        )
        manifest = summary.manifest
        splits = Counter(str(item.split or "none yet") for item in manifest.items)
        for problem in summary.left_out:
            self._say(f"left out: {problem}")
        return {
            "snapshot": manifest.snapshot,
            "panoramas": len(manifest.items),
            "splits": dict(sorted(splits.items())),
            "written": summary.written,
            "removed": len(summary.removed),
            "left_out": list(summary.left_out),
            "too_few": summary.splits.too_few,
            "text": f"{plural(summary.written, 'panorama')} new or changed, {len(manifest.items)} in all"
            + (f", {len(summary.removed)} left" if summary.removed else "")
            + (f"; {len(summary.left_out)} cannot be used" if summary.left_out else ""),
        }

    def _effort(self) -> dict[str, Any]:
        place = self._place
        try:
            measure_effort(
                self._server,
                place.prelabels,
                place.dataset,
                bundle_of=self._bundle_of,
                device=self._config.device,
                quiet=self._quiet,
            )
            seen = last_frames(place.cycles) or frozenset()
            new = {item.mask_sha256 for item in self._manifest().items if pair_of(item) not in seen}
            found = effort_since(read_effort(place.dataset), new)
        except UnreachableError:
            raise
        except SSCloudError as error:  # no reason to learn nothing
            raise _SkipError(f"it could not be measured: {error}") from error
        if found is None:
            raise _SkipError("nothing that came in was pre-labelled")
        return {
            **found,
            "text": f"people changed {percent(found['changed'])} of what is drawn in "
            f"{plural(found['frames'], 'pre-labelled frame')}, and touched {found['touched']:.1f} shapes a frame",
        }

    def _bundle_of(self, title: str) -> ModelBundle | None:
        version = self._registry.find(title)
        return None if version is None else self._registry.bundle(version.version)

    def _check(self) -> dict[str, Any]:
        manifest = self._manifest()
        fresh = new_items(manifest, self._place.cycles)
        new, least = to_learn_from(fresh), self._config.min_new
        if len(new) < least:
            others = f" ({plural(len(fresh) - len(new), 'other')} to validate or test)" if len(fresh) > len(new) else ""
            are = "is" if len(new) == 1 else "are"
            raise _NothingError(
                f"Nothing to do: {plural(len(new), 'panorama')} to learn from {are} new or corrected since the last "
                f"training{others}, and 'min_new' asks for {least}.",
                new=len(new),
            )
        # What would fail after hours of training is better said now.
        if self._config.select.count and self._config.select.assignee is not None:
            self._server.find_user(self._config.select.assignee)
        if (too_few := self._facts("fetch").get("too_few")) is not None:
            raise DatasetError(
                f"{too_few}. The gate needs test panoramas: complete jobs of more groups, or choose smaller groups "
                "('group_by': image, or a regular expression that finds the site in the file name)."
            )
        if not any(item.split == "test" for item in manifest.items):
            raise DatasetError(f"There are no test panoramas. {no_test_part(self._place.dataset)}")
        test = test_part(self._place.dataset, labels=self._place.schema_file(self._config))
        if self._registry.champion() is None:
            groups = len(set(groups_of(test, None).values()))
            if (little := says_little(len(test.items), groups, self._config.gate)) is not None:
                self._say(f"warning: {little}")
        elif (why := too_few_groups(test, self._config.gate)) is not None:
            raise DatasetError(why)
        # What is new for the next cycle is counted from here.
        pairs = sorted([item.image_sha256, item.mask_sha256, str(item.split)] for item in manifest.items)
        atomic_write(self._folder / FRAMES, json.dumps(pairs).encode())
        return {
            "new": len(new),
            "names": [item.name for item in new],
            "test": len(test.items),
            "text": f"{plural(len(new), 'panorama')} new or corrected to learn from, {len(test.items)} to measure on",
        }

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self._place.dataset)
        if manifest is None:
            raise DatasetError(f"{self._place.dataset} has no manifest any more. Begin anew with --restart.")
        return manifest

    # The model

    def _train(self) -> dict[str, Any]:
        run, fetched = self._run_folder, self._facts("fetch")["snapshot"]
        resume = (run / CONFIG).is_file()
        if (snapshot := self._manifest().snapshot) != fetched:
            raise DatasetError(
                f"{self._place.dataset} has changed since this cycle fetched it (snapshot {fetched}, now {snapshot}): "
                "was `sscloud fetch` run by hand? Training does not go on with other data than it began with. Begin a "
                "new cycle with --restart."
            )
        champion = self._registry.champion()
        if resume and has_learned(run):
            begun = read_run(run).config
            config = replace(begun, dataset=str(self._place.dataset), max_hours=self._config.max_hours)
            why = "resumed"
        else:
            config, why = self._plan_training(champion)
            if run.exists():  # it ended before its first checkpoint, perhaps with other settings
                shutil.rmtree(run)
            resume = False
        from training.train import train  # brings Lightning and MLflow

        place = Place(
            run=run,
            resume=resume,
            device=self._config.device,
            tracking_uri=self._tracking_uri,
            name=self._config.name,
            version=1 + max((version.version for version in self._registry.versions()), default=0),
        )
        bundle = train(config, place)
        if bundle is None:
            raise ConfigError("A cycle trains in one process: start it without torchrun.")
        with (run / METRICS).open(newline="") as stream:
            epochs = len(list(csv.DictReader(stream)))
        metrics = bundle.manifest.metrics
        miou = metrics.get("validation_miou")
        origin = f"from {bundle.manifest.parent}" if bundle.manifest.parent else "from scratch"
        return {
            "run": run.name,
            "from": bundle.manifest.parent,
            "why": why,
            "epochs": epochs,
            "best_epoch": round(metrics["epoch"]),
            "validation_miou": _finite(miou),
            "weights_sha256": bundle.manifest.weights_sha256,
            "text": f"{origin}, {plural(epochs, 'epoch')}"
            + ("" if epochs == config.epochs else f" of {config.epochs}")
            + ("" if miou is None else f", mIoU {miou:.3f} on the validation part"),
        }

    def _plan_training(self, champion: ModelVersion | None) -> tuple[TrainConfig, str]:
        """The configuration of the training, and why it starts where it starts."""
        config = self._config
        bundle = None if champion is None else self._registry.bundle(champion.version)
        parent, why = origin_of(config, bundle)
        values: dict[str, Any] = dict(config.train)
        if parent is not None:
            values = {**inherited(parent.path), **values, **config.finetune}
        return (
            config.training(
                {**values, **self._labels()},
                dataset=str(self._place.dataset),
                load=None if parent is None else str(parent.path),
            ),
            why,
        )

    def _labels(self) -> dict[str, Any]:
        file = self._config.labels
        return {} if file is None else {"labels": str(self._place.root / file)}

    def _gate(self) -> dict[str, Any]:
        if (snapshot := self._manifest().snapshot) != (fetched := self._facts("fetch")["snapshot"]):
            self._say(
                f"{self._place.dataset} has changed since this cycle fetched it (snapshot {fetched}, now {snapshot}). "
                "The model knows nothing of that; what is measured on are the test panoramas that are there now."
            )
        champion = self._registry.champion()
        pictures: dict[str, bytes] = {}
        decision = _renamed(
            decide(
                None if champion is None else self._registry.bundle(champion.version),
                ModelBundle.load(self._run_folder / BUNDLE),
                test_part(self._place.dataset, labels=self._place.schema_file(self._config)),
                rules=self._config.gate,
                device=self._config.device,
                picture=pictures.__setitem__,
                earlier=self._registry.former_champions(),
            ),
            f"The model of cycle {self._journal.number}",
        )
        write_gate_page(self._folder / GATE_PAGE, decision, pictures)
        text = json.dumps(decision.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        atomic_write(self._folder / DECISION, text.encode() + b"\n")
        return {
            "accepted": decision.accepted,
            "headline": decision.headline,
            "reasons": list(decision.reasons),
            "champion": decision.champion,
            "challenger": decision.challenger,
            "panoramas": decision.panoramas,
            "test_snapshot": decision.test_snapshot,
            "metrics": _finite_only(decision.metrics),
            "champion_metrics": _finite_only(decision.champion_metrics),
            "text": decision.headline,
        }

    def _register(self) -> dict[str, Any]:
        gate = self._facts("gate")
        version = self._registry.register(
            self._run_folder,
            metrics=gate["metrics"],
            test_snapshot=gate["test_snapshot"],
            decision="accepted" if gate["accepted"] else "refused",
            reasons=gate["reasons"],
            against=gate["champion"],
        )
        self._registry.set_challenger(version.version)
        return {"version": version.version, "title": version.title, "text": f"{version.title} is in the registry"}

    def _deploy_challenger(self) -> dict[str, Any]:
        champion = self._registry.champion()
        serving = None if champion is None else champion.title
        if not self._facts("gate")["accepted"]:
            raise _SkipError("the gate refused the challenger", champion=serving)
        version, against = self._registry.get(int(self._facts("register")["version"])), self._facts("gate")["champion"]
        if problem := objection(version, champion):
            raise _SkipError(
                f"{version.title} was not deployed: {problem}. `sscloud models promote {version.version} --dataset "
                f"{self._place.dataset}` asks the gate again",
                champion=serving,
            )
        self._deploy(self._registry, version.version, expected=None if champion is None else champion.version)
        return {
            "champion": version.title,
            "text": f"{version.title} is the champion now" + (f", in place of {against}" if against else ""),
        }

    # What comes next

    def _champion(self) -> ModelVersion:
        champion = self._registry.champion()
        if champion is None:
            raise _SkipError("there is no champion yet")
        return champion

    def _select(self) -> dict[str, Any]:
        if self._config.select.count == 0:
            raise _SkipError("no frame was asked for ('select.count' is 0)")
        # What was chosen is written down before anybody gets it: looked at again, the pool would be another one.
        chosen = read_selection(self._folder, self._server) or self._choose(self._champion())
        chosen = replace(chosen, way=self._config.select.way, assignee=self._config.select.assignee)
        if chosen.handout is None:
            handout = hand_out(
                self._server,
                chosen.choices,
                project=chosen.project,
                assignee=chosen.assignee,
                way=chosen.way,
                name=chosen.name,
            )
            chosen = replace(chosen, handout=handout)
            chosen.save(self._folder)
            for note in handout.notes:
                self._say(note)
        jobs = chosen.handout.jobs if chosen.handout is not None else ()
        return {
            "jobs": list(jobs),
            "frames": [choice.frame.title for choice in chosen.choices],
            "text": f"{plural(len(chosen.choices), 'frame')} to people, in {plural(len(jobs), 'job')}",
        }

    def _choose(self, champion: ModelVersion) -> Chosen:
        """Look at the pool, and write down what is best labelled next."""
        config, started = self._config, datetime.fromisoformat(self._journal.started)
        jury = jury_of(self._registry, champion, say=self._say)
        with PrelabelStore(self._place.prelabels, server=self._server.url) as store:
            try:
                chosen = choose(
                    self._server,
                    store,
                    jury,
                    folder=self._folder,
                    name=f"Cycle {self._journal.number} of {started:%Y-%m-%d %H:%M:%S}",
                    project=config.project,
                    count=config.select.count,
                    way=config.select.way,
                    assignee=config.select.assignee,
                    dataset=self._place.dataset,
                    device=config.device,
                    quiet=self._quiet,
                )
            except NothingToChooseError as why:
                raise _SkipError(str(why)) from why
        for problem in chosen.failed:
            self._say(f"not looked at: {problem}")
        return chosen

    def _prelabel(self) -> dict[str, Any]:
        config, champion = self._config, self._champion()
        report = Report(model=champion.title)
        with PrelabelStore(self._place.prelabels, server=self._server.url) as store:
            # Older pre-labels that nobody has touched, too: the champion's are better. But a job that somebody has
            # opened before this cycle stays as that person knows it.
            new = set(self._facts("select").get("jobs", ()))
            jobs = [
                job.id
                for task in self._server.tasks(config.project)
                for job in self._server.jobs(task.id)
                if job.id in new or (job.state == "new" and store.path(job.id).exists())
            ]
            if not jobs:
                raise _SkipError("nothing was handed out, and no older pre-labels wait for people")
            self._draw(store, report, PrelabelSelection(jobs=tuple(jobs)), champion)
        for problem in report.failed:
            self._say(f"not pre-labelled: {problem}")
        if report.failed and not (report.drawn or report.already):
            raise ServerError(f"no frame could be pre-labelled; the first one: {report.failed[0]}")
        return {
            "drawn": report.drawn,
            "shapes": report.shapes,
            "already": report.already,
            "people": report.people,
            "failed": list(report.failed),
            "text": f"{plural(report.drawn, 'frame')} pre-labelled by {report.model}, {plural(report.shapes, 'shape')}"
            + (f"; {len(report.failed)} could not be" if report.failed else ""),
        }

    def _draw(self, store: PrelabelStore, report: Report, selection: PrelabelSelection, champion: ModelVersion) -> None:
        settings = self._config.prelabel
        if settings.via == "local":
            prelabel(
                self._server,
                store,
                Detector(self._registry.bundle(champion.version), device=self._config.device),
                selection=selection,
                report=report,
                threshold=settings.threshold,
                replace_auto=True,
                quiet=self._quiet,
            )
        else:
            prelabel_by_server(
                self._server,
                store,
                selection=selection,
                schema=self._place.schema(self._config),
                report=report,
                function=settings.function,
                threshold=settings.threshold,
                replace_auto=True,
                quiet=self._quiet,
            )

    def _report(self) -> dict[str, Any]:
        write_cycle_page(
            self._folder / REPORT,
            self._journal,
            read_journals(self._place.cycles),
            run=self._run_folder,
        )
        return {"text": f"written to {self._folder / REPORT}"}

    def _result(self) -> CycleResult:
        gate, deploy = self._facts("gate"), self._journal.step("deploy")
        return CycleResult(
            outcome="accepted" if deploy.state == "done" else "refused",
            summary=verdict(self._journal),
            number=self._journal.number,
            new=int(self._facts("check")["new"]),
            champion=deploy.facts.get("champion"),
            challenger=self._facts("register")["title"],
            reasons=tuple(gate["reasons"]),
            metrics=serving_metrics(self._journal),
            jobs=tuple(self._facts("select").get("jobs", ())),
            report=self._folder / REPORT,
            seconds={step.name: step.seconds for step in self._journal.steps},
        )


def origin_of(config: CycleConfig, champion: ModelBundle | None) -> tuple[ModelBundle | None, str]:
    """What training starts from, and why.

    Raises:
        ConfigError: it shall start from a champion, and there is none.
    """
    if champion is None:
        if config.start == "champion":
            raise ConfigError("'start' is champion, but there is none yet. Leave it out.")
        return None, "there is no champion"
    if config.start == "scratch":
        return None, "'start' is scratch"
    title, has = champion.manifest.title, inherited(champion.path)
    asked = {name: value for name, value in config.train.items() if name in has and value != has[name]}
    others = [f"{name} {value!r}, not {has[name]!r}" for name, value in asked.items()]
    if others and config.start == "auto":
        return None, f"'train' asks for another network than {title} is ({', '.join(others)})"
    return champion, f"{title} is the champion"


def _renamed(decision: Decision, name: str) -> Decision:
    """The same decision, with a name of the challenger that stays true: it has no number before it is registered."""
    of_challenger = f"Challenger: {decision.challenger}"
    facts = {f"Challenger: {name}" if title == of_challenger else title: of for title, of in decision.facts.items()}
    return replace(decision, challenger=name, facts=facts)


def _left_out(jobs: Mapping[str, int]) -> str:
    return ", ".join(f"{plural(count, 'job')} of {why}" for why, count in sorted(jobs.items())) or "it has no jobs"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """As JSON can say them: a class that does not occur has no score."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
