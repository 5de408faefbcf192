"""main.py without a server: requests, and what is logged, counted and answered when the model fails."""

import base64
import functools
import importlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nuclio_sdk
import nuclio_sdk.logger
import pytest

import serverless
from serverless.metrics import Metrics
from serverless.settings import Settings
from sscloud.errors import ImageError, RequestError


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(serverless.__file__).parent))  # as Nuclio does with the function's folder
    return importlib.import_module("serverless.main")


@pytest.fixture
def parse(main: ModuleType) -> Callable[..., Any]:
    return functools.partial(main.parse_request, size=0, max_bytes=1000)


def body(**fields: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(b"picture").decode(), **fields}


class TestParseRequest:
    @pytest.mark.parametrize("convert", [lambda b: b, json.dumps, lambda b: json.dumps(b).encode()])
    def test_parsed_text_or_bytes(self, main: ModuleType, parse: Any, convert: Any) -> None:
        request = parse(convert(body(threshold=0.25)))
        assert request == main.Request(image=b"picture", threshold=0.25)

    @pytest.mark.parametrize(("value", "threshold"), [(0, 0.0), (1, 1.0), (0.5, 0.5)])
    def test_threshold(self, parse: Any, value: float, threshold: float) -> None:
        parsed = parse(body(threshold=value)).threshold
        assert (parsed, type(parsed)) == (threshold, float)

    def test_no_threshold_means_every_region(self, parse: Any) -> None:
        assert parse(body()).threshold == 0.0

    @pytest.mark.parametrize(
        "image",
        ["cGlj dHVy\r\nZQ==\n", "data:image/png;base64,cGljdHVyZQ==", "data:image/svg+xml;base64,\ncGljdHVyZQ=="],
    )
    def test_white_space_and_data_urls(self, parse: Any, image: str) -> None:
        assert parse({"image": image}).image == b"picture"

    def test_other_data_urls_are_refused(self, parse: Any) -> None:
        with pytest.raises(RequestError, match="not valid base64"):
            parse({"image": "data:text/plain;base64,cGljdHVyZQ=="})

    @pytest.mark.parametrize("image", ["cGljdHVyZQ", "cGljdHVyZQ=", "cGljdHVyZQ==AAAA", "cGlj_HVy", "=cGljdHVyZQ"])
    def test_broken_base64(self, parse: Any, image: str) -> None:
        with pytest.raises(RequestError, match="not valid base64"):
            parse({"image": image})

    def test_a_huge_threshold_is_no_defect(self, parse: Any) -> None:
        with pytest.raises(RequestError, match="'threshold' is 1000000"):
            parse(body(threshold=10**400))

    def test_of_a_key_that_is_there_twice_the_last_counts(self, parse: Any) -> None:
        text = '{"image": "@", "threshold": 7, "image": "cGljdHVyZQ==", "threshold": 0.5}'
        assert (parse(text).image, parse(text).threshold) == (b"picture", 0.5)

    def test_the_image_is_not_in_memory_twice(self, parse: Any) -> None:
        fields = body(threshold=0.5)
        parse(fields)
        assert fields == {"threshold": 0.5}

    def test_the_size_is_looked_at_first(self, main: ModuleType) -> None:
        with pytest.raises(RequestError, match=r"^The request has 1001 bytes; at most 1000.*SSCLOUD_MAX_BYTES"):
            main.parse_request(b"{", size=1001, max_bytes=1000)
        with pytest.raises(RequestError, match="is not JSON"):
            main.parse_request(b"{", size=1000, max_bytes=1000)


class BrokenModel:
    """A model that fails."""

    manifest = type("Manifest", (), {"title": "broken v1"})

    def __init__(self, error: Exception) -> None:
        self._error = error

    def annotate(self, image: bytes, **_: Any) -> None:
        raise self._error


def ask(main: ModuleType, error: Exception, **event: Any) -> tuple[nuclio_sdk.Response, str, Metrics]:
    """Answer a request with a model that raises; returns the response, the log and the counts."""
    log = io.StringIO()
    logger = nuclio_sdk.Logger(logging.INFO, "test_main")
    logger.set_handler("default", log, nuclio_sdk.logger.HumanReadableFormatter())
    context = nuclio_sdk.Context(logger)
    context.user_data.champion = SimpleNamespace(model=BrokenModel(error))
    context.user_data.settings = Settings()
    context.user_data.metrics = Metrics(worker="0", model="broken v1")
    response = main.handler(context, nuclio_sdk.Event(**{"body": body(), **event}))
    return response, log.getvalue(), context.user_data.metrics


def test_a_defect_is_500_and_logged_with_its_traceback(main: ModuleType) -> None:
    response, log, metrics = ask(main, ZeroDivisionError("a defect"))
    assert (response.status_code, response.content_type) == (500, "application/json")
    assert "ZeroDivisionError: a defect" in json.loads(response.body)["error"]
    assert "[error] A request failed" in log
    assert "in annotate" in log, "the traceback"
    assert 'status="500"} 1' in metrics.text()


def test_a_refusal_is_one_line_whatever_its_message_holds(main: ModuleType) -> None:
    response, log, metrics = ask(main, ImageError("The image is\nbroken:\r\n\tbad bytes"), size=70)
    assert response.status_code == 400
    assert json.loads(response.body) == {"error": "The image is broken: bad bytes"}
    assert log.count("\n") == 1
    assert "Refused a request" in log
    assert "'request_bytes': 70" in log
    assert 'status="400"} 1' in metrics.text()


def test_metrics_are_asked_by_get_on_their_own_path(main: ModuleType) -> None:
    response, log, metrics = ask(main, ZeroDivisionError(), method="GET", path="/metrics")
    assert (response.status_code, response.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert response.body.splitlines()[2:6] == metrics.text().splitlines()[2:6]
    assert log == ""
    for event in ({"method": "POST", "path": "/metrics"}, {"method": "GET", "path": "/"}):
        assert ask(main, ZeroDivisionError(), **event)[0].status_code == 500, "a request like any other"
