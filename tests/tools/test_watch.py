"""The service: when cycles start, what survives it, and all of it on real sockets with a real SIGTERM."""

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from filelock import FileLock

from cvat_standin import CvatStandin, jobs_of, make_task
from sscloud.errors import ConfigError, CycleError, ServerError, UnreachableError
from tools import watch as module
from tools.cli import load, main
from tools.deploy import NETWORK
from tools.nuclio import parse_duration
from tools.watch import FinishedWork, WatchConfig, Watcher, finished_work, greeting, last_words, render_health
from tools.watch_state import MOST_RETRIES, RETRY, LastRun, Pending, WatchState, read_state, write_state
from tools.webhooks import MAX_BODY, Inbox, sign
from tools.webhooks import SECRET as SECRET_VARIABLE
from training.cvat import Account, Server
from training.journal import Journal, write_journal

SECRET = "0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).parents[2]
START = 1_800_000_000.0

CYCLE = """
import json, os, pathlib, sys, time
assert "SSCLOUD_WEBHOOK_SECRET" not in os.environ
here = pathlib.Path(sys.argv[1])
with (here / "cycles.txt").open("a") as stream:
    stream.write("cycle\\n")
print("fetching", file=sys.stderr, flush=True)
while (here / "hold").exists():
    time.sleep(0.01)
if (here / "fail").exists():
    print("sscloud cycle: Cycle 3 failed in its step train: <b>no memory</b>", file=sys.stderr)
    print("What served before goes on serving.", file=sys.stderr)
    sys.exit(2)
print(json.dumps({"outcome": "accepted", "summary": "street v4 serves now", "report": "cycles/0001/report.html"}))
"""
"""Stands for `sscloud cycle`: quick, or as long as the file `hold` is there, or failing while `fail` is."""


def config(workspace: Path, **fields: Any) -> WatchConfig:
    command = (sys.executable, "-c", CYCLE, str(workspace))
    return WatchConfig(**{"workspace": workspace, "project": 7, "command": command, **fields})


def cycles(workspace: Path) -> int:
    file = workspace / "cycles.txt"
    return file.read_text().count("cycle") if file.exists() else 0


def run(**fields: Any) -> LastRun:
    return LastRun(**{"started": START, "ended": START + 10, "status": 0, **fields})


class TestWhenTheNextCycleStarts:
    def due(self, state: WatchState) -> float | None:
        return state.next_start(quiet=600, at_most=3600)

    def test_never_without_an_event(self) -> None:
        assert self.due(WatchState()) is None

    def test_when_it_has_been_quiet_for_a_while(self) -> None:
        state = WatchState()
        for at in (0, 100, 200):
            state.mark(START + at, 19)

        assert self.due(state) == START + 200 + 600
        assert state.pending == Pending(first=START, last=START + 200, events=3, jobs=(19,))

    def test_not_later_than_an_hour_after_the_first(self) -> None:
        state = WatchState()
        for at in range(0, 7200, 300):  # somebody finishes a job every five minutes
            state.mark(START + at)

        assert self.due(state) == START + 3600

    def test_a_success_waits_for_the_next_event(self) -> None:
        state = WatchState()
        state.mark(START)
        state.started(START + 600)
        assert self.due(state) is None
        state.ended(run())
        assert self.due(state) is None

    def test_events_meanwhile_make_one_more(self) -> None:
        state = WatchState()
        state.mark(START)
        state.started(START + 600)
        for at in (700, 800):
            state.mark(START + at)
        state.ended(run(ended=START + 900))

        assert self.due(state) == START + 800 + 600
        state.started(START + 1400)
        state.ended(run(ended=START + 1500))
        assert self.due(state) is None

    def test_a_failure_is_tried_again_some_times(self) -> None:
        state, at = WatchState(), START
        state.mark(at)
        for _ in range(MOST_RETRIES):
            state.started(at)
            state.ended(run(ended=at + 10, status=2))
            assert self.due(state) == at + 10 + RETRY
            at += 10 + RETRY
        state.started(at)
        state.ended(run(ended=at + 10, status=2))
        assert self.due(state) is None

        state.mark(at + 100)
        assert self.due(state) == at + 700
        state.started(at + 700)
        state.ended(run(status=0))
        assert (state.failures, self.due(state)) == (0, None)

    def test_a_failure_gives_way_to_an_event(self) -> None:
        state = WatchState()
        state.started(START)
        state.ended(run(ended=START + 10, status=2))
        state.mark(START + 20)

        assert self.due(state) == START + 620


class TestWhatIsRemembered:
    def test_all_of_it(self, tmp_path: Path) -> None:
        state = WatchState(failures=2, retry_at=START + 1, last=run(status=2, error="Нет памяти"), polled="ab")
        state.mark(START, 19)
        state.memory.bodies["ab"] = state.memory.jobs[19] = START
        write_state(tmp_path / "watch.json", state)

        assert read_state(tmp_path / "watch.json", now=START) == state

    def test_a_cycle_that_was_killed_with_the_service(self, tmp_path: Path) -> None:
        state = WatchState()
        state.mark(START, 19)
        state.started(START + 600)
        write_state(tmp_path / "watch.json", state)

        again = read_state(tmp_path / "watch.json", now=START + 700)

        assert again.running is None
        assert again.next_start(quiet=600, at_most=3600) == START + 1200

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "pending": 5}'])
    def test_not_what_is_damaged(self, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "watch.json").write_text(text)

        state = read_state(tmp_path / "watch.json", now=START)

        assert state.pending == Pending(first=START, last=START)  # who knows what was waiting
        assert "state-lost" in caplog.text

    def test_nothing_at_first(self, tmp_path: Path) -> None:
        assert read_state(tmp_path / "watch.json", now=START) == WatchState()


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def attended(workspace: Path, scenario: Callable[[Watcher, Clock], Any], **fields: Any) -> Watcher:
    """Run a scenario beside a watcher's loop."""
    clock = Clock()
    given = {name: fields.pop(name, None) for name in ("look", "register")}

    async def both() -> Watcher:
        watcher = Watcher(
            config(workspace, **fields),
            Inbox(secret=SECRET, project=7),
            output=logging.getLogger("test.output"),
            clock=clock,
            **given,
        )
        loop = asyncio.create_task(watcher.run())
        try:
            await scenario(watcher, clock)
        finally:
            watcher.stop()
            await asyncio.wait_for(loop, 20)
        return watcher

    return asyncio.run(both())


class TestWatcher:
    def test_debounces_and_queues_one_more(self, tmp_path: Path) -> None:
        async def scenario(watcher: Watcher, clock: Clock) -> None:
            (tmp_path / "hold").touch()
            watcher.mark(19)
            clock.now += 599
            watcher.mark(20)
            clock.now += 599
            watcher._wake.set()
            await asyncio.sleep(0.05)
            assert cycles(tmp_path) == 0
            assert watcher.health()["next_start"] == "2027-01-15T08:19:59+00:00"
            clock.now += 1
            watcher._wake.set()
            await until(lambda: cycles(tmp_path) == 1)
            assert watcher.health()["status"] == "running"
            for job in (21, 22, 23):
                watcher.mark(job)
            clock.now += 3000
            watcher._wake.set()
            await asyncio.sleep(0.05)
            assert cycles(tmp_path) == 1  # one at a time
            (tmp_path / "hold").unlink()
            await until(lambda: cycles(tmp_path) == 2)
            await until(lambda: watcher.state.running is None)

        watcher = attended(tmp_path, scenario)

        assert watcher.state.pending is None
        assert watcher.state.last is not None
        assert (watcher.state.last.outcome, watcher.state.last.summary) == ("accepted", "street v4 serves now")

    def test_a_failure_is_told_and_not_repeated_at_once(self, tmp_path: Path) -> None:
        async def scenario(watcher: Watcher, clock: Clock) -> None:
            (tmp_path / "fail").touch()
            watcher.mark()
            await until(lambda: watcher.state.last)
            await asyncio.sleep(0.05)
            assert cycles(tmp_path) == 1

        watcher = attended(tmp_path, scenario, quiet=0.0)

        health = watcher.health()
        assert health["last_error"]["text"] == (
            "sscloud cycle: Cycle 3 failed in its step train: <b>no memory</b>\nWhat served before goes on serving."
        )
        assert health["last_run"]["status"] == 2
        assert health["next_start"] == "2027-01-15T09:00:00+00:00"
        page = render_health(health)
        assert "&lt;b&gt;no memory&lt;/b&gt;" in page
        assert "<b>no memory" not in page

    def test_a_command_that_is_not_there(self, tmp_path: Path) -> None:
        async def scenario(watcher: Watcher, clock: Clock) -> None:
            watcher.mark()
            await until(lambda: watcher.state.last)

        watcher = attended(tmp_path, scenario, quiet=0.0, command=(str(tmp_path / "none"),))

        assert watcher.state.last is not None
        assert watcher.state.last.status == 127

    def test_stopping_ends_the_cycle_and_remembers_it(self, tmp_path: Path) -> None:
        async def scenario(watcher: Watcher, clock: Clock) -> None:
            (tmp_path / "hold").touch()
            watcher.mark(19)
            await until(lambda: cycles(tmp_path) == 1)

        watcher = attended(tmp_path, scenario, quiet=0.0)

        assert watcher.health()["status"] == "stopping"
        assert read_state(tmp_path / "cycles/watch.json", now=START).pending is not None

    def test_a_cycle_that_does_not_listen_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "GRACE", 0.05)
        deaf = (
            "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "print('deaf', flush=True); time.sleep(60)"
        )
        heard: list[str] = []

        async def scenario(watcher: Watcher, clock: Clock) -> None:
            watcher._output.addFilter(lambda record: heard.append(record.fields["line"]) or True)  # type: ignore[attr-defined,func-returns-value]
            watcher._output.setLevel(logging.INFO)
            watcher.mark()
            await until(lambda: heard)

        attended(tmp_path, scenario, quiet=0.0, command=(sys.executable, "-c", deaf))

        assert heard == ["deaf"]

    def test_polls_start_a_cycle_when_something_changed(self, tmp_path: Path) -> None:
        seen = iter(["a", "a", "a", "b", "b", ServerError("no answer"), RuntimeError("a defect"), "b"])
        last = "b"

        def look() -> FinishedWork:
            found = next(seen, last)
            if isinstance(found, Exception):
                raise found
            return FinishedWork(mark=found, latest=START)

        async def scenario(watcher: Watcher, clock: Clock) -> None:
            await until(lambda: cycles(tmp_path) == 2 and next(seen, None) is None)
            await until(lambda: watcher.state.running is None)

        watcher = attended(tmp_path, scenario, quiet=0.0, poll=0.3, look=look)

        assert cycles(tmp_path) == 2
        assert watcher.last_error is None or watcher.last_error[1] in ("no answer", "RuntimeError('a defect')")

    @pytest.mark.parametrize(
        ("after", "outcome", "project", "started"),
        [(1, "accepted", 7, 0), (-1, "accepted", 7, 1), (1, None, 7, 1), (1, "abandoned", 7, 1), (1, "refused", 8, 1)],
    )
    def test_the_first_poll_knows_what_a_finished_cycle_has_seen(
        self, tmp_path: Path, after: float, outcome: Any, project: int, started: int
    ) -> None:
        at = datetime.fromtimestamp(START + after, UTC).isoformat(timespec="seconds")
        journal = Journal(number=3, started=at, ended=at, server="https://cvat", config={"project": project})
        write_journal(tmp_path / "cycles", dataclasses.replace(journal, outcome=outcome))
        seen = [FinishedWork(mark="a", latest=START)]

        async def scenario(watcher: Watcher, clock: Clock) -> None:
            await until(lambda: watcher.state.polled == "a" and watcher.state.running is None)
            await until(lambda: cycles(tmp_path) == started)
            assert read_state(tmp_path / "cycles/watch.json", now=START).polled == "a"
            seen[0] = FinishedWork(mark="b", latest=START)
            await until(lambda: cycles(tmp_path) == started + 1)  # later looks see what is new by themselves
            await until(lambda: watcher.state.running is None)

        attended(tmp_path, scenario, quiet=0.0, poll=0.02, look=lambda: seen[0])

    def test_a_webhook_is_registered_as_soon_as_cvat_answers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
        booting = threading.Event()
        tries: list[Exception] = [UnreachableError("CVAT gives no answer."), RuntimeError("a defect")]

        def register() -> int:
            if tries:
                raise tries.pop()
            if not booting.is_set():
                raise ServerError("502 <Bad Gateway>")
            return 3

        async def scenario(watcher: Watcher, clock: Clock) -> None:
            await until(lambda: watcher.unregistered == "502 <Bad Gateway>")
            health = watcher.health()
            assert health["webhook"] is None
            assert "CVAT has not taken the webhook yet; it is asked again and again. 502 <" in health["problems"][0]
            assert "again and again. 502 &lt;Bad" in render_health(health)
            booting.set()
            await until(lambda: watcher.unregistered is None)

        watcher = attended(tmp_path, scenario, register=register)

        assert watcher._inbox.webhook == watcher.health()["webhook"] == 3
        assert watcher.health()["problems"] == []

    def test_health_shows_champion_and_last_cycle(self, tmp_path: Path) -> None:
        at = "2026-05-04T12:00:00+00:00"
        journal = Journal(number=3, started=at, ended=at, server="https://cvat", config={}, outcome="refused")
        write_journal(tmp_path / "cycles", journal)
        (tmp_path / "cycles/0003/report.html").touch()
        (tmp_path / "served").mkdir()
        sha256 = "1a2b3c4d5e6f" + "0" * 52
        pointer = {"format": 1, "bundle": "street-v3-1a2b3c4d5e6f", "weights_sha256": sha256, "published": at}
        (tmp_path / "served/champion.json").write_text(json.dumps(pointer))

        async def scenario(watcher: Watcher, clock: Clock) -> None:
            watcher.mark(19)

        watcher = attended(tmp_path, scenario)

        health = watcher.health()
        assert json.loads(json.dumps(health)) == health
        assert health["champion"]["bundle"] == "street-v3-1a2b3c4d5e6f"
        assert health["last_cycle"]["outcome"] == "refused"
        assert health["last_cycle"]["report"].endswith("cycles/0003/report.html")
        assert health["pending"]["jobs"] == [19]
        page = render_health(health)
        assert "<strong>street-v3</strong>" in page
        assert "<strong>0003</strong>" in page

        (tmp_path / "cycles/0003/journal.json").write_text("{")
        (tmp_path / "served/champion.json").write_text("{")
        assert len(watcher.health()["problems"]) == 2
        assert "journal.json" in render_health(watcher.health())


class TestLastWords:
    def test_a_failed_step(self) -> None:
        error = CycleError("Cycle 3 failed in its step deploy: Nuclio is away.\nWhat served before goes on serving.")
        lines = ["fetch  1 s  5 panoramas", "sscloud cycle: an older one", *f"sscloud cycle: {error}".splitlines()]

        assert last_words(lines) == f"sscloud cycle: {error}"

    def test_a_wrong_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["cycle", "--min-news", "5"])
        said = last_words(capsys.readouterr().err.splitlines())

        assert said.splitlines() == [
            "sscloud cycle: unrecognized arguments: --min-news 5",
            "Try: sscloud cycle --help",
        ]

    def test_a_traceback(self) -> None:
        assert last_words(["Traceback (most recent call last):", '  File "a.py"', "KeyError: 5"]) == "KeyError: 5"

    def test_nothing(self) -> None:
        assert last_words([]) == ""


def test_finished_work_changes_with_finished_jobs(cvat_server: CvatStandin, jpeg: bytes) -> None:
    project, jobs = two_jobs(cvat_server, jpeg)
    with Server.connect(Account(url=cvat_server.url, token=cvat_server.access_token)) as server:
        seen = [finished_work(server, project)]
        cvat_server.set_job(jobs[0], state="in progress")
        seen.append(finished_work(server, project))
        cvat_server.set_job(jobs[0], state="completed")
        seen.append(finished_work(server, project))
        seen.append(finished_work(server, project + 1))
    assert seen[0] == seen[1] == seen[3] != seen[2]
    assert seen[0].latest == 0
    assert abs(seen[2].latest - time.time()) < 60


def test_a_line_for_people_says_what_it_waits_for(tmp_path: Path) -> None:
    given = config(tmp_path, poll=300.0)

    assert greeting(given, "http://127.0.0.1:8090/", webhooks=True) == (
        "Waiting for finished jobs of project 7, by messages of CVAT at http://127.0.0.1:8090/webhook and a look at "
        "CVAT every 5 min; a cycle starts 10 min after the last one. What is going on: http://127.0.0.1:8090/  "
        "To end: Ctrl-C."
    )
    assert "by a look at CVAT every 5 min;" in greeting(given, "http://[::1]:8090/", webhooks=False)


# --- on real sockets --------------------------------------------------------------------------------------------------


@pytest.fixture
def jpeg(make_panorama: Callable[..., Any]) -> bytes:
    from training.sample.generate import encode_image

    return encode_image(make_panorama())


def two_jobs(server: CvatStandin, jpeg: bytes) -> tuple[int, list[int]]:
    with server.site.client() as client:
        project = server.site.make_project(client, "Улица", [{"name": "Земля"}])
        task = make_task(client, project.id, {"1.jpg": jpeg, "2.jpg": jpeg}, segment_size=1)
        return project.id, jobs_of(client, task.id)


class Service:
    """`sscloud watch` in a process of its own, with a quick stand-in for `sscloud cycle`."""

    def __init__(
        self, workspace: Path, cvat: CvatStandin, arguments: list[str], *, secret: str | None = SECRET
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        code = (
            "import sys, tools.commands.watch as watch\n"
            f"watch._command = lambda args, project: (sys.executable, '-c', {CYCLE!r}, {str(workspace)!r})\n"
            "from tools.cli import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        arguments = [argument.replace("URL", self.url) for argument in arguments]
        environment = {**os.environ, **cvat.site.environment(), "PYTHONUTF8": "1"}
        environment.pop("SSCLOUD_WEBHOOK_SECRET", None)
        if secret is not None:
            environment["SSCLOUD_WEBHOOK_SECRET"] = secret
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, "watch", "--workspace", str(workspace), "--port", str(self.port), *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.log: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self.wait(lambda: any(line["event"] == "started" for line in self.log))

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(json.loads(line))

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log
            assert self._process.poll() is None or condition(), self.log
            time.sleep(0.01)

    def ask(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("GET", "/health.json")[1])
        return found

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(30)
        self._thread.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        return status


@pytest.fixture
def start(cvat_server: CvatStandin, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts the service; it is stopped afterwards."""
    started: list[Service] = []

    def make(*arguments: str, secret: str | None = SECRET) -> Service:
        started.append(Service(tmp_path, cvat_server, list(arguments), secret=secret))
        return started[-1]

    yield make
    for service in started:
        if service._process.poll() is None:
            service.stop()


def test_from_a_finished_job_to_a_cycle(
    cvat_server: CvatStandin, jpeg: bytes, tmp_path: Path, start: Callable[..., Service]
) -> None:
    project, jobs = two_jobs(cvat_server, jpeg)
    service = start("--project", str(project), "--quiet", "0", "--register", "URL/webhook")
    service.wait(lambda: any(line["event"] == "ping" and line["status"] == 200 for line in service.log))

    cvat_server.set_job(jobs[0], state="in progress")
    cvat_server.deliveries.wait()
    assert cycles(tmp_path) == 0
    cvat_server.set_job(jobs[0], state="completed")
    service.wait(lambda: cycles(tmp_path) == 1)
    cvat_server.deliveries.wait()

    assert [(sent.event, sent.status) for sent in cvat_server.deliveries.done] == [
        ("ping", 200),
        ("update:job", 200),
        ("update:job", 200),
    ]
    service.wait(lambda: service.health()["last_run"])
    assert service.health()["last_run"]["summary"] == "street v4 serves now"
    assert service.ask("GET", "/healthz") == (200, b"ok\n")
    status, page = service.ask("GET", "/")
    assert status == 200
    assert "street v4 serves now" in page.decode()

    # A second delivery of the same message starts nothing.
    sent = cvat_server.deliveries.done[-1]
    assert service.ask("POST", "/webhook", sent.body, X_Signature_256=sign(SECRET, sent.body))[0] == 409

    # SIGTERM in the middle of the next cycle.
    (tmp_path / "hold").touch()
    cvat_server.set_job(jobs[1], state="completed")
    service.wait(lambda: cycles(tmp_path) == 2)
    assert service.stop() == 0
    events = [line["event"] for line in service.log]
    assert events[-3:] == ["stopping", "cycle-interrupted", "stopped"]
    assert {"time", "level", "event"} <= set.intersection(*(set(line) for line in service.log))
    state = read_state(tmp_path / "cycles/watch.json", now=time.time())
    assert state.pending is not None

    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "cycles").iterdir()]
    assert not any(SECRET in text for text in (*written, json.dumps(service.log), page.decode()))
    output = [json.loads(line) for line in (tmp_path / "cycles/watch.log").read_text(encoding="utf-8").splitlines()]
    assert output[0]["line"] == "fetching"


def test_forgeries_are_refused(cvat_server: CvatStandin, tmp_path: Path, start: Callable[..., Service]) -> None:
    service = start("--project", "7", "--quiet", "0")
    now = datetime.now(UTC).isoformat()
    job = {"id": 19, "project_id": 7, "state": "completed", "updated_date": now}

    def post(body: bytes, signature: str | None) -> int:
        headers = {} if signature is None else {"X_Signature_256": signature}
        return service.ask("POST", "/webhook", body, **headers)[0]

    def told(**fields: Any) -> bytes:
        return json.dumps({"event": "update:job", "job": {**job, **fields}, "webhook_id": 1}).encode()

    assert post(told(), None) == 401
    assert post(told(), sign(SECRET[::-1], told())) == 401
    assert post(told(id=20), sign(SECRET, told())) == 401
    assert post(told(), sign(SECRET, told()).replace("sha256", "sha1")) == 401
    assert post(told(project_id=8), sign(SECRET, told(project_id=8))) == 403
    old = told(updated_date="2020-01-01T00:00:00Z")
    assert post(old, sign(SECRET, old)) == 409
    assert post(b"{", sign(SECRET, b"{")) == 400
    huge = b" " * (MAX_BODY + 1)
    assert post(huge[:1], "sha256=") == 401
    assert service.ask("POST", "/webhook", None, Content_Length=str(MAX_BODY + 1))[0] == 413
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it hangs up in the middle of it
        assert service.ask("POST", "/webhook", iter([huge, huge]))[0] == 413
    assert service.ask("GET", "/webhook")[0] == 405
    assert service.ask("GET", "/cycles/watch.json")[0] == 404

    health = service.health()
    assert health["pending"] is None
    assert health["refused"] >= 10
    assert cycles(tmp_path) == 0
    assert service.stop() == 0


@pytest.mark.slow
def test_polling_alone(cvat_server: CvatStandin, jpeg: bytes, tmp_path: Path, start: Callable[..., Service]) -> None:
    project, jobs = two_jobs(cvat_server, jpeg)
    service = start("--project", str(project), "--quiet", "0", "--poll", "0.005", secret=None)
    service.wait(lambda: cycles(tmp_path) == 1)  # whatever was finished before

    cvat_server.set_job(jobs[0], state="completed")
    service.wait(lambda: cycles(tmp_path) == 2)

    assert service.ask("POST", "/webhook", b"{}", X_Signature_256=sign("", b"{}"))[0] == 403
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "secret", "message"),
    [
        (["--project", "7"], None, "SSCLOUD_WEBHOOK_SECRET is not set"),
        (
            ["--project", "7", "--poll", "5", "--register", "http://a/webhook"],
            None,
            "SSCLOUD_WEBHOOK_SECRET is not set",
        ),
        (["--project", "7"], "short", "must have 16 to 64 characters"),
        (["--poll", "5"], None, "No project is named. Give --project N"),
        (["--project", "7", "--register", "loop/webhook"], SECRET, "needs the address under which CVAT reaches"),
        (["--project", "7", "--host", "203.0.113.5"], SECRET, "Port 8090 of 203.0.113.5 cannot be used"),
    ],
)
def test_errors(
    arguments: list[str],
    secret: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SSCLOUD_WEBHOOK_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("SSCLOUD_WEBHOOK_SECRET", secret)

    assert main(["watch", "--workspace", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="choose another one with --port"),
    ):
        module.watch(config(tmp_path, port=taken.getsockname()[1]), secret=SECRET)


def test_a_workspace_has_one_service(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "cycles/watch.lock"),
        pytest.raises(ConfigError, match=r"Another `sscloud watch` works in .*End it first"),
    ):
        module.watch(config(tmp_path, port=0), secret=SECRET)
    assert not (tmp_path / "cycles/watch.log").exists()


def test_it_starts_before_cvat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for name, value in (("CVAT_URL", nobody), ("CVAT_ACCESS_TOKEN", "token"), (SECRET_VARIABLE, SECRET)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "watch", lambda config, **given: told.update(given) or 0)

    assert main(["watch", "--workspace", str(tmp_path), "--project", "7", "--register", "http://a/webhook"]) == 0

    with pytest.raises(UnreachableError):
        told["register"]()


def test_the_cycle_has_the_same_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[WatchConfig] = []
    monkeypatch.setenv("SSCLOUD_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(module, "watch", lambda config, **_: told.append(config) or 0)
    (tmp_path / "cycle.yaml").write_text("project: 12\n")

    arguments = ["--workspace", str(tmp_path), "--profile", "work", "--organization", "", "--at-most", "30"]
    assert main(["watch", *arguments, "--", "--min-new", "10", "--dry-run"]) == 0

    [found] = told
    assert (found.project, found.quiet, found.at_most, found.poll) == (12, 600, 1800, None)
    assert found.command[1:4] == ("-m", "tools.cli", "cycle")
    assert found.command[4:] == (
        *("--workspace", str(tmp_path), "--project", "12", "--json", "--profile=work", "--organization="),
        *("--min-new", "10", "--dry-run"),
    )


def test_the_files_of_deploy_call_it_rightly() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    load("watch").add_arguments(parser)
    service = (ROOT / "deploy/sscloud-watch.service").read_text(encoding="utf-8")
    [start] = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    compose = yaml.safe_load((ROOT / "deploy/docker-compose.watch.yml").read_text(encoding="utf-8"))
    inside = compose["services"]["sscloud-watch"]
    given = [re.sub(r"\$\{\w+:\?[^}]*\}", "7", argument) for argument in inside["command"]]

    for program, verb, *arguments in (shlex.split(start), given):
        assert (Path(program).name, verb) == ("sscloud", "watch")
        assert parser.parse_args(arguments).project == 7
    assert SECRET_VARIABLE in service
    assert SECRET_VARIABLE in inside["environment"]
    grace = int(re.findall(r"^TimeoutStopSec=(\d+)$", service, re.MULTILINE)[0])
    assert grace > module.GRACE
    assert "StartLimitIntervalSec=0" in service  # CVAT may need longer than any limit
    assert "--host" not in shlex.split(start)
    assert parse_duration(inside["stop_grace_period"]) > module.GRACE
    assert compose["networks"]["cvat"]["name"] == NETWORK
