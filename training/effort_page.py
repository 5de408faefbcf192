"""What pre-labels have saved, as a page: one self-contained HTML file."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sscloud import __version__
from sscloud.labels import LabelSchema, default_color
from training.effort_summary import EffortRow, EffortSummary, PixelChanges, percent
from training.page import hex_color, line_chart, plural, render, score_text, seconds_text

_KINDS: Final = (
    ("accepted as it was", "accepted", "#009e73"),
    ("re-labelled", "relabelled", "#e69f00"),
    ("added", "added", "#56b4e9"),
    ("removed", "removed", "#cc79a7"),
)
"""Colours of Okabe and Ito's palette, told apart by colour-blind people too."""


def render_effort_page(summary: EffortSummary, *, schema: LabelSchema) -> str:
    """The page as text.

    Args:
        summary: what was measured.
        schema: the labels' colours.
    """
    newest = summary.change.after if summary.change else summary.models[-1] if summary.models else None
    before = summary.change.before if summary.change else None
    return render(
        "effort.html.j2",
        report={"version": __version__, "created": datetime.now(UTC)},
        summary=summary,
        cards=_cards(newest, before) if newest else [],
        models=[_strip(row) for row in summary.models],
        charts=_charts(summary.models),
        fetches=_charts(summary.cycles),
        tables=[("By version", summary.models), ("By fetch", summary.cycles)],
        newest=newest,
        before=before,
        classes=_classes(newest, before, schema) if newest else [],
        unknown=[(reason, plural(count, "frame")) for reason, count in summary.unknown.items()],
        share=percent,
    )


def _cards(newest: EffortRow, before: EffortRow | None) -> list[dict[str, str]]:
    cards = [
        {"value": percent(newest.effort), "name": "of what is drawn was changed", "note": newest.name},
        {
            "value": f"{newest.touched:.1f}",
            "name": "shapes touched a frame",
            "note": f"{newest.changed} changed, {newest.deleted} deleted, {newest.added} added; {newest.kept} kept",
        },
        {"value": score_text(newest.miou), "name": "mean IoU of pre-label and result", "note": "over the labels"},
        {
            "value": "—" if newest.seconds is None else seconds_text(newest.seconds),
            "name": "at work on a frame",
            "note": f"known of {plural(newest.timed, 'frame')}, in jobs that are all this version's"
            if newest.timed
            else "not known of any job that is all this version's",
        },
    ]
    if before is not None:
        cards.insert(1, {"value": percent(before.effort), "name": "was it before", "note": before.name})
    return cards


def _strip(row: EffortRow) -> dict[str, Any]:
    shares = [
        {
            "name": name,
            "color": color,
            "share": row.pixels.share(getattr(row.pixels, kind)),
            "percent": round(100 * row.pixels.share(getattr(row.pixels, kind)), 3),
        }
        for name, kind, color in _KINDS
        if row.pixels.drawn
    ]
    return {"name": row.name, "note": plural(row.frames, "frame"), "shares": shares}


def _charts(rows: Sequence[EffortRow]) -> list[dict[str, Any]]:
    """Lines over versions or fetches, which are numbered from 1; a single point is no line."""
    if len(rows) < 2:
        return []
    history = [
        {
            "epoch": float(number),
            "effort": 100 * row.effort,
            "touched": row.touched,
            "miou": row.miou,
            "minutes": math.nan if row.seconds is None else row.seconds / 60,
        }
        for number, row in enumerate(rows, 1)
    ]
    charts = [
        line_chart("Effort: changed pixels, %", history, {"effort": "changed"}, digits=".1f"),
        line_chart("Shapes touched a frame", history, {"touched": "touched"}, digits=".1f"),
        line_chart("Mean IoU of pre-label and result", history, {"miou": "IoU"}, top=1.0),
        line_chart("Minutes at work on a frame", history, {"minutes": "minutes"}, digits=".1f"),
    ]
    return [chart for chart in charts if chart is not None]


def _classes(newest: EffortRow, before: EffortRow | None, schema: LabelSchema) -> list[dict[str, Any]]:
    rows = []
    for place, (name, changes) in enumerate(newest.classes.items(), 1):
        label = schema.find(name)
        older = before.classes.get(name, PixelChanges()) if before is not None else PixelChanges()
        rows.append(
            {
                "name": name,
                "color": hex_color(label.color if label else default_color(place)),
                "bar": 0.0 if math.isnan(changes.effort) else 100 * changes.effort,
                "effort": changes.effort,
                "before": older.effort,
                "changes": changes,
            }
        )
    return rows
