"""cycles/NNNN/journal.json: what a cycle has done, step by step, so that the next start goes on from there.

CYCLES/
  .lock             held by the cycle that runs
  running.json      who holds it, and since when; of meaning only while the lock is held
  0001/ 0002/ …     a folder a cycle
    journal.json    replaced as a whole before and after every step
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

from filelock import FileLock, Timeout

from sscloud.errors import ConfigError
from sscloud.files import atomic_write

JOURNAL: Final = "journal.json"
FORMAT: Final = 1

StepName = Literal[
    "fetch", "effort", "check", "train", "gate", "register", "deploy", "select", "prelabel", "report"
]  # fmt: skip
STEPS: Final[tuple[StepName, ...]] = get_args(StepName)
"""In their order."""

State = Literal["pending", "running", "done", "skipped", "failed"]
Outcome = Literal["accepted", "refused", "abandoned"]

_LOCK, _RUNNING = ".lock", "running.json"
_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step of a cycle."""

    name: StepName
    state: State = "pending"
    """`running` in a journal that nobody works on: the cycle was killed there."""
    started: str | None = None
    """Of the last attempt; UTC, ISO 8601."""
    ended: str | None = None
    seconds: float = 0.0
    """That all attempts took which ended, well or not."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What came of it, JSON values."""
    error: str | None = None
    """Why the last attempt failed, or why the step was skipped."""

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.state in ("done", "skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """A cycle."""

    number: int
    started: str
    ended: str | None = None
    outcome: Outcome | None = None
    """None while it is unfinished."""
    server: str
    """Address of the CVAT server."""
    config: Mapping[str, Any]
    """As `CycleConfig.to_dict` writes it; what the cycle goes on with."""
    steps: tuple[StepRecord, ...] = tuple(StepRecord(name=name) for name in STEPS)

    def step(self, name: StepName) -> StepRecord:
        """The record of a step."""
        return self.steps[STEPS.index(name)]

    def put(self, record: StepRecord) -> "Journal":
        """A copy with this record."""
        return replace(self, steps=tuple(record if step.name == record.name else step for step in self.steps))

    @property
    def next_step(self) -> StepRecord | None:
        """The first step that is not over; None after the last."""
        return next((step for step in self.steps if not step.is_over), None)

    @property
    def is_open(self) -> bool:
        """Whether the next start goes on with it."""
        return self.ended is None


def now() -> str:
    """The time as journals have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cycle_folder(cycles: Path, number: int) -> Path:
    """Where a cycle's files are."""
    return cycles / f"{number:04d}"


def write_journal(cycles: Path, journal: Journal) -> None:
    """Replace a cycle's journal, atomically."""
    data = {
        "format": FORMAT,
        **{f.name: getattr(journal, f.name) for f in fields(Journal) if f.name != "steps"},
        "steps": [{f.name: getattr(step, f.name) for f in fields(StepRecord)} for step in journal.steps],
    }
    text = json.dumps(data, ensure_ascii=False, indent=1)
    atomic_write(cycle_folder(cycles, journal.number) / JOURNAL, text.encode(errors="backslashreplace") + b"\n")


def read_journals(cycles: Path) -> list[Journal]:
    """The cycles of a workspace, oldest first. A folder without a journal is none: it was killed before its first line.

    Raises:
        ConfigError: a journal that cannot be read.
    """
    if not cycles.is_dir():
        return []
    numbers = sorted(int(path.name) for path in cycles.iterdir() if re.fullmatch(r"\d{4,9}", path.name))
    found = (_read(cycle_folder(cycles, number) / JOURNAL, number) for number in numbers)
    return [journal for journal in found if journal is not None]


def drop_cycle(cycles: Path, number: int) -> None:
    """Remove a cycle that had nothing to do. Its journal goes first: without it the rest means nothing."""
    folder = cycle_folder(cycles, number)
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextlib.contextmanager
def cycle_lock(cycles: Path) -> Iterator[None]:
    """Hold a workspace's cycles for the time of the block. A process that is killed holds nothing any more.

    Raises:
        ConfigError: another process holds them; or the folder cannot be written.
    """
    lock = FileLock(cycles / _LOCK)
    try:
        cycles.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Another `sscloud cycle` works in {cycles.parent} ({_holder(cycles)}). Wait for it, or end it first: what "
            "it has done by then is not lost."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{cycles} cannot be written: {error.strerror or error}. Name another --workspace."
        ) from error
    try:
        atomic_write(cycles / _RUNNING, json.dumps({"pid": os.getpid(), "since": now()}).encode())
        yield
    finally:
        (cycles / _RUNNING).unlink(missing_ok=True)
        lock.release()


def present_holder(cycles: Path) -> str | None:
    """Which process works in a workspace now, in words; None where none does. Leaves everything as it is."""
    if not (cycles / _LOCK).exists():
        return None
    lock = FileLock(cycles / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _holder(cycles)
    lock.release()
    return None


def _holder(cycles: Path) -> str:
    """Who holds the lock, in words."""
    try:
        data = json.loads((cycles / _RUNNING).read_bytes())
        return f"process {int(data['pid'])}, since {datetime.fromisoformat(data['since']):%Y-%m-%d %H:%M:%S} UTC"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just begun"


def _read(path: Path, number: int) -> Journal | None:
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1)
        return _journal(json.loads(text), number)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be used: {error}. Move its folder away to begin a new cycle; what CVAT and the dataset "
            "hold is not touched by that."
        ) from error


def _journal(data: Any, number: int) -> Journal:
    """Check what a file holds; raises ValueError, KeyError or TypeError."""
    if data["format"] != FORMAT or data["number"] != number:
        raise ValueError(f"format {data['format']!r}, cycle {data['number']!r}; expected {FORMAT}, {number}")
    steps = tuple(StepRecord(**step) for step in data["steps"])
    if tuple(step.name for step in steps) != STEPS or any(step.state not in get_args(State) for step in steps):
        raise ValueError("its steps are not those of a cycle")
    values = {f.name: data[f.name] for f in fields(Journal)}
    if values["outcome"] not in (None, *get_args(Outcome)) or not isinstance(values["config"], dict):
        raise ValueError("its outcome or its configuration is none")
    return Journal(**{**values, "steps": steps})
