"""`sscloud fetch` as a process of its own, against a server on a real socket."""

import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
from cvat_sdk import Client
from PIL import Image

from cvat_standin import CvatStandin, Site, Slow, add_shapes, jobs_of, label_ids, make_task, mask, polygon, set_state
from sscloud.labels import LabelSchema
from tools.cli import main
from training.manifest import read_manifest

SIZE_HW = (64, 128)
LABELS = [{"name": name, "color": "#b5793c", "type": "any"} for name in ("Земля", "Здание")]


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What killed commands leave behind goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def make_project(site: Site, *, tasks: int = 2, frames: int = 3) -> int:
    """A project whose frames are all annotated, in completed jobs of one frame each."""
    with site.client() as client:
        project = int(site.make_project(client, "Улица", LABELS).id)
        for number in range(tasks):
            draw_task(client, project, number, frames=frames)
    return project


def draw_task(client: Client, project: int, number: int, *, frames: int, completed: bool = True) -> list[int]:
    """A task whose frames are all annotated, in jobs of one frame each → the jobs."""
    labels = label_ids(client, project)
    images = {}
    for frame in range(frames):
        pixels = np.random.default_rng((number, frame)).integers(0, 255, (*SIZE_HW, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        images[f"{frame}_normals.jpg"] = buffer.getvalue()
    jobs = jobs_of(client, make_task(client, project, images, segment_size=1).id)
    for frame, job in enumerate(jobs):
        bitmap = np.zeros(SIZE_HW, np.bool_)
        bitmap[32 + frame :] = True
        house = polygon(labels["Здание"], frame, [4, 4, 40, 4, 40, 20 + number, 4, 20])
        add_shapes(client, job, [mask(labels["Земля"], frame, bitmap), house])
        if completed:
            set_state(client, job, state="completed")
    return jobs


def command(*arguments: str | Path | int) -> list[str]:
    return [sys.executable, "-m", "tools.cli", "fetch", *map(str, arguments)]


def sscloud_fetch(
    site: Site, *arguments: str | Path | int, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    variables = {key: value for key, value in os.environ.items() if not key.startswith("CVAT_")}
    variables |= site.environment() if environment is None else environment
    return subprocess.run(
        command(*arguments), env=variables, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )


def tree(folder: Path) -> dict[str, str]:
    """Every file that counts, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_it_says_what_it_did_and_no_secret(cvat_site: Site, tmp_path: Path) -> None:
    project = make_project(cvat_site)
    done = sscloud_fetch(cvat_site, "--project", project, "-o", tmp_path / "data", "--group-by", "image")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    assert f"snapshot {manifest.snapshot}" in done.stdout
    assert "new or changed       6" in done.stdout
    assert {item.split for item in manifest.items} == {"train", "validation", "test"}
    assert all(f"\n  {name}" in done.stdout for name in ("train", "validation", "test"))
    assert "nobody can draw it there" in done.stderr  # Растительность, Конструкции, Обстановка
    written = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    secret = cvat_site.password
    if len(secret) >= 8:  # a shorter one may be a word of any text
        assert secret not in done.stdout + done.stderr
        assert secret.encode() not in written


def test_without_a_project_it_lists_them(cvat_server: CvatStandin, tmp_path: Path) -> None:
    project = make_project(cvat_server.site, tasks=1, frames=1)
    done = sscloud_fetch(cvat_server.site, "-o", tmp_path / "data")
    assert done.returncode == 2
    assert f"--project {project}   Улица" in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "Set CVAT_URL"),
        ({"CVAT_URL": "http://127.0.0.1:9"}, "Set CVAT_ACCESS_TOKEN, or CVAT_USERNAME and CVAT_PASSWORD"),
        ({"CVAT_URL": "http://127.0.0.1:9", "CVAT_ACCESS_TOKEN": "secret-token"}, "no answer"),
    ],
)
def test_missing_credentials_say_what_to_set(
    cvat_server: CvatStandin, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "HOME": str(tmp_path)}
    done = sscloud_fetch(cvat_server.site, "--project", "1", "-o", tmp_path / "data", environment=environment | config)
    assert done.returncode == 2
    assert message in done.stderr
    assert "secret-token" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_labels_come_from_the_project(cvat_server: CvatStandin, tmp_path: Path) -> None:
    project = make_project(cvat_server.site, tasks=1)
    done = sscloud_fetch(
        cvat_server.site, "--project", project, "-o", tmp_path / "data", "--labels-from-project", "--group-by", "image"
    )
    assert done.returncode == 0, done.stderr
    schema = LabelSchema.from_yaml(tmp_path / "data/labels.yaml")
    assert [(label.name, label.id) for label in schema.labels] == [("Фон", 0), ("Земля", 2), ("Здание", 6)]
    again = sscloud_fetch(cvat_server.site, "--project", project, "-o", tmp_path / "data", "--labels-from-project")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_one_task_is_one_group_and_says_how_to_split_it(cvat_server: CvatStandin, tmp_path: Path) -> None:
    project = make_project(cvat_server.site, tasks=1)
    done = sscloud_fetch(cvat_server.site, "--project", project, "-o", tmp_path / "data")
    assert done.returncode == 0
    assert "--group-by image" in done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    assert {item.split for item in manifest.items} == {None}


def test_an_export_of_the_server_is_read_as_an_archive(cvat_server: CvatStandin, tmp_path: Path) -> None:
    project = make_project(cvat_server.site, tasks=1, frames=1)
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 8)).save(jpeg, "JPEG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("default/1_normals.jpg", jpeg.getvalue())
        opened.writestr(
            "default/1_normals.xml",
            "<annotation><filename>1_normals.jpg</filename><folder></folder><imagesize><nrows>8</nrows>"
            "<ncols>16</ncols></imagesize><object><name>Земля</name><deleted>0</deleted><id>0</id><polygon>"
            "<pt><x>0</x><y>4</y></pt><pt><x>16</x><y>4</y></pt><pt><x>16</x><y>8</y></pt><pt><x>0</x><y>8</y></pt>"
            "</polygon></object></annotation>",
        )
    cvat_server.add_export("project", project, "LabelMe 3.0", archive.getvalue())
    done = sscloud_fetch(
        cvat_server.site,
        "--project",
        project,
        "-o",
        tmp_path / "data",
        "--export",
        "LabelMe 3.0",
        "--group-by",
        "image",
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    (item,) = manifest.items
    assert item.pixels == {0: 64, 2: 64}
    assert item.source["kind"] == "archive"
    wrong = sscloud_fetch(cvat_server.site, "--project", project, "-o", tmp_path / "x", "--export", "LabelMe 9")
    assert wrong.returncode == 2
    assert "LabelMe 9" in wrong.stderr


def test_ctrl_c_stops_quietly(cvat_server: CvatStandin, tmp_path: Path) -> None:
    project = make_project(cvat_server.site)
    cvat_server.fail("GET", r"/tasks/\d+/data/?$", Slow(seconds=1, bytes=500), times=None)  # minutes, if it waits
    cvat_server.forget()
    running = subprocess.Popen(
        command("--project", project, "-o", tmp_path / "data"),
        env={**os.environ, **cvat_server.site.environment()},
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: cvat_server.count("GET", r"/data/?$") > 0)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=15)
    assert running.returncode == 130
    assert "stopped" in errors
    assert "Traceback" not in errors


class Moment(NamedTuple):
    """When a fetch is killed: something it waits for never comes, so it is alive then, however slow this machine is."""

    what: Literal["request", "frame"]
    """`request`: it has sent one request more than `number`, and gets no reply to that; other threads work on.
    `frame`: `number` of its frames are in the manifest; it works on the next one, and gets no more images."""
    number: int


class Bench:
    """A project that was worked on after it had been fetched once, and a fetch to be killed."""

    new_images = 8

    def __init__(self, server: CvatStandin, folder: Path, *, incremental: bool) -> None:
        self.server, self.folder = server, folder
        self.start = folder / "start"
        with server.site.client() as client:
            self.project = server.site.make_project(client, "Улица", LABELS).id
            waiting = draw_task(client, self.project, 0, frames=self.new_images, completed=False)
            edited, also_edited, deleted, reopened, _ = draw_task(client, self.project, 1, frames=5)
            if incremental:
                self.fetch(self.start)
            for job in waiting:
                set_state(client, job, state="completed")
            server.edit_shape(server.shapes(edited)[1]["id"], points=[4.0, 4.0, 90.0, 4.0, 90.0, 20.0, 4.0, 20.0])
            server.edit_shape(server.shapes(also_edited)[0]["id"], z_order=1)
            job = client.jobs.retrieve(deleted)
            client.tasks.retrieve(job.task_id).remove_frames_by_ids([job.start_frame])
            set_state(client, reopened, state="in progress")
        server.forget()
        self.calm = self.copy("calm")
        self.fetch(self.calm)
        self.requests = len(server.log)
        self.images = server.count("GET", r"/tasks/\d+/data/?$")
        self.before, self.after = paintings(self.start), paintings(self.calm)

    def arguments(self, folder: Path) -> list[str]:
        return ["fetch", "--project", str(self.project), "--group-by", "image", "-o", str(folder)]

    def fetch(self, folder: Path) -> None:
        assert main(self.arguments(folder)) == 0

    def copy(self, name: str) -> Path:
        """The data set as it was before the work; none when it had not been fetched then."""
        if self.start.exists():
            shutil.copytree(self.start, self.folder / name)
        return self.folder / name

    def progress(self, folder: Path) -> int:
        """Frames that are new or changed, and in the data set."""
        return len((paintings(folder) & self.after) - self.before)

    def kill(self, folder: Path, moment: Moment) -> None:
        """Fetch in a process of its own, and kill that."""
        self.server.forget()
        what, number = moment
        never = Slow(seconds=1000)
        if what == "request":
            self.server.fail("*", "", never, skip=number, times=None)
        else:
            self.server.fail("GET", r"/tasks/\d+/data/?$", never, skip=number + 1, times=None)
        with (self.folder / "errors.txt").open("w+b") as errors:
            running = subprocess.Popen(
                [sys.executable, "-m", "tools.cli", *self.arguments(folder)], stdout=errors, stderr=errors
            )

            def reached() -> bool:
                assert running.poll() is None, (self.folder / "errors.txt").read_text(encoding="utf-8")
                return len(self.server.log) > number if what == "request" else self.progress(folder) >= number

            try:
                _wait_for(reached, pause=0.002)
            finally:
                running.kill()
                status = running.wait(timeout=60)
        self.server.heal()
        assert status == -signal.SIGKILL, "it was alive"


def paintings(folder: Path) -> set[tuple[str, str]]:
    """Names of a data set's items, and what their masks are painted by."""
    manifest = read_manifest(folder) if folder.exists() else None
    return {(item.name, item.recipe) for item in manifest.items} if manifest else set()


def moments(kills: int, bench: Bench) -> list[Moment]:
    """Seeded; half of them early or late enough among the frames to leave different numbers of items behind."""
    chance = random.Random(kills)
    last = bench.new_images - 2  # after the one that is worked on there must be one to wait for
    chosen = [Moment("frame", 1), Moment("frame", last)]
    while len(chosen) < kills:
        chosen.append(Moment("request", chance.randrange(bench.requests - 1)))
        chosen.append(Moment("frame", chance.randint(1, last)))
    return chosen[:kills]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("incremental", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "incremental"])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    cvat_server: CvatStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incremental: bool, kills: int
) -> None:
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    bench = Bench(cvat_server, tmp_path, incremental=incremental)
    assert (len(bench.after - bench.before), bench.images) == ((10, 8) if incremental else (11, 11))
    whole, left = tree(bench.calm), []
    for number, moment in enumerate(moments(kills, bench)):
        folder = bench.copy(f"killed-{number}")
        bench.kill(folder, moment)
        left.append(bench.progress(folder))
        bench.fetch(folder)
        assert tree(folder) == whole, moment
    between = {count for count in left if 0 < count < len(bench.after - bench.before)}
    assert len(between) >= (2 if kills < 10 else 3), left


def _wait_for(condition: Callable[[], bool], *, pause: float = 0.01) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(pause)


def test_a_models_drawing_counts_as_seen_when_somebody_has_finished_the_job(
    cvat_server: CvatStandin, tmp_path: Path
) -> None:
    project = make_project(cvat_server.site, tasks=1, frames=1)
    with cvat_server.site.client() as client:
        (task,) = client.projects.retrieve(project).get_tasks()
        (job,) = jobs_of(client, task.id)
    for shape in cvat_server.shapes(job):
        cvat_server.edit_shape(shape["id"], source="auto")
    arguments = ("--project", project, "--state", "completed", "--state", "new", "-o", tmp_path / "data")
    cvat_server.set_job(job, state="new")
    assert (
        "a model's drawing that nobody has finished (0_normals)" in sscloud_fetch(cvat_server.site, *arguments).stderr
    )
    cvat_server.set_job(job, state="completed")
    seen = sscloud_fetch(cvat_server.site, *arguments)
    assert seen.returncode == 0, seen.stderr
    assert "nobody has finished" not in seen.stderr
