"""What the next cycle would do; asks the server and the registry, and writes nothing."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.cvat import Server
from training.cycle import held_changes, origin_of
from training.cycle_config import SETTINGS, CycleConfig
from training.cycle_data import new_items, require_test_part, selection_of, to_learn_from
from training.gate import says_little
from training.journal import present_holder, read_journals
from training.manifest import Manifest, read_manifest
from training.page import plural
from training.pool import server_pool
from training.prelabel_store import PrelabelStore
from training.registry import Registry, default_uri, registered_names
from training.survey import Survey, survey
from training.workspace import Workspace, has_learned


@dataclass(frozen=True, slots=True, kw_only=True)
class CyclePlan:
    """What `sscloud cycle` would do now."""

    running: str | None
    """Which process works in the workspace, in words: it would refuse another one."""
    unfinished: int | None
    """Number of the cycle that it would go on with."""
    differing: tuple[str, ...]
    """Settings that this cycle holds on to and that are given otherwise, a phrase each: it would not go on."""
    step: str
    """Where it would begin."""
    finished: int
    """Frames that count on the server."""
    changed: int
    """Of them, those that would be looked at: their jobs have changed since they were fetched."""
    new: int
    """Panoramas of the dataset to learn from, new or corrected since the last training."""
    least: int
    champion: str | None
    origin: str
    """What training would start from, and why."""
    epochs: int
    max_hours: float | None
    pool: int
    """Frames that nobody has worked on."""
    count: int
    """Of them, how many would be handed out."""
    warning: str | None
    """Why what a first model scores would say little, in sentences."""

    @property
    def is_enough(self) -> bool:
        """Whether there would be enough to train, as far as that can be told without downloading."""
        return self.unfinished is not None or self.new + self.changed >= self.least

    def lines(self) -> list[str]:
        """In words."""
        budget = f", at most {self.max_hours:g} h" if self.max_hours is not None else ""
        if self.unfinished is not None:
            begin = f"cycle {self.unfinished} is unfinished and would go on at {self.step}"
            if self.differing:
                begin = (
                    f"cycle {self.unfinished} is unfinished and would not go on: {'; '.join(self.differing)}. Give the "
                    f"settings back to it ({SETTINGS}, flags), or give it up with --restart"
                )
        elif self.is_enough:
            begin = "a new cycle would run"
            if self.new < self.least:  # what comes in may be for validation or test
                begin += f", if at least {self.least} of these are to learn from ('min_new')"
        else:
            most = self.new + self.changed
            begin = f"nothing to do: at most {most} new or corrected, and 'min_new' asks for {self.least}"
        if self.running is not None:
            begin = (
                f"nothing while another `sscloud cycle` works here ({self.running}); after it, as things are: {begin}"
            )
        told = [
            f"on the server  {plural(self.finished, 'frame')} of completed jobs; {self.changed} of them would come in: "
            "new, or in jobs that changed since the last fetch",
            f"dataset        {plural(self.new, 'panorama')} here already that the last training did not learn from",
            f"champion       {self.champion or 'none'}",
            f"so             {begin}",
        ]
        if self.is_enough:
            told += [
                f"training       {self.origin}; {plural(self.epochs, 'epoch')}{budget}",
                f"then           gate, and if it passes deploy; {self.count} of {plural(self.pool, 'free frame')} to "
                "people, pre-labelled",
            ]
            if self.warning is not None:
                told.append(f"warning        {self.warning}")
        return told

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"enough": self.is_enough, **{name: getattr(self, name) for name in self.__slots__}}


def plan_cycle(
    server: Server, workspace: Path, config: CycleConfig, *, tracking_uri: str | None = None, quiet: bool = False
) -> CyclePlan:
    """Find out what `run_cycle` would do with the same arguments.

    Raises:
        ServerError: no answer, or no such project.
        ConfigError: a journal that cannot be read, or whose settings mean nothing any more.
        RegistryError: the store does not answer.
    """
    place = Workspace(workspace.resolve())
    journals = read_journals(place.cycles)
    last = journals[-1] if journals and journals[-1].is_open else None
    manifest = read_manifest(place.dataset)
    step = None if last is None or not has_learned(place.run(last.number)) else last.next_step
    if step is None:
        require_test_part(manifest, config, place.dataset)
    found = survey(server, selection_of(config), quiet=quiet)
    uri = tracking_uri or default_uri(place.root)
    with tempfile.TemporaryDirectory(prefix="sscloud-plan-") as cache:  # a server's bundles go there
        registry = Registry(uri, name=config.name, cache=Path(cache))
        champion = registry.champion() if config.name in registered_names(uri) else None
        origin, why = origin_of(config, None if champion is None else registry.bundle(champion.version))
    values = {**config.train, **(config.finetune if origin is not None else {})}
    pool = server_pool(server, PrelabelStore(place.prelabels, server=server.url), project=config.project)
    test = [] if manifest is None else [item for item in manifest.items if item.split == "test"]
    return CyclePlan(
        running=present_holder(place.cycles),
        unfinished=None if last is None else last.number,
        differing=() if last is None else tuple(held_changes(place, last, server.url, config)),
        step="fetch" if step is None else step.name,
        finished=len(found.wanted),
        changed=changed_frames(manifest, found),
        new=0 if manifest is None else len(to_learn_from(new_items(manifest, place.cycles))),
        least=config.min_new,
        champion=None if champion is None else champion.title,
        origin=f"from {origin.manifest.title}" if origin is not None else f"from scratch, because {why}",
        epochs=config.training(values, dataset="", load=None).epochs,
        max_hours=config.max_hours,
        pool=len(pool),
        count=min(config.select.count, len(pool)),
        warning=says_little(len(test), len({item.group for item in test}), config.gate)
        if champion is None and test
        else None,
    )


def changed_frames(manifest: Manifest | None, found: Survey) -> int:
    """Frames of jobs that have changed since the dataset's last fetch, or were never fetched.

    Args:
        manifest: of the dataset; None where there is none.
        found: what the server holds.
    """
    known = {} if manifest is None else manifest.jobs
    fetched = {key: facts.get("updated") for key, facts in known.items()}
    return sum(fetched.get(f"{found.server}#{wanted.job.id}") != wanted.job.updated for wanted in found.wanted)
