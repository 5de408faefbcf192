import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sscloud.architecture import Architecture
from sscloud.errors import ConfigError
from sscloud.frame import Azimuth
from sscloud.labels import LabelSchema
from training.config import Place, RunFacts, TrainConfig, read_run, resumed_config, write_config

FACTS = RunFacts(
    snapshot="0123456789abcdef",
    architecture=Architecture(classes=6, base_width=4),
    labels=LabelSchema.default(),
    label_ids=(0, 2, 5, 6, 65, 66),
    encoding="normals",
    aspect=2.4,
    elevation=(90.0, -60.0),
    azimuth=Azimuth(direction=-1, column_0=12.5),
    parent="street v1",
)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, r"--epochs must be at least 1, found 0"),
        ("batch_size", 0, r"--batch-size must be at least 1"),
        ("scale", 0.0, r"--scale must be above 0 and at most 1, found 0\.0"),
        ("scale", 1.5, r"--scale must be"),
        ("scale", float("nan"), r"--scale must be .* found nan"),
        ("learning_rate", 0.0, r"--learning-rate must be above 0"),
        ("validation", 100.0, r"--validation must be a percentage from 0 to below 100"),
        ("validation", -1.0, r"--validation must be"),
        ("base_width", 0, r"--base-width must be 1 to 512"),
        ("classes", 257, r"--classes must be 1 to 256"),
        ("seed", -1, r"--seed must be 0 or above"),
    ],
)
def test_values_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"dataset": "data", field: value})


def test_defaults_are_milesials() -> None:
    config = TrainConfig(dataset="data")

    assert (config.batch_size, config.scale, config.validation, config.base_width) == (1, 0.1, None, 64)
    assert config.wrap
    assert config.classes is None


def test_round_trip(tmp_path: Path) -> None:
    config = TrainConfig(dataset="данные", epochs=3, load="a/b")
    for facts in (FACTS, dataclasses.replace(FACTS, azimuth=None, parent=None)):
        write_config(tmp_path, config, facts)

        assert read_run(tmp_path).config == config
        assert read_run(tmp_path).facts == facts
    assert "данные" in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run: it has no config\.json\. `sscloud train"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "key", "value", "list", "missing"])
def test_damaged_run(tmp_path: Path, damage: str) -> None:
    write_config(tmp_path, TrainConfig(dataset="data"), FACTS)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    if damage == "key":
        data["config"]["surprise"] = 1
    elif damage == "value":
        data["config"]["epochs"] = 0
    elif damage == "missing":
        del data["facts"]["labels"]
    elif damage == "list":
        data = [1]
    text = json.dumps(data)
    file.write_text(text[:50] if damage == "truncated" else text, encoding="utf-8")

    with pytest.raises(ConfigError, match=r"config\.json cannot be used: .*Start a new run"):
        read_run(tmp_path)


def test_resume_takes_what_was_stored(tmp_path: Path) -> None:
    config = TrainConfig(dataset="data", epochs=7, scale=0.2)
    write_config(tmp_path, config, FACTS)

    assert resumed_config(tmp_path, {"dataset": "data"}) == config
    assert resumed_config(tmp_path, {"dataset": "data", "epochs": 7}) == config


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    write_config(tmp_path, TrainConfig(dataset="data", epochs=7), FACTS)

    with pytest.raises(ConfigError, match=r"\(epochs was 7, not 9; scale was 0\.1, not 0\.5\)\. Leave these out"):
        resumed_config(tmp_path, {"dataset": "data", "epochs": 9, "scale": 0.5})


def test_world_size() -> None:
    assert Place(run=Path("run")).world_size == 1
    assert Place(run=Path("run"), processes_per_node=4, nodes=2).world_size == 8
