"""What the HTML pages share: words and numbers as people read them, tables, curves, pictures, and the templates.

Every page is one file that needs no network, follows the reader's light or dark setting, and prints on A4. The
functions here turn measured numbers into plain values and geometry; how they look is in `templates/page.html.j2` (frame
and style) and `templates/parts.html.j2` (tables, charts and pictures).
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from sscloud.labels import LabelSchema
from training.metrics import Scores
from training.pictures import (
    DIFFERENCES,
    LegendRow,
    difference,
    legend_rows,
    overlay,
    percent,
    shrink_image,
    shrink_labels,
)

PICTURE_WIDTH = 1280
"""Pictures in a page are at most this wide: sharp on a laptop, yet a page of two panoramas is a few megabytes."""

NOTHING = "—"
"""What stands where a number is not defined: it is no zero."""

_TEMPLATES = Path(__file__).parent / "templates"
_ALPHA = 0.6
_JPEG_QUALITY = 84
_CHART = (360, 200)  # width and height of a chart's view box: near its size on a phone, so that its text stays readable
_MARGIN = (14, 12, 24, 40)  # top, right, bottom, left
_UNKNOWN_COLOR = "#808080"


def render(template: str, **content: object) -> str:
    """A page of `templates/` as text; everything in `content` is escaped."""
    page: str = _environment().get_template(template).render(content)
    return page


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": seconds_text, "percent": percent, "score": score_text, "bytes": bytes_text}
    return environment


# --- words and numbers ------------------------------------------------------------------------------------------------


def score_text(value: float | None) -> str:
    """A score of 0 to 1 with three digits; a dash where it is not defined."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.3f}"


def seconds_text(value: float) -> str:
    """A duration as people read it: `0.03 s`, `59.9 s`, `3:03 min`, `1:02:03 h`."""
    if not math.isfinite(value):
        return NOTHING
    if value < 9.95:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}:{seconds:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h"


def bytes_text(value: float) -> str:
    """A size as people read it: `17 B`, `1 kB`, `2.3 MB`."""
    if value < 1e3:
        return f"{value:.0f} B"
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def plural(count: int, noun: str) -> str:
    """`1 panorama`, `2 panoramas`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def name_of(schema: LabelSchema, label_id: int) -> str:
    """A label's name; what the id is where the schema has no label for it."""
    label = schema.by_id(label_id)
    if label is not None:
        return label.name
    return "not labelled" if label_id in schema.void_ids else f"id {label_id}"


def color_of(schema: LabelSchema, label_id: int) -> str:
    """A label's colour as `#rrggbb`; grey where the schema lacks it."""
    label = schema.by_id(label_id)
    return hex_color(label.color) if label else _UNKNOWN_COLOR


def hex_color(color: tuple[int, int, int]) -> str:
    """RGB of 0 to 255 as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


# --- tables -----------------------------------------------------------------------------------------------------------


def class_rows(scores: Scores, schema: LabelSchema) -> list[dict[str, Any]]:
    """A row a class: `name`, `color`, `iou`, `dice`, `precision`, `recall`, `share`, and `bar`, the IoU in percent."""
    return [
        {
            "name": name_of(schema, label_id),
            "color": color_of(schema, label_id),
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


def confusion_table(scores: Scores, schema: LabelSchema) -> dict[str, Any]:
    """Of each class's true pixels, the percentage that the model gave each class: `names` and `rows` of `cells`."""
    table = np.asarray(scores.confusion, np.float64)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.full_like(table, np.nan), where=totals > 0)
    names = [name_of(schema, label_id) for label_id in scores.label_ids]
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
        rows.append({"name": name, "color": color_of(schema, scores.label_ids[i]), "cells": cells})
    return {"names": names, "rows": rows}


def _cell(share: float) -> str:
    if math.isnan(share):
        return NOTHING
    if share == 0:
        return "·"
    value = 100 * share
    return "<0.1" if value < 0.1 else f"{value:.1f}"


def share_rows(shares: Mapping[int, float], schema: LabelSchema) -> list[dict[str, Any]]:
    """The labels that occur, in the schema's order: `name`, `color`, `share` and `percent`, a strip's widths.

    Args:
        shares: label id → share of the pixels, 0 to 1.
        schema: names and colours.
    """
    known = [label.id for label in schema.labels]
    ordered = sorted(shares, key=lambda i: (i not in known, known.index(i) if i in known else i))
    return [
        {
            "name": name_of(schema, label_id),
            "color": color_of(schema, label_id),
            "share": shares[label_id],
            "percent": round(100 * shares[label_id], 3),
        }
        for label_id in ordered
        if shares[label_id] > 0
    ]


# --- curves -----------------------------------------------------------------------------------------------------------


def line_chart(
    title: str,
    history: Sequence[Mapping[str, float]],
    series: Mapping[str, str],
    *,
    top: float | None = None,
    mark: float | None = None,
    digits: str = ".3f",
) -> dict[str, Any] | None:
    """Geometry of a line chart over epochs from zero to `top`, or to what the values need.

    Args:
        title: of the chart.
        history: one entry per epoch with the key `epoch`; what is missing or no number leaves a gap.
        series: key in the history → the line's name; two lines at most have colours of their own.
        top: the largest value of the vertical axis.
        mark: the epoch to mark by a vertical line, if it is in the history.
        digits: format of the last value.

    Returns:
        What the macro `chart` draws, or None if there is nothing to draw.
    """
    points = {key: _points(history, key) for key in series}
    drawn = [point for line in points.values() for point in line]
    if not drawn:
        return None
    first, last = min(x for x, _ in drawn), max(x for x, _ in drawn)
    ticks = ticks_between(0.0, top if top is not None else max(y for _, y in drawn))
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
            lines.append(
                {
                    "name": name,
                    "index": index,
                    "points": _path(placed),
                    "end": placed[-1],
                    "last": format(points[key][-1][1], digits),
                }
            )
    return {
        "title": title,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": above,
        "bottom": height - below,
        "lines": lines,
        "mark": place(mark, 0)[0] if mark is not None and first <= mark <= last else None,
        "ticks": [{"y": place(first, tick)[1], "text": f"{tick:g}"} for tick in ticks],
        "epochs": [
            {"x": place(epoch, 0)[0], "text": f"{epoch:g}"} for epoch in sorted({first, (first + last) // 2, last})
        ],
    }


def ticks_between(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to at least `high`."""
    span = high - low
    if span <= 0:
        return [low, low + 1.0]
    step = 10 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    return [round(low + i * step, 10) for i in range(math.ceil(round(span / step, 6)) + 1)]


def sparkline(
    history: Sequence[Mapping[str, float]], key: str, *, width: float = 160, height: float = 44
) -> dict[str, Any] | None:
    """Geometry of a small curve of a score of 0 to 1 over epochs; None where it was never measured.

    Returns:
        `width` and `height` of its view box, `points` of the line, `end` and `last`.
    """
    points = _points(history, key)
    if not points:
        return None
    first, last = points[0][0], points[-1][0]
    room = 3.0  # for half of the line and of the dot at its end
    placed = [
        (
            round(room + ((x - first) / (last - first) if last > first else 0.5) * (width - 2 * room), 1),
            round(height - room - min(max(y, 0.0), 1.0) * (height - 2 * room), 1),
        )
        for x, y in points
    ]
    return {"width": width, "height": height, "points": _path(placed), "end": placed[-1], "last": points[-1][1]}


def _points(history: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(float(e["epoch"]), float(e[key])) for e in history if key in e and math.isfinite(e[key])]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A panorama, its truth and a prediction, small enough for a page."""

    size_hw: tuple[int, int]
    """Of the panorama itself."""
    image: NDArray[np.uint8]
    """(h, w, 3) uint8 RGB, as the others: at most `PICTURE_WIDTH` wide."""
    truth: NDArray[np.uint8]
    """The truth's colours over the image."""
    prediction: NDArray[np.uint8]
    """The prediction's colours over the image."""
    wrong: NDArray[np.uint8]
    """Where they differ, in the colours of `DIFFERENCES`."""
    legend: Sequence[LegendRow]
    """Counted at full size."""


def compare_maps(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], prediction: NDArray[np.uint8], schema: LabelSchema
) -> Comparison:
    """Draw a panorama with its truth, its prediction and their differences.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) uint8 label ids.
        prediction: (H, W) uint8 label ids.
        schema: their labels.

    Raises:
        ImageError: sizes differ.
    """
    height, width = image.shape[:2]
    rows = legend_rows(schema, truth=truth, prediction=prediction)
    factor = min(1.0, PICTURE_WIDTH / width)
    size_hw = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = shrink_image(image, size_hw)
    # Rarity is a matter of the truth: both maps must thin or keep the same labels.
    counts = np.bincount(truth.ravel(), minlength=256)
    painted = [
        overlay(small, shrink_labels(a, size_hw, schema, counts=counts), schema, alpha=_ALPHA)
        for a in (truth, prediction)
    ]
    return Comparison(
        size_hw=(height, width),
        image=small,
        truth=painted[0],
        prediction=painted[1],
        wrong=difference(truth, prediction, schema, ground=small),
        legend=rows,
    )


def panels(
    comparison: Comparison, captions: Sequence[tuple[str, str]], *, most_bytes: int | None = None
) -> dict[str, Any]:
    """What the macro `panorama` draws: the four pictures and the legend.

    Args:
        comparison: the pictures.
        captions: (title, note) of the image, the truth, the prediction and the differences.
        most_bytes: of one picture; see `jpeg_uri`.
    """
    roles = ("input", "truth", "answer", "wrong")
    pictures = (comparison.image, comparison.truth, comparison.prediction, comparison.wrong)
    return {
        "size": f"{comparison.size_hw[1]}×{comparison.size_hw[0]}",
        "width": comparison.image.shape[1],
        "height": comparison.image.shape[0],
        "pictures": [
            {"role": role, "title": title, "note": note, "source": jpeg_uri(picture, most_bytes=most_bytes)}
            for role, picture, (title, note) in zip(roles, pictures, captions, strict=True)
        ],
        "legend": [
            {
                "name": row.name,
                "color": hex_color(row.color),
                "truth": row.truth_share,
                "prediction": row.prediction_share,
                "iou": row.iou,
            }
            for row in comparison.legend
        ],
    }


def difference_kinds() -> list[dict[str, str]]:
    """Name and colour of every kind of difference, for a key."""
    return [{"name": kind.name, "color": hex_color(kind.color)} for kind in DIFFERENCES]


def jpeg_uri(picture: NDArray[np.uint8], *, most_bytes: int | None = None) -> str:
    """A picture as a data URI.

    Args:
        picture: (h, w, 3) uint8 RGB.
        most_bytes: of the JPEG; a picture with more detail is compressed further until it fits, or until it would
            not be worth looking at.
    """
    for quality in (_JPEG_QUALITY, 72, 60, 48, 36):
        buffer = io.BytesIO()
        # Full chroma at high quality only: the colours of labels have sharp edges, but they cost half of the bytes.
        Image.fromarray(picture).save(
            buffer, "JPEG", quality=quality, subsampling=0 if quality >= 60 else 2, optimize=True
        )
        if most_bytes is None or buffer.tell() <= most_bytes:
            break
    return jpeg_data_uri(buffer.getvalue())


def jpeg_data_uri(data: bytes) -> str:
    """The bytes of a JPEG as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
