"""The gate: may a challenger take the champion's place?

Both are measured on the same frozen test panoramas, now, and the challenger passes only if all of this holds:

* overall it is not worse: a one-sided bound of the paired bootstrap difference of mIoU lies above `-margin` (a
  non-inferiority test; resamples as in `training.bootstrap`, percentiles as in Efron and Tibshirani, 1993);
* no class falls by more than its floor;
* it has learned from none of the panoramas;
* its weights and its answers are numbers.

Only classes that both models know and that the masks hold are judged. Pixels whose true class only one of them knows
are left out for both: the old model cannot find what it was never shown, and the new one gets no credit for it here.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sscloud import __version__
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model
from sscloud.errors import BundleError, ConfigError, DatasetError
from sscloud.files import atomic_write
from sscloud.inference import Predictor
from sscloud.labels import VOID, Label, LabelSchema
from training.bootstrap import FEW_GROUPS, RESAMPLES, draws, groups_of, interval
from training.compare import Comparison, Difference, compare
from training.dataset import DatasetFolder, digest, open_dataset
from training.evaluate import DamagedModelError, Evaluation, Gauge, evaluate, json_number, json_numbers
from training.metrics import mean_present, overlaps, score, tallies
from training.page import NOTHING, hex_color, jpeg_data_uri, plural, render, score_text
from training.pictures import figure

if TYPE_CHECKING:
    from training.registry import ModelVersion

PAGE = "gate.html"

_NAMES = 3
"""Of panoramas, named in a reason."""

_WORST = 5
"""Panoramas that are drawn of a model that nobody is compared with."""
_JPEG_QUALITY = 88

Standing = Literal[
    "judged", "not in the masks", "only the champion knows it", "only the challenger knows it", "nobody knows it"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRules:
    """What a challenger must keep to.

    Raises:
        ConfigError: a value that is out of range.
    """

    margin: float = 0.01
    """Of mIoU: by so much the challenger may be worse as far as the panoramas tell."""
    level: float = 0.95
    """Of the one-sided bound."""
    floor: float = 0.05
    """Of the IoU of a class: by so much it may fall."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """By label name, for classes with a floor of their own."""
    min_groups: int = 5
    """Groups of test panoramas without which nothing is accepted in a champion's place.

    A resample is never worse than the worst group drawn over and over, so neither is the bound, whatever the level. The
    worst of n groups lies below the median of all groups with a probability of 1 - 2^-n only: 75 % of two groups, 88 %
    of three, 94 % of four, 97 % of five. With fewer than five no bound means 95 %.
    """

    def __post_init__(self) -> None:
        for name, value in (("margin", self.margin), ("floor", self.floor), *self.floors.items()):
            if not 0 <= value <= 1:
                raise ConfigError(f"The gate's {name} must lie between 0 and 1, found {value}.")
        if not 0.5 <= self.level < 1:
            raise ConfigError(f"The gate's level must be at least 0.5 and below 1, found {self.level}.")
        if self.min_groups < 2:
            raise ConfigError(f"The gate's min_groups must be 2 or above, found {self.min_groups}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChange:
    """What becomes of one class."""

    label: Label
    standing: Standing
    """Only a class that is judged can refuse a challenger."""
    champion: float
    """IoU; NaN where it is not defined."""
    challenger: float
    difference: Difference
    """Challenger's minus champion's, with its 95 % interval."""
    floor: float
    """By so much it may fall."""

    @property
    def is_kept(self) -> bool:
        """Whether the class keeps to its floor, or is not judged; a difference that is no number keeps to none."""
        return self.standing != "judged" or self.difference.value >= -self.floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a challenger becomes the champion, and why."""

    accepted: bool
    reasons: tuple[str, ...]
    """A sentence each, also for what speaks for it."""
    champion: str | None
    """Title; None where there is none."""
    challenger: str
    test_snapshot: str
    panoramas: int
    metrics: dict[str, float]
    """The challenger's on all classes: of `Evaluation.summary`, and `iou/<label name>`; none if it is damaged."""
    champion_metrics: dict[str, float]
    comparison: Comparison | None = None
    """Of all classes; A is the champion. None where there is nobody to compare with, or nothing to compare."""
    bound: float | None = None
    """The difference of mIoU lies above it with the rules' level; None where it could not be computed."""
    miou: float | None = None
    """The challenger's, over the judged classes."""
    champion_miou: float | None = None
    """The champion's, over the same classes; without one, that of the most frequent class everywhere."""
    difference: Difference | None = None
    """Of the two, with its 95 % interval."""
    classes: tuple[ClassChange, ...] = ()
    refusals: tuple[str, ...] = ()
    """Those of the reasons for which it is refused."""
    warnings: tuple[str, ...] = ()
    """Those of the reasons that only warn."""
    groups: int = 0
    """Of panoramas: what is resampled."""
    rules: GateRules = field(default_factory=GateRules)
    alone: Evaluation | None = None
    """The challenger's, where there is nobody to compare it with."""
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What the models' bundles say of themselves: title → name → value."""

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        if not self.accepted:
            return f"{self.challenger} is refused" + (f": {self.champion} stays." if self.champion else ".")
        return f"{self.challenger} may become the champion" + (
            f" in place of {self.champion}." if self.champion else "."
        )

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON types, null where a number is not defined; without the counts of single panoramas."""
        difference = self.difference
        return {
            "accepted": self.accepted,
            "headline": self.headline,
            "reasons": list(self.reasons),
            "refusals": list(self.refusals),
            "warnings": list(self.warnings),
            "champion": self.champion,
            "challenger": self.challenger,
            "test_snapshot": self.test_snapshot,
            "panoramas": self.panoramas,
            "groups": self.groups,
            "rules": {
                "margin": self.rules.margin,
                "level": self.rules.level,
                "floor": self.rules.floor,
                "floors": dict(self.rules.floors),
                "min_groups": self.rules.min_groups,
            },
            "miou": _number(self.miou),
            "champion_miou": _number(self.champion_miou),
            "difference": json_number(difference.value) if difference else None,
            "interval": json_numbers(difference.limits) if difference and difference.limits else None,
            "bound": _number(self.bound),
            "classes": [
                {
                    "id": change.label.id,
                    "name": change.label.name,
                    "standing": change.standing,
                    "champion": json_number(change.champion),
                    "challenger": json_number(change.challenger),
                    "difference": json_number(change.difference.value),
                    "interval": json_numbers(change.difference.limits) if change.difference.limits else None,
                    "floor": change.floor,
                    "kept": change.is_kept,
                }
                for change in self.classes
            ],
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
            "champion_metrics": {name: json_number(value) for name, value in self.champion_metrics.items()},
        }


def _number(value: float | None) -> float | None:
    return None if value is None else json_number(value)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_part(dataset: Path, *, labels: Path | None = None) -> DatasetFolder:  # noqa: PT028 - no test
    """The frozen test panoramas of a data set.

    Args:
        dataset: its folder.
        labels: a label schema in place of the data set's own.

    Raises:
        DatasetError: there are none, or the data set cannot be used.
        SchemaError: the label schema is wrong.
    """
    whole = open_dataset(dataset, labels=labels)
    items = tuple(item for item in whole.items if item.split == "test")
    if not items:
        raise DatasetError(
            f"{dataset} has no frozen test panoramas, and a model cannot be judged by those it learned from. "
            "`sscloud fetch` and `sscloud convert` set a test part aside when they first write a data set with enough "
            "groups (--test, --group-by); frames of ground-truth jobs become one with --ground-truth test."
        )
    return replace(whole, items=items)


def test_snapshot(test: DatasetFolder) -> str:
    """Identity of test panoramas: hashed from their names, their files and their labels, whatever their order.

    Raises:
        DatasetError: a file is not the one that the manifest names.
    """
    return _snapshot(test.schema, _digests(test))


def _digests(test: DatasetFolder) -> dict[str, str]:
    return {item.name: digest(item) for item in test.items}


def _snapshot(schema: LabelSchema, digests: Mapping[str, str]) -> str:
    labels = json.dumps(schema.to_dict(), ensure_ascii=False, sort_keys=True)
    lines = [labels, *sorted(f"{name} {sha256}" for name, sha256 in digests.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def too_few_groups(test: DatasetFolder, rules: GateRules, *, group_by: str | None = None) -> str | None:
    """Why a comparison on these panoramas decides nothing, and what to do, in sentences; None where it does.

    Args:
        test: of `test_part`.
        rules: of the gate.
        group_by: what is resampled together; see `training.bootstrap.groups_of`.
    """
    groups = len(set(groups_of(test, group_by).values()))
    if groups >= rules.min_groups:
        return None
    of = "one group" if groups == 1 else f"only {groups} groups"
    return (
        f"The {plural(len(test.items), 'test panorama')} are of {of}, and the gate asks for {rules.min_groups}: with "
        "fewer it cannot tell a loss from chance. Fetch tasks of other sites (some of them join the test part), say "
        "what a group is (--group-by), or set the gate's min_groups lower (2 at least) and take that risk."
    )


def says_little(panoramas: int, groups: int, rules: GateRules) -> str | None:
    """A warning for a first model, in sentences; None where there is enough to measure it on.

    Args:
        panoramas: of the test part.
        groups: of these panoramas.
        rules: of the gate.
    """
    if groups >= rules.min_groups:
        return None
    return (
        f"There {'is' if panoramas == 1 else 'are'} only {plural(panoramas, 'test panorama')}, of "
        f"{plural(groups, 'group')} (sites, as a rule): what a first model scores on them says almost nothing of other "
        f"places. Label more sites before you rely on it; its successor needs {rules.min_groups} groups."
    )


# --- the decision -----------------------------------------------------------------------------------------------------


class _Reasons:
    """Sentences in the order in which they were found, each with what it means."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.refusals: list[str] = []
        self.warnings: list[str] = []

    def judge(self, text: str, *, kept: bool) -> None:
        """A point that decides."""
        self.all.append(text)
        if not kept:
            self.refusals.append(text)

    def warn(self, text: str) -> None:
        """Something to know."""
        self.all.append(text)
        self.warnings.append(text)

    def decided(self) -> dict[str, Any]:
        """As fields of a `Decision`."""
        return {
            "accepted": not self.refusals,
            "reasons": tuple(self.all),
            "refusals": tuple(self.refusals),
            "warnings": tuple(self.warnings),
        }


def decide(
    champion: ModelBundle | None,
    challenger: ModelBundle,
    test: DatasetFolder,
    *,
    rules: GateRules | None = None,
    device: str = "auto",
    group_by: str | None = None,
    earlier: Iterable["ModelVersion"] = (),
    picture: Callable[[str, bytes], None] | None = None,
) -> Decision:
    """Measure both on the same panoramas, and decide.

    Without a champion, or with one that gives no numbers any more, the challenger has to beat the trivial answer: the
    most frequent class everywhere.

    Args:
        champion: the model that serves; None for the first one.
        challenger: the model that would take its place.
        test: panoramas that neither has learned from, of `test_part`.
        rules: None for the defaults.
        device: see `sscloud.inference.Predictor`.
        group_by: what is resampled together; see `training.bootstrap.groups_of`.
        earlier: former champions; where one of them scored clearly better on these panoramas, a warning says so: each
            of many challengers may lose the margin.
        picture: told the name and the JPEG of each of the panoramas on which the two differ most; where there is
            nobody to compare with, of those that the challenger is worst at.

    Raises:
        ConfigError: floors for labels that nobody knows.
        SchemaError: ids that have different names in the bundles and the data set, or that nobody knows.
        DatasetError: panoramas that the models cannot be measured on, or masks that are void all over.
        ImageError: unreadable files.
    """
    rules = rules or GateRules()
    bundles = {"Champion": champion, "Challenger": challenger} if champion else {"Challenger": challenger}
    floors = _floors(rules, test, list(bundles.values()))
    digests = _digests(test)
    about: dict[str, Any] = {
        "champion": champion.manifest.title if champion else None,
        "challenger": challenger.manifest.title,
        "test_snapshot": _snapshot(test.schema, digests),
        "panoramas": len(test.items),
        "groups": len(set(groups_of(test, group_by).values())),
        "rules": rules,
        "facts": {f"{role}: {bundle.manifest.title}": _facts(bundle) for role, bundle in bundles.items()},
    }
    reasons = _Reasons()
    judged: dict[str, Any] = {"metrics": {}, "champion_metrics": {}}
    try:
        _require_whole(challenger)
        opponent = champion
        if champion is not None:
            try:
                _require_whole(champion)
                comparison = compare(champion, challenger, test, device=device, group_by=group_by, picture=picture)
                judged = _judge_pair(
                    comparison,
                    (champion, challenger),
                    rules,
                    floors,
                    reasons,
                    too_few=too_few_groups(test, rules, group_by=group_by),
                )
            except DamagedModelError as error:
                if error.path == challenger.path:
                    raise
                reasons.warn(f"The champion is damaged, so there is nothing to compare with. {error}")
                opponent = None
        if opponent is None:
            alone = evaluate(challenger, test, device=device, group_by=group_by)
            judged = _judge_first(alone, reasons)
            if (little := says_little(about["panoramas"], about["groups"], rules)) is not None:
                reasons.warn(little)
            if picture is not None:
                _draw_worst(challenger, test, alone, device=device, picture=picture)
    except DamagedModelError as error:
        reasons.judge(f"The challenger is damaged. {error}", kept=False)
    else:
        reasons.judge("All its weights are numbers, and so are all its answers.", kept=True)
    _judge_learned(bundles, digests, reasons)
    _tell_decline(judged["metrics"], about["test_snapshot"], earlier, rules, reasons)
    return Decision(**about, **judged, **reasons.decided())


def _require_whole(bundle: ModelBundle) -> None:
    """Refuse weights that cannot be loaded, or are no numbers.

    Raises:
        DamagedModelError: they are.
    """
    try:
        load_model(bundle)
    except BundleError as error:
        raise DamagedModelError(str(error), path=bundle.path) from error


def _floors(rules: GateRules, test: DatasetFolder, bundles: Sequence[ModelBundle]) -> dict[int, float]:
    """Floors of their own by label id."""
    schemas = [test.schema, *(bundle.manifest.labels for bundle in bundles)]
    floors: dict[int, float] = {}
    unknown = []
    for name, floor in rules.floors.items():
        found = [label for schema in schemas if (label := schema.find(name)) is not None]
        if not found:
            unknown.append(name)
        floors |= {label.id: floor for label in found}
    if unknown:
        known = dict.fromkeys(label.name for schema in schemas for label in schema.labels)
        raise ConfigError(f"Floors are set for {', '.join(map(repr, unknown))}, but the labels are {', '.join(known)}.")
    return floors


def _judge_pair(
    comparison: Comparison,
    bundles: tuple[ModelBundle, ModelBundle],
    rules: GateRules,
    floors: Mapping[int, float],
    reasons: _Reasons,
    *,
    too_few: str | None,
) -> dict[str, Any]:
    """The points that two models are compared by → fields of a `Decision`."""
    sides = comparison.a, comparison.b
    labels = comparison.a.labels
    knows = [_known_ids(bundle) for bundle in bundles]
    both = knows[0] & knows[1]
    # Rows of classes that only one knows are left out: their pixels are void for both. Columns stay: whoever takes
    # a pixel of a common class for one of those is wrong.
    common = [index for index, label in enumerate(labels) if label.id in both]
    counts = [_of_classes(np.stack([one.confusion for one in side.panoramas]), common) for side in sides]
    totals = [counted.sum(0) for counted in counts]
    held = [place for place in range(len(common)) if totals[0][place].sum()]
    scores = [score(total, [labels[index].id for index in common]).iou for total in totals]
    drawn = draws([one.group for one in comparison.a.panoramas])
    resampled = _resampled_ious(drawn, counts) if drawn is not None else None
    judged = {common[place] for place in held}
    place_of = {index: place for place, index in enumerate(common)}

    changes = []
    for index, label in enumerate(labels):
        if index in place_of:
            place = place_of[index]
            champion, challenger = float(scores[0][place]), float(scores[1][place])
            limits = _limits(resampled[1][:, place] - resampled[0][:, place]) if resampled is not None else None
        else:
            champion, challenger = (float(side.scores.iou[index]) for side in sides)
            limits = None
        changes.append(
            ClassChange(
                label=label,
                standing=_standing(label, index in judged, *knows),
                champion=champion,
                challenger=challenger,
                difference=Difference(value=challenger - champion, limits=limits),
                floor=floors.get(label.id, rules.floor),
            )
        )

    mious = [float(values[held].mean()) if held else math.nan for values in scores]
    bound, limits = None, None
    if resampled is not None:
        differences = mean_present(resampled[1]) - mean_present(resampled[0])
        known = differences[~np.isnan(differences)]
        bound = float(np.percentile(known, 100 * (1 - rules.level))) if len(known) else math.nan
        limits = _limits(differences)
    difference = Difference(value=mious[1] - mious[0], limits=limits)
    groups = len({one.group for one in comparison.a.panoramas})
    _judge_overall(mious, len(held), bound, groups, rules, reasons, too_few=too_few)
    _judge_classes([change for change in changes if change.standing == "judged"], reasons)
    _tell_the_rest(changes, reasons)
    return {
        "metrics": _metrics(comparison.b),
        "champion_metrics": _metrics(comparison.a),
        "comparison": comparison,
        "bound": bound,
        "champion_miou": mious[0],
        "miou": mious[1],
        "difference": difference,
        "classes": tuple(changes),
    }


def _known_ids(bundle: ModelBundle) -> set[int]:
    """Ids of the labels that a model can find."""
    manifest = bundle.manifest
    return set(manifest.label_ids) - manifest.labels.void_ids


def _of_classes(confusions: NDArray[np.int64], classes: Sequence[int]) -> NDArray[np.int64]:
    """(panoramas, n, m) → (panoramas, k, m): the rows of these classes, their columns first."""
    rest = [column for column in range(confusions.shape[2]) if column not in classes]
    return confusions[:, classes][:, :, [*classes, *rest]]


def _resampled_ious(
    drawn: NDArray[np.int64], counts: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU of both in each resample, (resamples, k) each; NaN where the resample's masks lack the class.

    So the means of both run over the same classes: a class that a resample has by mistake only is none.
    """
    sides = []
    for counted in counts:
        parts = np.stack(tallies(counted), axis=1)
        sums = drawn.astype(np.float64) @ parts.reshape(len(parts), -1)
        hit, true, predicted = np.moveaxis(sums.reshape(len(drawn), 3, -1), 1, 0)
        sides.append(np.where(true > 0, overlaps(hit, true, predicted)[0], np.nan))
    return sides[0], sides[1]


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = interval(values).tolist()
    return low, high


def _standing(label: Label, judged: bool, champion: set[int], challenger: set[int]) -> Standing:  # noqa: FBT001
    if judged:
        return "judged"
    if label.id in champion & challenger:
        return "not in the masks"
    if label.id in champion:
        return "only the champion knows it"
    return "only the challenger knows it" if label.id in challenger else "nobody knows it"


def _judge_overall(
    mious: Sequence[float],
    classes: int,
    bound: float | None,
    groups: int,
    rules: GateRules,
    reasons: _Reasons,
    *,
    too_few: str | None,
) -> None:
    before, after = mious
    what = f"mIoU of the {classes} judged classes" if classes > 1 else "IoU of the only judged class"
    change = f"{what} {score_text(before)} → {score_text(after)} ({after - before:+.3f})"
    if math.isnan(after - before):
        reasons.judge(
            "The masks hold no class that both models know, so there is nothing to compare by. Give renamed labels "
            "their old names as aliases in labels.yaml.",
            kept=False,
        )
        return
    if too_few is not None or bound is None:  # there is a bound of two groups and more
        reasons.judge(f"{change}, but that decides nothing. {too_few}", kept=False)
        return
    if bound > -rules.margin:
        text = "Overall it is not worse"
    elif after >= before:
        text = "Overall it cannot be shown not to be worse"
    else:
        text = "Overall it may be worse"
    reasons.judge(
        f"{text}: {change}; with {rules.level:.0%} confidence the difference is above {bound:+.3f}, and the gate asks "
        f"for more than {-rules.margin:+.3f}.",
        kept=bound > -rules.margin,
    )
    if groups < FEW_GROUPS:
        reasons.warn(
            f"There are only {groups} groups of test panoramas: with fewer than {FEW_GROUPS} the confidence is "
            "overstated."
        )


def _judge_classes(changes: Sequence[ClassChange], reasons: _Reasons) -> None:
    for change in changes:
        if not change.is_kept:
            reasons.judge(
                f"{change.label.name} falls too far: IoU {score_text(change.champion)} → "
                f"{score_text(change.challenger)} ({change.difference.value:+.3f}); it may fall by {change.floor:.3f}.",
                kept=False,
            )
    if changes and all(change.is_kept for change in changes):
        worst = min(changes, key=lambda change: change.difference.value)
        fall = (
            f"the largest fall is that of {worst.label.name}, {worst.difference.value:+.3f} of {-worst.floor:+.3f}"
            if worst.difference.value < 0
            else "none falls at all"
        )
        reasons.judge(f"No class falls by more than its floor: {fall}.", kept=True)


def _tell_the_rest(changes: Sequence[ClassChange], reasons: _Reasons) -> None:
    """Classes that are not judged, and why."""
    for standing, what in _NOT_JUDGED.items():
        if names := [change.label.name for change in changes if change.standing == standing]:
            reasons.warn(f"Not judged, because {what}: {', '.join(names)}.")


_NOT_JUDGED: dict[Standing, str] = {
    "not in the masks": "the test panoramas' masks do not hold them",
    "only the challenger knows it": "the champion does not know them (pixels of them are left out for both)",
    "only the champion knows it": "the challenger does not know them (pixels of them are left out for both)",
    "nobody knows it": "neither model knows them (pixels of them are left out)",
}


def _judge_first(evaluation: Evaluation, reasons: _Reasons) -> dict[str, Any]:
    """Of a model that has nobody to be compared with → fields of a `Decision`."""
    true = np.sum([one.confusion for one in evaluation.panoramas], axis=0).sum(1)
    constant = np.zeros((len(true), len(true)), np.int64)
    constant[:, int(true.argmax())] = true
    trivial = score(constant, evaluation.scores.label_ids).miou
    miou = evaluation.scores.miou
    better = miou > trivial
    name = evaluation.labels[int(true.argmax())].name
    reasons.judge(
        f"There is no champion to compare with; {'better' if better else 'not better'} than to call everything {name}: "
        f"mIoU {score_text(miou)} against {score_text(trivial)}.",
        kept=better,
    )
    missed = [
        label.name
        for label, pixels, iou in zip(evaluation.labels, true, evaluation.scores.iou, strict=True)
        if pixels and iou == 0
    ]
    if missed:
        reasons.warn(f"It finds nothing of what is there of {', '.join(missed)}: IoU 0.")
    return {
        "metrics": _metrics(evaluation),
        "champion_metrics": {},
        "miou": miou,
        "champion_miou": trivial,
        "alone": evaluation,
    }


def _draw_worst(
    bundle: ModelBundle,
    test: DatasetFolder,
    evaluation: Evaluation,
    *,
    device: str,
    picture: Callable[[str, bytes], None],
) -> None:
    """Sheets of the panoramas that a model is worst at: image, mask, prediction, and where these differ."""
    items = {item.name: item for item in test.items}
    predictor = Predictor(bundle, device=device, precision="fp32")
    gauge = Gauge(test, {"the bundle": bundle.manifest.labels})
    schema = LabelSchema(labels=gauge.labels, void_ids=test.schema.void_ids)
    ordered = sorted(evaluation.panoramas, key=lambda one: (math.inf if math.isnan(one.miou) else one.miou, one.name))
    for one in ordered[:_WORST]:
        example = gauge.open(items[one.name])
        sheet = figure(
            example.image,
            schema,
            truth=np.where(example.truth == VOID, np.uint8(VOID), example.label_map),
            prediction=predictor.predict(example.image).label_map,
            title=f"{one.name}, mIoU {score_text(one.miou)}",
        )
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        picture(one.name, buffer.getvalue())


def _judge_learned(bundles: Mapping[str, ModelBundle], digests: Mapping[str, str], reasons: _Reasons) -> None:
    for role, bundle in bundles.items():
        learned = set(bundle.manifest.learned)
        names = [name for name, sha256 in digests.items() if sha256 in learned]
        some = ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "")
        if role == "Challenger":
            text = (
                f"It has learned from {len(names)} of the {plural(len(digests), 'test panorama')} ({some}), so its "
                "scores on them say nothing. Train it without them: on a data set with frozen splits."
                if names
                else f"It has learned from none of the {plural(len(digests), 'test panorama')}."
            )
            reasons.judge(text, kept=not names)
        elif names:
            reasons.warn(
                f"The champion has learned from {len(names)} of the {plural(len(digests), 'test panorama')} ({some}): "
                "the comparison favours it."
            )


def _tell_decline(
    metrics: Mapping[str, float],
    snapshot: str,
    earlier: Iterable["ModelVersion"],
    rules: GateRules,
    reasons: _Reasons,
) -> None:
    """Warn where small losses have added up: an earlier champion was better by more than the margin."""
    now = metrics.get("miou", math.nan)
    scores = {each.title: each.metrics.get("miou", math.nan) for each in earlier if each.test_snapshot == snapshot}
    better = {title: miou for title, miou in scores.items() if miou - now > rules.margin}
    if better:
        title = max(better, key=better.__getitem__)
        reasons.warn(
            f"An earlier champion, {title}, was better on these panoramas: mIoU {score_text(better[title])}, and now "
            f"{score_text(now)}. Losses within the margin add up; `sscloud models compare` tells more."
        )


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    ious = zip(evaluation.labels, evaluation.scores.iou.tolist(), strict=True)
    return {**evaluation.summary(), **{f"iou/{label.name}": iou for label, iou in ious}}


def _facts(bundle: ModelBundle) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "made": manifest.created,
        "trained from": manifest.parent or NOTHING,
        "data it was trained on": manifest.snapshot or NOTHING,
        "panoramas it has learned from": str(len(manifest.learned)),
        "labels": ", ".join(label.name for label in manifest.labels.classes),
        "made with": f"SSCloud {manifest.code_version}",
        "sha256 of its weights": manifest.weights_sha256,
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def write_gate_page(path: Path, decision: Decision, pictures: Mapping[str, bytes]) -> None:
    """Write the decision as a page for people, atomically.

    Args:
        path: the HTML file.
        decision: what was decided.
        pictures: JPEGs by name, as `decide` gave them.
    """
    atomic_write(path, render_gate_page(decision, pictures).encode("utf-8"))


def render_gate_page(decision: Decision, pictures: Mapping[str, bytes]) -> str:
    """The page as text; see `write_gate_page`."""
    kinds = {**dict.fromkeys(decision.warnings, "warning"), **dict.fromkeys(decision.refusals, "refusal")}
    return render(
        "gate.html.j2",
        report={"version": __version__, "created": datetime.now(UTC)},
        decision=decision,
        cards=_cards(decision),
        points=[{"kind": kinds.get(text, "kept"), "text": text} for text in decision.reasons],
        rows=_rows(decision),
        alone=_rows_alone(decision),
        resamples=RESAMPLES,
        tables=[
            *((title, facts) for title, facts in decision.facts.items()),
            (
                "Test panoramas",
                {
                    "panoramas": str(decision.panoramas),
                    "groups": str(decision.groups),
                    "identity": decision.test_snapshot,
                },
            ),
        ],
        pictures=[{"name": name, "source": jpeg_data_uri(jpeg)} for name, jpeg in pictures.items()],
    )


def _cards(decision: Decision) -> list[dict[str, str]]:
    if decision.miou is None:
        return []
    against = "champion" if decision.champion and decision.difference else "one class everywhere"
    cards = [
        {"value": score_text(decision.champion_miou), "name": f"mIoU, {against}", "note": decision.champion or ""},
        {"value": score_text(decision.miou), "name": "mIoU, challenger", "note": decision.challenger},
    ]
    if decision.difference is not None:
        limits = decision.difference.limits
        note = f"95 %: {limits[0]:+.3f} to {limits[1]:+.3f}" if limits else "no interval"
        cards.append({"value": _signed(decision.difference.value), "name": "difference", "note": note})
    if decision.bound is not None:
        cards.append(
            {
                "value": _signed(decision.bound),
                "name": f"above this with {decision.rules.level:.0%} confidence",
                "note": f"the gate asks for more than {-decision.rules.margin:+.3f}",
            }
        )
    return cards


def _signed(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+.3f}"


def _rows_alone(decision: Decision) -> list[dict[str, Any]]:
    """A row a class of a challenger that nobody was compared with."""
    if (found := decision.alone) is None:
        return []
    true = np.sum([one.confusion for one in found.panoramas], axis=0).sum(1)
    return [
        {
            "name": label.name,
            "color": hex_color(label.color),
            "challenger": iou,
            "share": f"{pixels / true.sum():.1%}" if pixels else "not in the masks",
            "missed": bool(pixels) and iou == 0,
        }
        for label, iou, pixels in zip(found.labels, found.scores.iou.tolist(), true.tolist(), strict=True)
    ]


def _rows(decision: Decision) -> list[dict[str, Any]]:
    """A row a class: scores, and where the difference, its interval and the floor lie on a common axis, in percent."""
    reach: float = max(
        [
            0.02,
            *(change.floor for change in decision.classes if change.standing == "judged"),
            *(
                abs(value)
                for change in decision.classes
                for value in (change.difference.value, *(change.difference.limits or ()))
                if math.isfinite(value)
            ),
        ]
    )

    def place(value: float) -> float:
        return round(50 + 50 * float(value) / reach, 2)

    rows = []
    for change in decision.classes:
        value, limits = change.difference.value, change.difference.limits
        drawn = change.standing == "judged" and math.isfinite(value)
        known = limits is not None and math.isfinite(limits[0])
        rows.append(
            {
                "name": change.label.name,
                "color": hex_color(change.label.color),
                "champion": change.champion,
                "challenger": change.challenger,
                "difference": _signed(value),
                "interval": f"{limits[0]:+.3f} to {limits[1]:+.3f}" if known and limits else NOTHING,
                "floor": f"{-change.floor:+.3f}" if change.standing == "judged" else NOTHING,
                "verdict": ("kept" if change.is_kept else "falls too far")
                if change.standing == "judged"
                else f"not judged: {change.standing}",
                "refused": not change.is_kept,
                "bar": {"left": min(50.0, place(value)), "width": round(abs(place(value) - 50), 2), "down": value < 0}
                if drawn
                else None,
                "whisker": {"left": place(limits[0]), "width": round(place(limits[1]) - place(limits[0]), 2)}
                if drawn and known and limits
                else None,
                "floor_at": place(-change.floor) if drawn else None,
            }
        )
    return rows
