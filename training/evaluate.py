"""Bundle + data set → scores, at full size, from one confusion matrix over all panoramas."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.bundle import ModelBundle
from sscloud.errors import DatasetError, SchemaError
from sscloud.image import read_label_map
from sscloud.inference import Predictor
from sscloud.labels import VOID, Label, count_ids
from training.dataset import DatasetFolder, digest
from training.metrics import Scores, confusion_matrix, score


@dataclass(frozen=True, slots=True, kw_only=True)
class PanoramaResult:
    """One panorama of an evaluation."""

    name: str
    miou: float
    seconds: float
    """From the encoded image to the class map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of a bundle on a data set."""

    scores: Scores
    labels: tuple[Label, ...]
    """Of the rows and columns of the scores."""
    panoramas: tuple[PanoramaResult, ...]


def evaluate(bundle: ModelBundle, dataset: DatasetFolder, *, device: str = "auto") -> Evaluation:
    """Predict and compare every panorama.

    The classes are those of the bundle and of the data set: one that the model does not know counts as never found.

    Raises:
        SchemaError: masks with ids that neither schema has, or ids that have other names in the bundle.
        ImageError: unreadable files.
        DatasetError: masks that are void all over.
    """
    predictor = Predictor(bundle, device=device, precision="fp32")
    predictor.warm_up()
    known = bundle.manifest.labels
    void = dataset.schema.void_ids
    for label in dataset.schema.classes:
        same = known.by_id(label.id)
        if same is not None and known.find(label.name) != same and dataset.schema.find(same.name) != label:
            raise SchemaError(
                f"The id {label.id} is {same.name!r} in the bundle and {label.name!r} in the data set. Give the label "
                "the other's name as an alias if they mean the same; else one of them needs another id."
            )
    extra = [label for label in dataset.schema.classes if known.by_id(label.id) is None]
    both = (*known.labels, *extra)
    labels = tuple(label for label in both if label.id not in void)
    # The model may write labels that are void here: a column, so that they count as misses, but no row.
    columns = (*labels, *(label for label in both if label.id in void))
    truth_index, predicted_index = np.full(256, VOID, np.uint8), np.full(256, VOID, np.uint8)
    truth_index[[label.id for label in labels]] = range(len(labels))
    predicted_index[[label.id for label in columns]] = range(len(columns))
    total = np.zeros((len(labels), len(columns)), np.int64)
    results = []
    for item in tqdm(dataset.items, "Evaluating", unit="img", leave=False, disable=None):
        digest(item)  # scores of a mask that somebody has changed are scores of nothing
        label_map = read_label_map(item.mask)
        _check_ids(item.mask.name, label_map, labels, void)
        started = time.perf_counter()
        predicted = predicted_index[predictor.predict_file(item.image).label_map]
        seconds = time.perf_counter() - started
        confusion = confusion_matrix(truth_index[label_map], predicted, len(columns))[: len(labels)]
        miou = score(confusion, [label.id for label in labels]).miou
        results.append(PanoramaResult(name=item.name, miou=miou, seconds=seconds))
        total += confusion
    if not total.any():
        raise DatasetError(f"Every pixel of the masks in {dataset.path} is void: there is nothing to compare with.")
    return Evaluation(scores=score(total, [label.id for label in labels]), labels=labels, panoramas=tuple(results))


def _check_ids(name: str, label_map: NDArray[np.uint8], labels: tuple[Label, ...], void: frozenset[int]) -> None:
    present = set(np.flatnonzero(count_ids(label_map)).tolist())
    if unknown := sorted(present - {label.id for label in labels} - void):
        raise SchemaError(
            f"{name} holds ids {unknown} that neither the bundle's labels nor the data set's have. Add them to the "
            "data set's labels.yaml, or to its 'void'."
        )


def scores_table(evaluation: Evaluation) -> str:
    """The scores as a table for a terminal."""
    scores = evaluation.scores
    width = max([5, *(len(label.name) for label in evaluation.labels)])
    lines = [f"{'class':{width}}   id   share     IoU    Dice  precision  recall"]
    for index, label in enumerate(evaluation.labels):
        cells = [scores.iou, scores.dice, scores.precision, scores.recall]
        values = [f"{column[index]:.3f}" if not math.isnan(column[index]) else "—" for column in cells]
        lines.append(
            f"{label.name:{width}}  {label.id:3d}  {scores.share[index]:6.2%}  {values[0]:>6}  {values[1]:>6}  "
            f"{values[2]:>9}  {values[3]:>6}"
        )
    seconds = float(np.median([panorama.seconds for panorama in evaluation.panoramas]))
    lines += [
        "",
        f"mIoU {scores.miou:.3f}   mean Dice {scores.mean_dice:.3f}   pixel accuracy {scores.pixel_accuracy:.3f}   "
        f"{seconds:.2f} s a panorama (median)",
    ]
    return "\n".join(lines)


def scores_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON types; null where a score is not defined."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    scores = evaluation.scores
    return {
        **{name: number(value) for name, value in scores.summary().items()},
        "classes": [
            {
                "id": label.id,
                "name": label.name,
                **{
                    name: number(getattr(scores, name)[index])
                    for name in ("iou", "dice", "precision", "recall", "share")
                },
            }
            for index, label in enumerate(evaluation.labels)
        ],
        "confusion": scores.confusion.tolist(),
        "panoramas": [
            {"name": panorama.name, "miou": number(panorama.miou), "seconds": panorama.seconds}
            for panorama in evaluation.panoramas
        ],
    }
