"""What pre-labels have saved, measured against a server: kept ones, and those of the button."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client
from executioner import Executioner, Killed
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import Body, CvatStandin, add_shapes, job_shapes, jobs_of, label_ids, make_task, mask, polygon
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ServerError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training import effort
from training.annotations import painting
from training.cvat import Account, ProjectLabel, Server
from training.detector import Detector, region_points
from training.effort import FrameEffort, measure_effort, read_effort
from training.effort_records import FILE
from training.fetch import fetch
from training.manifest import DatasetWriter
from training.prelabel import request_of
from training.prelabel_store import Drawn, FrameRecord, JobRecord, PrelabelStore, identity
from training.rasterise import cover
from training.rule import Rule
from training.splits import SplitPlan
from training.survey import Selection
from training.working_time import working_seconds

pytestmark = pytest.mark.usefixtures("short_pauses")

TEXT = {"mutable": False, "input_type": "text", "values": [""], "default_value": ""}
ATTRIBUTES = [{"name": name, **TEXT} for name in ("model", "confidence")]
LABELS = [
    {"name": label.name, "type": "any", "attributes": [] if label.background else ATTRIBUTES}
    for label in LabelSchema.default().labels
]
LETTERS = {"g": "Земля", "h": "Здание", "v": "Растительность"}
STREET = """
    ....hhhh
    gggghhhh
    gggg....
"""
TITLE = "street v3"


class Bench:
    """A project with a task of frames as small as a drawing in letters, one job each, and a store of pre-labels."""

    size_hw = (3, 8)

    def __init__(self, cvat: CvatStandin, client: Client, folder: Path, *, frames: int) -> None:
        self.cvat, self.client, self.folder = cvat, client, folder
        self.project = cvat.site.make_project(client, "Улица", LABELS).id
        self.ids = label_ids(client, self.project)
        pictures = {}
        for number in range(frames):
            pixels = np.full((*self.size_hw, 3), number, np.uint8)
            pictures[f"{number}.png"] = png(pixels)
        self.set_up(make_task(client, self.project, pictures, segment_size=1).id)

    def set_up(self, task: int) -> None:
        self.task, self.jobs = task, jobs_of(self.client, task)
        self.bundles: dict[str, ModelBundle] = {}

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    def connect(self) -> Server:
        site = self.cvat.site
        return Server.connect(Account(url=site.url, username=site.username, password=site.password))

    def labels(self) -> list[ProjectLabel]:
        with self.connect() as server:
            return server.labels(project_id=self.project)

    def shapes(self, frame: int, text: str) -> list[dict[str, Any]]:
        """A mask for each letter, as a model draws it."""
        drawn = np.array([list(row.strip()) for row in text.strip().splitlines()])
        names = sorted({*drawn.ravel().tolist()} - {"."})
        by_name = {label.name: label for label in self.labels()}
        return [
            request_of(
                by_name[LETTERS[name]],
                kind="mask",
                points=mask(0, 0, drawn == name)["points"],
                frame=frame,
                attributes={"model": TITLE, "confidence": "0.75"},
            )
            for name in names
        ]

    def prelabel(self, frame: int, text: str, *, model: str = TITLE, sent: bool = True) -> list[int]:
        """Draw, and keep, as `sscloud prelabel` does → the shapes' numbers."""
        shapes = self.shapes(frame, text)
        drawn = Drawn(model=model, settings="", shapes=tuple(sorted(identity(shape) for shape in shapes)))
        job = self.jobs[frame]
        with PrelabelStore(self.folder / "store", server=self.cvat.url) as store:
            names = {number: name for name, number in self.ids.items()}
            store.keep(job, frame, drawn, shapes, labels=names)
            store.save(job, JobRecord(frames={frame: FrameRecord(drawn=drawn)}))
        return add_shapes(self.client, job, shapes) if sent and shapes else []

    def delete(self, frame: int, numbers: Sequence[int]) -> None:
        with self.connect() as server:
            found = server.annotations(self.jobs[frame]).shapes
            server.delete_shapes(self.jobs[frame], [shape for shape in found if shape["id"] in numbers])

    def correct(self, frame: int, text: str) -> None:
        """Other pixels for the shape of each letter; number, source and attributes stay, as with the eraser."""
        present = {shape["label_id"]: shape["id"] for shape in self.cvat.shapes(self.jobs[frame])}
        for shape in self.shapes(frame, text):
            if shape["label_id"] in present:
                self.cvat.edit_shape(present[shape["label_id"]], points=shape["points"])
            else:
                add_shapes(self.client, self.jobs[frame], [{**shape, "source": "manual", "attributes": []}])

    def complete(self, *frames: int) -> None:
        for frame in frames or range(len(self.jobs)):
            self.cvat.set_job(self.jobs[frame], state="completed")

    def fetch(self, **options: Any) -> None:
        selection = Selection(projects=(self.project,), **options)
        rule = Rule(schema=LabelSchema.default(), unknown="error", empty="background")
        with self.connect() as server:
            fetch(server, self.dataset, selection=selection, rule=rule, plan=SplitPlan(), quiet=True, remove=True)

    def measure(self) -> list[FrameEffort]:
        with self.connect() as server:
            return measure_effort(
                server, self.folder / "store", self.dataset, bundle_of=self.bundles.get, device="cpu", quiet=True
            )


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def make_bench(cvat_server: CvatStandin, tmp_path: Path) -> Iterator[Callable[[int], Bench]]:
    with cvat_server.site.client() as client:
        yield lambda frames: Bench(cvat_server, client, tmp_path, frames=frames)


def test_every_pixel_and_shape_of_kept_pre_labels(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(6)
    for frame in range(5):
        bench.prelabel(frame, STREET)
    # 0 is accepted as it is
    bench.correct(1, ".......h\ngggggghh\nggggvvvv")
    (ground, _) = [shape["id"] for shape in bench.cvat.shapes(bench.jobs[2])]
    bench.cvat.edit_shape(ground, label_id=bench.ids["Растительность"], attributes=[])  # re-labelled
    bench.delete(3, [shape["id"] for shape in bench.cvat.shapes(bench.jobs[3])])
    add_shapes(bench.client, bench.jobs[5], [polygon(bench.ids["Земля"], 5, [0, 0, 4, 0, 4, 3, 0, 3])])
    bench.complete(0, 1, 2, 3, 5)  # somebody is still at work on 4
    bench.fetch(states=frozenset({"completed", "in progress", "new"}))
    found = {record.frame: record for record in bench.measure()}
    assert sorted(found) == [0, 1, 2, 3]
    assert all(record.model == TITLE and not record.unknown for record in found.values())
    assert found[0].pixels == {(0, 0): 8, (2, 2): 8, (6, 6): 8}
    assert (found[0].kept, found[0].changed, found[0].deleted, found[0].added) == (2, 0, 0, 0)
    assert found[1].pixels == {(0, 0): 4, (0, 5): 4, (2, 2): 8, (6, 0): 3, (6, 2): 2, (6, 6): 3}
    assert (found[1].kept, found[1].changed, found[1].deleted, found[1].added) == (0, 2, 0, 1)
    assert found[2].pixels == {(0, 0): 8, (2, 5): 8, (6, 6): 8}
    assert (found[2].kept, found[2].changed, found[2].deleted, found[2].added) == (1, 1, 0, 0)
    assert found[3].pixels == {(0, 0): 8, (2, 0): 8, (6, 0): 8}
    assert (found[3].kept, found[3].changed, found[3].deleted, found[3].added) == (0, 0, 2, 0)
    assert found[1].labels == {0: "Фон", 2: "Земля", 5: "Растительность", 6: "Здание"}
    assert found[1].job_seconds is None  # the stand-in has no analytics

    # Once more: nothing is asked, nothing changes, and the same is said.
    before = (bench.dataset / FILE).read_bytes()
    bench.cvat.forget()
    assert {record.frame: record for record in bench.measure()} == found
    assert bench.cvat.count("GET", "/api/jobs") == 0
    assert (bench.dataset / FILE).read_bytes() == before

    # Corrected again: measured again; the older record stays.
    bench.correct(0, ".......h\ngggghhhh\ngggg....")
    assert {record.frame: record for record in bench.measure()} == found  # until it is fetched
    bench.fetch()
    (again,) = bench.measure()
    assert (again.frame, again.pixels) == (0, {(0, 0): 8, (2, 2): 8, (6, 0): 3, (6, 6): 5})
    assert [record.frame for record in read_effort(bench.dataset)] == [0, 1, 2, 3, 0]

    # And back to what it was: the last record is of that.
    bench.correct(0, STREET)
    bench.fetch()
    assert [record.pixels for record in bench.measure()][-1] == found[0].pixels
    assert [record.frame for record in read_effort(bench.dataset)] == [1, 2, 3, 0, 0]


def test_a_schema_without_background_and_labels_that_it_lacks(make_bench: Callable[[int], Bench]) -> None:
    """Void is where nobody drew; a label that the schema lacks is none of the result's."""
    bench = make_bench(1)
    bench.prelabel(0, "gggg....\nhhhh....\nvvvv....")
    bench.correct(0, "gg......\nhhhhhhhh\nvvvv....")
    bench.complete()
    schema = LabelSchema(labels=tuple(label for label in LabelSchema.default().labels if label.id in (2, 6)))
    with bench.connect() as server:
        rule = Rule(schema=schema, unknown="void")
        selection = Selection(projects=(bench.project,))
        fetch(server, bench.dataset, selection=selection, rule=rule, plan=SplitPlan(), quiet=True)
    (record,) = bench.measure()
    assert record.nothing == 255
    assert record.pixels == {(2, 2): 2, (2, 255): 2, (6, 6): 4, (255, 6): 4, (255, 255): 12}


def test_void_pixels_of_the_result_are_left_out(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    bench.prelabel(0, STREET)
    bench.complete()
    bench.fetch()
    mask_path = bench.dataset / "masks" / "0.png"
    with Image.open(mask_path) as image:
        pixels = np.array(image)
    pixels[1] = 255
    with DatasetWriter(bench.dataset, schema=LabelSchema.default()) as writer:
        item = writer.manifest.items[0]
        data = png(pixels)
        counts = {int(i): int(n) for i, n in zip(*np.unique(pixels, return_counts=True), strict=True)}
        changed = dataclasses.replace(item, mask_sha256=hashlib.sha256(data).hexdigest(), pixels=counts)
        writer.stage(changed, image=None, mask=data)
        writer.commit()
    (record,) = bench.measure()
    assert record.pixels == {(0, 0): 8, (2, 2): 4, (6, 6): 4}


def test_killed_between_jobs_it_ends_in_the_same_file(
    make_bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(3)
    for frame in range(3):
        bench.prelabel(frame, STREET)
    bench.complete()
    bench.fetch()
    expected = bench.measure()
    whole = (bench.dataset / FILE).read_bytes()
    assert len(expected) == 3
    write = effort.add_effort
    for steps in range(1, 7):
        (bench.dataset / FILE).unlink()
        executioner = Executioner(steps)

        def mortal(dataset: Path, records: list[FrameEffort], executioner: Executioner = executioner) -> None:
            executioner.step()
            write(dataset, records)
            executioner.step()

        with monkeypatch.context() as patch:
            patch.setattr(effort, "add_effort", mortal)
            patch.setattr(effort, "BATCH", 1)
            with pytest.raises(Killed):
                bench.measure()
        assert bench.measure() == expected
        assert (bench.dataset / FILE).read_bytes() == whole


def test_a_replacement_that_was_killed(make_bench: Callable[[int], Bench]) -> None:
    """What is left of one of the two tells which it was."""
    bench = make_bench(3)
    others = ["v.......\nggggvvvv\n.....vvv", STREET, "........\n........\n........"]
    store = PrelabelStore(bench.folder / "store", server=bench.cvat.url)
    names = {number: name for name, number in bench.ids.items()}
    for frame, present in enumerate(others):
        bench.prelabel(frame, STREET, sent=False)
        record = store.load(bench.jobs[frame]).of(frame)
        shapes = bench.shapes(frame, others[0])
        following = Drawn(model="street v4", shapes=tuple(sorted(identity(shape) for shape in shapes)))
        store.keep(bench.jobs[frame], frame, following, shapes, labels=names)
        store.save(bench.jobs[frame], JobRecord(frames={frame: FrameRecord(drawn=record.drawn, next=following)}))
        if found := bench.shapes(frame, present):
            add_shapes(bench.client, bench.jobs[frame], found)
    bench.complete()
    bench.fetch()
    found_by_frame = {record.frame: record for record in bench.measure()}
    assert [found_by_frame[frame].model for frame in range(3)] == ["street v4", TITLE, ""]
    assert [found_by_frame[frame].kept for frame in range(3)] == [2, 2, 0]
    assert found_by_frame[2].unknown == effort.NOT_SETTLED


def test_damage_costs_one_job(make_bench: Callable[[int], Bench], caplog: pytest.LogCaptureFixture) -> None:
    bench = make_bench(3)
    for frame in range(3):
        bench.prelabel(frame, STREET)
    bench.complete()
    bench.fetch()
    kept = sorted((bench.folder / "store").rglob("*.json.gz"))
    kept[0].write_bytes(b"nothing")
    next((bench.folder / "store").rglob(f"job-{bench.jobs[1]}.json")).write_text("{")
    assert [(record.frame, record.unknown) for record in bench.measure()] == [
        (0, effort.FAILED),
        (1, effort.FAILED),
        (2, ""),
    ]
    assert [f"job {bench.jobs[number]} " in caplog.text for number in range(3)] == [True, True, False]
    kept[0].unlink()
    (record,) = (record for record in bench.measure() if record.frame == 0)
    assert (record.model, record.unknown) == (TITLE, effort.NO_BUNDLE)


def test_what_a_network_runs_into_costs_one_job_for_a_time(
    make_bench: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(2)
    for frame in range(2):
        bench.prelabel(frame, STREET)
    bench.complete()
    bench.fetch()
    for path in (bench.folder / "store").rglob("0-*.json.gz"):
        path.unlink()  # it has to be drawn again

    def look_up(title: str) -> ModelBundle:
        raise ValueError(title)

    with bench.connect() as server:
        records = measure_effort(server, bench.folder / "store", bench.dataset, bundle_of=look_up, quiet=True)
    assert {record.frame: record.unknown for record in records} == {0: effort.NO_BUNDLE, 1: ""}
    (bench.dataset / FILE).unlink()

    def run_out(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(effort, "Detector", run_out)
        patch.setattr(bench, "bundles", {TITLE: object()})
        found = {record.frame: (record.model, record.unknown) for record in bench.measure()}
    assert found == {0: (TITLE, effort.FAILED), 1: (TITLE, "")}
    assert {record.frame: record.unknown for record in bench.measure()} == {0: effort.NO_BUNDLE, 1: ""}


def test_a_frame_that_was_deleted_whole_is_counted(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(3)
    for frame in range(2):
        bench.prelabel(frame, STREET)
    bench.delete(0, [shape["id"] for shape in bench.cvat.shapes(bench.jobs[0])])
    bench.complete()  # 2 has never had a shape
    rule = Rule(schema=LabelSchema.default(), unknown="error")
    with bench.connect() as server:
        selection = Selection(projects=(bench.project,))
        fetch(server, bench.dataset, selection=selection, rule=rule, plan=SplitPlan(), quiet=True)
    found = {record.frame: (record.model, record.unknown) for record in bench.measure()}
    assert found == {0: (TITLE, effort.DELETED_WHOLE), 1: (TITLE, "")}
    before = (bench.dataset / FILE).read_bytes()
    assert len(bench.measure()) == 2
    assert (bench.dataset / FILE).read_bytes() == before


class Button(Bench):
    """Frames large enough for a network, on which people have pressed the button."""

    def __init__(self, cvat: CvatStandin, client: Client, folder: Path, pictures: list[NDArray[np.uint8]]) -> None:
        self.cvat, self.client, self.folder = cvat, client, folder
        self.project = cvat.site.make_project(client, "Улица", LABELS).id
        self.ids = label_ids(client, self.project)
        images = {f"{number}.png": png(pixels) for number, pixels in enumerate(pictures)}
        self.set_up(make_task(client, self.project, images, segment_size=1).id)
        self.pictures = pictures

    def press(self, frame: int, detector: Detector, *, kind: str = "mask", threshold: float = 0.0) -> list[int]:
        by_name = {label.name: label for label in self.labels()}
        names = {label.id: label.name for label in detector.labels}
        shapes = [
            request_of(
                by_name[names[region.label_id]],
                kind=kind,
                points=region_points(region, kind=kind),
                frame=frame,
                attributes=detector.attributes(region),
            )
            for region in detector.regions(self.pictures[frame], threshold=threshold)
        ]
        return add_shapes(self.client, self.jobs[frame], shapes)


def test_frames_of_the_button(
    cvat_server: CvatStandin,
    tmp_path: Path,
    make_unet: Callable[..., UNet],
    make_manifest: Callable[..., Manifest],
    make_panorama: Callable[..., NDArray[np.uint8]],
) -> None:
    model = make_unet()
    bundle = save_bundle(tmp_path / "bundle", model, make_manifest(model.architecture, scale=0.25))
    detector = Detector(bundle, device="cpu")
    with cvat_server.site.client() as client:
        bench = Button(cvat_server, client, tmp_path, [make_panorama(seed=seed) for seed in range(5)])
        # 0: a shape was cut, another one deleted; 1: polygons, untouched; 2: with a threshold; 3: attributes are gone;
        # 4: drawn by people
        numbers = bench.press(0, detector)
        first = bench.cvat.shapes(bench.jobs[0])[0]
        (shape,) = painting([first], label_names={first["label_id"]: "any"}, size_hw=(64, 128)).shapes
        (x1, y1, x2, y2), covered = cover(shape, size_hw=(64, 128))
        bitmap = np.zeros((64, 128), np.bool_)
        bitmap[y1:y2, x1:x2] = covered
        bitmap[y1] = False
        bench.cvat.edit_shape(first["id"], points=mask(0, 0, bitmap)["points"])
        bench.delete(0, numbers[1:2])  # not the smallest: that one might have been left out
        bench.press(1, detector, kind="polygon")
        bench.press(2, detector, threshold=0.6)
        bench.press(3, detector)
        for shape in bench.cvat.shapes(bench.jobs[3]):
            bench.cvat.edit_shape(shape["id"], attributes=[])
        add_shapes(client, bench.jobs[4], [polygon(bench.ids["Земля"], 4, [0, 0, 50, 0, 50, 60])])
        bench.complete()
        bench.fetch()
        unknown = {record.frame: (record.model, record.unknown) for record in bench.measure()}
        title = bundle.manifest.title
        assert unknown == dict.fromkeys(range(3), (title, effort.NO_BUNDLE)) | {3: ("", effort.NO_MODEL)}

        bench.bundles[title] = bundle  # the version has come to light
        found = {record.frame: record for record in bench.measure()}
        assert found.keys() == {0, 1, 2, 3}
        assert (found[0].kept, found[0].changed, found[0].deleted, found[0].added) == (len(numbers) - 2, 1, 1, 0)
        assert sum(count for (before, after), count in found[0].pixels.items() if before != after) > 1
        assert all(before == after for before, after in found[1].pixels)
        assert found[2].unknown == effort.NOT_PROVEN
        assert len(read_effort(bench.dataset)) == 4
        bench.cvat.forget()
        bench.measure()
        assert bench.cvat.count("GET", "/annotations") == 0  # what is settled is not asked again


LOG = (
    "scope,obj_name,job_id,payload\n"
    'send:working_time,,JOB,"{""working_time"": 90000}"\n'
    'create:shapes,,JOB,"{""shapes"": []}"\n'
    'send:working_time,,,"{""working_time"": 5000}"\n'
    'send:working_time,,JOB,"{""working_time"": 1500}"\n'
)


def test_time_comes_from_the_event_log(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    bench.prelabel(0, STREET)
    bench.complete()
    bench.fetch()
    status = {"status": "finished", "result_url": "http://elsewhere.example/api/events/file?x=1"}
    bench.cvat.fail("POST", "/api/events/export", Body(json.dumps({"rq_id": "export"}).encode()))
    bench.cvat.fail("GET", "/api/requests/export", Body(json.dumps(status).encode()))
    bench.cvat.fail("GET", "/api/events/file", Body(LOG.replace("JOB", str(bench.jobs[0])).encode()))
    (record,) = bench.measure()
    assert (record.job_seconds, record.seconds) == (91.5, 91.5)
    (asked,) = bench.cvat.find("POST", "/api/events/export")
    assert asked.query == {"task_id": str(bench.task), "from": "2000-01-01T00:00:00Z"}


@pytest.mark.parametrize("log", [b"\xff", b"scope\nsend:working_time\n", LOG.replace("90000", '"x"').encode()])
def test_a_log_of_something_else_is_refused(log: bytes) -> None:
    with pytest.raises(ServerError, match="not understood"):
        working_seconds(log.replace(b"JOB", b"3"))


def test_nothing_to_measure(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    assert bench.measure() == []  # no data set
    add_shapes(bench.client, bench.jobs[0], [polygon(bench.ids["Земля"], 0, [0, 0, 4, 0, 4, 3, 0, 3])])
    bench.complete()
    bench.fetch()
    assert bench.measure() == []
    assert not (bench.dataset / FILE).exists() or read_effort(bench.dataset) == []
    assert job_shapes(bench.client, bench.jobs[0])
