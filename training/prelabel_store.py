"""What `sscloud prelabel` has drawn: the memory that tells a model's shapes from people's.

CVAT's `source` cannot: it stays "auto" when a person cuts pixels from a mask. So every shape that was sent is
remembered by what it looks like, job by job:

    STORE/
      cvat.example.org/
        .lock               held by the one that draws
        job-12.json         frame → model, shapes; and what was about to be drawn, so that a killed run knows its own
        job-12/3-….json.gz  the shapes themselves that were drawn in frame 3: what people's work is measured against

The shapes are written before the record that names them, and the record before they are sent: a record never speaks of
shapes that nobody has.

A store belongs to the people who pre-label a server together: keep it beside the data set, not in somebody's home.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from filelock import FileLock, Timeout

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from training.annotations import fingerprint

FORMAT: Final = 1

MAX_BYTES: Final = 1 << 30
"""Most bytes of the shapes of one frame, unpacked."""

_KEPT: Final = (
    "type",
    "frame",
    "label_id",
    "points",
    "z_order",
    "rotation",
    "occluded",
    "outside",
    "group",
    "source",
    "attributes",
)

Verdict = Literal["empty", "ours", "people"]
"""Of a frame: nobody drew; exactly what was drawn here is there; anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What a model drew in a frame."""

    model: str
    """Title; empty: nothing was drawn yet."""
    settings: str = ""
    """What else decides what is drawn: the same title with other weights, or another threshold, draws anew."""
    shapes: tuple[str, ...] = ()
    """Identities, sorted."""

    @property
    def key(self) -> str:
        """Changes with the model, the settings and the shapes; 16 hex digits."""
        return hashlib.sha256(json.dumps([self.model, self.settings, *self.shapes]).encode()).hexdigest()[:16]


NOTHING: Final = Drawn(model="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The shapes that a model drew in a frame."""

    shapes: tuple[Mapping[str, Any], ...] = ()
    """As they were sent: type, points, label, attributes."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Label id → its name in the task at that time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRecord:
    """A frame."""

    drawn: Drawn = NOTHING
    next: Drawn | None = None
    """What was about to take the place of `drawn`, written down before it was sent; None when that is settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRun:
    """A run of a function over the job, from before it was asked for until its shapes were written down."""

    function: str
    model: str
    settings: str = ""
    id: str = ""
    """The server's name for it; empty until the server has answered."""
    enqueued: str = ""
    """The server's time of the request; before the answer, that of an older run over this job."""
    updated: str = ""
    """The job's time of change when it was seen empty, before the request; empty until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job."""

    frames: Mapping[int, FrameRecord] = field(default_factory=dict)
    run: ServerRun | None = None

    def of(self, frame: int) -> FrameRecord:
        """A frame's record, an empty one if there is none."""
        return self.frames.get(frame, FrameRecord())

    def put(self, frame: int, record: FrameRecord) -> "JobRecord":
        """A copy with this record for a frame; a record that says nothing is left out."""
        frames = {number: old for number, old in self.frames.items() if number != frame}
        if record != FrameRecord():
            frames[frame] = record
        return replace(self, frames=frames)


class PrelabelStore:
    """The records of one server's jobs. Use as a context manager: one process at a time.

    Args:
        folder: the store, new or not.
        server: the server's address.
    """

    def __init__(self, folder: Path, *, server: str) -> None:
        address = re.sub(r"^https?://", "", server).rstrip("/")
        self._folder = folder / (re.sub(r"[^\w.-]", "_", address).lstrip(".") or "_")
        self._server = server
        self._lock = FileLock(self._folder / ".lock")

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"Another process is pre-labelling with {self._folder}. Wait for it, or end it first: two at a time "
                "would draw everything twice."
            ) from None
        except OSError as error:
            raise ConfigError(f"{self._folder} cannot be written: {error.strerror}. Name another --store.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def path(self, job: int) -> Path:
        """The file of a job."""
        return self._folder / f"job-{job}.json"

    def load(self, job: int) -> JobRecord:
        """What is known of a job.

        Raises:
            ConfigError: the file is damaged, or belongs to another server.
        """
        path = self.path(job)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["server"] != self._server or data["job"] != job:
                raise ConfigError(
                    f"{path} is of format {data['format']}, about job {data['job']} of {data['server']}; expected "
                    f"format {FORMAT}, job {job} of {self._server}. Name another --store."
                )
            frames = {int(number): _record(entry) for number, entry in data["frames"].items()}
            return JobRecord(frames=frames, run=None if data["run"] is None else _run(data["run"]))
        except FileNotFoundError:
            return JobRecord()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}). Bring it back from a copy; without it the shapes in job {job} count "
                "as people's work."
            ) from error

    def save(self, job: int, record: JobRecord) -> None:
        """Write down what is known of a job, atomically; the same record makes the same bytes."""
        data = {
            "format": FORMAT,
            "server": self._server,
            "job": job,
            "run": None if record.run is None else {name: getattr(record.run, name) for name in ServerRun.__slots__},
            "frames": {str(number): _frame_json(record.frames[number]) for number in sorted(record.frames)},
        }
        text = json.dumps(data, ensure_ascii=False, indent=1)
        atomic_write(self.path(job), (text + "\n").encode())

    def keep(
        self, job: int, frame: int, drawn: Drawn, shapes: Sequence[Mapping[str, Any]], *, labels: Mapping[int, str]
    ) -> None:
        """Keep the shapes that `drawn` speaks of; call it before a record with `drawn` is saved.

        Args:
            job: the job.
            frame: number in the task.
            drawn: what was, or is about to be drawn.
            shapes: as they are sent, or as the server lists them.
            labels: label id → name, of the task.
        """
        if not shapes:
            return
        used = {shape["label_id"] for shape in shapes}
        data = {
            "format": FORMAT,
            "server": self._server,
            "job": job,
            "frame": frame,
            "model": drawn.model,
            "settings": drawn.settings,
            "labels": {str(number): name for number, name in sorted(labels.items()) if number in used},
            "shapes": [{key: shape[key] for key in _KEPT if key in shape} for shape in shapes],
        }
        text = json.dumps(data, ensure_ascii=False)
        # Without a time of writing: the same shapes make the same bytes.
        atomic_write(self._kept_path(job, frame, drawn), gzip.compress(text.encode(), mtime=0))

    def kept(self, job: int, frame: int, drawn: Drawn) -> Kept | None:
        """The shapes that `drawn` speaks of; None if they were not kept.

        Raises:
            ConfigError: the file is damaged.
        """
        if not drawn.shapes:
            return Kept()
        path = self._kept_path(job, frame, drawn)
        try:
            packed = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            return _unpack(packed, drawn)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be used ({error}). Bring it back from a copy, or delete it: what the pre-label of "
                f"frame {frame} of job {job} has saved is unknown then."
            ) from error

    def tidy(self, job: int, record: JobRecord) -> None:
        """Delete the shapes that the record of a job does not speak of any more: replaced ones, or never sent."""
        wanted = {
            self._kept_path(job, frame, drawn).name
            for frame, entry in record.frames.items()
            for drawn in (entry.drawn, entry.next)
            if drawn is not None
        }
        for path in self._kept_folder(job).glob("*.json.gz"):
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def _kept_folder(self, job: int) -> Path:
        return self._folder / f"job-{job}"

    def _kept_path(self, job: int, frame: int, drawn: Drawn) -> Path:
        return self._kept_folder(job) / f"{frame}-{drawn.key}.json.gz"


def identity(raw: Mapping[str, Any]) -> str:
    """What makes two shapes of a frame the same, for a shape as it is sent and as the server lists it.

    Attributes without a value do not count: a shape has them from the moment its label gets them.
    """
    return fingerprint(
        {
            **raw,
            "rotation": float(raw.get("rotation") or 0),
            "z_order": int(raw.get("z_order") or 0),
            "occluded": bool(raw.get("occluded")),
            "outside": bool(raw.get("outside")),
            "attributes": [value for value in raw.get("attributes") or [] if value.get("value")],
        }
    )


def judge(drawn: Drawn, present: Iterable[str]) -> Verdict:
    """Whose the shapes of a frame are.

    Pre-labels that were deleted are people's work, as much as pre-labels that were changed.
    """
    shapes = Counter(present)
    if shapes != Counter(drawn.shapes):
        return "people"
    return "ours" if drawn.model else "empty"


def surplus(record: FrameRecord, present: Sequence[tuple[int, str]]) -> list[int]:
    """Shapes to delete once `record.next` is there: those of `record.drawn`, and what was sent twice.

    Args:
        record: with `next`.
        present: number and identity of every shape in the frame.

    Returns:
        Numbers; of equal shapes the older ones stay.
    """
    if record.next is None:
        return []
    ours = {*record.drawn.shapes, *record.next.shapes}
    keep = Counter(record.next.shapes)
    found = []
    for number, shape in sorted(present):
        if keep[shape] > 0:
            keep[shape] -= 1
        elif shape in ours:
            found.append(number)
    return found


def holds(present: Iterable[str], drawn: Drawn) -> bool:
    """Whether all shapes of `drawn` are there, whatever else is."""
    return Counter(drawn.shapes) <= Counter(present)


def is_sent(record: FrameRecord, present: Iterable[str]) -> bool:
    """Whether `record.next` was sent: a shape is there that is one of its own, and none of those before it."""
    return record.next is not None and bool((set(record.next.shapes) - set(record.drawn.shapes)) & set(present))


def _unpack(packed: bytes, drawn: Drawn) -> Kept:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    data = json.loads(text)
    labels = {int(number): str(name) for number, name in data["labels"].items()}
    kept = Kept(shapes=tuple(data["shapes"]), labels=labels)
    if tuple(sorted(map(identity, kept.shapes))) != drawn.shapes:
        raise ValueError("its shapes are others than those that were drawn")
    return kept


def _drawn_json(drawn: Drawn) -> dict[str, Any]:
    return {"model": drawn.model, "settings": drawn.settings, "shapes": list(drawn.shapes)}


def _frame_json(record: FrameRecord) -> dict[str, Any]:
    return _drawn_json(record.drawn) | ({} if record.next is None else {"next": _drawn_json(record.next)})


def _drawn(data: Mapping[str, Any]) -> Drawn:
    shapes = [str(shape) for shape in data["shapes"]]
    return Drawn(model=str(data["model"]), settings=str(data["settings"]), shapes=tuple(sorted(shapes)))


def _record(data: Mapping[str, Any]) -> FrameRecord:
    return FrameRecord(drawn=_drawn(data), next=_drawn(data["next"]) if "next" in data else None)


def _run(data: Mapping[str, Any]) -> ServerRun:
    return ServerRun(**{name: str(data[name]) for name in ServerRun.__slots__})
