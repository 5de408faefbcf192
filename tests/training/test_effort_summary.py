"""What measured frames say together."""

import json
import math
import re
import threading
import time
from pathlib import Path

import pytest

from sscloud.errors import DatasetError
from sscloud.labels import LabelSchema
from training import effort_records
from training.effort import read_effort, summarise_effort, write_effort_page
from training.effort_records import FILE, FrameEffort, add_effort
from training.effort_summary import class_table, effort_table, label_table

NAMES = {0: "Фон", 2: "Земля", 6: "Здание"}
PIXELS = {(0, 0): 900, (2, 2): 60, (0, 2): 10, (6, 0): 5, (6, 2): 15, (6, 6): 10}
"""100 are drawn, 70 of them accepted."""


def frame(
    number: int, *, model: str = "street v3", pixels: dict[tuple[int, int], int] | None = None, **more: object
) -> FrameEffort:
    values = {
        "server": "http://cvat",
        "project": 7,
        "task": 1,
        "job": 1,
        "frame": number,
        "name": f"{number}",
        "group": f"site:{number}",
        "prelabel": "a",
        "mask_sha256": "b",
        "fetched": "2026-11-20T10:00:00Z",
        "snapshot": "s1",
        "labels": NAMES,
        "kept": 5,
        "changed": 2,
        "deleted": 1,
        "added": 1,
    }
    return FrameEffort(model=model, pixels=PIXELS if pixels is None else pixels, **{**values, **more})  # type: ignore[arg-type]


def test_numbers_of_a_version_and_of_its_labels() -> None:
    (row,) = summarise_effort([frame(0), frame(1)]).models
    pixels = row.pixels
    assert (pixels.accepted, pixels.added, pixels.removed, pixels.relabelled) == (140, 20, 10, 30)
    assert (row.frames, row.effort, row.touched) == (2, pytest.approx(0.3), 4)
    ground, house = row.classes["Земля"], row.classes["Здание"]
    assert (ground.accepted, ground.added, ground.removed, ground.relabelled, ground.relabelled_to) == (
        120,
        20,
        0,
        0,
        30,
    )
    assert (house.accepted, house.added, house.removed, house.relabelled, house.relabelled_to) == (20, 0, 10, 30, 0)
    assert ground.iou == pytest.approx(120 / 170)  # of the pre-label with the result
    assert house.iou == pytest.approx(20 / 60)
    assert row.miou == pytest.approx((120 / 170 + 20 / 60) / 2)
    assert list(row.classes) == ["Земля", "Здание"]


def test_of_a_frame_the_last_measurement_counts_and_servers_do_not_mix() -> None:
    again = frame(0, pixels={(2, 2): 100}, mask_sha256="c", snapshot="s2")
    elsewhere = frame(0, server="http://other", pixels={(2, 2): 50, (0, 2): 50})
    summary = summarise_effort([frame(0), elsewhere, again])
    (row,) = summary.models
    assert (row.frames, row.effort) == (2, pytest.approx(0.25))
    assert [(cycle.name, cycle.frames, cycle.effort) for cycle in summary.cycles] == [
        ("1: 2026-11-20", 1, 0.5),
        ("2: 2026-11-20", 1, 0.0),
    ]


def test_pixels_where_neither_drew_do_not_count_and_nothing_drawn_is_no_effort() -> None:
    (row,) = summarise_effort([frame(0, pixels={(0, 0): 1000})]).models
    assert math.isnan(row.effort)
    assert math.isnan(row.miou)


def test_time_is_shared_by_the_frames_of_a_job_that_are_all_one_versions() -> None:
    records = [frame(n, job_seconds=120.0, job_frames=4) for n in range(4)] + [frame(4, job=2)]
    (row,) = summarise_effort(records).models
    assert (row.seconds, row.timed) == (30.0, 4)
    # One was drawn by hand, or pre-labelled by another version, or by nobody knows which.
    others = [frame(3, job_seconds=120.0, job_frames=4, model=model, unknown="why") for model in ("street v4", "")]
    for rest in ([], *([other] for other in others)):
        assert summarise_effort(records[:3] + rest).models[0].seconds is None


def test_unknown_frames_are_counted() -> None:
    summary = summarise_effort([frame(0, unknown="why"), frame(1, unknown="why", model="")])
    assert (summary.models, summary.unknown) == ((), {"why": 2})
    assert "Nothing was measured yet" in summary.verdict
    known = summarise_effort([frame(0, unknown="why"), frame(0)])
    assert (known.frames, dict(known.unknown)) == (1, {})


def changed(share: int) -> dict[tuple[int, int], int]:
    return {(2, 2): 100 - share, (0, 2): share}


@pytest.mark.parametrize(
    ("before", "after", "standing", "words"),
    [
        (40, 20, "fell", r"Effort fell by 50\.0 % from street v9 \(20 frames\) to street v10 \(20 frames\)"),
        (20, 40, "rose", r"WARNING: effort rose by 100\.0 %"),
        (30, 29, "no difference shown", "WARNING: it is not shown that effort fell"),
        (0, 20, "rose", "WARNING: effort rose from"),
    ],
)
def test_the_verdict(before: int, after: int, standing: str, words: str) -> None:
    """v10 comes after v9, and is compared with it, whatever was measured last."""
    spread = [5 * (n % 5 - 2) for n in range(20)]
    records = [frame(n + 100, model="street v10", pixels=changed(after + spread[n])) for n in range(20)]
    records += [frame(n, model="street v9", pixels=changed(before + spread[n] * (before > 0))) for n in range(20)]
    records.append(frame(300, model="street v2", pixels=changed(90)))
    summary = summarise_effort(records)
    assert [row.name for row in summary.models] == ["street v2", "street v9", "street v10"]
    assert summary.change is not None
    assert summary.change.standing == standing
    assert summary.warning == (standing != "fell")
    assert re.search(words, summary.verdict)
    assert "The frames are others" in summary.verdict
    if before:
        low, high = summary.change.limits or (math.nan, math.nan)
        assert low < summary.change.value < high


def test_few_frames_have_no_interval() -> None:
    records = [frame(0, pixels=changed(40)), frame(1, model="street v4", pixels=changed(20))]
    summary = summarise_effort(records)
    assert summary.change is not None
    assert (summary.change.limits, summary.change.standing) == (None, "too few")
    assert "Too few to say whether effort fell, from street v3 (1 frame) to street v4 (1 frame)" in summary.verdict
    assert not summary.warning
    alone = summarise_effort(records[:1])
    assert "no other version to compare with" in alone.verdict
    assert not alone.warning


def test_the_file_keeps_records_and_replaces_equal_states(tmp_path: Path) -> None:
    assert read_effort(tmp_path) == []
    first = frame(0, unknown="its version is not at hand", name="half a \ud800, a line\u2028and \x85 another")
    second = frame(1, job_seconds=1.5, project=None)
    add_effort(tmp_path, [first, second])
    assert read_effort(tmp_path) == [first, second]
    add_effort(tmp_path, [frame(0)])
    assert read_effort(tmp_path) == [second, frame(0)]
    before = (tmp_path / FILE).read_bytes()
    add_effort(tmp_path, [])
    assert (tmp_path / FILE).read_bytes() == before


def test_two_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(dataset: Path) -> list[FrameEffort]:
        records = read_effort(dataset)
        time.sleep(0.05)
        return records

    monkeypatch.setattr(effort_records, "read_effort", read)
    threads = [threading.Thread(target=add_effort, args=(tmp_path, [frame(number)])) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.frame for record in read_effort(tmp_path)) == [0, 1]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"effort\.jsonl cannot be written"):
        add_effort(tmp_path / "file", [frame(0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"frame": -1}, "frame is -1"),
        ({"pixels": [[0, 256, 3]]}, "is no label id"),
        ({"pixels": [[0, 5, 3]]}, "a label has no name"),
        ({"job_frames": 0}, "job_frames is 0"),
        ({"job_seconds": -1.0}, "job_seconds is no time"),
        ({"model": None}, "model is no text"),
        ({"more": 1}, "keys"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    add_effort(tmp_path, [frame(0)])
    data = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(data | change))
    with pytest.raises(DatasetError, match=rf"line 1 cannot be used.*{message}"):
        read_effort(tmp_path)


def test_tables_and_the_page(tmp_path: Path) -> None:
    records = [
        frame(0),
        frame(1, model="<b>street</b> v4", snapshot="s2", job=2, job_seconds=90.0),
        frame(2, unknown="<why>"),
    ]
    summary = summarise_effort(records)
    table = effort_table(summary.models, title="By version").splitlines()
    assert len({len(line) for line in table}) == 1
    row = " ".join(table[1].split())
    assert row == "street v3 1 30.0 % 70.0 % 10.0 % 5.0 % 15.0 % 0.520 4.0 —"
    assert "1.5 min" in table[2]
    labels = class_table(summary).splitlines()
    assert len({len(line) for line in labels}) == 1
    assert [line.split()[0] for line in labels[1:]] == ["Земля", "Здание"]
    one = label_table(summary.models[0]).splitlines()
    assert len({len(line) for line in one}) == 1
    assert " ".join(one[2].split()) == "Здание 66.7 % 33.3 % 0.0 % 16.7 % 50.0 % 0.0 % 0.333"
    write_effort_page(tmp_path / "effort.html", summary, schema=LabelSchema.default())
    page = (tmp_path / "effort.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;street&lt;/b&gt; v4" in page
    assert "&lt;why&gt;" in page
    assert "<b>street</b>" not in page
    assert page.count("<polyline") == 8  # four curves over versions, and over fetches
    write_effort_page(tmp_path / "empty.html", summarise_effort([]))
    assert "Nothing was measured yet" in (tmp_path / "empty.html").read_text(encoding="utf-8")
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False))["models"][0]["effort"] == 0.3
