"""What determines a run's result, and where the run happens."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sscloud import __version__
from sscloud.architecture import STRIDE, Architecture, Family
from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, SSCloudError
from sscloud.files import atomic_write
from sscloud.frame import Azimuth, Frame
from sscloud.image import Encoding, Resample
from sscloud.labels import LabelSchema

CONFIG = "config.json"

RARE_CROPS = 0.5
"""Share of the crops that are cut around rare classes, unless another is asked for."""

LossName = Literal["ce+dice", "ce", "focal+dice", "ce+tversky", "ce+lovasz"]
ClassWeights = Literal["smoothed", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that determines a run's result; kept in the run folder."""

    dataset: str
    labels: str | None = None
    """A label schema to use instead of the data set's own."""
    epochs: int = 50
    batch_size: int = 1
    scale: float = 0.1
    learning_rate: float | None = None
    """Peak of the schedule; None: as `peak_learning_rate` says."""
    weight_decay: float = 1e-4
    validation: float | None = None
    """Percent of the panoramas; None: the data set's frozen splits, or 10 where it has none."""
    amp: bool = False
    classes: int | None = None
    """Output channels; None: as many as the schema has classes."""
    family: Family = "unet"
    encoder: str | None = None
    """Of the families other than unet; None: resnet34."""
    pretrained: bool = True
    """Whether a new encoder starts from weights that its makers trained on ImageNet."""
    base_width: int = 64
    bilinear: bool = False
    wrap: bool = True
    resample: Resample = "valid-area"
    frame: Frame | None = None
    """In which the network sees normals; None: view where the azimuth convention is known, else scanner."""
    augment: bool = True
    """Yaw and mirror, where the data set's azimuth convention is known."""
    tilt: float = 0.0
    """The largest tilt of the scanner that augmentation plays, degrees."""
    crop: tuple[int, int] | None = None
    """(h, w) that training cuts out of the scaled panoramas; None: whole panoramas."""
    rare_crops: float = RARE_CROPS
    """Share of the crops that are cut around a pixel of a class drawn with favour for the rare ones."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    loss: LossName = "ce+dice"
    class_weights: ClassWeights = "smoothed"
    """Of the cross-entropy or focal loss."""
    label_smoothing: float = 0.0
    latitude_weights: bool = False
    """Weigh pixels by the solid angle they cover."""
    ema: float = 0.0
    """Decay of the moving average of the weights, per step; 0: none."""
    patience: int | None = None
    """Epochs without a better mIoU after which training ends; None: never."""
    max_hours: float | None = None
    """Of training, after which it ends with a whole epoch; None: no limit. Makes the result depend on the machine."""
    load: str | None = None
    """A bundle or a .pth checkpoint to start from."""
    replay: float = 1.0
    """Share of the panoramas which the loaded bundle has learned from already that an epoch shows again."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("scale", 0 < self.scale <= 1, "above 0 and at most 1"),
            ("learning_rate", self.learning_rate is None or self.learning_rate > 0, "above 0"),
            ("validation", self.validation is None or 0 <= self.validation < 100, "a percentage from 0 to below 100"),
            ("base_width", 1 <= self.base_width <= 512, "1 to 512"),
            ("classes", self.classes is None or 1 <= self.classes <= 256, "1 to 256"),
            ("seed", self.seed >= 0, "0 or above"),
            ("tilt", 0 <= self.tilt <= 45, "0 to 45 degrees"),
            ("crop", self.crop is None or min(self.crop) >= STRIDE, f"at least {STRIDE} pixels on each side"),
            ("rare_crops", 0 <= self.rare_crops <= 1, "a share from 0 to 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("loss", self.loss in get_args(LossName), f"one of {', '.join(get_args(LossName))}"),
            (
                "class_weights",
                self.class_weights in get_args(ClassWeights),
                f"one of {', '.join(get_args(ClassWeights))}",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to below 1"),
            ("ema", 0 <= self.ema < 1, "0 to below 1"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1"),
            ("max_hours", self.max_hours is None or self.max_hours > 0, "above 0"),
            ("replay", 0 <= self.replay <= 1, "a share from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"--{name.replace('_', '-')} must be {expected}, found {getattr(self, name)}.")

    @property
    def peak_learning_rate(self) -> float:
        """Peak of the schedule: as asked for, else 1e-3 for a UNet of base width 64.

        Narrower networks take larger steps (G. Yang et al., "Tensor Programs V", 2022), here by the root of the ratio:
        2.8e-3 at base width 8, measured in benchmarks/learning.md. Networks that start from a pretrained encoder take
        3e-4, as is usual for them.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-4 if self.family != "unet" else 1e-3 * (64 / self.base_width) ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run happens and what else it writes; nothing of it changes the model."""

    run: Path
    resume: bool = False
    device: str = "auto"
    memory: float | None = None
    """GiB that training may use; None: what the device has free."""
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

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ConfigError(f"--version must be a whole number from 1 (CVAT demands one), found {self.version}.")
        if not self.name.strip():
            raise ConfigError("--name must not be empty: CVAT shows it.")
        if self.memory is not None and not self.memory > 0:
            raise ConfigError(f"--memory must be above 0 GiB, found {self.memory:g}.")

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.processes_per_node * self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run found about its data; with the configuration it is all that a bundle needs besides the weights."""

    snapshot: str
    architecture: Architecture
    labels: LabelSchema
    label_ids: tuple[int, ...]
    encoding: Encoding
    aspect: float
    elevation: tuple[float, float]
    azimuth: Azimuth | None
    parent: str | None
    frame: Frame = "scanner"
    """In which the network sees normals."""
    learned: tuple[str, ...] = ()
    """Digests of the panoramas and masks that it and its parents were trained on."""
    code_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "architecture": self.architecture.to_dict(),
            "labels": self.labels.to_dict(),
            "azimuth": dataclasses.asdict(self.azimuth) if self.azimuth else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str) -> "RunFacts":
        """Read what `to_dict` wrote."""
        return cls(
            **{
                **data,
                "architecture": Architecture(**data["architecture"]),
                "labels": LabelSchema.from_dict(data["labels"], source=source),
                "label_ids": tuple(data["label_ids"]),
                "elevation": tuple(data["elevation"]),
                "learned": tuple(data.get("learned", ())),
                "azimuth": Azimuth(**data["azimuth"]) if data["azimuth"] else None,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run folder's `config.json`."""

    config: TrainConfig
    facts: RunFacts


def read_run(run: Path) -> Run:
    """Read a run folder's configuration.

    Raises:
        ConfigError: no run, or a damaged one.
    """
    file = run / CONFIG
    try:
        data = json.loads(file.read_bytes())
        values = data["config"]
        crop = values.get("crop")
        config = TrainConfig(**{**values, "crop": tuple(crop) if crop else None})
        return Run(config=config, facts=RunFacts.from_dict(data["facts"], source=str(file)))
    except FileNotFoundError as error:
        raise ConfigError(f"{run} is no run: it has no {CONFIG}. `sscloud train … -o {run}` makes one.") from error
    except (OSError, ValueError, TypeError, KeyError, SSCloudError) as error:
        raise ConfigError(f"{file} cannot be used: {error}. Start a new run.") from error


def resumed_config(run: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of an interrupted run.

    Args:
        run: the run folder.
        given: values asked for again; they must be those the run was started with.

    Raises:
        ConfigError: no readable configuration, or another one was asked for.
    """
    stored = read_run(run).config
    # A data set may have moved; that it is the same one, its snapshot tells.
    changed = {name: value for name, value in given.items() if name != "dataset" and getattr(stored, name) != value}
    if changed:
        lines = "; ".join(f"{name} was {getattr(stored, name)!r}, not {value!r}" for name, value in changed.items())
        raise ConfigError(
            f"{run} goes on as it was started ({lines}). Leave these out with --resume, or start a new run with "
            "--load to build on its model."
        )
    return dataclasses.replace(stored, dataset=given.get("dataset", stored.dataset))


def inherited(model: Path) -> dict[str, Any]:
    """The settings that a run takes over from the bundle it starts from; none from a checkpoint, which has none.

    Raises:
        BundleError: a folder that is no bundle.
    """
    if not model.is_dir():
        return {}
    manifest = ModelBundle.load(model).manifest
    network = manifest.architecture
    return {
        "scale": manifest.scale,
        "resample": manifest.resample,
        "family": network.family,
        "encoder": network.encoder,
        "base_width": network.base_width,
        "bilinear": network.upsampling != "transposed",
        "wrap": network.wrap,
    }


def write_config(run: Path, config: TrainConfig, facts: RunFacts) -> None:
    """Write `config.json`: the configuration and what was found about the data."""
    content = {"config": dataclasses.asdict(config), "facts": facts.to_dict()}
    atomic_write(run / CONFIG, json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")
