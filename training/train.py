"""Data set → run: a folder with the whole configuration, checkpoints, metrics, and the best model as a bundle.

RUN/
  config.json          everything that determines the result
  checkpoints/         last.ckpt (to resume from), best.ckpt (highest mIoU on the validation part)
  metrics.csv          a row an epoch
  bundle/              the best model, ready for `sscloud evaluate`, `predict` and `package`
"""

import contextlib
import dataclasses
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from mlflow.exceptions import MlflowException
from torch.utils.data import DataLoader

from sscloud.architecture import Architecture, Upsampling
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import Checkpoint, channel_ids, load_model, read_checkpoint
from sscloud.errors import BundleError, ConfigError, DatasetError, TrainingError
from sscloud.files import atomic_write
from sscloud.forward import find_device
from sscloud.image import scaled_size
from sscloud.inference import is_panorama
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training import memory
from training.augment import RollFlip, YawMirror
from training.callbacks import AtomicCheckpoints, EpochLines, History, MilesialCheckpoints, ProgressBar
from training.config import CONFIG, Place, RunFacts, TrainConfig, read_run, write_config
from training.dataset import (
    CACHE,
    CachedItem,
    DatasetFolder,
    EpochSampler,
    Panoramas,
    Transform,
    build_cache,
    class_shares,
    learning_parts,
    open_dataset,
    snapshot_of,
)
from training.export import BEST, METRICS, export_bundle
from training.losses import class_weights
from training.module import SegmentationModule

BUNDLE, LAST = "bundle", "checkpoints/last.ckpt"

log = logging.getLogger(__name__)


def train(config: TrainConfig, place: Place) -> ModelBundle | None:
    """Train a model, or go on with a run that was interrupted.

    Returns:
        The best model; None in those processes of a distributed run that write nothing.

    Raises:
        DatasetError: the data cannot be used; raised before training starts.
        ConfigError: the run exists already, or its data changed since it was started.
        BundleError: `load` does not fit.
        TrainingError: out of memory, with what would fit.
    """
    if place.rank == 0 and (place.run / CONFIG).exists() and not place.resume:
        raise ConfigError(
            f"{place.run} holds a run already. Go on with it by --resume, or name another place with --output."
        )
    find_device(place.device)
    data = _prepare(config, place)
    model = _build_model(config, data.folder.schema)
    label_ids = _channels(model, data.folder.schema)
    if place.rank == 0:
        facts = _facts(config, data, model.architecture, label_ids)
        _check_unchanged(place, facts)
        write_config(place.run, config, facts)
    schema = data.folder.schema
    weights = class_weights(class_shares(data.training, schema))
    module = SegmentationModule(
        model,
        # Channels beyond the schema's classes have no pixels; their weight never counts.
        weights=torch.cat([weights, torch.ones(len(label_ids) - len(weights))]),
        label_ids=schema.class_ids,
        channel_ids=label_ids,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        steps=config.epochs * -(-len(data.sampler) // config.batch_size),
    )
    last = place.run / LAST
    _check_memory(config, data, model.architecture, place)
    with _calm():
        trainer = _trainer(config, place, label_ids, validated=bool(data.validation))
        try:
            trainer.fit(
                module,
                _training_batches(config, data, place),
                _validation_batches(data, place),
                ckpt_path=last if place.resume and last.exists() else None,
                weights_only=True,
            )
        except (RuntimeError, MemoryError) as error:
            if memory.is_out_of_memory(error):
                raise TrainingError(f"Out of memory. {_advice(config, data, model.architecture, place)}") from error
            raise
        except (SystemExit, MlflowException) as error:
            if not trainer.interrupted:
                raise
            # A Ctrl-C in the middle of a row leaves the store locked, and closing it fails; the checkpoints are whole.
            # Lightning answers Ctrl-C by leaving the process, deaf to further ones; callers shall decide that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error
    if not trainer.is_global_zero:
        return None
    return export_bundle(place.run, place.run / BUNDLE, name=place.name, version=place.version, overwrite=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """The prepared data of one process."""

    folder: DatasetFolder
    training: list[CachedItem]
    validation: list[CachedItem]
    sampler: EpochSampler
    snapshot: str


def _prepare(config: TrainConfig, place: Place) -> _Data:
    whole = open_dataset(Path(config.dataset), labels=Path(config.labels) if config.labels else None)
    learned, validated = learning_parts(whole, config.validation)
    # Panoramas for test are not even decoded.
    folder = dataclasses.replace(whole, items=tuple(item for item in whole.items if item.split != "test"))
    sizes = {item.size_hw for item in folder.items}
    if config.batch_size > 1 and len(sizes) > 1:
        raise DatasetError(
            f"{folder.path} holds panoramas of {len(sizes)} sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}), "
            "which do not fit in one batch. Use --batch-size 1."
        )
    crops = [item.name for item in folder.items if not is_panorama(item.size_hw, folder.aspect)]
    if crops and (config.wrap or config.augment):
        raise DatasetError(
            f"{len(crops)} of the {len(folder.items)} images of {folder.path} have another aspect than "
            f"{folder.aspect:g} ({', '.join(crops[:5])}{', …' if len(crops) > 5 else ''}): they are crops, or "
            "scans with another elevation range, and have no seam to wrap. Keep them in a data set of their own, or "
            "train with --no-wrap --no-augment."
        )
    items = build_cache(
        folder,
        scale=config.scale,
        resample=config.resample,
        folder=place.cache or folder.path / CACHE,
        quiet=place.rank > 0,
    )
    cached = {item.name: item for item in items}
    return _Data(
        folder=folder,
        training=[cached[item.name] for item in learned],
        validation=[cached[item.name] for item in validated],
        sampler=EpochSampler(len(learned), seed=config.seed, rank=place.rank, world_size=place.world_size),
        snapshot=snapshot_of(folder, items),
    )


def _training_batches(config: TrainConfig, data: _Data, place: Place) -> DataLoader[Any]:
    # Reading a memory-mapped item takes well under a millisecond: worker processes would cost more than they give.
    transform = _transform(config, data.folder, warn=place.rank == 0) if config.augment else None
    items = Panoramas(data.training, data.folder.schema, transform=transform, seed=config.seed)
    return DataLoader(items, config.batch_size, sampler=data.sampler)


def _transform(config: TrainConfig, folder: DatasetFolder, *, warn: bool) -> Transform | None:
    """What augmentation is right for this data; none where normals cannot be turned correctly."""
    facts = folder.facts
    if facts.encoding == "rgb":
        return RollFlip()
    if facts.azimuth is not None and config.resample == "valid-area":
        return YawMirror(facts.azimuth)
    reason = (
        f"{folder.path} states no azimuth convention (in dataset.yaml, for example azimuth: {{direction: 1, "
        "column_0: 0.0})"
        if facts.azimuth is None
        else "bicubic scaling blends normals with black, and such pixels cannot be turned"
    )
    if warn:
        log.warning("Panoramas are neither turned nor mirrored: %s.", reason)
    return None


def _validation_batches(data: _Data, place: Place) -> DataLoader[Any] | None:
    if not data.validation:
        return None
    # Every panorama once, whatever the number of processes; one at a time, because sizes may differ. With fewer
    # panoramas than processes each process takes them all: Lightning waits for ever for one that has none, and scores
    # are ratios, which counting everything several times does not change.
    shared = len(data.validation) >= place.world_size
    mine = data.validation[place.rank :: place.world_size] if shared else data.validation
    return DataLoader(Panoramas(mine, data.folder.schema), 1)


def _build_model(config: TrainConfig, schema: LabelSchema) -> UNet:
    """A new network, or the one that `load` names."""
    classes = config.classes or len(schema.classes)
    if classes < len(schema.classes):
        raise ConfigError(
            f"--classes {classes} is less than the {len(schema.classes)} labels of the schema "
            f"({', '.join(label.name for label in schema.classes)}). Leave --classes out, or shorten the schema."
        )
    upsampling: Upsampling = "transposed"
    if config.bilinear:
        upsampling = "bilinear" if config.wrap else "bilinear-aligned"
    architecture = Architecture(classes=classes, base_width=config.base_width, upsampling=upsampling, wrap=config.wrap)
    torch.manual_seed(config.seed)
    model = UNet(architecture)
    if config.load is None:
        return model
    path = Path(config.load)
    loaded, ids = _loaded(path, schema, scale=config.scale)
    wanted = tuple(schema.class_ids) + (0,) * (classes - len(schema.classes))
    if ids != wanted:
        raise BundleError(
            f"{path} writes the label ids {list(ids)}, the data set's schema asks for {list(wanted)}. "
            "Use the schema it was trained with, or train a new model."
        )
    found = loaded.architecture
    if (found.base_width, found.upsampling == "transposed") != (architecture.base_width, upsampling == "transposed"):
        raise BundleError(
            f"{path} holds a network of base width {found.base_width} with {found.upsampling} up-sampling; asked for "
            f"were {architecture.base_width} and {upsampling}. Set --base-width and --bilinear as it was trained."
        )
    model.load_state_dict(loaded.state_dict())
    return model


def _loaded(path: Path, schema: LabelSchema, *, scale: float) -> tuple[UNet, tuple[int, ...]]:
    if path.is_dir():
        bundle = ModelBundle.load(path)
        if bundle.manifest.scale != scale:
            log.warning(
                "%s was trained at scale %g, this run is at %g. To build on what it saw, add --scale %g.",
                path, bundle.manifest.scale, scale, bundle.manifest.scale,
            )  # fmt: skip
        return load_model(bundle), bundle.manifest.label_ids
    checkpoint = read_checkpoint(path)
    return checkpoint.model, channel_ids(checkpoint, schema, source=str(path))


def _channels(model: UNet, schema: LabelSchema) -> tuple[int, ...]:
    """The label id of every channel."""
    return channel_ids(Checkpoint(model=model, mask_values=schema.class_ids), schema, source="--classes")


def _check_unchanged(place: Place, facts: RunFacts) -> None:
    """Refuse to go on with a run on other data than it began with."""
    if not (place.resume and (place.run / CONFIG).exists()):
        return
    before = read_run(place.run).facts
    advice = "Start a new run, with --load to build on this one's model."
    if before.snapshot != facts.snapshot:
        raise ConfigError(
            f"The data set changed since {place.run} was started (snapshot {before.snapshot}, now {facts.snapshot}). "
            f"{advice}"
        )
    # The snapshot covers pictures and masks; a class index means something else when the labels change.
    names = [f.name for f in dataclasses.fields(RunFacts) if f.name != "code_version"]
    if changed := [name for name in names if getattr(before, name) != getattr(facts, name)]:
        raise ConfigError(
            f"What is known of the data set changed since {place.run} was started: {', '.join(changed)} "
            f"(labels.yaml, dataset.yaml). Put it back as it was. {advice}"
        )


def _facts(config: TrainConfig, data: _Data, architecture: Architecture, label_ids: tuple[int, ...]) -> RunFacts:
    facts, aspect = data.folder.facts, data.folder.aspect
    parent = None
    if config.load is not None:
        folder = Path(config.load)
        parent = ModelBundle.load(folder).manifest.title if folder.is_dir() else folder.name
    return RunFacts(
        snapshot=data.snapshot,
        architecture=architecture,
        labels=data.folder.schema,
        label_ids=label_ids,
        encoding=facts.encoding,
        aspect=aspect,
        # Without a statement, square pixels from the zenith down: +90 to -90 for 2:1, less for scanners with a cone.
        elevation=facts.elevation or (90.0, max(-90.0, 90.0 - 360.0 / aspect)),
        azimuth=facts.azimuth,
        parent=parent,
    )


def _trainer(config: TrainConfig, place: Place, label_ids: tuple[int, ...], *, validated: bool) -> pl.Trainer:
    callbacks: list[pl.Callback] = [
        ProgressBar() if os.isatty(2) else EpochLines(),
        History(place.run / METRICS),
        # Two, because one with save_last writes last.ckpt only when the best one improves; their modes tell their
        # states apart.
        _checkpoint(place.run / BEST, monitor="miou" if validated else None, mode="max"),
        _checkpoint(place.run / LAST, monitor=None, mode="min"),
    ]
    if place.checkpoints is not None:
        callbacks.append(MilesialCheckpoints(place.checkpoints, label_ids))
    device = find_device(place.device)
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=place.processes_per_node if place.world_size > 1 or device.index is None else [device.index],
        num_nodes=place.nodes,
        strategy=DDPStrategy() if place.world_size > 1 else "auto",
        precision=_precision(device) if config.amp else "32-true",
        max_epochs=config.epochs,
        logger=_loggers(config, place),
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
    )


def _checkpoint(path: Path, *, monitor: str | None, mode: Literal["min", "max"]) -> ModelCheckpoint:
    return ModelCheckpoint(
        path.parent,
        filename=path.stem,
        monitor=monitor,
        mode=mode,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _precision(device: torch.device) -> Literal["bf16-mixed", "16-mixed"]:
    """bfloat16 needs no loss scaling and does not overflow; GPUs older than Ampere only have float16."""
    return "16-mixed" if device.type == "cuda" and not torch.cuda.is_bf16_supported() else "bf16-mixed"


def _loggers(config: TrainConfig, place: Place) -> list[Logger]:
    uri = place.tracking_uri or f"sqlite:///{place.run.resolve().parent / 'mlflow.db'}"
    remembered = place.run / "mlflow_run_id"
    mlflow = MLFlowLogger(
        "sscloud",
        run_name=place.run.name,
        tracking_uri=uri,
        run_id=remembered.read_text().strip() if place.resume and remembered.exists() else None,
    )
    if place.rank == 0:
        atomic_write(remembered, f"{mlflow.run_id}\n".encode())
        mlflow.log_hyperparams(dataclasses.asdict(config))
    loggers: list[Logger] = [mlflow]
    if place.wandb:
        try:
            loggers.append(WandbLogger(project="sscloud", name=place.run.name, save_dir=place.run, offline=True))
        except ModuleNotFoundError as error:
            raise ConfigError("--wandb needs Weights & Biases: pip install wandb") from error
    return loggers


def _check_memory(config: TrainConfig, data: _Data, architecture: Architecture, place: Place) -> None:
    """Refuse what cannot fit in this machine's memory: Linux would kill the process in the middle, without a word."""
    if find_device(place.device).type == "cpu":
        size_hw = scaled_size(_largest(data), config.scale)
        if memory.step_bytes(architecture, config.batch_size, size_hw, amp=config.amp) > _device_memory(place.device):
            raise TrainingError(f"Not enough memory. {_advice(config, data, architecture, place)}")


def _advice(config: TrainConfig, data: _Data, architecture: Architecture, place: Place) -> str:
    return memory.advise(
        architecture,
        config.batch_size,
        _largest(data),
        config.scale,
        amp=config.amp,
        available=_device_memory(place.device),
    )


def _largest(data: _Data) -> tuple[int, int]:
    return max((item.size_hw for item in data.folder.items), key=lambda size: size[0] * size[1])


def _device_memory(name: str) -> int:
    """Bytes that training may use on a device."""
    device = find_device(name)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep the libraries' remarks about choices that were made on purpose away from the screen."""
    for name in ("lightning.pytorch", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # it warns that a store is new
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*You defined a .validation_step. but have no .val_dataloader.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*treespec, LeafSpec.*",
            ".*number of training batches .* is smaller than the logging interval.*",  # what is logged comes by epoch
            ".*It is recommended to use .self.log.*sync_dist=True.*",  # the scores are summed over processes already
        ):
            warnings.filterwarnings("ignore", message)
        yield
