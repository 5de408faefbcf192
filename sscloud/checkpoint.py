"""Networks on disk: weights of bundles, and checkpoints of milesial/Pytorch-UNet.

What a bundle says of itself is read by `sscloud.bundle`, without PyTorch.
"""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle
from sscloud.errors import BundleError
from sscloud.files import atomic_folder, atomic_write
from sscloud.image import Encoding
from sscloud.labels import LabelSchema
from sscloud.networks import Network, load_network
from sscloud.unet import UNet, architecture_of, build

log = logging.getLogger(__name__)


def load_model(bundle: ModelBundle) -> Network:
    """A bundle's network with its weights mapped into memory, in evaluation mode on the CPU.

    Raises:
        BundleError: the weights cannot be read, or do not fit the architecture.
        ConfigError: the library that the network is built of is missing.
    """
    file = bundle.path / WEIGHTS
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise BundleError(f"{file} is not a safetensors file: {error}. Copy the bundle again.") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}. Copy the bundle again.") from error
    return load_network(bundle.manifest.architecture, state, source=str(file))


def save_bundle(path: Path, model: Network, manifest: Manifest, *, overwrite: bool = False) -> ModelBundle:
    """Write a bundle, whole or not at all.

    Raises:
        ConfigError: `path` exists and `overwrite` is not set.
        BundleError: the manifest does not fit the model.
    """
    if manifest.architecture != model.architecture:
        raise BundleError(f"The manifest describes {manifest.architecture}, the model is {model.architecture}.")
    weights = save_tensors({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    manifest = dataclasses.replace(manifest, weights_sha256=hashlib.sha256(weights).hexdigest())
    manifest.check("The manifest")
    text = json.dumps(manifest.to_dict(), ensure_ascii=False, indent=2) + "\n"
    with atomic_folder(path, marker=MANIFEST, overwrite=overwrite) as folder:
        atomic_write(folder / WEIGHTS, weights)
        atomic_write(folder / MANIFEST, text.encode())
    return ModelBundle(path=path, manifest=manifest)


def save_checkpoint(path: Path, model: UNet, label_ids: Sequence[int]) -> None:
    """Write a `.pth` as milesial's train.py does: the state dict plus `mask_values`."""
    buffer = io.BytesIO()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save({**state, "mask_values": [int(i) for i in label_ids]}, buffer)
    atomic_write(path, buffer.getvalue())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A milesial/Pytorch-UNet checkpoint, read."""

    model: UNet
    mask_values: tuple[int, ...] | None
    """`mask_values[i]` is the label id of channel i; None when the file has none."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `checkpoint_epochN.pth` of milesial/Pytorch-UNet without running code from it.

    Raises:
        BundleError: unreadable, unsafe, or not a checkpoint of that network; names the tensor that does not fit.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, system and runtime errors for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"{path} is not a checkpoint that can be loaded safely (tensors and plain values only): {reason}"
        ) from error
    if not isinstance(content, Mapping):
        raise BundleError(f"{path} holds a {type(content).__name__}, expected a state dict (a whole model was saved?).")
    state = {str(name): value for name, value in content.items() if name != "mask_values"}
    model = build(architecture_of(state, wrap=False, source=str(path)), state, source=str(path))
    if model.architecture.classes == 1:
        raise BundleError(
            f"{path} has one channel, whose sign decides between two classes. Bundles hold a channel a class: train it "
            "again with --classes 2."
        )
    values = content.get("mask_values")
    if values is None:
        return Checkpoint(model=model, mask_values=None)
    if not isinstance(values, Sequence) or not all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255 for value in values
    ):
        raise BundleError(
            f"{path}: 'mask_values' must be a list of label ids from 0 to 255, found {str(values)[:80]}. Checkpoints "
            "trained on coloured masks have to be trained again on masks that hold ids."
        )
    if len(values) > model.architecture.classes:
        raise BundleError(
            f"{path}: 'mask_values' names {len(values)} label ids, but the network has only "
            f"{model.architecture.classes} channels."
        )
    return Checkpoint(model=model, mask_values=tuple(values))


def channel_ids(checkpoint: Checkpoint, labels: LabelSchema, *, source: str) -> tuple[int, ...]:
    """The label id of every channel of a checkpoint; channels beyond `mask_values` write 0, as milesial's predict.

    Raises:
        BundleError: an id that the labels lack.
    """
    classes = checkpoint.model.architecture.classes
    if checkpoint.mask_values is None:
        log.warning("%s has no mask_values: its channels are given the labels in the order of the schema.", source)
    named = checkpoint.mask_values if checkpoint.mask_values is not None else labels.class_ids[:classes]
    ids = named + (0,) * (classes - len(named))
    if unknown := sorted({i for i in ids if labels.by_id(i) is None}):
        raise BundleError(
            f"{source} writes the label ids {unknown}, which the labels lack (they have "
            f"{[label.id for label in labels.labels]}). Add to labels.yaml, for instance: "
            f"- {{name: …, id: {unknown[0]}}}"
        )
    return ids


def import_checkpoint(
    path: Path,
    output: Path,
    *,
    labels: LabelSchema,
    scale: float,
    elevation: tuple[float, float] = (90.0, -90.0),
    encoding: Encoding = "normals",
    name: str | None = None,
    version: int = 1,
    overwrite: bool = False,
) -> ModelBundle:
    """Turn a milesial/Pytorch-UNet checkpoint into a bundle that predicts as its predict.py does.

    Args:
        path: the `.pth` file.
        output: the bundle's folder.
        labels: names of the label ids.
        scale: the `--scale` it was trained with.
        elevation: elevation of the panoramas' top and bottom edge, degrees; gives their aspect, at square pixels.
        encoding: what the panoramas show.
        name: of the model; None: the file's name without its suffix.
        version: of the model.
        overwrite: replace `output`.

    Raises:
        BundleError: the file does not fit, or a value is out of range.
        ConfigError: `output` exists.
    """
    checkpoint = read_checkpoint(path)
    top, bottom = elevation
    if not -90 <= bottom < top <= 90:
        raise BundleError(
            f"The elevation runs from the top down within 90 to -90 degrees, found {top:g} to {bottom:g}."
        )
    manifest = Manifest(
        name=name or path.stem,
        version=version,
        architecture=checkpoint.model.architecture,
        labels=labels,
        label_ids=channel_ids(checkpoint, labels, source=str(path)),
        scale=scale,
        resample="bicubic",
        encoding=encoding,
        aspect=360 / (top - bottom),
        elevation=elevation,
        parent=path.name,
    )
    return save_bundle(output, checkpoint.model, manifest, overwrite=overwrite)
