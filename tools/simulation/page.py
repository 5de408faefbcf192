"""simulation.html: what the rounds show, for people; one file that needs no network."""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sscloud import __version__
from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from tools.simulation.results import Round, Simulation
from training.effort_summary import EffortRow
from training.oracle import Person
from training.page import (
    NOTHING,
    compare_maps,
    hex_color,
    jpeg_uri,
    line_chart,
    plural,
    render,
    score_text,
    seconds_text,
)
from training.pictures import percent


def write_simulation_page(path: Path, simulation: Simulation) -> None:
    """Write the page, atomically."""
    atomic_write(path, render_simulation_page(simulation).encode("utf-8"))


def render_simulation_page(simulation: Simulation) -> str:
    """The page as text."""
    rounds = simulation.rounds
    return render(
        "simulation.html.j2",
        report={"version": __version__, "created": datetime.now(UTC)},
        cards=_cards(simulation),
        charts=_charts(rounds),
        rounds=[_row(each) for each in rounds],
        iou=_by_class(rounds[1:], simulation.schema, _iou_of, score_text),
        effort=_by_class(rounds, simulation.schema, _effort_of, _percent),
        models=[each.model for each in rounds],
        look=_pictures(simulation),
        person=Person(),
        facts=_facts(simulation),
    )


def _cards(simulation: Simulation) -> list[dict[str, str]]:
    first, last = simulation.rounds[1], simulation.rounds[-1]
    return [
        {
            "name": "mIoU on the test panoramas",
            "value": f"{score_text(first.metrics.get('miou'))} → {score_text(last.metrics.get('miou'))}",
            "note": f"{first.model} to {last.model}, the same panoramas for all; none is ever trained on",
        },
        {
            "name": "of what is drawn, changed by people",
            "value": f"{100 * _share(first.same):.1f} → {_percent(_share(last.same))}",
            "note": "on the test panoramas; without a model it is 100 %",
        },
        {
            "name": "panoramas labelled",
            "value": str(last.labelled + (last.effort.frames if last.effort else 0)),
            "note": f"{plural(simulation.config.count, 'panorama')} a round, chosen by the loop",
        },
        {
            "name": "the whole simulation",
            "value": seconds_text(simulation.seconds),
            "note": f"{plural(len(simulation.rounds) - 1, 'round')}, sampling and training included",
        },
    ]


def _charts(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Curves over the panoramas that the model had to learn from."""
    history = [
        {
            "epoch": each.labelled,
            "miou": each.metrics.get("miou", math.nan),
            "changed": 100 * _share(each.effort),
            "same": 100 * _share(each.same),
            "touched": math.nan if each.effort is None else each.effort.touched,
            "same_touched": math.nan if each.same is None else each.same.touched,
            "minutes": each.seconds / 60,
            "same_minutes": each.same_seconds / 60,
        }
        for each in rounds
    ]
    both = ("panoramas of the round", "test panoramas")
    charts = [
        line_chart("Quality: mIoU on the test panoramas", history, {"miou": "mIoU"}, top=1.0),
        line_chart(
            "Effort: per cent of what is drawn, changed by people",
            history,
            dict(zip(("changed", "same"), both, strict=True)),
            top=100,
            digits=".1f",
        ),
        line_chart(
            "Effort: shapes touched in a panorama",
            history,
            dict(zip(("touched", "same_touched"), both, strict=True)),
            digits=".0f",
        ),
        line_chart(
            "Effort: minutes for a panorama, by the model of a person",
            history,
            dict(zip(("minutes", "same_minutes"), both, strict=True)),
            digits=".1f",
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _row(found: Round) -> dict[str, Any]:
    effort = found.effort
    return {
        "number": found.number,
        "model": found.model,
        "labelled": found.labelled,
        "miou": score_text(found.metrics.get("miou")),
        "gate": {None: "", True: "accepted", False: f"{found.challenger} refused"}[found.accepted],
        "reasons": found.reasons,
        "effort": _percent(_share(effort)),
        "same": _percent(_share(found.same)),
        "touched": NOTHING if effort is None else f"{effort.touched:.0f}",
        "minutes": f"{found.seconds / 60:.1f}",
        "agreement": percent(found.agreement),
        "took": seconds_text(found.took),
    }


def _by_class(
    rounds: Sequence[Round],
    schema: LabelSchema,
    value_of: Callable[[Round, str], float],
    shown: Callable[[float], str],
) -> list[dict[str, Any]]:
    """A row a label: `name`, `color`, and the `values` of the rounds as texts."""
    rows = []
    for label in schema.classes:
        values = [value_of(each, label.name) for each in rounds]
        if any(map(math.isfinite, values)):
            rows.append(
                {"name": label.name, "color": hex_color(label.color), "values": [shown(value) for value in values]}
            )
    return rows


def _iou_of(found: Round, name: str) -> float:
    return found.metrics.get(f"iou/{name}", math.nan)


def _effort_of(found: Round, name: str) -> float:
    row = found.same or found.effort
    changes = row.classes.get(name) if row is not None else None
    return changes.effort if changes is not None else math.nan


def _pictures(simulation: Simulation) -> dict[str, Any]:
    """The test panorama with the truth and what each model made of it."""
    look, schema = simulation.look, simulation.schema
    compared = [
        (title, compare_maps(look.image, look.truth, prediction, schema)) for title, prediction in look.predictions
    ]
    _, first = compared[0]
    pictures = [("The panorama", "normals as colours", first.image)]
    pictures += [(title, "", found.prediction) for title, found in compared]
    pictures += [("The truth", "", first.truth)]
    height, width = first.image.shape[:2]
    return {
        "name": look.name,
        "width": width,
        "height": height,
        "pictures": [{"title": title, "note": note, "source": jpeg_uri(picture)} for title, note, picture in pictures],
        "legend": [{"name": row.name, "color": hex_color(row.color)} for row in first.legend],
    }


def _facts(simulation: Simulation) -> dict[str, dict[str, str]]:
    config, plan = simulation.config, simulation.config.scenes
    settings = [f"{key}={value}" for key, value in config.flags.items()]
    return {
        "loop": {
            "server": simulation.server,
            "a round": plural(config.count, "panorama"),
            "network": f"base width {config.base_width}, scale {config.scale:g}",
            "epochs": f"{config.epochs}, then {config.finetune_epochs} from the champion on",
            "other settings": ", ".join([*settings, *config.settings]) or NOTHING,
        },
        "scenes": {
            "seed": str(plan.seed),
            "size": f"{plan.width} pixels wide",
            "test": f"{plan.test_sites} sites, a panorama each",
            "labelled by hand": f"{plan.seed_sites} sites, {plural(plan.seed_scans, 'panorama')} each",
            "to choose from": f"{plural(plan.pool, 'panorama')}, {plan.pool_scans} a site",
        },
    }


def _share(row: EffortRow | None) -> float:
    return math.nan if row is None else row.effort


def _percent(value: float) -> str:
    return NOTHING if not math.isfinite(value) else f"{100 * value:.1f} %"
