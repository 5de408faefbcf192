"""A function folder → a running Nuclio function that has answered a panorama, or the function that ran before.

nuctl does the work; what is passed to it, and why, was read in Nuclio's sources (pkg/nuctl/command/deploy.go and
pkg/platform/local/platform.go):

- The port is given by `--triggers`, which replaces a trigger as a whole: so the yaml's trigger goes along.
  Without a port Docker picks another one after every restart, and CVAT goes on calling the old one.
- Every deployment builds an image with a tag of its own. Nuclio removes the old container before the new one is ready,
  and would build over `:latest`: the tag keeps the previous image in place.
- Going back deploys the previous configuration, as Nuclio stored it, with its image and without a build
  (`build.mode: neverBuild`): labels, port and settings come back too. nuctl's `--run-image` alone would build again,
  since the yaml names an image to build.
"""

import base64
import contextlib
import dataclasses
import datetime
import http.client
import io
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from sscloud.architecture import STRIDE
from sscloud.bundle import Manifest, ModelBundle
from sscloud.errors import ConfigError, DeployError
from sscloud.room import room
from tools.function_folder import mount_models

PROJECT = "cvat"
"""The Nuclio project whose functions CVAT lists."""
NAMESPACE = "nuclio"
"""Nuclio's namespace on a machine without Kubernetes, and CVAT's default for CVAT_NUCLIO_FUNCTION_NAMESPACE."""
NETWORK = "cvat_cvat"
"""The network that CVAT's docker compose makes."""
HOST = "127.0.0.1"
"""Where Docker publishes the ports of functions."""
PORTS = range(32001, 32100)
"""Below the ports that Linux and Windows hand out by themselves, and within those of Kubernetes' node ports."""

_STORE = "/etc/nuclio/store/functions"
_STORE_CONTAINER = "nuclio-local-storage-reader"
_READINESS = 60.0
"""Seconds that Nuclio waits for a function that sets nothing."""
_MAX_REPLY = 1024 * 1024 * 1024
_KEPT_LINES = 12
_PAUSE = 1.0
_WORKED = ("ready", "unhealthy", "scaledToZero")
"""States of a function that has run: `unhealthy` is what Nuclio calls one whose container is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployConfig:
    """Where and how to deploy."""

    folder: Path
    """A function folder, as `sscloud package` writes it."""
    gpu: bool = False
    """Deploy function-gpu.yaml instead of function.yaml."""
    platform: str = "local"
    """`local` (Docker) or `kube` (Kubernetes)."""
    port: int | None = None
    """The function's port; None keeps the one that is fixed in the yaml or in Nuclio, or takes the first free one of
    PORTS. On Kubernetes a node port; None leaves the function inside the cluster."""
    namespace: str = NAMESPACE
    network: str = NETWORK
    """Docker network that the function joins."""
    registry: str | None = None
    """Where the image is pushed; Kubernetes needs one."""
    models: Path | None = None
    """Model volume to follow; made when it is missing. None leaves that to the yaml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """What a function folder's yaml says, as far as it concerns deploying."""

    folder: Path
    file: Path
    name: str
    version: str
    labels: tuple[str, ...]
    """Names of the labels in CVAT's spec."""
    image: str
    """Name of the image to build, without a tag."""
    base_image: str
    triggers: Mapping[str, Any]
    trigger: str
    """Name of the HTTP trigger."""
    port: int | None
    """The port that the yaml fixes."""
    readiness: float
    """Seconds that the function may take to start."""


class Previous(NamedTuple):
    """The function of the same name that Nuclio has."""

    config: Mapping[str, Any]
    """`metadata` and `spec`, as they are to be deployed again."""
    image: str
    port: int | None
    """The port that it fixes. One that Docker gave it is nothing to keep: CVAT asks Nuclio for the port every time."""
    worked: bool
    """It has run; one that never started is nothing to go back to."""


class Deployed(NamedTuple):
    """What came of it."""

    name: str
    image: str
    port: int | None
    """The function's port on this machine, or its node port."""
    regions: int | None
    """Regions in the answer to the test panorama; None when the cluster lets nobody in from here."""


Say = Callable[[str], None]


def deploy(config: DeployConfig, *, say: Say, now: datetime.datetime | None = None) -> Deployed:
    """Build and start a function, wait for it, and ask it about one panorama.

    Args:
        config: what to deploy.
        say: gets every line of progress, nuctl's among them.
        now: the time that tags the image; None for the clock's.

    Raises:
        ConfigError: the folder is none, or nuctl, Docker, the network, the GPU or the port is missing.
        BundleError: the folder's bundle is damaged.
        DeployError: it could not be built, did not start, or answers wrongly. The function that ran before runs again,
            or the message says that it does not.
    """
    function = read_folder(config.folder, gpu=config.gpu)
    manifest = ModelBundle.load(config.folder / "bundle").manifest
    nuctl = find_nuctl(platform=config.platform, namespace=config.namespace, say=say)
    local = config.platform == "local"
    if local:
        docker = find_program("docker", _DOCKER_MISSING)
        check_docker(docker, network=config.network)
        if config.gpu:
            say(f"Looking for the GPU in a container of {function.base_image} …")
            check_gpu(docker, function.base_image)
    previous = nuctl.previous(function.name)
    port = config.port
    if local:
        container = container_name(function.name, namespace=config.namespace)
        wanted = config.port or function.port or (previous.port if previous is not None else None)
        port = choose_port(docker, wanted, container=container)
    nuctl.ensure_project()
    tag = f"v{function.version}-{(now or datetime.datetime.now(datetime.UTC)):%Y%m%d%H%M%S}"
    image = f"{function.image}:{tag}"
    where = f" on port {port}" if port else ""
    say(f"Deploying {function.name}{where}; the first time this takes several minutes.")
    try:
        with _with_volume(function, config.models) as complete:
            nuctl.stream(deploy_arguments(config, complete, image=image, port=port), _BUILD_FAILED)
        found, regions = _see_it_answer(nuctl, function, manifest, port=port)
    except (DeployError, KeyboardInterrupt) as error:
        outcome = _go_back(nuctl, function, previous)
        if isinstance(error, KeyboardInterrupt):
            say(outcome)
            raise
        raise DeployError(f"{error}\n{outcome}") from error
    return Deployed(function.name, image, found, regions)


@contextlib.contextmanager
def _with_volume(function: Function, models: Path | None) -> Iterator[Function]:
    """The function with a yaml that mounts a model volume, for as long as it is needed."""
    if models is None:
        yield function
        return
    models.mkdir(parents=True, exist_ok=True)  # Docker would make it, and make it root's
    with tempfile.TemporaryDirectory(prefix="sscloud-") as temporary:
        file = Path(temporary) / "function.yaml"
        try:
            text = mount_models(function.file.read_text(encoding="utf-8"), models)
        except KeyError as error:
            raise ConfigError(
                f"{function.file} has no list {error}, so the model volume cannot be mounted. Make the folder again "
                "with `sscloud package BUNDLE -o FOLDER --overwrite`."
            ) from error
        file.write_text(text, encoding="utf-8", newline="\n")
        yield dataclasses.replace(function, file=file)


def _see_it_answer(
    nuctl: "Nuctl", function: Function, manifest: Manifest, *, port: int | None
) -> tuple[int | None, int | None]:
    """Wait for a function and ask it about one panorama; returns its port and the regions in its answer."""
    found = nuctl.wait_until_ready(function.name, function.readiness)
    body, size_hw = smoke_request(manifest)
    nuctl.say("It is ready. Asking it about one panorama …")
    if nuctl.platform == "kube":
        reply = nuctl.invoke(function.name, body)
    elif found is not None and found == port:
        reply = ask(found, body, within=function.readiness)
    else:
        raise DeployError(
            f"The function should listen on port {port}, but Nuclio says {found}. Look at `docker ps`, and free the "
            "port or give another one with --port."
        )
    regions = None if reply is None else check_reply(reply, labels=function.labels, size_hw=size_hw)
    return found, regions


def _go_back(nuctl: "Nuctl", function: Function, previous: Previous | None) -> str:
    """Deploy the previous function again; returns what people are to know of it."""
    docker, kubernetes = log_commands(function.name, namespace=nuctl.namespace)
    logs = f"What the function wrote: {kubernetes if nuctl.platform == 'kube' else docker}"
    if previous is None or not previous.worked:
        return f"No function {function.name} ran before, so there is none to bring back. {logs}"
    nuctl.say(f"That failed. Bringing the previous image back: {previous.image}")
    try:
        nuctl.deploy_again(function.name, previous.config, _BACK_FAILED, within=function.readiness)
    except DeployError as error:
        return f"The previous image {previous.image} could not be brought back either: {error}"
    return f"The previous image runs again: {previous.image}."


def log_commands(name: str, *, namespace: str) -> tuple[str, str]:
    """The commands that show what a function wrote: with Docker, on Kubernetes."""
    return (
        f"docker logs {container_name(name, namespace=namespace)}",
        f"kubectl logs -n {namespace} -l nuclio.io/function-name={name}",
    )


def container_name(name: str, *, namespace: str) -> str:
    """What Nuclio calls a function's container."""
    return f"nuclio-{namespace}-{name}"


def read_folder(folder: Path, *, gpu: bool) -> Function:
    """Read a function folder's yaml.

    Raises:
        ConfigError: no such folder, or a yaml that Nuclio or CVAT would not take.
    """
    file = folder / ("function-gpu.yaml" if gpu else "function.yaml")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}). Name a bundle, or a function folder that "
            "`sscloud package BUNDLE -o FOLDER` made."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    try:
        metadata, spec = data["metadata"], data["spec"]
        triggers = dict(spec["triggers"])
        trigger = next(name for name, trigger in triggers.items() if trigger["kind"] == "http")
        port = triggers[trigger].get("attributes", {}).get("port")
        return Function(
            folder=folder,
            file=file,
            name=str(metadata["name"]),
            version=str(int(metadata["annotations"]["version"])),
            labels=label_names(metadata["annotations"]["spec"]),
            image=str(spec["build"]["image"]).split(":")[0],
            base_image=str(spec["build"]["baseImage"]),
            triggers=triggers,
            trigger=trigger,
            port=int(port) if port else None,
            readiness=float(spec.get("readinessTimeoutSeconds", 60)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ConfigError(
            f"{file} is no function that CVAT can use: {type(error).__name__}: {error}. Make the folder again with "
            "`sscloud package BUNDLE -o FOLDER --overwrite`."
        ) from error


def label_names(spec: Any) -> tuple[str, ...]:
    """Names of the labels in CVAT's `spec` annotation.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    return tuple(str(label["name"]) for label in json.loads(spec))


def deploy_arguments(config: DeployConfig, function: Function, *, image: str, port: int | None) -> list[str]:
    """nuctl's arguments, without platform and namespace.

    Args:
        config: where to deploy.
        function: the folder's yaml.
        image: name and tag of the image to build.
        port: the fixed port; None leaves it to Nuclio.
    """
    arguments = ["deploy", "--project-name", PROJECT, "--path", str(function.folder), "--file", str(function.file)]
    arguments += ["--image", image]
    if port is not None:
        trigger = dict(function.triggers[function.trigger])
        attributes = {**trigger.get("attributes", {}), "port": port}
        if config.platform == "kube":
            attributes["serviceType"] = "NodePort"  # the port means nothing to a service of another type
        trigger["attributes"] = attributes
        arguments += ["--triggers", json.dumps({**function.triggers, function.trigger: trigger})]
    if config.platform == "local":
        arguments += ["--platform-config", json.dumps({"attributes": {"network": config.network}})]
    if config.registry is not None:
        arguments += ["--registry", config.registry]
    return arguments


def find_nuctl(*, platform: str, namespace: str, say: Say) -> "Nuctl":
    """The nuctl that is on the path.

    Raises:
        ConfigError: there is none.
    """
    return Nuctl(find_program("nuctl", _NUCTL_MISSING), platform=platform, namespace=namespace, say=say)


def find_program(name: str, missing: str) -> str:
    """The path of a program.

    Raises:
        ConfigError: it is not on the path; `missing` says what to do.
    """
    path = shutil.which(name)
    if path is None:
        raise ConfigError(missing)
    return path


def check_docker(docker: str, *, network: str) -> None:
    """Check that Docker runs and has CVAT's network.

    Raises:
        ConfigError: it does not.
    """
    done = _run([docker, "info", "--format", "{{.ServerVersion}}"])
    if done.returncode != 0:
        raise ConfigError(
            f"Docker is not running, or you may not use it: {_last_line(done)}\n"
            "Start it (Linux: sudo systemctl start docker; Windows: start Docker Desktop), and on Linux become a "
            "member of its group (sudo usermod -aG docker $USER, then log in again)."
        )
    done = _run([docker, "network", "inspect", "--format", "{{.Name}}", network])
    if done.returncode != 0:
        raise ConfigError(
            f"Docker has no network {network!r}, the one that CVAT's containers are on: {_last_line(done)}\n"
            "Start CVAT with its serverless compose file first (docs/first-cvat.md), or name its network with "
            "--network; `docker network ls` lists them."
        )


def check_gpu(docker: str, image: str) -> None:
    """Check that a container sees an NVIDIA GPU, in the very image that the function is built on.

    Raises:
        ConfigError: it does not.
    """
    done = _run([docker, "run", "--rm", "--gpus", "all", image, "nvidia-smi", "-L"])
    if done.returncode != 0 or "GPU" not in done.stdout:
        raise ConfigError(
            f"Docker gives containers no NVIDIA GPU: {_last_line(done)}\n"
            "Install the NVIDIA driver (580 or newer) and the NVIDIA container toolkit, then run "
            "`sudo nvidia-ctk runtime configure --runtime=docker` and restart Docker. On Windows: Docker Desktop with "
            "WSL 2. Without a GPU, leave out --gpu."
        )


def choose_port(docker: str, wanted: int | None, *, container: str) -> int:
    """The port to fix: the one wanted, or the first free one of PORTS.

    Args:
        docker: path of the program.
        wanted: None for any.
        container: name of the function's own container, which may hold the port already.

    Raises:
        ConfigError: somebody else has it.
    """
    if wanted is not None:
        holder = port_holder(docker, wanted, container=container)
        if holder is not None:
            raise ConfigError(
                f"Port {wanted} is taken by {holder}. Stop it, or give the function another port with --port, for "
                f"example --port {_neighbour(wanted)}."
            )
        return wanted
    for port in PORTS:
        if port_holder(docker, port, container=container) is None:
            return port
    raise ConfigError(f"The ports {PORTS[0]} to {PORTS[-1]} are all taken. Give a free one with --port.")


def port_holder(docker: str, port: int, *, container: str) -> str | None:
    """Who listens on a port of this machine, other than `container`; None when nobody does."""
    done = _run([docker, "ps", "--filter", f"publish={port}", "--format", "{{.Names}}"])
    names = done.stdout.split()
    if container in names:
        return None
    if names:
        return f"the container {names[0]}"
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would let two programs share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"a program on this machine ({error.strerror})"
    return None


def smoke_request(manifest: Manifest) -> tuple[bytes, tuple[int, int]]:
    """The request that CVAT would send for a small normals panorama: a room seen from its middle.

    Args:
        manifest: says the aspect, and through the scale the least size.

    Returns:
        the body, and the panorama's (height, width).
    """
    height = max(32, math.ceil(STRIDE / manifest.scale) + 1)
    size_hw = height, max(height, round(height * manifest.aspect))
    stream = io.BytesIO()
    Image.fromarray(room(size_hw)).save(stream, "JPEG", quality=95)
    return request_body(stream.getvalue()), size_hw


def request_body(image: bytes) -> bytes:
    """What CVAT posts for an image file."""
    return json.dumps({"image": base64.b64encode(image).decode()}).encode()


def ask(port: int, body: bytes, *, within: float, host: str = HOST) -> bytes:
    """Post a request to a function, as CVAT does.

    Args:
        port: the function's port.
        body: JSON.
        within: seconds until the answer has to be there; a refused connection is tried again.
        host: the machine that it runs on.

    Raises:
        DeployError: no answer in time, or one with an error.
    """
    end = time.monotonic() + within
    while True:
        try:
            with contextlib.closing(http.client.HTTPConnection(host, port, timeout=within)) as connection:
                connection.request("POST", "/", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                reply = response.read(_MAX_REPLY + 1)
            break
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > end:
                raise DeployError(
                    f"The function does not answer on port {port}: {error or type(error).__name__}. See its log."
                ) from error
            time.sleep(_PAUSE)
    if response.status != http.client.OK:
        text = reply[:500].decode(errors="replace")
        raise DeployError(f"The function answers a panorama with status {response.status}: {text}")
    if len(reply) > _MAX_REPLY:
        raise DeployError(f"The function's answer has more than {_MAX_REPLY >> 20} MiB.")
    return reply


def check_reply(reply: bytes, *, labels: Collection[str], size_hw: tuple[int, int]) -> int:
    """Check that an answer is what CVAT takes: masks, and polygons where the function is set to send them.

    Args:
        reply: the body.
        labels: names in the function's spec; CVAT drops others in silence.
        size_hw: the panorama's size.

    Returns:
        the number of regions.

    Raises:
        DeployError: it is not.
    """
    expected = "CVAT expects a JSON list of masks and polygons with labels of the function's spec"
    try:
        items = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise DeployError(f"The function's answer is not JSON ({error}); {expected}.") from error
    if not isinstance(items, list):
        raise DeployError(f"The function's answer is a JSON {type(items).__name__}; {expected}.")
    for number, item in enumerate(items):
        wrong = _wrong_item(item, labels=labels, size_hw=size_hw)
        if wrong:
            raise DeployError(f"Item {number} of the function's answer {wrong}; {expected}.")
    return len(items)


def _wrong_item(item: Any, *, labels: Collection[str], size_hw: tuple[int, int]) -> str:
    """What is wrong with one item of an answer; empty when nothing is."""
    if not isinstance(item, dict):
        return f"is a {type(item).__name__}"
    if item.get("label") not in labels:
        return f"has the label {item.get('label')!r}, which is none of {', '.join(labels)}"
    if item.get("type") == "polygon":
        return _wrong_polygon(item.get("points"), size_hw=size_hw)
    if item.get("type") != "mask":
        return f"is of type {item.get('type')!r}, neither 'mask' nor 'polygon'"
    mask = item.get("mask")
    if not isinstance(mask, list) or len(mask) < 5 or not all(type(value) is int for value in mask):
        return "has no mask of whole numbers"
    left, top, right, bottom = mask[-4:]
    if not (0 <= left <= right < size_hw[1] and 0 <= top <= bottom < size_hw[0]):
        return f"has a box outside the picture: {mask[-4:]}"
    if len(mask) - 4 != (right - left + 1) * (bottom - top + 1) or not set(mask[:-4]) <= {0, 1}:
        return "has a mask whose pixels do not fill its box with 0 and 1"
    return ""


def _wrong_polygon(points: Any, *, size_hw: tuple[int, int]) -> str:
    numbers = isinstance(points, list) and all(type(value) in (int, float) for value in points)
    if not numbers or len(points) < 6 or len(points) % 2:
        return "has no points: an even number of numbers, at least 6"
    height, width = size_hw
    inside = all(0 <= x <= width for x in points[0::2]) and all(0 <= y <= height for y in points[1::2])
    return "" if inside else "has points outside the picture"


class Nuctl:
    """Runs nuctl.

    Args:
        program: path of nuctl.
        platform: `local` or `kube`.
        namespace: Nuclio's namespace.
        say: gets nuctl's lines.
    """

    def __init__(self, program: str, *, platform: str, namespace: str, say: Say) -> None:
        self.platform = platform
        self.namespace = namespace
        self.say = say
        self._program = program

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [self._program, *arguments, "--platform", self.platform, "--namespace", self.namespace]

    def stream(self, arguments: Sequence[str], failed: str) -> None:
        """Run nuctl and pass on what it prints, line by line.

        Raises:
            DeployError: it fails; the message starts with `failed`.
        """
        last: deque[str] = deque(maxlen=_KEPT_LINES)
        with subprocess.Popen(  # noqa: S603 - nuctl with a list of arguments
            self._command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            for line in process.stdout or ():
                text = line.rstrip()
                last.append(text)
                self.say(f"  {text}")
        if process.returncode != 0:
            tail = "\n".join(f"  {line}" for line in last)
            raise DeployError(f"{failed} nuctl ended with status {process.returncode}. Its last lines:\n{tail}")

    def status(self, name: str) -> dict[str, Any] | None:
        """A function's configuration and status; None when there is no such function.

        Raises:
            DeployError: nuctl fails, or its answer cannot be understood.
        """
        done = _run(self._command(["get", "functions", name, "--output", "json"]))
        if done.returncode != 0 and "No functions found" in done.stdout + done.stderr:
            return None
        if done.returncode != 0:
            raise DeployError(f"nuctl cannot list functions: {_last_line(done)}")
        start = re.search(r"^[{\[]", done.stdout, re.MULTILINE)  # lines of its log may come first
        try:
            data = json.loads(done.stdout[start.start() :] if start else "")
        except ValueError as error:
            raise DeployError(f"nuctl's answer about {name} is not JSON: {error}. Is it Nuclio's nuctl?") from error
        found = data[0] if isinstance(data, list) and data else data
        return found if isinstance(found, dict) else None

    def previous(self, name: str) -> Previous | None:
        """What there is to go back to.

        Raises:
            DeployError: nuctl fails.
        """
        data = self.status(name)
        if data is None:
            return None
        metadata, spec, status = (json_object(data.get(key)) for key in ("metadata", "spec", "status"))
        triggers = (json_object(trigger) for trigger in json_object(spec.get("triggers")).values())
        ports = (_port(json_object(trigger.get("attributes")).get("port")) for trigger in triggers)
        kept = {key: metadata[key] for key in ("name", "namespace", "labels", "annotations") if key in metadata}
        return Previous(
            config={"metadata": kept, "spec": {**spec, "build": {"mode": "neverBuild"}}},
            image=str(spec.get("image", "")),
            port=next((port for port in ports if port is not None), None),
            worked=bool(spec.get("image")) and status.get("state") in _WORKED,
        )

    def deploy_again(self, name: str, config: Mapping[str, Any], failed: str, *, within: float) -> None:
        """Deploy a configuration as Nuclio stored it, with the image that it names, and wait until it runs.

        Raises:
            DeployError: it does not.
        """
        with tempfile.TemporaryDirectory(prefix="sscloud-") as temporary:
            file = Path(temporary) / "function.yaml"
            file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
            self.stream(["deploy", name, "--project-name", PROJECT, "--file", str(file)], failed)
        self.wait_until_ready(name, within)

    def bring_back(self, name: str, previous: Previous) -> None:
        """Deploy what `previous` found again, and wait until it runs.

        Raises:
            DeployError: it does not.
        """
        within = float(previous.config["spec"].get("readinessTimeoutSeconds") or _READINESS)
        self.deploy_again(name, previous.config, _BACK_FAILED, within=within)

    def restart(self, name: str, *, annotations: Mapping[str, str], description: str) -> None:
        """Start a function's container again with other metadata, and the image that it has.

        Raises:
            DeployError: it does not start.
        """
        previous = self.previous(name)
        if previous is None or not previous.worked:
            raise DeployError(f"The function {name} does not run, so it cannot be started again.")
        metadata, spec = previous.config["metadata"], previous.config["spec"]
        config = {
            "metadata": {**metadata, "annotations": {**json_object(metadata.get("annotations")), **annotations}},
            "spec": {**spec, "description": description},
        }
        within = float(spec.get("readinessTimeoutSeconds") or _READINESS)
        self.deploy_again(name, config, "The function could not be started again.", within=within)

    def relabel(self, name: str, *, annotations: Mapping[str, str], description: str) -> bool:
        """Change the metadata of a function that runs in Docker, and leave its container alone.

        Nuclio has no command for it: `nuctl update function` does nothing without Kubernetes, every deployment removes
        the container first. What Nuclio lists is a file of base64 JSON in its volume (pkg/platform/local/client/
        store.go); this changes that file, from within the container through which Nuclio itself reads and writes it.

        Returns:
            whether Nuclio shows the change; not where its files are kept otherwise, or nuctl fails.
        """
        docker = shutil.which("docker")
        if docker is None:
            return False
        path = f"{_STORE}/{self.namespace}/{name}.json"
        inside = [docker, "exec", "-i", _STORE_CONTAINER]
        done = _run([*inside, "cat", path])
        new = changed_row(done.stdout, name=name, annotations=annotations, description=description)
        if done.returncode != 0 or new is None:
            return False
        # A name with a dot is not among those that Nuclio lists; a file is replaced as a whole.
        hidden = f"{_STORE}/{self.namespace}/.{name}.json"
        done = _run([*inside, "sh", "-c", 'cat > "$1" && mv "$1" "$2"', "sh", hidden, path], body=new.encode())
        try:
            shown = json_object(json_object((self.status(name) or {}).get("metadata")).get("annotations"))
        except DeployError:
            return False
        return done.returncode == 0 and all(shown.get(key) == value for key, value in annotations.items())

    def ensure_project(self) -> None:
        """Make the project that CVAT looks at, if Nuclio has none.

        Raises:
            DeployError: nuctl fails.
        """
        if _run(self._command(["get", "projects", PROJECT])).returncode != 0:
            self.stream(["create", "project", PROJECT], f"The Nuclio project {PROJECT} could not be made.")

    def wait_until_ready(self, name: str, within: float) -> int | None:
        """Wait until Nuclio calls a function ready. A nuctl that fails in between is asked again.

        Args:
            name: the function.
            within: seconds.

        Returns:
            its port.

        Raises:
            DeployError: it failed, or is not ready in time.
        """
        end = time.monotonic() + within
        while True:
            try:
                data = self.status(name)
            except DeployError as error:
                if time.monotonic() > end:
                    raise DeployError(f"Whether the function is ready cannot be seen. {error}") from error
                time.sleep(_PAUSE)
                continue
            status = json_object((data or {}).get("status"))
            state = status.get("state", "absent")
            if state == "ready":
                return _port(status.get("httpPort"))
            if state == "error" or time.monotonic() > end:
                message = str(status.get("message") or "").strip()[-500:]
                raise DeployError(f"The function does not get ready; Nuclio calls it {state!r}. {message}".rstrip())
            time.sleep(_PAUSE)

    def invoke(self, name: str, body: bytes) -> bytes | None:
        """Ask a function through nuctl; None when the cluster gives it no address outside.

        Raises:
            DeployError: it fails, or answers with an error.
        """
        arguments = ["invoke", name, "--method", "POST", "--content-type", "application/json"]
        arguments += ["--log-level", "none", "--raise-on-status", "--timeout", "120s"]
        done = _run(self._command(arguments), body=body)
        if done.returncode != 0:
            if "no external invocation url" in done.stdout + done.stderr:
                return None
            raise DeployError(f"The function does not answer a panorama: {_last_line(done)}")
        return done.stdout.partition("> Response body:")[2].encode()


def changed_row(row: str, *, name: str, annotations: Mapping[str, str], description: str) -> str | None:
    """A function's file in Nuclio's store with other metadata; None when it is not what Nuclio writes."""
    try:
        data = json.loads(base64.b64decode(row.strip(), validate=True))
        if data["metadata"]["name"] != name or not data["metadata"]["annotations"] or not data["spec"]["image"]:
            return None
        data["metadata"]["annotations"].update(annotations)
        data["spec"]["description"] = description
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return base64.b64encode(json.dumps(data).encode()).decode() + "\n"


def json_object(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one: for what others wrote."""
    return value if isinstance(value, dict) else {}


def _port(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 65536 else None


def _neighbour(port: int) -> int:
    return port + 1 if port + 1 in PORTS else PORTS[0]


def _run(command: Sequence[str], *, body: bytes | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # noqa: S603 - a list of arguments
        list(command), input=body if body is not None else b"", capture_output=True, check=False
    )
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"


_NUCTL_MISSING = (
    "nuctl, Nuclio's command, is not on the path. Download the one of the version that CVAT's "
    "components/serverless/docker-compose.serverless.yml names from https://github.com/nuclio/nuclio/releases, call it "
    "nuctl, make it executable and put it on the path (docs/first-cvat.md shows how)."
)
_DOCKER_MISSING = (
    "docker is not on the path. Install Docker (https://docs.docker.com/engine/install/), or deploy to Kubernetes with "
    "--platform kube."
)
_BUILD_FAILED = "The function could not be built or started."
_BACK_FAILED = "The previous function could not be started."
