"""The demo's report: one self-contained HTML page, made from measured numbers only.

The page needs no network and no script (one small script adds a slider where it may run), follows the reader's light or
dark setting, and prints on A4. The layout is in `templates/report.html.j2`; here are the numbers, pictures and curves.
"""

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from training.metrics import Scores
from training.pictures import DIFFERENCES, difference, legend_rows, overlay, percent, shrink_image, shrink_labels

PICTURE_WIDTH = 1280
"""Pictures in the page are at most this wide: sharp on a laptop, yet a page of two examples is a few megabytes."""

_TEMPLATES = Path(__file__).parent / "templates"
_ALPHA = 0.6
_JPEG_QUALITY = 84
_CHART = (360, 200)  # width and height of a chart's view box: near its size on a phone, so that its text stays readable
_MARGIN = (14, 12, 24, 40)  # top, right, bottom, left


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
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": _seconds, "percent": percent, "score": _score, "bytes": _bytes}
    page: str = environment.get_template("report.html.j2").render(
        report=report,
        cards=_cards(report),
        examples=[_example(example, report.schema) for example in report.examples],
        kinds=[{"name": kind.name, "color": _hex(kind.color)} for kind in DIFFERENCES],
        classes=_classes(report),
        confusion=_confusion(report),
        charts=_charts(report.history),
        timeline=_timeline(report),
        data=_data(report),
    )
    return page


# --- parts of the page ------------------------------------------------------------------------------------------------


def _cards(report: DemoReport) -> list[dict[str, str]]:
    scores = report.scores
    scenes = f"{report.unseen_scenes} unseen scene" + ("s" if report.unseen_scenes != 1 else "")
    height, width = report.examples[0].image.shape[:2]
    several = len(report.examples) > 1
    median = "median of the examples" if several else "of the example below"
    weakest = "no label was measured"
    if np.isfinite(scores.iou).any():
        index = int(np.nanargmin(scores.iou))
        weakest = f"weakest: {_name(report.schema, scores.label_ids[index])} {_score(float(scores.iou[index]))}"
    return [
        {"value": _score(scores.miou), "name": "mIoU", "note": f"on {scenes}; {weakest}"},
        {"value": percent(scores.pixel_accuracy), "name": "pixels right", "note": f"on {scenes}"},
        {
            "value": _seconds(statistics.median(e.seconds for e in report.examples)),
            "name": "per panorama",
            "note": f"request to answer, {width}×{height}, {median}",
        },
        {
            "value": _bytes(statistics.median(e.answer_bytes for e in report.examples)),
            "name": "answer size",
            "note": f"JSON with masks and outlines, {median}",
        },
        {
            "value": f"{statistics.median(e.regions for e in report.examples):.0f}",
            "name": "regions",
            "note": f"ready to correct in CVAT, {median}",
        },
        {"value": _seconds(report.total_seconds), "name": "the whole way", "note": "from nothing to this page"},
    ]


def _example(example: Example, schema: LabelSchema) -> dict[str, Any]:
    height, width = example.image.shape[:2]
    rows = legend_rows(schema, truth=example.truth, prediction=example.prediction)
    factor = min(1.0, PICTURE_WIDTH / width)
    size_hw = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = shrink_image(example.image, size_hw)
    # Rarity is a matter of the truth: both maps must thin or keep the same labels.
    counts = np.bincount(example.truth.ravel(), minlength=256)
    truth, prediction = (
        overlay(small, shrink_labels(a, size_hw, schema, counts=counts), schema, alpha=_ALPHA)
        for a in (example.truth, example.prediction)
    )
    wrong = difference(example.truth, example.prediction, schema, ground=small)
    return {
        "name": example.name,
        "size": f"{width}×{height}",
        "seconds": example.seconds,
        "bytes": example.answer_bytes,
        "regions": example.regions,
        "width": size_hw[1],
        "height": size_hw[0],
        "pictures": [
            {"role": "input", "title": "Input", "note": "the panorama as sent", "source": _data_uri(small)},
            {"role": "truth", "title": "Truth", "note": "never shown to the model", "source": _data_uri(truth)},
            {
                "role": "answer",
                "title": "Pre-label",
                "note": "as the function answered",
                "source": _data_uri(prediction),
            },
            {
                "role": "wrong",
                "title": "Differences",
                "note": "what a person would correct",
                "source": _data_uri(wrong),
            },
        ],
        "legend": [
            {
                "name": row.name,
                "color": _hex(row.color),
                "truth": row.truth_share,
                "prediction": row.prediction_share,
                "iou": row.iou,
            }
            for row in rows
        ],
    }


def _classes(report: DemoReport) -> list[dict[str, Any]]:
    scores = report.scores
    return [
        {
            "name": _name(report.schema, label_id),
            "color": _color(report.schema, label_id),
            **{
                name: float(values[i])
                for name, values in (
                    ("iou", scores.iou),
                    ("dice", scores.dice),
                    ("precision", scores.precision),
                    ("recall", scores.recall),
                    ("share", scores.share),
                )
            },
            "bar": 0.0 if math.isnan(scores.iou[i]) else 100 * float(scores.iou[i]),
        }
        for i, label_id in enumerate(scores.label_ids)
    ]


def _confusion(report: DemoReport) -> dict[str, Any]:
    table = np.asarray(report.scores.confusion, np.float64)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.full_like(table, np.nan), where=totals > 0)
    names = [_name(report.schema, label_id) for label_id in report.scores.label_ids]
    rows = []
    for i, name in enumerate(names):
        cells = [
            {
                "text": _cell(float(share)),
                "tint": 0 if math.isnan(share) else round(100 * float(share)),
                "right": i == j,
                "strong": bool(share > 0.55),
            }
            for j, share in enumerate(shares[i])
        ]
        rows.append({"name": name, "color": _color(report.schema, report.scores.label_ids[i]), "cells": cells})
    return {"names": names, "rows": rows}


def _cell(share: float) -> str:
    if math.isnan(share):
        return "—"
    if share == 0:
        return "·"
    value = 100 * share
    return "<0.1" if value < 0.1 else f"{value:.1f}"


def _timeline(report: DemoReport) -> list[dict[str, Any]]:
    total = max(report.total_seconds, sum(stage.seconds for stage in report.stages), 1e-9)
    return [
        {"stage": stage, "percent": round(100 * stage.seconds / total, 2), "hue": round(215 + 28 * i) % 360}
        for i, stage in enumerate(report.stages)
    ]


def _data(report: DemoReport) -> list[dict[str, Any]]:
    known = [label.id for label in report.schema.labels]
    return [
        {
            "name": split.name,
            "scenes": split.scenes,
            "size": f"{split.size_hw[1]}×{split.size_hw[0]}",
            "shares": [
                {
                    "name": _name(report.schema, label_id),
                    "color": _color(report.schema, label_id),
                    "share": split.shares[label_id],
                    "percent": round(100 * split.shares[label_id], 3),
                }
                for label_id in sorted(
                    split.shares, key=lambda i: (i not in known, known.index(i) if i in known else i)
                )
                if split.shares[label_id] > 0
            ],
        }
        for split in report.splits
    ]


# --- curves -----------------------------------------------------------------------------------------------------------


def _charts(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    charts = [
        _chart("Loss", history, {"loss": "training", "val_loss": "validation"}, top=None),
        _chart("mIoU on the validation scenes", history, {"miou": "mIoU"}, top=1.0),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(
    title: str, history: Sequence[Mapping[str, float]], series: Mapping[str, str], *, top: float | None
) -> dict[str, Any] | None:
    """Geometry of a line chart from zero to `top` (or to what the values need), or None if there is nothing to draw."""
    points = {
        key: [(float(e["epoch"]), float(e[key])) for e in history if key in e and math.isfinite(e[key])]
        for key in series
    }
    drawn = [point for line in points.values() for point in line]
    if not drawn:
        return None
    first, last = min(x for x, _ in drawn), max(x for x, _ in drawn)
    ticks = _ticks(0.0, top if top is not None else max(y for _, y in drawn))
    (width, height), (above, right, below, left) = _CHART, _MARGIN
    span = ticks[-1] or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return (
            round(left + across * (width - left - right), 1),
            round(height - below - min(max(y, 0.0) / span, 1.0) * (height - above - below), 1),
        )

    lines = []
    for index, (key, name) in enumerate(series.items()):
        if points[key]:
            placed = [place(x, y) for x, y in points[key]]
            final = points[key][-1][1]
            lines.append(
                {
                    "name": name,
                    "index": index,
                    "points": " ".join(f"{x},{y}" for x, y in placed),
                    "end": placed[-1],
                    "last": f"{final:.3f}",
                }
            )
    return {
        "title": title,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "bottom": height - below,
        "lines": lines,
        "ticks": [{"y": place(first, tick)[1], "text": f"{tick:g}"} for tick in ticks],
        "epochs": [
            {"x": place(epoch, 0)[0], "text": f"{epoch:g}"} for epoch in sorted({first, (first + last) // 2, last})
        ],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to at least `high`."""
    span = high - low
    if span <= 0:
        return [low, low + 1.0]
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    return [round(low + i * step, 10) for i in range(math.ceil(round(span / step, 6)) + 1)]


# --- words and pixels -------------------------------------------------------------------------------------------------


def _name(schema: LabelSchema, label_id: int) -> str:
    label = schema.by_id(label_id)
    return label.name if label else f"id {label_id}"


def _color(schema: LabelSchema, label_id: int) -> str:
    label = schema.by_id(label_id)
    return _hex(label.color) if label else "#808080"


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _score(value: float | None) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "—"
    if value < 9.95:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    return f"{round(value) // 60}:{round(value) % 60:02d} min"


def _bytes(value: float) -> str:
    if value < 1e3:
        return f"{value:.0f} B"
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def _data_uri(picture: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
