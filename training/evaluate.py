"""Bundle + data set → scores, at full size, from counts that are added up over all panoramas.

Every panorama leaves a handful of counts: confusion matrices, boundaries, confidences. All scores are made of sums of
these, so they can be counted by several processes, in several folds, and resampled for intervals.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, DatasetError, ImageError, SchemaError
from sscloud.image import no_return, read_image, read_label_map
from sscloud.inference import Predictor, Segmentation, is_panorama
from sscloud.labels import VOID, Label, LabelSchema, count_ids
from training.bootstrap import FEW_GROUPS, LEVEL, RESAMPLES, draws, groups_of, interval, resampled_scores
from training.boundary import boundary_counts, boundary_distance, boundary_iou
from training.calibration import Reliability, reliability
from training.dataset import DatasetFolder, Item, digest
from training.latitude import row_weights
from training.metrics import Scores, mean_present, score, weighted_confusion_matrix

log = logging.getLogger(__name__)

_NAME_WIDTH = 24
"""Longer names of labels are cut, so that the table fits in 100 columns."""


class DamagedModelError(BundleError):
    """A model cannot be measured because it is damaged, or its training went wrong.

    Args:
        message: for a person.
        path: the bundle's folder.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class PanoramaResult:
    """What one panorama adds to the scores."""

    name: str
    group: str
    """Panoramas of a group are resampled together."""
    confusion: NDArray[np.int64]
    """(n, m) pixels, rows the truth; columns from n on are predictions that are no class."""
    weighted: NDArray[np.float64]
    """The same, each pixel counted by the solid angle that it covers relative to the panorama's mean."""
    boundary: NDArray[np.int64]
    """(n, 2) of `boundary_counts`."""
    reliability: Reliability
    digest: str
    """sha256 of the panorama and its mask, as a bundle lists those it has learned from."""
    seconds: float
    """From the encoded image to the class map."""

    @property
    def miou(self) -> float:
        """Mean IoU of this panorama alone."""
        return score(self.confusion, range(len(self.confusion))).miou


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """Where scores lie in 95 % of the resamples of the groups; see `training.bootstrap`."""

    groups: int
    iou: NDArray[np.float64]
    """(n, 2) low and high of each class; NaN where it has no score."""
    dice: NDArray[np.float64]
    """(n, 2)."""
    miou: tuple[float, float]
    mean_dice: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a bundle on a data set."""

    scores: Scores
    labels: tuple[Label, ...]
    """Of the rows and columns of the scores."""
    weighted: Scores
    """Of the pixels weighted by the solid angle that they cover."""
    boundary_iou: NDArray[np.float64]
    """(n,) NaN where a class has no contour."""
    reliability: Reliability
    """Pixels by confidence, for a diagram."""
    intervals: Intervals | None
    """None when all panoramas are of one group: it tells nothing of others."""
    panoramas: tuple[PanoramaResult, ...]

    @property
    def mean_boundary_iou(self) -> float:
        """Mean over the classes that have one."""
        return float(mean_present(self.boundary_iou))

    def summary(self) -> dict[str, float]:
        """The overall numbers."""
        return {
            **self.scores.summary(),
            "weighted_miou": self.weighted.miou,
            "mean_boundary_iou": self.mean_boundary_iou,
            "calibration_error": self.reliability.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A panorama that is opened to be measured."""

    item: Item
    image: NDArray[np.uint8]
    """(H, W, 3) uint8 RGB."""
    label_map: NDArray[np.uint8]
    """(H, W) label ids of the mask."""
    truth: NDArray[np.uint8]
    """(H, W) class indices of the gauge, void 255."""
    digest: str
    """sha256 of both files."""
    seconds: float
    """That reading the image took."""


class Gauge:
    """Opens panoramas of a data set and counts what models make of them, in classes that all of them share.

    The classes are those of the models and of the data set that are not void in the data set: one that a model does not
    know counts as never found.

    Args:
        dataset: panoramas with masks.
        models: the schemas of the models, by what they are called in messages.
        group_by: see `training.bootstrap.groups_of`.

    Raises:
        SchemaError: an id has different names.
        ConfigError, DatasetError: `group_by` cannot be used.
    """

    def __init__(
        self, dataset: DatasetFolder, models: Mapping[str, LabelSchema], *, group_by: str | None = None
    ) -> None:
        _check_meanings(models, dataset.schema)
        self._dataset, self._groups = dataset, groups_of(dataset, group_by)
        void = dataset.schema.void_ids
        known = [label for schema in models.values() for label in schema.labels] + list(dataset.schema.classes)
        both = {label.id: label for label in reversed(known)}  # the first one that has an id names it
        order = list(dict.fromkeys(label.id for label in known))
        self.labels = tuple(both[i] for i in order if i not in void)
        """Of the classes, in the order of their indices."""
        # A model may write labels that are void here: a column, so that they count as misses, but no row.
        columns = [*self.labels, *(both[i] for i in order if i in void)]
        self._columns = len(columns)
        self._truth_index, self._predicted_index = np.full(256, VOID, np.uint8), np.full(256, VOID, np.uint8)
        self._truth_index[[label.id for label in self.labels]] = range(len(self.labels))
        self._predicted_index[[label.id for label in columns]] = range(len(columns))

    def open(self, item: Item) -> Example:
        """Read an item of the data set.

        Raises:
            SchemaError: its mask holds ids that no schema has.
            ImageError: unreadable files.
            DatasetError: a file is not the one that the manifest names.
        """
        checksum = digest(item)  # scores of a mask that somebody has changed are scores of nothing
        label_map = read_label_map(item.mask)
        self._check_ids(item.mask.name, label_map)
        started = time.perf_counter()
        image = read_image(item.image)
        seconds = time.perf_counter() - started
        truth = self._truth_index[label_map]
        if self._dataset.schema.no_return_void and self._dataset.facts.encoding == "normals":
            truth[no_return(image)] = VOID
        return Example(item=item, image=image, label_map=label_map, truth=truth, digest=checksum, seconds=seconds)

    def count(self, example: Example, predictor: Predictor) -> tuple[PanoramaResult, Segmentation]:
        """Predict an example and compare.

        Raises:
            ImageError: too small for the model.
            DamagedModelError: the model's confidences are no numbers.
        """
        item, manifest = example.item, predictor.bundle.manifest
        started = time.perf_counter()
        try:
            segmentation = predictor.predict(example.image)
        except ImageError as error:
            raise ImageError(f"{item.image}: {error}") from error
        if not np.isfinite(segmentation.confidence.values).all():
            raise DamagedModelError(
                f"{manifest.title} gives no numbers for {item.image.name}: its weights are damaged, or too large to "
                "compute with. Use another version of the model, or train it again with a smaller --learning-rate.",
                path=predictor.bundle.path,
            )
        label_map = segmentation.label_map
        seconds = example.seconds + time.perf_counter() - started
        predicted = self._predicted_index[label_map]
        whole = is_panorama(item.size_hw, manifest.aspect)
        height, classes = len(predicted), len(self.labels)
        elevation = self._dataset.facts.elevation or manifest.elevation
        confusion, weighted = weighted_confusion_matrix(
            example.truth,
            predicted,
            self._columns,
            # Nobody knows at which elevation a crop was cut.
            row_weights=row_weights(height, elevation) if whole else np.ones(height),
        )
        result = PanoramaResult(
            name=item.name,
            group=self._groups[item.name],
            confusion=confusion[:classes],
            weighted=weighted[:classes],
            boundary=boundary_counts(
                example.truth, predicted, classes, distance=boundary_distance(predicted.shape), wrap=whole
            ),
            reliability=reliability(segmentation, example.truth, predicted),
            digest=example.digest,
            seconds=seconds,
        )
        return result, segmentation

    def _check_ids(self, name: str, label_map: NDArray[np.uint8]) -> None:
        present = set(np.flatnonzero(count_ids(label_map)).tolist())
        if unknown := sorted(present - {label.id for label in self.labels} - self._dataset.schema.void_ids):
            raise SchemaError(
                f"{name} holds ids {unknown} that neither the bundle's labels nor the data set's have. Add them to the "
                "data set's labels.yaml, or to its 'void'."
            )


def _check_meanings(models: Mapping[str, LabelSchema], dataset: LabelSchema) -> None:
    """Refuse an id that is one label here and another one there; what is void in the data set is no label of it."""
    for (where, schema), (other_where, other) in combinations([*models.items(), ("the data set", dataset)], 2):
        for label in other.classes if other is dataset else other.labels:
            same = schema.by_id(label.id)
            if same is not None and schema.find(label.name) != same and other.find(same.name) != label:
                raise SchemaError(
                    f"The id {label.id} is {same.name!r} in {where} and {label.name!r} in {other_where}. Give the "
                    "label the other's name as an alias if they mean the same; else one of them needs another id."
                )


def evaluate(
    bundle: ModelBundle,
    dataset: DatasetFolder,
    *,
    device: str = "auto",
    turns: int = 1,
    group_by: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Predict and compare every panorama.

    Args:
        bundle: the model.
        dataset: the panoramas.
        device: see `Predictor`.
        turns: how often the network sees each panorama, turned and mirrored; the mean counts.
        group_by: what is resampled together; see `training.bootstrap.groups_of`.
        rank: of this process among those that share the work.
        world_size: how many they are; with more than one, `torch.distributed` must be initialised.

    Returns:
        The same in every process, and the same counts of pixels however many there are (where ties are not decided
        by the rounding of another number of threads).

    Raises:
        SchemaError: masks with ids that neither schema has, or ids that have other names in the bundle.
        ImageError: unreadable files.
        DatasetError: masks that are void all over, names without a group, or panoramas of another encoding.
    """
    if rank == 0:
        check_fit(bundle, dataset)
    gauge = Gauge(dataset, {"the bundle": bundle.manifest.labels}, group_by=group_by)
    predictor = Predictor(bundle, device=device, precision="fp32", turns=turns)
    predictor.warm_up()
    mine = dataset.items[rank::world_size]
    shown = tqdm(mine, "Evaluating", unit="img", leave=False, disable=True if rank else None)
    counted = [gauge.count(gauge.open(item), predictor)[0] for item in shown]
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(shares, counted)
        counted = [shares[place % world_size][place // world_size] for place in range(len(dataset.items))]
    if not any(panorama.confusion.any() for panorama in counted):
        raise DatasetError(f"Every pixel of the masks in {dataset.path} is void: there is nothing to compare with.")
    if rank == 0:
        warn_of_learned(bundle, counted)
    return summarise(gauge.labels, counted)


def check_fit(bundle: ModelBundle, dataset: DatasetFolder) -> None:
    """Refuse what the model cannot be measured on, and say what it can never find.

    Raises:
        DatasetError: the panoramas encode something else than those the model was trained on.
    """
    manifest = bundle.manifest
    if dataset.facts.encoding != manifest.encoding:
        raise DatasetError(
            f"{manifest.title} has learned from panoramas of {manifest.encoding}, those of {dataset.path} are "
            f"{dataset.facts.encoding} (dataset.yaml). Measure it on its own kind."
        )
    missing = [f"{label.name} ({label.id})" for label in dataset.schema.classes if label.id not in manifest.label_ids]
    if missing:
        log.warning(
            "%s has no channel for %s of %s: it can never find them, and their pixels count as missed.",
            manifest.title, ", ".join(missing), dataset.path,
        )  # fmt: skip


def warn_of_learned(bundle: ModelBundle, panoramas: Sequence[PanoramaResult]) -> None:
    """Say when a model is measured on what it was trained on."""
    learned = set(bundle.manifest.learned)
    known = sum(panorama.digest in learned for panorama in panoramas)
    if known:
        log.warning(
            "%s has learned from %d of these %d panoramas: scores on them do not tell how it does on new ones.",
            bundle.manifest.title, known, len(panoramas),
        )  # fmt: skip


def summarise(labels: tuple[Label, ...], panoramas: Sequence[PanoramaResult]) -> Evaluation:
    """The scores of counted panoramas; at least one, all counted in the classes of `labels`."""
    ids = [label.id for label in labels]
    return Evaluation(
        scores=score(np.sum([panorama.confusion for panorama in panoramas], axis=0), ids),
        labels=labels,
        weighted=score(np.sum([panorama.weighted for panorama in panoramas], axis=0), ids),
        boundary_iou=boundary_iou(np.sum([panorama.boundary for panorama in panoramas], axis=0)),
        reliability=sum((panorama.reliability for panorama in panoramas), Reliability.nothing()),
        intervals=_intervals(panoramas),
        panoramas=tuple(panoramas),
    )


def _intervals(panoramas: Sequence[PanoramaResult]) -> Intervals | None:
    groups = [panorama.group for panorama in panoramas]
    drawn = draws(groups)
    if drawn is None:
        return None
    resampled = resampled_scores(drawn, np.stack([panorama.confusion for panorama in panoramas]))
    (low, high), (dice_low, dice_high) = interval(resampled.miou).tolist(), interval(resampled.mean_dice).tolist()
    return Intervals(
        groups=len(set(groups)),
        iou=interval(resampled.iou),
        dice=interval(resampled.dice),
        miou=(low, high),
        mean_dice=(dice_low, dice_high),
    )


def scores_table(evaluation: Evaluation) -> str:
    """The scores as a table for a terminal of 100 columns."""
    scores, intervals = evaluation.scores, evaluation.intervals
    names = [clipped(label.name, _NAME_WIDTH) for label in evaluation.labels]
    width = max([5, *map(len, names)])
    between = 17 if intervals else 6
    lines = [f"{'class':{width}}   id   share  {'IoU':>{between}}    Dice  boundary  precision  recall"]
    for index, (label, name) in enumerate(zip(evaluation.labels, names, strict=True)):
        iou = f"{shown_score(scores.iou[index]):>5}"
        if intervals:
            iou += f"{shown_interval(intervals.iou[index]):>12}"
        lines.append(
            f"{name:{width}}  {label.id:3d}  {scores.share[index]:6.2%}  {iou:>{between}}  "
            f"{shown_score(scores.dice[index]):>6}  {shown_score(evaluation.boundary_iou[index]):>8}  "
            f"{shown_score(scores.precision[index]):>9}  {shown_score(scores.recall[index]):>6}"
        )
    seconds = float(np.median([panorama.seconds for panorama in evaluation.panoramas]))
    miou, dice = shown_score(scores.miou), shown_score(scores.mean_dice)
    if intervals:
        miou, dice = f"{miou} {shown_interval(intervals.miou)}", f"{dice} {shown_interval(intervals.mean_dice)}"
    return "\n".join(
        [
            *lines,
            "",
            f"mIoU {miou}   mean Dice {dice}   pixel accuracy {scores.pixel_accuracy:.3f}",
            f"weighted mIoU {shown_score(evaluation.weighted.miou)}   boundary IoU "
            f"{shown_score(evaluation.mean_boundary_iou)}   calibration error {evaluation.reliability.error:.3f}   "
            f"{seconds:.2f} s a panorama (median)",
            about_intervals(intervals.groups if intervals else 1),
        ]
    )


def about_intervals(groups: int) -> str:
    """What the intervals are, in a sentence or two."""
    if groups < 2:
        return "No intervals: all panoramas are of one group, which tells nothing of others (see --group-by)."
    text = f"Intervals hold {LEVEL:.0%} of {RESAMPLES} resamples of {groups} groups of panoramas."
    return f"{text} So few groups make them too narrow." if groups < FEW_GROUPS else text


def shown_score(value: float) -> str:
    """A score with three digits; a dash for NaN."""
    return "—" if math.isnan(value) else f"{value:.3f}"


def shown_interval(limits: Sequence[float] | NDArray[np.float64]) -> str:
    """[low–high] with two digits each; nothing for NaN."""
    low, high = limits
    return "" if math.isnan(low) else f"[{low:.2f}–{high:.2f}]"


def clipped(text: str, width: int) -> str:
    """At most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def scores_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON types; null where a score is not defined."""
    scores, intervals = evaluation.scores, evaluation.intervals
    columns = {
        "iou": scores.iou,
        "dice": scores.dice,
        "boundary_iou": evaluation.boundary_iou,
        "precision": scores.precision,
        "recall": scores.recall,
        "share": scores.share,
        "weighted_iou": evaluation.weighted.iou,
    }
    ranges = {"iou_interval": intervals.iou, "dice_interval": intervals.dice} if intervals else {}
    counts = evaluation.reliability
    return {
        **{name: json_number(value) for name, value in evaluation.summary().items()},
        "intervals": {
            "groups": intervals.groups,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "miou": json_numbers(intervals.miou),
            "mean_dice": json_numbers(intervals.mean_dice),
        }
        if intervals
        else None,
        "classes": [
            {
                "id": label.id,
                "name": label.name,
                **{name: json_number(values[index]) for name, values in columns.items()},
                **{name: json_numbers(values[index]) for name, values in ranges.items()},
            }
            for index, label in enumerate(evaluation.labels)
        ],
        "confusion": scores.confusion.tolist(),
        "weighted_confusion": evaluation.weighted.confusion.tolist(),
        "reliability": {
            "count": counts.count.tolist(),
            "right": counts.right.tolist(),
            "confidence": counts.confidence.tolist(),
        },
        "panoramas": [
            {
                "name": panorama.name,
                "group": panorama.group,
                "miou": json_number(panorama.miou),
                "seconds": panorama.seconds,
                "confusion": panorama.confusion.tolist(),
            }
            for panorama in evaluation.panoramas
        ],
    }


def json_number(value: float) -> float | None:
    """A number, or null for NaN."""
    return None if math.isnan(value) else float(value)


def json_numbers(values: Sequence[float] | NDArray[np.float64]) -> list[float | None]:
    """Numbers, null for NaN."""
    return [json_number(value) for value in values]
