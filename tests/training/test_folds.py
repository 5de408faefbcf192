import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, DatasetError, TrainingError
from sscloud.labels import LabelSchema
from training import folds as module
from training.config import Place, RunFacts, TrainConfig, read_run, write_config
from training.dataset import DatasetFolder, open_dataset
from training.folds import Foldable, cross_validate, folds
from training.manifest import DatasetWriter

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

MakeDataset = Callable[..., Path]


def town(groups: int, *, seed: int = 0) -> list[Foldable]:
    """Groups of one to three panoramas with a common class 0, a frequent class 2, and a class 66 in a third of them."""
    rng = random.Random(seed)
    found = []
    for group in range(groups):
        for number in range(rng.randint(1, 3)):
            rare = rng.randint(5, 20) if group % 3 == 0 else 0
            common = rng.randint(100, 500)
            pixels = {0: 1000 - common - rare, 2: common} | ({66: rare} if rare else {})
            found.append(Foldable(name=f"g{group}-{number}", groups=(f"g{group}",), pixels=pixels))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_together_and_every_fold_gets_its_share(seed: int) -> None:
    items = town(30, seed=seed)
    by_name = {item.name: item for item in items}

    dealt = folds(items, 5)

    assert sorted(name for fold in dealt for name in fold) == sorted(by_name)
    home: dict[str, set[int]] = {}
    for number, fold in enumerate(dealt):
        for name in fold:
            home.setdefault(by_name[name].groups[0], set()).add(number)
    assert all(len(places) == 1 for places in home.values())
    for label_id in (0, 2, 66):
        pixels = np.array([sum(by_name[name].pixels.get(label_id, 0) for name in fold) for fold in dealt])
        assert pixels.min() > 0.1 * pixels.sum()
        assert pixels.max() < 0.32 * pixels.sum()
    shuffled = random.Random(1).sample(items, len(items))
    assert folds(shuffled, 5) == dealt


def test_keys_chain() -> None:
    items = [
        Foldable(name="a", groups=("site 1", "file x"), pixels={0: 1}),
        Foldable(name="b", groups=("site 2", "file y"), pixels={0: 1}),
        Foldable(name="c", groups=("site 2", "file x"), pixels={0: 1}),
        Foldable(name="d", groups=("site 3", "file z"), pixels={0: 1}),
    ]

    assert sorted(folds(items, 2)) == [["a", "b", "c"], ["d"]]
    with pytest.raises(DatasetError, match=r"4 panoramas in 2 group\(s\) cannot be dealt to 3 folds"):
        folds(items, 3)


def test_no_fold_is_empty_even_if_one_group_has_nearly_all() -> None:
    items = [Foldable(name=f"big{n}", groups=("big",), pixels={0: 100, 2: 100}) for n in range(20)]
    items += [Foldable(name=f"small{n}", groups=(f"small{n}",), pixels={0: 1}) for n in range(3)]

    assert all(folds(items, 4))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run's config.json."""

    def make(bundle: ModelBundle, **values: Any) -> Path:
        manifest = bundle.manifest
        facts = RunFacts(
            snapshot="0",
            architecture=manifest.architecture,
            labels=manifest.labels,
            label_ids=manifest.label_ids,
            encoding="normals",
            aspect=2.0,
            elevation=(90.0, -90.0),
            azimuth=None,
            parent=None,
        )
        run = tmp_path / "run"
        write_config(run, TrainConfig(dataset="elsewhere", epochs=3, base_width=4, scale=0.5, **values), facts)
        return run

    return make


class Trainer:
    """Stands in for `train`: notes what it was asked and leaves a copy of a finished bundle."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self.asked: list[tuple[TrainConfig, Place, DatasetFolder]] = []
        self.dies_at = 0

    def __call__(self, config: TrainConfig, place: Place, *, folder: DatasetFolder) -> ModelBundle | None:
        self.asked.append((config, place, folder))
        place.run.mkdir(parents=True, exist_ok=True)
        (place.run / "config.json").write_text("{}")
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        target = place.run / "bundle"
        target.mkdir()
        for file in self.bundle.path.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return ModelBundle.load(target)


@pytest.fixture
def trainer(tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer(tiny_bundle)
    monkeypatch.setattr(module, "train", trainer)
    return trainer


def test_every_panorama_is_measured_once_by_a_model_that_never_saw_it(
    make_dataset: MakeDataset, make_run: Callable[..., Path], tiny_bundle: ModelBundle, trainer: Trainer, tmp_path: Path
) -> None:
    data, run = make_dataset(7), make_run(tiny_bundle, validation=25)

    result = cross_validate(run, data, count=3, output=tmp_path / "folds", device="cpu")

    names = {item.name for item in open_dataset(data).items}
    measured = Counter(panorama.name for panorama in result.pooled.panoramas)
    assert measured == Counter(names)
    assert len(result.folds) == len(trainer.asked) == 3
    for number, (fold, (config, place, folder)) in enumerate(zip(result.folds, trainer.asked, strict=True), 1):
        left_out = {panorama.name for panorama in fold.panoramas}
        assert {item.name for item in folder.items} == names - left_out
        assert {item.split for item in folder.items} == {"train", "validation"}
        assert config == replace(read_run(run).config, dataset=str(data.resolve()), validation=None)
        assert (place.run, place.resume, place.device) == (tmp_path / f"folds/fold-{number}", False, "cpu")
    np.testing.assert_array_equal(result.pooled.scores.confusion, sum(fold.scores.confusion for fold in result.folds))
    assert result.pooled.intervals is not None
    assert result.pooled.intervals.groups == 7


def test_frozen_splits(
    make_dataset: MakeDataset, make_run: Callable[..., Path], tiny_bundle: ModelBundle, trainer: Trainer, tmp_path: Path
) -> None:
    data = make_dataset(9)
    splits = {"1_normals": "test", "2_normals": "test", "3_normals": "validation", "4_normals": "validation"}
    with DatasetWriter(data, schema=LabelSchema.default()) as writer:
        for entry in writer.manifest.items:
            split: Any = splits.get(entry.name, "train")
            group = "site:2" if entry.name in ("4_normals", "5_normals") else f"site:{entry.name}"
            writer.stage(replace(entry, split=split, group=group), image=None, mask=None)
        writer.commit()

    result = cross_validate(make_run(tiny_bundle), data, count=3, output=tmp_path / "folds", device="cpu")

    measured = sorted(panorama.name for panorama in result.pooled.panoramas)
    assert measured == [f"{n}_normals" for n in range(3, 10)]
    together = 0
    for fold, (_, _, folder) in zip(result.folds, trainer.asked, strict=True):
        left_out = {panorama.name for panorama in fold.panoramas}
        together += {"4_normals", "5_normals"} <= left_out
        given = {item.name: item.split for item in folder.items}
        assert given.keys() == set(measured) - left_out
        frozen = {"3_normals", "4_normals"} & given.keys()
        validation = {name for name, split in given.items() if split == "validation"}
        assert validation == frozen if frozen else len(validation) >= 1
        assert "train" in given.values()
    assert together == 1


def test_an_interrupted_one_goes_on(
    make_dataset: MakeDataset, make_run: Callable[..., Path], tiny_bundle: ModelBundle, trainer: Trainer, tmp_path: Path
) -> None:
    data, run, output = make_dataset(4), make_run(tiny_bundle), tmp_path / "folds"
    trainer.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        cross_validate(run, data, count=3, output=output, device="cpu")

    cross_validate(run, data, count=3, output=output, device="cpu")

    assert [(place.run.name, place.resume) for _, place, _ in trainer.asked] == [
        ("fold-1", False),
        ("fold-2", False),
        ("fold-2", True),
        ("fold-3", False),
    ]
    with pytest.raises(ConfigError, match="holds a cross-validation of another recipe, other data or other folds"):
        cross_validate(run, data, count=2, output=output, device="cpu")
    with pytest.raises(ConfigError, match="another recipe"):
        cross_validate(make_run(tiny_bundle, seed=1), data, count=3, output=output, device="cpu")
    assert len(json.loads((output / "folds.json").read_bytes())["folds"]) == 3


def test_what_is_refused(
    make_dataset: MakeDataset,
    make_run: Callable[..., Path],
    tiny_bundle: ModelBundle,
    trainer: Trainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_dataset(3)
    with pytest.raises(ConfigError, match="--folds must be at least 2, found 1"):
        cross_validate(make_run(tiny_bundle), data, count=1, output=tmp_path / "folds")
    with pytest.raises(ConfigError, match=r"is no run: it has no config\.json"):
        cross_validate(tmp_path, data, count=2, output=tmp_path / "folds")
    with pytest.raises(ConfigError, match=r"started from old/bundle, .* Name a run that was trained without --load"):
        cross_validate(make_run(tiny_bundle, load="old/bundle"), data, count=2, output=tmp_path / "folds")
    with pytest.raises(DatasetError, match=r"3 panoramas in 1 group\(s\) cannot be dealt to 2 folds"):
        cross_validate(make_run(tiny_bundle), data, count=2, output=tmp_path / "folds", group_by="normals")
    assert trainer.asked == []
    assert not (tmp_path / "folds").exists()
    monkeypatch.setattr(module, "train", lambda *_, **__: None)
    with pytest.raises(TrainingError, match="Start it without torchrun"):
        cross_validate(make_run(tiny_bundle), data, count=2, output=tmp_path / "folds")
