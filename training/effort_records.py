"""DATASET/effort.jsonl: what was measured of every pre-labelled frame, one line each."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from sscloud.errors import DatasetError
from sscloud.files import atomic_write

FILE: Final = "effort.jsonl"
FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 30
_LOCK: Final = ".effort.lock"
_PATIENCE_S: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameEffort:
    """A frame's pre-label beside what people made of it."""

    server: str
    project: int | None
    task: int
    job: int
    frame: int
    name: str
    """Of the item in the data set; empty: it is not there any more."""
    group: str
    """Key of the panoramas that it belongs together with, as in the manifest."""
    model: str
    """Title of the version that drew the pre-label; empty: nobody knows."""
    prelabel: str
    """Identity of the pre-label; empty: the store does not know it (the button)."""
    mask_sha256: str
    """Of the result; empty: the data set has none."""
    fetched: str
    """The job's time of change when the result was fetched, as the server writes it."""
    snapshot: str
    """Of the data set when this was measured."""
    unknown: str = ""
    """Why nothing could be measured; empty: it was."""
    nothing: int = 0
    """Label id of the pixels where nobody drew."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Label id → name, of the ids in `pixels`."""
    pixels: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(id in the pre-label, id in the result) → pixels."""
    kept: int = 0
    """Shapes of the pre-label that nobody touched."""
    changed: int = 0
    deleted: int = 0
    added: int = 0
    """Shapes that people drew."""
    job_seconds: float | None = None
    """How long people had the job open; None: CVAT does not say."""
    job_frames: int = 1
    """Frames that share the job's time: its panoramas in the data set, and those that left it when all was deleted."""

    @property
    def key(self) -> tuple[str, int, int]:
        """The frame."""
        return (self.server, self.task, self.frame)

    @property
    def state(self) -> tuple[str, int, int, str, str]:
        """The frame with this pre-label and this result."""
        return (*self.key, self.prelabel, self.mask_sha256)

    @property
    def seconds(self) -> float | None:
        """This frame's share of the time in which the job was open."""
        return None if self.job_seconds is None else self.job_seconds / self.job_frames


def read_effort(dataset: Path) -> list[FrameEffort]:
    """What was measured, in the order of measuring; nothing if nothing was.

    Args:
        dataset: its folder.

    Raises:
        DatasetError: the file cannot be read, or is not what is written here.
    """
    path = dataset / FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DatasetError(f"{path} is larger than {_MAX_BYTES >> 30} GiB. {_REMEDY}")
        # Not by `splitlines`: names may hold separators that JSON leaves as they are.
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}). {_REMEDY}") from error
    records = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number} cannot be used ({error!r:.120}). {_REMEDY}") from error
    return records


def add_effort(dataset: Path, records: Iterable[FrameEffort]) -> None:
    """Append records, atomically; one of a state that is there already takes its place.

    Raises:
        DatasetError: see `read_effort`; or the file cannot be written, or another process does not let it go.
    """
    try:
        # A lock of its own: a fetch does not wait for that of the data set.
        with FileLock(dataset / _LOCK, timeout=_PATIENCE_S):
            found = {record.state: record for record in read_effort(dataset)}
            for record in records:
                found.pop(record.state, None)
                found[record.state] = record
            text = "".join(json.dumps(_json(record), ensure_ascii=False) + "\n" for record in found.values())
            atomic_write(dataset / FILE, text.encode(errors="backslashreplace"))
    except Timeout as error:
        raise DatasetError(
            f"Another process has been writing {dataset / FILE} for {_PATIENCE_S} s. Wait until it has ended, or stop "
            "it, and fetch again."
        ) from error
    except OSError as error:
        raise DatasetError(f"{dataset / FILE} cannot be written: {error.strerror or error}.") from error


_REMEDY = "Bring the file back from a copy, or delete it: what can still be measured is measured again."

_TEXTS = ("server", "name", "group", "model", "prelabel", "mask_sha256", "fetched", "snapshot", "unknown")
_COUNTS = ("task", "job", "frame", "nothing", "kept", "changed", "deleted", "added", "job_frames")


def _json(record: FrameEffort) -> dict[str, Any]:
    values = {each.name: getattr(record, each.name) for each in fields(FrameEffort)}
    return {
        "format": FORMAT,
        **values,
        "labels": {str(number): name for number, name in sorted(record.labels.items())},
        "pixels": [[*pair, count] for pair, count in sorted(record.pixels.items())],
    }


def _record(data: Any) -> FrameEffort:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r:.20}, expected {FORMAT}")
    names = {each.name for each in fields(FrameEffort)}
    if data.keys() != {"format", *names}:
        raise ValueError(f"keys {sorted(data)!r:.200}")
    values = {name: data[name] for name in names}
    for name in _TEXTS:
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is no text")
    for name in _COUNTS:
        _count(values[name], name)
    if values["project"] is not None:
        _count(values["project"], "project")
    seconds = values["job_seconds"]
    if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < 1e12):
        raise ValueError("job_seconds is no time")
    if values["job_frames"] < 1:
        raise ValueError("job_frames is 0")
    values["labels"] = {_label_id(int(number)): str(name) for number, name in data["labels"].items()}
    values["pixels"] = {
        (_label_id(before), _label_id(after)): _count(count, "pixels") for before, after, count in data["pixels"]
    }
    if not values["labels"].keys() >= {number for pair in values["pixels"] for number in pair}:
        raise ValueError("a label has no name")
    return FrameEffort(**values)


def _count(value: object, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _label_id(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 255:
        raise ValueError(f"{value!r:.40} is no label id")
    return value
