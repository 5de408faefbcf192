"""What `sscloud watch` remembers when it is started again, and when the next cycle is due."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sscloud.files import atomic_write
from tools.webhooks import Memory

FORMAT: Final = 1

RETRY: Final = 3600.0
"""Seconds until a cycle that failed is tried again without a new event."""
MOST_RETRIES: Final = 3
"""In a row; then it waits for the next event."""

_JOBS_NAMED = 50

log = logging.getLogger("sscloud.watch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Events that wait for a cycle."""

    first: float
    """Seconds since 1970."""
    last: float
    events: int = 1
    jobs: tuple[int, ...] = ()
    """Some of the jobs that were finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRun:
    """How the last start of a cycle ended."""

    started: float
    ended: float
    status: int
    """Of the process; negative for a signal."""
    outcome: str = ""
    summary: str = ""
    report: str | None = None
    error: str | None = None
    """What a failed one said last."""


@dataclass(slots=True, kw_only=True)
class WatchState:
    """What a service remembers when it is started again."""

    pending: Pending | None = None
    running: float | None = None
    """When the cycle that runs was started."""
    failures: int = 0
    """In a row."""
    retry_at: float | None = None
    last: LastRun | None = None
    polled: str | None = None
    """What the server's finished jobs looked like."""
    memory: Memory = field(default_factory=Memory)

    def mark(self, now: float, job: int | None = None) -> None:
        """Something was finished."""
        old = self.pending or Pending(first=now, last=now, events=0)
        jobs = old.jobs if job is None or job in old.jobs else (*old.jobs, job)[-_JOBS_NAMED:]
        self.pending = Pending(first=min(old.first, now), last=now, events=old.events + 1, jobs=jobs)

    def next_start(self, *, quiet: float, at_most: float) -> float | None:
        """When the next cycle starts, seconds since 1970; None while nothing waits."""
        times = [] if self.retry_at is None else [self.retry_at]
        if self.pending is not None:
            times.append(min(self.pending.last + quiet, self.pending.first + at_most))
        return min(times, default=None)

    def started(self, now: float) -> None:
        """A cycle starts, for all that waits."""
        self.pending, self.retry_at, self.running = None, None, now

    def ended(self, run: LastRun) -> None:
        """It is over. A failed one is tried again after a while, some times."""
        self.running, self.last = None, run
        self.failures = 0 if run.status == 0 else self.failures + 1
        self.retry_at = run.ended + RETRY if 0 < self.failures <= MOST_RETRIES else None

    def interrupted(self, now: float) -> None:
        """It was ended from here, or together with the service: what it was for waits again, for the quiet time too."""
        if self.running is not None:
            begun, self.running = self.running, None
            events = self.pending.events if self.pending else 0
            jobs = self.pending.jobs if self.pending else ()
            self.pending = Pending(first=min(begun, now), last=min(begun, now), events=events + 1, jobs=jobs)


def read_state(path: Path, *, now: float) -> WatchState:
    """What the service remembers; one that cannot be read is replaced by a state in which a cycle is due."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}")  # noqa: TRY301
        waiting = data["pending"]
        state = WatchState(
            pending=None if waiting is None else Pending(**{**waiting, "jobs": tuple(waiting["jobs"])}),
            running=data["running"],
            failures=int(data["failures"]),
            retry_at=data["retry_at"],
            last=None if data["last"] is None else LastRun(**data["last"]),
            polled=data["polled"],
            memory=Memory(
                bodies={str(key): float(at) for key, at in data["bodies"].items()},
                jobs={int(key): float(at) for key, at in data["jobs"].items()},
            ),
        )
    except FileNotFoundError:
        return WatchState()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("state-lost", extra={"fields": {"path": str(path), "error": str(error)}})
        state = WatchState()
        state.mark(now)
    state.interrupted(now)  # killed while a cycle ran
    return state


def write_state(path: Path, state: WatchState) -> None:
    """Replace the state, atomically."""
    data = {
        "format": FORMAT,
        "pending": None if state.pending is None else dataclasses.asdict(state.pending),
        "running": state.running,
        "failures": state.failures,
        "retry_at": state.retry_at,
        "last": None if state.last is None else dataclasses.asdict(state.last),
        "polled": state.polled,
        "bodies": state.memory.bodies,
        "jobs": state.memory.jobs,
    }
    atomic_write(path, json.dumps(data, ensure_ascii=False).encode(errors="backslashreplace"))
