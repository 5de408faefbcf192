"""The way round, once, by the command line: fetch → train → prelabel → people correct → fetch → what it has saved."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cvat_sdk import Client
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import Site, add_shapes, job_shapes, jobs_of, label_ids, make_task, polygon, set_state
from sscloud.labels import LabelSchema
from tools.cli import main
from training.cvat import Server, find_account
from training.effort import read_effort

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

TEXT = {"mutable": False, "input_type": "text", "values": [""], "default_value": ""}
LABELS = [
    {"name": label.name, "attributes": [{"name": name, **TEXT} for name in ("model", "confidence")]}
    for label in LabelSchema.default().classes
    if not label.background
]
GROUND = [0.0, 32.0, 128.0, 32.0, 128.0, 64.0, 0.0, 64.0]
HOUSE = [20.0, 10.0, 60.0, 10.0, 60.0, 32.0, 20.0, 32.0]


def test_fetch_train_prelabel_correct_fetch_effort(
    cvat_site: Site,
    tmp_path: Path,
    make_panorama: Callable[..., NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in cvat_site.environment().items():
        monkeypatch.setenv(name, value)
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "Улица", LABELS).id
        labels = label_ids(client, project)
        first = _task(client, project, [make_panorama(seed=seed) for seed in range(3)])
        for frame, job in enumerate(jobs_of(client, first)):
            _draw(client, job, frame, labels)
            set_state(client, job, state="completed")
        fetch = ["fetch", "--project", str(project), "-o", "dataset", "--group-by", "image"]
        assert main(fetch) == 0
        quick = ["--epochs", "1", "--scale", "0.25", "--base-width", "4", "--device", "cpu", "--no-augment"]
        assert main(["train", "dataset", "--name", "street", "-o", "runs/1", *quick]) == 0

        second = _task(client, project, [make_panorama(seed=seed) for seed in (3, 4)])
        local = ["prelabel", "--via", "local", "--bundle", "runs/1/bundle", "--device", "cpu", "--task", str(second)]
        local += ["--min-area", "200"]  # CVAT's client takes a second for a hundred shapes
        assert main(local) == 0
        untouched, corrected = jobs_of(client, second)
        _draw(client, corrected, 1, labels)
        drawn = len(job_shapes(client, corrected)) - 2
        with Server.connect(find_account(cvat_site.environment())) as server:
            auto = [shape for shape in server.annotations(corrected).shapes if shape["source"] == "auto"]
            server.delete_shapes(corrected, auto[:1])
        for job in (untouched, corrected):
            set_state(client, job, state="completed")
        capsys.readouterr()
        assert main([*fetch, "--empty", "background"]) == 0
        assert "pre-labels of street v1: " in capsys.readouterr().out

    found = {record.job: record for record in read_effort(Path("dataset"))}
    assert found.keys() == {untouched, corrected}
    assert all(not record.unknown and record.model == "street v1" for record in found.values())
    assert found[untouched].changed + found[untouched].deleted + found[untouched].added == 0
    record = found[corrected]
    assert (record.kept + record.changed + record.deleted, record.changed + record.added) == (drawn, 2)
    assert record.kept == max(drawn - 1, 0)
    assert main(["effort", "-o", "effort.html"]) == 0
    output = capsys.readouterr().out
    assert "street v1: people changed " in output
    assert "in 2 frames; drawing all of it by hand would be 100 %" in output
    assert "Земля" in Path("effort.html").read_text(encoding="utf-8")
    assert main(["effort", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["frames"], summary["unknown"], summary["warning"]) == (2, {}, False)


def _task(client: Client, project: int, pictures: list[NDArray[np.uint8]]) -> int:
    images = {}
    for number, pixels in enumerate(pictures):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        images[f"{number}_normals.png"] = stream.getvalue()
    return int(make_task(client, project, images, segment_size=1).id)


def _draw(client: Client, job: int, frame: int, labels: dict[str, int]) -> None:
    """What a person draws in every scene."""
    add_shapes(client, job, [polygon(labels["Земля"], frame, GROUND), polygon(labels["Здание"], frame, HOUSE)])
