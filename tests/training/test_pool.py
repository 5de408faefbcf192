"""Which frames could be labelled next, and giving them to people: once, whatever happens on the way."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client
from executioner import Executioner, Killed
from PIL import Image

from cvat_standin import (
    CvatStandin,
    Drop,
    Site,
    Status,
    add_shapes,
    job_shapes,
    jobs_of,
    label_ids,
    make_ground_truth,
    make_task,
    polygon,
    set_state,
)
from sscloud.bundle import ModelBundle
from sscloud.errors import ConfigError, ServerError
from sscloud.labels import LabelSchema
from training.acquisition import Choice, PoolFrame
from training.cvat import Account, Server, Task
from training.detector import Detector
from training.handout import Handout, hand_out
from training.manifest import Manifest, ManifestItem
from training.pool import find_marks, folder_pool, known_frames, mark_text, server_pool
from training.prelabel import Report, Selection, prelabel
from training.prelabel_store import FrameRecord, PrelabelStore, ServerRun
from training.splits import Split

LABELS = [{"name": label.name, "type": "any"} for label in LabelSchema.default().labels]
TRIANGLE = [1.0, 1.0, 40.0, 1.0, 40.0, 30.0]
NAME = "To label 2026-11-23 (street v4)"


def picture(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch, short_pauses: None) -> None:
    monkeypatch.setattr("training.handout.PAUSE", 0.01)


class MortalServer(Server):
    """Dies before and after it changes something."""

    executioner: Executioner

    def create_task(self, name: str, *, project_id: int, segment_size: int) -> Task:
        self.executioner.step()
        task = super().create_task(name, project_id=project_id, segment_size=segment_size)
        self.executioner.step()
        return task

    def upload(self, task_id: int, files: Sequence[Path]) -> None:
        self.executioner.step()
        super().upload(task_id, files)
        self.executioner.step()

    def delete_task(self, task_id: int) -> None:
        self.executioner.step()
        super().delete_task(task_id)
        self.executioner.step()

    def create_issue(self, job_id: int, *, frame: int, position: Sequence[float], text: str) -> None:
        self.executioner.step()
        super().create_issue(job_id, frame=frame, position=position, text=text)
        self.executioner.step()

    def assign(self, job_id: int, user_id: int) -> None:
        self.executioner.step()
        super().assign(job_id, user_id)
        self.executioner.step()


class Town:
    """A project with two tasks: one a job a frame, one a job for all; and folders in the names."""

    def __init__(self, site: Site, client: Client, folder: Path, *, small: bool = False) -> None:
        self.site, self.client = site, client
        self.project = site.make_project(client, "Улица", LABELS).id
        self.labels = label_ids(client, self.project)
        self.single = make_task(client, self.project, {f"{n}.png": picture(n) for n in range(3)}, segment_size=1).id
        if not small:
            self.joint = make_task(client, self.project, {f"a/{n}.png": picture(10 + n) for n in range(4)}).id
        self.store = folder / "store"
        self.kill_after: int | None = None

    def connect(self) -> MortalServer:
        account = Account(url=self.site.url, username=self.site.username, password=self.site.password)
        server = MortalServer.connect(account)
        assert isinstance(server, MortalServer)
        server.executioner = Executioner(self.kill_after)
        return server

    def pool(self, **options: Any) -> list[PoolFrame]:
        with self.connect() as server:
            store = PrelabelStore(self.store, server=server.url)
            return server_pool(server, store, project=self.project, **options)

    def draw(self, task: int, frame: int, **more: Any) -> None:
        jobs = jobs_of(self.client, task)
        job = jobs[frame] if len(jobs) > 1 else jobs[0]
        add_shapes(self.client, job, [polygon(self.labels["Здание"], frame, TRIANGLE, **more)])

    def hand_out(self, places: Sequence[tuple[int, int]], *, kill_after: int | None = None, **options: Any) -> Handout:
        """Hand out frames (task, number)."""
        self.kill_after = kill_after
        options = {"assignee": None, "way": "auto", "name": NAME, **options}
        with self.connect() as server:
            jobs = {task: server.jobs(task) for task, _ in places}
            choices = []
            for task, number in places:
                [job] = [job for job in jobs[task] if job.start <= number <= job.stop and job.type == "annotation"]
                choices.append(choose(server, task, job.id, number, alone=job.start == job.stop))
            return hand_out(server, choices, project=self.project, **options)

    def tasks(self) -> dict[int, str]:
        with self.connect() as server:
            return {task.id: task.name for task in server.tasks(self.project)}


def choose(server: Server, task: int, job: int, number: int, *, alone: bool) -> Choice:
    frame = server.frames(task)[number]
    data = server.image(task, number)
    return Choice(
        frame=PoolFrame(name=frame.name, read=lambda: data, task=task, job=job, number=number, alone=alone),
        sha256=hashlib.sha256(data).hexdigest(),
        size_hw=frame.size_hw,
        score=1.0,
        entropy=1.0,
        information=0.5,
        novelty=1.0,
        reason="The model is unsure about Конструкции.",
        focus_xyxy=(8.0, 4.0, 24.0, 12.0),
    )


@pytest.fixture
def town(cvat_site: Site, tmp_path: Path) -> Iterator[Town]:
    with cvat_site.client() as client:
        yield Town(cvat_site, client, tmp_path)


@pytest.fixture
def users(cvat_site: Site, cvat_server: CvatStandin) -> CvatStandin:
    """The stand-in itself, with other users."""
    if cvat_site.live:
        pytest.skip("needs users of its own, or faults")
    cvat_server.store.users.update({2: "anna", 3: "boris"})
    return cvat_server


class TestPool:
    def test_untouched_frames_of_open_jobs(self, town: Town) -> None:
        frames = town.pool()

        assert [(frame.task, frame.number, frame.alone) for frame in frames] == [
            *((town.single, number, True) for number in range(3)),
            *((town.joint, number, False) for number in range(4)),
        ]
        assert frames[1].name == "1.png"

    def test_peoples_work_finished_jobs_ground_truth_and_deleted_frames_are_left_out(self, town: Town) -> None:
        jobs = jobs_of(town.client, town.single)
        set_state(town.client, jobs[0], state="completed")
        set_state(town.client, jobs[1], state="in progress")
        town.draw(town.single, 2)
        town.draw(town.joint, 0, source="auto")
        make_ground_truth(town.client, town.joint, [1])
        town.client.tasks.retrieve(town.joint).remove_frames_by_ids([3])
        left_out: Counter[str] = Counter()

        frames = town.pool(left_out=left_out)

        assert [(frame.task, frame.number) for frame in frames] == [(town.single, 1), (town.joint, 2)]
        assert left_out == {
            "of jobs that are completed": 1,
            "with people's work": 1,
            "with a model's shapes that the store of pre-labels does not know": 1,
            "of ground-truth jobs": 1,
        }

    def test_pre_labels_that_nobody_has_touched_are_nobodys_work(self, town: Town, tiny_bundle: ModelBundle) -> None:
        with town.connect() as server, PrelabelStore(town.store, server=server.url) as store:
            job = jobs_of(town.client, town.joint)[0]
            detector = Detector(tiny_bundle, device="cpu", min_area=60)
            prelabel(server, store, detector, selection=Selection(jobs=(job,)), report=Report(model=""), quiet=True)
            record = store.load(job)
            # Frame 1 was being drawn anew when the run was killed: the new shapes have not come.
            old = record.of(1)
            store.save(job, record.put(1, FrameRecord(drawn=old.drawn, next=record.of(2).drawn)))
        shapes = job_shapes(town.client, job)
        with town.connect() as server:
            [first, *_] = [shape for shape in server.annotations(job).shapes if shape["frame"] == 3]
            server.delete_shapes(job, [first])  # a person
        assert {shape["frame"] for shape in shapes} == {0, 1, 2, 3}

        frames = [frame for frame in town.pool() if frame.task == town.joint]

        assert [frame.number for frame in frames] == [0, 1, 2]
        with PrelabelStore(town.store, server=town.site.url) as store:
            run = ServerRun(function="f", model="m")
            record = store.load(job)
            store.save(job, type(record)(frames=record.frames, run=run))
        left_out: Counter[str] = Counter()
        assert [frame for frame in town.pool(left_out=left_out) if frame.task == town.joint] == []
        assert left_out == {"of jobs that a function may be at work in": 4}

    def test_what_was_handed_out_is_left_out_and_so_are_its_copies(self, town: Town) -> None:
        handed = town.hand_out([(town.single, 0), (town.joint, 1)], way="task")
        left_out: Counter[str] = Counter()

        frames = town.pool(left_out=left_out, labelled=["0" * 64])

        assert left_out == {"handed out before": 2}
        assert handed.task not in {frame.task for frame in frames}
        # The originals are found out by their bytes.
        originals = {hashlib.sha256(picture(0)).hexdigest(), hashlib.sha256(picture(11)).hexdigest()}
        assert frames[0].taken == {*originals, "0" * 64}
        for job in handed.jobs:
            set_state(town.client, job, state="completed")
        assert frames[0].taken == town.pool(labelled=["0" * 64])[0].taken

    def test_what_is_handed_out_or_labelled_is_known(self, town: Town, tmp_path: Path) -> None:
        handed = town.hand_out([(town.single, 0), (town.joint, 1)], way="task")
        (tmp_path / "imgs").mkdir()
        items = []
        for number, split in enumerate(("train", "test", "validation", None)):
            (tmp_path / "imgs" / f"{number}.png").write_bytes(picture(50 + number))
            items.append(item(f"{number}", task=town.joint if number else 99, split=split))
        # One of those that were handed out has come back, labelled.
        items[2] = replace(items[2], image_sha256=hashlib.sha256(picture(11)).hexdigest())
        manifest = Manifest(schema=LabelSchema.default(), items=tuple(items))

        with town.connect() as server:
            marks = find_marks(server, server.tasks(town.project))
            known = known_frames(server, marks, manifest, tmp_path / "imgs", most=3, tasks={town.joint})
            assert [frame.task for frame in known] == [handed.task, None, None]
            assert known[0].read() == picture(0)
        assert {frame.name for frame in known[1:]} == {"2.png", "3.png"}  # of the pool's tasks, and not the test's

    def test_a_folder(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.png"):
            (tmp_path / name).write_bytes(picture(1))
        frames = folder_pool(tmp_path.iterdir(), taken=["x"])
        assert [(frame.name, frame.task, frame.alone) for frame in frames] == [
            ("a.png", None, False),
            ("b.png", None, False),
        ]
        assert frames[0].read() == picture(1)
        assert frames[0].taken == {"x"}


def item(name: str, *, task: int, split: Split | None) -> ManifestItem:
    return ManifestItem(
        name=name,
        image=f"{name}.png",
        mask=f"{name}.png",
        size_hw=(64, 128),
        image_sha256=name.rjust(64, "0"),
        mask_sha256=name.rjust(64, "0"),
        pixels={2: 64 * 128},
        people_pixels=64 * 128,
        auto_pixels=0,
        source={"kind": "cvat", "task": task},
        recipe="",
        group=name,
        split=split,
    )


def state_of(town: Town) -> list[Any]:
    """What was handed out, without the numbers."""
    with town.connect() as server:
        tasks = server.tasks(town.project)
        names = {task.id: task.name for task in tasks}
        jobs = {job.id: job for task in tasks for job in server.jobs(task.id)}
        marks = sorted((names[mark.task], mark.frame, mark.sha256) for mark in find_marks(server, tasks))
        frames = sorted((task.name, frame.number, frame.name) for task in tasks for frame in server.frames(task.id))
        assigned = sorted((names[job.task_id], job.start, job.assignee) for job in jobs.values() if job.assignee)
        return [frames, marks, assigned]


class TestHandOut:
    def test_the_jobs_that_the_frames_are_in(self, town: Town, users: CvatStandin) -> None:
        jobs = jobs_of(town.client, town.single)
        with town.connect() as server:
            server.assign(jobs[2], server.find_user("boris"))

        handed = town.hand_out([(town.single, 2), (town.single, 0)], assignee="anna")

        assert (handed.way, handed.task, handed.jobs) == ("jobs", None, (jobs[0], jobs[2]))
        assert handed.notes == (f"Job {jobs[2]} stays with boris, who has it already.",)
        with town.connect() as server:
            assert [server.job(job).assignee for job in jobs] == ["anna", None, "boris"]
            remarks = server.remarks(town.single)
        sha256 = hashlib.sha256(picture(2)).hexdigest()
        assert [(remark.job, remark.frame) for remark in remarks] == [(jobs[2], 2), (jobs[0], 0)]
        assert remarks[0].text == f"The model is unsure about Конструкции.\n{mark_text(NAME, sha256)}"
        issue = next(iter(users.store.issues.values()))
        assert issue.position == [8, 4, 24, 4, 24, 12, 8, 12]
        assert len(town.tasks()) == 2

    def test_a_task_of_copies(self, town: Town) -> None:
        other = make_task(town.client, town.project, {"0.png": picture(30)}, name="Другая").id
        places = [(town.single, 0), (town.joint, 3), (other, 0)]

        handed = town.hand_out(places)

        assert handed.way == "task"
        assert handed.task is not None
        assert town.tasks()[handed.task] == NAME
        with town.connect() as server:
            frames = server.frames(handed.task)
            assert [frame.name for frame in frames] == ["0.png", "0_1.png", "a/3.png"]
            assert [server.image(handed.task, n) for n in range(3)] == [picture(0), picture(30), picture(13)]
            assert [(job.start, job.stop) for job in server.jobs(handed.task)] == [(0, 0), (1, 1), (2, 2)]
            marks = find_marks(server, [server.task(handed.task)])
        assert [mark.sha256 for mark in marks] == [hashlib.sha256(picture(seed)).hexdigest() for seed in (0, 30, 13)]
        assert handed.jobs == tuple(mark.job for mark in marks)

    def test_a_second_time_changes_nothing(self, town: Town) -> None:
        places = [(town.single, 0), (town.joint, 3)]
        first = town.hand_out(places)
        before = state_of(town)

        assert town.hand_out(places) == first
        assert state_of(town) == before
        # Others were chosen this time: what was handed out by this name stays as it is.
        assert town.hand_out([(town.single, 1), (town.single, 2)]) == first
        assert state_of(town) == before
        jobs = town.hand_out([(town.single, 1)], name="Another")
        assert town.hand_out([(town.single, 2)], name="Another") == jobs

    @pytest.mark.parametrize("way", ["jobs", "task"])
    def test_killed_anywhere_it_ends_in_the_same_state(
        self, town: Town, users: CvatStandin, tmp_path: Path, way: str
    ) -> None:
        def fresh() -> Town:
            return Town(town.site, town.client, tmp_path, small=True)

        def run(town: Town, **options: Any) -> Handout:
            return town.hand_out([(town.single, 0), (town.single, 2)], assignee="anna", way=way, **options)

        whole = fresh()
        run(whole)
        expected = state_of(whole)
        for step in range(2, 100, 2):  # after every change; before the next one is the same moment
            killed = fresh()
            try:
                run(killed, kill_after=step)
            except Killed:
                run(killed)
                assert state_of(killed) == expected, step
            else:
                break
        assert step > (8 if way == "jobs" else 12)

    def test_a_broken_upload_is_made_anew(self, town: Town, users: CvatStandin) -> None:
        with town.connect() as server:
            broken = server.create_task(NAME, project_id=town.project, segment_size=1)
        users.store.tasks[broken.id].files["0.png"] = b"half of it"

        handed = town.hand_out([(town.single, 0)], way="task")

        assert list(town.tasks().values()).count(NAME) == 1
        assert handed.task != broken.id
        assert (NAME, 0, "0.png") in state_of(town)[0]

    @pytest.mark.parametrize("fault", [Drop(), Status(502)])
    def test_lost_answers(self, town: Town, users: CvatStandin, fault: Any) -> None:
        for method, path in (("POST", r"/api/tasks/?$"), ("POST", r"/api/issues/?$"), ("PATCH", r"/api/jobs/\d+$")):
            users.fail(method, path, fault)
        town.hand_out([(town.single, 0)], way="task", assignee="anna")

        assert list(town.tasks().values()).count(NAME) == 1
        assert len(users.store.issues) == 1
        assert state_of(town)[2] == [(NAME, 0, "anna")]

    def test_refusals(self, town: Town, users: CvatStandin) -> None:
        with pytest.raises(ServerError, match=r"user 'nobody': there is none that this user can see"):
            town.hand_out([(town.single, 0)], assignee="nobody")
        with pytest.raises(ConfigError, match=r"a/1.png \(task \d+, frame 1\) is not alone in a job of its own"):
            town.hand_out([(town.joint, 1)], way="jobs")
        with pytest.raises(ConfigError, match="no panorama was chosen"):
            town.hand_out([])
        with pytest.raises(ConfigError, match=r"must be a line of at most 200 letters"):
            town.hand_out([(town.single, 0)], name="a]; image b")
        assert users.store.issues == {}
        assert len(town.tasks()) == 2

    def test_a_file_that_has_changed_is_not_handed_out(self, town: Town, tmp_path: Path) -> None:
        with town.connect() as server:
            choice = choose(server, town.single, jobs_of(town.client, town.single)[0], 0, alone=True)
        path = tmp_path / "0.png"
        path.write_bytes(b"another")
        local = PoolFrame(name="0.png", read=path.read_bytes, path=path)
        changed = Choice(**{**{name: getattr(choice, name) for name in Choice.__slots__}, "frame": local})
        with town.connect() as server, pytest.raises(ServerError, match=r"0.png has changed since it was chosen"):
            hand_out(server, [changed], project=town.project, assignee=None, way="auto", name=NAME)


def test_strange_comments_are_no_marks(town: Town, users: CvatStandin, cvat_server: CvatStandin) -> None:
    texts = ["", "[sscloud select: x; image 12]", f"look {mark_text('Х; у', 'a' * 64)} and {mark_text('z', 'b' * 64)}"]
    with town.connect() as server:
        [job, *_] = jobs_of(town.client, town.joint)
        for text in texts[1:]:
            server.create_issue(job, frame=1, position=(1, 2, 3, 4), text=text)
        marks = find_marks(server, server.tasks(town.project))
    assert [(mark.name, mark.sha256[0], mark.frame) for mark in marks] == [("Х; у", "a", 1), ("z", "b", 1)]
