"""Looks at a set-up from CVAT to the bundle, and says what to fix.

Checks are small pure functions from facts to findings; `examine` gathers the facts. What it cannot look at, it says
and goes on.
"""

import contextlib
import http.client
import json
import re
import shutil
import socket
import time
import urllib.parse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sscloud.bundle import ModelBundle
from sscloud.errors import BundleError, ConfigError, DeployError, ServerError
from tools.deploy import (
    NAMESPACE,
    PROJECT,
    ask,
    check_reply,
    container_name,
    json_object,
    log_commands,
    read_folder,
    request_body,
)
from training.cvat import TESTED, parse_version
from training.project_labels import DRAWABLE

if TYPE_CHECKING:
    from training.cvat import ProjectLabel, Server

DASHBOARD = "http://localhost:8070"
"""Where CVAT's serverless compose file publishes Nuclio's dashboard."""
CVAT_TIMEOUT = 120.0
"""Seconds that CVAT waits for a function, unless CVAT_NUCLIO_DEFAULT_TIMEOUT says otherwise."""
NUCLIO_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes that Nuclio takes when the trigger names no limit."""

_GIB = 1024**3
_IMAGE_GIB = 20
"""Room for a function's image and the layers it is built from."""
_MAX_LIST = 64 * 1024 * 1024
_WAIT = 10.0
_NO_CONNECTION = re.compile(r"ConnectionPool|Connection (aborted|to )")
"""How the library says it by which CVAT asks Nuclio."""
_ADDRESS = re.compile(r"host='([^']*)', port=(\d+)")

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    level: Level
    check: str
    """What was looked at, in a word or two."""
    what: str
    remedy: str = ""

    def lines(self) -> list[str]:
        """For a terminal: a name from outside can neither move its cursor nor pretend to be a line of its own."""
        lines = [f"{self.level:8} {self.check}: {_printable(self.what)}"]
        return [*lines, f"{'':8} → {_printable(self.remedy)}"] if self.remedy else lines


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """What to look at."""

    project: int | None = None
    """Project in CVAT."""
    function: str | None = None
    """Name of a function, or path of a function folder; None for all whose name starts with `sscloud`."""
    bundle: Path | None = None
    nuclio: str = DASHBOARD
    namespace: str = NAMESPACE
    folder: Path = Path()
    """Where data and runs are written."""
    timeout: float = CVAT_TIMEOUT
    """Seconds that CVAT waits for a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NuclioFunction:
    """A function as Nuclio's dashboard lists it, as far as it was understood."""

    name: str
    faults: tuple[str, ...]
    """What breaks CVAT's list of models."""
    labels: tuple[str, ...]
    version: str
    state: str
    port: int | None
    """The port that CVAT calls."""
    fixed_port: int | None
    """The port that the trigger fixes."""
    body_limit: int
    """Bytes of a request's body."""
    gpu: bool


class LargestFrame(NamedTuple):
    """A project's largest frame."""

    task: int
    number: int
    name: str
    size_hw: tuple[int, int]


def examine(config: DoctorConfig, *, server: "Server | None") -> Iterator[Finding]:
    """Look at everything that can be reached, one finding after the other.

    Args:
        config: what to look at.
        server: CVAT, logged in; None leaves it out.

    Raises:
        ConfigError: the address of Nuclio is none.
    """
    yield check_disk(shutil.disk_usage(_existing(config.folder)).free, config.folder)
    yield check_gpu(_gpus())
    folder = Path(config.function) if config.function and (Path(config.function) / "function.yaml").is_file() else None
    name = read_folder(folder, gpu=False).name if folder else config.function
    bundle_path = config.bundle or (folder / "bundle" if folder else None)
    bundle = None
    if bundle_path is not None:
        bundle, finding = _open_bundle(bundle_path)
        yield finding

    functions, finding = _list_functions(config)
    yield finding
    for function in functions:
        yield from check_metadata(function)
    ours = [function for function in functions if _is_ours(function.name, name)]
    if functions and not ours:
        yield missing_function(name, [function.name for function in functions])
    host = urllib.parse.urlsplit(config.nuclio).hostname or ""
    for function in ours:
        yield check_state(function, namespace=config.namespace)
        yield from check_port(function, listens=_listens(host, function.port))
        if bundle is not None:
            yield check_bundle_version(function, bundle.manifest.version)

    if server is None:
        return
    yield check_version(server.version, server.url)
    labels: dict[str, Sequence[str]] = {function.name: function.labels for function in ours}
    try:
        listed = server.functions()
    except ServerError as error:
        yield broken_list(error, explained=any(function.faults for function in functions))
    else:
        yield check_listed([function.id for function in listed], name, [function.name for function in ours])
        for entry in listed:
            if _is_ours(entry.id, name):
                labels.setdefault(entry.id, tuple(entry.labels))
    if config.project is None:
        yield Finding(
            level="warning",
            check="labels",
            what="Labels and the largest frame were not looked at.",
            remedy="Name a project of CVAT with --project.",
        )
        return
    if not labels and bundle is not None:
        labels["the bundle"] = [label.name for label in bundle.manifest.labels.classes if not label.background]
    if not labels:
        yield Finding(
            level="warning",
            check="labels",
            what=f"The labels of project {config.project} were not compared: no function and no bundle is known.",
            remedy="Name a bundle with --bundle, or a function with --function.",
        )
    try:
        project_labels = server.labels(project_id=config.project)
        for owner, names in labels.items():
            yield check_labels(owner, names, project_labels, project=config.project)
        frame = _largest_frame(server, config.project)
        if frame is None:
            yield Finding(level="warning", check="frame", what=f"Project {config.project} has no frames to try.")
            return
        image = server.image(frame.task, frame.number)
    except ServerError as error:
        yield Finding(
            level="problem", check="project", what=str(error), remedy="Check --project and your rights there."
        )
        return
    for function in ours:
        body = request_body(image)
        fits = check_body(function, len(body), frame)
        yield fits
        if fits.level != "problem" and function.port is not None and _listens(host, function.port):
            yield _try_frame(config, function, body, frame, host=host)


# The checks


def check_disk(free: int, folder: Path) -> Finding:
    """Whether there is room for data, runs and images; `free` in bytes."""
    what = f"{free / _GIB:.0f} GiB are free where {folder.resolve()} is."
    remedy = "Free some: `docker system df` shows what Docker holds; old runs and images of functions are large."
    if free < _GIB:
        return Finding(level="problem", check="disk", what=what, remedy=remedy)
    level: Level = "warning" if free < _IMAGE_GIB * _GIB else "ok"
    return Finding(level=level, check="disk", what=what, remedy=remedy if level == "warning" else "")


def check_gpu(names: Sequence[str]) -> Finding:
    """Whether PyTorch sees a GPU on this machine."""
    if names:
        return Finding(level="ok", check="GPU", what=f"PyTorch sees {', '.join(names)}.")
    return Finding(
        level="warning",
        check="GPU",
        what="PyTorch sees no NVIDIA GPU here: training is slow, and functions run on the CPU.",
        remedy="If there is one, install the driver (580 or newer): `nvidia-smi` must list it.",
    )


def check_version(version: str, url: str) -> Finding:
    """Whether CVAT is one of the versions that SSCloud knows."""
    what = f"CVAT {version} at {url}; the login is accepted."
    (major, first), (_, behind) = TESTED
    if TESTED[0] <= parse_version(version) < TESTED[1]:
        return Finding(level="ok", check="CVAT", what=what)
    return Finding(
        level="warning",
        check="CVAT",
        what=what,
        remedy=f"SSCloud was written for CVAT {major}.{first} to {major}.{behind - 1}. Take one of these if something "
        "fails.",
    )


def check_metadata(function: NuclioFunction) -> Iterator[Finding]:
    """One problem for everything that makes CVAT's whole list of models fail."""
    for fault in function.faults:
        yield Finding(
            level="problem",
            check="metadata",
            what=f"The function {function.name} {fault}: CVAT's list of models answers 500 to everybody.",
            remedy=f"Correct its yaml and deploy it again, or remove it: nuctl delete function {function.name}",
        )


def check_state(function: NuclioFunction, *, namespace: str) -> Finding:
    """Whether Nuclio calls the function ready."""
    name = function.name
    if function.state == "ready":
        where = "a GPU" if function.gpu else "the CPU"
        return Finding(level="ok", check="function", what=f"{name} version {function.version} is ready, on {where}.")
    container = container_name(name, namespace=namespace)
    return Finding(
        level="problem",
        check="function",
        what=f"Nuclio calls {name} {function.state!r}.",
        remedy=f"{_see_log(name, namespace=namespace)} Then deploy it again with `sscloud deploy`; a container that is "
        f"only stopped starts with `docker start {container}`.",
    )


def check_port(function: NuclioFunction, *, listens: bool) -> Iterator[Finding]:
    """Whether CVAT finds the function where Nuclio says it is, also after the next restart.

    Args:
        function: the function.
        listens: somebody takes connections at the port that CVAT calls.
    """
    port, fixed = function.port, function.fixed_port
    again = "Deploy it again with `sscloud deploy`, which fixes the port."
    if port is None:
        yield Finding(
            level="warning",
            check="port",
            what=f"{function.name} has no port of its own: CVAT can ask it through Nuclio's dashboard only.",
            remedy="Fine on Kubernetes. Otherwise deploy it again with `sscloud deploy`.",
        )
    elif not listens:
        yield Finding(
            level="problem",
            check="port",
            what=f"CVAT calls {function.name} at port {port}, but nobody answers there: the container is stopped, or "
            "Docker gave it another port when it was restarted.",
            remedy=f"`docker ps` shows the port it has. {again}",
        )
    elif fixed is None:
        yield Finding(
            level="warning",
            check="port",
            what=f"The port {port} of {function.name} is not fixed: after a restart of Docker CVAT will not find it.",
            remedy=again,
        )
    elif fixed != port:
        yield Finding(
            level="problem",
            check="port",
            what=f"{function.name} should have port {fixed}, but Nuclio tells CVAT {port}.",
            remedy=again,
        )
    else:
        yield Finding(level="ok", check="port", what=f"{function.name} answers at its fixed port {port}.")


def check_bundle_version(function: NuclioFunction, version: int) -> Finding:
    """Whether the function serves the bundle that was named."""
    if function.version == str(version):
        return Finding(level="ok", check="version", what=f"{function.name} serves the bundle's version, {version}.")
    return Finding(
        level="warning",
        check="version",
        what=f"{function.name} serves version {function.version}; the bundle is version {version}.",
        remedy="Deploy the bundle with `sscloud deploy`, if it is the one that should be served.",
    )


def missing_function(name: str | None, known: Sequence[str]) -> Finding:
    """Nuclio has no such function."""
    return Finding(
        level="problem",
        check="function",
        what=f"Nuclio has no function {name or 'of SSCloud'} in its project {PROJECT}; there are: {', '.join(known)}.",
        remedy="Deploy one with `sscloud deploy`, or name the right one with --function.",
    )


def broken_list(error: ServerError, *, explained: bool) -> Finding:
    """CVAT's list of models fails; `explained` when a function's metadata says why."""
    if error.status == 404:
        return Finding(
            level="problem",
            check="models",
            what="CVAT runs without serverless functions.",
            remedy="Start it with components/serverless/docker-compose.serverless.yml too (docs/first-cvat.md).",
        )
    if error.status in (503, 504) and _NO_CONNECTION.search(str(error)):
        address = _ADDRESS.search(str(error))
        where = " at {}:{}".format(*address.groups()) if address else ""
        return Finding(
            level="problem",
            check="models",
            what=f"CVAT cannot list its models: it does not reach Nuclio{where}.",
            remedy="Start Nuclio, or tell CVAT where it is: CVAT_NUCLIO_HOST and CVAT_NUCLIO_PORT.",
        )
    remedy = "Correct the function named above." if explained else "See the log of CVAT: `docker logs cvat_server`."
    return Finding(level="problem", check="models", what=f"CVAT cannot list its models: {error}", remedy=remedy)


def check_listed(listed: Sequence[str], name: str | None, in_nuclio: Sequence[str]) -> Finding:
    """Whether CVAT lists the functions.

    Args:
        listed: functions that CVAT lists.
        name: the one that was asked for; None for any of SSCloud's.
        in_nuclio: those of them that Nuclio has.
    """
    found = [function for function in listed if _is_ours(function, name)]
    missing = sorted(set(in_nuclio) - set(found))
    if found and not missing:
        return Finding(level="ok", check="models", what=f"CVAT lists {', '.join(found)}.")
    wanted = ", ".join(missing) or name or "a function of SSCloud"
    return Finding(
        level="problem",
        check="models",
        what=f"CVAT does not list {wanted}; it lists {', '.join(listed) or 'none'}.",
        remedy=f"Deploy it in Nuclio's project {PROJECT} and the namespace that CVAT reads "
        f"(CVAT_NUCLIO_FUNCTION_NAMESPACE, {NAMESPACE} unless set), as `sscloud deploy` does; or CVAT asks another "
        "Nuclio (CVAT_NUCLIO_HOST).",
    )


def check_labels(owner: str, names: Collection[str], labels: Sequence["ProjectLabel"], *, project: int) -> Finding:
    """Whether the model's labels meet the project's: by equal name, and a type that takes masks.

    Args:
        owner: the function that has the labels.
        names: the model's labels.
        labels: the project's.
        project: its number.
    """
    types = {label.name: label.type for label in labels}
    absent = [name for name in names if name not in types]
    unfit = [f"{name} ({types[name]})" for name in names if name in types and types[name] not in DRAWABLE]
    if not absent and not unfit:
        return Finding(level="ok", check="labels", what=f"All labels of {owner} are in project {project}.")
    parts = []
    if absent:
        parts.append(f"has no {', '.join(absent)}")
    if unfit:
        parts.append(f"has {', '.join(unfit)} of a type that takes no masks")
    met = len(names) - len(absent) - len(unfit)
    return Finding(
        level="warning" if met else "problem",
        check="labels",
        what=f"Project {project} {' and '.join(parts)}: CVAT drops what {owner} finds of these, without a word.",
        remedy=f"`sscloud labels push --project {project}` adds labels. Names must be equal, to the letter.",
    )


def check_body(function: NuclioFunction, size: int, frame: LargestFrame) -> Finding:
    """Whether the request with the largest frame passes the function's limit; `size` in bytes."""
    what = (
        f"The request with {frame.name} ({frame.size_hw[1]}x{frame.size_hw[0]}) has {size / 2**20:.1f} MiB; "
        f"{function.name} takes {function.body_limit / 2**20:.1f}."
    )
    if size <= function.body_limit:
        return Finding(level="ok", check="body", what=what)
    remedy = "Raise maxRequestBodySize in the function's yaml (bytes) and deploy it again."
    return Finding(level="problem", check="body", what=what, remedy=remedy)


def check_time(name: str, seconds: float, regions: int, *, timeout: float) -> Finding:
    """Whether the function is fast enough for CVAT."""
    what = (
        f"{name} answered the largest frame in {seconds:.1f} s, with {regions} regions; CVAT waits for {timeout:g} s."
    )
    if seconds <= timeout / 2:
        return Finding(level="ok", check="time", what=what)
    return Finding(
        level="problem" if seconds > timeout else "warning",
        check="time",
        what=what,
        remedy="Deploy it with --gpu, or let CVAT wait longer: CVAT_NUCLIO_DEFAULT_TIMEOUT in "
        "deploy/docker-compose.sscloud.yml (tell it to this check with --timeout).",
    )


# The facts


def read_function_entry(name: str, entry: Any) -> NuclioFunction:
    """Read a function of Nuclio's list, whatever it holds, with what CVAT would stumble over."""
    metadata, spec, status = (json_object(json_object(entry).get(key)) for key in ("metadata", "spec", "status"))
    annotations = json_object(metadata.get("annotations"))
    labels, faults = _spec_labels(annotations.get("spec") or "[]")
    if not annotations:
        faults.append("has no annotations")
    for key in ("version", "min_pos_points", "min_neg_points"):
        try:
            int(annotations.get(key, "1"))
        except (TypeError, ValueError):
            faults.append(f"has the {key} {str(annotations[key])[:40]!r}, which is no integer")
    if not spec.get("description"):
        faults.append("has no description")
    if not status.get("state"):
        faults.append("has no state")
    triggers = json_object(spec.get("triggers")).values()
    http_trigger = next((t for t in map(json_object, triggers) if t.get("kind") == "http"), json_object(None))
    attributes = json_object(http_trigger.get("attributes"))
    limits = json_object(json_object(spec.get("resources")).get("limits"))
    return NuclioFunction(
        name=name,
        faults=tuple(faults),
        labels=labels,
        version=str(annotations.get("version", "1")),
        state=str(status.get("state") or "unknown"),
        port=_positive(status.get("httpPort")),
        fixed_port=_positive(attributes.get("port")),
        body_limit=_positive(attributes.get("maxRequestBodySize")) or NUCLIO_BODY_LIMIT,
        gpu=any("gpu" in str(key) for key in limits),
    )


def _spec_labels(text: Any) -> tuple[tuple[str, ...], list[str]]:
    """Names of the labels in a `spec` annotation, and what CVAT would stumble over."""
    try:
        items = json.loads(text)
        names = [str(item["name"]) for item in items]
        attributes = [[attribute["name"] for attribute in item.get("attributes", [])] for item in items]
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        return (), [f"has a spec that is no JSON list of labels ({type(error).__name__}: {error})"]
    faults = []
    if len(set(names)) < len(names):
        faults.append("names a label twice in its spec")
    if any(len(set(map(str, row))) < len(row) for row in attributes):
        faults.append("names an attribute of a label twice in its spec")
    return tuple(names), faults


def _list_functions(config: DoctorConfig) -> tuple[list[NuclioFunction], Finding]:
    """Nuclio's functions, and how asking for them went."""
    try:
        functions = fetch_functions(config.nuclio, namespace=config.namespace)
    except DeployError as error:
        return [], Finding(
            level="warning",
            check="Nuclio",
            what=f"{error} Functions were not looked at.",
            remedy="Start it (docs/first-cvat.md), or give the address of its dashboard with --nuclio.",
        )
    if functions:
        what = f"Nuclio at {config.nuclio} has {', '.join(function.name for function in functions)}."
        return functions, Finding(level="ok", check="Nuclio", what=what)
    what = f"Nuclio at {config.nuclio} has no function in its project {PROJECT}."
    return [], Finding(level="problem", check="Nuclio", what=what, remedy="Deploy one with `sscloud deploy`.")


def fetch_functions(url: str, *, namespace: str) -> list[NuclioFunction]:
    """The functions of the project cvat, asked for as CVAT asks.

    Args:
        url: address of the dashboard.
        namespace: Nuclio's namespace.

    Raises:
        ConfigError: the address is none.
        DeployError: nobody answers there, or somebody else does.
    """
    try:
        address = urllib.parse.urlsplit(url)
        port = address.port
    except ValueError as error:
        raise ConfigError(f"--nuclio {url!r} is no address ({error}). Give one such as {DASHBOARD}.") from error
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"--nuclio {url!r} is no address. Give one such as {DASHBOARD}.")
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    headers = {"x-nuclio-project-name": PROJECT, "x-nuclio-function-namespace": namespace}
    try:
        with contextlib.closing(kind(address.hostname, port, timeout=_WAIT)) as connection:
            connection.request("GET", f"{address.path.rstrip('/')}/api/functions", headers=headers)
            response = connection.getresponse()
            text = response.read(_MAX_LIST)
    except (OSError, http.client.HTTPException) as error:
        raise DeployError(f"Nuclio's dashboard does not answer at {url}: {error or type(error).__name__}.") from error
    if response.status != http.client.OK:
        raise DeployError(f"Nuclio's dashboard at {url} answers with status {response.status}.")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise DeployError(f"What answers at {url} is not Nuclio's dashboard.")
    return [read_function_entry(name, entry) for name, entry in sorted(entries.items())]


def _try_frame(
    config: DoctorConfig, function: NuclioFunction, body: bytes, frame: LargestFrame, *, host: str
) -> Finding:
    started = time.monotonic()
    try:
        reply = ask(function.port or 0, body, within=2 * config.timeout, host=host)
        regions = check_reply(reply, labels=function.labels, size_hw=frame.size_hw)
    except DeployError as error:
        remedy = _see_log(function.name, namespace=config.namespace)
        return Finding(level="problem", check="time", what=f"{frame.name}: {error}", remedy=remedy)
    return check_time(function.name, time.monotonic() - started, regions, timeout=config.timeout)


def _largest_frame(server: "Server", project: int) -> LargestFrame | None:
    """The frame of a project with the most pixels."""
    frames = (
        LargestFrame(task.id, frame.number, frame.name, frame.size_hw)
        for task in server.tasks(project)
        if task.size
        for frame in server.frames(task.id)
    )
    return max(frames, key=lambda frame: frame.size_hw[0] * frame.size_hw[1], default=None)


def _open_bundle(path: Path) -> tuple[ModelBundle | None, Finding]:
    try:
        bundle = ModelBundle.load(path)
    except BundleError as error:
        return None, Finding(level="problem", check="bundle", what=str(error), remedy="Copy or export it again.")
    what = f"{path}: {bundle.manifest.title}, its weights are the ones it was saved with."
    return bundle, Finding(level="ok", check="bundle", what=what)


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _listens(host: str, port: int | None) -> bool:
    """Whether somebody takes connections there."""
    if port is None:
        return False
    try:
        socket.create_connection((host, port), timeout=_WAIT).close()
    except OSError:
        return False
    return True


def _existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def _is_ours(function: str, name: str | None) -> bool:
    return function.startswith("sscloud") if name is None else function == name


def _see_log(name: str, *, namespace: str) -> str:
    docker, kubernetes = log_commands(name, namespace=namespace)
    return f"See its log: `{docker}`, on Kubernetes `{kubernetes}`."


def _printable(text: str) -> str:
    """One line that does nothing to a terminal but fill it."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
