"""Data set → run: a folder with the whole configuration, checkpoints, metrics, and the best model as a bundle.

RUN/
  config.json          everything that determines the result
  checkpoints/         last.ckpt (to resume from), best.ckpt (highest mIoU on the validation part)
  metrics.csv          a row an epoch
  bundle/              the best model, ready for `sscloud evaluate`, `predict` and `package`
  report.html          how it went, on the validation part
"""

import contextlib
import csv
import dataclasses
import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError
from torch.utils.data import DataLoader

from sscloud.architecture import Architecture, Upsampling
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import load_model, read_checkpoint
from sscloud.errors import ConfigError, DatasetError, TrainingError
from sscloud.files import atomic_write
from sscloud.forward import find_device, is_out_of_memory
from sscloud.frame import Azimuth, Frame
from sscloud.image import scaled_size
from sscloud.inference import is_panorama
from sscloud.labels import LabelSchema
from sscloud.networks import Network, build_network, last_convolution
from sscloud.tiles import MAX_BYTES
from sscloud.unet import UNet
from training import memory
from training.augment import Augment
from training.azimuth import UndecidedError, facing_share, find_azimuth
from training.batch import Batch, collate
from training.callbacks import (
    AtomicCheckpoints,
    Averaging,
    EpochLines,
    History,
    MilesialCheckpoints,
    MovableCheckpoint,
    ProgressBar,
    Throughput,
    TimeBudget,
    is_used_up,
)
from training.config import CONFIG, RARE_CROPS, Place, RunFacts, TrainConfig, read_run, write_config
from training.crops import Crops, clipped
from training.dataset import (
    CACHE,
    FACTS,
    CachedItem,
    DatasetFolder,
    EpochSampler,
    Panoramas,
    build_cache,
    class_shares,
    learning_parts,
    open_dataset,
    snapshot_of,
)
from training.export import BEST, BUNDLE, LAST, METRICS, export_bundle
from training.losses import Loss, class_weights, make_loss
from training.module import SegmentationModule
from training.registry import EXPERIMENT, RECORD, artifact_location, store_error, without_login
from training.run_report import REPORT, write_run_report
from training.sync_batch_norm import synchronise
from training.transfer import transfer

_FEW = 5
"""Panoramas for validation."""

_ENCODER = "resnet34"
"""Of networks that have one, unless another is asked for."""

_LOOKED_AT = 12
"""Panoramas in which the azimuth convention is looked for."""

_LOOKED_AT_ROWS = 256
"""Of such a panorama, at least, where it has so many."""

_FACING = 0.9
"""Share of the returns whose normals face the scanner under the right convention."""

_STORE_ERRORS = (MlflowException, SQLAlchemyError)
"""What the tracking store raises, whatever is the matter with it."""

log = logging.getLogger(__name__)


def train(config: TrainConfig, place: Place, *, folder: DatasetFolder | None = None) -> ModelBundle | None:
    """Train a model, or go on with a run that was interrupted.

    Args:
        config: what determines the result.
        place: where it happens.
        folder: the data set, opened already, with a split for every item; None: what `config.dataset` names.

    Returns:
        The best model; None in those processes of a distributed run that write nothing.

    Raises:
        DatasetError: the data cannot be used; raised before training starts.
        ConfigError: the run exists already, or its data changed since it was started.
        BundleError: `load` does not fit.
        TrainingError: out of memory, with what would fit.
        RegistryError: the tracking store does not answer, or refuses.
    """
    if place.rank == 0 and (place.run / CONFIG).exists() and not place.resume:
        raise ConfigError(
            f"{place.run} holds a run already. Go on with it by --resume, or name another place with --output."
        )
    find_device(place.device)
    parent = None if config.load is None else _parent(Path(config.load))
    data = _prepare(config, place, parent, folder)
    schema = data.folder.schema
    model = _build_model(config, schema, parent, warn=place.rank == 0, resume=place.resume)
    label_ids = _channels(model.architecture.classes, schema)
    facts = _facts(config, data, model.architecture, label_ids, parent, place)
    if place.rank == 0:
        _check_unchanged(place, facts)
        for idle in _without_effect(config, data, place):
            log.warning("%s", idle)
        write_config(place.run, config, facts)
    batches = _training_batches(config, data)
    if place.world_size > 1:
        synchronise(model, device=find_device(place.device))
    module = SegmentationModule(
        model,
        loss=_loss(config, data, channels=len(label_ids)),
        augment=_augment(config, facts, warn=place.rank == 0),
        view=facts.azimuth if facts.frame == "view" else None,
        elevation=facts.elevation,
        latitude_weights=config.latitude_weights,
        label_ids=schema.class_ids,
        channel_ids=label_ids,
        learning_rate=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        steps=config.epochs * len(batches),
        accumulate=config.accumulate,
        tile_bytes=min(MAX_BYTES, _device_memory(place) // 2),
    )
    _check_memory(config, data, model.architecture, place)
    if place.rank == 0:
        print(_header(config, data, place), file=sys.stderr)
    if not (place.resume and _has_stopped_early(config, place.run)):
        _fit(module, batches, config, data, place)
    if place.rank > 0:
        return None
    bundle = export_bundle(place.run, place.run / BUNDLE, name=place.name, version=place.version, overwrite=True)
    try:
        write_run_report(place.run, dataset=data.folder, output=place.run / REPORT, device=place.device)
    except Exception as error:  # of whatever kind: a page is no reason to lose a run
        log.warning("No report was written: %s", error)
    return bundle


def _fit(
    module: SegmentationModule, batches: DataLoader[Batch], config: TrainConfig, data: "_Data", place: Place
) -> None:
    """Train from the start, or from the last whole epoch."""
    last, architecture = place.run / LAST, module.model.architecture
    label_ids = _channels(architecture.classes, data.folder.schema)
    with _calm():
        trainer = _trainer(config, place, label_ids, validated=bool(data.validation))
        try:
            trainer.fit(
                module,
                batches,
                _validation_batches(data, place),
                ckpt_path=last if place.resume and last.exists() else None,
                weights_only=True,
            )
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TrainingError(f"Out of memory. {_advice(config, data, architecture, place)}") from error
            raise
        except (SystemExit, *_STORE_ERRORS) as error:
            if not _began_with_ctrl_c(error):  # Lightning calls every end by an error an interruption
                if isinstance(error, SystemExit):
                    raise
                raise store_error(_store(place), error) from error
            # A Ctrl-C in the middle of a row leaves the store locked, and closing it fails; the checkpoints are whole.
            # Lightning answers Ctrl-C by leaving the process, deaf to further ones; callers shall decide that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error


def _began_with_ctrl_c(error: BaseException) -> bool:
    """Whether an error was raised while Ctrl-C was being answered."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__context__
    return found is not None


def _header(config: TrainConfig, data: "_Data", place: Place) -> str:
    """What is about to happen, a line."""
    height, width = scaled_size(_largest(data.folder), config.scale)
    seen = (
        f"{width}x{height}"
        if config.crop is None
        else f"crops of {config.crop[1]}x{config.crop[0]} of {width}x{height}"
    )
    few = ", so few that its mIoU says little" if 0 < len(data.validation) < _FEW else ""
    return (
        f"{place.run}: {len(data.training)} panoramas to learn from, {len(data.validation)} to choose the epoch "
        f"by{few}; {seen} at scale {config.scale:g}, {config.epochs} epochs, {find_device(place.device)}"
    )


def _without_effect(config: TrainConfig, data: "_Data", place: Place) -> list[str]:
    """What was asked for and changes nothing here, a sentence each."""
    whole_hw = scaled_size(_largest(data.folder), config.scale)
    asked = (
        (
            config.patience is not None and not data.validation,
            "--patience has no effect without a validation part: no epoch is better than another.",
        ),
        (
            config.tilt > 0 and (config.crop is not None or not config.augment or data.azimuth is None),
            "--tilt has no effect: only whole panoramas are tilted, while they are turned and mirrored.",
        ),
        (
            config.rare_crops != RARE_CROPS and config.crop is None,
            "--rare-crops has no effect without --crop.",
        ),
        (
            config.crop is not None and clipped(config.crop, whole_hw) == whole_hw,
            f"--crop has no effect: the scaled panoramas are {whole_hw[1]}x{whole_hw[0]}.",
        ),
        (config.replay < 1 and config.load is None, "--replay has no effect without --load."),
        (
            config.family == "unet" and (config.encoder is not None or not config.pretrained),
            "--encoder and --no-pretrained have no effect on a unet, which has no encoder to choose.",
        ),
        (
            place.checkpoints is not None and config.family != "unet",
            "--pth-checkpoints has no effect: such files hold unets only.",
        ),
    )
    return [text for is_idle, text in asked if is_idle]


def _has_stopped_early(config: TrainConfig, run: Path) -> bool:
    """Whether the run ended before its last epoch, because nothing got better or time was up: none is added."""
    if not (run / METRICS).exists():
        return False
    with (run / METRICS).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if config.max_hours is not None and is_used_up([float(row["seconds"]) for row in rows], config.max_hours):
        return True
    miou = [float(row["miou"]) for row in rows if row.get("miou")]
    return config.patience is not None and len(miou) > 0 and len(miou) - 1 - miou.index(max(miou)) >= config.patience


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parent:
    """The model that training starts from."""

    model: Network
    labels: LabelSchema | None
    """None for a checkpoint, which knows ids only."""
    label_ids: tuple[int, ...] | None
    """Of its channels; None for a checkpoint without them."""
    scale: float | None
    frame: Frame
    title: str
    learned: frozenset[str]
    """Digests of what it was trained on."""


def _parent(path: Path) -> _Parent:
    if path.is_dir():
        bundle = ModelBundle.load(path)
        manifest = bundle.manifest
        return _Parent(
            model=load_model(bundle),
            labels=manifest.labels,
            label_ids=manifest.label_ids,
            scale=manifest.scale,
            frame=manifest.frame,
            title=manifest.title,
            learned=frozenset(manifest.learned),
        )
    checkpoint = read_checkpoint(path)
    return _Parent(
        model=checkpoint.model,
        labels=None,
        label_ids=checkpoint.mask_values,
        scale=None,
        frame="scanner",
        title=path.name,
        learned=frozenset(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """The prepared data of one process."""

    folder: DatasetFolder
    training: list[CachedItem]
    validation: list[CachedItem]
    crops: Crops | None
    sampler: EpochSampler
    snapshot: str
    azimuth: Azimuth | None
    """Stated, or found in the data; None where neither."""


def _prepare(config: TrainConfig, place: Place, parent: _Parent | None, folder: DatasetFolder | None) -> _Data:
    whole = folder or open_dataset(Path(config.dataset), labels=Path(config.labels) if config.labels else None)
    learned, validated = learning_parts(whole, config.validation)
    # Panoramas for test are not even decoded.
    used = dataclasses.replace(whole, items=tuple(item for item in whole.items if item.split != "test"))
    sizes = {item.size_hw for item in used.items}
    if config.batch_size * config.accumulate > 1 and len(sizes) > 1:
        raise DatasetError(
            f"{used.path} holds panoramas of {len(sizes)} sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))}), "
            "which do not fit in one batch. Use --batch-size 1 and no --accumulate."
        )
    crops = [item.name for item in used.items if not is_panorama(item.size_hw, used.aspect)]
    if crops and (config.wrap or config.augment):
        raise DatasetError(
            f"{len(crops)} of the {len(used.items)} images of {used.path} have another aspect than "
            f"{used.aspect:g} ({', '.join(crops[:5])}{', …' if len(crops) > 5 else ''}): they are crops, or "
            "scans with another elevation range, and have no seam to wrap. Keep them in a data set of their own, or "
            "train with --no-wrap --no-augment."
        )
    cache = place.cache or used.path / CACHE
    items = build_cache(used, scale=config.scale, resample=config.resample, folder=cache, quiet=place.rank > 0)
    cached = {item.name: item for item in items}
    training = [cached[item.name] for item in learned]
    if not class_shares(training, used.schema).any():
        raise DatasetError(
            f"Every pixel of the {len(training)} masks to learn from in {used.path} is void: there is nothing to "
            "learn. Do the masks hold the ids of labels.yaml?"
        )
    learned_before = parent.learned if parent else frozenset()
    known = [index for index, item in enumerate(training) if item.digest in learned_before]
    windows = None
    if config.crop is not None:
        windows = Crops(
            training,
            used.schema,
            crop=config.crop,
            rare_crops=config.rare_crops,
            seed=config.seed,
            wrap=config.wrap,
            replay=config.replay,
            known=known,
        )
    if parent is not None and parent.learned and place.rank == 0:
        log.warning(
            "%s has learned from %d of the %d panoramas; %d are new or corrected since.",
            parent.title, len(known), len(training), len(training) - len(known),
        )  # fmt: skip
    return _Data(
        folder=used,
        training=training,
        validation=[cached[item.name] for item in validated],
        crops=windows,
        sampler=EpochSampler(
            len(training) if windows is None else len(windows),
            seed=config.seed,
            rank=place.rank,
            world_size=place.world_size,
            known=known if windows is None else windows.places_of(known),
            replay=config.replay,
        ),
        snapshot=snapshot_of(used, items),
        azimuth=_azimuth(config, used, training, warn=place.rank == 0) if not crops else None,
    )


def _azimuth(config: TrainConfig, folder: DatasetFolder, items: list[CachedItem], *, warn: bool) -> Azimuth | None:
    """The azimuth convention: as stated, else as found in the data."""
    facts = folder.facts
    if facts.encoding == "rgb":
        return facts.azimuth
    elevation = _elevation(folder)
    images = (_thinned(np.load(item.image, mmap_mode="r")) for item in items[:_LOOKED_AT])
    if facts.azimuth is not None:
        shares = [facing_share(image, facts.azimuth, elevation) for image in images]
        if warn and (share := float(np.median(shares))) < _FACING:
            log.warning(
                "%s states the azimuth as direction %+d, column 0 at %g degrees, by which only %.0f %% of the upright "
                "surfaces face the scanner; above %.0f %% are expected. Leave it out to have it found in the data.",
                folder.path / FACTS, facts.azimuth.direction, facts.azimuth.column_0, 100 * share, 100 * _FACING,
            )  # fmt: skip
        return facts.azimuth
    try:
        found = find_azimuth(images, elevation)
    except UndecidedError as error:
        if warn:
            log.warning("%s Panoramas are neither turned nor mirrored.", error)
        return None
    if warn:
        log.warning(
            "The azimuth convention was found in the data: direction %+d, column 0 at %g degrees. To settle it, write "
            "azimuth: {direction: %d, column_0: %g} into %s.",
            found.direction, found.column_0, found.direction, found.column_0, folder.path / FACTS,
        )  # fmt: skip
    return found


def _thinned(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every n-th pixel of a panorama: a few ten thousand tell the azimuth."""
    step = max(1, image.shape[0] // _LOOKED_AT_ROWS)
    return image[step // 2 :: step, step // 2 :: step]


def _elevation(folder: DatasetFolder) -> tuple[float, float]:
    # Without a statement, square pixels from the zenith down: +90 to -90 for 2:1, less for scanners with a cone.
    return folder.facts.elevation or (90.0, max(-90.0, 90.0 - 360.0 / folder.aspect))


def _training_batches(config: TrainConfig, data: _Data) -> DataLoader[Batch]:
    # Reading a memory-mapped item takes well under a millisecond: worker processes would cost more than they give.
    items = Panoramas(
        data.training,
        data.folder.schema,
        encoding=data.folder.facts.encoding,
        crops=data.crops,
        seed=config.seed,
    )
    size = config.batch_size * config.accumulate
    # Layers of some networks see one value an image, and cannot learn from a last batch of one image.
    drop_last = config.family != "unet" and len(data.sampler) % size == 1 and len(data.sampler) > 1
    return DataLoader(items, size, sampler=data.sampler, collate_fn=collate, drop_last=drop_last)


def _loss(config: TrainConfig, data: _Data, *, channels: int) -> Loss:
    # Channels beyond the schema's classes have no pixels; their weight never counts.
    weights = torch.ones(channels)
    if config.class_weights == "smoothed":
        found = class_weights(class_shares(data.training, data.folder.schema))
        weights[: len(found)] = found
    return make_loss(config.loss, weights=weights, label_smoothing=config.label_smoothing)


def _augment(config: TrainConfig, facts: RunFacts, *, warn: bool) -> Augment | None:
    """What augmentation is right for this data; none where normals cannot be turned correctly."""
    if not config.augment:
        return None
    if facts.encoding == "normals" and (facts.azimuth is None or config.resample != "valid-area"):
        if warn and facts.azimuth is not None:
            log.warning(
                "Panoramas are neither turned nor mirrored: bicubic scaling blends normals with black, and such pixels "
                "cannot be turned."
            )
        return None
    return Augment(encoding=facts.encoding, azimuth=facts.azimuth, elevation=facts.elevation, tilt=config.tilt)


def _validation_batches(data: _Data, place: Place) -> DataLoader[Any] | None:
    if not data.validation:
        return None
    # Every panorama once, whatever the number of processes; one at a time, because sizes may differ. With fewer
    # panoramas than processes each process takes them all: Lightning waits for ever for one that has none, and scores
    # are ratios, which counting everything several times does not change.
    shared = len(data.validation) >= place.world_size
    mine = data.validation[place.rank :: place.world_size] if shared else data.validation
    items = Panoramas(mine, data.folder.schema, encoding=data.folder.facts.encoding)
    return DataLoader(items, 1, collate_fn=collate)


def _build_model(
    config: TrainConfig, schema: LabelSchema, parent: _Parent | None, *, warn: bool, resume: bool
) -> Network:
    """A new network, or one that goes on from another."""
    classes = config.classes or len(schema.classes)
    if classes < len(schema.classes):
        raise ConfigError(
            f"--classes {classes} is less than the {len(schema.classes)} labels of the schema "
            f"({', '.join(label.name for label in schema.classes)}). Leave --classes out, or shorten the schema."
        )
    torch.manual_seed(config.seed)
    model = build_network(
        _architecture(config, classes),
        pretrained=config.pretrained and parent is None and not resume,
    )
    if parent is not None:
        _go_on_from(parent, config, model, schema, warn=warn)
    if config.checkpointing:
        if not isinstance(model, UNet):
            raise ConfigError(f"--checkpointing is for unets; --architecture {config.family} keeps its activations.")
        model.checkpointing = True
    return model


def _architecture(config: TrainConfig, classes: int) -> Architecture:
    upsampling: Upsampling = "transposed"
    if config.bilinear:
        upsampling = "bilinear" if config.wrap else "bilinear-aligned"
    return Architecture(
        classes=classes,
        base_width=config.base_width,
        upsampling=upsampling,
        wrap=config.wrap,
        family=config.family,
        encoder=None if config.family == "unet" else config.encoder or _ENCODER,
    )


def _go_on_from(parent: _Parent, config: TrainConfig, model: Network, schema: LabelSchema, *, warn: bool) -> None:
    """Take over a trained network's weights, by the names of the labels."""
    if warn and parent.scale is not None and parent.scale != config.scale:
        log.warning(
            "%s was trained at scale %g, this run is at %g. To build on what it saw, add --scale %g.",
            parent.title, parent.scale, config.scale, parent.scale,
        )  # fmt: skip
    if warn and parent.label_ids is None:
        log.warning(
            "%s has no mask_values: its channels are given the labels in the order of the schema.", parent.title
        )
    head = last_convolution(model)
    transferred = transfer(
        parent.model.state_dict(),
        source_labels=parent.labels,
        source_ids=parent.label_ids or _channels(parent.model.architecture.classes, schema),
        target=model,
        target_ids=_channels(model.architecture.classes, schema),
        target_labels=schema,
        source_name=parent.title,
        head=next(name for name, module in model.named_modules() if module is head),
    )
    if warn and (transferred.dropped or any(label.sources != (label.name,) for label in transferred.labels)):
        log.warning("%s", transferred.describe())


def _channels(classes: int, schema: LabelSchema) -> tuple[int, ...]:
    """The label id of every channel: the schema's classes, and 0 for what is left."""
    ids = schema.class_ids[:classes] + (0,) * (classes - len(schema.class_ids))
    if schema.by_id(0) is None and 0 in ids:
        raise ConfigError(
            f"A network of {classes} channels writes the label id 0 beyond the {len(schema.classes)} labels of the "
            "schema, which has no such label. Leave --classes out, or add a label with the id 0 (a background)."
        )
    return ids


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
    # What was learned follows from the snapshot; runs of older versions do not have it.
    names = [f.name for f in dataclasses.fields(RunFacts) if f.name not in ("code_version", "learned")]
    if changed := [name for name in names if getattr(before, name) != getattr(facts, name)]:
        raise ConfigError(
            f"What is known of the data set changed since {place.run} was started: {', '.join(changed)} "
            f"(labels.yaml, dataset.yaml). Put it back as it was. {advice}"
        )


def _facts(
    config: TrainConfig,
    data: _Data,
    architecture: Architecture,
    label_ids: tuple[int, ...],
    parent: _Parent | None,
    place: Place,
) -> RunFacts:
    facts = data.folder.facts
    digests = {item.digest for item in data.training} | (parent.learned if parent else set())
    return RunFacts(
        snapshot=data.snapshot,
        architecture=architecture,
        labels=data.folder.schema,
        label_ids=label_ids,
        encoding=facts.encoding,
        aspect=data.folder.aspect,
        elevation=_elevation(data.folder),
        azimuth=data.azimuth,
        frame=_frame(config, data, parent, place),
        parent=parent.title if parent else None,
        learned=tuple(sorted(digests)),
    )


def _frame(config: TrainConfig, data: _Data, parent: _Parent | None, place: Place) -> Frame:
    """The frame that was asked for, that of the run or the model which this one goes on from, or the best possible."""
    if place.resume and (place.run / CONFIG).exists():
        return read_run(place.run).facts.frame
    possible = data.folder.facts.encoding == "normals" and data.azimuth is not None and config.resample == "valid-area"
    if config.frame == "view" and not possible:
        raise ConfigError(
            f"--frame view needs panoramas of normals whose azimuth convention is known, and --resample valid-area. "
            f"{data.folder.path} has {data.folder.facts.encoding}, azimuth "
            f"{'known' if data.azimuth else 'not known: state it in dataset.yaml'}. Use --frame scanner."
        )
    wanted = parent.frame if parent is not None else "view" if config.wrap else "scanner"
    found = config.frame or (wanted if possible else "scanner")
    if parent is not None and found != parent.frame and place.rank == 0:
        log.warning(
            "%s has learned from normals in the frame %r, this run shows them in %r: much of what it knows is lost.",
            parent.title, parent.frame, found,
        )  # fmt: skip
    return found


def _trainer(config: TrainConfig, place: Place, label_ids: tuple[int, ...], *, validated: bool) -> pl.Trainer:
    callbacks: list[pl.Callback] = [
        *([ProgressBar()] if os.isatty(2) else []),
        Throughput(),
        EpochLines(),
        History(place.run / METRICS),
        # Two, because one with save_last writes last.ckpt only when the best one improves; their modes tell their
        # states apart.
        _checkpoint(place.run / BEST, monitor="miou" if validated else None, mode="max"),
        _checkpoint(place.run / LAST, monitor=None, mode="min"),
    ]
    if config.ema:
        callbacks.append(Averaging(config.ema))
    if config.patience is not None and validated:
        callbacks.append(
            EarlyStopping("miou", mode="max", patience=config.patience, check_on_train_epoch_end=True, verbose=False)
        )
    if config.max_hours is not None:
        callbacks.append(TimeBudget(config.max_hours))
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
        logger=_loggers(config, place) if place.rank == 0 else False,  # two processes would make the store at once
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
    )


def _checkpoint(path: Path, *, monitor: str | None, mode: Literal["min", "max"]) -> ModelCheckpoint:
    return MovableCheckpoint(
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


def _tracked(remembered: Path, uri: str) -> str | None:
    """The run's number in the tracking store; None where that store does not know it."""
    run_id = remembered.read_text().strip()
    try:
        MlflowClient(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        shown = without_login(uri)
        log.warning("%s does not know the run %s (was the run folder moved?); a new record begins.", shown, run_id)
        return None
    return run_id


def _store(place: Place) -> str:
    """Address of the tracking store."""
    return place.tracking_uri or f"sqlite:///{place.run.resolve().parent / 'mlflow.db'}"


def _loggers(config: TrainConfig, place: Place) -> list[Logger]:
    try:
        loggers: list[Logger] = [_mlflow_logger(config, place)]
    except _STORE_ERRORS as error:
        raise store_error(_store(place), error) from error
    if place.wandb:
        try:
            loggers.append(WandbLogger(project="sscloud", name=place.run.name, save_dir=place.run, offline=True))
        except ModuleNotFoundError as error:
            raise ConfigError("--wandb needs Weights & Biases: pip install wandb") from error
    return loggers


def _mlflow_logger(config: TrainConfig, place: Place) -> MLFlowLogger:
    uri = _store(place)
    remembered, artifacts = place.run / RECORD, artifact_location(uri)
    mlflow = MLFlowLogger(
        EXPERIMENT,
        run_name=place.run.name,
        tracking_uri=uri,
        artifact_location=artifacts.as_uri() if artifacts is not None else None,
        run_id=_tracked(remembered, uri) if place.resume and remembered.exists() else None,
    )
    atomic_write(remembered, f"{mlflow.run_id}\n".encode())
    if not place.resume:  # a run goes on as it was started, if perhaps on a data set that was moved
        mlflow.log_hyperparams({**dataclasses.asdict(config), "learning_rate": config.peak_learning_rate})
    return mlflow


def planned(config: TrainConfig, place: Place, *, auto: Collection[str]) -> tuple[TrainConfig, memory.Plan]:
    """Choose scale or batch size so that training fits the device, by crops and activations computed twice if need be.

    Args:
        config: with any value for what is to be chosen.
        place: whose device, or memory, is planned for.
        auto: "scale", "batch_size", or both.

    Returns:
        The configuration, and the reasons.

    Raises:
        TrainingError: nothing fits.
        DatasetError: the data set cannot be opened.
    """
    if place.world_size > 1 and place.memory is None:
        raise ConfigError(
            "Several processes would plan by what each finds free, and differ. Say with --memory how many GiB each may "
            "use, or set --scale and --batch-size yourself."
        )
    folder = open_dataset(Path(config.dataset), labels=Path(config.labels) if config.labels else None)
    if len({item.size_hw for item in folder.items if item.split != "test"}) > 1:  # they do not fit in one batch
        auto = {name for name in auto if name != "batch_size"}
        config = dataclasses.replace(config, batch_size=1)
    plan = memory.plan(
        _architecture(config, config.classes or len(folder.schema.classes)),
        full_hw=_largest(folder),
        available=_device_memory(place),
        amp=config.amp,
        scale=None if "scale" in auto else config.scale,
        batch_size=None if "batch_size" in auto else config.batch_size,
        crop=config.crop,
        checkpointing=config.checkpointing,
        ema=config.ema > 0,
        loss=config.loss,
    )
    chosen = dataclasses.replace(
        config,
        scale=plan.scale,
        batch_size=plan.batch_size,
        crop=plan.crop,
        accumulate=config.accumulate * plan.accumulate,
        checkpointing=plan.checkpointing,
    )
    return chosen, plan


def _check_memory(config: TrainConfig, data: _Data, architecture: Architecture, place: Place) -> None:
    """Refuse what cannot fit in this machine's memory: Linux would kill the process in the middle, without a word."""
    if find_device(place.device).type == "cpu":
        panorama_hw = scaled_size(_largest(data.folder), config.scale)
        size_hw = clipped(config.crop, panorama_hw) if config.crop else panorama_hw
        needed = memory.step_bytes(
            architecture,
            config.batch_size,
            size_hw,
            amp=config.amp,
            checkpointing=config.checkpointing,
            has_seam=size_hw[1] == panorama_hw[1],
            ema=config.ema > 0,
            loss=config.loss,
        )
        if needed > _device_memory(place):
            raise TrainingError(f"Not enough memory. {_advice(config, data, architecture, place)}")


def _advice(config: TrainConfig, data: _Data, architecture: Architecture, place: Place) -> str:
    return memory.advise(
        architecture,
        config.batch_size,
        _largest(data.folder),
        config.scale,
        amp=config.amp,
        available=_device_memory(place),
        crop=config.crop,
        checkpointing=config.checkpointing,
        ema=config.ema > 0,
        loss=config.loss,
    )


def _largest(folder: DatasetFolder) -> tuple[int, int]:
    return max((item.size_hw for item in folder.items), key=lambda size: size[0] * size[1])


def _device_memory(place: Place) -> int:
    """Bytes that training may use."""
    if place.memory is not None:
        return int(place.memory * 2**30)
    device = find_device(place.device)
    sharing = place.processes_per_node if device.type == "cpu" else 1
    return memory.available_bytes(device) // sharing


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
