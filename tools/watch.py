"""`sscloud watch`: starts `sscloud cycle` when people have finished something.

Webhooks and polls only mark that there is something; one loop decides when a cycle starts, and runs it in a process of
its own. What is marked is on disk before CVAT gets its answer, so a service that is killed forgets nothing.

WORKSPACE/cycles/
  watch.json    what is waiting, what was heard of, how the last cycle ended; replaced as a whole
  watch.log     what cycles print, a JSON object a line; watch.log.1 to .3 are older
  watch.lock    held as long as the service runs: two would overwrite what each other has marked
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from filelock import FileLock, Timeout
from starlette.requests import ClientDisconnect

from sscloud import __version__
from sscloud.errors import BundleError, ConfigError, SSCloudError
from sscloud.volume import pointed
from tools.watch_http import HttpServer
from tools.watch_state import LastRun, read_state, write_state
from tools.webhooks import MAX_BODY, PATH, SECRET, Inbox, Message, RefusedError
from training.journal import Journal, cycle_folder, read_journals
from training.page import NOTHING, render

if TYPE_CHECKING:
    from training.cvat import Server

STATE, LOG, LOCK = "watch.json", "watch.log", "watch.lock"
READING: Final = 8.0
"""Seconds that a message may take to come in: CVAT itself gives up after ten."""
GRACE: Final = 30.0
"""Seconds that a cycle has to end after it was asked to. It may be killed at any moment; asking leaves a nicer log."""
FIRST_PAUSE: Final = 5.0
"""Seconds until CVAT is asked again to take the webhook; twice as long each time."""
LONGEST_PAUSE: Final = 300.0

_LOG_BYTES, _OLD_LOGS = 8 << 20, 3
_LONGEST_LINE = 4 << 20
_LONGEST_TEXT = 2000
_LINES_KEPT = 50
"""Of the standard error stream, for what is told of a cycle that failed."""
_ERROR_BEGINS = "sscloud cycle:"
_LONGEST_SLEEP = 60.0
"""Seconds; a clock that is set must not put off a cycle for longer."""

log = logging.getLogger("sscloud.watch")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """How to watch."""

    workspace: Path
    project: int
    host: str = "127.0.0.1"
    port: int = 8090
    """0: any free one."""
    quiet: float = 600.0
    """Seconds without an event before a cycle starts."""
    at_most: float = 3600.0
    """Seconds after the first event by which it starts anyway."""
    poll: float | None = None
    """Seconds between two looks at the server; None: webhooks only."""
    command: tuple[str, ...]
    """What runs a cycle; `--json` makes it print its result on the last line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedWork:
    """What the finished jobs of a project look like."""

    mark: str
    """Another one whenever one of them changes."""
    latest: float
    """When one of them was changed last, by the server's clock, seconds since 1970; 0: there is none."""


# --- the log ----------------------------------------------------------------------------------------------------------


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, event, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def note(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Write a line to the log."""
    log.log(level, event, extra={"fields": fields})


@contextlib.contextmanager
def _logging_to(cycles: Path) -> Iterator[logging.Logger]:
    """Everything that is logged goes to the standard error stream as JSON, what cycles print to a file of their own."""
    lines = JsonLines()
    screen = logging.StreamHandler()
    screen.setFormatter(lines)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.handlers[:] = [screen]
    root.setLevel(logging.INFO)
    cycles.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(cycles / LOG, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, encoding="utf-8")
    file.setFormatter(lines)
    output = logging.Logger("sscloud.cycle")  # in no tree: the screen does not repeat it
    output.addHandler(file)
    try:
        yield output
    finally:
        file.close()
        root.handlers[:] = before
        root.setLevel(level)


# --- the service ------------------------------------------------------------------------------------------------------


class Watcher:
    """Marks what happens, and runs cycles one after the other. All of it in one event loop.

    Args:
        config: how to watch.
        inbox: takes messages; its memory becomes the one on disk.
        output: where lines of cycles go.
        look: asks the server what its finished jobs look like; may take its time.
        register: has the server make the webhook → its number, whose messages alone are taken from then on. It is
            tried until it works: the server may be slower to start than this service.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        config: WatchConfig,
        inbox: Inbox,
        *,
        output: logging.Logger,
        look: Callable[[], FinishedWork] | None = None,
        register: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._inbox, self._output, self._clock = config, inbox, output, clock
        self._look, self._register = look, register
        self._path = config.workspace / "cycles" / STATE
        self.state = read_state(self._path, now=clock())
        inbox.memory = self.state.memory
        self.stopping = False
        self.refused = 0
        """Messages since the start."""
        self.unregistered: str | None = None
        """Why the server has no webhook yet."""
        self.last_error: tuple[float, str] | None = None
        self._since = clock()
        self._wake = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    def take(self, signature: str | None, body: bytes) -> Message:
        """Take a message from CVAT; it is on disk when this returns.

        Raises:
            RefusedError: it is refused.
        """
        now = self._clock()
        message = self._inbox.take(signature, body, now=now)
        if message.finished:
            self.mark(message.job)
        elif message.job is not None:
            self._save()
        note("webhook", message=message.event, job=message.job, finished=message.finished)
        return message

    def mark(self, job: int | None = None) -> None:
        """Something was finished: a cycle is due after a while."""
        self.state.mark(self._clock(), job)
        self._save()
        self._wake.set()

    def stop(self) -> None:
        """Take nothing more, and end the cycle that runs."""
        if not self.stopping:
            note("stopping")
        self.stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Run cycles until `stop`."""
        beside = [asyncio.create_task(work) for work in (self._poll(), self._introduce())]
        try:
            while not self.stopping:
                self._wake.clear()
                start, now = self.next_start(), self._clock()
                if start is not None and start <= now:
                    await self._cycle()
                    continue
                pause = _LONGEST_SLEEP if start is None else min(start - now, _LONGEST_SLEEP)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause)
        finally:
            for task in beside:
                task.cancel()
            for result in await asyncio.gather(*beside, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    def next_start(self) -> float | None:
        """When the next cycle starts, as far as is known."""
        return self.state.next_start(quiet=self._config.quiet, at_most=self._config.at_most)

    async def _poll(self) -> None:
        """Look at the server again and again; what fails is told, and tried again the next time."""
        first = True
        while self._look is not None and self._config.poll:
            try:
                seen = await _aside(self._look)
            except Exception as error:  # whatever it is, the next look may go well
                self._fail("poll-failed", _said(error))
            else:
                if seen.mark != self.state.polled:
                    self.state.polled = seen.mark
                    # Cycles that were started by hand before this service are not in its memory.
                    done = self._done_since(seen.latest) if first else None
                    note("poll", changed=done is None, **({} if done is None else {"seen_by_cycle": done}))
                    if done is None:
                        self.mark()
                    else:
                        self._save()
                first = False
            await asyncio.sleep(self._config.poll)

    def _done_since(self, latest: float) -> int | None:
        """The number of a finished cycle that began after everything that is finished; None: there is none."""
        try:
            journals = read_journals(self._config.workspace / "cycles")
        except ConfigError:  # the cycle itself tells of it
            return None
        for journal in reversed(journals):
            ended = journal.outcome in ("accepted", "refused") and journal.config.get("project") == self._config.project
            if ended and datetime.fromisoformat(journal.started).timestamp() > latest:
                return journal.number
        return None

    async def _introduce(self) -> None:
        """Have the server make the webhook, sooner or later."""
        pause = FIRST_PAUSE
        while self._register is not None:
            try:
                self._inbox.webhook = await _aside(self._register)
            except Exception as error:  # whatever it is, the next time may go well
                self.unregistered = _said(error)[:_LONGEST_TEXT]
                note("register-failed", level=logging.WARNING, error=self.unregistered, again_in_seconds=pause)
            else:
                self.unregistered = None
                note("registered", webhook=self._inbox.webhook)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _cycle(self) -> None:
        begun = self._clock()
        jobs = self.state.pending.jobs if self.state.pending else ()
        self.state.started(begun)
        self._save()
        note("cycle-started", jobs=list(jobs))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._config.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
                env={name: value for name, value in os.environ.items() if name != SECRET},  # it is no cycle's business
                # Ctrl-C at a terminal goes to a whole group of processes; the cycle is asked once, from here.
                process_group=0 if os.name == "posix" else None,
            )
        except OSError as error:
            run = LastRun(started=begun, ended=self._clock(), status=127, error=str(error))
        else:
            run = await self._attend(self._process, begun)
        self._process = None
        if self.stopping and run.status != 0:
            self.state.interrupted(self._clock())
            note("cycle-interrupted", status=run.status)
        else:
            self.state.ended(run)
            level = logging.INFO if run.status == 0 else logging.ERROR
            note("cycle-ended", level=level, status=run.status, outcome=run.outcome, error=run.error)
            if run.error is not None:
                self._fail("cycle-failed", run.error)
        self._save()

    async def _attend(self, process: asyncio.subprocess.Process, begun: float) -> LastRun:
        """Pass on what a cycle prints until it ends, and end it when the service stops."""
        last: dict[str, deque[str]] = {"stdout": deque(maxlen=1), "stderr": deque(maxlen=_LINES_KEPT)}

        async def pass_on(stream: asyncio.StreamReader | None, name: str) -> None:
            if stream is None:
                return
            async for line in _lines(stream):
                last[name].append(line)
                self._output.info("cycle-output", extra={"fields": {"stream": name, "line": line}})

        reading = asyncio.gather(pass_on(process.stdout, "stdout"), pass_on(process.stderr, "stderr"))
        ending = asyncio.create_task(self._end_when_stopped(process))
        try:
            await reading
            status = await process.wait()
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending
        result = _result("".join(last["stdout"]))
        error = last_words(tuple(last["stderr"])) or f"It ended with status {status}, and said nothing."
        return LastRun(
            started=begun,
            ended=self._clock(),
            status=status,
            outcome=_text(result.get("outcome")),
            summary=_text(result.get("summary")),
            report=_text(result["report"]) if result.get("report") else None,
            error=None if status == 0 else error[:_LONGEST_TEXT],
        )

    async def _end_when_stopped(self, process: asyncio.subprocess.Process) -> None:
        while not self.stopping:
            self._wake.clear()
            await self._wake.wait()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            await asyncio.sleep(GRACE)
            # With all that it has started: whoever holds its output open keeps it from ending here.
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()

    def _fail(self, event: str, text: str) -> None:
        self.last_error = self._clock(), text[:_LONGEST_TEXT]
        note(event, level=logging.ERROR, error=text[:_LONGEST_TEXT])

    def _save(self) -> None:
        write_state(self._path, self.state)

    def health(self) -> dict[str, Any]:
        """What the page shows, as JSON types; times in UTC, ISO 8601."""
        state, config = self.state, self._config
        error = self.last_error
        if error is None and state.last is not None and state.last.error is not None:
            error = state.last.ended, state.last.error
        champion, cycle, problems = _champion(config.workspace), None, []
        if self.unregistered is not None:
            problems.append(f"CVAT has not taken the webhook yet; it is asked again and again. {self.unregistered}")
        if isinstance(champion, str):
            problems.append(champion)
            champion = None
        try:
            journals = read_journals(config.workspace / "cycles")
        except ConfigError as trouble:
            problems.append(str(trouble))
        else:
            cycle = _cycle_facts(config.workspace, journals[-1]) if journals else None
        return {
            "status": "stopping" if self.stopping else "running" if state.running is not None else "waiting",
            "version": __version__,
            "project": config.project,
            "up_since": _when(self._since),
            "running_since": _when(state.running),
            "pending": None
            if state.pending is None
            else {
                "events": state.pending.events,
                "jobs": list(state.pending.jobs),
                "first": _when(state.pending.first),
                "last": _when(state.pending.last),
            },
            # While a cycle runs, the next one starts after it at the earliest.
            "next_start": _when(self.next_start()),
            "failures": state.failures,
            "last_run": None
            if state.last is None
            else {
                **dataclasses.asdict(state.last),
                "started": _when(state.last.started),
                "ended": _when(state.last.ended),
            },
            "last_cycle": cycle,
            "champion": champion,
            "last_error": None if error is None else {"time": _when(error[0]), "text": error[1]},
            "problems": problems,
            "refused": self.refused,
            "webhooks": self._inbox.secret is not None,
            "webhook": self._inbox.webhook,
            "poll_seconds": config.poll,
        }


async def _aside(work: Callable[[], Result]) -> Result:
    """Do something that blocks in a thread that nobody waits for at the end: a server may be slow to answer."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else act())

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            settle(functools.partial(future.set_exception, error))
        else:
            settle(functools.partial(future.set_result, result))

    threading.Thread(target=run, daemon=True).start()
    return await future


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a stream as text; of one that is longer than any, its pieces are left out."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        if text := line.decode("utf-8", "replace").rstrip():
            yield text


def _result(line: str) -> dict[str, Any]:
    """What a cycle printed last, if it is an object."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def last_words(lines: Sequence[str]) -> str:
    """What a program said of its failure: its message with all its lines, else its last line, as after a traceback.

    Args:
        lines: the last ones of its standard error stream.
    """
    begins = [number for number, line in enumerate(lines) if line.startswith(_ERROR_BEGINS)]
    return "\n".join(lines[begins[-1] if begins else -1 :])


def _said(error: Exception) -> str:
    """An error that was to be expected says it in words; of any other its name counts."""
    return str(error) if isinstance(error, SSCloudError | OSError) else repr(error)


def _text(value: object) -> str:
    return value[:_LONGEST_TEXT] if isinstance(value, str) else ""


def _when(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _champion(workspace: Path) -> dict[str, str] | str | None:
    """What is served; a sentence where that cannot be read."""
    try:
        pointer = pointed(workspace / "served")
    except BundleError as error:
        return str(error)
    return None if pointer is None else dataclasses.asdict(pointer)


def _cycle_facts(workspace: Path, journal: Journal) -> dict[str, Any]:
    step = journal.next_step
    report = cycle_folder(workspace / "cycles", journal.number) / "report.html"
    failed = next((record for record in journal.steps if record.state == "failed"), None)
    return {
        "number": journal.number,
        "started": journal.started,
        "ended": journal.ended,
        "outcome": journal.outcome,
        "next_step": step.name if step is not None and journal.is_open else None,
        "error": None if failed is None else failed.error,
        "report": str(report) if report.is_file() else None,
    }


def render_health(health: dict[str, Any]) -> str:
    """`Watcher.health` as a page."""
    champion, cycle, pending, last = (health[key] or {} for key in ("champion", "last_cycle", "pending", "last_run"))
    unfinished = f"unfinished, goes on with {cycle.get('next_step')}"
    cards = [
        {
            "value": champion.get("bundle", NOTHING).rpartition("-")[0] or NOTHING,
            "name": "champion",
            "note": f"since {champion['published']}" if champion else "nothing is served from the volume yet",
        },
        {
            "value": f"{cycle['number']:04d}" if cycle else NOTHING,
            "name": "last cycle",
            "note": (cycle["outcome"] or unfinished) if cycle else "there was none",
        },
        {
            "value": str(pending.get("events", 0)),
            "name": "events that wait",
            "note": f"the last at {pending['last']}" if pending else "",
        },
    ]
    tables = [
        (
            "Queue",
            {
                "next start": health["next_start"] or NOTHING,
                "jobs": ", ".join(map(str, pending.get("jobs", []))) or NOTHING,
                "cycle that runs, since": health["running_since"] or NOTHING,
                "failures in a row": str(health["failures"]),
            },
        ),
        (
            "Last cycle",
            {
                "started": cycle.get("started") or NOTHING,
                "ended": cycle.get("ended") or NOTHING,
                "outcome": cycle.get("outcome") or (unfinished if cycle else NOTHING),
                "error": cycle.get("error") or NOTHING,
                "report": cycle.get("report") or NOTHING,
            },
        ),
        (
            "Last start",
            {
                "ended": last.get("ended") or NOTHING,
                "status": str(last.get("status", NOTHING)),
                "result": last.get("summary") or last.get("error") or NOTHING,
            },
        ),
        (
            "Service",
            {
                "up since": health["up_since"],
                "webhooks": f"taken; refused so far: {health['refused']}" if health["webhooks"] else "not taken",
                "number of the webhook in CVAT": str(health["webhook"] or NOTHING),
                "looks at the server": f"every {health['poll_seconds'] / 60:g} min"
                if health["poll_seconds"]
                else "never",
                "weights of the champion": champion.get("weights_sha256", NOTHING),
            },
        ),
    ]
    report = {"version": health["version"], "created": datetime.now(UTC)}
    return render("watch.html.j2", health=health, cards=cards, tables=tables, report=report)


def finished_work(server: "Server", project: int) -> FinishedWork:
    """What the finished jobs of a project look like.

    Raises:
        ServerError: the server does not answer, or refuses.
    """
    jobs = [job for job in server.project_jobs(project) if job.state == "completed"]
    text = "\n".join(sorted(f"{job.id} {job.updated}" for job in jobs))
    latest = max((_seconds(job.updated) for job in jobs), default=0.0)
    return FinishedWork(mark=hashlib.sha256(text.encode()).hexdigest(), latest=latest)


def _seconds(text: str) -> float:
    """A time of the server, seconds since 1970; one that cannot be read is later than all others."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return math.inf


# --- HTTP -------------------------------------------------------------------------------------------------------------

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(watcher: Watcher) -> FastAPI:
    """The web application: messages from CVAT, and the page of health."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post(PATH)
    async def webhook(request: Request) -> Response:
        try:
            if watcher.stopping:
                raise RefusedError(503, "The service is being stopped. Send it again.")  # noqa: TRY301
            body = await _read_body(request)
            message = watcher.take(request.headers.get("x-signature-256"), body)
        except RefusedError as refused:
            watcher.refused += 1
            client = request.client.host if request.client else None
            note("webhook-refused", level=logging.WARNING, status=refused.status, reason=refused.reason, client=client)
            return JSONResponse({"error": refused.reason}, refused.status)
        return JSONResponse({"taken": message.finished, "event": message.event})

    @app.get("/")
    async def page() -> Response:
        health = await asyncio.to_thread(watcher.health)
        return HTMLResponse(render_health(health), headers=_HEADERS)

    @app.get("/health.json")
    async def health() -> Response:
        return JSONResponse(await asyncio.to_thread(watcher.health), headers=_HEADERS)

    @app.get("/healthz")
    async def alive() -> Response:
        return PlainTextResponse("stopping\n" if watcher.stopping else "ok\n", 503 if watcher.stopping else 200)

    return app


async def _read_body(request: Request) -> bytes:
    """The body, bounded in size and time.

    Raises:
        RefusedError: too large, too slow, or broken off.
    """
    length = request.headers.get("content-length", "0")
    too_large = RefusedError(413, f"A message may have {MAX_BODY} bytes.")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READING):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError as error:
        raise RefusedError(408, f"The message did not come within {READING:g} s.") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "The message was broken off.") from error
    return bytes(body)


def watch(
    config: WatchConfig,
    *,
    secret: str | None,
    look: Callable[[], FinishedWork] | None = None,
    register: Callable[[], int] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: how to watch.
        secret: of the webhook; None: no messages are taken.
        look: see `Watcher`.
        register: see `Watcher`; called when messages are answered. None: messages of any webhook that has the secret
            are taken.

    Returns:
        0, the status of a service that was asked to stop.

    Raises:
        ConfigError: the port or the workspace cannot be used; another service works in it.
    """
    cycles = config.workspace / "cycles"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_lock(cycles))
            listener = stack.enter_context(_listen(config.host, config.port))
            output = stack.enter_context(_logging_to(cycles))
        except OSError as error:
            raise ConfigError(
                f"{cycles} cannot be written: {error.strerror or error}. Name another --workspace."
            ) from error
        inbox = Inbox(secret=secret, project=config.project)
        asyncio.run(_serve(config, inbox, listener, output=output, look=look, register=register))
    return 0


@contextlib.contextmanager
def _lock(cycles: Path) -> Iterator[None]:
    """Be the only service of a workspace. A process that is killed holds nothing any more."""
    cycles.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(cycles / LOCK).acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Another `sscloud watch` works in {cycles.parent}. End it first, or name another --workspace."
        ) from None
    with lock:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used: {error.strerror or error}. Stop the program that has it, or choose "
            "another one with --port."
        ) from error


def greeting(config: WatchConfig, url: str, *, webhooks: bool) -> str:
    """What the service does, in a line for people; the standard output has it, the log does not.

    Args:
        config: how to watch.
        url: its page.
        webhooks: whether messages of CVAT are taken.
    """
    ways = [f"messages of CVAT at {url.rstrip('/')}{PATH}"] if webhooks else []
    ways += [f"a look at CVAT every {config.poll / 60:g} min"] if config.poll else []
    return (
        f"Waiting for finished jobs of project {config.project}, by {' and '.join(ways)}; a cycle starts "
        f"{config.quiet / 60:g} min after the last one. What is going on: {url}  To end: Ctrl-C."
    )


async def _serve(
    config: WatchConfig,
    inbox: Inbox,
    listener: socket.socket,
    *,
    output: logging.Logger,
    look: Callable[[], FinishedWork] | None,
    register: Callable[[], int] | None,
) -> None:
    watcher = Watcher(config, inbox, output=output, look=look, register=register)
    server = HttpServer(make_app(watcher))
    loop = asyncio.get_running_loop()
    before = {
        number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(watcher.stop))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    note("started", url=url, project=config.project, workspace=str(config.workspace.resolve()))
    print(greeting(config, url, webhooks=inbox.secret is not None), flush=True)
    try:
        await watcher.run()
    finally:
        server.should_exit = True
        await serving
        note("stopped")
        for number, handler in before.items():
            signal.signal(number, handler)
