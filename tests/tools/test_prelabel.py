"""`sscloud prelabel` as people run it: processes that are killed, cvat-cli, and a function that is really served."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import CvatStandin, Site, Slow, add_shapes, job_shapes, jobs_of, label_ids, make_task, polygon
from sscloud.bundle import ModelBundle
from sscloud.errors import ServerError
from sscloud.labels import LabelSchema
from tools.cli import main
from tools.function_folder import package
from training.cvat import Server, find_account
from training.prelabel_store import identity

ROOT = Path(__file__).resolve().parents[2]
SIZE_HW = (64, 128)
TEXT = {"mutable": False, "input_type": "text", "values": [""], "default_value": ""}
LABELS = [
    {"name": label.name, "attributes": [{"name": name, **TEXT} for name in ("model", "confidence")]}
    for label in LabelSchema.default().labels
]
ANNOTATIONS = r"/api/jobs/\d+/annotations"


class Street:
    """A project with a task of two jobs, in the folder where commands are run."""

    def __init__(
        self, cvat: CvatStandin, client: Client, folder: Path, bundle: Path, pictures: dict[str, bytes]
    ) -> None:
        self.cvat, self.client, self.folder, self.bundle = cvat, client, folder, bundle
        self.project = cvat.site.make_project(client, "Улица", LABELS).id
        self.labels = label_ids(client, self.project)
        self.task = make_task(client, self.project, pictures, segment_size=2).id
        self.jobs = jobs_of(client, self.task)

    @property
    def local(self) -> list[str]:
        """Arguments of a run here."""
        bundle = str(self.bundle)
        return ["prelabel", "--via", "local", "--bundle", bundle, "--device", "cpu", "--project", str(self.project)]

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.cvat.site.environment(), "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "tools.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self.folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )

    def looks(self) -> dict[int, list[tuple[int, str]]]:
        """What is drawn, without the numbers."""
        return {
            job: sorted((shape["frame"], identity(shape)) for shape in job_shapes(self.client, job))
            for job in self.jobs
        }


@pytest.fixture(scope="module")
def pictures(make_panorama: Callable[..., NDArray[np.uint8]]) -> dict[str, bytes]:
    found = {}
    for seed in range(3):
        stream = io.BytesIO()
        Image.fromarray(make_panorama(SIZE_HW, seed=seed)).save(stream, "PNG")
        found[f"{seed}.png"] = stream.getvalue()
    return found


@pytest.fixture
def street(
    cvat_server: CvatStandin,
    tmp_path: Path,
    tiny_bundle: ModelBundle,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Street]:
    """The login is in the environment, too."""
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with cvat_server.site.client() as client:
        yield Street(cvat_server, client, tmp_path, tiny_bundle.path, pictures)


def test_the_report(street: Street, capsys: pytest.CaptureFixture[str]) -> None:
    add_shapes(street.client, street.jobs[0], [polygon(street.labels["Земля"], 0, [1.0, 1.0, 9.0, 1.0, 9.0, 7.0])])
    assert main(street.local) == 0
    shapes = sum(len(job_shapes(street.client, job)) for job in street.jobs) - 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Улица v3:",
        f"  2 frames pre-labelled, {shapes} shapes",
        "  1 frame with people's work, left as they are",
    ]
    assert sorted(path.name for path in (street.folder / "prelabels").rglob("*.json")) == [
        f"job-{job}.json" for job in sorted(street.jobs)
    ]
    assert main(street.local) == 0
    assert "  2 frames pre-labelled by this model before" in capsys.readouterr().out.splitlines()


def test_what_could_not_be_done_is_an_exit_status(
    street: Street, pictures: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    street.cvat.replace_frame(street.task, 1, pictures["1.png"][:200])
    assert main(street.local) == 1
    captured = capsys.readouterr()
    assert re.search(r"not pre-labelled: task \d+, frame 1 \(1\.png\)", captured.err)
    assert "2 frames pre-labelled" in captured.out


@pytest.mark.slow
def test_killed_and_run_again(street: Street) -> None:
    """SIGKILL while the server answers: it has written, and the answer is never read."""
    street.cvat.fail("PATCH", ANNOTATIONS, Slow(seconds=0.5, bytes=10), skip=1)
    with street.start(street.local) as process:
        while len({shape["frame"] for job in street.jobs for shape in street.cvat.shapes(job)}) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    street.cvat.heal()
    assert main(street.local) == 0
    killed = street.looks()
    with street.cvat.store.lock:
        street.cvat.store.clear([street.cvat.store.job(job) for job in street.jobs])
    assert main([*street.local, "--store", "other"]) == 0
    assert killed == street.looks()


def test_ctrl_c(street: Street, capsys: pytest.CaptureFixture[str]) -> None:
    street.cvat.fail("GET", r"/data/$", Slow(seconds=0.5, bytes=10), times=None)
    with street.start(street.local) as process:
        while street.cvat.count("GET", r"/data/$") == 0:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        # The images would take a minute: it does not wait for them.
        output, error = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "sscloud prelabel: stopped." in error
    assert "Traceback" not in error
    assert "0 frames pre-labelled" in output
    street.cvat.heal()
    assert main(street.local) == 0
    assert "3 frames pre-labelled" in capsys.readouterr().out


def test_cvat_cli_takes_the_detector_as_a_file(street: Street) -> None:
    function = ["--function-file", str(ROOT / "training" / "detector.py"), "-p", f"bundle=str:{street.bundle}"]
    done = subprocess.run(
        [sys.executable, "-m", "cvat_cli", "--insecure", "--server-host", street.cvat.url, "task", "auto-annotate",
         str(street.task), *function, "-p", "device=str:cpu", "-p", "min_area=int:60"],
        env={**os.environ, "CVAT_ACCESS_TOKEN": street.cvat.access_token},
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=street.folder,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_cvat_cli = street.looks()
    with street.cvat.store.lock:
        street.cvat.store.clear([street.cvat.store.job(job) for job in street.jobs])
    assert main([*street.local, "--min-area", "60"]) == 0
    assert by_cvat_cli == street.looks()


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    """`sscloud serve`: address of the dashboard."""
    command = [sys.executable, "-m", "tools.cli", "serve", str(folder), "--port", "0", "--function-port", "0"]
    environment = {**os.environ, "PYTHONUTF8": "1", "SSCLOUD_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            text = ""
            while "Ctrl-C" not in text:
                line = process.stdout.readline()
                assert line, "sscloud serve ended"
                text += line
            (address,) = re.findall(r"dashboard\s+(http://[\d.]+:\d+)", text)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def test_a_served_function_on_any_server(
    cvat_site: Site,
    tmp_path: Path,
    tiny_bundle: ModelBundle,
    pictures: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """A live server has to find `sscloud serve` where it looks for Nuclio; here it draws what the bundle draws."""
    monkeypatch.setattr("training.prelabel_witness.SOON", 600.0)  # however long the test takes
    for name, value in cvat_site.environment().items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(cvat_site.client())
        if cvat_site.live:
            _skip_without_function("sscloud-street")
        else:
            package(tiny_bundle.path, tmp_path / "function", name="sscloud-street")
            cvat: CvatStandin = request.getfixturevalue("cvat_server")
            cvat.nuclio_url = stack.enter_context(_served(tmp_path / "function"))
        project = cvat_site.make_project(client, "Улица", LABELS).id
        task = make_task(client, project, pictures, segment_size=2).id
        store = ["--task", str(task), "--store", str(tmp_path / "store")]
        command = ["prelabel", "--via", "server", "--function", "sscloud-street", *store]
        assert main(command) == 0
        shapes = _shapes(client, task)
        output = capsys.readouterr().out
        assert f"  3 frames pre-labelled, {len(shapes)} shapes\n" in output
        assert all(shape["source"] == "auto" and len(shape["attributes"]) == 2 for shape in shapes)
        assert main(command) == 0
        assert "3 frames pre-labelled by this model before" in capsys.readouterr().out
        assert _shapes(client, task) == shapes
        if not cvat_site.live:
            twin = make_task(client, project, pictures, segment_size=2).id
            local = ["prelabel", "--via", "local", "--bundle", str(tiny_bundle.path), "--device", "cpu"]
            assert main([*local, "--task", str(twin), "--store", str(tmp_path / "store")]) == 0
            looks = sorted((shape["frame"], identity(shape)) for shape in _shapes(client, twin))
            assert looks == sorted((shape["frame"], identity(shape)) for shape in shapes)


def _shapes(client: Client, task: int) -> list[dict[str, Any]]:
    return [shape for job in jobs_of(client, task) for shape in job_shapes(client, job)]


def _skip_without_function(name: str) -> None:
    with Server.connect(find_account(os.environ)) as server:
        try:
            found = [function.id for function in server.functions()]
        except ServerError as error:
            pytest.skip(f"the server lists no functions: {error}")
    if name not in found:
        pytest.skip(
            f"needs the function {name}: point CVAT_NUCLIO_HOST and CVAT_NUCLIO_PORT of the server at `sscloud serve` "
            f"of a bundle with the shipped labels, packaged with --name {name}"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--via", "local", "--bundle", "b"], "Nothing is named to be pre-labelled. Give --project N"),
        (["--via", "local", "--task", "1"], "Name it with --bundle"),
        (["--via", "local", "--bundle", "b", "--task", "1", "--function", "f"], "--function cannot be used with --via"),
        (["--via", "server", "--task", "1", "--min-area", "3"], "--min-area cannot be used with --via server"),
        (["--via", "local", "--bundle", "nowhere", "--task", "1"], "nowhere is no bundle"),
    ],
)
def test_wrong_combinations(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prelabel", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--threshold", "1.5"], ["--threshold", "nan"], ["--min-area", "0"], ["--retries", "-1"]]
)
def test_wrong_values(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prelabel", "--via", "local", "--task", "1", *arguments])
    assert f"argument {arguments[0]}: '{arguments[1]}' is not a" in capsys.readouterr().err


def test_no_secret_is_said(street: Street, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CVAT_PASSWORD", "wrong-and-secret")
    assert main(street.local) == 2
    captured: Any = capsys.readouterr()
    assert "password of 'annotator' is not accepted" in captured.err
    assert "wrong-and-secret" not in captured.err + captured.out
