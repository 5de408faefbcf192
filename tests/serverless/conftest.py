"""Function folders and `sscloud serve` in a process of its own, for tests over real sockets."""

import base64
import contextlib
import http.client
import importlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import nuclio_sdk
import nuclio_sdk.event
import nuclio_sdk.json_encoder
import nuclio_sdk.logger
import numpy as np
import pytest
import torch
from PIL import Image

import serverless
from sscloud.architecture import Architecture
from sscloud.bundle import Manifest
from sscloud.checkpoint import save_bundle
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from tools.function_folder import package

ROOT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Host:
    """A running `sscloud serve`."""

    def __init__(self, process: subprocess.Popen[str], log: Path, instructions: str) -> None:
        self.process = process
        self.instructions = instructions
        self._log = log
        lines = {line.split()[0]: line.split()[1] for line in instructions.splitlines() if "http://" in line}
        self.port = int(lines["dashboard"].split(":")[2].split("/")[0])
        self.function_port = int(lines["function"].split(":")[2].split("/")[0])

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def get(self, path: str, **headers: str) -> Answer:
        return request(self.port, "GET", path, None, headers)

    def post(self, body: bytes, content_type: str = "application/json", *, path: str = "/") -> Answer:
        """As CVAT does in direct mode."""
        return request(self.function_port, "POST", path, body, {"Content-Type": content_type})

    def get_metrics(self) -> str:
        """As Prometheus does."""
        answer = request(self.function_port, "GET", "/metrics", None, {})
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.body.decode()

    def invoke(self, body: bytes, content_type: str = "application/json", **headers: str) -> Answer:
        """As CVAT does in dashboard mode."""
        name = next(iter(self.get("/api/functions").json()))
        sent = {"x-nuclio-function-name": name, "x-nuclio-path": "/", "Content-Type": content_type, **headers}
        return request(self.port, "POST", "/api/function_invocations", body, sent)


def request(port: int, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())


@pytest.fixture(scope="session")
def start_serve() -> Callable[..., subprocess.Popen[str]]:
    """Start `sscloud serve FOLDER …` with its messages in the file `log`."""

    def start(folder: Path, *arguments: str, log: Path, **environment: str) -> subprocess.Popen[str]:
        with log.open("w", encoding="utf-8") as stderr:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tools.cli",
                    "serve",
                    str(folder),
                    *(arguments or ("--port", "0", "--function-port", "0")),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                cwd=ROOT,
                env={**os.environ, "PYTHONUTF8": "1", **environment},
            )

    return start


@pytest.fixture(scope="session")
def run_host(
    start_serve: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., contextlib.AbstractContextManager[Host]]:
    """A context manager: `with run_host(folder, SSCLOUD_MIN_AREA="1") as host`."""

    @contextlib.contextmanager
    def run(folder: Path, *arguments: str, **environment: str) -> Iterator[Host]:
        log = tmp_path_factory.mktemp("serve") / "log"
        ports = ("--port", "0", "--function-port", "0")
        with start_serve(folder, *ports, *arguments, log=log, **environment) as process:
            try:
                assert process.stdout is not None
                instructions = ""
                while "Ctrl-C" not in instructions:
                    line = process.stdout.readline()
                    assert line, f"sscloud serve ended:\n{log.read_text(encoding='utf-8')}"
                    instructions += line
                yield Host(process, log, instructions)
            finally:
                process.terminate()
                process.wait(30)

    return run


@pytest.fixture(scope="session")
def varied_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained bundle whose answers have many regions of every label."""
    torch.manual_seed(7)
    schema = LabelSchema.default()
    architecture = Architecture(classes=6, base_width=4, upsampling="transposed", wrap=True)
    model = UNet(architecture).eval()
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.inference_mode():
        last.weight.normal_(std=20)
        assert last.bias is not None
        logits = model(torch.rand(1, 3, 64, 128), wrap=True)
        last.bias -= logits.mean(dim=(0, 2, 3))
    manifest = Manifest(
        name="varied",
        version=3,
        architecture=architecture,
        labels=schema,
        label_ids=schema.class_ids,
        scale=0.5,
        resample="valid-area",
        encoding="normals",
        aspect=2.0,
        elevation=(90, -90),
    )
    path = tmp_path_factory.mktemp("bundles") / "varied"
    save_bundle(path, model, manifest)
    return path


@pytest.fixture(scope="session")
def function_folder(varied_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`varied_bundle`, packaged."""
    folder = tmp_path_factory.mktemp("functions") / "varied"
    package(varied_bundle, folder)
    return folder


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    """Encode a seeded picture of coloured blocks."""

    def make(size_hw: tuple[int, int] = (64, 128), *, kind: str = "PNG", seed: int = 0) -> bytes:
        height, width = size_hw
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        pixels = np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)[:height, :width]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def make_body() -> Callable[..., bytes]:
    """The body that CVAT sends for a picture."""

    def make(picture: bytes, **more: Any) -> bytes:
        return json.dumps({"image": base64.b64encode(picture).decode(), **more}).encode()

    return make


class Reply(NamedTuple):
    """What the handler gave back, and what it logged."""

    status: int
    content_type: str
    body: str
    log: str


class Function:
    """The handler with a real model, in this process, asked as Nuclio's wrapper asks it."""

    def __init__(self, main: ModuleType, bundle: Path) -> None:
        self._log = io.StringIO()
        logger = nuclio_sdk.Logger(logging.INFO)
        logger._logger = logging.Logger("function", logging.INFO)  # one that pytest does not know: it keeps every line
        logger.set_handler("default", self._log, nuclio_sdk.logger.HumanReadableFormatter())
        self.context = nuclio_sdk.Context(logger, worker_id="0")
        self._handler = main.handler
        self._encode = nuclio_sdk.json_encoder.Encoder().encode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "BUNDLE", bundle)
            main.init_context(self.context)

    def ask(
        self, body: bytes, content_type: str = "application/json", *, method: str = "POST", path: str = "/"
    ) -> Reply:
        """Answer one request."""
        self._log.seek(0)
        self._log.truncate()
        message = {
            "trigger": {"kind": "http", "name": "http"},
            "id": "1",
            "method": method,
            "path": path,
            "url": path,
            "content_type": content_type,
            "headers": {},
            "fields": {},
            "shard_id": 0,
            "num_shards": 0,
            "type": "",
            "type_version": "",
            "version": "",
            "timestamp": 0,
            "size": len(body),
            "body": body,
        }
        event = nuclio_sdk.Event.deserialize(message, kind=nuclio_sdk.event.EventDeserializerKinds.msgpack)
        output = nuclio_sdk.Response.from_entrypoint_output(self._encode, self._handler(self.context, event))
        assert output["body_encoding"] == "text"
        return Reply(output["status_code"], output["content_type"], output["body"], self._log.getvalue())


@pytest.fixture(scope="session")
def start_function() -> Iterator[Callable[..., Function]]:
    """Load a bundle into the handler: `start_function(bundle, SSCLOUD_MIN_AREA="1")`."""
    folder = str(Path(serverless.__file__).parent)
    sys.path.insert(0, folder)  # as Nuclio does with the function's folder
    try:
        main = importlib.import_module("serverless.main")

        def start(bundle: Path, **environment: str) -> Function:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in environment.items():
                    patch.setenv(name, value)
                return Function(main, bundle)

        yield start
    finally:
        sys.path.remove(folder)
