"""What `sscloud prelabel` has drawn: the memory that tells a model's shapes from people's.

CVAT's `source` cannot: it stays "auto" when a person cuts pixels from a mask. So every shape that was sent is
remembered by what it looks like, job by job:

    STORE/
      cvat.example.org/
        .lock               held by the one that draws
        job-12.json         frame → model, shapes; and what was about to be drawn, so that a killed run knows its own

A store belongs to the people who pre-label a server together: keep it beside the data set, not in somebody's home.
"""

import json
import re
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


NOTHING: Final = Drawn(model="")


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
