from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sscloud.errors import ConfigError, DatasetError
from sscloud.labels import LabelSchema
from training.bootstrap import RESAMPLES, draws, groups_of, interval, resampled_scores
from training.dataset import open_dataset
from training.manifest import DatasetWriter
from training.metrics import score

MakeDataset = Callable[..., Path]


def test_groups_are_drawn_whole_and_as_many_as_there_are() -> None:
    groups = ["a", "b", "a", "c"]

    drawn = draws(groups, seed=1)

    assert drawn is not None
    assert drawn.shape == (RESAMPLES, 4)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
    np.testing.assert_array_equal(drawn[:, [0, 1, 3]].sum(1), 3)
    # Each group is in a resample once on average, and missing in (2/3)^3 of them.
    np.testing.assert_allclose(drawn.mean(0), 1, atol=0.1)
    np.testing.assert_allclose((drawn == 0).mean(0), 8 / 27, atol=0.05)
    np.testing.assert_array_equal(drawn, draws(groups, seed=1))
    assert (drawn != draws(groups, seed=2)).any()


@pytest.mark.parametrize("groups", [["a"], ["a", "a"]])
def test_one_group_tells_nothing(groups: list[str]) -> None:
    assert draws(groups) is None


def test_scores_equal_those_of_the_summed_matrices() -> None:
    rng = np.random.default_rng(0)
    confusions = rng.integers(0, 50, (5, 3, 4))  # a column more than rows: predictions that are no class
    confusions[1:, 2, :] = confusions[1:, :, 2] = 0  # a class of the first panorama only
    drawn = draws(list("abcde"), resamples=40)
    assert drawn is not None

    resampled = resampled_scores(drawn, confusions)

    assert resampled.iou.shape == (40, 3)
    absent = 0
    for times, iou, dice, miou, mean_dice in zip(
        drawn, resampled.iou, resampled.dice, resampled.miou, resampled.mean_dice, strict=True
    ):
        expected = score(sum(count * matrix for count, matrix in zip(times, confusions, strict=True)), range(3))
        np.testing.assert_allclose(iou, expected.iou)
        np.testing.assert_allclose(dice, expected.dice)
        assert (miou, mean_dice) == pytest.approx((expected.miou, expected.mean_dice))
        absent += bool(np.isnan(iou[2]))
    assert 0 < absent < 40


def test_interval_has_the_middle_and_leaves_out_what_has_no_score() -> None:
    values = np.stack([np.arange(101.0), np.full(101, np.nan), np.r_[np.full(50, np.nan), np.arange(51)]], axis=1)

    limits = interval(values)

    np.testing.assert_allclose(limits, [[2.5, 97.5], [np.nan, np.nan], [1.25, 48.75]])
    assert interval(values[:, 0]).shape == (2,)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Twenty groups of a class whose true accuracy is 0.8; 95 % of the intervals should hold it."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        hits = rng.binomial(100, rng.beta(8, 2, 20))
        confusions = np.stack([np.array([[hit, 100 - hit], [0, 0]]) for hit in hits])
        drawn = draws([str(n) for n in range(20)], resamples=300)
        assert drawn is not None
        low, high = interval(resampled_scores(drawn, confusions).iou[:, 0])
        held += low <= 0.8 <= high
    assert 0.86 <= held / 200 <= 0.99


def test_groups_of_a_folder(make_dataset: MakeDataset) -> None:
    data = open_dataset(make_dataset(11))

    assert len(set(groups_of(data).values())) == 11
    assert len(set(groups_of(data, "image").values())) == 11
    by_first_digit = groups_of(data, r"^(\d)")
    assert by_first_digit["1_normals"] == by_first_digit["10_normals"] == by_first_digit["11_normals"]
    assert len(set(by_first_digit.values())) == 9
    with pytest.raises(DatasetError, match=r"--group-by 'x' does not match 11 file name\(s\): 1_normals\.png"):
        groups_of(data, "x")
    with pytest.raises(ConfigError, match=r"--group-by '\(' is no regular expression"):
        groups_of(data, "(")
    with pytest.raises(DatasetError, match="has no manifest, so no task is known"):
        groups_of(data, "task")


def test_groups_of_a_manifest(make_dataset: MakeDataset) -> None:
    root = make_dataset(3)
    with DatasetWriter(root, schema=LabelSchema.default()) as writer:
        for entry in writer.manifest.items:
            writer.stage(
                replace(entry, group="site:north" if entry.name < "3" else "site:south"), image=None, mask=None
            )
        writer.commit()
    data = open_dataset(root)

    assert groups_of(data) == {"1_normals": "site:north", "2_normals": "site:north", "3_normals": "site:south"}
    assert len(set(groups_of(data, "image").values())) == 3
    assert len(set(groups_of(data, "task").values())) == 3  # the source knows no task: each by itself
