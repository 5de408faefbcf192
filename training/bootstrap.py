"""How far a score would move with other panoramas: intervals by resampling groups of panoramas.

Pixels of one panorama, and panoramas of one site, tell the same over and over: an interval over pixels would be far too
narrow. So whole groups are drawn with replacement, as many as there are, again and again; the middle 95 % of the scores
of all these draws is the interval (B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, percentiles).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import DatasetError
from training.dataset import DatasetFolder
from training.metrics import mean_present, overlaps, tallies
from training.splits import SplitPlan, group_key, require_match

RESAMPLES = 1000
LEVEL = 0.95

FEW_GROUPS = 10
"""Below so many, resampling knows too little of how groups differ, and intervals come out too narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResamples:
    """Scores of each resample; NaN where a class is in neither truth nor prediction."""

    iou: NDArray[np.float64]
    """(resamples, n)."""
    dice: NDArray[np.float64]
    """(resamples, n)."""

    @property
    def miou(self) -> NDArray[np.float64]:
        """(resamples,) mean over the classes that the resample has."""
        return mean_present(self.iou)

    @property
    def mean_dice(self) -> NDArray[np.float64]:
        """(resamples,) mean over the classes that the resample has."""
        return mean_present(self.dice)


def groups_of(dataset: DatasetFolder, rule: str | None = None) -> dict[str, str]:
    """The group of each item: name → key.

    Args:
        dataset: with its manifest, if it has one.
        rule: image, task, job, or a regular expression that finds the group in the name of the image's file; None for
            the manifest's groups, or without a manifest each panorama by itself.

    Raises:
        ConfigError: the rule is no regular expression.
        DatasetError: it does not match every name.
    """
    entries = {entry.name: entry for entry in dataset.manifest.items} if dataset.manifest is not None else {}
    if rule is None:
        return {
            item.name: entries[item.name].group if item.name in entries else f"image:{item.name}"
            for item in dataset.items
        }
    SplitPlan(group_by=rule)  # checks it
    require_match(rule, [item.image.name for item in dataset.items])
    if not entries and rule in ("task", "job"):
        raise DatasetError(
            f"{dataset.path} has no manifest, so no {rule} is known. Give --group-by a regular expression that finds "
            "the site in the file name."
        )
    return {
        item.name: group_key(
            rule,
            source=entries[item.name].source if item.name in entries else {"kind": "folder"},
            name=item.image.name,
            image_sha256=item.sha256[0] if item.sha256 is not None else item.name,
        )
        for item in dataset.items
    }


def draws(groups: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64] | None:
    """How often each panorama is in each resample: (resamples, panoramas) int64; None of fewer than two groups.

    Args:
        groups: the group of each panorama.
        resamples: how many.
        seed: the same groups and seed give the same resamples, so that two models can be compared on them.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        return None
    rng = np.random.default_rng(seed)
    times: NDArray[np.int64] = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return times[:, place]


def resampled_scores(drawn: NDArray[np.int64], confusions: NDArray[np.int64]) -> ScoreResamples:
    """Scores of the summed confusion matrices of each resample.

    Args:
        drawn: (resamples, panoramas) of `draws`.
        confusions: (panoramas, n, m) pixels.
    """
    parts = np.stack(tallies(confusions), axis=1)  # what the scores need, not the whole matrices
    sums = drawn.astype(np.float64) @ parts.reshape(len(parts), -1)
    iou, dice = overlaps(*np.moveaxis(sums.reshape(len(drawn), 3, -1), 1, 0))
    return ScoreResamples(iou=iou, dice=dice)


def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(resamples, …) → (…, 2): the middle `LEVEL` of the values that are not NaN; NaN where all are."""
    flat = values.reshape(len(values), -1)
    tail = 100 * (1 - LEVEL) / 2
    limits = np.full((flat.shape[1], 2), np.nan)
    for place, column in enumerate(flat.T):
        known = column[~np.isnan(column)]
        if len(known):
            limits[place] = np.percentile(known, [tail, 100 - tail])
    return limits.reshape(*values.shape[1:], 2)
