"""The process in which a function runs: what Nuclio's Python wrapper does, over pipes instead of a socket.

Run as `python -P -B nuclio_worker.py FOLDER MODULE:FUNCTION TRIGGER WORKER_ID`. It puts FOLDER first on the path, calls
`init_context`, then answers one request at a time through nuclio_sdk's own Event, Context and Response.

Signals are those of Nuclio's wrapper (pkg/processor/runtime/python/py/_nuclio_wrapper.py in its sources) and wait until
the running request is answered: SIGUSR1 (the end is near) and SIGUSR2 (drain) call the function's callbacks, and
from then on requests are discarded without an answer, until SIGCONT.

Frames, both ways: header length (4 bytes), body length (8 bytes), both big-endian; the header as JSON; the body.
"""

import importlib
import json
import logging
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import nuclio_sdk
import nuclio_sdk.event
import nuclio_sdk.json_encoder
import nuclio_sdk.logger

LENGTHS = struct.Struct(">IQ")


def main(folder: str, entry_point: str, trigger: str, worker_id: str) -> int:
    """Serve requests until the other side closes the pipe."""
    # Ctrl-C in a terminal and a service manager's SIGTERM reach every process; the host decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _take_pipes()
    logger = nuclio_sdk.Logger(logging.INFO)
    logger.set_handler("default", sys.stderr, nuclio_sdk.logger.HumanReadableFormatter())
    context = nuclio_sdk.Context(
        logger, nuclio_sdk.Platform("local", namespace="nuclio"), worker_id, nuclio_sdk.TriggerInfo("http", trigger)
    )
    encode = nuclio_sdk.json_encoder.Encoder().encode
    sys.path.insert(0, folder)
    try:
        handler = _load(entry_point, context)
    except Exception as error:  # an import or a bad bundle: whatever it is, the host has to hear of it
        ours = type(error).__module__.startswith("sscloud.")
        if not ours:
            traceback.print_exc()
        _write(replies, {"kind": "failed", "error": str(error) if ours else f"{type(error).__name__}: {error}"}, b"")
        return 1
    signals = _Signals()
    _write(replies, {"kind": "ready"}, b"")
    while True:
        signals.wait(requests, context.platform)
        frame = _read(requests)
        if frame is None:
            return 0
        if signals.discarding:
            logger.debug("The event is discarded")
            continue
        try:
            reply = _call(handler, context, encode, *frame)
        except BaseException as error:
            logger.error_with("Exception caught in handler", exc=str(error), traceback=traceback.format_exc())
            text = f'Exception caught in handler - "{error}": {traceback.format_exc()}'
            reply = {"body": text, "body_encoding": "text", "content_type": "text/plain", "status_code": 500}
        body = reply.pop("body").encode("utf-8", "replace")
        _write(replies, {"kind": "reply", **reply}, body)


class _Signals:
    """Signals that came while the function worked or waited, until it is their turn."""

    def __init__(self) -> None:
        self.discarding = False
        """Whether requests are discarded."""
        self._pending: list[str] = []
        if os.name != "posix":
            return
        self._awake, waker = os.pipe()
        for end in (self._awake, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker)
        for number, kind in ((signal.SIGUSR1, "termination"), (signal.SIGUSR2, "drain"), (signal.SIGCONT, "continue")):
            signal.signal(number, lambda *_, kind=kind: self._pending.append(kind))

    def wait(self, requests: BinaryIO, platform: Any) -> None:
        """Wait for the next request, and meanwhile do what signals ask for."""
        if os.name != "posix":
            return
        while True:
            self._obey(platform)
            # The host sends the next request after the answer to this one, so the stream's buffer is empty here.
            ready, _, _ = select.select([requests.fileno(), self._awake], [], [])
            if self._awake in ready:
                os.read(self._awake, 4096)
            elif not self._pending:  # a signal may come just before a request
                return

    def _obey(self, platform: Any) -> None:
        while self._pending:
            kind = self._pending.pop(0)
            if kind == "continue":
                self.discarding = False
            elif kind == "termination" or not self.discarding:  # a drained worker is not drained again
                self.discarding = True
                platform._on_signal(callback_type=kind)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to the host for ourselves: what the function prints goes to the log."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _load(entry_point: str, context: Any) -> Callable[[Any, Any], Any]:
    module_name, function = entry_point.split(":")
    module = importlib.import_module(module_name)
    handler: Callable[[Any, Any], Any] = getattr(module, function)
    if hasattr(module, "init_context"):
        module.init_context(context)
    return handler


def _call(
    handler: Callable[[Any, Any], Any],
    context: Any,
    encode: Callable[[Any], str],
    header: Mapping[str, Any],
    body: bytes,
) -> dict[str, Any]:
    message = {
        "trigger": {"kind": "http", "name": context.trigger.name},
        "fields": {},
        "shard_id": 0,
        "num_shards": 0,
        "type": "",
        "type_version": "",
        "version": "",
        "timestamp": time.time(),
        "size": len(body),
        "body": body,
        **header,
    }
    event = nuclio_sdk.Event.deserialize(message, kind=nuclio_sdk.event.EventDeserializerKinds.msgpack)
    reply: dict[str, Any] = nuclio_sdk.Response.from_entrypoint_output(encode, handler(context, event))
    encode({**reply, "body": ""})  # headers that are no JSON fail here, as they do in Nuclio
    return reply


def _read(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header_length, body_length = LENGTHS.unpack(lengths)
    header, body = stream.read(header_length), stream.read(body_length)
    return (json.loads(header), body) if len(body) == body_length else None


def _write(stream: BinaryIO, header: Mapping[str, Any], body: bytes) -> None:
    text = json.dumps(header, default=str).encode()
    stream.write(LENGTHS.pack(len(text), len(body)))
    stream.write(text)
    stream.write(body)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
