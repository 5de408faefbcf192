"""The demo's report: one self-contained HTML page, made from measured numbers only.

The page needs no network and no script (one small script adds a slider where it may run), follows the reader's light or
dark setting, and prints on A4. The layout is in `templates/demo.html.j2`; here is what stands on it.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from training.metrics import Scores
from training.page import (
    bytes_text,
    class_rows,
    compare_maps,
    confusion_table,
    difference_kinds,
    line_chart,
    name_of,
    panels,
    plural,
    render,
    score_text,
    seconds_text,
    share_rows,
)
from training.pictures import percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A panorama that the model never saw, sent to the served function as CVAT does."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3) uint8 RGB."""
    truth: NDArray[np.uint8]
    """(H, W) uint8 label ids."""
    prediction: NDArray[np.uint8]
    """(H, W) uint8 label ids, rebuilt from the function's answer."""
    seconds: float
    """From sending the request to having the whole answer."""
    answer_bytes: int
    """Size of the answer's body."""
    regions: int
    """Items in the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the way, timed."""

    name: str
    """The verb: sample, train, evaluate, package, serve, request …"""
    result: str
    """The artefact that it leaves: dataset, run, scores, function, endpoint, pre-labels …"""
    seconds: float
    note: str = ""
    """What it did, in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A part of the data."""

    name: str
    """training, validation, unseen …"""
    scenes: int
    size_hw: tuple[int, int]
    """Height and width of its panoramas."""
    shares: Mapping[int, float]
    """Share of all pixels, 0 to 1, by label id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Everything that the page shows."""

    title: str
    version: str
    """Version of SSCloud."""
    created: datetime
    schema: LabelSchema
    scores: Scores
    """On the scenes that the model never saw."""
    unseen_scenes: int
    """How many scenes the scores are counted on."""
    examples: Sequence[Example]
    """At least one."""
    stages: Sequence[Stage]
    """In the order in which they ran."""
    total_seconds: float
    """Wall-clock time of the whole way, including what lies between the stages."""
    history: Sequence[Mapping[str, float]]
    """One entry per epoch with the keys `epoch`, `loss` and, where measured, `val_loss` and `miou`."""
    splits: Sequence[Split]
    settings: Mapping[str, str]
    """How the model was trained: setting → value."""
    facts: Mapping[str, str]
    """What it ran on: machine, versions …"""
    commands: Sequence[tuple[str, str]]
    """What to do next: (title, shell commands)."""
    checked: Sequence[str]
    """What this run showed, a sentence each."""
    unchecked: Sequence[str]
    """What it did not, a sentence each."""


def write_demo_report(path: Path, report: DemoReport) -> None:
    """Write the page as one UTF-8 HTML file, atomically.

    Raises:
        ImageError: sizes within an example differ.
    """
    atomic_write(path, render_demo_report(report).encode("utf-8"))


def render_demo_report(report: DemoReport) -> str:
    """The page as text.

    Raises:
        ImageError: sizes within an example differ.
    """
    return render(
        "demo.html.j2",
        report=report,
        cards=_cards(report),
        examples=[_example(example, report.schema) for example in report.examples],
        kinds=difference_kinds(),
        classes=class_rows(report.scores, report.schema),
        confusion=confusion_table(report.scores, report.schema),
        charts=_charts(report.history),
        timeline=_timeline(report),
        data=[
            {
                "name": split.name,
                "note": f"{plural(split.scenes, 'scene')} of {split.size_hw[1]}×{split.size_hw[0]}",
                "shares": share_rows(split.shares, report.schema),
            }
            for split in report.splits
        ],
    )


# --- parts of the page ------------------------------------------------------------------------------------------------


def _cards(report: DemoReport) -> list[dict[str, str]]:
    scores = report.scores
    scenes = plural(report.unseen_scenes, "unseen scene")
    height, width = report.examples[0].image.shape[:2]
    several = len(report.examples) > 1
    median = "median of the examples" if several else "of the example below"
    weakest = "no label was measured"
    if np.isfinite(scores.iou).any():
        index = int(np.nanargmin(scores.iou))
        weakest = f"weakest: {name_of(report.schema, scores.label_ids[index])} {score_text(float(scores.iou[index]))}"
    return [
        {"value": score_text(scores.miou), "name": "mIoU", "note": f"on {scenes}; {weakest}"},
        {"value": percent(scores.pixel_accuracy), "name": "pixels right", "note": f"on {scenes}"},
        {
            "value": seconds_text(statistics.median(e.seconds for e in report.examples)),
            "name": "per panorama",
            "note": f"request to answer, {width}×{height}, {median}",
        },
        {
            "value": bytes_text(statistics.median(e.answer_bytes for e in report.examples)),
            "name": "answer size",
            "note": f"JSON with masks and outlines, {median}",
        },
        {
            "value": f"{statistics.median(e.regions for e in report.examples):.0f}",
            "name": "regions",
            "note": f"ready to correct in CVAT, {median}",
        },
        {"value": seconds_text(report.total_seconds), "name": "the whole way", "note": "from nothing to this page"},
    ]


def _example(example: Example, schema: LabelSchema) -> dict[str, Any]:
    captions = [
        ("Input", "the panorama as sent"),
        ("Truth", "never shown to the model"),
        ("Pre-label", "as the function answered"),
        ("Differences", "what a person would correct"),
    ]
    return {
        "name": example.name,
        "seconds": example.seconds,
        "bytes": example.answer_bytes,
        "regions": example.regions,
        **panels(compare_maps(example.image, example.truth, example.prediction, schema), captions),
    }


def _timeline(report: DemoReport) -> list[dict[str, Any]]:
    total = max(report.total_seconds, sum(stage.seconds for stage in report.stages), 1e-9)
    return [
        {"stage": stage, "percent": round(100 * stage.seconds / total, 2), "hue": round(215 + 28 * i) % 360}
        for i, stage in enumerate(report.stages)
    ]


def _charts(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    charts = [
        line_chart("Loss", history, {"loss": "training", "val_loss": "validation"}),
        line_chart("mIoU on the validation scenes", history, {"miou": "mIoU"}, top=1.0),
    ]
    return [chart for chart in charts if chart is not None]
