"""The Nuclio function that CVAT calls: an event into a call, a result into a response.

CVAT posts `{"image": "<base64 of the original file>", "threshold": 0.5}`, the threshold only when it is not 0; of a key
that is there twice the last one counts. `GET /metrics` answers counts and latencies (see metrics.py).
"""

import binascii
import json
import os
import re
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import nuclio_sdk

from sscloud.errors import ImageError, RequestError
from sscloud.stages import Stages

if TYPE_CHECKING:
    from serverless.champion import Champion
    from serverless.metrics import CONTENT_TYPE, Metrics
    from serverless.settings import Settings
else:  # Nuclio puts the function's folder first on the path
    from champion import Champion
    from metrics import CONTENT_TYPE, Metrics
    from settings import Settings

BUNDLE = Path(__file__).resolve().parent / "bundle"
METRICS_PATH = "/metrics"

_WHITE_SPACE = b" \t\r\n"
_DATA_URL = re.compile(rb"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request, checked."""

    image: bytes
    """An encoded picture (not yet decoded)."""
    threshold: float
    """Least probability of the pixels to send, 0 to 1."""


def init_context(context: nuclio_sdk.Context) -> None:
    """Load and warm up the model, and follow the model volume; Nuclio calls this once a worker.

    Raises:
        BundleError: the bundle is missing, damaged, or does not fit.
        ConfigError: a setting is wrong.
    """
    started = time.perf_counter()
    # A picture with odd metadata is answered like any other; what Pillow has to say about it is no line of its own.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    settings = Settings.from_environment(os.environ)
    champion = Champion(BUNDLE, settings)
    model = champion.model
    context.user_data.settings = settings
    context.user_data.champion = champion
    context.user_data.metrics = Metrics(worker=str(context.worker_id), model=model.manifest.title)
    champion.follow(context.user_data.metrics)
    context.platform.set_termination_callback(lambda: _end(context))
    context.platform.set_drain_callback(lambda: context.logger.info("Told to take no more requests"))
    context.logger.info_with(
        "The model is ready",
        model=model.manifest.title,
        runs_on=model.describe(),
        settings=settings.given(),
        milliseconds=_milliseconds_since(started),
    )


def handler(context: nuclio_sdk.Context, event: nuclio_sdk.Event) -> nuclio_sdk.Response:
    """Answer one request: 200 with a JSON list of regions, or 400 or 500 with `{"error": …}`.

    CVAT shows people the status only, so everything that goes wrong is logged here, in one line a request.
    """
    started = time.perf_counter()
    data = context.user_data
    champion: Champion = data.champion
    model = champion.model  # of this request, whatever comes meanwhile
    metrics: Metrics = data.metrics
    if event.method == "GET" and event.path == METRICS_PATH:
        return context.Response(body=metrics.text(), headers={}, content_type=CONTENT_TYPE, status_code=200)
    stages = Stages()
    size = _size(event)

    def facts() -> dict[str, Any]:
        """What every line says."""
        return {
            "request_bytes": size,
            "milliseconds": _milliseconds_since(started),
            "stages": {stage: round(spent, 1) for stage, spent in stages.milliseconds.items()},
            "model": model.manifest.title,
        }

    try:
        with stages("parse"):
            request = parse_request(event.body, size=size, max_bytes=data.settings.max_bytes)
        answer = model.annotate(request.image, threshold=request.threshold, stages=stages)
    except (RequestError, ImageError) as error:
        message, status = " ".join(str(error).split()), 400  # one line, whatever a library's message holds
        context.logger.warn_with("Refused a request", error=message, **facts())
    except Exception as error:  # the worker lives on, whatever happens to one image
        context.logger.error_with("A request failed", error=repr(error), traceback=traceback.format_exc(), **facts())
        message = f"{type(error).__name__}: {error}. This is a defect or a lack of memory; see the function's log."
        status = 500
    else:
        height, width = answer.size_hw
        metrics.add(
            200,
            milliseconds=_milliseconds_since(started),
            stages=stages.milliseconds,
            request_bytes=size,
            answer_bytes=len(answer.body),
            regions=answer.regions,
            notes=answer.notes,
        )
        context.logger.info_with(
            "Answered",
            size=f"{width}x{height}",
            regions=answer.regions,
            answer_bytes=len(answer.body),
            **facts(),
            **answer.notes,
        )
        return _response(context, 200, answer.body)
    metrics.add(status, milliseconds=_milliseconds_since(started), stages=stages.milliseconds, request_bytes=size)
    return _response(context, status, json.dumps({"error": message}))


def _end(context: nuclio_sdk.Context) -> NoReturn:
    """End the worker's process: nothing more comes, and Nuclio need not wait any longer.

    Nuclio's wrapper calls this between requests: the running one is answered.
    """
    context.logger.info("Told to end: the worker ends")
    raise SystemExit(0)


def parse_request(body: Any, *, size: int, max_bytes: int) -> Request:
    """Check what CVAT (or anybody) sent. Unknown keys are ignored.

    Args:
        body: the event's body: parsed JSON, or bytes or text when the content type was not exactly application/json.
            The text of the image is taken out of it, so that it is not in memory twice while the model works.
        size: the body's bytes.
        max_bytes: most of them.

    Raises:
        RequestError: what was found, what was expected.
    """
    if size > max_bytes:
        raise RequestError(
            f"The request has {size} bytes; at most {max_bytes} are taken. Send a smaller picture, or raise "
            "SSCLOUD_MAX_BYTES and maxRequestBodySize in function.yaml."
        )
    fields = _parse_object(body)
    threshold = _parse_threshold(fields.get("threshold", 0))
    return Request(image=_parse_image(fields.pop("image", None)), threshold=threshold)


def _size(event: nuclio_sdk.Event) -> int:
    """Bytes of the event's body."""
    if isinstance(event.size, int):
        return event.size
    return len(event.body) if isinstance(event.body, bytes | bytearray | str) else 0


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
        image = _decode_base64(value)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError
        raise RequestError(
            f"'image' is not valid base64 ({error}). Send the picture's file in standard base64 with its padding."
        ) from error
    if not image:
        raise RequestError("'image' is empty. Send the picture's file in base64.")
    return image


def _decode_base64(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)  # CVAT's: tens of megabytes, decoded from where they are
    except ValueError:
        packed = text.encode("ascii").translate(None, _WHITE_SPACE)
        prefix = _DATA_URL.match(packed)
        return binascii.a2b_base64(packed[prefix.end() :] if prefix else packed, strict_mode=True)


def _parse_threshold(value: Any) -> float:
    # The comparison comes before float(), which overflows on large integers; it is false for NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        shown = f"a JSON {_json_type(value)}" if isinstance(value, list | dict) else json.dumps(value)[:40]
        raise RequestError(f"'threshold' is {shown}, not a number from 0 to 1. Leave it out to get every region.")
    return float(value)


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _response(context: nuclio_sdk.Context, status: int, body: str) -> nuclio_sdk.Response:
    return context.Response(body=body, headers={}, content_type="application/json", status_code=status)


def _milliseconds_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)
