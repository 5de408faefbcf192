"""A stand-in for Nuclio on one machine, without Docker: runs one packaged function folder.

It has the two doors that CVAT knocks at: the function's own port, and the part of the dashboard's API that CVAT calls
(cvat/apps/lambda_manager in CVAT's sources). The function runs in processes of its own with its folder first on the
path, each with one request at a time, as Nuclio's workers do. Their number and the limits are those of function.yaml.
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import socket
import struct
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from sscloud.errors import BundleError, ConfigError
from sscloud.volume import drawn_labels, pointed, published_manifest
from tools.function_folder import MODELS, describe

PROJECT_LABEL = "nuclio.io/project-name"
PROJECT = "cvat"
"""The project that CVAT asks for."""

DEFAULT_BODY_LIMIT = 4 * 1024 * 1024
"""Nuclio's own limit when the trigger sets none."""

_LENGTHS = struct.Struct(">IQ")  # as in nuclio_worker.py
_WORKER = Path(__file__).with_name("nuclio_worker.py")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_PAUSE = 30.0
_STARTING = "The function's worker is being started. Try again in a few seconds."


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionConfig:
    """What a function folder's function.yaml says, as far as it concerns this host."""

    folder: Path
    name: str
    metadata: dict[str, Any]
    spec: dict[str, Any]
    handler: str
    trigger: str
    """Name of the HTTP trigger."""
    port: int
    """The function's port; 0 for any free one."""
    workers: int
    """Processes that the function runs in."""
    body_limit: int
    """Bytes of a request's body."""
    worker_wait: float
    """Seconds that a request waits for a free worker."""
    event_timeout: float
    """Seconds that the function may work on a request."""
    readiness_timeout: float
    """Seconds that the function may take to start."""
    environment: dict[str, str] = field(default_factory=dict)
    models: Path | None = None
    """The model volume that the function follows, on this machine."""

    @property
    def project(self) -> str:
        """The Nuclio project that the function belongs to."""
        return str(self.metadata["labels"][PROJECT_LABEL])


def read_function(folder: Path) -> FunctionConfig:
    """Read a packaged folder's function.yaml.

    Raises:
        ConfigError: no such folder, or a yaml that Nuclio or CVAT would not take.
    """
    path = folder / "function.yaml"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). Name a function folder; `sscloud package BUNDLE -o FOLDER` "
            "makes one."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        metadata, spec = dict(data["metadata"]), dict(data["spec"])
        name, handler = str(metadata["name"]), str(spec["handler"])
        annotations = dict(metadata["annotations"])
        int(annotations["version"])
        json.loads(annotations["spec"])
        triggers = {key: value for key, value in spec.get("triggers", {}).items() if value["kind"] == "http"}
        trigger = next(iter(triggers), "default-http")
        http: dict[str, Any] = triggers.get(trigger, {})
        attributes: dict[str, Any] = http.get("attributes", {})
        environment = {entry["name"]: str(entry["value"]) for entry in spec.get("env") or []}
        metadata["annotations"] = {key: str(value) for key, value in annotations.items()}
        metadata["labels"] = {PROJECT_LABEL: PROJECT, **metadata.get("labels", {})}
        return FunctionConfig(
            folder=folder.resolve(),
            name=name,
            metadata=metadata,
            spec={"description": str(spec["description"]), **spec},
            handler=handler,
            trigger=str(trigger),
            port=int(attributes.get("port", 0)),
            workers=_at_least_one(http.get("numWorkers", 1)),
            body_limit=int(attributes.get("maxRequestBodySize", DEFAULT_BODY_LIMIT)),
            worker_wait=int(http.get("workerAvailabilityTimeoutMilliseconds", 10_000)) / 1000,
            event_timeout=parse_duration(str(spec.get("eventTimeout", "24h"))),
            readiness_timeout=float(spec.get("readinessTimeoutSeconds", 60)),
            environment=environment,
            models=_mounted(spec.get("volumes") or [], environment.get(MODELS, "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no function that CVAT can use: {type(error).__name__}: {error}. Make the folder again with "
            "`sscloud package BUNDLE -o FOLDER --overwrite`."
        ) from error


def _mounted(volumes: Sequence[Any], inside: str) -> Path | None:
    """Where a folder of the function's container is on this machine; None where no volume says so."""
    paths = (entry["volume"].get("hostPath") for entry in volumes if entry["volumeMount"]["mountPath"] == inside)
    return next((Path(path["path"]) for path in paths if path), None)


def with_models(config: FunctionConfig, models: Path | None) -> FunctionConfig:
    """Let the function follow a model volume.

    Args:
        config: of the function.
        models: the volume; None takes what function.yaml mounts, as there is no container to mount it in.
    """
    volume = models if models is not None else config.models
    if volume is None:
        return config
    volume.mkdir(parents=True, exist_ok=True)
    volume = volume.resolve()
    return dataclasses.replace(config, models=volume, environment={**config.environment, MODELS: str(volume)})


def parse_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `180s`, `2m30s`, `500ms`.

    Raises:
        ValueError: not a duration.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 180s or 2m30s")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _at_least_one(value: Any) -> int:
    number = int(value)
    if number < 1:
        raise ValueError(f"numWorkers is {value}, but a function needs one worker at least")
    return number


class Reply(NamedTuple):
    """What goes back to the client."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str]

    def response(self) -> Response:
        """As the web framework sends it."""
        response = Response(self.body, self.status, headers={str(k): str(v) for k, v in self.headers.items()})
        response.headers["content-type"] = self.content_type
        return response


def _error(status: int, message: str) -> Reply:
    return Reply(status, "application/json", json.dumps({"error": message}).encode(), {})


class Worker:
    """One process of the function: started, asked one request at a time, started again when it dies.

    Args:
        config: of the function.
        number: of the worker, from 0.
        when_free: called with its process whenever that is ready for the next request.
    """

    def __init__(
        self, config: FunctionConfig, number: int, when_free: Callable[["Worker", asyncio.subprocess.Process], None]
    ) -> None:
        self.ready = False
        """Whether it works or can; not while it is started."""
        self._config = config
        self._number = number
        self._when_free = when_free
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and wait until the function is ready.

        Raises:
            ConfigError: `init_context` failed, or took too long.
        """
        await self._launch()
        self._watcher = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End the process."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._end()

    def has(self, process: asyncio.subprocess.Process) -> bool:
        """Whether a process that was free is still there."""
        return self.ready and self._process is process

    async def ask(self, process: asyncio.subprocess.Process, header: Mapping[str, Any], body: bytes) -> Reply:
        """Pass one request to the function.

        Args:
            process: the worker's, which is free.
            header: fields of the Nuclio event.
            body: the request's body.
        """
        try:
            async with asyncio.timeout(self._config.event_timeout):
                await _send(process, header, body)
                reply, text = await _receive(process)
        except TimeoutError:
            self._give_up(process)
            _log(f"The function worked for {self._config.event_timeout:g} s (eventTimeout); it is started again.")
            return _error(408, "handler timed out")
        except (OSError, asyncio.IncompleteReadError):
            self._give_up(process)
            return _error(502, "The function's worker ended while it worked on this request.")
        self._when_free(self, process)
        if reply["body_encoding"] == "base64":
            text = base64.b64decode(text)
        return Reply(reply["status_code"], reply["content_type"], text, reply.get("headers") or {})

    def _give_up(self, process: asyncio.subprocess.Process) -> None:
        self.ready = False
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    async def _keep_alive(self) -> None:
        """Start the process again whenever it has ended, with growing pauses while that fails."""
        pause = 0.0
        while True:
            if self._process is not None:
                status = await self._process.wait()
                _log(f"The function's worker ended (status {status}); it is started again.")
            self.ready = False
            await self._end()
            await asyncio.sleep(pause)
            try:
                await self._launch()
                pause = 0.0
            except ConfigError as error:
                pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE)
                _log(f"{error} Next try in {pause:g} s.")

    async def _launch(self) -> None:
        config = self._config
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing but the function's folder before the installed packages
            "-B",  # no __pycache__ in a folder that will be deployed
            "-u",
            str(_WORKER),
            str(config.folder),
            config.handler,
            config.trigger,
            str(self._number),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **config.environment},
            limit=2**22,  # large reads: answers have tens of megabytes
        )
        try:
            async with asyncio.timeout(config.readiness_timeout):
                first, _ = await _receive(self._process)
            problem = first.get("error")
        except TimeoutError:
            problem = f"it was not ready after {config.readiness_timeout:g} s (readinessTimeoutSeconds)."
        except (OSError, asyncio.IncompleteReadError):
            problem = "its process ended. See the messages above."
        except BaseException:
            await self._end()
            raise
        if problem is not None:
            await self._end()
            raise ConfigError(f"The function {config.name} in {config.folder} does not start: {problem}")
        self.ready = True
        self._when_free(self, self._process)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # an idle worker ends by itself
        try:
            async with asyncio.timeout(2):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Workers:
    """All processes of a function: each request goes to one that is free, in the order in which they came.

    Args:
        config: of the function.
    """

    def __init__(self, config: FunctionConfig) -> None:
        self._config = config
        self._free: asyncio.Queue[tuple[Worker, asyncio.subprocess.Process]] = asyncio.Queue()
        self._workers = [Worker(config, number, self._put_free) for number in range(config.workers)]
        self._exchanges: set[asyncio.Task[Reply]] = set()

    @property
    def state(self) -> str:
        """As Nuclio calls it: `ready`, or `unhealthy` while no process runs."""
        return "ready" if any(worker.ready for worker in self._workers) else "unhealthy"

    async def start(self) -> None:
        """Start the processes and wait until all are ready.

        Raises:
            ConfigError: `init_context` failed, or took too long.
        """
        for worker in self._workers:  # one after the other: loading takes the most memory
            await worker.start()

    async def stop(self) -> None:
        """End the processes."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def _put_free(self, worker: Worker, process: asyncio.subprocess.Process) -> None:
        self._free.put_nowait((worker, process))

    async def call(self, header: Mapping[str, Any], body: bytes) -> Reply:
        """Pass one request to the function; requests wait for their turn.

        Args:
            header: fields of the Nuclio event.
            body: the request's body.
        """
        if self.state != "ready":
            return _error(503, _STARTING)
        try:
            async with asyncio.timeout(self._config.worker_wait):
                worker, process = await self._free.get()
                while not worker.has(process):  # it died while it was free
                    worker, process = await self._free.get()
        except TimeoutError:
            return _error(503, f"All workers were busy for {self._config.worker_wait:g} s. Try again later.")
        # A client that goes away must not leave half an exchange in the pipes.
        exchange = asyncio.create_task(worker.ask(process, header, body))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanges.discard)
        return await asyncio.shield(exchange)


async def _send(process: asyncio.subprocess.Process, header: Mapping[str, Any], body: bytes) -> None:
    if process.stdin is None:
        raise BrokenPipeError
    text = json.dumps(header).encode()
    process.stdin.write(_LENGTHS.pack(len(text), len(body)) + text)
    process.stdin.write(body)
    await process.stdin.drain()


async def _receive(process: asyncio.subprocess.Process) -> tuple[dict[str, Any], bytes]:
    if process.stdout is None:
        raise BrokenPipeError
    header_length, body_length = _LENGTHS.unpack(await process.stdout.readexactly(_LENGTHS.size))
    header = json.loads(await process.stdout.readexactly(header_length))
    return header, await process.stdout.readexactly(body_length)


def function_app(workers: Workers, config: FunctionConfig) -> FastAPI:
    """The function's own port: every request is an event."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.api_route("/{path:path}", methods=_METHODS)
    async def invoke(request: Request) -> Response:
        return (await _invoke(workers, config, request, path=request.url.path)).response()

    return app


def dashboard_app(workers: Workers, config: FunctionConfig, *, function_port: int) -> FastAPI:
    """The part of the Nuclio dashboard's API that CVAT calls."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def describe_function() -> dict[str, Any]:
        status = {"state": workers.state, "httpPort": function_port}
        return {**describe_served(config), "status": status}

    @app.get("/")
    async def about() -> PlainTextResponse:
        return PlainTextResponse(f"sscloud serve: function {config.name}, {workers.state}. CVAT asks /api/functions.\n")

    @app.get("/api/functions")
    async def list_functions(request: Request) -> dict[str, Any]:
        asked = request.headers.get("x-nuclio-project-name", "*")
        return {config.name: describe_function()} if asked in ("", "*", config.project) else {}

    @app.get("/api/functions/{name}")
    async def get_function(name: str) -> JSONResponse:
        if name != config.name:
            return JSONResponse({"error": f"Function not found: {name}. This host runs {config.name}."}, 404)
        return JSONResponse(describe_function())

    @app.api_route("/api/function_invocations", methods=_METHODS)
    async def invoke(request: Request) -> Response:
        name = request.headers.get("x-nuclio-function-name")
        if not name:
            return _error(400, "Function name must be provided (header x-nuclio-function-name).").response()
        if name != config.name:
            return _error(404, f"Function not found: {name}. This host runs {config.name}.").response()
        try:
            limit = parse_duration(request.headers.get("x-nuclio-invoke-timeout", "24h"))
        except ValueError as error:
            return _error(400, f"Invalid invoke timeout: {error}.").response()
        path = "/" + request.headers.get("x-nuclio-path", "").lstrip("/")
        try:
            async with asyncio.timeout(limit):
                return (await _invoke(workers, config, request, path=path)).response()
        except TimeoutError:
            return _error(504, f"The function did not answer within {limit:g} s.").response()

    return app


def describe_served(config: FunctionConfig) -> dict[str, Any]:
    """The function's `metadata` and `spec`, with the number of the version that its model volume points at.

    That is what workers serve, or are about to, unless they refuse it: the attribute `model` of their shapes, and their
    `/metrics`, say what answers. They are not asked here, because CVAT asks for this list all the time, and a worker
    answers nothing else while it works on an image. A version that cannot be read, or has other labels than the
    function declares, is refused by all of them, and not shown.
    """
    told = {"metadata": config.metadata, "spec": config.spec}
    if config.models is None:
        return told
    try:
        pointer = pointed(config.models)
        manifest = None if pointer is None else published_manifest(config.models, pointer.bundle)
    except BundleError:
        return told
    annotations = config.metadata["annotations"]
    if manifest is None or drawn_labels(manifest) != {label["name"] for label in json.loads(annotations["spec"])}:
        return told
    served = {**annotations, "name": manifest.title, "version": str(manifest.version)}
    return {
        "metadata": {**config.metadata, "annotations": served},
        "spec": {**config.spec, "description": describe(manifest)},
    }


async def _invoke(workers: Workers, config: FunctionConfig, request: Request, *, path: str) -> Reply:
    try:
        body = await _read_body(request, config.body_limit)
    except ClientDisconnect:
        return _error(400, "The client went away.")
    if body is None:
        return _error(
            413,
            f"The body is larger than {config.body_limit} bytes. Raise maxRequestBodySize in function.yaml.",
        )
    header = {
        "id": str(uuid.uuid4()),
        "method": request.method,
        "path": path,
        "url": path,
        "content_type": request.headers.get("content-type", ""),
        "headers": {name.title(): value for name, value in request.headers.items() if not name.startswith("x-nuclio-")},
    }
    return await workers.call(header, body)


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The request's body, or None as soon as it is seen to be larger than `limit` bytes."""
    if int(request.headers.get("content-length", 0)) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _by_port(apps: Mapping[int, ASGIApp]) -> ASGIApp:
    """One application that answers on several ports, each with its own."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        await apps[scope["server"][1]](scope, receive, send)

    return dispatch


def _listen(host: str, port: int, flag: str) -> socket.socket:
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere the option lets two programs share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"Port {port} of {host} cannot be used: {error.strerror}. Stop the program that has it, or choose another "
            f"one with {flag}."
        ) from error
    return listener


@contextlib.asynccontextmanager
async def _running(config: FunctionConfig) -> AsyncIterator[Workers]:
    workers = Workers(config)
    try:
        await workers.start()
        yield workers
    finally:
        await workers.stop()


async def _serve(config: FunctionConfig, *, host: str, port: int, function_port: int | None) -> None:
    wanted = config.port if function_port is None else function_port
    with _listen(host, port, "--port") as dashboard, _listen(host, wanted, "--function-port") as function:
        dashboard_port, own_port = dashboard.getsockname()[1], function.getsockname()[1]
        print(f"Starting {config.name} of {config.folder} …", flush=True)
        async with _running(config) as workers:
            apps: dict[int, ASGIApp] = {
                dashboard_port: dashboard_app(workers, config, function_port=own_port),
                own_port: function_app(workers, config),
            }
            server = uvicorn.Server(
                uvicorn.Config(
                    _by_port(apps),
                    http="h11",  # reads on after an early answer, so that a client gets its 413
                    ws="none",
                    lifespan="off",
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    # What is being worked on is answered first; a second Ctrl-C does not wait.
                    timeout_graceful_shutdown=math.ceil(config.event_timeout) + 1,
                )
            )
            # uvicorn takes these signals over while it runs, and raises them once more for whoever had them before.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: setattr(server, "should_exit", True))
            print(_instructions(config, host, dashboard_port, own_port), flush=True)
            await server.serve(sockets=[dashboard, function])
    print("Stopped.", flush=True)


def _instructions(config: FunctionConfig, host: str, port: int, function_port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    lines = [
        f"Function {config.name} is ready.",
        f"  function   http://{shown}:{function_port}/",
        f"  dashboard  http://{shown}:{port}/api/functions",
        "Set these for the CVAT server and its workers, with CVAT_SERVERLESS=1:",
        f"  CVAT_NUCLIO_HOST={'<address of this machine>' if host in ('0.0.0.0', '::') else host}",  # noqa: S104
        f"  CVAT_NUCLIO_PORT={port}",
        "  CVAT_NUCLIO_INVOKE_METHOD=dashboard   (or direct: CVAT then calls the function's own port)",
    ]
    if host in ("127.0.0.1", "localhost", "::1"):
        lines.append("Only this machine can reach it, and a CVAT in Docker cannot: for that, add --host 0.0.0.0.")
    return "\n".join([*lines, "Ctrl-C stops it."])


def serve(folder: Path, *, host: str, port: int, function_port: int | None, models: Path | None = None) -> None:
    """Run a packaged folder until Ctrl-C or SIGTERM.

    Args:
        folder: the function folder.
        host: address to listen on.
        port: of the dashboard's API; 0 for any free one.
        function_port: of the function; 0 for any free one, None for the one in function.yaml.
        models: model volume that the function follows; None for the one in function.yaml.

    Raises:
        ConfigError: an unusable folder or port, or a function that does not start.
    """
    config = with_models(read_function(folder), models)
    asyncio.run(_serve(config, host=host, port=port, function_port=function_port))


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
