"""The function follows a model volume: swaps and refusals while requests go on, over real sockets."""

import contextlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_versions import Versions
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import WEIGHTS, Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from sscloud.volume import BUNDLE, EXPECTED, POINTER, point, publish
from tools.function_folder import package
from tools.promotion import promote, roll_back

POLL = "0.05"


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> list[ModelBundle]:
    """Two versions of a model that do not agree."""
    folder = tmp_path_factory.mktemp("versions")
    made = []
    for version in (1, 2):
        model = make_unet(seed=version)
        manifest = make_manifest(model.architecture, name="street", version=version)
        made.append(save_bundle(folder / f"v{version}", model, manifest))
    return made


@pytest.fixture(scope="module")
def two_workers(bundles: list[ModelBundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A function of the first version with two workers."""
    folder = tmp_path_factory.mktemp("functions") / "street"
    package(bundles[0].path, folder)
    file = folder / "function.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("numWorkers: 1", "numWorkers: 2"), encoding="utf-8")
    return folder


def make_volume(volume: Path, bundles: list[ModelBundle]) -> Path:
    """A volume that holds the versions, and points at the first."""
    names = [publish(volume, bundle) for bundle in bundles]
    point(volume, names[0])
    return volume


@pytest.fixture(scope="module")
def body(make_picture: Any, make_body: Any) -> bytes:
    return bytes(make_body(make_picture((32, 64))))


def wait_for(condition: Callable[[], bool], *, within: float = 30) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within
        time.sleep(0.02)
    return time.monotonic() - started


def models_of(answer: Any) -> set[str]:
    """The models that the shapes of an answer name."""
    return {item["value"] for shape in answer.json() for item in shape["attributes"] if item["name"] == "model"}


def series(host: Any, name: str) -> dict[str, str]:
    """Labels → value of one series of a worker's metrics."""
    lines = (line for line in host.get_metrics().splitlines() if line.startswith(name + "{"))
    return dict(line.removeprefix(name).rsplit(" ", 1) for line in lines)


class Load:
    """Clients that ask without a pause, each answer looked at."""

    def __init__(self, host: Any, body: bytes, *, clients: int) -> None:
        self.failed: list[Any] = []
        self.mixed: list[set[str]] = []
        self.models: Counter[str] = Counter()
        self.bodies: dict[str, set[bytes]] = {}
        self.seconds: list[float] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(host, body)) for _ in range(clients)]

    def _ask(self, host: Any, body: bytes) -> None:
        while not self._ended.is_set():
            started = time.perf_counter()
            answer = host.post(body)
            self.seconds.append(time.perf_counter() - started)
            if answer.status != 200:
                self.failed.append(answer)
                continue
            names = models_of(answer)
            if len(names) != 1:
                self.mixed.append(names)
                continue
            (name,) = names
            self.models[name] += 1
            self.bodies.setdefault(name, set()).add(answer.body)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def check(self) -> None:
        """No request failed, no answer is of two models, and a version's answers are all the same."""
        assert not self.failed
        assert not self.mixed
        assert all(len(bodies) == 1 for bodies in self.bodies.values())


def swing(volume: Path, folder: str, load: Load, title: str) -> float:
    """Point at a version, and wait for its next answer; returns the seconds."""
    before = load.models[title]
    point(volume, folder)
    return wait_for(lambda: load.models[title] > before)


def served_by_both(host: Any) -> set[str]:
    """Titles that the two workers name; empty until both were met."""
    found: dict[str, str] = {}
    for _ in range(12):
        found.update(re.findall(r'worker="(\d)",model="([^"]*)"', str(series(host, "sscloud_model_info"))))
    return set(found.values()) if len(found) == 2 else set()


def refused_by_any(host: Any) -> bool:
    return any(series(host, "sscloud_model_refused") for _ in range(8))


def with_other_labels(
    path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> ModelBundle:
    labels = [{"name": "Фон", "id": 0, "background": True}, {"name": "Дом", "id": 6}]
    schema = LabelSchema.from_dict({"labels": labels}, source="test")
    model = make_unet(Architecture(classes=2, base_width=4))
    manifest = make_manifest(model.architecture, name="street", version=9, labels=schema, label_ids=(0, 6))
    return save_bundle(path, model, manifest)


def folders(volume: Path) -> list[str]:
    return sorted(path.name for path in volume.iterdir() if not path.name.startswith(".") and path.is_dir())


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, bundles: list[ModelBundle]) -> Path:
    """The volume that `host` follows: both versions, pointing at the first."""
    return make_volume(tmp_path_factory.mktemp("followed") / "served", bundles)


@pytest.fixture(scope="module")
def host(two_workers: Path, run_host: Any, followed: Path) -> Iterator[Any]:
    with run_host(two_workers, "--models", str(followed), SSCLOUD_POLL=POLL, OMP_NUM_THREADS="1") as host:
        yield host
    assert host.process.returncode == 0
    assert "Traceback" not in host.log


class TestUnderLoad:
    """One host, whose requests all succeed, whatever happens to its volume."""

    @pytest.fixture(autouse=True)
    def first_version(self, host: Any, followed: Path, body: bytes) -> None:
        """Each test begins with the first version served by both workers."""
        point(followed, folders(followed)[0])
        wait_for(lambda: served_by_both(host) == {"street v1"})

    def test_swaps_back_and_forth(self, host: Any, followed: Path, body: bytes) -> None:
        first, second = folders(followed)
        with Load(host, body, clients=3) as load:
            wait_for(lambda: load.models["street v1"] > 3)
            swing(followed, second, load, "street v2")
            swing(followed, first, load, "street v1")
            swing(followed, second, load, "street v2")
        load.check()
        assert load.models.keys() == {"street v1", "street v2"}
        assert load.bodies["street v1"] != load.bodies["street v2"]
        wait_for(lambda: served_by_both(host) == {"street v2"})
        assert "'model': 'street v2', 'before': 'street v1'" in host.log

    def test_the_dashboard_shows_what_is_pointed_at(self, host: Any, followed: Path) -> None:
        assert host.get("/api/functions/sscloud-street").json()["metadata"]["annotations"]["version"] == "1"
        point(followed, folders(followed)[1])
        listed = host.get("/api/functions/sscloud-street").json()
        assert listed["metadata"]["annotations"]["name"] == "street v2"
        assert listed["metadata"]["annotations"]["version"] == "2"
        assert "street v2" in listed["spec"]["description"]
        wait_for(lambda: served_by_both(host) == {"street v2"})

    def test_refusals(
        self, host: Any, followed: Path, body: bytes, tmp_path: Path, make_unet: Callable[..., UNet],
        make_manifest: Callable[..., Manifest],
    ) -> None:  # fmt: skip
        """Whatever is wrong with a version, the old one answers on, and the log says why, once."""
        first, second = folders(followed)
        good = tmp_path / "good"
        shutil.copytree(followed / second, good)

        def other_labels() -> None:
            point(followed, publish(followed, with_other_labels(tmp_path / "other", make_unet, make_manifest)))

        def truncated() -> None:
            weights = followed / second / BUNDLE / WEIGHTS
            weights.write_bytes(weights.read_bytes()[:-100])
            point(followed, second)

        def other_result() -> None:
            file = followed / second / EXPECTED
            Image.fromarray(np.roll(np.array(Image.open(file)), 20, axis=0)).save(file)
            point(followed, second)

        def no_pointer() -> None:
            atomic_write(followed / POINTER, b'{"format": 1, "bundle": "../../etc"}')

        faults = {
            other_labels: "has the labels Дом, but this function declares",
            truncated: "is damaged or was exchanged: its sha256",
            other_result: "of the test panorama's pixels get another label",
            no_pointer: "expected an object with format, bundle",
        }
        with Load(host, body, clients=2) as load:
            for fault, message in faults.items():
                fault()
                wait_for(lambda message=message: host.log.count(message) == 2)  # each worker says it
                assert series(host, "sscloud_model_refused")
                point(followed, first)
                wait_for(lambda: not refused_by_any(host))
                shutil.rmtree(followed / second)
                shutil.copytree(good, followed / second)
            assert load.models.keys() == {"street v1"}
            swing(followed, second, load, "street v2")
        load.check()
        assert host.log.count("is refused") == 2 * len(faults), "once a fault and worker, not once a look"

    def test_the_volume_goes_away_for_a_while(self, host: Any, followed: Path, body: bytes) -> None:
        away = followed.rename(followed.with_name("away"))
        try:
            wait_for(lambda: host.log.count("cannot be read now") == 2)
            assert models_of(host.post(body)) == {"street v1"}
            point(away, folders(away)[1])
        finally:
            away.rename(followed)
        wait_for(lambda: served_by_both(host) == {"street v2"})


class TestStart:
    @pytest.mark.parametrize(
        ("pointer", "message"),
        [
            (b"{", "is not valid JSON"),
            (json.dumps({"format": 1, "bundle": "street-v9-0123456789ab", "weights_sha256": "0" * 64, "published": ""}).encode(), "cannot be read now"),  # noqa: E501
        ],
    )  # fmt: skip
    def test_a_broken_pointer(
        self, start_function: Any, bundles: list[ModelBundle], tmp_path: Path, body: bytes, capfd: Any,
        pointer: bytes, message: str,
    ) -> None:  # fmt: skip
        """The packaged bundle answers."""
        (tmp_path / POINTER).write_bytes(pointer)
        with started(start_function, bundles[0].path, SSCLOUD_MODELS=str(tmp_path), SSCLOUD_POLL="30") as function:
            assert "'street v1'" in function.ask(body).log
        assert message in capfd.readouterr().err

    def test_without_a_pointer(
        self, start_function: Any, bundles: list[ModelBundle], tmp_path: Path, body: bytes, capfd: Any
    ) -> None:
        with started(start_function, bundles[0].path, SSCLOUD_MODELS=str(tmp_path), SSCLOUD_POLL="30") as function:
            assert "'street v1'" in function.ask(body).log
            function.context.user_data.champion.look()
        log = capfd.readouterr().err
        assert log.count("names no version: none was promoted yet, or it is not mounted") == 1, "once, not once a look"
        assert "cannot be read" not in log

    def test_every_outage_is_told_once(
        self, start_function: Any, bundles: list[ModelBundle], tmp_path: Path, capfd: Any
    ) -> None:
        volume = make_volume(tmp_path / "served", bundles[:1])
        with started(start_function, bundles[0].path, SSCLOUD_MODELS=str(volume), SSCLOUD_POLL="30") as function:
            champion = function.context.user_data.champion
            for outages in (1, 2):
                away = volume.rename(tmp_path / "away")
                champion.look()
                champion.look()
                away.rename(volume)
                champion.look()
                assert capfd.readouterr().err.count("cannot be read now") == 1, outages
            assert champion.model.manifest.title == "street v1"

    def test_the_champion_at_once(
        self, start_function: Any, bundles: list[ModelBundle], tmp_path: Path, body: bytes
    ) -> None:
        volume = make_volume(tmp_path / "served", bundles)
        point(volume, folders(volume)[1])
        with started(start_function, bundles[0].path, SSCLOUD_MODELS=str(volume), SSCLOUD_POLL="30") as function:
            assert "'street v2'" in function.ask(body).log


@pytest.mark.slow
def test_promotions_and_rollbacks_without_one_failed_request(
    two_workers: Path, run_host: Any, bundles: list[ModelBundle], make_picture: Any, make_body: Any, tmp_path: Path
) -> None:
    """As people do it, again and again, while clients ask without a pause; says how long they take."""
    volume, versions, body = tmp_path / "served", Versions(bundles), make_body(make_picture((128, 256)))
    lines: list[str] = []
    with run_host(two_workers, "--models", str(volume), OMP_NUM_THREADS="1") as host:
        url = f"http://127.0.0.1:{host.function_port}"
        seconds = []
        with Load(host, body, clients=3) as load:
            for version in (1, 2):
                promote(versions, version, volume=volume, function=None, say=lines.append, url=url)  # type: ignore[arg-type]
            for _ in range(5):
                back = roll_back(versions, volume=volume, function=None, say=lines.append, url=url)  # type: ignore[arg-type]
                on = promote(versions, 2, volume=volume, function=None, say=lines.append, url=url)  # type: ignore[arg-type]
                seconds += [back.seconds, on.seconds]
        load.check()
        assert load.models.keys() == {"street v1", "street v2"}
        assert host.log.count("A new champion is served") == 2 * 12
    taken = sorted(each for each in seconds if each is not None)
    asked = sorted(load.seconds)
    print(
        f"{len(taken)} swaps under load: median {taken[len(taken) // 2]:.2f} s, longest {taken[-1]:.2f} s; "
        f"{len(asked)} requests, none failed: median {asked[len(asked) // 2]:.3f} s, longest {asked[-1]:.3f} s"
    )


@contextlib.contextmanager
def started(start_function: Any, bundle: Path, **environment: str) -> Iterator[Any]:
    function = start_function(bundle, **environment)
    try:
        yield function
    finally:
        function.context.user_data.champion.stop()
