"""ModelBundle: a served model as a directory, `weights.safetensors` + `manifest.json`.

The manifest holds every convention that inference needs (scale, resampling, seam, channels, labels, …), so nothing is
asked for twice. A bundle is written once, atomically, and never changed; loading verifies the weights' sha256.
"""

import dataclasses
import hashlib
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sscloud import __version__
from sscloud.errors import BundleError, SchemaError
from sscloud.files import atomic_folder, atomic_write
from sscloud.image import Encoding, Resample
from sscloud.labels import LabelSchema
from sscloud.unet import Architecture, UNet, Upsampling, architecture_of, build

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the manifest's layout."""

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Azimuth:
    """How columns relate to directions in a panorama, in the frame its normals are given in."""

    direction: Literal[1, -1]
    """+1 when the azimuth grows with the column."""
    column_0: float
    """Azimuth of the left edge of column 0, degrees counter-clockwise from +x seen from above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle knows about its model."""

    name: str
    version: int
    """An integer, because CVAT's model list demands one."""
    architecture: Architecture
    labels: LabelSchema
    label_ids: tuple[int, ...]
    """The label id that each channel writes."""
    scale: float
    """The network sees int(scale·W) x int(scale·H)."""
    resample: Resample
    encoding: Encoding
    aspect: float
    """W/H of the panoramas it was trained on; images of another aspect (by over 2 %) are crops and not wrapped."""
    elevation: tuple[float, float]
    """Elevation of the top and the bottom edge of the panoramas, degrees."""
    azimuth: Azimuth | None = None
    parent: str | None = None
    """Name and version of the bundle that training started from."""
    snapshot: str | None = None
    """Identity of the data set."""
    metrics: dict[str, float] = field(default_factory=dict)
    code_version: str = __version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    weights_sha256: str = ""
    """Filled in when the bundle is saved."""

    @property
    def title(self) -> str:
        """Name and version, as people and answers see it."""
        return f"{self.name} v{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON types."""
        data = {name: getattr(self, name) for name in (f.name for f in dataclasses.fields(self))}
        data["architecture"] = dataclasses.asdict(self.architecture)
        data["labels"] = self.labels.to_dict()
        data["azimuth"] = dataclasses.asdict(self.azimuth) if self.azimuth else None
        return {"format": FORMAT, **data}

    @classmethod
    def from_dict(cls, data: object, *, source: str) -> "Manifest":
        """Read a manifest strictly.

        Raises:
            BundleError: another format, unknown or missing keys, wrong types or values.
        """
        if not isinstance(data, dict):
            raise BundleError(f"{source}: expected an object, found {type(data).__name__}.")
        if data.get("format") != FORMAT:
            raise BundleError(
                f"{source}: format {data.get('format')!r}; this version of SSCloud ({__version__}) reads format "
                f"{FORMAT}. Export the bundle again, or use the SSCloud it was made with."
            )
        values = {key: value for key, value in data.items() if key != "format"}
        known = {f.name for f in dataclasses.fields(cls)}
        required = {
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if values.keys() - known or required - values.keys():
            raise BundleError(
                f"{source}: unknown keys {sorted(values.keys() - known)}, "
                f"missing keys {sorted(required - values.keys())}."
            )
        try:
            azimuth = values.get("azimuth")
            manifest = cls(
                **{
                    **values,
                    "architecture": Architecture(**values["architecture"]),
                    "labels": LabelSchema.from_dict(values["labels"], source=f"{source}, labels"),
                    "label_ids": tuple(values["label_ids"]),
                    "elevation": tuple(values["elevation"]),
                    "azimuth": Azimuth(**azimuth) if azimuth is not None else None,
                }
            )
        except (TypeError, KeyError, SchemaError) as error:
            raise BundleError(f"{source}: {error}") from error
        manifest.check(source)
        return manifest

    def check(self, source: str) -> None:
        """Raise BundleError when a value is not of its type or range."""

        def require(ok: bool, name: str, expected: str) -> None:  # noqa: FBT001
            if not ok:
                raise BundleError(f"{source}: '{name}' must be {expected}, found {getattr(self, name)!r}.")

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        architecture = self.architecture
        if not (whole(architecture.classes) and whole(architecture.base_width) and isinstance(architecture.wrap, bool)):
            raise BundleError(f"{source}: 'architecture' has values of a wrong type: {architecture!r}.")
        if architecture.upsampling not in get_args(Upsampling):
            raise BundleError(f"{source}: unknown upsampling {architecture.upsampling!r}.")
        require(isinstance(self.name, str) and bool(self.name.strip()), "name", "a text")
        require(whole(self.version) and self.version >= 1, "version", "a whole number from 1")
        require(
            len(self.label_ids) == architecture.classes
            and all(whole(i) and self.labels.by_id(i) is not None for i in self.label_ids),
            "label_ids",
            f"{architecture.classes} ids that the labels have ({[label.id for label in self.labels.labels]})",
        )
        require(number(self.scale) and 0 < self.scale <= 1, "scale", "a number above 0, at most 1")
        require(self.resample in get_args(Resample), "resample", f"one of {get_args(Resample)}")
        require(self.encoding in get_args(Encoding), "encoding", f"one of {get_args(Encoding)}")
        require(number(self.aspect) and self.aspect > 0, "aspect", "a number above 0 (width / height)")
        require(
            len(self.elevation) == 2
            and all(number(angle) for angle in self.elevation)
            and -90 <= self.elevation[1] < self.elevation[0] <= 90,
            "elevation",
            "two angles from 90 to -90 degrees, the top one first",
        )
        if self.azimuth is not None:
            require(
                self.azimuth.direction in (1, -1) and number(self.azimuth.column_0),
                "azimuth",
                "a direction and degrees",
            )
        for name in ("parent", "snapshot"):
            require(isinstance(getattr(self, name), str | None), name, "a text or null")
        for name in ("code_version", "created", "weights_sha256"):
            require(isinstance(getattr(self, name), str), name, "a text")
        # A class that never occurs has no score: NaN is a value here.
        scores = self.metrics.values() if isinstance(self.metrics, dict) else ["none"]
        require(all(isinstance(score, int | float) for score in scores), "metrics", "names with numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: Path) -> "ModelBundle":
        """Open a bundle and verify that its manifest is valid and its weights are the ones it was saved with.

        Raises:
            BundleError: missing, damaged, or of another format.
        """
        manifest = cls._manifest(path)
        found = hashlib.sha256(_read(path / WEIGHTS)).hexdigest()
        if found != manifest.weights_sha256:
            raise BundleError(
                f"{path / WEIGHTS} is damaged or was exchanged: its sha256 is {found[:12]}…, the manifest says "
                f"{manifest.weights_sha256[:12]}…. Copy the bundle again."
            )
        return cls(path=path, manifest=manifest)

    @staticmethod
    def _manifest(path: Path) -> Manifest:
        file = path / MANIFEST
        if (path / "bundle" / MANIFEST).is_file() and not file.exists():
            raise BundleError(f"{path} is no bundle, but the run that made one. Name {path / 'bundle'}.")
        if not path.is_dir():
            raise BundleError(
                f"{path} is no bundle: a folder with {MANIFEST} and {WEIGHTS} was expected. `sscloud train` and "
                "`sscloud import-checkpoint` (for .pth files) write bundles."
            )
        try:
            data = json.loads(_read(file))
        except ValueError as error:
            raise BundleError(f"{file} is not valid JSON: {error}. Copy the bundle again.") from error
        return Manifest.from_dict(data, source=str(file))

    def model(self) -> UNet:
        """The network with its weights, in evaluation mode on the CPU.

        Raises:
            BundleError: the weights do not fit the architecture.
        """
        file = self.path / WEIGHTS
        try:
            state = load_tensors(_read(file))
        except SafetensorError as error:
            raise BundleError(f"{file} is not a safetensors file: {error}. Copy the bundle again.") from error
        return build(self.manifest.architecture, state, source=str(file))


def save_bundle(path: Path, model: UNet, manifest: Manifest, *, overwrite: bool = False) -> ModelBundle:
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
    torch.save({**model.state_dict(), "mask_values": [int(i) for i in label_ids]}, buffer)
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


def channels_to_label_map(class_map: NDArray[np.uint8], label_ids: Sequence[int]) -> NDArray[np.uint8]:
    """(H, W) uint8 channel indices → (H, W) uint8 label ids."""
    table = np.zeros(256, np.uint8)
    table[: len(label_ids)] = label_ids
    return table[class_map]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from error
