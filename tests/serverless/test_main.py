"""main.py without a server: requests, settings, and what happens when the model fails."""

import base64
import importlib
import io
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import nuclio_sdk
import nuclio_sdk.logger
import pytest

import serverless
from sscloud.errors import ConfigError, RequestError


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(serverless.__file__).parent))  # as Nuclio does with the function's folder
    return importlib.import_module("serverless.main")


def body(**fields: Any) -> dict[str, Any]:
    return {"image": base64.b64encode(b"picture").decode(), **fields}


class TestParseRequest:
    @pytest.mark.parametrize("convert", [lambda b: b, json.dumps, lambda b: json.dumps(b).encode()])
    def test_parsed_text_or_bytes(self, main: ModuleType, convert: Any) -> None:
        request = main.parse_request(convert(body(threshold=0.25)))
        assert request == main.Request(image=b"picture", threshold=0.25)

    @pytest.mark.parametrize(("value", "threshold"), [(0, 0.0), (1, 1.0), (0.5, 0.5)])
    def test_threshold(self, main: ModuleType, value: float, threshold: float) -> None:
        parsed = main.parse_request(body(threshold=value)).threshold
        assert (parsed, type(parsed)) == (threshold, float)

    def test_no_threshold_means_every_region(self, main: ModuleType) -> None:
        assert main.parse_request(body()).threshold == 0.0

    @pytest.mark.parametrize(
        "image",
        ["cGlj dHVy\r\nZQ==\n", "data:image/png;base64,cGljdHVyZQ==", "data:image/svg+xml;base64,\ncGljdHVyZQ=="],
    )
    def test_white_space_and_data_urls(self, main: ModuleType, image: str) -> None:
        assert main.parse_request({"image": image}).image == b"picture"

    def test_other_data_urls_are_refused(self, main: ModuleType) -> None:
        with pytest.raises(RequestError, match="not valid base64"):
            main.parse_request({"image": "data:text/plain;base64,cGljdHVyZQ=="})

    @pytest.mark.parametrize("image", ["cGljdHVyZQ", "cGljdHVyZQ=", "cGljdHVyZQ==AAAA", "cGlj_HVy", "=cGljdHVyZQ"])
    def test_broken_base64(self, main: ModuleType, image: str) -> None:
        with pytest.raises(RequestError, match="not valid base64"):
            main.parse_request({"image": image})

    def test_a_huge_threshold_is_no_defect(self, main: ModuleType) -> None:
        with pytest.raises(RequestError, match="'threshold' is 1000000"):
            main.parse_request(body(threshold=10**400))


class TestSettings:
    def test_defaults(self, main: ModuleType) -> None:
        assert main.Settings.from_environment({}) == main.Settings(min_area=None, max_regions=1000, device="auto")

    def test_set(self, main: ModuleType) -> None:
        environment = {"SSCLOUD_MIN_AREA": "7", "SSCLOUD_MAX_REGIONS": "50", "SSCLOUD_DEVICE": "cuda:1"}
        expected = main.Settings(min_area=7, max_regions=50, device="cuda:1")
        assert main.Settings.from_environment(environment) == expected

    @pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "٣", "1" * 5000])
    def test_no_whole_number(self, main: ModuleType, value: str) -> None:
        with pytest.raises(ConfigError, match=r"SSCLOUD_MIN_AREA is .* Set a whole number from 1"):
            main.Settings.from_environment({"SSCLOUD_MIN_AREA": value})


class BrokenModel:
    """A model with a defect."""

    manifest = type("Manifest", (), {"title": "broken v1"})

    def annotate(self, image: bytes, *, threshold: float) -> None:
        raise ZeroDivisionError("a defect")


def test_a_defect_is_500_and_logged_with_its_traceback(main: ModuleType) -> None:
    log = io.StringIO()
    logger = nuclio_sdk.Logger(logging.INFO, "test_main")
    logger.set_handler("default", log, nuclio_sdk.logger.HumanReadableFormatter())
    context = nuclio_sdk.Context(logger)
    context.user_data.model = BrokenModel()
    response = main.handler(context, nuclio_sdk.Event(body=body()))
    assert (response.status_code, response.content_type) == (500, "application/json")
    assert "ZeroDivisionError: a defect" in json.loads(response.body)["error"]
    assert "[error] A request failed" in log.getvalue()
    assert "in annotate" in log.getvalue(), "the traceback"
