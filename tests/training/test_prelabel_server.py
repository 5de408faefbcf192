"""Pre-labels by CVAT's automatic annotation: one request a job, nothing of people's is touched, nothing drawn twice."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client, models
from cvat_standin import (
    CvatStandin,
    Drop,
    Function,
    Status,
    add_shapes,
    job_shapes,
    jobs_of,
    label_ids,
    make_task,
    polygon,
)
from PIL import Image

from sscloud.errors import ConfigError, SchemaError
from sscloud.labels import LabelSchema
from training.cvat import Account, FunctionRun, Server
from training.prelabel import Report, Selection
from training.prelabel_server import choose_function, prelabel_by_server
from training.prelabel_store import JobRecord, PrelabelStore, identity

pytestmark = pytest.mark.usefixtures("short_pauses")

TEXT = {"mutable": False, "input_type": "text", "values": [""]}
ATTRIBUTES = [{"name": name, "default_value": "", **TEXT} for name in ("model", "confidence")]
LABELS: list[dict[str, Any]] = [
    {"name": "Земля", "attributes": ATTRIBUTES},
    {"name": "Транспорт", "attributes": ATTRIBUTES},
    {"name": "Фон"},
]
SPEC = [
    {
        "name": name,
        "type": "mask",
        "attributes": [{"name": a, "input_type": "text", "values": [""]} for a in ("model", "confidence")],
    }
    for name in ("Земля", "Обстановка", "Здание")
]
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 9.0, 7.0]
REQUESTS = r"/api/lambda/requests$"


class Killed(BaseException):
    """The end of a process, in the middle of its work."""


class Executioner:
    """Ends a run after so many steps."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    def step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise Killed


class MortalServer(Server):
    """Dies before and after requests that change something; tells when a run was asked for."""

    executioner: Executioner
    on_poll: Callable[[FunctionRun | None], None]
    polled = False

    def start_function(self, *args: Any, **options: Any) -> FunctionRun:
        self.executioner.step()
        run = super().start_function(*args, **options)
        self.executioner.step()
        return run

    def delete_shapes(self, *args: Any, **options: Any) -> None:
        self.executioner.step()
        super().delete_shapes(*args, **options)
        self.executioner.step()

    def function_run(self, run_id: str) -> FunctionRun | None:
        if not self.polled:  # how often it is asked depends on the clock
            self.executioner.step()
        self.polled = True
        run = super().function_run(run_id)
        self.on_poll(run)
        return run


class MortalStore(PrelabelStore):
    """Dies before and after it writes."""

    executioner: Executioner

    def save(self, job: int, record: JobRecord) -> None:
        self.executioner.step()
        super().save(job, record)
        self.executioner.step()


@dataclass(kw_only=True)
class Model:
    """A function in the stand-in's memory: a square for each of its labels, elsewhere in each version."""

    version: int = 3
    fail: list[int] = field(default_factory=list)
    """Calls, counted from 1, that fail."""
    gate: threading.Event | None = None
    """Calls wait for it."""
    seconds: float = 0.0
    """A call takes so long."""
    calls: int = 0

    def __call__(self, image: bytes, payload: dict[str, Any]) -> list[dict[str, Any]]:
        self.calls += 1
        if self.gate is not None:
            self.gate.wait(30)
        time.sleep(self.seconds)
        if self.calls in self.fail:
            raise RuntimeError("out of memory")
        left = self.version
        attributes = [{"name": "model", "value": self.title}, {"name": "confidence", "value": "0.75"}]
        return [
            {
                "label": entry["name"],
                "type": "mask",
                "mask": [1, 1, 1, 0, left, row, left + 1, row + 1],
                "attributes": attributes,
            }
            for row, entry in enumerate(SPEC)
        ]

    @property
    def title(self) -> str:
        return f"Улица v{self.version}"


class Bench:
    """A project of a task with two jobs, a function, and the means to run it."""

    def __init__(
        self, cvat: CvatStandin, client: Client, store: Path, *, frames: int = 3, segment_size: int = 2
    ) -> None:
        self.cvat, self.client, self.store = cvat, client, store
        self.project = cvat.site.make_project(client, "Улица", LABELS).id
        self.labels = label_ids(client, self.project)
        pictures = {f"{number:03}.png": _picture(number) for number in range(frames)}
        self.task = make_task(client, self.project, pictures, segment_size=segment_size).id
        self.jobs = jobs_of(client, self.task)
        self.first, self.second = self.jobs[0], self.jobs[-1]
        self.model = self.deploy(Model())
        self.on_poll: Callable[[FunctionRun | None], None] = lambda _: None

    def deploy(self, model: Model, name: str = "unet") -> Model:
        self.cvat.add_function(Function(id=name, name=model.title, version=model.version, labels=SPEC, handler=model))
        return model

    def run(self, *, kill_after: int | None = None, report: Report | None = None, **options: Any) -> Report:
        report = report or Report(model="")
        site = self.cvat.site
        account = Account(url=site.url, username=site.username, password=site.password)
        selection = options.pop("selection", Selection(tasks=(self.task,)))
        with MortalServer.connect(account) as server, MortalStore(self.store, server=server.url) as store:
            assert isinstance(server, MortalServer)
            server.executioner = store.executioner = Executioner(kill_after)
            server.on_poll = self.on_poll
            prelabel_by_server(
                server, store, selection=selection, schema=LabelSchema.default(), report=report, quiet=True, **options
            )
        return report

    def shapes(self, job: int) -> list[dict[str, Any]]:
        return job_shapes(self.client, job)

    def looks(self) -> dict[int, list[tuple[int, str]]]:
        """What is drawn, without the numbers."""
        return {job: sorted((shape["frame"], identity(shape)) for shape in self.shapes(job)) for job in self.jobs}

    def requests(self) -> list[dict[str, Any]]:
        return [logged.json for logged in self.cvat.find("POST", REQUESTS)]

    def delete_all(self) -> None:
        """As if nothing had ever been drawn."""
        with self.cvat.store.lock:
            self.cvat.store.clear([self.cvat.store.job(job) for job in self.jobs])
        for path in self.store.rglob("*.json"):
            path.unlink()


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def bench(cvat_server: CvatStandin, tmp_path: Path) -> Iterator[Bench]:
    with cvat_server.site.client() as client:
        yield Bench(cvat_server, client, tmp_path / "store")


def test_one_request_a_job_with_labels_that_meet(bench: Bench) -> None:
    report = bench.run(threshold=0.25)
    assert (report.model, report.drawn, report.shapes, report.failed) == ("Улица v3", 3, 6, [])
    assert set(report.unmet) == {"Здание"}
    both = {"model": "model", "confidence": "confidence"}
    for job, request in zip(bench.jobs, bench.requests(), strict=True):
        assert request == {
            "function": "unet",
            "task": bench.task,
            "job": job,
            "threshold": 0.25,
            "cleanup": False,
            "mapping": {
                "Земля": {"name": "Земля", "attributes": both},
                "Обстановка": {"name": "Транспорт", "attributes": both},
            },
        }
        shapes = bench.shapes(job)
        assert {shape["label_id"] for shape in shapes} == {bench.labels["Земля"], bench.labels["Транспорт"]}
        assert {value["value"] for shape in shapes for value in shape["attributes"]} == {"Улица v3", "0.75"}


def test_a_second_run_changes_nothing(bench: Bench) -> None:
    bench.run()
    before = {job: bench.shapes(job) for job in bench.jobs}
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.already) == (0, 3)
    assert {job: bench.shapes(job) for job in bench.jobs} == before
    assert len(bench.requests()) == 2


@pytest.mark.parametrize("source", ["manual", "auto"])
def test_jobs_with_peoples_work_are_left_alone(bench: Bench, source: str) -> None:
    add_shapes(bench.client, bench.first, [polygon(bench.labels["Земля"], 1, TRIANGLE, source=source)])
    before = bench.shapes(bench.first)
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.people) == (1, 1)
    assert any("people's work" in reason for reason in report.jobs_left_out)
    assert bench.shapes(bench.first) == before
    assert [request["job"] for request in bench.requests()] == [bench.second]


@pytest.mark.parametrize("deleted", [False, True])
def test_touched_pre_labels_are_peoples_work(bench: Bench, *, deleted: bool) -> None:
    """`source` stays auto when a person cuts pixels from a mask."""
    bench.run()
    shape = bench.cvat.shapes(bench.first)[0]
    if deleted:
        with bench.cvat.store.lock:
            job = bench.cvat.store.job(bench.first)
            job.shapes = job.shapes[1:]
    else:
        bench.cvat.edit_shape(shape["id"], points=[0.0, 1.0, 3.0, 0.0, 3.0, 0.0])
    before = bench.shapes(bench.first)
    bench.deploy(Model(version=4))
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.people) == (1, 1)
    assert bench.shapes(bench.first) == before


def test_another_models_pre_labels_are_replaced_when_asked(bench: Bench) -> None:
    bench.run()
    before = bench.looks()
    bench.deploy(Model(version=4))
    report = bench.run()
    assert (report.drawn, report.other_model) == (0, 3)
    assert bench.looks() == before
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.failed) == (3, [])
    for job in bench.jobs:
        assert {value["value"] for shape in bench.shapes(job) for value in shape["attributes"]} == {"Улица v4", "0.75"}
    assert not any(request["cleanup"] for request in bench.requests())


def test_a_failure_costs_one_job_and_is_tried_again(bench: Bench) -> None:
    bench.model.fail = [2]
    report = bench.run()
    assert (report.drawn, report.failed) == (3, [])
    assert len(report.notes) == 1
    assert "500 Server Error" in report.notes[0]
    assert [request["job"] for request in bench.requests()] == [bench.first, bench.first, bench.second]
    assert len(bench.shapes(bench.first)) == 4


def test_what_never_works_is_reported(bench: Bench) -> None:
    bench.model.fail = [1, 2]
    report = bench.run(retries=1)
    assert report.drawn == 1
    assert len(report.failed) == 1
    assert f"job {bench.first}: unet failed" in report.failed[0]
    assert bench.shapes(bench.first) == []
    assert bench.run().drawn == 2


def test_a_failed_run_leaves_nothing_behind(cvat_server: CvatStandin, tmp_path: Path) -> None:
    """CVAT writes the first hundred frames before it comes to the one that fails."""
    with cvat_server.site.client() as client:
        bench = Bench(cvat_server, client, tmp_path / "store", frames=103, segment_size=0)
        bench.model.fail = [103, 206]
        report = bench.run(retries=1)
        assert len(report.failed) == 1
        assert bench.shapes(bench.first) == []
        assert bench.run().drawn == 103
        assert len(bench.shapes(bench.first)) == 206


def test_another_run_in_the_task_is_respected(bench: Bench) -> None:
    bench.model.gate = threading.Event()
    request = models.FunctionCallRequest(function="unet", task=bench.task)
    bench.client.api_client.lambda_api.create_requests(function_call_request=request)
    report = bench.run()
    assert len(report.failed) == 2
    assert f"unet is at work in task {bench.task} (the whole task)" in report.failed[0]
    assert len(bench.requests()) == 1
    bench.model.gate.set()


def test_a_conflict_in_the_last_moment_is_respected(bench: Bench) -> None:
    bench.cvat.fail("POST", REQUESTS, Status(409), before=True, times=None)
    report = bench.run()
    assert len(report.failed) == 2
    assert "something is under way there already (HTTP 409" in report.failed[0]
    bench.cvat.heal()
    assert bench.run().drawn == 3


@pytest.mark.parametrize("before", [False, True])
def test_a_lost_answer_starts_nothing_twice(bench: Bench, *, before: bool) -> None:
    bench.cvat.fail("POST", REQUESTS, Drop(after=None), before=before)
    report = bench.run()
    assert (report.drawn, report.failed) == (3, [])
    assert len(bench.requests()) == (3 if before else 2)
    assert bench.model.calls == 3


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_anywhere_and_run_again(bench: Bench, *, replacing: bool) -> None:
    """Between any two of its steps: it ends in the same shapes as a run that nobody killed."""
    selection = Selection(jobs=(bench.second,))
    bench.model.seconds = 0.1
    steps = 0
    expected: dict[int, list[tuple[int, str]]] = {}
    while True:
        steps += 1
        bench.delete_all()
        if replacing:
            bench.deploy(Model(version=3))
            bench.run(selection=selection)
            bench.deploy(Model(version=4, seconds=0.1))
        try:
            bench.run(kill_after=steps, selection=selection, replace_auto=replacing)
            break
        except Killed:
            report = bench.run(selection=selection, replace_auto=replacing)
            assert (report.failed, report.people) == ([], 0), f"step {steps}"
            expected = expected or bench.looks()
            assert bench.looks() == expected, f"step {steps}"
            assert bench.run(selection=selection).already == 1
    assert bench.looks() == expected
    assert len(expected[bench.second]) == 2
    assert steps > 8


def test_somebody_who_is_faster_than_the_notes(bench: Bench) -> None:
    """What was changed between the end of the run and the question what it has drawn counts as people's work."""

    bench.model.gate = gate = threading.Event()

    def touch(run: FunctionRun | None) -> None:
        gate.set()
        if run is not None and run.status == "finished" and run.job == bench.first:
            bench.cvat.edit_shape(bench.cvat.shapes(bench.first)[0]["id"], points=[0.0, 1.0, 3.0, 0.0, 3.0, 0.0])

    bench.on_poll = touch
    report = bench.run()
    assert report.drawn == 3
    assert any(f"Job {bench.first} was changed" in note for note in report.notes)
    before = bench.shapes(bench.first)
    bench.deploy(Model(version=4))
    assert bench.run(replace_auto=True).people == 2
    assert bench.shapes(bench.first) == before


def test_ctrl_c_leaves_the_run_alone(bench: Bench) -> None:
    bench.model.gate = threading.Event()

    def interrupt(_: FunctionRun | None) -> None:
        raise KeyboardInterrupt

    bench.on_poll = interrupt
    report = Report(model="")
    with pytest.raises(KeyboardInterrupt):
        bench.run(report=report)
    assert any("The server goes on with job" in note for note in report.notes)
    assert bench.cvat.count("DELETE", r"/api/lambda") == 0
    bench.on_poll = lambda _: None
    bench.model.gate.set()
    assert bench.run().drawn == 3
    assert bench.model.calls == 3


def test_a_cancelled_run_is_said(bench: Bench) -> None:
    bench.model.gate = gate = threading.Event()

    def cancel(run: FunctionRun | None) -> None:
        if run is not None and not gate.is_set():
            bench.cvat.lambdas.cancel(run.id)
            gate.set()

    bench.on_poll = cancel
    report = bench.run()
    assert len(report.failed) == 1
    assert "somebody has cancelled it, perhaps" in report.failed[0]
    assert report.drawn == 1


def test_which_function(bench: Bench) -> None:
    other = [{"name": "Кошка", "type": "mask"}]
    bench.cvat.add_function(Function(id="cats", labels=other, handler=bench.model))
    bench.cvat.add_function(Function(id="sam", labels=SPEC, handler=bench.model, kind="interactor"))
    assert bench.run(function="unet", selection=Selection(jobs=(bench.second,))).drawn == 1
    assert bench.run().drawn == 2
    with pytest.raises(ConfigError, match=r"CVAT lists no detector 'sam'; it lists: unet \(Улица v3\), cats"):
        bench.run(function="sam")
    with pytest.raises(SchemaError, match=r"None of the model's labels \(Кошка\) is a label of task"):
        bench.run(function="cats")
    bench.deploy(Model(version=4), "unet-4")
    with pytest.raises(ConfigError, match="Several functions have labels of these tasks: unet, unet-4"):
        bench.run()
    with pytest.raises(SchemaError, match="nothing would be drawn"):
        _choose(bench, "cats")


def _choose(bench: Bench, *keep: str) -> None:
    from training.prelabel import select

    site = bench.cvat.site
    with Server.connect(Account(url=site.url, username=site.username, password=site.password)) as server:
        work = select(server, Selection(tasks=(bench.task,)), Report(model=""), quiet=True)
        functions = [function for function in server.functions() if function.id in keep]
        choose_function(functions, work, schema=LabelSchema.default(), name=None)
