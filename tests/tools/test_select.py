"""`sscloud select` as people run it."""

import io
import json
import os
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
from PIL import Image

from cvat_standin import CvatStandin, Slow, Status, job_shapes, jobs_of, make_task, set_state
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.frame import Azimuth
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from tools.cli import main
from training.handout import hand_out
from training.prelabel import Report
from training.selection import begin_folder

ROOT = Path(__file__).resolve().parents[2]
LABELS = [{"name": label.name, "type": "any"} for label in LabelSchema.default().labels]


def picture(image: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


class Street:
    """A project with frames that are alone in their jobs, and the workspace."""

    def __init__(
        self, cvat: CvatStandin, client: Client, workspace: Path, bundle: ModelBundle, images: dict[str, bytes]
    ) -> None:
        self.cvat, self.client, self.workspace, self.bundle = cvat, client, workspace, bundle
        self.project = cvat.site.make_project(client, "Улица", LABELS).id
        self.images = images
        self.task = make_task(client, self.project, images, segment_size=1).id
        self.jobs = jobs_of(client, self.task)

    def arguments(self, *more: str) -> list[str]:
        place = ["--workspace", str(self.workspace), "--project", str(self.project), "--device", "cpu", "--turns", "2"]
        return ["select", *place, "--bundle", str(self.bundle.path), "--count", "2", *more]

    def drawn(self) -> list[int]:
        """Jobs with shapes."""
        return [job for job in self.jobs if job_shapes(self.client, job)]

    def record(self, number: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder(number) / "selection.json").read_text())
        return found

    def folder(self, number: int = 1) -> Path:
        return self.workspace / "selections" / f"{number:04d}"


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> ModelBundle:
    model = make_unet(contrast=2)
    manifest = make_manifest(model.architecture, azimuth=Azimuth(direction=1, column_0=0.0), frame="view")
    return save_bundle(tmp_path_factory.mktemp("bundles") / "street", model, manifest)


@pytest.fixture
def street(
    cvat_server: CvatStandin,
    tmp_path: Path,
    bundle: ModelBundle,
    make_panorama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Street]:
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    images = {f"{n}.png": picture(make_panorama((64, 128), seed=n, black=0.15 * n)) for n in range(4)}
    with cvat_server.site.client() as client:
        yield Street(cvat_server, client, tmp_path, bundle, images)


def test_chooses_explains_hands_out_and_pre_labels(street: Street, capsys: pytest.CaptureFixture[str]) -> None:
    street.cvat.store.users[2] = "anna"

    assert main(street.arguments("--assignee", "anna", "--json")) == 0

    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    jobs = result["handout"]["jobs"]
    assert (result["handout"]["way"], len(jobs), result["prelabelled"]) == ("jobs", 2, True)
    assert street.drawn() == jobs
    assert {street.cvat.store.jobs[job].assignee for job in jobs} == {2}
    assert len(street.cvat.store.issues) == 2
    assert "Pre-labelled by Улица v3: 2 panoramas" in printed
    page = (street.folder() / "select.html").read_text(encoding="utf-8")
    assert "What to label next" in page
    assert page.count("data:image/jpeg") == 2
    assert ("<td>100%</td>" in page, "nats" in page, "max-width: 100%" in page) == (True, False, True)
    assert all(choice["reason"] in page.replace("&#39;", "'") for choice in result["choices"])
    assert {path.name for path in street.folder().iterdir()} == {"01.jpg", "02.jpg", "select.html", "selection.json"}
    # The next ones are others.
    assert main(street.arguments("--json")) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(again["handout"]["jobs"]).isdisjoint(jobs)
    assert "2 frames handed out before" in again["left_out"]
    # And then there are none.
    assert main(street.arguments()) == 2
    assert "can be chosen: 4 frames handed out before." in capsys.readouterr().err
    assert not street.folder(3).exists()


def test_a_dry_run_changes_nothing_on_the_server(street: Street, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(street.arguments("--dry-run", "--way", "task")) == 0

    assert street.drawn() == []
    assert street.cvat.store.issues == {}
    assert len(street.cvat.store.tasks) == 1
    assert all(entry.method in ("GET", "POST") for entry in street.cvat.log)
    assert {entry.path for entry in street.cvat.log if entry.method == "POST"} <= {
        "/api/auth/login",
        "/api/auth/logout",
        "/api/projects",
        "/api/tasks",
        f"/api/tasks/{street.task}/data",
        f"/api/tasks/{street.task}/data/",
    }
    assert "1. " in capsys.readouterr().out
    assert begin_folder(street.workspace) == street.folder(2)


def test_a_killed_selection_goes_on_with_its_choices(
    street: Street, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*arguments: Any, **options: Any) -> Any:
        hand_out(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.handout.hand_out", killed)
    assert main(street.arguments("--way", "task")) == 130
    chosen = street.record()
    assert chosen["handout"] is None
    monkeypatch.undo()
    for name, value in street.cvat.site.environment().items():
        monkeypatch.setenv(name, value)

    for more, message in (
        (["--project", "77"], f"--project was {street.project}, not 77"),
        (["--count", "3"], "--count was 2, not 3"),
        (["--assignee", "anna"], "--assignee was None, not 'anna'"),
        (["--way", "jobs"], "--way was 'task', not 'jobs'"),
        (["--no-prelabel"], "--no-prelabel was False, not True"),
        (["--threshold", "0.5"], "--threshold was 0.0, not 0.5"),
        (["--dry-run", "-o", str(street.folder())], "--dry-run goes on with nothing"),
    ):
        assert main(street.arguments("--way", "task", *more)) == 2
        assert message in capsys.readouterr().err
    before = len(street.cvat.store.issues), street.drawn()
    assert main(street.arguments("--way", "task", "--dry-run", "--count", "1")) == 0
    assert (len(street.cvat.store.issues), street.drawn()) == before
    assert street.record() == chosen
    assert street.record(2)["dry_run"]
    assert main(street.arguments("--way", "task")) == 0

    assert "Going on with To label " in capsys.readouterr().err
    done = street.record()
    assert done["choices"] == chosen["choices"]
    assert [task.name for task in street.cvat.store.tasks.values()].count(chosen["name"]) == 1
    new = next(task for task in street.cvat.store.tasks.values() if task.name == chosen["name"])
    assert done["handout"]["task"] == new.id
    assert [frame.name for frame in new.frames] == sorted(choice["name"] for choice in done["choices"])
    assert all(job_shapes(street.client, job) for job in done["handout"]["jobs"])
    assert not (street.folder(3)).exists()


def test_a_stopped_selection_is_drawn_by_the_model_that_chose(
    street: Street,
    tmp_path: Path,
    make_unet: Callable[..., UNet],
    make_manifest: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = save_bundle(tmp_path / "other", make_unet(), make_manifest(make_unet().architecture, version=9))
    with monkeypatch.context() as patch:
        patch.setattr("training.prelabel.prelabel", stop)
        assert main(street.arguments()) == 130

    assert main([str(other.path) if each == str(street.bundle.path) else each for each in street.arguments()]) == 2

    assert "is to be pre-labelled by Улица v3" in capsys.readouterr().err
    assert street.drawn() == []


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_failed_pre_labels_are_tried_again(
    street: Street, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, report: Report, **__: Any) -> None:
        report.failed.append("task 1, frame 2: too large")

    with monkeypatch.context() as patch:
        patch.setattr("training.prelabel.prelabel", failing)
        assert main(street.arguments()) == 1

    assert "The same command tries to pre-label these once more." in capsys.readouterr().err
    assert not street.record()["prelabelled"]
    assert main(street.arguments()) == 0
    assert street.drawn() == street.record()["handout"]["jobs"]


def test_an_unreadable_frame_is_left_out_and_said(street: Street, capsys: pytest.CaptureFixture[str]) -> None:
    street.cvat.store.tasks[street.task].frames[1].data = b"no picture"
    street.cvat.fail("GET", r"/data/$", Status(404), times=None, before=True, query={"number": "2"})

    assert main(street.arguments("--count", "4", "--dry-run")) == 1

    assert [choice["number"] for choice in street.record()["choices"]] in ([0, 3], [3, 0])
    said = capsys.readouterr().err
    assert f"not looked at: 1.png (task {street.task}, frame 1): " in said
    assert f"not looked at: 2.png (task {street.task}, frame 2): " in said


def test_ctrl_c_does_not_wait_for_downloads(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    street.cvat.fail("GET", r"/data/$", Slow(seconds=0.5, bytes=10), times=None, query={"number": "1"})
    monkeypatch.setattr("training.acquisition.Jury.look", stop)
    began = time.monotonic()

    assert main(street.arguments()) == 130

    assert time.monotonic() - began < 15  # the second image would take minutes
    assert not street.folder().exists()


def test_jobs_at_which_somebody_works_are_handed_out_but_not_drawn_in(
    street: Street, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in street.jobs[1:]:
        set_state(street.client, job, state="in progress")
    (street.workspace / "cycle.yaml").write_text(f"project: {street.project}\nprelabel: {{threshold: 0.25}}\n")
    arguments = street.arguments("--count", "4")
    at = arguments.index("--project")

    assert main(arguments[:at] + arguments[at + 2 :]) == 0

    record = street.record()
    assert len(record["handout"]["jobs"]) == 4
    assert street.drawn() == street.jobs[:1]
    assert record["settings"]["threshold"] == 0.25
    assert "left as they are: 3 jobs (state in progress)" in capsys.readouterr().out


def test_panoramas_of_a_folder_become_a_task(street: Street, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.integers(30, 256, (8, 16, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        image[: 12 * number] = 0
        (scans / f"new-{number}.png").write_bytes(picture(image))
    folder = tmp_path / "out"

    assert main(street.arguments("--images", str(scans), "--no-prelabel", "-o", str(folder))) == 0

    record = json.loads((folder / "selection.json").read_text())
    task = street.cvat.store.tasks[record["handout"]["task"]]
    assert {frame.name: frame.data for frame in task.frames} == {
        choice["name"]: (scans / choice["name"]).read_bytes() for choice in record["choices"]
    }
    assert not any(job_shapes(street.client, job) for job in record["handout"]["jobs"])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_mlflow_stores")
def test_the_champion_of_the_registry_and_its_predecessors_are_asked(
    street: Street,
    make_unet: Callable[..., UNet],
    make_manifest: Callable[..., Manifest],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from training.registry import Registry, default_uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(default_uri(street.workspace), name="street", cache=street.workspace / "cache")
    model = make_unet(seed=9, contrast=2)
    manifest = make_manifest(model.architecture, azimuth=Azimuth(direction=1, column_0=0.0), frame="view")
    for bundle in (street.bundle, save_bundle(street.workspace / "second", model, manifest)):
        registry.set_champion(registry.import_bundle(bundle).version)
    arguments = [a for a in street.arguments("--dry-run") if a not in ("--bundle", str(street.bundle.path))]

    assert main(arguments) == 0

    assert street.record()["models"] == ["street v2", "street v1"]
    assert "The models are unsure about" in capsys.readouterr().out


def test_wrong_arguments(street: Street, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--images", str(tmp_path), "--way", "jobs"], "Panoramas of a folder are in no job yet"),
        (["--bundle", str(tmp_path / "none")], "is no bundle"),
    ):
        assert main(street.arguments(*arguments)) == 2
        assert message in capsys.readouterr().err
    damaged = street.folder(7)
    damaged.mkdir(parents=True)
    (damaged / "selection.json").write_text("{")
    assert begin_folder(street.workspace) == street.folder(8)
    assert main(street.arguments("-o", str(damaged))) == 2
    assert "cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(street.arguments("--count", "0"))
    assert main(["select", "--workspace", str(tmp_path / "none")]) == 2
    assert "No project is named. Give --project N" in capsys.readouterr().err


@pytest.mark.slow
def test_sigkill_at_moments_of_a_selection(street: Street) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    street.cvat.fail("*", r"/api/(tasks|issues|jobs)", Slow(0.05), times=None)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tools.cli", *street.arguments("--way", "task")]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    rng = np.random.default_rng(0)
    for _ in range(6):
        process = start()
        time.sleep(float(rng.uniform(3, 8)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start().wait(timeout=120) == 0
    names = [task.name for task in street.cvat.store.tasks.values()]
    assert len(names) == len(set(names))
    assert all(task.frames for task in street.cvat.store.tasks.values())
    images = [entry for issue in street.cvat.store.issues.values() for _, entry, _ in issue.comments]
    assert len(images) == len(set(images))
