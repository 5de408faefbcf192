from pathlib import Path
from typing import Any

import pytest

from sscloud.errors import ConfigError
from training.cycle_config import CycleConfig, changes, read_settings
from training.splits import SplitPlan

FULL: dict[str, Any] = {
    "project": 7,
    "name": "Улица",
    "min_new": 0,
    "max_hours": 2,
    "train": {"epochs": 3, "crop": [64, 128], "amp": True},
    "finetune": {"epochs": 1},
    "stages": ["acceptance"],
    "group_by": "^(site)",
    "function": {"name": "sscloud-street", "gpu": True},
    "gate": {"margin": 0, "floors": {"Земля": 0.1}},
    "select": {"count": 3, "way": "jobs", "assignee": "anna"},
    "prelabel": {"threshold": 0.5, "via": "server"},
}


def test_a_round_trip() -> None:
    config = CycleConfig.from_dict(FULL, source="cycle.yaml")
    assert config.gate.floors == {"Земля": 0.1}
    assert config.max_hours == 2.0
    assert CycleConfig.from_dict(config.to_dict(), source="the journal").to_dict() == config.to_dict()


def test_the_training() -> None:
    config = CycleConfig.from_dict(FULL, source="cycle.yaml")
    training = config.training({**config.train, **config.finetune}, dataset="dataset", load="bundle")
    assert (training.epochs, training.crop, training.amp, training.load) == (1, (64, 128), True, "bundle")
    assert training.max_hours == 2


def test_splits_are_as_before_where_nothing_is_asked_for() -> None:
    config = CycleConfig(project=7, test=20.0)
    assert config.split_plan(SplitPlan(group_by="job", validation=5.0)) == SplitPlan(
        group_by="job", validation=5.0, test=20.0
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "project is missing"),
        ({"project": "7"}, "'project' must be a whole number, found '7'"),
        ({"project": True}, "'project' must be a whole number, found True"),
        ({"project": 7, "min_nev": 1}, r"no key 'min_nev'\. Did you mean 'min_new'\?"),
        ({"project": 7, "min_new": -1}, "'min_new' must be 0 or above"),
        ({"project": 7, "name": " "}, "'name' must not be empty"),
        ({"project": 7, "max_hours": 0}, "max-hours must be above 0"),
        ({"project": 7, "train": {"epoch": 1}}, r"'train' has no key 'epoch'\. Did you mean 'epochs'\?"),
        ({"project": 7, "train": {"load": "x"}}, "'train' has no key 'load'"),
        ({"project": 7, "train": {"epochs": "many"}}, r"'train\.epochs' must be a whole number, found 'many'"),
        ({"project": 7, "train": {"epochs": 2.5}}, r"'train\.epochs' must be a whole number, found 2\.5"),
        ({"project": 7, "finetune": {"epochs": True}}, r"'finetune\.epochs' must be a whole number, found True"),
        ({"project": 7, "train": {"amp": "no"}}, r"'train\.amp' must be true or false, found 'no'"),
        ({"project": 7, "train": {"family": 7}}, r"'train\.family' must be one of unet, "),
        ({"project": 7, "train": {"crop": 64}}, r"'train\.crop' must be a list of 2 whole numbers, found 64"),
        ({"project": 7, "train": {"crop": [64]}}, r"'train\.crop' must be a list of 2 whole numbers, found \[64\]"),
        ({"project": 7, "train": {"crop": [64, "x"]}}, r"'train\.crop' must be a whole number, found 'x'"),
        ({"project": 7, "stages": [1]}, "'stages' must be a text, found 1"),
        ({"project": 7, "finetune": {"epochs": 0}}, "epochs must be at least 1"),
        ({"project": 7, "train": [1]}, "'train' must be a mapping"),
        ({"project": 7, "start": "over"}, "'start' must be one of auto, champion, scratch"),
        ({"project": 7, "gate": {"margin": "wide"}}, r"'gate\.margin' must be a number"),
        ({"project": 7, "gate": {"flor": 0.1}}, r"'gate' has no key 'flor'\. Did you mean 'floor'\?"),
        ({"project": 7, "gate": 3}, "gate: expected a mapping"),
        ({"project": 7, "gate": {"floors": {"Земля": "x"}}}, r"'gate\.floors\.Земля' must be a number"),
        ({"project": 7, "select": {"count": -1}}, r"'select\.count' must be 0 or above"),
        ({"project": 7, "prelabel": {"threshold": 2}}, r"'prelabel\.threshold' must be a probability"),
        ({"project": 7, "stages": "acceptance"}, "'stages' must be a list of texts"),
        ({"project": 7, "validation": 60, "test": 60}, "leave nothing to train on"),
        ({"project": 7, "test": 0.2}, "'test' is a percentage: for 20% write 20, found 0.2"),
        ({"project": 7, "projekt": 1}, "a cycle's configuration has no key 'projekt'"),
        ({"project": 7, "new_labels": 1}, "'new_labels' must be true or false"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^cycle.yaml: .*{message}"):
        CycleConfig.from_dict(values, source="cycle.yaml")


def test_changes_are_named() -> None:
    old, new = CycleConfig(project=7), CycleConfig(project=8, device="cpu")
    assert changes(old.to_dict(), new.to_dict()) == ["project was 7, not 8"]


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cycle.yaml"
    assert read_settings(path) == {}
    path.write_text("")
    assert read_settings(path) == {}
    path.write_text("project: 7\ngate: {floors: {Земля: 0.1}}\n", encoding="utf-8")
    assert read_settings(path) == {"project": 7, "gate": {"floors": {"Земля": 0.1}}}
    for text, message in (
        ("- 1", "expected settings"),
        ("a: [", "cannot be read as YAML"),
        ("1: 2", "expected settings"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_settings(path)
