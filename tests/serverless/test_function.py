"""The packaged function over a real socket, asked as CVAT asks: directly and through the dashboard."""

import base64
import json
import shutil
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from sscloud.bundle import WEIGHTS, ModelBundle
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.shapes import paint_answer

MIN_AREA = 4  # one pixel of scale 0.5


@pytest.fixture(scope="module")
def host(function_folder: Path, run_host: Callable[..., Any]) -> Iterator[Any]:
    with run_host(function_folder) as host:
        yield host


@pytest.fixture(params=["direct", "dashboard"])
def ask(request: pytest.FixtureRequest, host: Any) -> Callable[..., Any]:
    return host.post if request.param == "direct" else host.invoke


@pytest.fixture(scope="module")
def predictor(varied_bundle: Path) -> Predictor:
    return Predictor(ModelBundle.load(varied_bundle), device="cpu")


def without_specks(label_map: NDArray[np.uint8], sure: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """What an answer can rebuild: unsure pixels and components below MIN_AREA are background (0)."""
    expected = np.zeros_like(label_map)
    for label_id in np.unique(label_map[label_map > 0]):
        chosen = (label_map == label_id) & (True if sure is None else sure)
        count, parts = cv2.connectedComponents(chosen.astype(np.uint8), connectivity=4)
        for part in range(1, count):
            if np.count_nonzero(parts == part) >= MIN_AREA:
                expected[parts == part] = label_id
    return expected


def rebuild(items: list[dict[str, Any]], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    schema = LabelSchema.default()

    def label_id_of(name: str) -> int:
        label = schema.find(name)
        assert label is not None
        return label.id

    return paint_answer(items, size_hw, label_id_of=label_id_of, fill=0)


class TestGoodRequests:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_regions_rebuild_the_predicted_label_map(
        self, ask: Any, predictor: Predictor, make_picture: Any, make_body: Any, kind: str
    ) -> None:
        picture = make_picture(kind=kind)
        answer = ask(make_body(picture))
        predicted = predictor.predict(picture)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert predicted.wrapped
        assert len(np.unique(predicted.label_map)) > 3, "the fixture's model is meant to see several labels"
        np.testing.assert_array_equal(rebuild(answer.json(), (64, 128)), without_specks(predicted.label_map))

    def test_every_item_is_what_cvat_reads(self, ask: Any, make_picture: Any, make_body: Any) -> None:
        items = ask(make_body(make_picture())).json()
        assert items
        for item in items:
            assert item.keys() == {"label", "type", "mask", "points", "confidence", "attributes"}
            assert item["type"] == "mask"
            assert item["label"] != "Фон"
            left, top, right, bottom = item["mask"][-4:]
            assert 0 <= left <= right < 128
            assert 0 <= top <= bottom < 64
            assert set(item["mask"][:-4]) <= {0, 1}
            assert sum(item["mask"][:-4]) >= MIN_AREA
            assert len(item["points"]) >= 6
            assert len(item["points"]) % 2 == 0
            assert 0 <= float(item["confidence"]) <= 1
            assert item["attributes"] == [
                {"name": "model", "value": "varied v3"},
                {"name": "confidence", "value": item["confidence"]},
            ]

    def test_filled_outlines_are_the_masks(self, host: Any, make_picture: Any, make_body: Any) -> None:
        for item in host.post(make_body(make_picture())).json():
            left, top, right, bottom = item["mask"][-4:]
            crop = np.array(item["mask"][:-4]).reshape(bottom - top + 1, right - left + 1)
            mask = np.zeros((64, 128), np.uint8, order="F")
            mask[top : bottom + 1, left : right + 1] = crop
            filled = coco.frPyObjects([item["points"]], 64, 128)[0]  # as CVAT fills polygons
            assert filled["counts"] == coco.encode(mask)["counts"]

    def test_labels_and_attributes_are_declared_in_the_spec(self, host: Any, make_picture: Any, make_body: Any) -> None:
        function = host.get("/api/functions/sscloud-varied").json()
        spec = {label["name"]: label for label in json.loads(function["metadata"]["annotations"]["spec"])}
        for item in host.post(make_body(make_picture())).json():
            declared = {attribute["name"] for attribute in spec[item["label"]]["attributes"]}
            assert {attribute["name"] for attribute in item["attributes"]} == declared

    @pytest.mark.parametrize("threshold", [0.6, 0.9, 1.0])
    def test_threshold_drops_unsure_pixels(
        self, host: Any, predictor: Predictor, make_picture: Any, make_body: Any, threshold: float
    ) -> None:
        picture = make_picture()
        predicted = predictor.predict(picture)
        answer = host.post(make_body(picture, threshold=threshold))
        expected = without_specks(predicted.label_map, predicted.confidence.at_least(threshold))
        np.testing.assert_array_equal(rebuild(answer.json(), (64, 128)), expected)

    @pytest.mark.parametrize("size_hw", [(64, 64), (48, 160), (33, 47)])
    def test_a_crop_is_not_wrapped(
        self, ask: Any, predictor: Predictor, make_picture: Any, make_body: Any, size_hw: tuple[int, int]
    ) -> None:
        picture = make_picture(size_hw)
        predicted = predictor.predict(picture)
        assert not predicted.wrapped
        items = ask(make_body(picture)).json()
        np.testing.assert_array_equal(rebuild(items, size_hw), without_specks(predicted.label_map))

    def test_lenient_forms_give_the_same_answer(self, host: Any, make_picture: Any, make_body: Any) -> None:
        picture = make_picture()
        expected = host.post(make_body(picture)).body
        lines = base64.encodebytes(picture).decode()
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        assert host.post(json.dumps({"image": lines}).encode()).body == expected
        assert host.post(json.dumps({"image": url, "frame": 3, "labels": []}).encode()).body == expected
        assert host.post(make_body(picture), "application/json; charset=utf-8").body == expected
        assert host.post(make_body(picture), "text/plain").body == expected
        assert host.post(make_body(picture, threshold=0)).body == expected

    def test_every_request_leaves_one_line(self, host: Any, make_picture: Any, make_body: Any) -> None:
        before = host.log.count("Answered")
        body = host.post(make_body(make_picture())).body
        line = host.log.splitlines()[-1]
        assert host.log.count("Answered") == before + 1
        stages = ("parse", "decode", "resize", "forward", "upsample", "regions", "answer")
        parts = ["'size': '128x64'", "'regions': ", "'milliseconds': ", f"'answer_bytes': {len(body)}", "varied v3"]
        for part in parts + [f"'{stage}': " for stage in stages]:
            assert part in line

    def test_metrics(self, host: Any, make_picture: Any, make_body: Any) -> None:
        def answered() -> int:
            return int(host.get_metrics().split('status="200"} ')[1].split()[0])

        before = answered()
        host.post(make_body(make_picture()))
        lines = len(host.log.splitlines())
        assert answered() == before + 1
        assert len(host.log.splitlines()) == lines, "a scrape is no request"

    def test_identical_requests_have_identical_answers(self, ask: Any, make_picture: Any, make_body: Any) -> None:
        body = make_body(make_picture(kind="JPEG"))
        assert len({ask(body).body for _ in range(4)}) == 1


def picture_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image(data: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(data).decode()}).encode()


BAD_BODIES = {
    "no body": (b"", "no body"),
    "not JSON": (b"image=1", "is not JSON"),
    "not UTF-8": (b'{"image": "\xff"}', "is not JSON"),
    "too deep": (b"[" * 100_000, "is not JSON"),
    "an array": (b'["image"]', "a JSON array, not an object"),
    "null": (b"null", "no body"),
    "no image": (b'{"threshold": 0.5}', "has no 'image'"),
    "image is a number": (b'{"image": 7}', "'image' is a JSON number"),
    "image is empty": (b'{"image": ""}', "'image' is empty"),
    "only a data URL's head": (b'{"image": "data:image/png;base64,"}', "'image' is empty"),
    "broken base64": (b'{"image": "@@@@"}', "not valid base64"),
    "base64 without padding": (b'{"image": "QUJDRA"}', "not valid base64"),
    "base64 in Cyrillic": ('{"image": "Земля"}'.encode(), "not valid base64"),
    "not an image": (image(b"hello, this is no picture"), "not a picture"),
    "a decompression bomb": (image(picture_of_size(60_000, 60_000)), "too large"),
    "an image without pixels": (image(picture_of_size(128, 64)), "broken or truncated"),
}
BAD_THRESHOLDS = ["0.5", True, -0.1, 1.01, float("nan"), float("inf"), None, [0.5], 10**400]


class TestBadRequests:
    @pytest.mark.parametrize("name", BAD_BODIES)
    def test_400_says_what_was_wrong(self, ask: Any, host: Any, make_picture: Any, make_body: Any, name: str) -> None:
        body, expected = BAD_BODIES[name]
        self.check(ask, host, body, expected)
        assert ask(make_body(make_picture())).status == 200

    @pytest.mark.parametrize("threshold", BAD_THRESHOLDS, ids=lambda value: str(value)[:8])
    def test_threshold(self, ask: Any, host: Any, make_picture: Any, make_body: Any, threshold: Any) -> None:
        self.check(ask, host, make_body(make_picture(), threshold=threshold), "not a number from 0 to 1")
        assert ask(make_body(make_picture())).status == 200

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_truncated(self, ask: Any, host: Any, make_picture: Any, make_body: Any, kind: str) -> None:
        picture = make_picture(kind=kind)
        self.check(ask, host, make_body(picture[: len(picture) // 2]), "broken or truncated")
        assert ask(make_body(picture)).status == 200

    @pytest.mark.parametrize("size_hw", [(1, 1), (31, 128), (64, 31)])
    def test_too_small(self, ask: Any, host: Any, make_picture: Any, make_body: Any, size_hw: tuple[int, int]) -> None:
        self.check(ask, host, make_body(make_picture(size_hw)), "too small for this model.*at least 32 pixels")
        assert ask(make_body(make_picture())).status == 200

    @staticmethod
    def check(ask: Any, host: Any, body: bytes, expected: str) -> None:
        answer = ask(body)
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
        assert answer.json().keys() == {"error"}
        with pytest.raises(ValueError, match=expected):
            raise ValueError(answer.json()["error"])
        assert "[warning] Refused a request" in host.log.splitlines()[-1]


class TestSettings:
    def test_min_area_and_max_regions(
        self, function_folder: Path, run_host: Any, predictor: Predictor, make_picture: Any, make_body: Any
    ) -> None:
        picture = make_picture()
        with run_host(function_folder, SSCLOUD_MIN_AREA="1", SSCLOUD_MAX_REGIONS="5", SSCLOUD_DEVICE="cpu") as host:
            items = host.post(make_body(picture)).json()
            assert len(items) == 5
            assert "regions_beyond_limit_left_out" in host.log
        areas = [sum(item["mask"][:-4]) for item in items]
        assert areas == sorted(areas, reverse=True)
        painted = rebuild(items, (64, 128))
        assert (painted[painted > 0] == predictor.predict(picture).label_map[painted > 0]).all()

    def test_polygons_of_a_small_request(
        self, function_folder: Path, run_host: Any, make_picture: Any, make_body: Any
    ) -> None:
        body = make_body(make_picture(kind="JPEG"))
        limits = {"SSCLOUD_MAX_BYTES": str(len(body)), "SSCLOUD_MAX_PIXELS": str(64 * 128)}
        with run_host(function_folder, SSCLOUD_SHAPES="polygon", SSCLOUD_DECODE="draft", **limits) as host:
            items = host.post(body).json()
            assert {item["type"] for item in items} == {"polygon"}
            assert all(len(item["points"]) >= 6 for item in items)
            assert "raise SSCLOUD_MAX_BYTES" in host.post(body + b" ").json()["error"]
            assert "at most" in host.post(make_body(make_picture((65, 128), kind="JPEG"))).json()["error"]

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("SSCLOUD_MIN_AREA", "some", "SSCLOUD_MIN_AREA is 'some'"),
            ("SSCLOUD_MAX_REGIONS", "0", "SSCLOUD_MAX_REGIONS is '0'"),
            ("SSCLOUD_DEVICE", "toaster", "The device 'toaster' cannot be used here"),
            ("SSCLOUD_MINAREA", "5", "SSCLOUD_MINAREA is no setting of this function"),
        ],
    )
    def test_wrong_settings_stop_the_start(
        self, function_folder: Path, start_serve: Any, tmp_path: Path, name: str, value: str, message: str
    ) -> None:
        assert message in self.failed_start(start_serve, function_folder, tmp_path / "log", **{name: value})

    def test_a_damaged_bundle_stops_the_start(self, function_folder: Path, start_serve: Any, tmp_path: Path) -> None:
        folder = tmp_path / "function"
        shutil.copytree(function_folder, folder)
        weights = folder / "bundle" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        log = self.failed_start(start_serve, folder, tmp_path / "log")
        assert "does not start" in log
        assert "is damaged or was exchanged: its sha256 is" in log
        assert "Traceback" not in log

    def test_a_missing_bundle_stops_the_start(self, function_folder: Path, start_serve: Any, tmp_path: Path) -> None:
        folder = tmp_path / "function"
        shutil.copytree(function_folder, folder)
        shutil.rmtree(folder / "bundle")
        assert "is no bundle" in self.failed_start(start_serve, folder, tmp_path / "log")

    @staticmethod
    def failed_start(start_serve: Any, folder: Path, log: Path, **environment: str) -> str:
        process: subprocess.Popen[str]
        with start_serve(folder, log=log, **environment) as process:
            process.communicate(timeout=60)
        assert process.returncode == 2
        return log.read_text(encoding="utf-8")


def test_the_packaged_copy_of_the_core_is_what_serves(
    function_folder: Path, run_host: Any, tmp_path: Path, make_picture: Any, make_body: Any
) -> None:
    folder = tmp_path / "function"
    shutil.copytree(function_folder, folder)
    core = folder / "sscloud" / "inference.py"
    core.write_text(core.read_text(encoding="utf-8") + '\nprint("packaged core")\n', encoding="utf-8")
    with run_host(folder) as host:
        assert "packaged core" in host.log
        assert host.post(make_body(make_picture())).status == 200
    assert not list(folder.rglob("__pycache__"))


def test_a_worker_that_is_told_to_end_ends_by_itself(
    function_folder: Path, run_host: Any, make_picture: Any, make_body: Any
) -> None:
    body = make_body(make_picture())
    with run_host(function_folder) as host:
        expected = host.post(body).body
        (worker,) = psutil.Process(host.process.pid).children()
        worker.send_signal(signal.SIGUSR1)
        psutil.wait_procs([worker], timeout=30)
        deadline = time.monotonic() + 60
        while (answer := host.post(body)).status != 200:
            assert answer.status in (502, 503)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "Told to end: the worker ends" in host.log
        assert "worker ended (status 0)" in host.log, "Nuclio takes any other status for a crash"
        assert answer.body == expected
