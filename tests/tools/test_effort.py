"""`sscloud effort`, and what `sscloud fetch` says of the pre-labels."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvat_standin import CvatStandin, Status, add_shapes, jobs_of, label_ids, make_task, polygon
from tools.cli import main
from training.effort_records import FILE, FrameEffort, add_effort
from training.prelabel_store import Drawn, FrameRecord, JobRecord, PrelabelStore, identity

HOUSE = {"z_order": 0, "rotation": 0.0, "occluded": False, "outside": False, "group": 0, "source": "auto"}


def record(frame: int, *, model: str, changed: int) -> FrameEffort:
    return FrameEffort(
        server="http://cvat",
        project=None,
        task=1,
        job=1,
        frame=frame,
        name=str(frame),
        group=str(frame),
        model=model,
        prelabel="a",
        mask_sha256="b",
        fetched="2026-11-20T10:00:00Z",
        snapshot=model,
        labels={0: "Фон", 2: "Земля"},
        pixels={(2, 2): 100 - changed, (0, 2): changed},
    )


def test_tables_by_version_label_and_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["effort"]) == 2
    assert "dataset is no data set" in capsys.readouterr().err
    Path("dataset").mkdir()
    assert main(["effort"]) == 1
    assert "Nothing was measured yet" in capsys.readouterr().out
    add_effort(Path("dataset"), [record(0, model="street v3", changed=40), record(1, model="street v4", changed=20)])
    assert main(["effort", "-o", "out/effort.html"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"street v3 +1 +40\.0 % +60\.0 % +40\.0 %", output)
    assert re.search(r"Земля +40\.0 % +20\.0 %", output)
    assert "Too few to say whether effort fell, from street v3 (1 frame) to street v4 (1 frame)" in output
    assert Path("out/effort.html").is_file()
    for by, there in (("class", "Effort by label"), ("model", "By version"), ("cycle", "By fetch")):
        assert main(["effort", "--by", by]) == 0
        titles = {line[:8].strip() for line in capsys.readouterr().out.splitlines()[:1]}
        assert titles == {there[:8].strip()}
    Path("dataset", FILE).write_text("[]\n")
    assert main(["effort", "--json"]) == 2
    assert "line 1 cannot be used" in capsys.readouterr().err


def test_fetch_measures_and_never_fails_because_of_it(
    cvat_server: CvatStandin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in cvat_server.site.environment().items():
        monkeypatch.setenv(name, value)
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(stream, "PNG")
    with cvat_server.site.client() as client:
        project = cvat_server.site.make_project(client, "Улица", [{"name": "Здание"}]).id
        task = make_task(client, project, {"0.png": stream.getvalue()}).id
        (job,) = jobs_of(client, task)
        house = polygon(label_ids(client, project)["Здание"], 0, [0, 0, 8, 0, 8, 8, 0, 8], **HOUSE)
        add_shapes(client, job, [house])
    cvat_server.set_job(job, state="completed")
    fetch = ["fetch", "--project", str(project), "-o", "dataset"]
    assert main(fetch) == 0
    assert "pre-label" not in capsys.readouterr().out  # there is no store
    drawn = Drawn(model="street v3", shapes=(identity(house),))
    with PrelabelStore(Path("kept"), server=cvat_server.url) as store:
        store.keep(job, 0, drawn, [house], labels={house["label_id"]: "Здание"})
        store.save(job, JobRecord(frames={0: FrameRecord(drawn=drawn)}))
    fetch += ["--prelabels", "kept"]
    cvat_server.fail("GET", r"/jobs/\d+/annotations", Status(401), times=None)
    assert main(fetch) == 0  # nothing is new
    assert "warning: what the pre-labels have saved could not be measured" in capsys.readouterr().err
    cvat_server.heal()
    assert main(fetch) == 0
    assert "pre-labels of street v3: 0.0 % changed, in 1 panorama(s) of this snapshot" in capsys.readouterr().out
    assert main(["effort", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert (row["effort"], row["shapes"]["kept"]) == (0.0, 1)
