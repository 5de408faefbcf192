"""What determines a run's result, and where the run happens."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from sscloud.image import Resample

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that determines a run's result; kept in the run folder."""

    dataset: str
    labels: str | None = None
    """A label schema to use instead of the data set's own."""
    epochs: int = 50
    batch_size: int = 1
    scale: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    validation: float = 10.0
    """Percent of the panoramas."""
    amp: bool = False
    classes: int | None = None
    """Output channels; None: as many as the schema has classes."""
    base_width: int = 64
    bilinear: bool = False
    wrap: bool = True
    resample: Resample = "valid-area"
    augment: bool = True
    """Yaw and mirror, where the data set's azimuth convention is known."""
    load: str | None = None
    """A bundle or a .pth checkpoint to start from."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("scale", 0 < self.scale <= 1, "above 0 and at most 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("validation", 0 <= self.validation < 100, "a percentage from 0 to below 100"),
            ("base_width", 1 <= self.base_width <= 512, "1 to 512"),
            ("classes", self.classes is None or 1 <= self.classes <= 256, "1 to 256"),
            ("seed", self.seed >= 0, "0 or above"),
        ):
            if not ok:
                raise ConfigError(f"--{name.replace('_', '-')} must be {expected}, found {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run happens and what else it writes; nothing of it changes the model."""

    run: Path
    resume: bool = False
    device: str = "auto"
    cache: Path | None = None
    """Folder for scaled panoramas; None: inside the data set."""
    tracking_uri: str | None = None
    """MLflow store; None: a SQLite file beside the run."""
    wandb: bool = False
    """Also log to Weights & Biases, offline."""
    checkpoints: Path | None = None
    """Where to write a `checkpoint_epochN.pth` an epoch, as milesial's train.py does; None: nowhere."""
    name: str = "sscloud"
    version: int = 1
    rank: int = 0
    processes_per_node: int = 1
    nodes: int = 1

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.processes_per_node * self.nodes


def resumed_config(run: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of an interrupted run.

    Args:
        run: the run folder.
        given: values asked for again; they must be those the run was started with.

    Raises:
        ConfigError: no readable configuration, or another one was asked for.
    """
    file = run / CONFIG
    try:
        stored = TrainConfig(**json.loads(file.read_bytes())["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} cannot be read ({error}), so {run} cannot be resumed. Start a new run.") from error
    changed = {name: value for name, value in given.items() if getattr(stored, name) != value}
    if changed:
        lines = "; ".join(f"{name} was {getattr(stored, name)!r}, not {value!r}" for name, value in changed.items())
        raise ConfigError(
            f"{run} goes on as it was started ({lines}). Leave these out with --resume, or start a new run with "
            "--load to build on its model."
        )
    return stored


def write_config(run: Path, config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Write `config.json`: the configuration and what was found about the data."""
    text = json.dumps({"config": dataclasses.asdict(config), **facts}, ensure_ascii=False, indent=2)
    atomic_write(run / CONFIG, text.encode() + b"\n")
