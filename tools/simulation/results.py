"""What a simulation is asked for, and what comes of it: rounds, as records, as JSON and as lines of a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import ConfigError
from sscloud.labels import LabelSchema
from tools.simulation.scenes import ScenePlan
from training.correction import count_pixels
from training.effort_records import FrameEffort
from training.effort_summary import EffortRow, summarise_effort
from training.oracle import Correction

BY_HAND: Final = "by hand"
"""Where others have a model: the seed, drawn from nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """A simulation. The defaults take about ten minutes on two cores."""

    workspace: Path
    rounds: int = 4
    count: int = 6
    """Panoramas that people correct in a round."""
    scenes: ScenePlan = field(default_factory=ScenePlan)
    scale: float = 0.25
    base_width: int = 8
    epochs: int = 60
    """Of the first training."""
    finetune_epochs: int = 25
    """Of those that go on from the champion."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the cycle, dotted key → value."""
    settings: tuple[str, ...] = ()
    """The same as `KEY=VALUE`."""
    keep: bool = False
    """Leave the project on a live server."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.count < 1:
            raise ConfigError(f"A simulation has rounds and panoramas in them; found {self.rounds} and {self.count}.")
        if self.rounds * self.count > self.scenes.pool:
            raise ConfigError(
                f"{self.rounds} rounds of {self.count} panoramas are more than the {self.scenes.pool} of the pool. "
                "Raise --scenes, or choose less."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round: what people did, and the model that they had for it."""

    number: int
    """0: the seed, labelled by hand."""
    model: str
    """Title of the model whose pre-labels people corrected."""
    labelled: int
    """Panoramas that were labelled when the round began."""
    accepted: bool | None = None
    """What the gate said of this round's challenger; None without one."""
    reasons: tuple[str, ...] = ()
    challenger: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the model on the test panoramas: `miou`, `iou/<label>`, …"""
    effort: EffortRow | None
    """What people changed in the panoramas of this round, as the loop has measured it from the server."""
    same: EffortRow | None = None
    """What they would have changed in the test panoramas: the same ones for every model."""
    seconds: float
    """Of the oracle's work on a panorama of this round, by its model of a person."""
    same_seconds: float = math.nan
    agreement: float
    """Share of the pixels of the people's results that are the truth."""
    took: float = 0.0
    """Seconds that the round took here."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "round": self.number,
            "model": self.model,
            "labelled": self.labelled,
            "gate": None
            if self.accepted is None
            else {"challenger": self.challenger, "accepted": self.accepted, "reasons": list(self.reasons)},
            "miou": number(self.metrics.get("miou", math.nan)),
            "iou": {name[4:]: number(value) for name, value in self.metrics.items() if name.startswith("iou/")},
            "effort": _effort(self.effort),
            "corrections": _corrections(self.effort, self.seconds),
            "effort_on_test": _effort(self.same),
            "corrections_on_test": _corrections(self.same, self.same_seconds),
            "agreement": number(self.agreement),
            "took_seconds": round(self.took, 1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A test panorama, and what each model made of it."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3) uint8 RGB."""
    truth: NDArray[np.uint8]
    """(H, W) uint8 label ids."""
    predictions: tuple[tuple[str, NDArray[np.uint8]], ...]
    """Title of a model, and its (H, W) uint8 label ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What came of it."""

    config: SimulationConfig
    server: str
    rounds: tuple[Round, ...]
    look: Look
    schema: LabelSchema
    seconds: float
    page: Path

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        plan = self.config.scenes
        return {
            "by_hand": [each.to_dict() for each in self.rounds if each.number == 0],
            "rounds": [each.to_dict() for each in self.rounds if each.number > 0],
            "seed": plan.seed,
            "panoramas": {
                "test": plan.test_sites,
                "seed": plan.seed_sites * plan.seed_scans,
                "pool": plan.pool,
                "a_round": self.config.count,
            },
            "report": str(self.page),
            "seconds": round(self.seconds, 1),
        }


def effort_of(corrections: Sequence[Correction], *, model: str, schema: LabelSchema) -> EffortRow | None:
    """What was changed in some frames, counted as `sscloud effort` counts it.

    Args:
        corrections: one a frame.
        model: whose pre-labels they began with.
        schema: the labels.
    """
    background = schema.background
    return effort_row(
        [
            FrameEffort(
                server="",
                project=None,
                task=0,
                job=0,
                frame=number,
                name=str(number),
                group=str(number),
                model=model,
                prelabel="",
                mask_sha256="",
                fetched="",
                snapshot="",
                nothing=background.id if background is not None else 0,
                labels={label.id: label.name for label in schema.labels},
                pixels=count_pixels(each.before, each.label_map),
                kept=each.accepted,
                changed=len(each.updated),
                deleted=len(each.deleted),
                added=len(each.created),
            )
            for number, each in enumerate(corrections)
        ]
    )


def effort_row(records: Sequence[FrameEffort]) -> EffortRow | None:
    """Frames of one model together; None without any that could be measured."""
    models = summarise_effort(records).models
    return models[-1] if models else None


HEADER: Final = (
    "round  model            labelled   mIoU  gate      effort  shapes  minutes   effort on the test panoramas"
)


def line_of(found: Round) -> str:
    """A round as a line of the table that `HEADER` heads."""
    gate = {None: "", True: "accepted", False: "refused"}[found.accepted]
    changed, same = (math.nan if row is None else row.effort for row in (found.effort, found.same))
    touched = math.nan if found.effort is None else found.effort.touched
    miou = found.metrics.get("miou", math.nan)
    return (
        f"{found.number:>5}  {found.model:15.15}  {found.labelled:>8}  {_text(miou, '.3f'):>5}  "
        f"{gate:8}  {_text(changed, '.1%'):>6}  {_text(touched, '.0f'):>6}  "
        f"{found.seconds / 60:>7.1f}   {_text(same, '.1%'):>6}"
    )


def _text(value: float, form: str) -> str:
    return "—" if math.isnan(value) else format(value, form)


def _effort(row: EffortRow | None) -> float | None:
    """Share of the drawn pixels that people changed."""
    return None if row is None else number(row.effort)


def _corrections(row: EffortRow | None, seconds: float) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "panoramas": row.frames,
        "effort_by_label": {name: number(changes.effort) for name, changes in row.classes.items()},
        "shapes_touched": number(row.touched),
        "shapes_kept": number(row.kept / row.frames),
        "seconds": number(seconds),
    }


def number(value: float) -> float | None:
    """As JSON has it: a value that is not defined is null."""
    return round(value, 6) if math.isfinite(value) else None
