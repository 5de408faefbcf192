"""`sscloud fetch` as a process of its own, against a server on a real socket."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cvat_standin import CvatStandin, Site, Slow, add_shapes, jobs_of, label_ids, make_task, mask, polygon, set_state
from PIL import Image

from sscloud.labels import LabelSchema
from training.manifest import read_manifest

SIZE_HW = (64, 128)
LABELS = [{"name": name, "color": "#b5793c", "type": "any"} for name in ("Земля", "Здание")]


def make_project(site: Site, *, tasks: int = 2, frames: int = 3) -> int:
    """A project whose frames are all annotated, in completed jobs of one frame each."""
    with site.client() as client:
        project = site.make_project(client, "Улица", LABELS).id
        labels = label_ids(client, project)
        for number in range(tasks):
            images = {}
            for frame in range(frames):
                pixels = np.random.default_rng((number, frame)).integers(0, 255, (*SIZE_HW, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG")
                images[f"{frame}_normals.jpg"] = buffer.getvalue()
            task = make_task(client, project, images, segment_size=1).id
            for frame, job in enumerate(jobs_of(client, task)):
                bitmap = np.zeros(SIZE_HW, np.bool_)
                bitmap[32 + frame :] = True
                house = polygon(labels["Здание"], frame, [4, 4, 40, 4, 40, 20 + number, 4, 20])
                add_shapes(client, job, [mask(labels["Земля"], frame, bitmap), house])
                set_state(client, job, state="completed")
    return project


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tools.cli", "fetch", *map(str, arguments)]


def sscloud_fetch(
    site: Site, *arguments: str | Path, environment: dict[str, str] | None = None
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
    for secret in (cvat_site.password, cvat_site.environment()["CVAT_PASSWORD"]):
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
    cvat_server.fail("GET", r"/tasks/\d+/data/?$", Slow(seconds=0.2, bytes=500), times=None)
    cvat_server.forget()
    running = subprocess.Popen(
        command("--project", project, "-o", tmp_path / "data"),
        env={**os.environ, **cvat_server.site.environment()},
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: cvat_server.count("GET", r"/annotations") > 0)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "stopped" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    cvat_server: CvatStandin, tmp_path: Path, kills: int
) -> None:
    project = make_project(cvat_server.site, tasks=2, frames=4)
    arguments = ("--project", project, "--group-by", "image", "-o")
    assert sscloud_fetch(cvat_server.site, *arguments, tmp_path / "calm").returncode == 0
    # Slowly enough that the frames come one after the other over some seconds.
    cvat_server.fail("GET", r"/tasks/\d+/data/?$", Slow(seconds=0.05, bytes=2000), times=None)
    moments = random.Random(kills)
    survived = []
    for _ in range(kills):
        first = cvat_server.count("GET", r"/server/about")
        running = subprocess.Popen(
            command(*arguments, tmp_path / "killed"),
            env={**os.environ, **cvat_server.site.environment()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(lambda first=first: cvat_server.count("GET", r"/server/about") > first)
        time.sleep(moments.uniform(0, 2.0))
        running.kill()
        running.wait(timeout=60)
        manifest = read_manifest(tmp_path / "killed") if (tmp_path / "killed").exists() else None
        survived.append(0 if manifest is None else len(manifest.items))
    assert survived == sorted(survived)
    cvat_server.heal()
    done = sscloud_fetch(cvat_server.site, *arguments, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)
