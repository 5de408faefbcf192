"""What the measured frames say together: by version of the model, by class, by fetch; and whether the loop pays."""

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sscloud.labels import VOID
from training.bootstrap import FEW_GROUPS, draws, interval
from training.effort_records import FrameEffort
from training.evaluate import clipped, shown_score

Standing = Literal["fell", "rose", "no difference shown", "too few", "nothing to compare"]

_VERSION: Final = re.compile(r"(.*) v(\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelChanges:
    """Pixels, of all labels or of one.

    Of one label, a pixel that got it from another label counts as `relabelled_to`, one that lost it to another as
    `relabelled`; of all labels together each re-labelled pixel counts once, in `relabelled`.
    """

    accepted: int = 0
    added: int = 0
    removed: int = 0
    relabelled: int = 0
    relabelled_to: int = 0

    @property
    def drawn(self) -> int:
        """Drawn by the model or by people."""
        return self.accepted + self.added + self.removed + self.relabelled + self.relabelled_to

    @property
    def effort(self) -> float:
        """Share of the drawn pixels that people changed, 0 to 1; NaN where nothing is drawn."""
        return 1 - self.accepted / self.drawn if self.drawn else math.nan

    def share(self, pixels: int) -> float:
        """Of the drawn pixels; NaN where nothing is drawn."""
        return pixels / self.drawn if self.drawn else math.nan

    @property
    def iou(self) -> float:
        """Of one label: of the pre-label with the result; NaN where neither has it."""
        return self.accepted / self.drawn if self.drawn else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class EffortRow:
    """Some frames together."""

    name: str
    """Title of a version, or what a fetch is called."""
    frames: int
    pixels: PixelChanges
    classes: Mapping[str, PixelChanges]
    """Label name → its pixels, in the order of the label ids."""
    kept: int
    changed: int
    deleted: int
    added: int
    """Shapes."""
    seconds: float | None
    """Mean time that people had a frame open; None where nobody knows."""
    timed: int
    """Frames of which it is known: CVAT says it of whole jobs, so all frames of a job have to be this version's."""

    @property
    def effort(self) -> float:
        """Share of the drawn pixels that people changed, 0 to 1; NaN where nothing is drawn."""
        return self.pixels.effort

    @property
    def miou(self) -> float:
        """Mean over the labels of the IoU of pre-label and result; NaN without labels."""
        values = [changes.iou for changes in self.classes.values() if changes.drawn]
        return sum(values) / len(values) if values else math.nan

    @property
    def touched(self) -> float:
        """Shapes that were changed, deleted or added, a frame."""
        return (self.changed + self.deleted + self.added) / self.frames


@dataclass(frozen=True, slots=True, kw_only=True)
class EffortChange:
    """From one version to the next."""

    before: EffortRow
    after: EffortRow
    value: float
    """Relative change of the effort: -0.4 when it fell by 40 %; NaN where the older version left nothing to do."""
    limits: tuple[float, float] | None
    """Low and high of the 95 % interval; None if there is none."""
    few: bool = False
    """Whether there are too few groups of panoramas for an interval."""

    @property
    def standing(self) -> Standing:
        """What can be said of it."""
        if math.isnan(self.before.effort) or math.isnan(self.after.effort):
            return "nothing to compare"
        if self.few:
            return "too few"
        if math.isnan(self.value):  # nothing was to do before
            return "rose" if self.after.effort > 0 else "no difference shown"
        low, high = self.limits or (-math.inf, math.inf)
        return "fell" if high < 0 else "rose" if low > 0 else "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class EffortSummary:
    """All of it."""

    models: tuple[EffortRow, ...] = ()
    """By name and version, older first."""
    cycles: tuple[EffortRow, ...] = ()
    """By fetch, in their order."""
    change: EffortChange | None = None
    """Between the last two versions of the name that was measured last; None if there are no two."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Why the pre-label of frames is not known → frames."""

    @property
    def frames(self) -> int:
        """Frames that were measured."""
        return sum(row.frames for row in self.models)

    @property
    def warning(self) -> bool:
        """Whether people should look into it: the newer version does not save more than the older one."""
        return self.change is not None and self.change.standing in ("rose", "no difference shown")

    @property
    def verdict(self) -> str:
        """What it comes to, in words."""
        return _verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: numbers that are not defined are null."""
        change = self.change
        return {
            "frames": self.frames,
            "models": [_row_json(row) for row in self.models],
            "cycles": [_row_json(row) for row in self.cycles],
            "unknown": dict(self.unknown),
            "change": None
            if change is None
            else {
                "before": change.before.name,
                "after": change.after.name,
                "value": _number(change.value),
                "limits": None if change.limits is None else [_number(limit) for limit in change.limits],
                "standing": change.standing,
            },
            "warning": self.warning,
            "verdict": self.verdict,
        }


def summarise_effort(records: Iterable[FrameEffort]) -> EffortSummary:
    """Put the records together; of each frame the last one counts.

    Args:
        records: in the order of measuring, as `read_effort` gives them.
    """
    newest: dict[tuple[str, int, int], FrameEffort] = {}
    for record in records:
        newest.pop(record.key, None)  # the order is that of the newest measurements
        newest[record.key] = record
    measured = [record for record in newest.values() if not record.unknown]
    by_model: dict[str, list[FrameEffort]] = {}
    by_fetch: dict[str, list[FrameEffort]] = {}
    for record in measured:
        by_model.setdefault(record.model, []).append(record)
        by_fetch.setdefault(record.snapshot, []).append(record)
    timed = _jobs_of_one_version(newest.values())
    rows = {title: _row(title, by_model[title], timed=timed) for title in _by_version(by_model)}
    return EffortSummary(
        models=tuple(rows.values()),
        cycles=tuple(
            _row(f"{number}: {max(record.fetched for record in found)[:10]}", found, timed=timed)
            for number, found in enumerate(by_fetch.values(), 1)
        ),
        change=_last_change(rows, by_model, last=measured[-1].model) if measured else None,
        unknown=dict(sorted(Counter(record.unknown for record in newest.values() if record.unknown).items())),
    )


def changes_of(record: FrameEffort) -> PixelChanges:
    """A frame's pixels, of all labels together."""
    return _together([record])


def _jobs_of_one_version(records: Iterable[FrameEffort]) -> frozenset[tuple[str, int]]:
    """Server and number of the jobs all of whose frames one version pre-labelled.

    Elsewhere the time of the job is also that of frames which were drawn by hand, or of another version's.
    """
    jobs: dict[tuple[str, int], list[FrameEffort]] = {}
    for record in records:
        jobs.setdefault((record.server, record.job), []).append(record)
    return frozenset(
        job
        for job, found in jobs.items()
        if len({record.model for record in found}) == 1
        and found[0].model
        and len(found) >= max(record.job_frames for record in found)
    )


def _row(name: str, records: Sequence[FrameEffort], *, timed: Container[tuple[str, int]]) -> EffortRow:
    times = [
        record.seconds for record in records if record.seconds is not None and (record.server, record.job) in timed
    ]
    names: dict[int, str] = {}
    for record in records:
        names |= {number: label for number, label in record.labels.items() if number not in (record.nothing, VOID)}
    return EffortRow(
        name=name,
        frames=len(records),
        pixels=_together(records),
        classes={names[number]: _of_label(records, number) for number in sorted(names)},
        kept=sum(record.kept for record in records),
        changed=sum(record.changed for record in records),
        deleted=sum(record.deleted for record in records),
        added=sum(record.added for record in records),
        seconds=sum(times) / len(times) if times else None,
        timed=len(times),
    )


def _together(records: Iterable[FrameEffort]) -> PixelChanges:
    accepted = added = removed = relabelled = 0
    for record in records:
        for (before, after), count in record.pixels.items():
            if before == after:
                accepted += count if before != record.nothing else 0
            elif before == record.nothing:
                added += count
            elif after == record.nothing:
                removed += count
            else:
                relabelled += count
    return PixelChanges(accepted=accepted, added=added, removed=removed, relabelled=relabelled)


def _of_label(records: Iterable[FrameEffort], label: int) -> PixelChanges:
    accepted = added = removed = lost = won = 0
    for record in records:
        for (before, after), count in record.pixels.items():
            if before == after == label:
                accepted += count
            elif before == label:
                removed, lost = (removed + count, lost) if after == record.nothing else (removed, lost + count)
            elif after == label:
                added, won = (added + count, won) if before == record.nothing else (added, won + count)
    return PixelChanges(accepted=accepted, added=added, removed=removed, relabelled=lost, relabelled_to=won)


# --- from one version to the next -------------------------------------------------------------------------------------


def _by_version(titles: Iterable[str]) -> list[str]:
    """Names in the order in which they came, the versions of each by number: v10 comes after v9."""
    found = list(titles)
    names = list(dict.fromkeys(_name_and_version(title)[0] for title in found))
    return sorted(found, key=lambda title: (names.index(_name_and_version(title)[0]), _name_and_version(title)[1]))


def _name_and_version(title: str) -> tuple[str, int]:
    found = _VERSION.fullmatch(title)
    return (found[1], int(found[2])) if found else (title, 0)


def _last_change(
    rows: Mapping[str, EffortRow], by_model: Mapping[str, Sequence[FrameEffort]], *, last: str
) -> EffortChange | None:
    """Between the last two versions of the name that `last` has; the rows are in the order of versions."""
    versions = [title for title in rows if _name_and_version(title)[0] == _name_and_version(last)[0]]
    if len(versions) < 2:
        return None
    before, after = (rows[title] for title in versions[-2:])
    records = [by_model[title] for title in versions[-2:]]
    few = any(len({record.group for record in side}) < FEW_GROUPS for side in records)
    return EffortChange(
        before=before,
        after=after,
        value=after.effort / before.effort - 1 if before.effort else math.nan,
        limits=None if few else _limits(*records),
        few=few,
    )


def _limits(before: Sequence[FrameEffort], after: Sequence[FrameEffort]) -> tuple[float, float] | None:
    """95 % interval of the relative change, by resampling the groups of each version's panoramas by themselves."""
    sides = []
    for seed, records in enumerate((before, after)):
        groups = [record.group for record in records]
        drawn = draws(groups, seed=seed)
        if drawn is None:
            return None
        sides.append(_resampled_effort(drawn, records))
    older, newer = sides
    with np.errstate(divide="ignore", invalid="ignore"):
        change = newer / older - 1
    low, high = interval(np.where(np.isfinite(change), change, np.nan)[:, None])[0].tolist()
    return None if math.isnan(low) else (low, high)


def _resampled_effort(drawn: NDArray[np.int64], records: Sequence[FrameEffort]) -> NDArray[np.float64]:
    changes = [changes_of(record) for record in records]
    parts = np.array([[each.drawn - each.accepted, each.drawn] for each in changes], np.float64)
    sums = drawn @ parts
    with np.errstate(divide="ignore", invalid="ignore"):
        effort: NDArray[np.float64] = sums[:, 0] / sums[:, 1]
    return effort


# --- in words and numbers ---------------------------------------------------------------------------------------------


def _verdict(summary: EffortSummary) -> str:
    change = summary.change
    if not summary.models:
        return "Nothing was measured yet: pre-label frames, correct them, complete their jobs and fetch."
    if change is None:
        row = summary.models[-1]
        return (
            f"{row.name}: people changed {percent(row.effort)} of what is drawn in {_frames(row.frames)}; drawing all "
            "of it by hand would be 100 %. There is no other version to compare with yet."
        )
    before, after = change.before, change.after
    facts = (
        f"people changed {percent(after.effort)} of what is drawn instead of {percent(before.effort)}, and touched "
        f"{after.touched:.1f} shapes a frame instead of {before.touched:.1f}"
    )
    between = f"from {before.name} ({_frames(before.frames)}) to {after.name} ({_frames(after.frames)})"
    limits = (
        "" if change.limits is None else f", 95 % interval {_signed(change.limits[0])} to {_signed(change.limits[1])}"
    )
    caution = "The frames are others, and may be easier or harder."
    match change.standing:
        case "fell":
            return f"Effort fell by {percent(-change.value)} {between}{limits}: {facts}. {caution}"
        case "rose":
            by = "" if math.isnan(change.value) else f" by {percent(change.value)}"
            return f"WARNING: effort rose{by} {between}{limits}: {facts}. {caution} Look at the newer version's work."
        case "no difference shown":
            return (
                f"WARNING: it is not shown that effort fell {between}{limits}: {facts}. {caution} More frames would "
                "tell."
            )
        case "too few":
            return f"Too few to say whether effort fell, {between}: {facts}. {caution} More frames would tell."
    return f"Nothing is drawn in the frames {between}: there is nothing to compare."


def percent(value: float) -> str:
    """A share of 0 to 1 with one digit; a dash where it is not defined."""
    return "—" if math.isnan(value) else f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _changes_json(changes: PixelChanges) -> dict[str, Any]:
    return {
        "accepted": changes.accepted,
        "added": changes.added,
        "removed": changes.removed,
        "relabelled": changes.relabelled,
        "relabelled_to": changes.relabelled_to,
        "effort": _number(changes.effort),
    }


def _row_json(row: EffortRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "frames": row.frames,
        "effort": _number(row.effort),
        "miou": _number(row.miou),
        "touched": _number(row.touched),
        "pixels": _changes_json(row.pixels),
        "classes": {
            name: _changes_json(changes) | {"iou": _number(changes.iou)} for name, changes in row.classes.items()
        },
        "shapes": {"kept": row.kept, "changed": row.changed, "deleted": row.deleted, "added": row.added},
        "seconds": _number(row.seconds),
        "timed": row.timed,
    }


_NAME_WIDTH = 28
"""Of names in tables; longer ones are cut."""
_VERSIONS = 6
"""Versions side by side in the table of labels: the newest ones."""


def effort_table(rows: Sequence[EffortRow], *, title: str) -> str:
    """Rows of a summary as a table for a terminal of 110 columns."""
    names = [clipped(row.name, _NAME_WIDTH) for row in rows]
    width = max([len(title), *map(len, names)])
    lines = [
        f"{title:{width}}  frames   effort  accepted     added   removed  re-labelled    IoU  touched  time a frame"
    ]
    for name, row in zip(names, rows, strict=True):
        pixels = row.pixels
        lines.append(
            f"{name:{width}}  {row.frames:>6}  {percent(row.effort):>7}  {percent(pixels.share(pixels.accepted)):>8}  "
            f"{percent(pixels.share(pixels.added)):>8}  {percent(pixels.share(pixels.removed)):>8}  "
            f"{percent(pixels.share(pixels.relabelled)):>11}  {shown_score(row.miou):>5}  {row.touched:>7.1f}  "
            f"{'—' if row.seconds is None else f'{row.seconds / 60:.1f} min':>12}"
        )
    return "\n".join(lines)


def label_table(row: EffortRow) -> str:
    """The labels of one version as a table for a terminal of 110 columns; shares are of each label's drawn pixels."""
    names = [clipped(name, _NAME_WIDTH) for name in row.classes]
    title = clipped(row.name, _NAME_WIDTH)
    width = max([len(title), *map(len, names)])
    lines = [f"{title:{width}}   effort  accepted     added   removed  to another  from another    IoU"]
    for name, changes in zip(names, row.classes.values(), strict=True):
        lines.append(
            f"{name:{width}}  {percent(changes.effort):>7}  {percent(changes.share(changes.accepted)):>8}  "
            f"{percent(changes.share(changes.added)):>8}  {percent(changes.share(changes.removed)):>8}  "
            f"{percent(changes.share(changes.relabelled)):>10}  {percent(changes.share(changes.relabelled_to)):>12}  "
            f"{shown_score(changes.iou):>5}"
        )
    return "\n".join(lines)


def class_table(summary: EffortSummary) -> str:
    """The effort of each label and version as a table for a terminal: of its pixels, the share that people changed."""
    rows = summary.models[-_VERSIONS:]
    labels = list(dict.fromkeys(name for row in rows for name in row.classes))
    names = [clipped(name, _NAME_WIDTH) for name in labels]
    titles = [clipped(row.name, _NAME_WIDTH) for row in rows]
    width = max([len("Effort by label"), *map(len, names)])
    lines = ["  ".join([f"{'Effort by label':{width}}", *(f"{title:>8}" for title in titles)])]
    for label, name in zip(labels, names, strict=True):
        cells = [percent(row.classes[label].effort) if label in row.classes else "—" for row in rows]
        columns = (f"{cell:>{max(8, len(title))}}" for cell, title in zip(cells, titles, strict=True))
        lines.append("  ".join([f"{name:{width}}", *columns]))
    return "\n".join(lines)
