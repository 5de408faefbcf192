import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_jaccard_index,
    multiclass_precision,
    multiclass_recall,
)

from training.latitude import row_weights
from training.metrics import confusion_matrix, score, weighted_confusion_matrix

CLASSES = 5


def maps(seed: int, void: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, (40, 60), dtype=np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, CLASSES, truth.shape)).astype(np.uint8)
    truth[rng.random(truth.shape) < void] = 255
    return truth, predicted


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_torchmetrics(seed: int) -> None:
    truth, predicted = maps(seed)
    prediction, target = torch.from_numpy(predicted).long(), torch.from_numpy(truth).long()
    options = {"num_classes": CLASSES, "ignore_index": 255}

    confusion = confusion_matrix(truth, predicted, CLASSES)
    scores = score(confusion, range(10, 15))

    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, multiclass_confusion_matrix(prediction, target, **options).numpy())
    for values, function in (
        (scores.iou, multiclass_jaccard_index),
        (scores.dice, multiclass_f1_score),
        (scores.precision, multiclass_precision),
        (scores.recall, multiclass_recall),
    ):
        assert values.shape == (CLASSES,)
        np.testing.assert_allclose(values, function(prediction, target, average=None, **options).numpy(), rtol=1e-5)
    accuracy = multiclass_accuracy(prediction, target, average="micro", **options)
    assert scores.pixel_accuracy == pytest.approx(float(accuracy), rel=1e-6)
    assert scores.miou == pytest.approx(scores.iou.mean())
    assert scores.mean_dice == pytest.approx(scores.dice.mean())
    assert scores.share.sum() == pytest.approx(1)
    assert scores.label_ids == (10, 11, 12, 13, 14)
    assert scores.summary() == {
        "miou": scores.miou,
        "mean_dice": scores.mean_dice,
        "pixel_accuracy": scores.pixel_accuracy,
    }


def test_by_hand() -> None:
    scores = score(np.array([[3, 1], [2, 4]]), [0, 2])

    np.testing.assert_allclose(scores.iou, [3 / 6, 4 / 7])
    np.testing.assert_allclose(scores.dice, [6 / 9, 8 / 11])
    np.testing.assert_allclose(scores.precision, [3 / 5, 4 / 5])
    np.testing.assert_allclose(scores.recall, [3 / 4, 4 / 6])
    np.testing.assert_allclose(scores.share, [0.4, 0.6])
    assert scores.pixel_accuracy == pytest.approx(0.7)


def test_an_absent_class_has_no_score_and_does_not_count() -> None:
    scores = score(np.array([[8, 0, 0], [0, 4, 0], [0, 0, 0]]), [0, 2, 5])

    for values in (scores.iou, scores.dice, scores.precision, scores.recall):
        np.testing.assert_array_equal(values, [1, 1, np.nan])
    assert scores.share[2] == 0
    assert (scores.miou, scores.mean_dice, scores.pixel_accuracy) == (1, 1, 1)


def test_a_class_only_predicted_or_only_true_scores_zero() -> None:
    scores = score(np.array([[8, 2, 0], [0, 0, 0], [5, 0, 0]]), [0, 2, 5])

    np.testing.assert_array_equal(scores.iou[1:], [0, 0])
    np.testing.assert_array_equal(scores.precision[1:], [0, np.nan])
    np.testing.assert_array_equal(scores.recall[1:], [np.nan, 0])
    assert scores.miou == pytest.approx(8 / 15 / 3)


def test_nothing_counted_has_no_score() -> None:
    scores = score(np.zeros((2, 2), np.int64), [0, 2])

    assert np.isnan([scores.miou, scores.mean_dice, scores.pixel_accuracy]).all()


def test_predictions_that_are_no_class_are_misses() -> None:
    scores = score(np.array([[6, 0, 2], [0, 4, 4]]), [0, 2])

    np.testing.assert_allclose(scores.iou, [6 / 8, 4 / 8])
    np.testing.assert_allclose(scores.precision, [1, 1])
    np.testing.assert_allclose(scores.recall, [6 / 8, 4 / 8])
    assert scores.pixel_accuracy == pytest.approx(10 / 16)
    assert scores.confusion.shape == (2, 2)


def test_void_is_not_counted() -> None:
    truth, predicted = maps(1, void=1.0)
    assert not confusion_matrix(truth, predicted, CLASSES).any()
    truth[0, 0] = 3
    assert confusion_matrix(truth, predicted, CLASSES)[3, predicted[0, 0]] == 1


def test_panoramas_add_up() -> None:
    first, second = maps(1), maps(2)
    whole = confusion_matrix(*(np.vstack(pair) for pair in zip(first, second, strict=True)), CLASSES)

    np.testing.assert_array_equal(whole, confusion_matrix(*first, CLASSES) + confusion_matrix(*second, CLASSES))


def test_weighted_rows() -> None:
    truth, predicted = maps(3)
    weights = row_weights(len(truth), (90.0, -60.0))

    plain, weighted = weighted_confusion_matrix(truth, predicted, CLASSES, row_weights=weights)

    np.testing.assert_array_equal(plain, confusion_matrix(truth, predicted, CLASSES))
    assert plain.dtype == np.int64
    expected = np.zeros((CLASSES, CLASSES))
    for y, x in zip(*np.nonzero(truth != 255), strict=True):
        expected[truth[y, x], predicted[y, x]] += weights[y]
    np.testing.assert_allclose(weighted, expected)
    scores = score(weighted, range(CLASSES))
    assert scores.miou == pytest.approx(scores.iou.mean())
    assert scores.miou != score(plain, range(CLASSES)).miou
    assert scores.confusion.dtype == np.float64


def test_a_pixel_at_the_zenith_weighs_less_than_one_at_the_horizon() -> None:
    truth = np.zeros((8, 4), np.uint8)
    zenith, horizon = truth.copy(), truth.copy()
    zenith[0] = 1
    horizon[4] = 1
    weights = row_weights(8, (90.0, -90.0))

    at_zenith, at_horizon = (
        score(weighted_confusion_matrix(truth, wrong, 2, row_weights=weights)[1], (0, 1)).iou[0]
        for wrong in (zenith, horizon)
    )

    assert at_zenith == pytest.approx(1 - (1 - np.cos(np.pi / 8)) / 2)  # the polar cap's part of the sphere
    assert at_horizon < 7 / 8 < at_zenith


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"Truth \(2, 3\) and prediction \(3, 2\) differ in shape"):
        confusion_matrix(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)
    with pytest.raises(ValueError, match=r"not below 2"):
        confusion_matrix(np.zeros((1, 1), np.uint8), np.full((1, 1), 2, np.uint8), 2)
    with pytest.raises(ValueError, match=r"not below 2"):
        confusion_matrix(np.full((1, 1), 2, np.uint8), np.zeros((1, 1), np.uint8), 2)
