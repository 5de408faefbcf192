"""The report of a cycle: one self-contained page about what came in, what was learned, and what people do next.

The layout is in `templates/cycle.html.j2`; gate.html and select.html of the same folder are linked.
"""

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sscloud import __version__
from sscloud.files import atomic_write
from training.export import METRICS
from training.gate import PAGE as GATE_PAGE
from training.journal import Journal
from training.page import line_chart, plural, render, score_text, seconds_text
from training.pictures import percent
from training.run_report import REPORT, read_history
from training.selection import PAGE as SELECTION_PAGE

_FEW = 2
"""Cycles from which on there is a line to draw."""


def write_cycle_page(path: Path, journal: Journal, journals: Sequence[Journal], *, run: Path) -> None:
    """Write the page, atomically.

    Args:
        path: the HTML file, in the cycle's folder.
        journal: of this cycle, all steps but the report over.
        journals: of all cycles of the workspace, oldest first.
        run: the folder of its training.
    """
    gate, deployed, folder = journal.step("gate").facts, journal.step("deploy"), path.parent
    pages = {"gate": folder / GATE_PAGE, "select": folder / SELECTION_PAGE, "run": run / REPORT}
    page = render(
        "cycle.html.j2",
        report={"version": __version__, "created": datetime.now(UTC)},
        number=journal.number,
        headline=verdict(journal),
        accepted=deployed.state == "done",
        cards=_cards(journal),
        names=journal.step("check").facts["names"],
        problems=[*journal.step("fetch").facts["left_out"], *journal.step("prelabel").facts.get("failed", [])],
        reasons=gate["reasons"],
        links={name: _link(page, folder) for name, page in pages.items()},
        chosen=journal.step("select").facts.get("frames", []),
        jobs=journal.step("select").facts.get("jobs", []),
        training=_training_charts(run / METRICS, journal),
        steps=[
            {
                "name": step.name,
                "state": step.state,
                "seconds": seconds_text(step.seconds),
                "text": step.facts.get("text", step.error or ""),
            }
            for step in journal.steps
            if step.name != "report"
        ],
        loop=_loop_charts(journals),
    )
    atomic_write(path, page.encode())


def _link(page: Path, folder: Path) -> str | None:
    """Where a page is, as seen from a folder; None where there is none."""
    return Path(os.path.relpath(page, folder)).as_posix() if page.is_file() else None


def _cards(journal: Journal) -> list[dict[str, str]]:
    check, gate, effort = (journal.step(name).facts for name in ("check", "gate", "effort"))
    splits = journal.step("fetch").facts["splits"]
    cards = [
        {
            "value": str(check["new"]),
            "name": "new or corrected panoramas",
            "note": f"{splits.get('train', 0)} to learn from in all, {check['test']} to measure on",
        },
        {
            "value": score_text(_miou(serving_metrics(journal))),
            "name": "mIoU of the champion",
            "note": f"on {plural(gate['panoramas'], 'test panorama')}; "
            f"of the one before {score_text(_miou(gate['champion_metrics']))}",
        },
    ]
    if "changed" in effort:
        cards.append(
            {
                "value": percent(effort["changed"]),
                "name": "of what is drawn was changed",
                "note": f"by people, in {plural(effort['frames'], 'panorama')} that had pre-labels",
            }
        )
    cards.append(
        {
            "value": seconds_text(sum(step.seconds for step in journal.steps)),
            "name": "all steps together",
            "note": f"of these, training {seconds_text(journal.step('train').seconds)}",
        }
    )
    return cards


def verdict(journal: Journal) -> str:
    """What became of the trained model, in a sentence."""
    gate, deploy = journal.step("gate").facts, journal.step("deploy")
    if deploy.state == "done":
        return f"{deploy.facts['text']}."
    return f"{deploy.error}." if gate["accepted"] else str(gate["headline"])


def serving_metrics(journal: Journal) -> Mapping[str, Any]:
    """On the test panoramas, of the model that served after a cycle; empty where there was none, or none was measured.

    Args:
        journal: of a cycle that has come past the gate.
    """
    gate, deploy = journal.step("gate").facts, journal.step("deploy")
    if deploy.state == "done":
        return dict(gate.get("metrics", {}))
    # Somebody else's model may have become the champion after the gate.
    measured = deploy.facts.get("champion", gate.get("champion")) == gate.get("champion")
    return dict(gate.get("champion_metrics", {})) if measured else {}


def _miou(metrics: Mapping[str, Any]) -> float | None:
    value = metrics.get("miou")
    return float(value) if isinstance(value, int | float) else None


def _training_charts(metrics: Path, journal: Journal) -> list[dict[str, Any]]:
    history = read_history(metrics)
    mark = journal.step("train").facts["best_epoch"]
    found = (
        line_chart("Loss", history, {"train_loss": "training"}, mark=mark),
        line_chart("mIoU, validation part", history, {"miou": "mIoU"}, top=1.0, mark=mark),
    )
    return [chart for chart in found if chart is not None]


def _loop_charts(journals: Sequence[Journal]) -> list[dict[str, Any]]:
    """Quality and effort over the cycles that have made a model."""
    rows = []
    for journal in journals:
        if journal.step("register").state != "done":
            continue
        effort = journal.step("effort").facts
        rows.append(
            {
                "epoch": float(journal.number),
                "champion": _number(_miou(serving_metrics(journal))),
                "challenger": _number(_miou(journal.step("gate").facts.get("metrics", {}))),
                "changed": _number(effort.get("changed")),
                "touched": _number(effort.get("touched")),
            }
        )
    if len(rows) < _FEW:
        return []
    found = (
        line_chart("mIoU on the test panoramas", rows, {"champion": "champion", "challenger": "trained"}, top=1.0),
        line_chart("Share of what is drawn that people changed", rows, {"changed": "changed"}),
        line_chart("Shapes that people touched, a panorama", rows, {"touched": "touched"}, digits=".1f"),
    )
    return [chart for chart in found if chart is not None]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
