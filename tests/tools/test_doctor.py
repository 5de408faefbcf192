"""`sscloud doctor` against a CVAT stand-in, `sscloud serve`, and dashboards with broken functions."""

import contextlib
import dataclasses
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sscloud.bundle import WEIGHTS, ModelBundle
from sscloud.errors import ConfigError, DeployError, ServerError
from tools.doctor import (
    DoctorConfig,
    Finding,
    LargestFrame,
    NuclioFunction,
    broken_list,
    check_body,
    check_bundle_version,
    check_disk,
    check_gpu,
    check_labels,
    check_listed,
    check_metadata,
    check_port,
    check_state,
    check_time,
    check_version,
    examine,
    fetch_functions,
    missing_function,
    read_function_entry,
)
from tools.function_folder import package
from training.cvat import Account, ProjectLabel, Server

if TYPE_CHECKING:
    from cvat_standin import CvatStandin

ROOT = Path(__file__).resolve().parents[2]
NAME = "sscloud-street"
LABELS = ("Земля", "Растительность", "Здание", "Конструкции", "Обстановка")

LIGHT = """
import json

def handler(context, event):
    answer = [{"label": "Земля", "type": "mask", "mask": [1, 1, 0, 1, 4, 5, 5, 6]}]
    return context.Response(body=json.dumps(answer), headers={}, content_type="application/json", status_code=200)
"""


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands leave behind goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def entry(**changes: Any) -> dict[str, Any]:
    """A function as Nuclio's dashboard has it; keys of `changes` are paths such as `spec__description`."""
    spec = json.dumps([{"name": name, "type": "mask", "attributes": []} for name in LABELS])
    attributes = {"port": 32001, "maxRequestBodySize": 2000}
    data: dict[str, Any] = {
        "metadata": {"name": NAME, "annotations": {"name": "Street", "type": "detector", "version": "3", "spec": spec}},
        "spec": {"description": "d", "triggers": {"http": {"kind": "http", "attributes": attributes}}},
        "status": {"state": "ready", "httpPort": 32001},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return data


def function(**changes: Any) -> NuclioFunction:
    return dataclasses.replace(read_function_entry(NAME, entry()), **changes)


def label(name: str, kind: str = "any") -> ProjectLabel:
    return ProjectLabel(id=1, name=name, color="", type=kind, attributes={}, text_attributes=frozenset(), defaults={})


class TestReading:
    def test_a_good_function(self) -> None:
        assert read_function_entry(NAME, entry()) == NuclioFunction(
            name=NAME,
            faults=(),
            labels=LABELS,
            version="3",
            state="ready",
            port=32001,
            fixed_port=32001,
            body_limit=2000,
            gpu=False,
        )

    def test_what_is_absent(self) -> None:
        data = entry(spec__triggers=None, status__httpPort=None, metadata__annotations__version=None)
        data["spec"]["resources"] = {"limits": {"nvidia.com/gpu": 1}}
        found = read_function_entry(NAME, data)
        assert (found.port, found.fixed_port, found.body_limit, found.version) == (None, None, 4 * 2**20, "1")
        assert found.gpu
        assert found.faults == ()

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"metadata__annotations__version": "1.2"}, "has the version '1.2', which is no integer"),
            ({"metadata__annotations__version": "v1"}, "has the version 'v1', which is no integer"),
            ({"metadata__annotations__min_pos_points": "one"}, "has the min_pos_points 'one', which is no integer"),
            ({"metadata__annotations__spec": "[{]"}, "has a spec that is no JSON list of labels (JSONDecodeError"),
            ({"metadata__annotations__spec": '["Земля"]'}, "has a spec that is no JSON list of labels (TypeError"),
            ({"metadata__annotations__spec": '[{"id": 1}]'}, "has a spec that is no JSON list of labels (KeyError"),
            ({"metadata__annotations__spec": '[{"name": "a"}, {"name": "a"}]'}, "names a label twice"),
            (
                {"metadata__annotations__spec": '[{"name": "a", "attributes": [{"name": "b"}, {"name": "b"}]}]'},
                "names an attribute of a label twice",
            ),
            ({"metadata__annotations": None}, "has no annotations"),
            ({"spec__description": None}, "has no description"),
            ({"spec__description": ""}, "has no description"),
            ({"status": None}, "has no state"),
        ],
    )
    def test_what_breaks_cvats_list(self, changes: dict[str, Any], fault: str) -> None:
        found = read_function_entry("somebodys", entry(**changes))
        assert len(found.faults) == 1
        assert found.faults[0].startswith(fault)
        (finding,) = check_metadata(found)
        assert finding.level == "problem"
        assert f"The function somebodys {found.faults[0]}" in finding.what
        assert "nuctl delete function somebodys" in finding.remedy

    @pytest.mark.parametrize("data", [None, [], "x", {}, {"metadata": 1, "spec": [], "status": None}])
    def test_rubbish(self, data: Any) -> None:
        assert "has no description" in read_function_entry("x", data).faults


def test_names_from_outside_do_nothing_to_the_terminal() -> None:
    finding = Finding(
        level="problem", check="labels", what="Улица\x1b[2J\x1b]0;x\x07 a\nok       b\u202e", remedy="c\r\x9bd"
    )
    assert finding.lines() == [
        "problem  labels: Улица\ufffd[2J\ufffd]0;x\ufffd a ok b\ufffd",
        "         → c \ufffdd",
    ]
    assert Finding(level="ok", check="disk", what="x").lines() == ["ok       disk: x"]


class TestChecks:
    @pytest.mark.parametrize(("gib", "level"), [(0.5, "problem"), (5, "warning"), (50, "ok")])
    def test_disk(self, gib: float, level: str) -> None:
        finding = check_disk(int(gib * 2**30), Path())
        assert finding.level == level
        assert bool(finding.remedy) == (level != "ok")

    def test_gpu(self) -> None:
        assert check_gpu(["NVIDIA H200"]).what == "PyTorch sees NVIDIA H200."
        assert check_gpu([]).level == "warning"

    @pytest.mark.parametrize(
        ("version", "level"),
        [("2.73.0", "ok"), ("2.80.9", "ok"), ("2.81.0", "warning"), ("2.9.0", "warning"), ("dev", "warning")],
    )
    def test_version(self, version: str, level: str) -> None:
        finding = check_version(version, "http://cvat")
        assert finding.level == level
        assert ("2.73 to 2.80" in finding.remedy) == (level == "warning")

    @pytest.mark.parametrize(("state", "level"), [("ready", "ok"), ("unhealthy", "problem"), ("error", "problem")])
    def test_state(self, state: str, level: str) -> None:
        assert check_state(function(state=state), namespace="nuclio").level == level

    def test_the_log_is_in_the_namespace(self) -> None:
        remedy = check_state(function(state="error"), namespace="cvat").remedy
        assert f"`docker logs nuclio-cvat-{NAME}`" in remedy
        assert f"on Kubernetes `kubectl logs -n cvat -l nuclio.io/function-name={NAME}`" in remedy
        assert f"`docker start nuclio-cvat-{NAME}`" in remedy

    @pytest.mark.parametrize(
        ("changes", "listens", "level", "what"),
        [
            ({}, True, "ok", "answers at its fixed port 32001"),
            ({}, False, "problem", "nobody answers there"),
            ({"fixed_port": None}, True, "warning", "is not fixed"),
            ({"port": 40000}, True, "problem", "should have port 32001, but Nuclio tells CVAT 40000"),
            ({"port": None}, False, "warning", "no port of its own"),
        ],
    )
    def test_port(self, changes: dict[str, Any], listens: bool, level: str, what: str) -> None:
        (finding,) = check_port(function(**changes), listens=listens)
        assert finding.level == level
        assert what in finding.what
        assert ("sscloud deploy" in finding.remedy) == (level != "ok")

    def test_bundle_version(self) -> None:
        assert check_bundle_version(function(), 3).level == "ok"
        assert "serves version 3; the bundle is version 4" in check_bundle_version(function(), 4).what

    def test_labels(self) -> None:
        labels = [label(name) for name in LABELS]
        assert check_labels(NAME, LABELS, labels, project=7).level == "ok"
        finding = check_labels(NAME, LABELS, [label("земля"), *labels[1:]], project=7)
        assert (finding.level, finding.remedy[:32]) == ("warning", "`sscloud labels push --project 7")
        assert "Project 7 has no Земля: CVAT drops" in finding.what
        finding = check_labels(NAME, LABELS, [label("Земля", "rectangle"), label("Здание", "polygon")], project=7)
        assert "has no Растительность, Конструкции, Обстановка and has Земля (rectangle) of a type" in finding.what
        assert finding.level == "warning"
        assert check_labels(NAME, LABELS, [label("car")], project=7).level == "problem"

    def test_body(self) -> None:
        frame = LargestFrame(1, 0, "a.jpg", (4096, 8192))
        assert check_body(function(), 2000, frame).level == "ok"
        finding = check_body(function(), 2001, frame)
        assert (finding.level, "a.jpg (8192x4096)" in finding.what) == ("problem", True)
        assert "maxRequestBodySize" in finding.remedy

    @pytest.mark.parametrize(("seconds", "level"), [(60, "ok"), (61, "warning"), (120, "warning"), (121, "problem")])
    def test_time(self, seconds: float, level: str) -> None:
        assert check_time(NAME, seconds, 5, timeout=120).level == level

    def test_listed(self) -> None:
        assert check_listed([NAME, "sam"], None, [NAME]).what == f"CVAT lists {NAME}."
        finding = check_listed(["sam"], None, [NAME])
        assert f"CVAT does not list {NAME}; it lists sam." in finding.what
        assert "CVAT does not list a function of SSCloud; it lists none." in check_listed([], None, []).what
        assert "CVAT does not list mine" in check_listed([NAME], "mine", []).what

    def test_broken_list(self) -> None:
        assert "without serverless" in broken_list(ServerError("x", status=404), explained=False).what
        assert "named above" in broken_list(ServerError("x", status=500), explained=True).remedy
        assert "docker logs cvat_server" in broken_list(ServerError("x", status=500), explained=False).remedy

    @pytest.mark.parametrize(
        ("status", "text", "where"),
        [
            (
                503,
                "HTTPConnectionPool(host='nuclio', port=8070): Max retries exceeded with url: /api/functions (Caused "
                "by NewConnectionError('<urllib3.connection.HTTPConnection object at 0x7f>: Failed to establish a …",
                " at nuclio:8070",
            ),
            (503, "('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))", ""),
            (
                504,
                "HTTPConnectionPool(host='10.0.0.7', port=80): Read timed out. (read timeout=120)",
                " at 10.0.0.7:80",
            ),
        ],
    )
    def test_cvat_without_nuclio_in_a_clause(self, status: int, text: str, where: str) -> None:
        error = ServerError(f"CVAT, the list of functions: the server failed (HTTP {status}: {text})", status=status)
        finding = broken_list(error, explained=False)
        assert finding.what == f"CVAT cannot list its models: it does not reach Nuclio{where}."
        assert "CVAT_NUCLIO_HOST" in finding.remedy

    def test_missing(self) -> None:
        assert "has no function of SSCloud" in missing_function(None, ["sam"]).what
        assert "has no function mine in its project cvat; there are: sam." in missing_function("mine", ["sam"]).what


@contextlib.contextmanager
def dashboard(body: bytes, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """Something that answers GET with `body`; yields its address and the headers of the requests."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


class TestDashboard:
    def test_asks_as_cvat_does(self) -> None:
        with dashboard(json.dumps({NAME: entry(), "a": entry()}).encode()) as (url, seen):
            assert [found.name for found in fetch_functions(f"{url}/", namespace="nuclio")] == ["a", NAME]
        ((path, headers),) = seen
        assert path == "/api/functions"
        assert headers["x-nuclio-project-name"] == "cvat"
        assert headers["x-nuclio-function-namespace"] == "nuclio"

    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            (b"{}", 502, "answers with status 502"),
            (b"<html>", 200, "is not Nuclio's dashboard"),
            (b"[]", 200, "is not Nuclio's dashboard"),
            (b"[" * 100_000, 200, "is not Nuclio's dashboard"),
        ],
    )
    def test_somebody_else(self, body: bytes, status: int, message: str) -> None:
        with dashboard(body, status) as (url, _), pytest.raises(DeployError, match=message):
            fetch_functions(url, namespace="nuclio")

    @pytest.mark.parametrize("url", ["localhost:8070", "ftp://x", "http://", "http://x:y"])
    def test_no_address(self, url: str) -> None:
        with pytest.raises(ConfigError, match="is no address"):
            fetch_functions(url, namespace="nuclio")

    def test_others_functions_are_looked_at_too(self) -> None:
        functions = {"somebodys": entry(metadata__annotations__version="1.0"), NAME: entry(status__httpPort=1)}
        with dashboard(json.dumps(functions).encode()) as (url, _):
            findings = list(examine(DoctorConfig(nuclio=url), server=None))
        problems = [finding.what for finding in findings if finding.level == "problem"]
        assert problems[0].startswith("The function somebodys has the version '1.0'")
        assert problems[1].startswith(f"CVAT calls {NAME} at port 1, but nobody answers there")
        assert len(problems) == 2

    def test_no_function_of_ours(self) -> None:
        with dashboard(json.dumps({"sam": entry()}).encode()) as (url, _):
            findings = list(examine(DoctorConfig(nuclio=url), server=None))
        assert findings[-1] == missing_function(None, ["sam"])

    def test_nobody(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
            findings = list(examine(DoctorConfig(nuclio=url), server=None))
        assert (findings[-1].level, findings[-1].check) == ("warning", "Nuclio")
        assert "--nuclio" in findings[-1].remedy


@pytest.fixture(scope="module")
def folder(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A function folder whose function answers at once, at a fixed port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path_factory.mktemp("functions") / "function"
    package(tiny_bundle.path, path, name=NAME)
    (path / "main.py").write_text(LIGHT, encoding="utf-8")
    data = yaml.safe_load((path / "function.yaml").read_text(encoding="utf-8"))
    data["spec"]["triggers"]["myHttpTrigger"]["attributes"].update(port=port, maxRequestBodySize=20_000)
    (path / "function.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def nuclio(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `sscloud serve` with that function."""
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}
    command = [sys.executable, "-m", "tools.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        address = next(line.split()[1] for line in lines if line.split()[:1] == ["dashboard"])
        yield "/".join(address.split("/")[:3])
        process.terminate()


@pytest.fixture
def cvat(cvat_server: "CvatStandin", nuclio: str) -> Iterator[tuple[Server, Callable[..., int]]]:
    """CVAT with that Nuclio, and a function that makes projects with given labels and frames."""
    from cvat_standin import make_task

    cvat_server.nuclio_url = nuclio
    site = cvat_server.site

    def make_project(labels: tuple[str, ...], *sizes_hw: tuple[int, int], noise: int = 1) -> int:
        rng = np.random.default_rng(0)
        with site.client() as client:
            project = site.make_project(client, "Улица", [{"name": name, "type": "any"} for name in labels])
            for number, (height, width) in enumerate(sizes_hw):
                stream = io.BytesIO()
                pixels = rng.integers(0, noise, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(stream, "PNG")
                make_task(client, project.id, {f"{number}.png": stream.getvalue()})
            return int(project.id)

    account = Account(url=site.url, username=site.username, password=site.password)
    with Server.connect(account) as server:
        yield server, make_project


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


class TestAllOfIt:
    def test_a_good_set_up(self, cvat: Any, nuclio: str, folder: Path) -> None:
        server, make_project = cvat
        project = make_project(LABELS, (32, 64), (64, 128), (16, 32))
        config = DoctorConfig(project=project, function=str(folder), nuclio=nuclio)
        findings = list(examine(config, server=server))
        assert [f for f in findings if f.level != "ok" and f.check not in ("disk", "GPU")] == []
        found = by_check(findings)
        assert set(found) == {
            *("disk", "GPU", "bundle", "Nuclio", "function", "port", "version", "CVAT", "models", "labels", "body"),
            "time",
        }
        assert "The request with 1.png (128x64)" in found["body"].what, "the largest one"
        assert f"{NAME} answered the largest frame in" in found["time"].what
        assert "with 1 regions" in found["time"].what

    def test_what_is_wrong_with_a_project(self, cvat: Any, nuclio: str) -> None:
        server, make_project = cvat
        project = make_project(("car",), (64, 128), noise=256)
        found = by_check(list(examine(DoctorConfig(project=project, nuclio=nuclio), server=server)))
        assert found["labels"].level == "problem"
        assert found["body"].level == "problem", "24 kB of noise in base64, and the function takes 20 kB"
        assert "time" not in found, "it is not sent"

    def test_an_empty_project(self, cvat: Any, nuclio: str) -> None:
        server, make_project = cvat
        project = make_project(LABELS)
        found = by_check(list(examine(DoctorConfig(project=project, nuclio=nuclio), server=server)))
        assert found["frame"].what == f"Project {project} has no frames to try."

    def test_no_such_project(self, cvat: Any, nuclio: str) -> None:
        server, _ = cvat
        found = by_check(list(examine(DoctorConfig(project=12345, nuclio=nuclio), server=server)))
        assert (found["project"].level, "none that this user can see" in found["project"].what) == ("problem", True)

    def test_cvats_list_is_broken(self, cvat: Any, cvat_server: "CvatStandin") -> None:
        server, _ = cvat
        functions = {"somebodys": entry(metadata__annotations__version="v1")}
        with dashboard(json.dumps(functions).encode()) as (url, _):
            cvat_server.nuclio_url = url
            found = by_check(list(examine(DoctorConfig(nuclio=url), server=server)))
        assert found["metadata"].what.startswith("The function somebodys has the version 'v1'")
        assert found["models"].level == "problem"
        assert "CVAT cannot list its models" in found["models"].what
        assert found["models"].remedy == "Correct the function named above."
        assert found["labels"].level == "warning", "no project was named"

    def test_cvat_does_not_reach_nuclio(self, cvat: Any, cvat_server: "CvatStandin", nuclio: str) -> None:
        server, _ = cvat
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            cvat_server.nuclio_url = f"http://127.0.0.1:{closed.getsockname()[1]}"
            found = by_check(list(examine(DoctorConfig(nuclio=nuclio), server=server)))
        assert found["models"].what == "CVAT cannot list its models: it does not reach Nuclio."

    def test_without_a_function_and_a_bundle_no_labels_are_compared(
        self, cvat: Any, cvat_server: "CvatStandin"
    ) -> None:
        server, make_project = cvat
        project = make_project(LABELS[:2], (32, 64))
        with dashboard(b"{}") as (url, _):
            cvat_server.nuclio_url = url
            found = by_check(list(examine(DoctorConfig(project=project, nuclio=url), server=server)))
        assert found["labels"].level == "warning"
        assert "were not compared" in found["labels"].what

    def test_without_nuclio_labels_are_still_looked_at(self, cvat: Any, tiny_bundle: ModelBundle) -> None:
        server, make_project = cvat
        project = make_project(LABELS[:2], (32, 64))
        with dashboard(b"{}", 503) as (url, _):
            config = DoctorConfig(project=project, bundle=tiny_bundle.path, nuclio=url)
            found = by_check(list(examine(config, server=server)))
        assert found["Nuclio"].level == "warning"
        assert f"CVAT drops what {NAME} finds of these" in found["labels"].what, "as CVAT lists it"

    def test_a_damaged_bundle(self, tiny_bundle: ModelBundle, tmp_path: Path) -> None:
        shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
        with (tmp_path / "bundle" / WEIGHTS).open("ab") as stream:
            stream.write(b"x")
        with dashboard(b"{}") as (url, _):
            found = by_check(list(examine(DoctorConfig(bundle=tmp_path / "bundle", nuclio=url), server=None)))
        assert found["bundle"].level == "problem"
        assert "Nuclio" in found


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CVAT_")}
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**clean, "PYTHONUTF8": "1", **environment},
        timeout=100,
        check=False,
    )


class TestCommand:
    def test_without_credentials(self, nuclio: str, tmp_path: Path) -> None:
        done = run_doctor("--nuclio", nuclio, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning  CVAT: CVAT was not looked at." in done.stdout
        assert f"ok       port: {NAME} answers at its fixed port" in done.stdout
        assert "0 problems." in done.stderr

    @pytest.mark.slow
    def test_a_hostile_name_stays_text(self, tmp_path: Path) -> None:
        functions = {"evil\x1b[2J\nok       all is well": entry(spec__description=None)}
        with dashboard(json.dumps(functions).encode()) as (url, _):
            done = run_doctor("--nuclio", url, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path))
        assert done.returncode == 1, done.stderr
        assert "The function evil\ufffd[2J ok all is well has no description" in done.stdout
        assert "\x1b" not in done.stdout

    @pytest.mark.slow
    def test_problems_make_it_fail(self, cvat_server: "CvatStandin", nuclio: str) -> None:
        environment = {**cvat_server.site.environment(), "CVAT_PASSWORD": "wrong-and-secret"}
        done = run_doctor("--nuclio", nuclio, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "problem  CVAT:" in done.stdout
        assert "wrong-and-secret" not in done.stdout + done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("arguments", [("--nuclio", "x"), ("--timeout", "0"), ("--timeout", "nan")])
    def test_wrong_arguments(self, arguments: tuple[str, str]) -> None:
        done = run_doctor(*arguments)
        assert done.returncode == 2
        assert "is no" in done.stderr
