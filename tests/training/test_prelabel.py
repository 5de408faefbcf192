"""Pre-labels that a bundle draws here: exactly once, and never where people have worked."""

import contextlib
import gzip
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cvat_sdk import Client, models
from executioner import Executioner, Killed
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import (
    Body,
    CvatStandin,
    Drop,
    Site,
    Status,
    add_shapes,
    jobs_of,
    label_ids,
    make_ground_truth,
    make_task,
    mask,
    polygon,
    set_state,
)
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ConfigError, SchemaError, ServerError, UnreachableError
from sscloud.image import decode_image
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.regions import Region
from sscloud.unet import UNet
from training.annotations import painting
from training.cvat import Account, Server
from training.detector import Detector
from training.prelabel import Report, Selection, prelabel
from training.prelabel_store import Drawn, FrameRecord, JobRecord, PrelabelStore, ServerRun, identity, judge, surplus
from training.project_labels import plan_labels
from training.rasterise import rasterise

pytestmark = pytest.mark.usefixtures("short_pauses")

SIZE_HW = (64, 128)
TEXT = {"mutable": False, "input_type": "text", "values": [""]}
ATTRIBUTES = [{"name": name, "default_value": "", **TEXT} for name in ("model", "confidence")]
LABELS = [
    {"name": label.name, "type": "any", "attributes": [] if label.background else ATTRIBUTES}
    for label in LabelSchema.default().labels
]
TRIANGLE = [1.0, 1.0, 40.0, 1.0, 40.0, 30.0]


ANNOTATIONS = r"/api/jobs/\d+/annotations"


class MortalServer(Server):
    """Dies between two requests that change something."""

    executioner: Executioner
    on_create: Callable[[int], object]
    """Told which write of shapes is about to begin, from 1."""
    creations = 0

    def create_shapes(self, job_id: int, shapes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
        self.executioner.step()
        self.creations += 1
        self.on_create(self.creations)
        created = super().create_shapes(job_id, shapes)
        self.executioner.step()
        return created

    def delete_shapes(self, job_id: int, shapes: Sequence[Mapping[str, Any]]) -> None:
        self.executioner.step()
        super().delete_shapes(job_id, shapes)
        self.executioner.step()


class MortalStore(PrelabelStore):
    """Dies before and after it writes."""

    executioner: Executioner

    def save(self, job: int, record: JobRecord) -> None:
        self.executioner.step()
        super().save(job, record)
        self.executioner.step()

    def keep(self, job: int, frame: int, drawn: Drawn, shapes: Sequence[Mapping[str, Any]], **options: Any) -> None:
        super().keep(job, frame, drawn, shapes, **options)
        self.executioner.step()


class Bench:
    """A project of a task with frames, and the means to pre-label it."""

    def __init__(self, site: Site, client: Client, store: Path, detector: Detector, pictures: dict[str, bytes]) -> None:
        project = site.make_project(client, "Улица", LABELS).id
        self.pictures = pictures
        self._set_up(site, client, store, detector, project, make_task(client, project, pictures, segment_size=2).id)

    @classmethod
    def of(cls, site: Site, client: Client, folder: Path, detector: Detector, project: int, task: int) -> "Bench":
        """Of a project with other labels."""
        bench = cls.__new__(cls)
        bench._set_up(site, client, folder / "store", detector, project, task)
        return bench

    def _set_up(self, site: Site, client: Client, store: Path, detector: Detector, project: int, task: int) -> None:
        self.site, self.client, self.store, self.detector = site, client, store, detector
        self.project, self.task = project, task
        self.on_create: Callable[[int], object] = lambda _: None
        self.labels = label_ids(client, project)
        self.jobs = jobs_of(client, task)
        self.first, self.second = self.jobs[0], self.jobs[-1]

    def connect(self) -> MortalServer:
        account = Account(url=self.site.url, username=self.site.username, password=self.site.password)
        server = MortalServer.connect(account)
        assert isinstance(server, MortalServer)
        server.executioner = Executioner(None)
        server.on_create = self.on_create
        return server

    def run(self, *, detector: Detector | None = None, kill_after: int | None = None, **options: Any) -> Report:
        report = Report(model="")
        selection = options.pop("selection", Selection(projects=(self.project,)))
        with self.connect() as server, MortalStore(self.store, server=server.url) as store:
            server.executioner = store.executioner = Executioner(kill_after)
            prelabel(
                server, store, detector or self.detector, selection=selection, report=report, quiet=True, **options
            )
        return report

    def shapes(self, job: int) -> list[dict[str, Any]]:
        # As plain JSON: the SDK's model objects take a second for a frame.
        _, response = self.client.api_client.jobs_api.retrieve_annotations(job, _parse_response=False)
        with contextlib.closing(response):
            shapes: list[dict[str, Any]] = json.loads(response.data)["shapes"]
        return shapes

    def in_frame(self, frame: int) -> list[dict[str, Any]]:
        return [shape for job in self.jobs for shape in self.shapes(job) if shape["frame"] == frame]

    def delete(self, job: int, shapes: list[dict[str, Any]]) -> None:
        with self.connect() as server:
            numbers = {shape["id"] for shape in shapes}
            server.delete_shapes(job, [shape for shape in server.annotations(job).shapes if shape["id"] in numbers])

    def delete_all(self) -> None:
        """As if nothing had ever been drawn."""
        for job in self.jobs:
            self.delete(job, self.shapes(job))
        for path in [*self.store.rglob("*.json"), *self.store.rglob("*.json.gz")]:
            path.unlink()

    def require_kept(self) -> None:
        """The store has the shapes of every frame, as the server lists them, and no others."""
        store = PrelabelStore(self.store, server=self.site.url)
        names = {number: name for name, number in self.labels.items()}
        files = 0
        for job in self.jobs:
            for frame, record in store.load(job).frames.items():
                kept = store.kept(job, frame, record.drawn)
                assert kept is not None
                shapes = [shape for shape in self.shapes(job) if shape["frame"] == frame]
                assert sorted(map(identity, kept.shapes)) == sorted(map(identity, shapes))
                assert kept.labels == {shape["label_id"]: names[shape["label_id"]] for shape in shapes}
                files += bool(shapes)
        assert len(list(self.store.rglob("*.json.gz"))) == files

    def looks(self) -> dict[int, list[tuple[int, str]]]:
        """What is drawn, without the numbers."""
        return {job: sorted((shape["frame"], identity(shape)) for shape in self.shapes(job)) for job in self.jobs}

    def pixels(self, frame: int) -> NDArray[np.uint8]:
        """What is drawn in a frame of the first two, painted."""
        raws = [shape for job in self.jobs for shape in self.shapes(job) if shape["frame"] == frame]
        names = {number: name for name, number in self.labels.items()}
        schema = LabelSchema.default()

        def label_id(name: str) -> int:
            label = schema.find(name)
            assert label is not None
            return label.id

        shapes = painting(raws, label_names=names, size_hw=SIZE_HW).shapes
        return rasterise(shapes, size_hw=SIZE_HW, label_id_of=label_id, fill=0).label_map


class _Waiting(Detector):
    """A detector during whose first image something else happens."""

    def __init__(self, detector: Detector, happens: Callable[[], object]) -> None:
        self.__dict__.update(detector.__dict__)
        self._happens: Callable[[], object] | None = happens

    def regions(self, image: NDArray[np.uint8], *, threshold: float) -> list[Region]:
        if self._happens is not None:
            self._happens()
            self._happens = None
        return super().regions(image, threshold=threshold)


def bench_names() -> list[str]:
    """The labels of the users' projects."""
    return [label.name for label in LabelSchema.default().labels]


def _picture(seed: int, size_hw: tuple[int, int] = SIZE_HW) -> bytes:
    """A PNG of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size_hw[0] // 8, size_hw[1] // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def detector(tiny_bundle: ModelBundle) -> Detector:
    return Detector(tiny_bundle, device="cpu", min_area=1)


@pytest.fixture(scope="module")
def next_detector(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> Detector:
    """A model that sees something else."""
    model = make_unet(seed=5)
    manifest = make_manifest(model.architecture, version=4)
    bundle = save_bundle(tmp_path_factory.mktemp("bundles") / "next", model, manifest)
    return Detector(bundle, device="cpu", min_area=60)


@pytest.fixture(scope="module")
def coarse(tiny_bundle: ModelBundle) -> Detector:
    """The same bundle, which draws little."""
    return Detector(tiny_bundle, device="cpu", min_area=60)


@pytest.fixture(scope="module")
def twin(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> Detector:
    """Other weights under the same name and version."""
    model = make_unet(seed=6)
    manifest = make_manifest(model.architecture)
    bundle = save_bundle(tmp_path_factory.mktemp("bundles") / "twin", model, manifest)
    return Detector(bundle, device="cpu", min_area=60)


@pytest.fixture(scope="module")
def pictures(make_panorama: Callable[..., NDArray[np.uint8]]) -> dict[str, bytes]:
    found = {}
    for seed in range(3):
        stream = io.BytesIO()
        Image.fromarray(make_panorama(SIZE_HW, seed=seed)).save(stream, "PNG")
        found[f"{seed}.png"] = stream.getvalue()
    return found


@pytest.fixture
def bench(cvat_site: Site, tmp_path: Path, detector: Detector, pictures: dict[str, bytes]) -> Iterator[Bench]:
    """On the stand-in, and on a live server."""
    with cvat_site.client() as client:
        yield Bench(cvat_site, client, tmp_path / "store", detector, pictures)


@pytest.fixture
def faulty(cvat_server: CvatStandin, tmp_path: Path, detector: Detector, pictures: dict[str, bytes]) -> Iterator[Bench]:
    """On the stand-in only, whose faults a test plans."""
    with cvat_server.site.client() as client:
        yield Bench(cvat_server.site, client, tmp_path / "store", detector, pictures)


def test_every_pixel_arrives(bench: Bench, tiny_bundle: ModelBundle) -> None:
    report = bench.run()
    assert (report.drawn, report.failed, report.people, report.already) == (3, [], 0, 0)
    assert report.shapes == sum(len(bench.shapes(job)) for job in bench.jobs) > 10
    predictor = Predictor(tiny_bundle, device="cpu")
    for frame, data in enumerate(bench.pictures.values()):
        assert np.array_equal(bench.pixels(frame), predictor.predict(decode_image(data)).label_map)


def test_shapes_say_where_they_come_from(bench: Bench) -> None:
    bench.run()
    shape = bench.shapes(bench.first)[0]
    assert shape["source"] == "auto"
    values = sorted(value["value"] for value in shape["attributes"])
    assert values[1] == "Улица v3"
    assert 0 < float(values[0]) <= 1


def test_a_second_run_changes_nothing(bench: Bench) -> None:
    bench.run()
    before = {job: bench.shapes(job) for job in bench.jobs}
    files = {path.name: path.read_bytes() for path in sorted(bench.store.rglob("*.json"))}
    report = bench.run()
    assert (report.drawn, report.already, report.shapes) == (0, 3, 0)
    assert {job: bench.shapes(job) for job in bench.jobs} == before
    assert {path.name: path.read_bytes() for path in sorted(bench.store.rglob("*.json"))} == files


@pytest.mark.parametrize("source", ["manual", "auto"])
def test_frames_with_peoples_work_stay_as_they_are(bench: Bench, source: str) -> None:
    ground = bench.labels["Земля"]
    add_shapes(bench.client, bench.first, [polygon(ground, 1, TRIANGLE, source=source)])
    before = bench.shapes(bench.first)
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.people) == (2, 1)
    assert [shape for shape in bench.shapes(bench.first) if shape["frame"] == 1] == before


def test_a_pre_label_that_a_person_cut_is_peoples_work(bench: Bench, next_detector: Detector) -> None:
    bench.run()
    victim = max(bench.shapes(bench.first), key=lambda shape: len(shape["points"]))
    cut = np.zeros(SIZE_HW, np.bool_)
    cut[10:20, 10:20] = True
    bench.delete(bench.first, [victim])
    add_shapes(bench.client, bench.first, [mask(victim["label_id"], victim["frame"], cut, source="auto")])
    before = bench.in_frame(victim["frame"])
    report = bench.run(detector=next_detector, replace_auto=True)
    assert (report.drawn, report.people) == (2, 1)
    assert bench.in_frame(victim["frame"]) == before


@pytest.mark.parametrize("all_of_them", [False, True])
def test_deleted_pre_labels_are_peoples_work(bench: Bench, *, all_of_them: bool) -> None:
    bench.run()
    shapes = bench.in_frame(0)
    bench.delete(bench.first, shapes if all_of_them else shapes[:1])
    before = bench.in_frame(0)
    report = bench.run(replace_auto=True)
    assert (report.drawn, report.people, report.already) == (0, 1, 2)
    assert bench.in_frame(0) == before


def test_tags_and_tracks_are_peoples_work(bench: Bench) -> None:
    ground = bench.labels["Земля"]
    tag = models.LabeledImageRequest(frame=0, label_id=ground, attributes=[])
    box = models.TrackedShapeRequest(type=models.ShapeType("rectangle"), frame=2, points=[1.0, 1.0, 9.0, 9.0])
    track = models.LabeledTrackRequest(frame=2, label_id=ground, shapes=[box], attributes=[])
    for job, what in ((bench.first, {"tags": [tag]}), (bench.second, {"tracks": [track]})):
        bench.client.api_client.jobs_api.partial_update_annotations(
            "create", job, patched_labeled_data_request=models.PatchedLabeledDataRequest(**what)
        )
    report = bench.run()
    assert (report.drawn, report.people) == (1, 2)
    assert {shape["frame"] for job in bench.jobs for shape in bench.shapes(job)} == {1}


def test_another_models_pre_labels_are_replaced_when_asked(bench: Bench, next_detector: Detector) -> None:
    bench.run()
    before = bench.looks()
    report = bench.run(detector=next_detector)
    assert (report.drawn, report.other_model, report.shapes) == (0, 3, 0)
    assert bench.looks() == before
    report = bench.run(detector=next_detector, replace_auto=True)
    assert (report.drawn, report.other_model, report.failed) == (3, 0, [])
    values = {value["value"] for job in bench.jobs for shape in bench.shapes(job) for value in shape["attributes"]}
    assert "Улица v4" in values
    assert "Улица v3" not in values
    assert report.shapes == sum(len(bench.shapes(job)) for job in bench.jobs)
    bench.require_kept()


def test_a_store_that_knows_nothing_of_a_models_shapes_says_so(faulty: Bench) -> None:
    selection = Selection(jobs=(faulty.second,))
    faulty.run(selection=selection)
    before = faulty.looks()
    faulty.store = faulty.store.with_name("another")
    report = faulty.run(selection=selection, replace_auto=True)
    assert (report.people, report.strange, report.drawn) == (1, 1, 0)
    assert faulty.looks() == before


@pytest.mark.parametrize("what", ["threshold", "min area", "weights"])
def test_the_same_title_with_other_settings_draws_anew_when_asked(
    faulty: Bench, coarse: Detector, twin: Detector, what: str
) -> None:
    selection = Selection(jobs=(faulty.second,))
    faulty.run(detector=coarse, selection=selection)
    before = faulty.looks()
    options: dict[str, Any] = {"selection": selection, "detector": coarse}
    options |= {"threshold": {"threshold": 0.8}, "weights": {"detector": twin}}.get(what, {"detector": faulty.detector})
    report = faulty.run(**options)
    assert (report.drawn, report.already, report.other_model) == (0, 0, 1)
    assert faulty.looks() == before
    assert faulty.run(**options, replace_auto=True).drawn == 1
    assert faulty.looks() != before
    assert faulty.run(**options).already == 1


def test_only_open_annotation_jobs(bench: Bench) -> None:
    truth = make_ground_truth(bench.client, bench.task, [0])
    set_state(bench.client, bench.second, state="completed")
    report = bench.run()
    assert report.drawn == 2
    assert dict(report.jobs_left_out) == {"type ground_truth": 1, "state completed": 1}
    assert bench.shapes(truth) == bench.shapes(bench.second) == []
    assert bench.run(selection=Selection(tasks=(bench.task,), states=frozenset({"completed"}))).drawn == 1


def test_named_jobs(bench: Bench) -> None:
    assert bench.run(selection=Selection(jobs=(bench.second,))).drawn == 1
    assert bench.shapes(bench.first) == []
    with pytest.raises(ServerError, match=r"job 999999999.*there is none"):
        bench.run(selection=Selection(jobs=(999_999_999,)))


def test_labels_meet_by_name_and_alias(cvat_site: Site, tmp_path: Path, detector: Detector) -> None:
    labels = [
        {"name": "земля ", "type": "mask"},
        {"name": "Транспорт", "type": "any"},
        {"name": "Здание", "type": "polygon"},
        {"name": "Растительность", "type": "rectangle"},
    ]
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "Другие имена", labels).id
        task = make_task(client, project, {"a.png": _picture(8)}).id
        bench = Bench.of(cvat_site, client, tmp_path, detector, project, task)
        report = bench.run()
        kinds: dict[str, set[str]] = {}
        names = {number: name.strip() for name, number in bench.labels.items()}
        for shape in bench.shapes(bench.first):
            kinds.setdefault(names[shape["label_id"]], set()).add(str(shape["type"]))
        found = {"земля": {"mask"}, "Транспорт": {"mask"}, "Здание": {"polygon"}}
        assert kinds == {name: kinds[name] for name in found if name in kinds}
        assert all(kind == found[name] for name, kind in kinds.items())
        assert len(kinds) > 1
        assert set(report.unmet) == {"Растительность", "Конструкции"}
        assert sum(report.unmet.values()) > 0


def test_a_run_that_would_draw_nothing_is_refused(cvat_site: Site, tmp_path: Path, detector: Detector) -> None:
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "Чужой", [{"name": "Кошка"}, {"name": "Земля", "type": "points"}]).id
        task = make_task(client, project, {"a.png": _picture(0)}).id
        bench = Bench.of(cvat_site, client, tmp_path, detector, project, task)
        with pytest.raises(
            SchemaError, match=r"None of the model's labels .* has Кошка, Земля \(type points\): nothing"
        ):
            bench.run()


def test_attributes_with_defaults_do_not_make_strangers(cvat_site: Site, tmp_path: Path, detector: Detector) -> None:
    """The server adds them to every shape."""
    extra = {
        "name": "качество",
        "mutable": False,
        "input_type": "select",
        "values": ["да", "нет"],
        "default_value": "да",
    }
    labels = [{"name": name, "attributes": [extra]} for name in bench_names()]
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "Свои атрибуты", labels).id
        task = make_task(client, project, {"a.png": _picture(0)}).id
        bench = Bench.of(cvat_site, client, tmp_path, detector, project, task)
        assert bench.run().failed == []
        assert bench.run().already == 1


def test_labels_that_get_attributes_later_do_not_make_strangers(
    cvat_site: Site, tmp_path: Path, detector: Detector
) -> None:
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "Без атрибутов", [{"name": name} for name in bench_names()]).id
        task = make_task(client, project, {"a.png": _picture(0)}).id
        bench = Bench.of(cvat_site, client, tmp_path, detector, project, task)
        bench.run()
        with bench.connect() as server:
            plans = plan_labels(LabelSchema.default(), server.labels(project_id=project))
            server.patch_labels(project, [plan.request for plan in plans if plan.request is not None])
        assert bench.shapes(bench.first)[0]["attributes"] != []
        assert bench.run().already == 1


def test_the_threshold_leaves_out_what_is_unsure(bench: Bench, tiny_bundle: ModelBundle) -> None:
    bench.run(threshold=0.8)
    segmentation = Predictor(tiny_bundle, device="cpu").predict(decode_image(bench.pictures["0.png"]))
    expected = np.where(segmentation.confidence.at_least(0.8), segmentation.label_map, 0)
    assert np.array_equal(bench.pixels(0), expected)
    assert 0 < np.count_nonzero(expected) < np.count_nonzero(segmentation.label_map)


def test_the_next_image_comes_while_the_model_works(faulty: Bench, cvat_server: CvatStandin) -> None:
    """And none comes for a frame that people have worked on."""
    add_shapes(faulty.client, faulty.second, [polygon(faulty.labels["Земля"], 2, TRIANGLE)])
    cvat_server.forget()

    def wait_for_the_next() -> None:
        while cvat_server.count("GET", r"/data/?$", number="1") == 0:  # the test ends it after a while
            time.sleep(0.01)

    report = faulty.run(detector=_Waiting(faulty.detector, wait_for_the_next))
    assert (report.drawn, report.people) == (2, 1)
    assert [frame.query["number"] for frame in cvat_server.find("GET", r"/data/?$", type="frame")] == ["0", "1"]


def test_an_image_that_comes_in_vain_does_no_harm(faulty: Bench, cvat_server: CvatStandin) -> None:
    """Somebody begins on the following frame while its image, which is broken, is on its way."""
    cvat_server.replace_frame(faulty.task, 1, faulty.pictures["1.png"][:200])
    add = lambda: add_shapes(faulty.client, faulty.first, [polygon(faulty.labels["Земля"], 1, TRIANGLE)])  # noqa: E731
    report = faulty.run(detector=_Waiting(faulty.detector, add))
    assert (report.drawn, report.people, report.failed) == (2, 1, [])
    assert len(faulty.in_frame(1)) == 1


def test_an_image_that_cannot_be_read_stops_nothing(faulty: Bench, cvat_server: CvatStandin) -> None:
    cvat_server.replace_frame(faulty.task, 0, faulty.pictures["0.png"][:200])
    cvat_server.replace_frame(faulty.task, 1, _picture(0, size_hw=(64, 64)))
    report = faulty.run()
    assert report.drawn == 1
    assert [problem.partition(": ")[0] for problem in report.failed] == [
        f"task {faulty.task}, frame 0 (0.png)",
        f"task {faulty.task}, frame 1 (1.png)",
    ]
    assert "broken or truncated" in report.failed[0]
    assert "the file has 64x64 pixels, CVAT says 128x64" in report.failed[1]


def test_an_answer_that_cannot_be_used_costs_one_job(faulty: Bench, cvat_server: CvatStandin) -> None:
    cvat_server.fail("GET", f"/api/jobs/{faulty.first}/annotations", Body(b"<html>"), times=None)
    report = faulty.run()
    assert report.drawn == 1
    assert len(report.failed) == 2
    assert all("the answer is not JSON" in problem for problem in report.failed)


def test_a_server_that_is_gone_ends_the_run(faulty: Bench, cvat_server: CvatStandin) -> None:
    cvat_server.fail("GET", f"/api/jobs/{faulty.first}/annotations", Drop(after=None), times=None)
    with pytest.raises(UnreachableError, match="no answer"):
        faulty.run()


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_job_is_not_read_after_every_frame(
    cvat_server: CvatStandin, tmp_path: Path, coarse: Detector, *, meanwhile: bool
) -> None:
    """Unless somebody has drawn in the moment that the write of a frame hides."""
    pictures = {f"{number}.png": _picture(number) for number in range(6)}
    with cvat_server.site.client() as client:
        project = cvat_server.site.make_project(client, "Улица", LABELS).id
        bench = Bench.of(cvat_server.site, client, tmp_path, coarse, project, make_task(client, project, pictures).id)
        if meanwhile:
            person = polygon(bench.labels["Земля"], 5, TRIANGLE)
            store, job = cvat_server.store, cvat_server.store.job(bench.first)
            bench.on_create = lambda creation: (
                creation == 4 and store.write([job], {"shapes": [person]}, "create", by_frame=False)
            )
        cvat_server.forget()
        report = bench.run()
        reads = cvat_server.count("GET", ANNOTATIONS)
        assert (report.drawn, report.people, report.failed) == ((5, 1, []) if meanwhile else (6, 0, []))
        assert (len(bench.in_frame(5)) == 1) == meanwhile
        assert reads == (3 if meanwhile else 2)


def test_what_is_corrected_in_the_last_moment_is_not_deleted(
    faulty: Bench, cvat_server: CvatStandin, coarse: Detector, next_detector: Detector
) -> None:
    """While the new shapes are written, in the moment before the old ones are deleted."""
    selection = Selection(jobs=(faulty.first,))
    faulty.run(detector=coarse, selection=selection)
    old = faulty.in_frame(1)[0]["id"]
    faulty.on_create = lambda creation: creation == 2 and cvat_server.edit_shape(old, type="polygon", points=TRIANGLE)
    assert faulty.run(detector=next_detector, selection=selection, replace_auto=True).drawn == 2
    assert [shape["id"] for shape in faulty.in_frame(1) if shape["points"] == TRIANGLE] == [old]
    report = faulty.run(detector=next_detector, selection=selection, replace_auto=True)
    assert (report.already, report.people) == (1, 1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fault", [Drop(after=None), Status(504)])
def test_a_lost_answer_draws_nothing_twice(
    faulty: Bench, cvat_server: CvatStandin, coarse: Detector, fault: Drop | Status, *, before: bool
) -> None:
    """Whether the server has written, or not, is looked up."""
    cvat_server.fail("PATCH", ANNOTATIONS, fault, before=before)
    report = faulty.run(detector=coarse)
    assert (report.drawn, report.failed) == (3, [])
    assert cvat_server.count("PATCH", ANNOTATIONS) == (4 if before else 3)
    spoilt = faulty.looks()
    faulty.delete_all()
    assert faulty.run(detector=coarse).drawn == 3
    assert spoilt == faulty.looks()


def test_a_refused_frame_stops_nothing(faulty: Bench, cvat_server: CvatStandin) -> None:
    cvat_server.fail("PATCH", ANNOTATIONS, Status(413), before=True)
    report = faulty.run()
    assert report.drawn == 2
    assert len(report.failed) == 1
    assert "frame 0 (0.png): CVAT, the annotations of job" in report.failed[0]
    assert "too large for the server" in report.failed[0]
    assert faulty.run().drawn == 1


def test_a_person_who_begins_meanwhile_is_not_disturbed(faulty: Bench, cvat_server: CvatStandin) -> None:
    """After the frame was looked at, while the model works on it."""
    started = threading.Event()

    def draw() -> None:
        started.wait(30)
        add_shapes(faulty.client, faulty.first, [polygon(faulty.labels["Земля"], 0, TRIANGLE)])

    person = threading.Thread(target=draw)
    person.start()
    report = faulty.run(detector=_Waiting(faulty.detector, lambda: (started.set(), person.join())))
    assert (report.drawn, report.people) == (2, 1)
    assert len(faulty.in_frame(0)) == 1


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_anywhere_and_run_again(
    faulty: Bench, coarse: Detector, next_detector: Detector, *, replacing: bool
) -> None:
    """Between any two of its steps: it ends in the same shapes as a run that nobody killed."""
    selection = Selection(jobs=(faulty.second,))
    options: dict[str, Any] = {"selection": selection, "detector": coarse}
    if replacing:
        options |= {"detector": next_detector, "replace_auto": True}
    steps = 0
    while True:
        steps += 1
        faulty.delete_all()
        if replacing:
            faulty.run(selection=selection, detector=coarse)
        try:
            faulty.run(kill_after=steps, **options)
            break
        except Killed:
            report = faulty.run(**options)
            assert (report.failed, report.people) == ([], 0)
            looks = faulty.looks()
            assert faulty.run(**options).already == 1
            assert faulty.looks() == looks, f"step {steps}"
        if steps == 1:
            first = looks
        assert looks == first, f"step {steps}"
    assert faulty.looks() == first
    faulty.require_kept()
    assert steps == (10 if replacing else 8)


def test_killed_and_then_corrected_it_is_the_new_pre_label_that_was_corrected(
    faulty: Bench, cvat_server: CvatStandin, coarse: Detector, next_detector: Detector
) -> None:
    """After the old shapes were deleted, before this was written down."""
    selection = Selection(jobs=(faulty.second,))
    options: dict[str, Any] = {"selection": selection, "detector": next_detector, "replace_auto": True}
    faulty.run(selection=selection, detector=coarse)
    with pytest.raises(Killed):
        faulty.run(kill_after=7, **options)
    (first, *_) = faulty.in_frame(2)
    cvat_server.edit_shape(first["id"], type="polygon", points=TRIANGLE)
    before = faulty.looks()
    assert faulty.run(**options).people == 1
    assert faulty.looks() == before
    store = PrelabelStore(faulty.store, server=faulty.site.url)
    record = store.load(faulty.second).of(2)
    assert (record.drawn.model, record.next) == (next_detector.manifest.title, None)
    kept = store.kept(faulty.second, 2, record.drawn)
    assert kept is not None
    assert len(kept.shapes) == len(faulty.in_frame(2))


def test_damaged_shapes_are_said(tmp_path: Path) -> None:
    shape = {**polygon(3, 0, TRIANGLE), "attributes": [{"spec_id": 1, "value": "Улица v3"}]}
    drawn = Drawn(model="Улица v3", settings="", shapes=(identity(shape),))
    with PrelabelStore(tmp_path, server="http://cvat") as store:
        store.keep(7, 0, drawn, [shape], labels={3: "Земля", 4: "Здание"})
        assert store.kept(7, 1, drawn) is None
        kept = store.kept(7, 0, drawn)
        assert kept is not None
        assert (list(kept.shapes), kept.labels) == ([shape], {3: "Земля"})
        assert store.kept(7, 0, Drawn(model="Улица v3")) is not None  # nothing was found, so nothing is to be kept
        (path,) = tmp_path.rglob("*.json.gz")
        whole = path.read_bytes()
        others = json.dumps({"labels": {}, "shapes": [{**shape, "label_id": 4}]}).encode()
        for damaged in (whole[:40], b"no archive", gzip.compress(b"[]"), gzip.compress(others)):
            path.write_bytes(damaged)
            with pytest.raises(ConfigError, match="cannot be used"):
                store.kept(7, 0, drawn)
        store.tidy(7, JobRecord(frames={0: FrameRecord(next=drawn)}))
        assert path.exists()
        store.tidy(7, JobRecord())
        assert not path.exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    with (
        PrelabelStore(tmp_path, server="http://cvat.example.org"),
        PrelabelStore(tmp_path, server="http://other.example.org"),
        pytest.raises(ConfigError, match="Another process is pre-labelling"),
        PrelabelStore(tmp_path, server="http://cvat.example.org"),
    ):
        pass


def test_the_store_reads_back_what_it_wrote(tmp_path: Path) -> None:
    drawn = Drawn(model="Улица v3", shapes=("a", "b"))
    record = JobRecord(
        frames={10: FrameRecord(drawn=drawn), 2: FrameRecord(next=drawn)},
        run=ServerRun(function="unet", model="Улица v3", id="x", enqueued="2026"),
    )
    with PrelabelStore(tmp_path, server="http://cvat.example.org:8080") as store:
        assert store.load(7) == JobRecord()
        store.save(7, record)
        assert store.load(7) == record
        assert store.path(7) == tmp_path / "cvat.example.org_8080" / "job-7.json"
        store.path(8).write_text("{", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot be read"):
            store.load(8)
        store.path(9).write_bytes(store.path(7).read_bytes())
        with pytest.raises(ConfigError, match=r"about job 7 .*expected format 1, job 9"):
            store.load(9)
        store.path(9).write_text(json.dumps({"format": 1, "server": 3}), encoding="utf-8")
        with pytest.raises(ConfigError, match="Bring it back from a copy"):
            store.load(9)


@pytest.mark.parametrize("address", ["../..", "https://../x", "http://a/b/../../c", "http://[::1]:8080"])
def test_an_address_never_leaves_the_store(tmp_path: Path, address: str) -> None:
    assert PrelabelStore(tmp_path, server=address).path(1).parent.parent == tmp_path


@pytest.mark.parametrize(
    ("drawn", "present", "verdict"),
    [
        (Drawn(model=""), [], "empty"),
        (Drawn(model=""), ["a"], "people"),
        (Drawn(model="m", shapes=("a", "a")), ["a", "a"], "ours"),
        (Drawn(model="m", shapes=("a", "a")), ["a"], "people"),
        (Drawn(model="m", shapes=("a",)), ["a", "a"], "people"),
        (Drawn(model="m"), [], "ours"),
    ],
)
def test_whose_shapes_they_are(drawn: Drawn, present: list[str], verdict: str) -> None:
    assert judge(drawn, present) == verdict


def test_what_is_deleted_after_a_replacement() -> None:
    """The old ones and what came twice; a person's and the older of two equal ones stay."""
    record = FrameRecord(drawn=Drawn(model="old", shapes=("a", "b")), next=Drawn(model="new", shapes=("b", "c")))
    present = [(5, "c"), (1, "a"), (2, "b"), (3, "b"), (4, "c"), (6, "person's")]
    assert surplus(record, present) == [1, 3, 5]
    assert surplus(FrameRecord(drawn=record.drawn), present) == []


def test_a_run_of_the_server_is_ended_first(bench: Bench) -> None:
    with PrelabelStore(bench.store, server=bench.site.url) as store:
        store.save(bench.first, JobRecord(run=ServerRun(function="unet", model="Улица v3")))
    report = bench.run()
    assert report.drawn == 1
    assert len(report.failed) == 1
    assert "the function unet was started over it" in report.failed[0]
