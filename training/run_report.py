"""The report of a run: one self-contained HTML page with its curves, its scores and its worst panoramas.

`write_run_report` gathers what a run folder and its data set say, `render_run_report` makes the page of it. Whatever
was not recorded or not measured (an old run, no validation part, a class that never occurs) is left out or shown as a
dash. The layout is in `templates/run.html.j2`.
"""

import csv
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sscloud import __version__
from sscloud.bundle import ModelBundle
from sscloud.files import atomic_write
from sscloud.image import no_return, read_image, read_label_map
from sscloud.inference import Predictor
from sscloud.labels import VOID, LabelSchema, count_ids
from training.bootstrap import FEW_GROUPS, groups_of
from training.calibration import Reliability
from training.config import CONFIG, Run, read_run
from training.dataset import DatasetFolder, Item, learning_parts, part
from training.evaluate import Evaluation, evaluate
from training.export import BUNDLE, METRICS
from training.page import (
    NOTHING,
    Comparison,
    class_rows,
    color_of,
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
    sparkline,
)
from training.pictures import percent
from training.splits import SPLITS, Split

REPORT = "report.html"
"""In the run's folder."""

_WORST = 4
"""Panoramas with pictures."""

_PICTURE_BYTES = 260_000
"""Of one picture at most: sixteen of them, a third larger as text, keep the page below 6 MB."""

_LEVEL_NAMES, _READABLE_CLASSES = 6, 14
"""Up to so many classes the confusion matrix has room for names side by side, and for numbers."""

_MISTAKES = 8
"""Rows in the list of what is most often taken for something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPanorama:
    """A panorama on which the model does badly."""

    name: str
    miou: float
    pictures: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the run's model does on one part of the data."""

    part: str
    """test, validation, train or all."""
    evaluation: Evaluation
    schema: LabelSchema
    """Names and colours of the evaluation's classes."""
    device: str
    """What computed."""
    worst: Sequence[WorstPanorama]
    """The lowest mIoU first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the data set."""

    name: str
    panoramas: int
    groups: int | None
    """Groups that belong together (sites, say); None where the data set does not know them."""
    shares: Mapping[int, float]
    """Share of all pixels, 0 to 1, by label id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Everything that the page shows."""

    title: str
    version: str
    """Version of SSCloud that made the page."""
    created: datetime
    schema: LabelSchema
    """The run's labels."""
    class_ids: Sequence[int]
    """Label ids whose IoU the history has."""
    history: Sequence[Mapping[str, float]]
    """The rows of metrics.csv; a value that is missing there is missing here."""
    best_epoch: int | None
    """Whose weights the bundle has; None before an epoch has ended."""
    epochs: int
    """Epochs that were asked for."""
    measured: Measured | None
    unmeasured: str
    """Why `measured` is None, a sentence; empty otherwise."""
    parts: Sequence[Part]
    """Empty without a data set."""
    config: Mapping[str, str]
    """How the model was trained: setting → value."""
    facts: Mapping[str, str]
    """What the run found about its data, and what it is built from."""
    ran: Mapping[str, str]
    """What ran: duration, versions, the machine that made the page."""

    @property
    def headline(self) -> str:
        """The outcome in a sentence."""
        if self.measured is None:
            return self.unmeasured
        found = self.measured.evaluation
        interval = f" (95 %: {_interval_text(found.intervals.miou)})" if found.intervals else ""
        panoramas = plural(len(found.panoramas), "panorama")
        return f"mIoU {score_text(found.scores.miou)}{interval} on {panoramas} of the part {self.measured.part}."


def write_run_report(
    run: Path,
    *,
    dataset: DatasetFolder | None,
    output: Path,
    split: Split | Literal["all"] = "validation",
    device: str = "auto",
    group_by: str | None = None,
) -> RunReport:
    """Measure a run's model on one part of a data set, and write the report atomically.

    Args:
        run: a run folder.
        dataset: None for a report without scores and pictures.
        output: the HTML file.
        split: which part to measure; where the data set has no frozen splits, train and validation are the parts
            that the run itself learned from and chose its best epoch by.
        device: `auto`, `cpu`, `cuda`, …
        group_by: which panoramas belong together, for the intervals; see `training.bootstrap.groups_of`.

    Returns:
        What the page shows.

    Raises:
        ConfigError: `run` is no run, or `group_by` cannot be used.
        BundleError: its bundle is damaged.
        DatasetError: the data set has no such part (a missing validation part only leaves out the scores), or masks
            that are void all over.
        SchemaError: masks with ids that neither the bundle nor the data set knows.
        ImageError: unreadable files.
    """
    found = read_run(run)
    history = read_history(run / METRICS)
    bundle = ModelBundle.load(run / BUNDLE) if (run / BUNDLE).is_dir() else None
    measured, unmeasured = None, ""
    if bundle is None:
        unmeasured = "The run has no bundle yet, so there was nothing to measure."
    elif dataset is None:
        unmeasured = "No data set was at hand, so nothing was measured."
    else:
        folder = _part(dataset, split, found)
        if folder is None:
            unmeasured = "The run has no validation part, so nothing was measured."
        else:
            measured = _measure(bundle, folder, split, device=device, group_by=group_by)
    report = RunReport(
        title=run.resolve().name,
        version=__version__,
        created=datetime.now(UTC),
        schema=found.facts.labels,
        class_ids=found.facts.labels.class_ids,
        history=history,
        best_epoch=_best_epoch(bundle, history),
        epochs=found.config.epochs,
        measured=measured,
        unmeasured=unmeasured,
        parts=_parts(dataset, _dealt(dataset, split, found), group_by=group_by) if dataset else [],
        **_settings(run / CONFIG),
        ran=_ran(found, history, bundle, measured),
    )
    atomic_write(output, render_run_report(report).encode("utf-8"))
    return report


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv as numbers; empty cells are left out, and a missing file has no rows."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]


def render_run_report(report: RunReport) -> str:
    """The page as text."""
    measured = report.measured
    return render(
        "run.html.j2",
        report=report,
        measured=measured,
        cards=_cards(report),
        classes=_classes(measured) if measured else [],
        confusion=_confusion(measured) if measured else None,
        mistakes=_mistakes(measured) if measured else [],
        reliability=_reliability_chart(measured.evaluation.reliability) if measured else None,
        few_groups=FEW_GROUPS,
        interval=_interval_text(measured.evaluation.intervals.miou)
        if measured and measured.evaluation.intervals
        else "",
        worst=_worst(measured) if measured else [],
        kinds=difference_kinds(),
        charts=_charts(report),
        sparks=_sparks(report),
        data=_data(report),
    )


# --- gathering --------------------------------------------------------------------------------------------------------


def _part(dataset: DatasetFolder, split: Split | Literal["all"], run: Run) -> DatasetFolder | None:
    """The panoramas to measure; None for a validation part that the run never had."""
    items = _dealt(dataset, split, run).get(split)
    if items:
        return replace(dataset, items=tuple(items))
    return None if split == "validation" else part(dataset, split)[0]


def _measure(bundle: ModelBundle, folder: DatasetFolder, split: str, *, device: str, group_by: str | None) -> Measured:
    evaluation = evaluate(bundle, folder, device=device, group_by=group_by)
    known = folder.schema
    schema = replace(known, labels=(*known.labels, *(i for i in evaluation.labels if known.by_id(i.id) is None)))
    ranked = sorted((p for p in evaluation.panoramas if not math.isnan(p.miou)), key=lambda p: p.miou)[:_WORST]
    items = {item.name: item for item in folder.items}
    # Again, because the maps of a whole evaluation at full size would not fit into memory.
    predictor = Predictor(bundle, device=device, precision="fp32")
    worst = [
        WorstPanorama(
            name=one.name, miou=one.miou, pictures=_compared(items[one.name], predictor, schema, folder.facts.encoding)
        )
        for one in ranked
    ]
    return Measured(part=split, evaluation=evaluation, schema=schema, device=predictor.describe(), worst=worst)


def _compared(item: Item, predictor: Predictor, schema: LabelSchema, encoding: str) -> Comparison:
    image, truth = read_image(item.image), read_label_map(item.mask)
    if schema.no_return_void and encoding == "normals":
        truth[no_return(image)] = VOID
    return compare_maps(image, truth, predictor.predict(image).label_map, schema)


def _best_epoch(bundle: ModelBundle | None, history: Sequence[Mapping[str, float]]) -> int | None:
    """As the bundle says; before there is one, the epoch it would be made of: the highest mIoU, else the last."""
    if bundle is not None and "epoch" in bundle.manifest.metrics:
        return round(bundle.manifest.metrics["epoch"])
    scored = [row for row in history if math.isfinite(row.get("miou", math.nan))]
    if scored:
        return round(max(scored, key=lambda row: row["miou"])["epoch"])
    return round(history[-1]["epoch"]) if history else None


def _dealt(dataset: DatasetFolder, split: Split | Literal["all"], run: Run) -> dict[str, list[Item]]:
    """The items by part: as frozen, or as the run dealt them where they are not."""
    if any(item.split is not None for item in dataset.items):
        return {name: [item for item in dataset.items if item.split == name] for name in SPLITS}
    if split == "all":  # perhaps not what the run has learned from: its dealing would mean nothing here
        return {"all": list(dataset.items)}
    learned, validated = learning_parts(dataset, run.config.validation)
    return {"train": learned, "validation": validated}


def _parts(dataset: DatasetFolder, dealt: Mapping[str, list[Item]], *, group_by: str | None) -> list[Part]:
    groups = groups_of(dataset, group_by) if dataset.manifest is not None or group_by is not None else None
    entries = {entry.name: entry for entry in dataset.manifest.items} if dataset.manifest else {}
    parts = []
    for name, items in dealt.items():
        counts = np.zeros(256, np.int64)
        for item in items:
            if item.name in entries:
                pixels = entries[item.name].pixels
                counts[list(pixels)] += list(pixels.values())
            else:
                counts += count_ids(read_label_map(item.mask))
        if items:
            parts.append(
                Part(
                    name=name,
                    panoramas=len(items),
                    groups=len({groups[item.name] for item in items}) if groups is not None else None,
                    shares={int(i): float(counts[i] / counts.sum()) for i in np.flatnonzero(counts)},
                )
            )
    return parts


def _settings(path: Path) -> dict[str, dict[str, str]]:
    """`config` and `facts` of config.json as they stand there: a setting that an old run did not know is left out."""
    content = json.loads(path.read_bytes())
    facts = {name: value for name, value in content["facts"].items() if name != "labels"}
    if "learned" in facts:
        facts["learned"] = f"{len(facts['learned'])} panoramas with their masks, its parents' included"
    labels = [f"{label['id']} {label['name']}" for label in content["facts"]["labels"]["labels"]]
    return {
        "config": {name: _plain(value) for name, value in content["config"].items()},
        "facts": {"labels": ", ".join(labels), **{name: _plain(value) for name, value in facts.items()}},
    }


def _plain(value: object) -> str:
    """A JSON value as people read it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


_RATES = {
    "images a second": "images_per_second",
    "images a second, loading alone": "loader_images_per_second",
    "images a second, steps alone": "step_images_per_second",
}


def _ran(
    run: Run, history: Sequence[Mapping[str, float]], bundle: ModelBundle | None, measured: Measured | None
) -> dict[str, str]:
    found = {"epochs": f"{len(history)} of {run.config.epochs}"}
    if (seconds := _total(history, "seconds")) is not None:
        found["training took"] = seconds_text(seconds)
    for name, column in _RATES.items():
        if (rate := _median(history, column)) is not None:
            found[name] = f"{rate:.3g} (median of the epochs)"
    if (skipped := _total(history, "skipped_steps")) is not None:
        found["steps skipped, loss not finite"] = f"{skipped:.0f}"
    if bundle is not None:
        manifest = bundle.manifest
        found |= {
            "bundle": manifest.title,
            "made": manifest.created,
            "sha256 of its weights": manifest.weights_sha256,
            "temperature of its confidence": f"{manifest.temperature:.3g}",
        }
    found["trained with"] = f"SSCloud {run.facts.code_version}"
    if measured is not None:
        seconds = statistics.median(one.seconds for one in measured.evaluation.panoramas)
        found["measured on"] = measured.device
        found["prediction of a panorama"] = f"{seconds_text(seconds)}, from the file to the class map (median)"
    found["this page made by"] = f"SSCloud {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    found["on"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return found


def _column(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in history if math.isfinite(row.get(name, math.nan))]


def _total(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Sum of a column; None where no epoch has it."""
    values = _column(history, name)
    return sum(values) if values else None


def _median(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = _column(history, name)
    return statistics.median(values) if values else None


# --- parts of the page ------------------------------------------------------------------------------------------------


def _cards(report: RunReport) -> list[dict[str, str]]:
    return [
        card
        for card in (
            _miou_card(report),
            _weakest_card(report),
            _best_epoch_card(report),
            *_speed_cards(report),
            _confidence_card(report),
        )
        if card is not None
    ]


def _miou_card(report: RunReport) -> dict[str, str] | None:
    if report.measured is not None:
        found = report.measured.evaluation
        on = f"on {plural(len(found.panoramas), 'panorama')} of the part {report.measured.part}"
        interval = f"95 %: {_interval_text(found.intervals.miou)}; " if found.intervals else ""
        return {"value": score_text(found.scores.miou), "name": "mIoU", "note": interval + on}
    mious = _column(report.history, "miou")
    if not mious:
        return None
    return {"value": score_text(max(mious)), "name": "mIoU", "note": "while training, at the model's scale"}


def _weakest_card(report: RunReport) -> dict[str, str] | None:
    if report.measured is not None:
        found = report.measured.evaluation
        ious = {label.name: float(iou) for label, iou in zip(found.labels, found.scores.iou, strict=True)}
    elif report.history:
        row = next((row for row in report.history if row["epoch"] == report.best_epoch), report.history[-1])
        ious = {name_of(report.schema, i): row.get(f"iou_{i}", math.nan) for i in report.class_ids}
    else:
        return None
    ranked = sorted((name for name, iou in ious.items() if math.isfinite(iou)), key=ious.__getitem__)
    if not ranked:
        return None
    others = ", ".join(f"{name} {score_text(ious[name])}" for name in ranked[1:3])
    return {
        "value": score_text(ious[ranked[0]]),
        "name": f"weakest: {ranked[0]}",
        "note": f"then {others}" if others else "the only class that was measured",
    }


def _best_epoch_card(report: RunReport) -> dict[str, str] | None:
    if report.best_epoch is None:
        return None
    row = next((row for row in report.history if row["epoch"] == report.best_epoch), {})
    note = f"with mIoU {row['miou']:.3f} while training" if "miou" in row else "the last one: nothing was validated"
    done = len(report.history)
    stopped = f"; {done} of {report.epochs} epochs done" if 0 < done < report.epochs else ""
    return {"value": f"{report.best_epoch} of {done or report.epochs}", "name": "best epoch", "note": note + stopped}


def _speed_cards(report: RunReport) -> list[dict[str, str]]:
    cards = []
    if (seconds := _total(report.history, "seconds")) is not None:
        each = statistics.median(_column(report.history, "seconds"))
        cards.append(
            {"value": seconds_text(seconds), "name": "of training", "note": f"{seconds_text(each)} an epoch (median)"}
        )
    if (rate := _median(report.history, "images_per_second")) is not None:
        skipped = _total(report.history, "skipped_steps")
        note = f"median of the epochs; {plural(round(skipped), 'step')} skipped" if skipped else "median of the epochs"
        cards.append({"value": f"{rate:.3g}", "name": "images a second", "note": note})
    return cards


def _confidence_card(report: RunReport) -> dict[str, str] | None:
    if report.measured is None:
        return None
    note = "expected calibration error: how far a stated confidence is off, on average"
    error = report.measured.evaluation.reliability.error
    return {"value": f"{100 * error:.1f} %", "name": "confidence off by", "note": note}


def _interval_text(limits: Sequence[float] | NDArray[np.float64]) -> str:
    low, high = limits
    return NOTHING if math.isnan(low) else f"{low:.3f}–{high:.3f}"


def _classes(measured: Measured) -> list[dict[str, Any]]:
    found = measured.evaluation
    rows = class_rows(found.scores, measured.schema)
    limits = found.intervals.iou if found.intervals else np.full((len(rows), 2), np.nan)
    for index, row in enumerate(rows):
        row["interval"] = _interval_text(limits[index])
        low, high = (100 * limits[index]).tolist()
        row["whisker"] = None if math.isnan(low) else {"left": low, "width": high - low}
        row["boundary"] = float(found.boundary_iou[index])
    return rows


def _confusion(measured: Measured) -> dict[str, Any]:
    """The table of the classes that occur in truth or prediction: the others have nothing in it."""
    scores = measured.evaluation.scores
    seen = np.flatnonzero(scores.confusion.sum(axis=0) + scores.confusion.sum(axis=1))
    ids = tuple(scores.label_ids[i] for i in seen.tolist())
    shown = replace(scores, confusion=scores.confusion[np.ix_(seen, seen)], label_ids=ids)
    kind = "" if len(seen) <= _LEVEL_NAMES else " many" if len(seen) <= _READABLE_CLASSES else " dense"
    return {**confusion_table(shown, measured.schema), "kind": kind}


def _mistakes(measured: Measured) -> list[dict[str, Any]]:
    """What is most often taken for something else, by its share of all pixels."""
    scores = measured.evaluation.scores
    ids, counts = scores.label_ids, np.asarray(scores.confusion, np.float64)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(wrong, axis=None, kind="stable")[::-1][:_MISTAKES]
    return [
        {
            "truth": {"name": name_of(measured.schema, ids[i]), "color": color_of(measured.schema, ids[i])},
            "model": {"name": name_of(measured.schema, ids[j]), "color": color_of(measured.schema, ids[j])},
            "of_truth": float(wrong[i, j] / counts[i].sum()),
            "of_all": float(wrong[i, j] / counts.sum()),
        }
        for i, j in zip(*(axis.tolist() for axis in np.unravel_index(largest, wrong.shape)), strict=True)
        if wrong[i, j] > 0
    ]


def _reliability_chart(reliability: Reliability) -> dict[str, Any]:
    """Geometry of the diagram: a bar of accuracy a bin, the confidence it should reach, and how full the bins are."""
    side, foot, left, top = 200.0, 34.0, 34.0, 8.0
    step = side / len(reliability.count)
    total, fullest = int(reliability.count.sum()), int(reliability.count.max())
    bars = []
    for index, pixels in enumerate(reliability.count.tolist()):
        if pixels:
            right, meant = float(reliability.right[index] / pixels), float(reliability.confidence[index] / pixels)
            bars.append(
                {
                    "x": round(left + index * step + 0.5, 2),
                    "width": round(step - 1, 2),
                    "y": round(top + side * (1 - right), 2),
                    "height": round(side * right, 2),
                    "meant": round(top + side * (1 - min(meant, 1.0)), 2),
                    "fill_y": round(top + side + 4 + foot * (1 - pixels / fullest), 2),
                    "fill_height": round(foot * pixels / fullest, 2),
                    "title": f"confidence {meant:.2f}, right {right:.2f}, {percent(pixels / total)} of the pixels",
                }
            )
    return {
        "side": side,
        "left": left,
        "top": top,
        "foot": foot,
        "bars": bars,
        "error": reliability.error,
        "confidence": float(reliability.confidence.sum() / max(total, 1)),
        "accuracy": float(reliability.right.sum() / max(total, 1)),
    }


def _worst(measured: Measured) -> list[dict[str, Any]]:
    captions = [
        ("Input", "the panorama"),
        ("Truth", "what people drew"),
        ("Prediction", "what the model says"),
        ("Differences", "what a person would correct"),
    ]
    return [
        {"name": one.name, "miou": one.miou, **panels(one.pictures, captions, most_bytes=_PICTURE_BYTES)}
        for one in measured.worst
    ]


def _charts(report: RunReport) -> list[dict[str, Any]]:
    best = report.best_epoch
    charts = [
        line_chart("Loss", report.history, {"train_loss": "training", "val_loss": "validation"}, mark=best),
        line_chart("mIoU, validation", report.history, {"miou": "mIoU"}, top=1.0, mark=best),
        line_chart("Learning rate", report.history, {"learning_rate": "rate"}, mark=best, digits=".2g"),
    ]
    return [chart for chart in charts if chart is not None]


def _sparks(report: RunReport) -> list[dict[str, Any]]:
    """A small curve a class, for those that were ever measured."""
    found = []
    for label_id in report.class_ids:
        curve = sparkline(report.history, f"iou_{label_id}")
        if curve is not None:
            found.append(
                {"name": name_of(report.schema, label_id), "color": color_of(report.schema, label_id), **curve}
            )
    return found


def _data(report: RunReport) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "note": plural(one.panoramas, "panorama")
            + ("" if one.groups is None else f" of {plural(one.groups, 'group')}"),
            "shares": share_rows(one.shares, report.schema),
        }
        for one in report.parts
    ]
