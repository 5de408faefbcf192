"""Scores of a segmentation from one confusion matrix over the whole data set.

IoU and Dice follow Everingham et al., "The PASCAL Visual Object Classes Challenge" (2010), and Dice (1945): counts are
summed over all pixels of all panoramas first. A class that neither truth nor prediction holds has no score (NaN).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sscloud.labels import VOID


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Per class (n,) float64 and overall; NaN where a quantity is not defined."""

    label_ids: tuple[int, ...]
    confusion: NDArray[np.int64]
    """(n, n) pixels; rows are the truth, columns the prediction."""
    iou: NDArray[np.float64]
    dice: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    share: NDArray[np.float64]
    """Share of the truth's pixels."""
    miou: float
    """Mean IoU over the classes that have one."""
    mean_dice: float
    pixel_accuracy: float

    def summary(self) -> dict[str, float]:
        """The overall numbers, as a manifest and a tracking store keep them."""
        return {"miou": self.miou, "mean_dice": self.mean_dice, "pixel_accuracy": self.pixel_accuracy}


def confusion_matrix(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Count pixels by true and predicted class.

    Args:
        truth: (H, W) uint8 class indices; 255 is void and not counted.
        predicted: class indices below `classes`, same shape.
        classes: n.

    Returns:
        (n, n) int64, rows truth, columns prediction.

    Raises:
        ValueError: shapes differ, or an index is out of range.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"Truth {truth.shape} and prediction {predicted.shape} differ in shape.")
    total = np.zeros(classes * classes, np.int64)
    # Row by row: bincount widens its input to 64 bits.
    for row, guess in zip(np.atleast_2d(truth), np.atleast_2d(predicted), strict=True):
        counted = row != VOID
        true, guessed = row[counted].astype(np.int64), guess[counted]
        if true.size and max(true.max(), guessed.max()) >= classes:
            raise ValueError(f"Truth or prediction holds class indices that are not below {classes}.")
        total += np.bincount(true * classes + guessed, minlength=classes * classes)
    return total.reshape(classes, classes)


def score(confusion: NDArray[np.int64], label_ids: Sequence[int]) -> Scores:
    """All scores of a confusion matrix whose class i is the label `label_ids[i]`.

    Args:
        confusion: (n, m) int64, m at least n; columns beyond n are predictions that are no class: always wrong.
        label_ids: n label ids.
    """
    counts = confusion.astype(np.float64)
    classes = len(label_ids)
    hit, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)[:classes]
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is the NaN of an absent class
        iou = hit / (true + predicted - hit)
        dice = 2 * hit / (true + predicted)
        return Scores(
            label_ids=tuple(label_ids),
            confusion=confusion[:, :classes],
            iou=iou,
            dice=dice,
            precision=hit / predicted,
            recall=hit / true,
            share=true / counts.sum(),
            miou=_mean(iou),
            mean_dice=_mean(dice),
            pixel_accuracy=float(np.divide(hit.sum(), counts.sum())),
        )


def _mean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
