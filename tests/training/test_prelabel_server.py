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
from executioner import Executioner, Killed
from PIL import Image

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


class MortalServer(Server):
    """Dies before and after requests that change something; tells when a run was asked for."""

    executioner: Executioner
    on_poll: Callable[[FunctionRun | None], object]
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
    on_call: Callable[[int], object] = lambda _: None
    """Told the number of a call, from 1, while it goes on."""
    calls: int = 0

    def __call__(self, image: bytes, payload: dict[str, Any]) -> list[dict[str, Any]]:
        self.calls += 1
        if self.gate is not None:
            self.gate.wait(30)
        self.on_call(self.calls)
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
        self.on_poll: Callable[[FunctionRun | None], object] = lambda _: None
        self.polls = 0

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
            server.on_poll = self._poll
            prelabel_by_server(
                server, store, selection=selection, schema=LabelSchema.default(), report=report, quiet=True, **options
            )
        return report

    def _poll(self, run: FunctionRun | None) -> None:
        self.polls += 1
        self.on_poll(run)

    def wait_until_seen(self) -> None:
        """Return when what is in the job now has been looked at."""
        polls = self.polls  # the job is looked at after each
        for _ in range(4000):
            if self.polls > polls + 1:
                return
            time.sleep(0.005)
        raise TimeoutError("nobody looks")

    def wait_for_end(self) -> None:
        """Return when all runs have ended."""
        for run in list(self.cvat.lambdas.runs.values()):
            assert run.thread is not None
            run.thread.join(30)

    def correct(self) -> dict[str, Any]:
        """A person's correction of the first shape of the first job → the shape."""
        number = self.cvat.shapes(self.first)[0]["id"]
        self.cvat.edit_shape(number, points=[0.0, 1.0, 3.0, 0.0, 3.0, 0.0])
        return next(shape for shape in self.cvat.shapes(self.first) if shape["id"] == number)

    def shapes(self, job: int) -> list[dict[str, Any]]:
        return job_shapes(self.client, job)

    def looks(self) -> dict[int, list[tuple[int, str]]]:
        """What is drawn, without the numbers."""
        return {job: sorted((shape["frame"], identity(shape)) for shape in self.shapes(job)) for job in self.jobs}

    def attribute(self, label: str, name: str) -> int:
        """Number of a label's attribute."""
        with self.cvat.store.lock:
            attributes = self.cvat.store.label(self.labels[label]).attributes
        return next(attribute.id for attribute in attributes if attribute.name == name)

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


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a test takes, it looks often enough."""
    monkeypatch.setattr("training.prelabel_witness.SOON", 600.0)


@pytest.fixture
def bench(cvat_server: CvatStandin, tmp_path: Path) -> Iterator[Bench]:
    with cvat_server.site.client() as client:
        yield Bench(cvat_server, client, tmp_path / "store")


@pytest.fixture
def long_bench(cvat_server: CvatStandin, tmp_path: Path) -> Iterator[Bench]:
    """A job of 103 frames: CVAT writes after frame 100, in call 101, and at the end."""
    with cvat_server.site.client() as client:
        yield Bench(cvat_server, client, tmp_path / "store", frames=103, segment_size=0)


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
        _delete(bench, shape["id"])
    else:
        bench.correct()
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
    store = PrelabelStore(bench.store, server=bench.cvat.url)
    for job in bench.jobs:
        for frame, record in store.load(job).frames.items():
            kept = store.kept(job, frame, record.drawn)
            assert kept is not None
            assert {shape["frame"] for shape in kept.shapes} == {frame}
            assert kept.labels.keys() == {shape["label_id"] for shape in bench.shapes(job)}
    assert len(list(bench.store.rglob("*.json.gz"))) == 3


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


@pytest.mark.parametrize("corrected", [False, True])
def test_what_a_failed_run_has_left_stays(long_bench: Bench, *, corrected: bool) -> None:
    """People may have corrected it."""
    bench = long_bench
    bench.model.fail = [103]
    if corrected:
        bench.model.on_call = lambda call: call == 102 and bench.correct()
    report = bench.run(retries=2)
    assert bench.model.calls == 103
    assert len(report.failed) == 1
    assert "202 shapes stay in the job and count as people's work" in report.failed[0]
    shapes = bench.shapes(bench.first)
    assert len(shapes) == 202
    assert any(len(shape["points"]) == 6 for shape in shapes) == corrected
    bench.deploy(Model(version=4))
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.people) == (0, 101)
    assert bench.shapes(bench.first) == shapes


@pytest.mark.parametrize("seen", [False, True])
def test_corrections_while_the_function_runs_are_peoples_work(long_bench: Bench, *, seen: bool) -> None:
    """Whether the shapes were looked at before the correction, or not."""
    bench = long_bench

    def correct(call: int) -> None:
        if call == 102:
            if seen:
                bench.wait_until_seen()
            bench.correct()

    bench.model.on_call = correct
    if not seen:
        bench.model.gate = gate = threading.Event()
        bench.on_poll = lambda _: (gate.set(), bench.wait_for_end())  # no look while it works
    report = bench.run()
    assert (report.drawn, report.failed) == (103, [])
    why = "was changed by somebody while the function ran" if seen else "could have been changed before"
    assert [why in note and "counts as people's work" in note for note in report.notes] == [True]
    before = bench.shapes(bench.first)
    bench.deploy(Model(version=4))
    assert bench.run(replace_auto=True).people == 103
    assert bench.shapes(bench.first) == before


def test_what_was_watched_from_the_first_write_to_the_end_is_the_models(long_bench: Bench) -> None:
    bench = long_bench
    bench.model.on_call = lambda call: call == 102 and bench.wait_until_seen()
    report = bench.run()
    assert (report.drawn, report.shapes, report.notes) == (103, 206, [])
    assert bench.run().already == 103


@pytest.mark.parametrize(
    ("frame", "model", "seen"), [(0, "", False), (1, "Улица v3", False), (0, "Улица v3", True), (1, "Улица v3", True)]
)
def test_shapes_of_a_detector_that_a_person_ran_meanwhile(bench: Bench, frame: int, model: str, *, seen: bool) -> None:
    """They are `auto`, and of the same labels."""
    ground = bench.labels["Земля"]
    attribute = bench.attribute("Земля", "model")

    def draw(call: int) -> None:
        if call == 2:
            values = [{"spec_id": attribute, "value": model}] if model else []
            shape = polygon(ground, frame, TRIANGLE, source="auto", attributes=values)
            with bench.cvat.store.lock:
                bench.cvat.store.write(
                    [bench.cvat.store.job(bench.first)], {"shapes": [shape]}, "create", by_frame=False
                )
            if seen:
                bench.wait_until_seen()

    bench.model.on_call = draw
    report = bench.run()
    assert (report.drawn, report.failed) == (3, [])
    assert len(report.notes) == 1
    assert "that one run of the function cannot have drawn" in report.notes[0]
    before = bench.shapes(bench.first)
    assert len(before) == 5
    bench.deploy(Model(version=4))
    bench.run(replace_auto=True)
    assert bench.shapes(bench.first) == before


def test_what_a_person_deletes_meanwhile_is_not_drawn_again(long_bench: Bench) -> None:
    bench = long_bench

    def delete(call: int) -> None:
        if call == 102:
            bench.wait_until_seen()
            _delete(bench, *(shape["id"] for shape in bench.cvat.shapes(bench.first)))

    bench.model.on_call = delete
    bench.model.fail = [103]
    report = bench.run()
    assert "0 shapes stay in the job" in report.failed[0]
    assert bench.run().people == 101
    assert bench.shapes(bench.first) == []


def _delete(bench: Bench, *numbers: int) -> None:
    with bench.cvat.store.lock:
        job = bench.cvat.store.job(bench.first)
        job.shapes = [shape for shape in job.shapes if shape["id"] not in numbers]
        bench.cvat.store.touch(job)


def test_another_threshold_or_version_draws_anew_when_asked(bench: Bench) -> None:
    """Under the same title."""
    selection = Selection(jobs=(bench.second,))
    bench.run(selection=selection)
    report = bench.run(selection=selection, threshold=0.25)
    assert (report.already, report.other_model) == (0, 1)
    assert bench.run(selection=selection, threshold=0.25, replace_auto=True).drawn == 1
    assert bench.run(selection=selection, threshold=0.25).already == 1
    bench.cvat.add_function(Function(id="unet", name="Улица v3", version=4, labels=SPEC, handler=bench.model))
    assert bench.run(selection=selection, threshold=0.25, replace_auto=True).drawn == 1


def test_what_was_drawn_is_known_by_what_the_shapes_name(bench: Bench) -> None:
    """CVAT's list may be older than the version that is served."""
    served = Model(version=4)

    def list_as(version: int) -> None:
        bench.cvat.add_function(
            Function(id="unet", name=f"Улица v{version}", version=version, labels=SPEC, handler=served)
        )

    second = Selection(jobs=(bench.second,))
    bench.run(selection=second)  # by v3, as the list says
    list_as(3)
    report = bench.run(replace_auto=True)
    assert (report.model, report.drawn, report.already) == ("Улица v4", 3, 0)  # what the first job has shown
    store = PrelabelStore(bench.store, server=bench.cvat.url)
    drawn = [entry.drawn for job in bench.jobs for entry in store.load(job).frames.values()]
    assert {each.model for each in drawn} == {"Улица v4"}
    for version in (3, 4):  # as before, and when the list has caught up
        list_as(version)
        report = bench.run(replace_auto=True)
        assert (report.drawn, report.already) == (0, 3)
    assert bench.run(selection=second, threshold=0.25, replace_auto=True).drawn == 1
    served.version = 5
    list_as(5)
    assert bench.run(replace_auto=True).drawn == 3


def test_a_run_that_the_server_has_forgotten_is_said(bench: Bench) -> None:
    """Its shapes count as people's work."""
    selection = Selection(jobs=(bench.second,))
    bench.model.gate = gate = threading.Event()

    def kill(_: FunctionRun | None) -> None:
        raise Killed

    bench.on_poll = kill
    with pytest.raises(Killed):
        bench.run(selection=selection)
    gate.set()
    bench.wait_for_end()
    bench.cvat.lambdas.runs.clear()
    bench.on_poll = lambda _: None
    report = bench.run(selection=selection)
    assert report.people == 1
    assert len(report.notes) == 1
    assert "does not know any more how a run of the function ended" in report.notes[0]


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


@pytest.mark.parametrize("replacing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_anywhere_and_run_again(bench: Bench, *, replacing: bool) -> None:
    """Between any two of its steps: it ends in the same shapes as a run that nobody killed.

    Only when it is killed after the end of the function, and before this was written down, they count as people's work.
    """
    selection = Selection(jobs=(bench.second,))
    steps = unsure = 0
    expected: dict[int, list[tuple[int, str]]] = {}
    while True:
        steps += 1
        bench.delete_all()
        if replacing:
            bench.deploy(Model(version=3))
            bench.run(selection=selection)
        gate = threading.Event()
        bench.deploy(Model(version=4, gate=gate))
        bench.on_poll, bench.polls = lambda _, gate=gate: bench.polls > 1 and gate.set(), 0  # while it is watched
        try:
            bench.run(kill_after=steps, selection=selection, replace_auto=replacing)
            break
        except Killed:
            report = bench.run(selection=selection, replace_auto=replacing)
            expected = expected or bench.looks()
            assert report.failed == []
            assert bench.looks() == expected, f"step {steps}"
            unsure += report.people
            assert len(report.notes) == report.people
            last = bench.run(selection=selection)
            assert (last.already, last.people) == (1 - report.people, report.people), f"step {steps}"
    assert bench.looks() == expected
    assert len(expected[bench.second]) == 2
    assert steps > 8
    assert unsure == 1


def test_somebody_who_is_faster_than_the_notes(bench: Bench) -> None:
    """What was changed between the end of the run and the question what it has drawn counts as people's work."""

    bench.model.gate = gate = threading.Event()

    def touch(run: FunctionRun | None) -> None:
        gate.set()
        if run is not None and run.status == "finished" and run.job == bench.first:
            bench.correct()

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
