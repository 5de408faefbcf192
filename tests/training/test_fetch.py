"""Fetching from a CVAT server over a real socket: the stand-in, and a live server when there is one."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import models
from cvat_sdk.core.proxies.annotations import AnnotationUpdateAction
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import (
    Body,
    CvatStandin,
    Drop,
    Site,
    Status,
    Truncated,
    add_shapes,
    job_shapes,
    jobs_of,
    label_ids,
    make_ground_truth,
    make_task,
    mask,
    polygon,
    set_state,
)
from sscloud.errors import ConfigError, DatasetError, SchemaError, ServerError
from sscloud.image import read_label_map
from sscloud.labels import LabelSchema
from training.cvat import Account, Server
from training.dataset import open_dataset
from training.fetch import Summary, fetch
from training.manifest import read_manifest
from training.project_labels import schema_of
from training.rule import Rule
from training.splits import SplitPlan
from training.survey import Selection

pytestmark = pytest.mark.usefixtures("short_pauses")

SIZE_HW = (32, 64)
LABELS = [
    {"name": name, "color": color, "type": "any"}
    for name, color in (("Земля", "#b5793c"), ("Растительность", "#3f9b46"), ("Здание", "#d8594b"))
]


def picture(seed: int, size_hw: tuple[int, int] = SIZE_HW, format_name: str = "JPEG") -> bytes:
    """A picture's file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size_hw, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


def ground(*, top: int = 16) -> NDArray[np.bool_]:
    """The rows below `top`."""
    bitmap = np.zeros(SIZE_HW, np.bool_)
    bitmap[top:] = True
    return bitmap


def account(site: Site) -> Account:
    return Account(url=site.url, username=site.username, password=site.password)


@pytest.fixture
def server(cvat_server: CvatStandin) -> Iterator[Server]:
    with Server.connect(account(cvat_server.site)) as server:
        yield server


@dataclass
class World:
    """A project of two tasks; every frame has ground, the first one a house, too. All jobs are completed."""

    site: Site
    project: int
    tasks: list[int]
    jobs: list[int]
    labels: dict[str, int]
    images: dict[tuple[int, int], bytes]


def make_world(site: Site, *, frames: int = 2, tasks: int = 2, names: Callable[[int], str] | None = None) -> World:
    with site.client() as client:
        project = site.make_project(client, "Улица", LABELS).id
        world = World(site, project, [], [], label_ids(client, project), {})
        for task_number in range(tasks):
            images = {
                (names or "{}_normals.jpg".format)(frame): picture(10 * task_number + frame) for frame in range(frames)
            }
            task = make_task(client, project, images, segment_size=0).id
            (job,) = jobs_of(client, task)
            shapes = [mask(world.labels["Земля"], frame, ground()) for frame in range(frames)]
            shapes.append(polygon(world.labels["Здание"], 0, [4, 4, 20, 4, 20, 20, 4, 20]))
            add_shapes(client, job, shapes)
            set_state(client, job, state="completed")
            world.tasks.append(task)
            world.jobs.append(job)
            for frame, data in enumerate(images.values()):
                world.images[task, frame] = data
    return world


def run(server: Server, output: Path, world: World, **changes: Any) -> Summary:
    """Fetch the world's project."""
    rule = Rule(schema=changes.pop("schema", LabelSchema.default()), **changes.pop("rule", {}))
    selection = Selection(projects=(world.project,), **changes.pop("selection", {}))
    plan = SplitPlan(**{"group_by": "image", "validation": 0, "test": 0} | changes.pop("plan", {}))
    return fetch(server, output, selection=selection, rule=rule, plan=plan, quiet=True, **changes)


def tree(folder: Path) -> dict[str, str]:
    """Every file that counts, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_project_becomes_a_dataset(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site)
    with Server.connect(account(cvat_site)) as server:
        summary = run(server, tmp_path / "data", world)
    assert (summary.written, summary.unchanged, summary.left_out) == (4, 0, ())
    dataset = open_dataset(tmp_path / "data")
    assert {item.name for item in dataset.items} == {"0_normals", "0_normals_1", "1_normals", "1_normals_1"}
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    for item in manifest.items:
        task, frame = item.source["task"], item.source["frame"]
        assert isinstance(task, int)
        assert isinstance(frame, int)
        assert (tmp_path / "data/imgs" / item.image).read_bytes() == world.images[task, frame]
        expected = np.where(ground(), 2, 0).astype(np.uint8)
        if frame == 0:
            expected[4:20, 4:20] = 6
        assert np.array_equal(read_label_map(tmp_path / "data/masks" / item.mask), expected)
        assert item.pixels == {int(i): int((expected == i).sum()) for i in np.unique(expected)}
        assert item.people_pixels == (expected > 0).sum()
        assert item.source == {
            "kind": "cvat", "server": server.url, "project": world.project, "task": task, "frame": frame,
            "job": world.jobs[world.tasks.index(task)], "name": f"{frame}_normals.jpg",
        }  # fmt: skip


def test_a_second_run_asks_for_nothing_that_it_has(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site)
    run(server, tmp_path / "data", world)
    before = tree(tmp_path / "data")
    cvat_server.forget()
    summary = run(server, tmp_path / "data", world)
    assert (summary.written, summary.unchanged, summary.bytes) == (0, 4, 0)
    assert cvat_server.count("GET", r"/data/?$") == cvat_server.count("GET", r"/annotations") == 0
    assert tree(tmp_path / "data") == before


def test_a_correction_brings_that_mask_only(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site)
    first = run(server, tmp_path / "data", world)
    before = tree(tmp_path / "data")
    cvat_server.forget()
    house = next(s for s in cvat_server.shapes(world.jobs[1]) if s["type"] == "polygon")
    cvat_server.edit_shape(house["id"], label_id=world.labels["Растительность"])
    second = run(server, tmp_path / "data", world)
    assert (second.written, second.bytes) == (1, 0)
    assert cvat_server.count("GET", r"/data/?$") == 0
    assert cvat_server.count("GET", r"/annotations") == 1
    after = tree(tmp_path / "data")
    assert {name for name in after if after[name] != before[name]} == {"manifest.json", "masks/0_normals_1.png"}
    assert second.manifest.snapshot != first.manifest.snapshot
    assert read_label_map(tmp_path / "data/masks/0_normals_1.png")[5, 5] == 5


def test_the_dataset_follows_states_and_deleted_frames_and_remembers_splits(
    cvat_server: CvatStandin, server: Server, tmp_path: Path
) -> None:
    world = make_world(cvat_server.site, frames=5)
    plan = {"validation": 20, "test": 20}
    first = run(server, tmp_path / "data", world, plan=plan)
    before = tree(tmp_path / "data")
    splits = {item.image_sha256: item.split for item in first.manifest.items}
    assert {"train", "validation", "test"} == set(splits.values())
    cvat_server.set_job(world.jobs[0], state="in progress")
    with cvat_server.site.client() as client:
        client.tasks.retrieve(world.tasks[1]).remove_frames_by_ids([3])
    with pytest.raises(DatasetError, match=r"6 of 10 panoramas .* would leave .*1 of state in progress.*--remove"):
        run(server, tmp_path / "data", world, plan=plan)
    assert tree(tmp_path / "data") == before
    second = run(server, tmp_path / "data", world, plan=plan, remove=True)
    assert len(second.manifest.items) == 4
    assert sorted(second.removed) == sorted(
        i.name for i in first.manifest.items if i.source["task"] == world.tasks[0] or i.source["frame"] == 3
    )
    assert not (tmp_path / "data/imgs" / first.manifest.items[0].image).exists()
    cvat_server.set_job(world.jobs[0], state="completed")
    third = run(server, tmp_path / "data", world, plan=plan)
    assert {item.image_sha256: item.split for item in third.manifest.items}.items() <= splits.items()
    assert len(third.manifest.items) == 9


def test_only_jobs_of_the_wanted_state_and_stage_count(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site)
    with cvat_site.client() as client:
        set_state(client, world.jobs[0], stage="acceptance", state="completed")
        set_state(client, world.jobs[1], state="new")
    with Server.connect(account(cvat_site)) as server:
        accepted = run(server, tmp_path / "a", world, selection={"stages": frozenset({"acceptance"})})
        new = run(server, tmp_path / "b", world, selection={"states": frozenset({"new"})})
        with pytest.raises(DatasetError, match=r"No frame counts.*1 of state completed, 1 of state new.*--state"):
            run(server, tmp_path / "c", world, selection={"states": frozenset({"rejected"})})
    assert {item.source["task"] for item in accepted.manifest.items} == {world.tasks[0]}
    assert {item.source["task"] for item in new.manifest.items} == {world.tasks[1]}
    assert accepted.survey.jobs_left_out == {"state new": 1}
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("empty", "value"), [("skip", None), ("void", 255), ("background", 0)])
def test_a_frame_without_shapes_is_what_was_asked_for(
    cvat_site: Site, tmp_path: Path, empty: str, value: int | None
) -> None:
    world = make_world(cvat_site, tasks=1)
    with cvat_site.client() as client:
        job = client.jobs.retrieve(world.jobs[0])
        job.remove_annotations()
        add_shapes(client, world.jobs[0], [mask(world.labels["Земля"], 0, ground())])
    with Server.connect(account(cvat_site)) as server:
        summary = run(server, tmp_path / "data", world, rule={"empty": empty})
        again = run(server, tmp_path / "data", world, rule={"empty": empty})
    assert again.written == again.bytes == 0
    assert again.manifest == summary.manifest
    if value is None:
        assert (len(summary.manifest.items), summary.empty) == (1, 1)
    else:
        assert (read_label_map(tmp_path / "data/masks/1_normals.png") == value).all()


def test_ground_truth_is_the_test_set_for_ever(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site, frames=4, tasks=1)
    with cvat_site.client() as client:
        truth = make_ground_truth(client, world.tasks[0], [1, 2])
        add_shapes(client, truth, [mask(world.labels["Растительность"], frame, ground()) for frame in (1, 2)])
        set_state(client, truth, state="completed", stage="acceptance")
    with Server.connect(account(cvat_site)) as server:
        without = run(server, tmp_path / "a", world)
        summary = run(server, tmp_path / "b", world, selection={"ground_truth": "test"}, plan={"validation": 25})
    assert without.survey.jobs_left_out == {"ground truth": 1}
    assert len(without.manifest.items) == len(summary.manifest.items) == 4
    tests = {item.source["frame"]: item for item in summary.manifest.items if item.split == "test"}
    assert set(tests) == {1, 2}
    assert {item.source["job"] for item in tests.values()} == {truth}
    assert all(set(item.pixels) == {0, 5} for item in tests.values())


def test_consensus_replicas_are_left_to_their_job(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=1)
    for replica in cvat_server.make_replicas(world.jobs[0], 2):
        cvat_server.set_job(replica, state="completed")
    summary = run(server, tmp_path / "data", world)
    assert {item.source["job"] for item in summary.manifest.items} == {world.jobs[0]}
    assert summary.survey.jobs_left_out == {"consensus replica": 2}


def test_labels_that_the_schema_lacks_stop_everything_with_the_line_to_add(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site)
    small = LabelSchema.from_dict(
        {"labels": [{"name": "Фон", "id": 0, "background": True}, {"name": "ЗЕМЛЯ ", "id": 2}]}, source="test"
    )
    with Server.connect(account(cvat_site)) as server:
        with pytest.raises(SchemaError, match=r'Здание: 2 shapes in 2 images; to add:  - \{name: "Здание", id: 6\}'):
            run(server, tmp_path / "data", world, schema=small)
        assert not (tmp_path / "data/manifest.json").exists()
        summary = run(server, tmp_path / "data", world, schema=small, rule={"unknown": "void"})
    assert [(stranger.name, stranger.shapes, stranger.images) for stranger in summary.unknown] == [("Здание", 2, 2)]
    assert set(summary.manifest.items[0].pixels) == {0, 2, 255}


def test_a_background_that_does_not_exist_is_refused(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=1)
    schema = LabelSchema.from_dict({"labels": [{"name": "Земля", "id": 2}]}, source="test")
    with pytest.raises(ConfigError, match="background: true"):
        run(server, tmp_path / "data", world, schema=schema, rule={"empty": "background"})


def test_names_that_lead_elsewhere_stay_inside(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=2, frames=6)
    names = ["../../evil.jpg", "/etc/passwd.jpg", "C:\\x\\y.jpg", "я" * 300 + ".jpg", "a/b/1.jpg", "con.jpg"]
    for task in world.tasks:
        for frame, name in enumerate(names):
            cvat_server.rename_frame(task, frame, name)
    summary = run(server, tmp_path / "box" / "data", world)
    assert len(summary.manifest.items) == 12
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path in files if not path.is_relative_to(tmp_path / "box" / "data")] == []
    stems = [item.name for item in summary.manifest.items]
    assert {"evil", "evil_1", "1", "1_1"} <= set(stems)
    assert len({stem.casefold() for stem in stems}) == 12
    assert all(len(item.image.encode()) < 220 for item in summary.manifest.items)


@pytest.mark.parametrize(
    "fault", [Drop(after=100), Status(502), Status(503), Status(504), Status(429, retry_after=0)], ids=str
)
def test_passing_faults_are_waited_for(cvat_server: CvatStandin, server: Server, tmp_path: Path, fault: Any) -> None:
    world = make_world(cvat_server.site, tasks=1)
    expected = run(server, tmp_path / "calm", world)
    cvat_server.fail("GET", r"/data/?$", fault, times=2)
    cvat_server.fail("GET", r"/annotations", fault, times=1)
    cvat_server.fail("GET", r"/api/jobs$", fault, times=1)
    found = run(server, tmp_path / "storm", world)
    assert tree(tmp_path / "storm") == tree(tmp_path / "calm")
    assert cvat_server.count("GET", r"/tasks/\d+/data/?$") == 2 * len(world.images) + 2
    assert found.bytes == expected.bytes == sum(map(len, world.images.values()))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Body(b"<html>hello</html>"), "not JSON.*Is CVAT_URL the address of CVAT"),
        (Truncated(20), "not JSON"),
        (Body(b"[1, 2]"), "no annotations"),
        (Body(b'{"shapes": 5}'), "no usable list 'shapes'"),
        (Body(b'{"shapes": [{"type": "mask"}]}'), "no whole number 'id'"),
        (Body(b'{"shapes": [{"type": "mask", "id": 1}]}'), "no whole number 'frame'"),
        (Body(b'{"shapes": [{"type": "\x1b[31m"}]}'), "not JSON"),
        (Body(b'{"shapes": [{"type": "\\u001b[31m"}]}'), "a shape of type"),
        (
            Body(
                b'{"shapes": [{"type": "mask", "id": 1, "frame": 0, "label_id": 1, "points": [], "attributes": ["x"]}]}'
            ),
            "no usable list 'attributes'",
        ),
        (Status(404), "there is none that this user can see"),
    ],
    ids=str,
)
def test_wrong_answers_are_named_and_leave_the_dataset_alone(
    cvat_server: CvatStandin, server: Server, tmp_path: Path, fault: Any, message: str
) -> None:
    world = make_world(cvat_server.site)
    run(server, tmp_path / "data", world)
    before = tree(tmp_path / "data")
    house = next(s for s in cvat_server.shapes(world.jobs[1]) if s["type"] == "polygon")
    cvat_server.edit_shape(house["id"], label_id=world.labels["Растительность"])
    cvat_server.fail("GET", r"/annotations", fault, times=None)
    with pytest.raises(ServerError, match=rf"the annotations of job {world.jobs[1]}: .*{message}"):
        run(server, tmp_path / "data", world)
    assert tree(tmp_path / "data") == before


def test_a_frame_that_cannot_be_used_costs_that_frame(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site)
    whole = world.images[world.tasks[0], 1]
    cvat_server.replace_frame(world.tasks[0], 1, whole[: len(whole) // 2])
    cvat_server.edit_shape(cvat_server.shapes(world.jobs[1])[0]["id"], points=[0.0, 5.0, 0.0, 0.0, 9.0, 9.0])
    summary = run(server, tmp_path / "data", world, parallel=1)
    assert len(summary.left_out) == 2
    assert any("truncated" in problem or "broken" in problem or "damaged" in problem for problem in summary.left_out)
    assert any("Correct or delete it in CVAT" in problem for problem in summary.left_out)
    assert len(summary.manifest.items) == 2
    cvat_server.replace_frame(world.tasks[0], 1, whole)
    later = run(server, tmp_path / "data", world)
    assert len(later.left_out) == 1
    assert len(later.manifest.items) == 3


def test_a_server_that_goes_away_ends_the_run_and_keeps_what_is_there(
    cvat_server: CvatStandin, server: Server, tmp_path: Path
) -> None:
    world = make_world(cvat_server.site, frames=4)
    run(server, tmp_path / "whole", world)
    cvat_server.fail("GET", r"/data/?$", Drop(after=0), times=None, skip=3)
    with pytest.raises(ServerError, match="no answer"):
        run(server, tmp_path / "data", world, parallel=1)
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    assert len(manifest.items) == 3
    cvat_server.heal()
    with Server.connect(account(cvat_server.site)) as again:
        run(again, tmp_path / "data", world)
    assert tree(tmp_path / "data") == tree(tmp_path / "whole")


def test_the_server_may_list_in_any_order_and_in_small_pages(
    cvat_server: CvatStandin, server: Server, tmp_path: Path
) -> None:
    world = make_world(cvat_server.site, tasks=5)
    run(server, tmp_path / "a", world)
    cvat_server.page_size = 2
    run(server, tmp_path / "b", world)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_order_of_equal_shapes_is_the_servers(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=1)
    run(server, tmp_path / "data", world)
    ids = [shape["id"] for shape in cvat_server.shapes(world.jobs[0])]
    cvat_server.set_shape_order(world.jobs[0], ids[::-1])
    cvat_server.edit_shape(ids[1], occluded=True)  # the date moves on
    summary = run(server, tmp_path / "data", world)
    assert summary.written == 1
    assert read_label_map(tmp_path / "data/masks/0_normals.png")[18, 10] == 2


def test_what_makes_no_mask_is_counted(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site, tasks=1)
    with cvat_site.client() as client:
        line = {"type": "polyline", "label_id": world.labels["Земля"], "frame": 0, "points": [1.0, 1.0, 9.0, 9.0]}
        add_shapes(client, world.jobs[0], [line, line | {"frame": 1, "type": "points", "points": [3.0, 3.0]}])
        track = models.LabeledTrackRequest(
            frame=0,
            label_id=world.labels["Здание"],
            shapes=[models.TrackedShapeRequest(type="rectangle", frame=0, points=[1.0, 1.0, 9.0, 9.0], outside=False)],
        )
        client.jobs.retrieve(world.jobs[0]).update_annotations(
            models.PatchedLabeledDataRequest(tracks=[track]), action=AnnotationUpdateAction.CREATE
        )
    with Server.connect(account(cvat_site)) as server:
        summary = run(server, tmp_path / "data", world)
        again = run(server, tmp_path / "data", world)
    assert summary.skipped == again.skipped == {"polyline": 1, "points": 1, "track": 1}
    assert (summary.written, again.written) == (2, 0)


def test_a_frame_with_only_lines_is_not_taken_for_empty(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site, tasks=1, frames=3)
    with cvat_site.client() as client:
        client.jobs.retrieve(world.jobs[0]).remove_annotations()
        line = {"type": "polyline", "label_id": world.labels["Земля"], "frame": 1, "points": [1.0, 1.0, 9.0, 9.0]}
        add_shapes(client, world.jobs[0], [mask(world.labels["Земля"], 0, ground()), line])
    with Server.connect(account(cvat_site)) as server:
        summary = run(server, tmp_path / "data", world, rule={"empty": "background"})
        again = run(server, tmp_path / "data", world, rule={"empty": "background"})
    assert {item.source["frame"] for item in summary.manifest.items} == {0, 2}
    assert (summary.unpainted, again.unpainted, again.written) == (1, 1, 0)


def test_a_mask_that_somebody_changed_is_put_right(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=1)
    run(server, tmp_path / "data", world)
    before = tree(tmp_path / "data")
    (tmp_path / "data/masks/0_normals.png").write_bytes((tmp_path / "data/masks/1_normals.png").read_bytes())
    assert run(server, tmp_path / "data", world).written == 1
    assert tree(tmp_path / "data") == before


def test_attributes_make_no_other_mask(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site, tasks=1)
    run(server, tmp_path / "data", world)
    number = world.labels["Земля"]
    text = {"name": "model", "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
    server.patch_labels(world.project, [{"id": number, "name": "Земля", "color": "#b5793c", "attributes": [text]}])
    attribute = next(label for label in server.labels(project_id=world.project) if label.id == number)
    ground_shape = cvat_server.shapes(world.jobs[0])[0]
    values = [{"spec_id": attribute.attributes["model"], "value": "unet"}]
    cvat_server.edit_shape(ground_shape["id"], attributes=values)
    assert run(server, tmp_path / "data", world).written == 0


def test_a_renamed_label_is_noticed(cvat_site: Site, tmp_path: Path) -> None:
    world = make_world(cvat_site, tasks=1)
    with Server.connect(account(cvat_site)) as server, cvat_site.client() as client:
        run(server, tmp_path / "data", world)
        for name, other in (("Здание", "Сарай"), ("Растительность", "Здание"), ("Сарай", "Растительность")):
            number = label_ids(client, world.project)[name]
            server.patch_labels(world.project, [{"id": number, "name": other}])
        summary = run(server, tmp_path / "data", world)
        fresh = run(server, tmp_path / "fresh", world)
    assert summary.written == 1
    assert tree(tmp_path / "data") == tree(tmp_path / "fresh")
    assert fresh.manifest.items[0].pixels[5] == 256


def test_a_server_under_another_address_is_noticed(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site)
    run(server, tmp_path / "data", world)
    other = Account(
        url=cvat_server.url.replace("127.0.0.1", "localhost"),
        username=cvat_server.site.username,
        password=cvat_server.site.password,
    )
    with Server.connect(other) as renamed:
        with pytest.raises(DatasetError, match=rf"from {server.url} already.*--server-was {server.url}"):
            run(renamed, tmp_path / "data", world)
        cvat_server.forget()
        moved = run(renamed, tmp_path / "data", world, server_was=server.url)
    assert cvat_server.count("GET", r"/data/?$") == 0
    assert {item.source["server"] for item in moved.manifest.items} == {renamed.url}
    assert len(moved.manifest.items) == 4


def test_a_video_costs_only_itself(cvat_server: CvatStandin, server: Server, tmp_path: Path) -> None:
    world = make_world(cvat_server.site)
    cvat_server.store.tasks[world.tasks[0]].mode = "interpolation"
    summary = run(server, tmp_path / "data", world)
    assert summary.survey.not_images == 1
    assert {item.source["task"] for item in summary.manifest.items} == {world.tasks[1]}


def test_an_address_with_secrets_is_refused_without_repeating_them() -> None:
    for url in ("http://bob:s3cret@host", "http://host/?token=s3cret", "https://host/#s3cret", "bob:s3cret@host"):
        with pytest.raises(ConfigError, match="more than an address") as refused:
            Server.connect(Account(url=url, token="t"))
        assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b"[]", b'"x"'], ids=["html", "list", "text"])
def test_a_login_that_is_none_is_one_message(cvat_server: CvatStandin, body: bytes) -> None:
    cvat_server.fail("POST", r"/auth/login", Body(body), times=None)
    with pytest.raises(ServerError, match="something else than CVAT"):
        Server.connect(account(cvat_server.site))


def test_a_lost_login_is_tried_again(cvat_server: CvatStandin) -> None:
    cvat_server.fail("POST", r"/auth/login", Drop(after=None), times=1)
    with Server.connect(account(cvat_server.site)) as server:
        assert server.user() == cvat_server.site.username


@pytest.mark.parametrize("fault", [Status(502), Status(429, retry_after=0), Drop(after=3)], ids=str)
def test_an_export_survives_passing_faults(
    cvat_server: CvatStandin, server: Server, tmp_path: Path, fault: Any
) -> None:
    world = make_world(cvat_server.site, tasks=1)
    cvat_server.add_export("project", world.project, "LabelMe 3.0", b"archive" * 1000)
    cvat_server.fail("*", r"/dataset/export", fault, times=1)
    cvat_server.fail("GET", r"/api/requests", fault, times=1)
    cvat_server.fail("GET", r"download", fault, times=1)
    seen: list[int] = []
    server.export(tmp_path / "a.zip", format_name="LabelMe 3.0", project_id=world.project, on_bytes=seen.append)
    assert (tmp_path / "a.zip").read_bytes() == b"archive" * 1000
    assert sum(seen) == 7000


def test_a_changed_schema_paints_anew_without_downloading(
    cvat_server: CvatStandin, server: Server, tmp_path: Path
) -> None:
    world = make_world(cvat_server.site, tasks=1)
    small = LabelSchema.default().to_dict()
    small["labels"] = [label for label in small["labels"] if label["id"] != 6]
    rule = {"unknown": "void"}
    run(server, tmp_path / "data", world, schema=LabelSchema.from_dict(small, source="test"), rule=rule)
    cvat_server.forget()
    summary = run(server, tmp_path / "data", world)
    assert cvat_server.count("GET", r"/data/?$") == 0
    assert (summary.written, summary.unchanged) == (1, 1)
    assert read_label_map(tmp_path / "data/masks/0_normals.png")[5, 5] == 6


def test_grouping_by_the_file_name_is_checked_before_anything_is_downloaded(
    cvat_server: CvatStandin, server: Server, tmp_path: Path
) -> None:
    world = make_world(cvat_server.site, tasks=1)
    with pytest.raises(DatasetError, match=r"does not match 2 file name\(s\): 0_normals.jpg"):
        run(server, tmp_path / "data", world, plan={"group_by": r"^site(\d+)_"})
    assert cvat_server.count("GET", r"/data/?$") == 0


def test_a_project_that_does_not_exist_is_named(cvat_site: Site, tmp_path: Path) -> None:
    with (
        Server.connect(account(cvat_site)) as server,
        pytest.raises(ServerError, match=r"project 987654: there is none that this user can see.*CVAT_ORGANIZATION"),
    ):
        fetch(
            server,
            tmp_path / "data",
            selection=Selection(projects=(987654,)),
            rule=Rule(schema=LabelSchema.default()),
            plan=SplitPlan(),
            quiet=True,
        )


def test_a_schema_comes_from_the_project(cvat_site: Site) -> None:
    with cvat_site.client() as client:
        labels = [*LABELS, {"name": "Столб", "color": "#010203", "type": "any"}]
        project = site_project = cvat_site.make_project(client, "Метки", labels).id
    with Server.connect(account(cvat_site)) as server:
        schema = schema_of(server.labels(project_id=site_project), like=LabelSchema.default())
    assert project
    assert [(label.name, label.id) for label in schema.labels] == [
        ("Фон", 0), ("Земля", 2), ("Растительность", 5), ("Здание", 6), ("Столб", 1)
    ]  # fmt: skip
    assert schema.background is not None
    assert schema.labels[-1].color == (1, 2, 3)


def test_a_wrong_password_and_a_wrong_address_are_told_apart(cvat_server: CvatStandin) -> None:
    site = cvat_server.site
    with pytest.raises(ServerError, match=r"The password of '.*' is not accepted") as refused:
        Server.connect(Account(url=site.url, username=site.username, password="hunter2-secret"))
    assert "hunter2-secret" not in str(refused.value)
    with pytest.raises(ServerError, match="access token is not accepted"):
        Server.connect(Account(url=site.url, token="wrong-secret"))
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9: no answer .*refused"):
        Server.connect(Account(url="http://127.0.0.1:9", token="t"))
    with pytest.raises(ServerError, match="names no http:// or https://, so https:// was tried"):
        Server.connect(Account(url=cvat_server.url.removeprefix("http://"), token="t"))
    with pytest.raises(ConfigError, match="no address"):
        Server.connect(Account(url="ftp://cvat", token="t"))


def test_an_access_token_is_enough(cvat_server: CvatStandin) -> None:
    with Server.connect(Account(url=cvat_server.url, token=cvat_server.access_token)) as server:
        assert server.projects() == []
        assert server.version == "2.73.0"


def test_an_unknown_version_is_mentioned_once(cvat_server: CvatStandin, caplog: pytest.LogCaptureFixture) -> None:
    cvat_server.version = "3.1.0"
    with caplog.at_level(logging.WARNING), Server.connect(account(cvat_server.site)) as server:
        server.projects()
    assert [record.message for record in caplog.records if "3.1.0" in record.message] == [
        f"{cvat_server.url} is CVAT 3.1.0; this was made for 2.73 to 2.80 and may meet differences."
    ]


def test_secrets_are_in_no_representation() -> None:
    shown = repr(Account(url="http://x", username="u", password="pass-secret", token="token-secret"))
    assert "secret" not in shown


def test_a_token_may_write(cvat_server: CvatStandin) -> None:
    world = make_world(cvat_server.site, tasks=1)
    with Server.connect(Account(url=cvat_server.url, token=cvat_server.access_token)) as server:
        server.delete_shapes(world.jobs[0], server.annotations(world.jobs[0]).shapes)
    assert cvat_server.shapes(world.jobs[0]) == []


def test_shapes_with_a_long_mask_are_written_and_read(cvat_site: Site) -> None:
    world = make_world(cvat_site, tasks=1)
    with Server.connect(account(cvat_site)) as server, cvat_site.client() as client:
        before = server.annotations(world.jobs[0])
        server.delete_shapes(world.jobs[0], [s for s in before.shapes if s["type"] == "polygon"])
        after = server.annotations(world.jobs[0])
        assert [s["id"] for s in after.shapes] == [s["id"] for s in before.shapes if s["type"] == "mask"]
        assert json.dumps(job_shapes(client, world.jobs[0])[0]["points"]) == json.dumps(after.shapes[0]["points"])
