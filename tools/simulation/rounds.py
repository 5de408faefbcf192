"""The rounds of a simulation: people label, the cycle learns and hands out, people correct, and so on."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import yaml

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from sscloud.image import decode_image
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from tools.cycle import deployer, settings_of
from tools.simulation.page import write_simulation_page
from tools.simulation.people import EXACT, People, Project, Work, browsing, delete_project, set_up, standing_in
from tools.simulation.results import (
    BY_HAND,
    HEADER,
    Look,
    Round,
    Simulation,
    SimulationConfig,
    effort_of,
    effort_row,
    line_of,
)
from tools.simulation.scenes import GROUP_BY, Scenes
from training.cvat import Account, Server
from training.cycle import CycleResult, run_cycle
from training.cycle_config import SETTINGS, CycleConfig
from training.detector import Detector, region_points
from training.effort import read_effort
from training.oracle import Correction, correct
from training.page import seconds_text
from training.workspace import Workspace, open_registry

PAGE: Final = "simulation.html"
MARKER: Final = ".sscloud-simulation"
"""In a folder that a simulation made, and may therefore clear."""
SCENES: Final = "scenes"

Say = Callable[[str], None]


def simulate(config: SimulationConfig, *, account: Account | None, say: Say, note: Say) -> Simulation:
    """Go round the loop with an oracle in place of people.

    Args:
        config: how long and how large.
        account: a live server, which gets a project of its own; None: a stand-in in this process.
        say: told the lines of the table, and where the report is.
        note: told what goes on meanwhile.

    Raises:
        ConfigError: the folder is not empty and holds something else, or an older simulation.
        SSCloudError: a step of the loop failed.
    """
    started = time.monotonic()
    scenes = Scenes(config.workspace / SCENES, config.scenes)
    _claim(config, scenes)
    note(f"Sampling {sum(site.scans for site in config.scenes.sites())} scenes …")
    scenes.sample()
    schema = LabelSchema.default()
    with contextlib.ExitStack() as stack:
        if account is None:
            account = stack.enter_context(standing_in())
        server = stack.enter_context(Server.connect(account))
        client = stack.enter_context(browsing(account))
        note(f"Project on {server.url}: a task a site, a job a panorama …")
        project = set_up(server, client, scenes, schema)
        if not config.keep:
            stack.callback(delete_project, client, project.id)
        people = People(server, client, scenes, schema, project.id)
        people.work(project.test_jobs, person=EXACT)
        loop = _Loop(config, server, people, scenes, schema, project, say=say, note=note)
        rounds = loop.run()
    simulation = Simulation(
        config=config,
        server=server.url,
        rounds=tuple(rounds),
        look=loop.look(),
        schema=schema,
        seconds=time.monotonic() - started,
        page=config.workspace / PAGE,
    )
    write_simulation_page(simulation.page, simulation)
    say(f"{seconds_text(simulation.seconds)}. The report: {simulation.page}")
    return simulation


def _claim(config: SimulationConfig, scenes: Scenes) -> None:
    """Make the workspace, or clear what an earlier simulation left; its scenes stay if they are the same.

    Raises:
        ConfigError: it holds something that no simulation made, or a simulation that is not to be overwritten.
    """
    folder = config.workspace
    entries = [entry for entry in folder.iterdir() if entry.name != MARKER] if folder.is_dir() else []
    if entries and not (folder / MARKER).is_file():
        raise ConfigError(f"{folder} holds files that no simulation made. Name another folder with --workspace.")
    if entries and not config.overwrite:
        raise ConfigError(
            f"{folder} holds a simulation already. One that was stopped does not go on, and a project that it left on "
            "a live server is yours to delete. Add --overwrite to begin anew with the same scenes, or name another "
            "folder with --workspace."
        )
    for entry in entries:
        if entry == scenes.folder and scenes.is_whole():
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


class _Loop:
    """The rounds while they go on."""

    def __init__(
        self,
        config: SimulationConfig,
        server: Server,
        people: People,
        scenes: Scenes,
        schema: LabelSchema,
        project: Project,
        *,
        say: Say,
        note: Say,
    ) -> None:
        self._config, self._server, self._people, self._scenes = config, server, people, scenes
        self._schema, self._project, self._say, self._note = schema, project, say, note
        self._cycle = _cycle_config(config, project.id)
        self._labelled = 0
        self._bundles: dict[str, ModelBundle] = {}
        self._tests = tuple(name for site in scenes.plan.sites() if site.role == "test" for name in site.images)

    def run(self) -> list[Round]:
        """Round 0 by hand, then those with a model."""
        started = time.monotonic()
        seed = self._people.work(self._project.seed_jobs)
        rounds = [
            Round(
                number=0,
                model=BY_HAND,
                labelled=0,
                effort=effort_of([work.correction for work in seed], model=BY_HAND, schema=self._schema),
                seconds=_mean([work.correction.seconds for work in seed]),
                agreement=self._agreement(seed),
                took=time.monotonic() - started,
            )
        ]
        self._labelled = len(seed)
        self._say(HEADER)
        self._say(line_of(rounds[0]))
        for number in range(1, self._config.rounds + 1):
            rounds.append(self._round(number))
            self._say(line_of(rounds[-1]))
        return rounds

    def _round(self, number: int) -> Round:
        started = time.monotonic()
        result = self._go_round(self._cycle)
        if result.outcome == "nothing" or result.champion is None:
            raise ConfigError(
                f"Round {number} came to nothing: {result.summary} {' '.join(result.reasons)} Train longer (--epochs), "
                "or sample larger scenes (--width)."
            )
        bundle = self._bundle(result.champion)
        done = self._people.work(result.jobs)
        # The same loop measures what they changed; it has too little to learn from, and stops there.
        self._go_round(replace(self._cycle, min_new=1 << 30))
        jobs = frozenset(result.jobs)
        records = [record for record in read_effort(Workspace(self._config.workspace).dataset) if record.job in jobs]
        tried = self._try_on_tests(bundle)
        learned = self._labelled
        self._labelled += len(done)
        return Round(
            number=number,
            model=result.champion,
            labelled=learned,
            accepted=result.outcome == "accepted",
            reasons=result.reasons,
            challenger=result.challenger,
            metrics=result.metrics,
            effort=effort_row(records),
            same=effort_of(tried, model=result.champion, schema=self._schema),
            seconds=_mean([work.correction.seconds for work in done]),
            same_seconds=_mean([correction.seconds for correction in tried]),
            agreement=self._agreement(done),
            took=time.monotonic() - started,
        )

    def _go_round(self, config: CycleConfig) -> CycleResult:
        return run_cycle(
            self._server,
            self._config.workspace,
            config,
            deploy=deployer(self._config.workspace, config, self._note),
            say=self._note,
            quiet=True,
        )

    def _bundle(self, title: str) -> ModelBundle:
        """A version of the registry; kept for the pictures."""
        if title not in self._bundles:
            registry = open_registry(Workspace(self._config.workspace.resolve()), self._cycle, None)
            version = registry.find(title)
            if version is None:
                raise ConfigError(f"The registry has no {title}.")
            self._bundles[title] = registry.bundle(version.version)
        return self._bundles[title]

    # What it comes to

    def _agreement(self, done: Sequence[Work]) -> float:
        return _mean([float(np.mean(work.correction.label_map == self._scenes.truth(work.name))) for work in done])

    def _try_on_tests(self, bundle: ModelBundle) -> list[Correction]:
        """What the oracle would change in a model's pre-labels of the test panoramas."""
        detector = Detector(bundle, device=self._cycle.device)
        background = self._schema.background
        found = []
        for name in self._tests:
            regions = detector.regions(decode_image(self._scenes.image(name)), threshold=self._cycle.prelabel.threshold)
            shapes = [
                {
                    "id": number,
                    "type": "mask",
                    "label_id": region.label_id,
                    "points": region_points(region, kind="mask"),
                    "attributes": [],
                }
                for number, region in enumerate(regions)
            ]
            correction = correct(
                shapes,
                self._scenes.truth(name),
                frame=0,
                label_ids={label.id: label.id for label in self._schema.labels},
                background=background.id if background is not None else 0,
            )
            found.append(correction)
        return found

    def look(self) -> Look:
        """The first test panorama through the eyes of every model."""
        name = self._tests[0]
        image = decode_image(self._scenes.image(name))
        return Look(
            name=name,
            image=image,
            truth=self._scenes.truth(name),
            predictions=tuple(
                (title, Predictor(bundle, device=self._cycle.device).predict(image).label_map)
                for title, bundle in self._bundles.items()
            ),
        )


def _cycle_config(config: SimulationConfig, project: int) -> CycleConfig:
    """The settings of every round, written as the workspace's own: a live project can be gone on with by hand."""
    train = {
        "scale": config.scale,
        "base_width": config.base_width,
        "epochs": config.epochs,
        "batch_size": 2,
        "seed": config.scenes.seed,
    }
    settings = {
        "project": project,
        "name": "simulation",
        "min_new": 0,  # what a round brings may be for validation, all of it
        "train": train,
        "finetune": {"epochs": config.finetune_epochs, "replay": 1.0},
        "ground_truth": "test",
        "group_by": GROUP_BY,
        "validation": 20.0,
        "test": 0.0,
        "select": {"count": config.count},
    }
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    atomic_write(config.workspace / SETTINGS, text.encode())
    return settings_of(config.workspace, config.flags, config.settings)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
