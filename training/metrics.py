"""Scores of a segmentation from one confusion matrix over the whole data set.

IoU and Dice follow Everingham et al., "The PASCAL Visual Object Classes Challenge" (2010), and Dice (1945): counts are
summed over all pixels of all panoramas first. Weighted, a pixel counts as much as the solid angle that it covers. A
class that neither truth nor prediction holds has no score (NaN).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sscloud.labels import VOID


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Per class (n,) float64 and overall; NaN where a quantity is not defined."""

    label_ids: tuple[int, ...]
    confusion: NDArray[np.int64] | NDArray[np.float64]
    """(n, n) pixels, weighted ones as float64; rows are the truth, columns the prediction."""
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
    total = np.zeros((classes, classes), np.int64)
    for row in _rows(truth, predicted, classes):
        total += row
    return total


def weighted_confusion_matrix(
    truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int, *, row_weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """`confusion_matrix`, and the same with each pixel counted as much as its row is worth.

    Args:
        truth: (H, W) uint8 class indices; 255 is void and not counted.
        predicted: class indices below `classes`, same shape.
        classes: n.
        row_weights: (H,), of `training.latitude.row_weights`.

    Returns:
        (n, n) int64 pixels and (n, n) float64 weighted pixels, rows truth, columns prediction.

    Raises:
        ValueError: shapes differ, or an index is out of range.
    """
    total, weighted = np.zeros((classes, classes), np.int64), np.zeros((classes, classes))
    for row, weight in zip(_rows(truth, predicted, classes), row_weights, strict=True):
        total += row
        weighted += weight * row
    return total, weighted


def _rows(truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int) -> Iterator[NDArray[np.int64]]:
    """The (n, n) confusion matrix of each row of pixels: bincount widens its input to 64 bits."""
    if truth.shape != predicted.shape:
        raise ValueError(f"Truth {truth.shape} and prediction {predicted.shape} differ in shape.")
    for row, guess in zip(np.atleast_2d(truth), np.atleast_2d(predicted), strict=True):
        counted = row != VOID
        true, guessed = row[counted].astype(np.int64), guess[counted]
        if true.size and max(true.max(), guessed.max()) >= classes:
            raise ValueError(f"Truth or prediction holds class indices that are not below {classes}.")
        yield np.bincount(true * classes + guessed, minlength=classes * classes).reshape(classes, classes)


def score(confusion: NDArray[np.int64] | NDArray[np.float64], label_ids: Sequence[int]) -> Scores:
    """All scores of a confusion matrix whose class i is the label `label_ids[i]`.

    Args:
        confusion: (n, m) pixels, m at least n; columns beyond n are predictions that are no class: always wrong.
        label_ids: n label ids.
    """
    counts = confusion.astype(np.float64)
    hit, true, predicted = tallies(counts)
    iou, dice = overlaps(hit, true, predicted)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is the NaN of an absent class
        return Scores(
            label_ids=tuple(label_ids),
            confusion=confusion[:, : len(label_ids)],
            iou=iou,
            dice=dice,
            precision=hit / predicted,
            recall=hit / true,
            share=true / counts.sum(),
            miou=float(mean_present(iou)),
            mean_dice=float(mean_present(dice)),
            pixel_accuracy=float(np.divide(hit.sum(), counts.sum())),
        )


def tallies(
    confusion: NDArray[np.int64] | NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What IoU and Dice are made of: (…, n, m) matrices → (…, n) pixels right, of the truth, of the prediction."""
    counts = confusion.astype(np.float64)
    classes = counts.shape[-2]
    hit = np.diagonal(counts, axis1=-2, axis2=-1)
    return hit, counts.sum(-1), counts.sum(-2)[..., :classes]


def overlaps(
    hit: NDArray[np.float64], true: NDArray[np.float64], predicted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and Dice of (…, n) `tallies`; NaN for a class that neither truth nor prediction holds."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return hit / (true + predicted - hit), 2 * hit / (true + predicted)


def mean_present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…, n) → (…) mean over those of the last axis that are not NaN; NaN where all are."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(present, values, 0).sum(-1) / present.sum(-1))
