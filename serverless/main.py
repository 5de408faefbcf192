"""The Nuclio function that CVAT calls: an event into a call, a result into a response.

CVAT posts `{"image": "<base64 of the original file>", "threshold": 0.5}`, the threshold only when it is not 0.
"""

import binascii
import json
import os
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nuclio_sdk

from sscloud.errors import ConfigError, ImageError, RequestError
from sscloud.shapes import MAX_REGIONS

if TYPE_CHECKING:
    from serverless.model_handler import ModelHandler
else:
    from model_handler import ModelHandler  # Nuclio puts the function's folder first on the path

BUNDLE = Path(__file__).resolve().parent / "bundle"

_WHITE_SPACE = b" \t\r\n"
_DATA_URL = re.compile(rb"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment sets."""

    min_area: int | None
    """Smallest region that is sent, pixels; None for one pixel of the model's scale."""
    max_regions: int
    """Most regions in one answer."""
    device: str
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read SSCLOUD_MIN_AREA, SSCLOUD_MAX_REGIONS and SSCLOUD_DEVICE.

        Raises:
            ConfigError: a value that is no whole number from 1.
        """
        return cls(
            min_area=_whole_number(environment, "SSCLOUD_MIN_AREA"),
            max_regions=_whole_number(environment, "SSCLOUD_MAX_REGIONS") or MAX_REGIONS,
            device=environment.get("SSCLOUD_DEVICE") or "auto",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request, checked."""

    image: bytes
    """An encoded picture (not yet decoded)."""
    threshold: float
    """Least probability of the pixels to send, 0 to 1."""


def init_context(context: nuclio_sdk.Context) -> None:
    """Load and warm up the model; Nuclio calls this once a worker.

    Raises:
        BundleError: the bundle is missing, damaged, or does not fit.
        ConfigError: a setting is wrong.
    """
    started = time.perf_counter()
    settings = Settings.from_environment(os.environ)
    model = ModelHandler(BUNDLE, device=settings.device, min_area=settings.min_area, max_regions=settings.max_regions)
    context.user_data.model = model
    context.logger.info_with(
        "The model is ready", model=model.manifest.title, milliseconds=_milliseconds_since(started)
    )


def handler(context: nuclio_sdk.Context, event: nuclio_sdk.Event) -> nuclio_sdk.Response:
    """Answer one request: 200 with a JSON list of regions, or 400 or 500 with `{"error": …}`.

    CVAT shows people the status only, so everything that goes wrong is logged here.
    """
    started = time.perf_counter()
    model: ModelHandler = context.user_data.model
    try:
        request = parse_request(event.body)
        answer = model.annotate(request.image, threshold=request.threshold)
    except (RequestError, ImageError) as error:
        context.logger.warn_with("Refused a request", error=str(error), model=model.manifest.title)
        return _response(context, 400, json.dumps({"error": str(error)}))
    except Exception as error:  # the worker lives on, whatever happens to one image
        context.logger.error_with("A request failed", error=repr(error), traceback=traceback.format_exc())
        message = f"{type(error).__name__}: {error}. This is a defect or a lack of memory; see the function's log."
        return _response(context, 500, json.dumps({"error": message}))
    height, width = answer.size_hw
    context.logger.info_with(
        "Answered",
        size=f"{width}x{height}",
        regions=answer.regions,
        milliseconds=_milliseconds_since(started),
        bytes=len(answer.body),
        model=model.manifest.title,
        **({"specks_left_out": answer.specks} if answer.specks else {}),
        **({"regions_beyond_limit_left_out": answer.surplus} if answer.surplus else {}),
    )
    return _response(context, 200, answer.body)


def parse_request(body: Any) -> Request:
    """Check what CVAT (or anybody) sent. Unknown keys are ignored.

    Args:
        body: the event's body: parsed JSON, or bytes or text when the content type was not exactly application/json.

    Raises:
        RequestError: what was found, what was expected.
    """
    fields = _parse_object(body)
    return Request(image=_parse_image(fields.get("image")), threshold=_parse_threshold(fields.get("threshold", 0)))


def _parse_object(body: Any) -> dict[str, Any]:
    expected = 'Send a JSON object such as {"image": "<base64 of a picture>", "threshold": 0.5}.'
    if body is None or body in (b"", ""):
        raise RequestError(f"The request has no body. {expected}")
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
            raise RequestError(f"The request's body is not JSON ({error}). {expected}") from error
    if not isinstance(body, dict):
        raise RequestError(f"The request's body is a JSON {_json_type(body)}, not an object. {expected}")
    return body


def _parse_image(value: Any) -> bytes:
    if value is None:
        raise RequestError("The request has no 'image'. Send the picture's file in base64.")
    if not isinstance(value, str):
        raise RequestError(f"'image' is a JSON {_json_type(value)}, not a string. Send the picture's file in base64.")
    try:
        text = value.encode("ascii").translate(None, _WHITE_SPACE)
        prefix = _DATA_URL.match(text)
        image = binascii.a2b_base64(text[prefix.end() :] if prefix else text, strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError
        raise RequestError(
            f"'image' is not valid base64 ({error}). Send the picture's file in standard base64 with its padding."
        ) from error
    if not image:
        raise RequestError("'image' is empty. Send the picture's file in base64.")
    return image


def _parse_threshold(value: Any) -> float:
    # The comparison comes before float(), which overflows on large integers; it is false for NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        shown = f"a JSON {_json_type(value)}" if isinstance(value, list | dict) else json.dumps(value)[:40]
        raise RequestError(f"'threshold' is {shown}, not a number from 0 to 1. Leave it out to get every region.")
    return float(value)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise ConfigError(f"{name} is {text!r}. Set a whole number from 1 (and below 10^9), or leave it out.")
    return int(text)


def _response(context: nuclio_sdk.Context, status: int, body: str) -> nuclio_sdk.Response:
    return context.Response(body=body, headers={}, content_type="application/json", status_code=status)


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
