"""Cross-validation: a recipe is trained several times, and every panorama is measured by a model that never saw it.

OUTPUT/
  folds.json         recipe, data and which panoramas each fold leaves out: an interrupted cross-validation goes on
  fold-1/ fold-2/ …  a run each, as `training.train` writes it
"""

import hashlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, DatasetError, TrainingError
from sscloud.files import atomic_write
from sscloud.image import read_label_map
from sscloud.labels import count_ids
from training.bootstrap import groups_of
from training.config import CONFIG, Place, TrainConfig, read_run
from training.dataset import DatasetFolder, Item, digest, open_dataset
from training.evaluate import Evaluation, evaluate, summarise
from training.export import BUNDLE
from training.train import train

FOLDS = "folds.json"

_VALIDATION_PARTS = 10
"""A tenth of what a fold trains on chooses its best epoch, where no frozen validation part is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foldable:
    """What dealing needs to know of a panorama."""

    name: str
    groups: tuple[str, ...]
    """Keys that it shares with the panoramas it must stay together with: of its site, of its image."""
    pixels: Mapping[int, int]
    """Label id → pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidation:
    """Scores of a recipe."""

    pooled: Evaluation
    """Of all left-out panoramas, each measured by the model that never saw it."""
    folds: tuple[Evaluation, ...]


def folds(items: Sequence[Foldable], count: int) -> list[list[str]]:
    """Deal panoramas to folds so that groups stay together and every fold gets its share of each class.

    Groups are placed rarest class first, each where this class is missed most, and among equals where panoramas are
    (Sechidis et al. 2011, as in `training.splits`). Neither chance nor the order of the items decides anything.

    Args:
        items: the panoramas.
        count: how many folds.

    Returns:
        The names of each fold, sorted; none is empty.

    Raises:
        DatasetError: fewer groups than folds.
    """
    together = _components(items)
    if len(together) < count:
        raise DatasetError(
            f"{len(items)} panoramas in {len(together)} group(s) cannot be dealt to {count} folds: a group stays "
            "together. Ask for fewer --folds, or make smaller groups by --group-by."
        )
    ids = sorted({label_id for item in items for label_id in item.pixels})
    amounts = np.array(
        [
            [len(group), *(sum(item.pixels.get(label_id, 0) for item in group) for label_id in ids)]
            for group in together
        ],
        np.float64,
    )
    # Of every class its share: a rare class weighs as much as a common one.
    total = np.maximum(amounts.sum(axis=0), 1)
    amounts /= total
    by_rarity = (1 + np.argsort(total[1:], kind="stable")).tolist()
    rarest = [next((place for place, column in enumerate(by_rarity) if row[column] > 0), len(ids)) for row in amounts]
    columns = [*by_rarity, 0]
    order = sorted(
        range(len(together)), key=lambda n: (rarest[n], -amounts[n, columns[rarest[n]]], together[n][0].name)
    )
    missing = np.full((count, amounts.shape[1]), 1 / count)
    result: list[list[str]] = [[] for _ in range(count)]
    for done, index in enumerate(order):
        column = columns[rarest[index]]
        empty = [fold for fold in range(count) if not result[fold]]
        allowed = empty if len(empty) >= len(order) - done else range(count)
        fold = max(allowed, key=lambda fold: (*missing[fold, [column, 0]].round(12), -fold))
        missing[fold] -= amounts[index]
        result[fold] += [item.name for item in together[index]]
    return [sorted(names) for names in result]


def _components(items: Sequence[Foldable]) -> list[list[Foldable]]:
    """Panoramas that share a key, directly or by others; each sorted by name."""
    found: list[tuple[set[str], list[Foldable]]] = []
    for item in sorted(items, key=lambda item: item.name):
        keys, members = set(item.groups), [item]
        apart = []
        for other_keys, others in found:
            if keys & other_keys:
                keys |= other_keys
                members += others
            else:
                apart.append((other_keys, others))
        found = [*apart, (keys, members)]
    return [sorted(members, key=lambda item: item.name) for _, members in found]


def cross_validate(
    run: Path,
    dataset: Path,
    *,
    count: int,
    output: Path,
    labels: Path | None = None,
    device: str = "auto",
    turns: int = 1,
    group_by: str | None = None,
) -> CrossValidation:
    """Train a run's recipe once for each fold, and measure each model on what its fold left out.

    Frozen test panoramas are neither learned from nor measured. A fold with a finished bundle is not trained again, and
    one that was interrupted goes on.

    Args:
        run: whose configuration is the recipe.
        dataset: folder of the panoramas; not necessarily those of the run.
        count: folds, at least 2.
        output: where the folds' runs go.
        labels: a label schema to use instead of the recipe's or the data set's own.
        device: to train and measure on.
        turns: of measuring; see `evaluate`.
        group_by: what stays together; see `training.bootstrap.groups_of`.

    Raises:
        ConfigError: no run, too few folds, a recipe that starts from a model, or another cross-validation in `output`.
        DatasetError: the data set cannot be used, or has fewer groups than folds.
    """
    if count < 2:
        raise ConfigError(f"--folds must be at least 2, found {count}.")
    recipe = read_run(run).config
    if recipe.load is not None:
        raise ConfigError(
            f"{run} started from {recipe.load}, which may have learned from the panoramas that a fold leaves out: its "
            "scores would be too good. Name a run that was trained without --load."
        )
    labels = labels or (Path(recipe.labels) if recipe.labels else None)
    config = replace(
        recipe, dataset=str(dataset.resolve()), labels=str(labels.resolve()) if labels else None, validation=None
    )
    whole = open_dataset(dataset, labels=labels)
    kept = replace(whole, items=tuple(item for item in whole.items if item.split != "test"))
    known = _foldables(kept, group_by)
    dealt = folds(known, count)
    _claim(output, config, kept, dealt)
    evaluations = []
    for number, names in enumerate(dealt, 1):
        print(f"Fold {number} of {count}: {len(names)} of {len(kept.items)} panoramas are left out", file=sys.stderr)
        place = Place(run=output / f"fold-{number}", device=device, name=f"fold-{number}")
        bundle = _trained(config, place, _learning_part(kept, known, names))
        left_out = replace(kept, items=tuple(item for item in kept.items if item.name in names))
        evaluations.append(evaluate(bundle, left_out, device=device, turns=turns, group_by=group_by))
    pooled = summarise(evaluations[0].labels, [panorama for each in evaluations for panorama in each.panoramas])
    return CrossValidation(pooled=pooled, folds=tuple(evaluations))


def _foldables(dataset: DatasetFolder, group_by: str | None) -> list[Foldable]:
    groups = groups_of(dataset, group_by)
    counted = {entry.name: entry.pixels for entry in dataset.manifest.items} if dataset.manifest is not None else {}
    return [
        Foldable(
            name=item.name,
            # A picture that is there twice must not be learned from in one place and measured in the other.
            groups=(groups[item.name], f"file:{hashlib.sha256(item.image.read_bytes()).hexdigest()}"),
            pixels=counted[item.name] if item.name in counted else _pixels(item),
        )
        for item in dataset.items
    ]


def _pixels(item: Item) -> dict[int, int]:
    counts = count_ids(read_label_map(item.mask))
    return {int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def _learning_part(dataset: DatasetFolder, known: Sequence[Foldable], left_out: Collection[str]) -> DatasetFolder:
    """The items that a fold learns from, each with a split: the frozen validation part, or a dealt one."""
    items = [item for item in dataset.items if item.name not in left_out]
    chosen = {item.name for item in items if item.split == "validation"}
    if len(chosen) == len(items):  # the fold took all that was to be learned from
        chosen = set()
    rest = [each for each in known if each.name not in left_out]
    if not chosen and (parts := min(_VALIDATION_PARTS, len(_components(rest)))) > 1:
        chosen = set(folds(rest, parts)[0])
    return replace(
        dataset,
        items=tuple(replace(item, split="validation" if item.name in chosen else "train") for item in items),
    )


def _trained(config: TrainConfig, place: Place, folder: DatasetFolder) -> ModelBundle:
    if (place.run / BUNDLE).is_dir():
        return ModelBundle.load(place.run / BUNDLE)
    bundle = train(config, replace(place, resume=(place.run / CONFIG).exists()), folder=folder)
    if bundle is None:
        raise TrainingError("Cross-validation runs in one process. Start it without torchrun.")
    return bundle


def _claim(output: Path, config: TrainConfig, dataset: DatasetFolder, dealt: Sequence[Sequence[str]]) -> None:
    """Write down what is cross-validated, or check that it is what an interrupted one began with."""
    files = {item.name: digest(item) for item in dataset.items}
    recipe = {name: value for name, value in asdict(config).items() if name != "dataset"}  # it may have moved
    content = {"config": recipe, "folds": [[[name, files[name]] for name in names] for names in dealt]}
    text = json.dumps(content, ensure_ascii=False, indent=2)
    file = output / FOLDS
    if file.exists():
        if json.loads(file.read_bytes()) != json.loads(text):
            raise ConfigError(
                f"{output} holds a cross-validation of another recipe, other data or other folds. Name another place "
                "with --fold-runs, or delete it."
            )
        return
    atomic_write(file, text.encode() + b"\n")
