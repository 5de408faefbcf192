"""Connections that ask for nothing, on real sockets: they neither stay nor keep others out."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fastapi import FastAPI, Request

from tools import watch_http as module
from tools.watch_http import HttpServer

ASK = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Stream]]


def served(scenario: Callable[[Connect], Awaitable[None]]) -> None:
    """Run a scenario against a server."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def alive() -> str:
        return "ok"

    @app.post("/body")
    async def length(request: Request) -> int:
        return len(await request.body())

    @contextlib.asynccontextmanager
    async def connections(port: int) -> AsyncIterator[Connect]:
        made: list[Stream] = []

        async def connect() -> Stream:
            made.append(await asyncio.open_connection("127.0.0.1", port))
            return made[-1]

        yield connect
        for _, writer in made:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def both() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = HttpServer(app)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            async with asyncio.timeout(20), connections(listener.getsockname()[1]) as connect:
                await scenario(connect)
            server.should_exit = True
            await serving

    asyncio.run(both())


async def ask(stream: Stream, request: bytes = ASK) -> bytes:
    """The first line of the answer; the rest of it is read too."""
    stream[1].write(request)
    head = await stream[0].readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    await stream[0].readexactly(int(fields[b"content-length"]))
    return head.split(b"\r\n")[0]


async def is_closed(stream: Stream) -> bool:
    """Whether the other side has closed it."""
    try:
        return await asyncio.wait_for(stream[0].read(1), 0.02) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_a_connection_has_a_deadline_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADERS", 0.3)

    async def scenario(connect: Connect) -> None:
        silent, dripping, second, slow = [await connect() for _ in range(4)]
        assert await ask(second) == b"HTTP/1.1 200 OK"
        slow[1].write(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1")
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            for stream in (dripping, second):
                with contextlib.suppress(ConnectionError):
                    stream[1].write(b"G")
                    await stream[1].drain()
            await asyncio.sleep(0.05)

        assert [await is_closed(stream) for stream in (silent, dripping, second)] == [True, True, True]
        assert await ask(slow, b"2") == b"HTTP/1.1 200 OK"  # a request that is there has what time it needs
        assert await ask(await connect()) == b"HTTP/1.1 200 OK"

    served(scenario)


def test_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IDLE", 20)
    monkeypatch.setattr(module, "MOST_REQUESTS", 10)

    async def scenario(connect: Connect) -> None:
        answered = await connect()
        assert await ask(answered) == b"HTTP/1.1 200 OK"  # idle again from here on
        silent = [await connect() for _ in range(70)]

        assert await ask(await connect()) == b"HTTP/1.1 200 OK"
        assert await is_closed(answered)
        assert [await is_closed(stream) for stream in (silent[0], silent[-1])] == [True, False]

    served(scenario)


def test_too_many_requests_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IDLE", 1)
    monkeypatch.setattr(module, "MOST_REQUESTS", 2)

    async def scenario(connect: Connect) -> None:
        for _ in range(3):
            _, writer = await connect()
            writer.write(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

        assert await ask(await connect()) == b"HTTP/1.1 503 Service Unavailable"

    served(scenario)
