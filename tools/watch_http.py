"""HTTP for a service that asks nobody to log in: connections that ask for nothing take no place from those that do.

uvicorn gives up a connection only after its first answer, and counts all of them when it decides to answer 503: a few
dozen that say nothing would switch a service off. Here each has a deadline for its request, and of too many that
say nothing the oldest is closed. Floods of real requests are the business of a reverse proxy.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS: Final = 5.0
"""Seconds that a connection has for the first line and the headers of a request, and to begin the next one."""
MOST_IDLE: Final = 128
"""Connections without a request."""
MOST_REQUESTS: Final = 64
"""At a time; the others are answered with 503."""

_BACKLOG = 128
"""Connections that are accepted in one go: together with the others far fewer than files a process may open."""


class Connection(H11Protocol):
    """A connection that is given up when it asks for nothing."""

    idle_since: float | None = None
    """In seconds of the loop's clock; None while a request is answered."""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin to wait for a request; too many that wait make room."""
        super().connection_made(transport)
        self._await_request()
        idle = [one for one in self.connections if isinstance(one, Connection) and one.idle_since is not None]
        if len(idle) > MOST_IDLE:
            min(idle, key=lambda one: one.idle_since or 0.0).give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Wait no longer once a request is there; its body is the business of what answers it."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._await_request()
        super().on_response_complete()

    def give_up(self) -> None:
        """Close it, whether or not the other side reads what it was sent."""
        self._stop_waiting()
        self.transport.abort()

    def _await_request(self) -> None:
        self._stop_waiting()
        self.idle_since = self.loop.time()
        self._deadline = self.loop.call_later(HEADERS, self.give_up)

    def _stop_waiting(self) -> None:
        self.idle_since = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class HttpServer(uvicorn.Server):
    """Answers with an application. It leaves the signals to the service, whose cycle has to end first.

    Args:
        app: the application.
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_IDLE + MOST_REQUESTS,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=5,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
