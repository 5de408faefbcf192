"""`sscloud serve` as a host: functions that misbehave, limits, and the dashboard's API, over real sockets."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import serverless
from sscloud.errors import ConfigError
from tools.function_folder import mount_models
from tools.nuclio import describe_served, parse_duration, read_function, with_models

FUNCTION = """
import os, time

def init_context(context):
    if os.environ.get("FAIL") == "init":
        raise ValueError("init_context fails on purpose")
    if os.environ.get("FAIL") == "exit":
        os._exit(9)
    context.platform.set_termination_callback(lambda: context.logger.info("termination callback"))
    context.platform.set_drain_callback(lambda: context.logger.info("drain callback"))
    context.logger.info("started")

def handler(context, event):
    print("the function prints")
    wish = event.body if isinstance(event.body, dict) else {}
    if wish.get("do") == "raise":
        raise ValueError("broken on purpose")
    if wish.get("do") == "exit":
        raise SystemExit(4)
    if wish.get("do") == "die":
        os._exit(3)
    if wish.get("do") == "sleep":
        time.sleep(wish["seconds"])
        return "awake"
    if wish.get("do") == "bytes":
        return context.Response(
            body=bytes([0, 255]), headers={"X-Own": "1"}, content_type="application/octet-stream", status_code=201
        )
    if wish.get("do") == "dict":
        return context.Response(body={"label": "Земля"}, status_code=200)
    return context.Response(
        body={
            "type": type(event.body).__name__,
            "size": event.size,
            "method": event.method,
            "path": event.path,
            "content_type": event.content_type,
            "header": event.get_header("x-own"),
            "nuclio_headers": [name for name in event.headers if name.lower().startswith("x-nuclio")],
            "trigger": event.trigger.name,
            "worker": context.worker_id,
            "process": os.getpid(),
            "setting": os.environ.get("SETTING"),
        }
    )
"""


def make_function(folder: Path, code: str = FUNCTION, **changes: Any) -> Path:
    """A function folder with the code of a test; `changes` go into the HTTP trigger or the spec."""
    folder.mkdir(parents=True)
    text = (Path(serverless.__file__).parent / "function.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    trigger = data["spec"]["triggers"]["myHttpTrigger"]
    for key, value in changes.items():
        place = {"maxRequestBodySize": trigger["attributes"], "port": trigger["attributes"]}.get(key)
        if key in ("workerAvailabilityTimeoutMilliseconds", "numWorkers"):
            place = trigger
        place = data["spec"] if place is None else place
        place[key] = value
    (folder / "function.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    (folder / "main.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, run_host: Callable[..., Any]) -> Iterator[Any]:
    folder = make_function(
        tmp_path_factory.mktemp("functions") / "fake",
        maxRequestBodySize=100_000,
        eventTimeout="2s",
        env=[{"name": "SETTING", "value": "from the yaml"}],
    )
    with run_host(folder) as host:
        yield host


@pytest.fixture(params=["direct", "dashboard"])
def ask(request: pytest.FixtureRequest, host: Any) -> Callable[..., Any]:
    return host.post if request.param == "direct" else host.invoke


def wish(do: str, **more: Any) -> bytes:
    return json.dumps({"do": do, **more}).encode()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_ready(host: Any) -> None:
    wait_for(lambda: host.post(b"{}").status == 200)


def worker_of(host: Any) -> int:
    """The process id of the host's only worker."""
    (worker,) = psutil.Process(host.process.pid).children()
    return int(worker.pid)


class TestEvents:
    def test_json_is_parsed_by_the_sdk(self, ask: Any) -> None:
        seen = ask(b'{"a": 1}').json()
        assert (seen["type"], seen["size"], seen["method"], seen["path"]) == ("dict", 8, "POST", "/")
        assert (seen["trigger"], seen["setting"], seen["nuclio_headers"]) == ("myHttpTrigger", "from the yaml", [])

    @pytest.mark.parametrize(("body", "kind"), [(b"{}", "text/plain"), (b"{", "application/json"), (b"", "")])
    def test_anything_else_stays_bytes(self, ask: Any, body: bytes, kind: str) -> None:
        seen = ask(body, kind).json()
        assert (seen["type"], seen["content_type"]) == ("bytes", kind)

    def test_headers_reach_the_function(self, host: Any) -> None:
        seen = host.invoke(b"{}", **{"X-Own": "yes", "X-Nuclio-Invoke-Timeout": "120s"}).json()
        assert (seen["header"], seen["nuclio_headers"]) == ("yes", [])

    def test_bytes(self, ask: Any) -> None:
        answer = ask(wish("bytes"))
        assert (answer.status, answer.body, answer.headers["x-own"]) == (201, b"\x00\xff", "1")
        assert answer.headers["content-type"] == "application/octet-stream"

    def test_dict(self, ask: Any) -> None:
        answer = ask(wish("dict"))
        assert (answer.status, answer.json()) == (200, {"label": "Земля"})
        assert answer.headers["content-type"] == "application/json"

    def test_text(self, ask: Any) -> None:
        answer = ask(wish("sleep", seconds=0))
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"awake", "text/plain")


class TestTrouble:
    @pytest.mark.parametrize("do", ["raise", "exit"])
    def test_an_exception_is_500_and_the_worker_lives_on(self, ask: Any, host: Any, do: str) -> None:
        answer = ask(wish(do))
        assert answer.status == 500
        assert b"Exception caught in handler" in answer.body
        assert "Traceback" in host.log
        assert ask(b"{}").status == 200

    def test_a_dead_worker_is_502_and_started_again(self, ask: Any, host: Any) -> None:
        starts = host.log.count("[info] started")
        answer = ask(wish("die"))
        assert answer.status == 502
        assert "ended while it worked on this request" in answer.json()["error"]
        wait_until_ready(host)
        assert host.log.count("[info] started") == starts + 1
        assert "worker ended (status 3)" in host.log

    def test_503_while_the_worker_is_started_again(self, host: Any) -> None:
        host.post(wish("die"))
        answer = host.post(b"{}")
        assert answer.status == 503
        assert "is being started" in answer.json()["error"]
        assert host.get("/api/functions").json()["sscloud-model"]["status"]["state"] == "unhealthy"
        wait_until_ready(host)

    def test_a_slow_request_is_408_and_the_worker_started_again(self, ask: Any, host: Any) -> None:
        answer = ask(wish("sleep", seconds=60))
        assert (answer.status, answer.json()) == (408, {"error": "handler timed out"})
        wait_until_ready(host)

    def test_the_caller_of_the_dashboard_may_wait_less(self, host: Any) -> None:
        answer = host.invoke(wish("sleep", seconds=1), **{"x-nuclio-invoke-timeout": "100ms"})
        assert answer.status == 504
        assert "did not answer within 0.1 s" in answer.json()["error"]
        assert host.post(b"{}").json()["type"] == "dict", "the late answer is not taken for this one's"

    def test_a_client_that_goes_away_does_not_disturb_the_next(self, host: Any) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", host.function_port)
        connection.request("POST", "/", wish("sleep", seconds=0.5), {"Content-Type": "application/json"})
        connection.close()
        assert host.post(b"{}").json()["type"] == "dict"

    def test_requests_wait_for_their_turn(self, host: Any) -> None:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: host.post(wish("sleep", seconds=0.2)), range(4)))
        assert [answer.status for answer in answers] == [200] * 4

    @pytest.mark.slow
    def test_503_when_the_worker_stays_busy(self, tmp_path: Path, run_host: Any) -> None:
        folder = make_function(tmp_path / "busy", workerAvailabilityTimeoutMilliseconds=50)
        with run_host(folder) as host:
            first = threading.Thread(target=host.post, args=(wish("sleep", seconds=1.5),))
            first.start()
            time.sleep(0.5)
            answer = host.post(b"{}")
            first.join()
        assert answer.status == 503
        assert "workers were busy for 0.05 s" in answer.json()["error"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, run_host: Any) -> Iterator[Any]:
    """A host whose worker is told things."""
    with run_host(make_function(tmp_path_factory.mktemp("functions") / "told", eventTimeout="4s")) as host:
        yield host


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, run_host: Any) -> Iterator[Any]:
    with run_host(make_function(tmp_path_factory.mktemp("functions") / "pair", numWorkers=2)) as host:
        yield host


class TestSignals:
    """Who is told to end finishes what it has begun."""

    @staticmethod
    def start(host: Any, seconds: float) -> Future[Any]:
        """A request that is being worked on when this returns."""
        before = host.log.count("the function prints")
        future = ThreadPoolExecutor(1).submit(host.post, wish("sleep", seconds=seconds))
        wait_for(lambda: host.log.count("the function prints") > before)
        return future

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_host_answers_what_it_has(self, tmp_path: Path, run_host: Any, number: signal.Signals) -> None:
        with run_host(make_function(tmp_path / "function")) as host:
            running = self.start(host, 1.5)
            waiting = ThreadPoolExecutor(1).submit(host.post, wish("sleep", seconds=0))
            time.sleep(0.3)
            host.process.send_signal(number)
            time.sleep(0.5)
            with pytest.raises(OSError, match=r"\w"):
                host.post(b"{}")  # nothing new is taken
            assert host.process.wait(20) == 0
            assert (running.result().status, running.result().body) == (200, b"awake")
            assert waiting.result().status == 200, "it had come before"
            assert "Traceback" not in host.log

    @pytest.mark.slow
    def test_a_second_ctrl_c_does_not_wait(self, tmp_path: Path, run_host: Any) -> None:
        with run_host(make_function(tmp_path / "function")) as host:
            self.start(host, 60)
            host.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert host.process.poll() is None
            host.process.send_signal(signal.SIGINT)
            host.process.wait(15)

    @pytest.mark.slow
    def test_it_waits_no_longer_than_the_function_may_work(self, tmp_path: Path, run_host: Any) -> None:
        with run_host(make_function(tmp_path / "function", eventTimeout="2s")) as host:
            running = self.start(host, 60)
            host.process.send_signal(signal.SIGTERM)
            host.process.wait(15)
            assert running.result().status == 408

    def test_signals_to_everybody_do_not_end_the_worker(self, told: Any) -> None:
        """Ctrl-C reaches the whole terminal, and service managers tell every process of a service to end."""
        worker = worker_of(told)
        running = self.start(told, 1)
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        assert running.result().status == 200
        assert told.post(b"{}").json()["process"] == worker

    def test_drain_is_obeyed_after_the_running_request(self, told: Any) -> None:
        worker = worker_of(told)
        running = self.start(told, 1)
        os.kill(worker, signal.SIGUSR2)
        time.sleep(0.3)
        assert "drain callback" not in told.log
        assert running.result().status == 200
        wait_for(lambda: "drain callback" in told.log)
        os.kill(worker, signal.SIGUSR2)
        os.kill(worker, signal.SIGCONT)
        assert told.post(b"{}").json()["process"] == worker
        assert told.log.count("drain callback") == 1, "a drained worker is not drained again"

    def test_termination_is_obeyed_after_the_running_request(self, told: Any) -> None:
        running = self.start(told, 1)
        os.kill(worker_of(told), signal.SIGUSR1)
        time.sleep(0.3)
        assert "termination callback" not in told.log
        assert running.result().status == 200
        wait_for(lambda: "termination callback" in told.log)
        assert told.post(b"{}").status == 408, "as with Nuclio, nobody answers any more"
        wait_until_ready(told)


class TestWorkers:
    def test_they_work_at_the_same_time(self, pair: Any) -> None:
        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: pair.post(wish("sleep", seconds=1)), range(4)))
        assert [answer.status for answer in answers] == [200] * 4
        assert time.monotonic() - started < 3.5, "four seconds for one worker"

    def test_each_has_its_number(self, pair: Any) -> None:
        seen = [pair.post(b"{}").json() for _ in range(4)]
        assert [one["worker"] for one in seen] in (["0", "1"] * 2, ["1", "0"] * 2)
        assert len({one["process"] for one in seen}) == 2

    def test_one_serves_while_the_other_is_started(self, pair: Any) -> None:
        assert pair.post(wish("die")).status == 502
        assert [pair.post(b"{}").status for _ in range(6)] == [200] * 6
        assert pair.get("/api/functions").json()["sscloud-model"]["status"]["state"] == "ready"
        wait_for(lambda: len({pair.post(b"{}").json()["process"] for _ in range(2)}) == 2)

    @pytest.mark.parametrize("number", [0, -1, "many"])
    def test_a_function_without_workers(self, tmp_path: Path, number: Any) -> None:
        with pytest.raises(ConfigError, match="no function that CVAT can use: ValueError"):
            read_function(make_function(tmp_path / "function", numWorkers=number))


class TestBodyLimit:
    def test_the_limit_is_inclusive(self, ask: Any) -> None:
        assert ask(b"x" * 100_000, "text/plain").json()["size"] == 100_000

    def test_a_declared_length_is_refused_before_the_body_is_sent(self, host: Any) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", host.function_port, timeout=30)
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", "100001")
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 413
        assert "larger than 100000 bytes" in json.loads(response.read())["error"]
        connection.close()

    def test_a_stream_is_refused_when_it_passes_the_limit(self, host: Any) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", host.function_port, timeout=30)
        connection.putrequest("POST", "/")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(11):  # and no end of the body
            connection.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_client_that_sends_everything_gets_its_413(self, ask: Any) -> None:
        assert ask(b"x" * 5_000_000, "text/plain").status == 413
        assert ask(b"{}").status == 200


class TestDashboard:
    def test_functions_have_what_cvat_reads(self, host: Any) -> None:
        functions = host.get("/api/functions", **{"x-nuclio-project-name": "cvat"}).json()
        assert functions.keys() == {"sscloud-model"}
        function = host.get("/api/functions/sscloud-model").json()
        assert function == functions["sscloud-model"]
        # LambdaFunction.__init__ in CVAT's cvat/apps/lambda_manager/views.py
        assert function["metadata"]["name"] == "sscloud-model"
        assert function["metadata"]["labels"]["nuclio.io/project-name"] == "cvat"
        annotations = function["metadata"]["annotations"]
        assert annotations["type"] == "detector"
        assert annotations["framework"] == "pytorch"
        assert int(annotations["version"]) == 1
        assert json.loads(annotations["spec"]) == []
        assert annotations["name"]
        assert function["spec"]["description"]
        assert function["status"] == {"state": "ready", "httpPort": host.function_port}

    def test_other_projects_have_none(self, host: Any) -> None:
        assert host.get("/api/functions", **{"x-nuclio-project-name": "other"}).json() == {}

    def test_unknown_function(self, host: Any) -> None:
        answer = host.get("/api/functions/other")
        assert answer.status == 404
        assert "This host runs sscloud-model" in answer.json()["error"]
        assert host.invoke(b"{}", **{"x-nuclio-function-name": "other"}).status == 404

    def test_invocation_without_a_name(self, host: Any) -> None:
        answer = host.invoke(b"{}", **{"x-nuclio-function-name": ""})
        assert answer.status == 400
        assert "Function name must be provided" in answer.json()["error"]

    def test_invocation_with_a_wrong_timeout(self, host: Any) -> None:
        answer = host.invoke(b"{}", **{"x-nuclio-invoke-timeout": "soon"})
        assert answer.status == 400
        assert "'soon' is not a duration" in answer.json()["error"]

    def test_front_page(self, host: Any) -> None:
        assert b"function sscloud-model, ready" in host.get("/").body


class TestStartAndStop:
    def test_instructions(self, host: Any) -> None:
        for part in (
            f"CVAT_NUCLIO_PORT={host.port}",
            "CVAT_NUCLIO_HOST=127.0.0.1",
            "CVAT_NUCLIO_INVOKE_METHOD=dashboard",
            "--host 0.0.0.0",
        ):
            assert part in host.instructions

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_it_cleanly(self, tmp_path: Path, run_host: Any, number: signal.Signals) -> None:
        with run_host(make_function(tmp_path / "function")) as host:
            host.process.send_signal(number)
            rest, _ = host.process.communicate(timeout=30)
            assert host.process.returncode == 0
            assert rest == "Stopped.\n"
            assert "Traceback" not in host.log
            with pytest.raises(OSError, match=r"\w"):
                socket.create_connection(("127.0.0.1", host.function_port), timeout=5)

    def test_a_fixed_port_of_the_yaml_is_used(self, tmp_path: Path, start_serve: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            folder = make_function(tmp_path / "function", port=port)
            error = self.failed_start(start_serve, folder, tmp_path, "--port", "0")
        assert f"Port {port} of 127.0.0.1 cannot be used" in error
        assert "--function-port" in error

    def test_a_taken_port(self, tmp_path: Path, start_serve: Any, host: Any) -> None:
        folder = make_function(tmp_path / "function")
        error = self.failed_start(start_serve, folder, tmp_path, "--port", str(host.port))
        assert f"Port {host.port} of 127.0.0.1 cannot be used: Address already in use" in error
        assert "choose another one with --port" in error

    @pytest.mark.parametrize(
        ("fail", "message"), [("init", "ValueError: init_context fails on purpose"), ("exit", "its process ended")]
    )
    def test_a_function_that_does_not_start(self, tmp_path: Path, start_serve: Any, fail: str, message: str) -> None:
        folder = make_function(tmp_path / "function", env=[{"name": "FAIL", "value": fail}])
        error = self.failed_start(start_serve, folder, tmp_path, "--port", "0")
        assert "The function sscloud-model in" in error
        assert f"does not start: {message}" in error

    @pytest.mark.slow
    def test_a_function_that_takes_too_long_to_start(self, tmp_path: Path, start_serve: Any) -> None:
        folder = make_function(tmp_path / "function", "import time; time.sleep(60)", readinessTimeoutSeconds=1)
        error = self.failed_start(start_serve, folder, tmp_path, "--port", "0")
        assert "it was not ready after 1 s (readinessTimeoutSeconds)" in error

    def test_no_function_folder(self, tmp_path: Path, start_serve: Any) -> None:
        error = self.failed_start(start_serve, tmp_path, tmp_path, "--port", "0")
        assert "function.yaml cannot be read (No such file or directory)" in error
        assert "sscloud package BUNDLE -o FOLDER" in error

    @staticmethod
    def failed_start(start_serve: Any, folder: Path, tmp_path: Path, *arguments: str) -> str:
        process: subprocess.Popen[str]
        with start_serve(folder, *arguments, log=tmp_path / "log") as process:
            process.communicate(timeout=60)
        assert process.returncode == 2
        return (tmp_path / "log").read_text(encoding="utf-8")


class TestReadFunction:
    def test_limits(self, tmp_path: Path) -> None:
        config = read_function(make_function(tmp_path / "function"))
        assert config.body_limit == 128 * 1024 * 1024
        assert (config.worker_wait, config.event_timeout, config.readiness_timeout) == (120, 180, 180)
        assert (config.trigger, config.port, config.project) == ("myHttpTrigger", 0, "cvat")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("metadata: [", "is not valid YAML"),
            ("- 1", "is no function that CVAT can use"),
            ("metadata: {name: x}", "KeyError: 'spec'"),
            (
                "{metadata: {name: x, annotations: {version: one, spec: '[]'}}, spec: {handler: 'main:handler'}}",
                "invalid literal for int",
            ),
            (
                "{metadata: {name: x, annotations: {version: 1, spec: '['}}, spec: {handler: 'main:handler'}}",
                "JSONDecodeError",
            ),
            (
                "{metadata: {name: x, annotations: {version: 1, spec: '[]'}}, spec: {handler: 'main:handler'}}",
                "KeyError: 'description'",
            ),
        ],
    )
    def test_unusable(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "function.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_function(tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("180s", 180), ("2m30s", 150), ("500ms", 0.5), ("1h", 3600), ("1.5s", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "180", "s", "3 s", "-1s", "1x"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


class TestModelVolume:
    def test_a_folder_of_the_command_line(self, tmp_path: Path) -> None:
        config = with_models(read_function(make_function(tmp_path / "function")), tmp_path / "served")
        assert config.environment["SSCLOUD_MODELS"] == str(tmp_path / "served")
        assert (tmp_path / "served").is_dir()

    def test_what_the_yaml_mounts(self, tmp_path: Path) -> None:
        """There is no container to mount it in: the worker is told where it really is."""
        folder = make_function(tmp_path / "function")
        file = folder / "function.yaml"
        file.write_text(mount_models(file.read_text(encoding="utf-8"), tmp_path / "served"), encoding="utf-8")
        assert with_models(read_function(folder), None).environment["SSCLOUD_MODELS"] == str(tmp_path / "served")
        other = with_models(read_function(folder), tmp_path / "other")
        assert other.environment["SSCLOUD_MODELS"] == str(tmp_path / "other")

    def test_none(self, tmp_path: Path) -> None:
        config = read_function(make_function(tmp_path / "function"))
        assert with_models(config, None) is config

    @pytest.mark.parametrize("pointer", ["", "{}"])
    def test_what_cannot_be_read_is_not_shown(self, tmp_path: Path, pointer: str) -> None:
        config = with_models(read_function(make_function(tmp_path / "function")), tmp_path / "served")
        if pointer:
            (tmp_path / "served" / "champion.json").write_text(pointer, encoding="utf-8")
        assert describe_served(config) == {"metadata": config.metadata, "spec": config.spec}
