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
from torch.utils.data import DataLoader

from sscloud.bundle import Checkpoint, ModelBundle, channel_ids, read_checkpoint
from sscloud.errors import BundleError, ConfigError, DatasetError, TrainingError
from sscloud.files import atomic_write
from sscloud.inference import find_device
from sscloud.labels import LabelSchema
from sscloud.unet import Architecture, UNet, Upsampling
from training import memory
from training.augment import YawMirror
from training.callbacks import AtomicCheckpoints, EpochLines, History, MilesialCheckpoints, ProgressBar
from training.config import CONFIG, Place, RunFacts, TrainConfig, read_run, write_config
from training.dataset import (
    CACHE,
    CachedItem,
    DatasetFolder,
    EpochSampler,
    Panoramas,
    build_cache,
    class_shares,
    open_dataset,
    snapshot_id,
    split,
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
        _check_unchanged(place, data.snapshot)
        write_config(place.run, config, _facts(config, data, model.architecture, label_ids))
    schema = data.folder.schema
    weights = class_weights(class_shares(data.training, schema))
    module = SegmentationModule(
        model,
        # Channels beyond the schema's classes have no pixels; their weight never counts.
        weights=torch.cat([weights, torch.ones(len(label_ids) - len(weights))]),
        label_ids=schema.class_ids,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        steps=config.epochs * -(-len(data.sampler) // config.batch_size),
    )
    last = place.run / LAST
    with _calm():
        trainer = _trainer(config, place, label_ids)
        try:
            trainer.fit(
                module,
                _training_batches(config, data),
                _validation_batches(data, place),
                ckpt_path=last if place.resume and last.exists() else None,
                weights_only=True,
            )
        except (RuntimeError, MemoryError) as error:
            if memory.is_out_of_memory(error):
                advice = memory.advise(
                    model.architecture,
                    config.batch_size,
                    data.folder.items[0].size_hw,
                    config.scale,
                    amp=config.amp,
                    available=_device_memory(place.device),
                )
                raise TrainingError(f"Out of memory. {advice}") from error
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt
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
    folder = open_dataset(Path(config.dataset), labels=Path(config.labels) if config.labels else None)
    sizes = {item.size_hw for item in folder.items}
    if config.batch_size > 1 and len(sizes) > 1:
        raise DatasetError(
            f"{folder.path} holds panoramas of {len(sizes)} sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}), "
            "which do not fit in one batch. Use --batch-size 1."
        )
    if config.augment and folder.facts.azimuth is None and place.rank == 0:
        log.warning(
            "%s states no azimuth convention, so panoramas are neither turned nor mirrored. If you know it, write "
            "dataset.yaml there with, for example, azimuth: {direction: 1, column_0: 0.0}.",
            folder.path,
        )
    items = build_cache(
        folder,
        scale=config.scale,
        resample=config.resample,
        folder=place.cache or folder.path / CACHE,
        quiet=place.rank > 0,
    )
    training, validation = split(items, config.validation)
    return _Data(
        folder=folder,
        training=training,
        validation=validation,
        sampler=EpochSampler(len(training), seed=config.seed, rank=place.rank, world_size=place.world_size),
        snapshot=snapshot_id(items),
    )


def _training_batches(config: TrainConfig, data: _Data) -> DataLoader[Any]:
    # Reading a memory-mapped item takes well under a millisecond: worker processes would cost more than they give.
    azimuth = data.folder.facts.azimuth
    transform = YawMirror(azimuth) if config.augment and azimuth is not None else None
    items = Panoramas(data.training, data.folder.schema, transform=transform, seed=config.seed)
    return DataLoader(items, config.batch_size, sampler=data.sampler)


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
    loaded, ids = _loaded(path, schema)
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


def _loaded(path: Path, schema: LabelSchema) -> tuple[UNet, tuple[int, ...]]:
    if path.is_dir():
        bundle = ModelBundle.load(path)
        return bundle.model(), bundle.manifest.label_ids
    checkpoint = read_checkpoint(path)
    return checkpoint.model, channel_ids(checkpoint, schema, source=str(path))


def _channels(model: UNet, schema: LabelSchema) -> tuple[int, ...]:
    """The label id of every channel."""
    return channel_ids(Checkpoint(model=model, mask_values=schema.class_ids), schema, source="--classes")


def _check_unchanged(place: Place, snapshot: str) -> None:
    """Refuse to go on with a run on other data than it began with."""
    if not (place.resume and (place.run / CONFIG).exists()):
        return
    before = read_run(place.run).facts.snapshot
    if before != snapshot:
        raise ConfigError(
            f"The data set changed since {place.run} was started (snapshot {before}, now {snapshot}). "
            "Start a new run, with --load to build on this one's model."
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


def _trainer(config: TrainConfig, place: Place, label_ids: tuple[int, ...]) -> pl.Trainer:
    callbacks: list[pl.Callback] = [
        ProgressBar() if os.isatty(2) else EpochLines(),
        History(place.run / METRICS),
        ModelCheckpoint(
            (place.run / BEST).parent,
            filename=Path(BEST).stem,
            monitor="miou" if config.validation else None,
            mode="max",
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
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
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
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
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*treespec, LeafSpec.*",
            ".*It is recommended to use .self.log.*sync_dist=True.*",  # the scores are summed over processes already
        ):
            warnings.filterwarnings("ignore", message)
        yield
