"""What can go wrong between a client and a server, on demand, and the log of what was asked."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_NGINX = "<html>\r\n<head><title>{0}</title></head>\r\n<body><center><h1>{0}</h1></center></body>\r\n</html>\r\n"
_SECRET = {"authorization", "cookie", "x-csrftoken"}
_REASONS = {429: "Too Many Requests", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Time-out"}


@dataclass(frozen=True, slots=True)
class Drop:
    """The connection ends in the middle of the body; with `after=None` before a single byte of the reply."""

    after: int | None = 0
    """Bytes of the body that still arrive."""


@dataclass(frozen=True, slots=True)
class Status:
    """An error instead of the reply."""

    status: int
    retry_after: int | str | None = None
    """The header Retry-After: seconds, or a date as HTTP writes it."""
    body: bytes | None = None
    """The body; without one nginx' page for 502, 503 and 504, JSON for others."""


@dataclass(frozen=True, slots=True)
class Slow:
    """The right reply, slowly."""

    seconds: float
    """The pause before each piece."""
    bytes: int = 65536
    """The size of a piece."""


@dataclass(frozen=True, slots=True)
class Body:
    """Status 200, another body."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Truncated:
    """The first bytes of the right body, with a Content-Length to match: no client can see it by the length."""

    bytes: int


Fault = Drop | Status | Slow | Body | Truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One request and what became of it."""

    method: str
    path: str
    query: Mapping[str, str]
    time: float
    """When it came, seconds of the monotonic clock."""
    headers: Mapping[str, str]
    """Names in lower case; without credentials."""
    body: bytes
    status: int | None
    """None when the connection was dropped."""
    sent: int
    """Bytes of the body that were sent."""

    @property
    def json(self) -> Any:
        """The body of the request, parsed."""
        return json.loads(self.body)


@dataclass(slots=True, kw_only=True)
class _Plan:
    method: str
    path: re.Pattern[str]
    query: Mapping[str, str]
    fault: Fault
    times: int | None
    skip: int
    before: bool


@dataclass(slots=True)
class FaultBook:
    """The faults that wait for their request, and the log."""

    log: list[Logged] = field(default_factory=list)
    _plans: list[_Plan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(
        self,
        method: str,
        path: str,
        fault: Fault,
        *,
        times: int | None,
        skip: int,
        before: bool,
        query: Mapping[str, str],
    ) -> None:
        """Let requests of this method whose path contains the pattern fail."""
        with self._lock:
            plan = _Plan(
                method=method, path=re.compile(path), query=query, fault=fault, times=times, skip=skip, before=before
            )
            self._plans.append(plan)

    def clear(self) -> None:
        """Forget the faults that did not happen yet."""
        with self._lock:
            self._plans.clear()

    def take(self, method: str, path: str, query: Mapping[str, str]) -> _Plan | None:
        """The fault for this request, if one is due."""
        with self._lock:
            for plan in self._plans:
                if plan.method not in (method, "*") or not plan.path.search(path):
                    continue
                if any(query.get(key) != value for key, value in plan.query.items()):
                    continue
                if plan.skip > 0:
                    plan.skip -= 1
                    continue
                if plan.times is not None:
                    plan.times -= 1
                    if plan.times <= 0:
                        self._plans.remove(plan)
                return plan
        return None

    def find(self, method: str, path: str, query: Mapping[str, str]) -> list[Logged]:
        """The requests with this method, a path with this pattern, and these parameters."""
        with self._lock:
            entries = list(self.log)
        return [
            entry
            for entry in entries
            if method in (entry.method, "*")
            and re.search(path, entry.path)
            and all(entry.query.get(key) == value for key, value in query.items())
        ]

    def write(self, entry: Logged) -> None:
        """Add to the log."""
        with self._lock:
            self.log.append(entry)


class FaultyServer:
    """ASGI: passes requests on, spoils the replies that are to be spoilt, keeps the log."""

    def __init__(self, app: App, book: FaultBook) -> None:
        self._app = app
        self._book = book

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        started = time.monotonic()
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        body = await _read(receive)
        plan = self._book.take(scope["method"], scope["path"], query)
        reply = _Reply(200, [], b"")
        if plan is None or not plan.before:
            reply = await self._ask(scope, body)
        if plan is not None:
            reply = _spoilt(reply, plan.fault)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        entry = Logged(
            method=scope["method"],
            path=scope["path"],
            query=query,
            time=started,
            headers={key: value for key, value in headers.items() if key not in _SECRET},
            body=body,
            status=None if reply.cut else reply.status,
            sent=len(reply.body),
        )
        self._book.write(entry)  # before the reply: who has got it finds the request in the log
        await _send(send, reply)

    async def _ask(self, scope: MutableMapping[str, Any], body: bytes) -> "_Reply":
        """The whole reply of the server behind."""
        reply = _Reply(500, [], b"")
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status, reply.headers = message["status"], list(message["headers"])
            else:
                reply.body += message.get("body", b"")

        await self._app(scope, receive, send)
        return reply


@dataclass(slots=True)
class _Reply:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    cut: bool = False
    """The connection ends after the body, which is not all that the headers promise."""
    silent: bool = False
    """The connection ends instead of the reply."""
    piece: int | None = None
    pause: float = 0.0

    def with_body(self, body: bytes, *, status: int, content_type: str | None = None) -> "_Reply":
        replaced = {b"content-length"} | ({b"content-type"} if content_type else set())
        headers = [(key, value) for key, value in self.headers if key.lower() not in replaced]
        headers.append((b"content-length", str(len(body)).encode()))
        if content_type:
            headers.append((b"content-type", content_type.encode()))
        return _Reply(status, headers, body)


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send(send: Send, reply: _Reply) -> None:
    # uvicorn's cycle owns the connection; ASGI itself has no word for hanging up in the middle.
    transport = send.__self__.transport  # type: ignore[attr-defined]
    if reply.silent:
        transport.abort()
        return
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
    size = reply.piece or max(1, len(reply.body))
    for start in range(0, len(reply.body), size):
        await asyncio.sleep(reply.pause)
        await send({"type": "http.response.body", "body": reply.body[start : start + size], "more_body": True})
    if reply.cut:
        # uvicorn keeps the headers back until there is a body
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        transport.close()
        return
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _spoilt(reply: _Reply, fault: Fault) -> _Reply:
    """The reply as the fault wants it."""
    match fault:
        case Slow():
            reply.piece, reply.pause = fault.bytes, fault.seconds
            return reply
        case Status():
            return _error(fault)
        case Body():
            return reply.with_body(fault.body, status=200, content_type=None if reply.headers else "application/json")
        case Truncated():
            return reply.with_body(reply.body[: fault.bytes], status=reply.status)
        case Drop():
            if fault.after is None:
                return _Reply(0, [], b"", cut=True, silent=True)
            if not reply.body:  # nothing to cut: promise a byte
                reply = reply.with_body(b" ", status=200 if reply.status == 204 else reply.status)
            # Where the whole body would arrive, keep a byte back.
            return _Reply(reply.status, reply.headers, reply.body[: min(fault.after, len(reply.body) - 1)], cut=True)


def _error(fault: Status) -> _Reply:
    empty = _Reply(0, [], b"")
    reason = _REASONS.get(fault.status, "The stand-in was told to fail.")
    if fault.body is None and fault.status in (502, 503, 504):
        page = _NGINX.format(f"{fault.status} {reason}").encode()
        reply = empty.with_body(page, status=fault.status, content_type="text/html")
    else:
        body = json.dumps({"detail": reason}).encode() if fault.body is None else fault.body
        reply = empty.with_body(body, status=fault.status, content_type="application/json")
    if fault.retry_after is not None:
        reply.headers.append((b"retry-after", str(fault.retry_after).encode()))
    return reply
