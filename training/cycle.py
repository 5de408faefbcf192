"""The loop as one thing: from finished corrections to a better model in CVAT, and to what people label next.

    fetch → effort → check → train → gate → register → deploy → select → prelabel → report

Every step leaves something whole behind and is written down (`training.journal`), so a cycle that is killed anywhere,
or fails, goes on at its next start with the step that is not over, and ends as if nothing had happened. Until training
has a first checkpoint there is nothing to lose, and the next start begins with `fetch` once more. A new model becomes
the champion only in `deploy`, and only through the gate: whatever fails before that, the old one goes on serving.

WORKSPACE/
  dataset/ runs/ served/ prelabels/     what the single commands know
  cycles/0001/                          journal.json, frames.json, gate.html, select.html, report.html
"""

import csv
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, CycleError, DatasetError, ServerError, SSCloudError, UnreachableError
from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from training.acquisition import rank
from training.config import CONFIG, Place, TrainConfig, inherited, read_run
from training.cvat import Server
from training.cycle_config import SETTINGS, CycleConfig, changes
from training.cycle_report import write_cycle_page
from training.detector import Detector
from training.effort import measure_effort
from training.effort_records import FrameEffort, read_effort
from training.effort_summary import percent, summarise_effort
from training.export import BUNDLE, LAST, METRICS
from training.fetch import fetch
from training.gate import PAGE as GATE_PAGE
from training.gate import decide, test_part, write_gate_page
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
from training.manifest import LABELS, Manifest, ManifestItem, read_manifest
from training.page import plural, seconds_text
from training.pool import labelled_images, server_pool
from training.prelabel import Report, prelabel
from training.prelabel import Selection as PrelabelSelection
from training.prelabel_server import prelabel_by_server
from training.prelabel_store import PrelabelStore
from training.registry import ModelVersion, Registry, default_uri
from training.rule import Rule
from training.selection import PAGE as SELECTION_PAGE
from training.selection import Selection as Chosen
from training.selection import read_selection
from training.selection_page import write_selection_page
from training.survey import Selection, survey

log = logging.getLogger(__name__)

FRAMES: Final = "frames.json"
"""In a cycle's folder: the panoramas that its training could see, to know later ones by."""
DECISION: Final = "gate.json"
REPORT: Final = "report.html"

_GATHERING: Final[tuple[StepName, ...]] = ("fetch", "effort", "check")
"""They are cheap and repeat no download: as long as nothing was learned, a cycle begins with them again."""

_HELD_FROM: Final[Mapping[str, StepName]] = {"gate": "gate", "select": "select", "prelabel": "prelabel"}
"""Settings that count from a later step on; all others count from the training."""

_JURORS: Final = 3
"""Models whose opinions say what is worth labelling."""

_NOT_HELD: Final = frozenset({"device", "min_new"})

Say = Callable[[str], None]
Deploy = Callable[[Registry, int], object]
"""Makes a version the champion that is served: the alias and what the function reads. Called again after a kill."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder that a loop works in."""

    root: Path

    @property
    def dataset(self) -> Path:
        """What `fetch` writes."""
        return self.root / "dataset"

    @property
    def runs(self) -> Path:
        """Run folders, and the store of runs and models."""
        return self.root / "runs"

    @property
    def served(self) -> Path:
        """The model volume: what the function reads."""
        return self.root / "served"

    @property
    def prelabels(self) -> Path:
        """The store of pre-labels."""
        return self.root / "prelabels"

    @property
    def cycles(self) -> Path:
        """A folder a cycle."""
        return self.root / "cycles"

    def run(self, number: int) -> Path:
        """The training run of a cycle."""
        return self.runs / f"cycle-{number:04d}"

    def schema_file(self, config: CycleConfig) -> Path | None:
        """The label schema that is asked for, else the dataset's own; None: the one that is shipped."""
        own = self.dataset / LABELS
        if config.labels is not None:
            return self.root / config.labels
        return own if own.is_file() else None

    def schema(self, config: CycleConfig) -> LabelSchema:
        """The label schema.

        Raises:
            SchemaError: it cannot be read.
        """
        file = self.schema_file(config)
        return LabelSchema.default() if file is None else LabelSchema.from_yaml(file)


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
        say(f"Cycle {last.number} is given up.")
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
    held = {
        name
        for name in given.keys() - _NOT_HELD
        if name not in _HELD_FROM or journal.step(_HELD_FROM[name]).is_over
    }  # fmt: skip
    differing = changes(
        {name: value for name, value in journal.config.items() if name in held},
        {name: value for name, value in given.items() if name in held},
    )
    if journal.server != server:
        differing.insert(0, f"the server was {journal.server}, not {server}")
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


def open_registry(place: Workspace, config: CycleConfig, tracking_uri: str | None) -> Registry:
    """The registry of a workspace; it asks its store for nothing before it is asked itself.

    Args:
        place: the workspace.
        config: names the model.
        tracking_uri: the MLflow store; None: a SQLite file in the workspace.
    """
    return Registry(tracking_uri or default_uri(place.root), name=config.name, cache=place.runs / "cache")


def has_learned(run: Path) -> bool:
    """Whether a training has come to its first checkpoint: before that nothing is lost by starting it anew."""
    return (run / CONFIG).is_file() and (run / LAST).is_file()


class _SkipError(Exception):
    """A step that has nothing to do, and why."""


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
            over(state="skipped", error=str(why))
            shown(f"skipped: {why}")
        except _NothingError:
            raise
        except KeyboardInterrupt:
            over(state="pending")
            raise
        except (SSCloudError, OSError) as error:
            over(state="failed", error=str(error))
            raise CycleError(
                f"Cycle {self._journal.number} failed in its step {name}: {error}\nWhat served before goes on serving. "
                "Once that is put right, `sscloud cycle` goes on with this step."
            ) from error
        except Exception as error:
            over(state="failed", error=f"{type(error).__name__}: {error}")
            raise
        else:
            over(state="done", facts=facts)
            shown(str(facts["text"]))

    def _save(self, journal: Journal) -> None:
        write_journal(self._place.cycles, journal)
        self._journal = journal

    def _facts(self, name: StepName) -> Mapping[str, Any]:
        return self._journal.step(name).facts

    # What came in

    def _fetch(self) -> dict[str, Any]:
        config, dataset = self._config, self._place.dataset
        before = read_manifest(dataset)
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
            new = {item.mask_sha256 for item in self._manifest().items if _pair(item) not in seen}
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
        new = new_items(manifest, self._place.cycles)
        least = self._config.min_new
        if len(new) < least:
            raise _NothingError(
                f"Nothing to do: {plural(len(new), 'panorama')} new or corrected since the last training, {least} are "
                f"needed ('min_new'), {least - len(new)} more.",
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
        test = test_part(self._place.dataset, labels=self._place.schema_file(self._config))
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
            config, why = replace(read_run(run).config, dataset=str(self._place.dataset)), "resumed"
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
        decision = decide(
            None if champion is None else self._registry.bundle(champion.version),
            ModelBundle.load(self._run_folder / BUNDLE),
            test_part(self._place.dataset, labels=self._place.schema_file(self._config)),
            rules=self._config.gate,
            device=self._config.device,
            picture=pictures.__setitem__,
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
        if not self._facts("gate")["accepted"]:
            raise _SkipError("the gate refused the challenger")
        version, champion = int(self._facts("register")["version"]), self._registry.champion()
        against = self._facts("gate")["champion"]
        if champion is not None and champion.version != version and champion.title != against:
            raise _SkipError(
                f"{champion.title} became the champion after the gate had compared with {against or 'none'}; `sscloud "
                f"models promote {version}` asks the gate again"
            )
        self._deploy(self._registry, version)
        title = self._registry.get(version).title
        return {
            "title": title,
            "text": f"{title} is the champion now" + (f", in place of {against}" if against is not None else ""),
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
        config = self._config
        shares, labelled = labelled_images(self._manifest())
        left_out: Counter[str] = Counter()
        with PrelabelStore(self._place.prelabels, server=self._server.url) as store:
            pool = server_pool(
                self._server, store, project=config.project, labelled=labelled, left_out=left_out, quiet=self._quiet
            )
        told = [f"{plural(count, 'frame')} {reason}" for reason, count in sorted(left_out.items()) if count]
        if not pool:
            raise _SkipError(f"no frame of the project can be chosen: {', '.join(told) or 'there are none'}")
        jury, pictures = jury_of(self._registry, champion), dict[str, bytes]()
        choices = rank(
            pool,
            jury,
            count=config.select.count,
            shares=shares,
            device=config.device,
            picture=pictures.__setitem__,
            skipped=told,
            quiet=self._quiet,
        )
        if not choices:
            raise _SkipError(f"no frame of the pool can be chosen: {', '.join(told)}")
        started = datetime.fromisoformat(self._journal.started)
        chosen = Chosen(
            name=f"Cycle {self._journal.number} of {started:%Y-%m-%d %H:%M:%S}",
            server=self._server.url,
            project=config.project,
            way=config.select.way,
            assignee=config.select.assignee,
            models=tuple(bundle.manifest.title for bundle in jury),
            choices=tuple(choices),
            left_out=tuple(told),
        )
        facts = {"looked at": plural(len(pool), "panorama"), "models": ", ".join(chosen.models)}
        write_selection_page(self._folder / SELECTION_PAGE, choices, pictures, facts=facts, left_out=told)
        chosen.save(self._folder)
        return chosen

    def _prelabel(self) -> dict[str, Any]:
        config, champion = self._config, self._champion()
        report = Report(model=champion.title)
        with PrelabelStore(self._place.prelabels, server=self._server.url) as store:
            # Untouched older pre-labels, too: the champion's are better.
            new = set(self._facts("select").get("jobs", ()))
            jobs = [
                job.id
                for task in self._server.tasks(config.project)
                for job in self._server.jobs(task.id)
                if job.id in new or store.path(job.id).exists()
            ]
            if not jobs:
                raise _SkipError("nothing was handed out, and nothing was pre-labelled before")
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
        gate, deployed = self._facts("gate"), self._journal.step("deploy").state == "done"
        title = self._facts("register")["title"]
        serving = title if deployed else gate["champion"]
        if deployed:
            summary = f"{self._facts('deploy')['text']}."
        else:
            summary = str(self._journal.step("deploy").error) if gate["accepted"] else gate["headline"]
        return CycleResult(
            outcome="accepted" if deployed else "refused",
            summary=summary,
            number=self._journal.number,
            new=int(self._facts("check")["new"]),
            champion=serving,
            challenger=title,
            reasons=tuple(gate["reasons"]),
            metrics=gate["metrics"] if deployed else gate["champion_metrics"],
            jobs=tuple(self._facts("select").get("jobs", ())),
            report=self._folder / REPORT,
            seconds={step.name: step.seconds for step in self._journal.steps},
        )


def selection_of(config: CycleConfig) -> Selection:
    """Which frames count: those of completed jobs of the project."""
    return Selection(
        projects=(config.project,),
        stages=frozenset(config.stages) if config.stages else None,
        ground_truth=config.ground_truth,
    )


def new_items(manifest: Manifest, cycles: Path) -> list[ManifestItem]:
    """Panoramas to learn from that the last training did not see, or saw with another mask; all before the first one.

    Args:
        manifest: of the dataset.
        cycles: the workspace's cycles. One counts from its model's entry into the registry on, whatever the gate said.
    """
    seen = last_frames(cycles)
    return [item for item in manifest.items if item.split != "test" and (seen is None or _pair(item) not in seen)]


def _pair(item: ManifestItem) -> tuple[str, str]:
    return item.image_sha256, item.mask_sha256


def last_frames(cycles: Path, *, before: int | None = None) -> frozenset[tuple[str, str]] | None:
    """sha256 of image and mask of the panoramas of the newest cycle that made a model; None where there is none.

    Args:
        cycles: the workspace's cycles.
        before: look at older cycles than this one only.

    Raises:
        ConfigError: what the cycle has written cannot be read.
    """
    for journal in reversed(read_journals(cycles)):
        if journal.step("register").state == "done" and (before is None or journal.number < before):
            path = cycle_folder(cycles, journal.number) / FRAMES
            try:
                return frozenset((str(image), str(mask)) for image, mask, _ in json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error}). Bring it back, or move {path.parent} away."
                ) from error
    return None


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


def jury_of(registry: Registry, champion: ModelVersion) -> list[ModelBundle]:
    """Who is asked what is worth labelling: the champion, and the two newest others that knew its labels.

    Args:
        registry: of the model.
        champion: its present champion.
    """
    jury = [registry.bundle(champion.version)]
    labels = jury[0].manifest.labels.class_ids
    for version in reversed(registry.versions()):
        if version.version != champion.version and version.decision != "refused" and len(jury) < _JURORS:
            bundle = registry.bundle(version.version)
            if bundle.manifest.labels.class_ids == labels:
                jury.append(bundle)
    return jury


def effort_since(records: Iterable[FrameEffort], masks: Collection[str]) -> dict[str, Any] | None:
    """What people did to the pre-labels of some panoramas; None where none of them had one that is known.

    Args:
        records: of the dataset.
        masks: sha256 of the masks of these panoramas.
    """
    rows = summarise_effort(record for record in records if record.mask_sha256 in masks).models
    drawn, frames = sum(row.pixels.drawn for row in rows), sum(row.frames for row in rows)
    if not frames:
        return None
    touched = sum(row.touched * row.frames for row in rows) / frames
    changed = 1 - sum(row.pixels.accepted for row in rows) / drawn if drawn else 0.0
    return {"frames": frames, "changed": changed, "touched": touched}


def _left_out(jobs: Mapping[str, int]) -> str:
    return ", ".join(f"{plural(count, 'job')} of {why}" for why, count in sorted(jobs.items())) or "it has no jobs"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """As JSON can say them: a class that does not occur has no score."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
