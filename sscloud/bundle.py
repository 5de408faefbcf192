"""ModelBundle: a served model as a directory, `weights.safetensors` + `manifest.json`.

The manifest holds every convention that inference needs (scale, resampling, seam, channels, labels, …), so nothing is
asked for twice. A bundle is written once, atomically, and never changed; loading verifies the weights' sha256.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from sscloud import __version__
from sscloud.architecture import Architecture, Upsampling
from sscloud.errors import BundleError, SchemaError
from sscloud.frame import Azimuth, Frame
from sscloud.image import Encoding, Resample
from sscloud.labels import LabelSchema

FORMAT = 1
"""Version of the manifest's layout."""

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"


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
    frame: Frame = "scanner"
    """The frame in which the network sees the normals of whole panoramas; they are given in the scanner's."""
    temperature: float = 1.0
    """Logits are divided by it before they become probabilities; fitted on the validation part."""
    parent: str | None = None
    """Name and version of the bundle that training started from."""
    snapshot: str | None = None
    """Identity of the data set."""
    learned: tuple[str, ...] = ()
    """sha256 of each panorama with its mask that it and its parents were trained on."""
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
        data["architecture"] = self.architecture.to_dict()
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
                    "learned": tuple(values.get("learned", ())),
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
        require(self.frame in get_args(Frame), "frame", f"one of {get_args(Frame)}")
        require(
            self.frame == "scanner" or (self.encoding == "normals" and self.azimuth is not None),
            "frame",
            "scanner, where there are no normals or the azimuth is not known",
        )
        require(number(self.temperature) and self.temperature > 0, "temperature", "a number above 0")
        for name in ("parent", "snapshot"):
            require(isinstance(getattr(self, name), str | None), name, "a text or null")
        require(all(isinstance(digest, str) for digest in self.learned), "learned", "a list of texts")
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
        found = _sha256(path / WEIGHTS)
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


def channels_to_label_map(class_map: NDArray[np.uint8], label_ids: Sequence[int]) -> NDArray[np.uint8]:
    """(H, W) uint8 channel indices → (H, W) uint8 label ids."""
    table = np.zeros(256, np.uint8)
    table[: len(label_ids)] = label_ids
    return np.asarray(cv2.LUT(class_map, table), np.uint8)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.")
