"""Makes a version of the model the one that is served, and takes that back.

The order is: the version's folder in the model volume, the registry's alias, the volume's pointer, and last what CVAT's
list of models says. Each step finds its own work done, so that a command that was killed is finished by running it
again. Functions take the new version from the volume by themselves (`serverless/champion.py`); nothing is built.

Alias and pointer are two stores that have to agree, so one process at a time changes them, and both are taken back
together when the function does not take a version.
"""

import contextlib
import dataclasses
import http.client
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from filelock import FileLock, Timeout

from sscloud.bundle import Manifest, ModelBundle
from sscloud.errors import BundleError, ConfigError, DeployError, SSCloudError
from sscloud.files import atomic_write
from sscloud.inference import Backend
from sscloud.volume import drawn_labels, point, pointed, publish, published_manifest, retire
from tools.deploy import (
    HOST,
    NAMESPACE,
    NETWORK,
    DeployConfig,
    Previous,
    deploy,
    find_nuctl,
    json_object,
    label_names,
)
from tools.function_folder import BACKEND, MODELS, describe, package

if TYPE_CHECKING:
    from training.registry import ModelVersion, Registry

ROLLBACK = "rollback.json"
"""File of the volume: from which version to which one a rollback goes; there only until that is finished."""

LOCK = ".promotion.lock"
"""File of the volume: held by whoever promotes or rolls back."""

PATIENCE = 120.0
"""Seconds for a function to take a new version: it notices within one, and loads and checks it in a few."""

_PAUSE = 0.1
_TRIES = 5.0
"""Seconds until a function that does not answer at all is taken for one that does not run, and one that says that it
refuses a version is believed: it may have said so of a damaged folder that was just replaced."""
_MODEL_INFO = re.compile(r'^sscloud_model_info\{worker="([^"]*)",model="((?:[^"\\]|\\.)*)"\} 1$', re.MULTILINE)
_MOST_METRICS = 1024 * 1024
_LONGEST_ANSWER = 60.0
"""Seconds for an answer: a worker that is asked finishes the image it is at first."""
_LOCKED = 180.0
"""Seconds to wait for another promotion, which may wait for its function for PATIENCE."""

Expected = int | Literal["any"] | None
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionUpdate:
    """The function in Nuclio that follows the volume."""

    name: str
    namespace: str = NAMESPACE
    platform: str = "local"
    """`local` (Docker) or `kube` (Kubernetes)."""
    gpu: bool = False
    """Which of the two yaml files is deployed, when the function has to be."""
    network: str | None = None
    """Docker network that the function joins; None for the one that it is in, or CVAT's."""
    registry: str | None = None
    """Where an image is pushed; Kubernetes needs one."""
    redeploy: bool = False
    """The function may be deployed again where nothing less helps: for other labels a new image is built, and where
    Nuclio's list cannot be changed otherwise the container is started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What came of it."""

    champion: "ModelVersion"
    previous: "ModelVersion | None"
    folder: str
    """Name of the champion's folder in the volume."""
    seconds: float | None
    """From the pointer's swing until all workers that answered named the champion; None when none answered. A worker
    that was busy all the time is not among them."""
    notes: tuple[str, ...]
    """What people should know, a sentence each."""


def promote(
    registry: "Registry",
    version: int,
    *,
    volume: Path,
    function: FunctionUpdate | None,
    say: Say,
    new_labels: bool = False,
    url: str | None = None,
    within: float = PATIENCE,
    expected: Expected = "any",
) -> Promotion:
    """Make a version the champion and let functions serve it.

    A function that does not take the version goes on with the old one; what was changed here is then taken back.
    Where another promotion or rollback goes on, this waits for it.

    Args:
        registry: the model's versions.
        version: the one to serve.
        volume: the model volume.
        function: the function in Nuclio, None where there is none (`sscloud serve`).
        say: gets lines of progress.
        new_labels: without `function`, promote a version with other labels than the one before: whoever serves it is
            packaged anew.
        url: address of a running function, such as http://127.0.0.1:32001, to be asked until it names the version;
            None asks the one that Nuclio knows, where that has a port here.
        within: seconds for that.
        expected: number of the champion that the caller decided against, None where there was none: another one by
            now is an error, unless it is `version` itself. `any` asks nothing.

    Raises:
        ConfigError: the labels changed and nothing allows that; the champion is not the expected one; the function
            follows no volume; the volume cannot be written, or another process does that for too long.
        BundleError: the version's bundle is damaged.
        DeployError: Nuclio fails, or the function does not take the version.
    """
    champion = registry.get(version)
    bundle = registry.bundle(version)
    with _alone(volume, say):
        _check_expected(registry.champion(), champion, expected)
        return _serve(
            registry,
            champion,
            bundle,
            volume=volume,
            function=function,
            say=say,
            new_labels=new_labels,
            url=url,
            within=within,
        )


def roll_back(
    registry: "Registry",
    *,
    volume: Path,
    function: FunctionUpdate | None,
    say: Say,
    new_labels: bool = False,
    url: str | None = None,
    within: float = PATIENCE,
) -> Promotion:
    """Serve the previous champion again: its folder is in the volume still, so this takes seconds.

    A rollback that was killed is finished by the next one, which then goes no further. Arguments and errors are those
    of `promote`; ConfigError also when there was no champion before.
    """
    with _alone(volume, say):
        left, target = _rollback(registry, volume, say)
        promotion = _serve(
            registry,
            target,
            registry.bundle(target.version),
            volume=volume,
            function=function,
            say=say,
            new_labels=new_labels,
            url=url,
            within=within,
            left=left,
        )
        (volume / ROLLBACK).unlink(missing_ok=True)
    return dataclasses.replace(promotion, previous=left)


@contextlib.contextmanager
def _alone(volume: Path, say: Say) -> Iterator[None]:
    """Be the only one who changes what is served."""
    lock = FileLock(volume / LOCK)
    try:
        volume.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Another promotion or rollback goes on in {volume}; this one waits for it.")
            lock.acquire(timeout=_LOCKED)
    except Timeout:
        raise ConfigError(
            f"Another promotion or rollback has been going on in {volume} for {_LOCKED:g} s. Nothing was changed; wait "
            "until it has ended, and try again."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The model volume {volume} cannot be written: {error}. Free the disk, or give another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_expected(now: "ModelVersion | None", champion: "ModelVersion", expected: Expected) -> None:
    number = None if now is None else now.version
    if expected != "any" and number not in (expected, champion.version):
        raise ConfigError(
            f"{champion.title} is not promoted: it was compared with "
            f"{'no champion' if expected is None else f'v{expected}'}, but the champion is "
            f"{'none' if now is None else now.title} by now. Nothing was changed; `sscloud models promote "
            f"{champion.version} --dataset DATASET` compares it with that one."
        )


def _rollback(registry: "Registry", volume: Path, say: Say) -> tuple["ModelVersion", "ModelVersion"]:
    """From which version to which one a rollback goes: that of one that was killed, or the champion and the one before.

    Raises:
        ConfigError: there is nothing to go back to.
    """
    begun, now, before = _begun_rollback(volume), registry.champion(), registry.previous_champion()
    if begun is not None and now is not None:
        if now.version == begun[1] or (now.version, before and before.version) == begun:
            say(f"Finishing the rollback from v{begun[0]} to v{begun[1]} that was interrupted.")
            return registry.get(begun[0]), registry.get(begun[1])
        say(f"{now.title} became the champion after a rollback from v{begun[0]} was interrupted, which is forgotten.")
    if now is None or before is None:
        raise ConfigError(
            "No champion was served before this one, so there is none to go back to. `sscloud models list` shows "
            "the versions, `sscloud models promote V` serves one of them."
        )
    return now, before


def _serve(
    registry: "Registry",
    champion: "ModelVersion",
    bundle: ModelBundle,
    *,
    volume: Path,
    function: FunctionUpdate | None,
    say: Say,
    new_labels: bool,
    url: str | None,
    within: float,
    left: "ModelVersion | None" = None,
) -> Promotion:
    """All steps from the volume to CVAT's list; `left`: the version that a rollback leaves."""
    previous, manifest = registry.champion(), bundle.manifest
    host = None if function is None else _Host(function, say=say)
    anew = False
    if host is None:
        _check_labels_stay(volume, manifest, allowed=new_labels)
    else:
        anew = host.must_be_built(volume, manifest)
    before = _pointed_folder(volume)
    folder = publish(volume, bundle)
    say(f"{champion.title} is in {volume} as {folder}.")
    if host is not None and anew:
        host.build(volume, bundle)
    changes = previous is None or previous.version != champion.version
    if left is None:
        (volume / ROLLBACK).unlink(missing_ok=True)
        if changes:
            registry.set_champion(champion.version)
    else:
        note = {"from": left.version, "to": champion.version}
        atomic_write(volume / ROLLBACK, json.dumps(note).encode())  # now that nothing speaks against it
        if changes:
            registry.roll_back()
    point(volume, folder)
    say(f"{champion.title} is the champion.")
    address = url if url is not None else (host.address if host is not None else None)
    notes: list[str] = []
    seconds = None
    if address is not None:
        try:
            wait = wait_until_served(address, manifest.title, folder=folder, within=within)
        except DeployError as error:
            # An alias that was this one before is nothing to take back; a rollback may have moved it before a kill.
            former = left or (previous if changes else None)
            outcome = _take_back(registry, volume, champion, former, host=host, back=left is not None)
            raise DeployError(f"{error} {outcome}") from error
        seconds = wait.seconds
        if wait.silence is not None:
            notes.append(wait.silence)
    if host is not None:
        notes += host.show(manifest)
    with contextlib.suppress(ConfigError, BundleError):  # tidying is no part of what was asked for
        retire(volume, spare={name for name in (before,) if name is not None})
    return Promotion(champion=champion, previous=previous, folder=folder, seconds=seconds, notes=tuple(notes))


def _take_back(
    registry: "Registry",
    volume: Path,
    champion: "ModelVersion",
    former: "ModelVersion | None",
    *,
    host: "_Host | None",
    back: bool,
) -> str:
    """Undo a promotion or a rollback that the function does not take; returns what people are to know of it.

    Args:
        registry: the model's versions.
        volume: the model volume.
        champion: the version that is not taken.
        former: the one before it; None where this did not change the champion, or there was none.
        host: the function in Nuclio; one that was built for this version is exchanged for the one before.
        back: it was a rollback.
    """
    stays = f"{champion.title} stays the champion, in the registry and in the volume"
    if former is None:
        return f"Nothing was taken back: {stays}. Promote another version, or see why the function does not take it."
    try:
        if host is not None:
            host.bring_back()
    except DeployError as error:
        return f"The function before {champion.title} does not come back: {error} So {stays}."
    try:
        bundle = registry.bundle(former.version)
        if host is not None and not host.declares(bundle.manifest):  # built before a kill
            return f"The function was built for {champion.title} and does not take {former.title}, so {stays}."
        folder = publish(volume, bundle)
        if back:
            registry.set_champion(former.version)
        else:
            registry.roll_back()
        point(volume, folder)
        (volume / ROLLBACK).unlink(missing_ok=True)
    except SSCloudError as error:
        return f"That could not be taken back: {error}"
    return f"It goes on with the one before, and {former.title} is the champion again."


def _begun_rollback(volume: Path) -> tuple[int, int] | None:
    """From which version to which one a rollback was going when it was killed; None when none was."""
    try:
        values = json.loads((volume / ROLLBACK).read_text(encoding="utf-8"))
        return int(values["from"]), int(values["to"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{volume / ROLLBACK}, what an interrupted rollback noted, cannot be read ({error}). Remove it, and "
            "promote the version that should be served."
        ) from error


def _pointed_folder(volume: Path) -> str | None:
    try:
        now = pointed(volume)
    except BundleError:
        return None  # a damaged pointer is written anew
    return None if now is None else now.bundle


def _check_labels_stay(volume: Path, manifest: Manifest, *, allowed: bool) -> None:
    """Raise ConfigError when a version has other labels than the one that is served, which no function takes."""
    folder = _pointed_folder(volume)
    if folder is None or allowed:
        return
    try:
        served = published_manifest(volume, folder)
    except BundleError:
        return
    if drawn_labels(served) != drawn_labels(manifest):
        raise ConfigError(
            f"{_changed_labels(manifest, drawn_labels(served), served.title)} A running function does not take it. "
            "Package and start the function again with the new version's bundle, then promote with --new-labels; or "
            "name the function in Nuclio and add --redeploy."
        )


def _changed_labels(manifest: Manifest, served: frozenset[str], title: str) -> str:
    names = drawn_labels(manifest)
    changes = (("new: ", names - served), ("gone: ", served - names))
    parts = [what + ", ".join(sorted(labels)) for what, labels in changes if labels]
    return f"{manifest.title} has other labels than {title} ({'; '.join(parts)})."


class _Host:
    """The function in Nuclio, as it is now.

    Args:
        function: which one.
        say: gets nuctl's lines.

    Raises:
        ConfigError: nuctl is missing.
        DeployError: nuctl fails.
    """

    def __init__(self, function: FunctionUpdate, *, say: Say) -> None:
        self._function = function
        self._say = say
        self._former: Previous | None = None
        """What `build` replaced."""
        self._built = False
        self._nuctl = find_nuctl(platform=function.platform, namespace=function.namespace, say=say)
        self._data = self._nuctl.status(function.name)

    @property
    def _metadata(self) -> dict[str, Any]:
        return json_object(json_object(self._data).get("metadata"))

    @property
    def _spec(self) -> dict[str, Any]:
        return json_object(json_object(self._data).get("spec"))

    @property
    def _environment(self) -> dict[str, str]:
        named = [json_object(entry) for entry in _entries(self._spec.get("env"))]
        return {str(entry["name"]): str(entry["value"]) for entry in named if "name" in entry and "value" in entry}

    @property
    def address(self) -> str | None:
        """Where it listens on this machine; None when that is not known."""
        port = json_object(json_object(self._data).get("status")).get("httpPort")
        known = self._function.platform == "local" and type(port) is int and port > 0
        return f"http://{HOST}:{port}" if known else None

    @property
    def _labels(self) -> frozenset[str]:
        return frozenset(label_names(json_object(self._metadata.get("annotations")).get("spec")))

    def declares(self, manifest: Manifest) -> bool:
        """Whether it was built for a version's labels, and takes no others."""
        return self._labels == drawn_labels(manifest)

    def must_be_built(self, volume: Path, manifest: Manifest) -> bool:
        """Whether only a new image lets the function serve a version.

        Raises:
            ConfigError: it does, and may not be deployed again; or the function follows another volume.
        """
        name = self._function.name
        if self._data is None:
            problem = f"Nuclio has no function {name} in the namespace {self._function.namespace}."
        elif MODELS not in self._environment:
            problem = f"The function {name} follows no model volume."
        else:
            self._check_volume(volume)
            if self.declares(manifest):
                return False
            problem = _changed_labels(manifest, self._labels, f"the function {name}")
        if not self._function.redeploy:
            raise ConfigError(
                f"{problem} Add --redeploy to build and start it with this version, or do that yourself: `sscloud "
                f"deploy BUNDLE --name {name} --models {volume}`. Nothing was changed."
            )
        self._say(f"{problem} It is deployed anew.")
        return True

    def _check_volume(self, volume: Path) -> None:
        inside = self._environment[MODELS]
        for entry in map(json_object, _entries(self._spec.get("volumes"))):
            path = json_object(json_object(entry.get("volume")).get("hostPath")).get("path")
            if _mount_path(entry) == inside and path is not None and Path(str(path)) != volume.resolve():
                raise ConfigError(
                    f"The function {self._function.name} follows the model volume {path}, not {volume.resolve()}. Name "
                    f"that one, or deploy the function with --models {volume}."
                )

    def build(self, volume: Path, bundle: ModelBundle) -> None:
        """Package the version and deploy it in the function's place, with the settings that it has.

        Raises:
            ConfigError, BundleError: it cannot be packaged.
            DeployError: it cannot be deployed; the function that ran before runs again.
        """
        function = self._function
        backend: Backend = "openvino" if self._environment.get(BACKEND) == "openvino" else "torch"
        network = json_object(json_object(self._spec.get("platform")).get("attributes")).get("network")
        former = self._nuctl.previous(function.name)
        with tempfile.TemporaryDirectory(prefix="sscloud-function-") as temporary:
            folder = Path(temporary) / "function"
            package(bundle.path, folder, name=function.name, backend=backend, models=volume)
            self._keep_settings(folder / ("function-gpu.yaml" if function.gpu else "function.yaml"))
            deploy(
                DeployConfig(
                    folder=folder,
                    gpu=function.gpu,
                    platform=function.platform,
                    namespace=function.namespace,
                    network=function.network or (network if isinstance(network, str) else "") or NETWORK,
                    registry=function.registry,
                ),
                say=self._say,
            )
        self._former, self._built = former, True
        self._data = self._nuctl.status(function.name)

    def bring_back(self) -> None:
        """Deploy what `build` replaced again, if it was called.

        Raises:
            DeployError: there was nothing, or it does not start.
        """
        if not self._built:
            return
        name = self._function.name
        if self._former is None or not self._former.worked:
            raise DeployError(f"no function {name} ran before.")
        self._say(f"Bringing the previous image back: {self._former.image}")
        self._nuctl.bring_back(name, self._former)
        self._data = self._nuctl.status(name)

    def _keep_settings(self, file: Path) -> None:
        """Leave everything as people set it in the function, but for what belongs to the new version's code and image.

        A volume that is followed already stays what it is, which may be a claim of Kubernetes.
        """
        if self._data is None:
            return
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        spec = {key: value for key, value in self._spec.items() if key not in ("image", "imageHash")}
        new = data["spec"]
        env, volumes = _entries(spec.get("env")), _entries(spec.get("volumes"))
        ours = [entry for entry in new["env"] if entry["name"] != MODELS]
        if MODELS not in self._environment:
            ours, volumes = new["env"], [*_without(volumes, new["volumes"], _mount_path), *new["volumes"]]
        data["spec"] = {
            **new,
            **spec,
            **{key: new[key] for key in ("description", "runtime", "handler", "build")},
            "env": [*_without(env, ours, _entry_name), *ours],
            "volumes": volumes,
        }
        for key in ("labels", "annotations"):
            data["metadata"][key] = {**json_object(self._metadata.get(key)), **data["metadata"][key]}
        file.write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), encoding="utf-8")

    def show(self, manifest: Manifest) -> list[str]:
        """Let CVAT's list of models say which version is served; returns what people are to know when it cannot.

        Raises:
            DeployError: the function was to be started again for that, and was not.
        """
        annotations = json_object(self._metadata.get("annotations"))
        new = {"name": manifest.title, "version": str(manifest.version)}
        description = describe(manifest)
        if all(annotations.get(key) == value for key, value in new.items()):
            return []
        name, local = self._function.name, self._function.platform == "local"
        if local and self._nuctl.relabel(name, annotations=new, description=description):
            return []
        if not self._function.redeploy:
            return [
                f"CVAT's list of models still shows the function as {annotations.get('name')}; the attribute 'model' "
                f"of every shape names {manifest.title}. Promote again with --redeploy to change that: Nuclio then "
                "starts the function's container again."
            ]
        self._nuctl.restart(name, annotations=new, description=description)
        return []


class Wait(NamedTuple):
    """What came of waiting for a function."""

    seconds: float | None
    """Until all workers that answered named the model; None when none answered."""
    silence: str | None
    """Why nobody answered, a sentence; None when somebody did."""


def wait_until_served(url: str, title: str, *, folder: str, within: float = PATIENCE) -> Wait:
    """Ask a running function until every worker that answers names a model.

    Args:
        url: the function's address.
        title: of the model.
        folder: its folder in the volume, by which the function names what it refuses.
        within: seconds.

    Raises:
        DeployError: the function refuses the model, or goes on with another one.
    """
    started = time.monotonic()
    seen: dict[str, str] = {}
    in_a_row = 0
    while True:
        left = started + within - time.monotonic()
        reply = _metrics(url, timeout=max(_PAUSE, min(_LONGEST_ANSWER, left)))
        for worker, name in _MODEL_INFO.findall(reply.text):
            seen[worker] = _unescaped(name)
            in_a_row = in_a_row + 1 if seen[worker] == title else 0
        took = time.monotonic() - started
        # Whoever is free answers: a worker that says nothing for so long is either busy or the same as the others.
        if in_a_row >= max(3, 3 * len(seen)):
            return Wait(took, None)
        if f'bundle="{folder}"' in reply.text and took > _TRIES:  # not what it said of it before
            raise DeployError(f"The function at {url} refuses {title}; its log says why.")
        if not seen and took > (within if reply.busy else min(within, _TRIES)):
            return Wait(None, _silence(url, title, reply, took))
        if took > within:
            named = set(seen.values())
            if named == {title}:
                return Wait(took, None)
            raise DeployError(
                f"The function at {url} names {', '.join(sorted(named))} after {within:g} s, not {title}. Does it "
                "follow this volume? See its log."
            )
        time.sleep(_PAUSE)


def _silence(url: str, title: str, reply: "_Reply", took: float) -> str:
    if reply.absent:
        return f"No function answers at {url}; it serves {title} when it starts."
    what = "does not answer" if reply.busy else "does not say what it serves"
    return (
        f"What listens at {url} {what}, asked for {took:.0f} s ({reply.problem}): whether it serves {title} is not "
        "known. Its /metrics or its log tell."
    )


class _Reply(NamedTuple):
    """What a function answered to `GET /metrics`."""

    text: str = ""
    problem: str = ""
    absent: bool = False
    """Nobody listens there."""
    busy: bool = False
    """Somebody does, and may answer later."""


def _metrics(url: str, *, timeout: float) -> _Reply:
    parts = urlsplit(url if "//" in url else f"//{url}")
    if parts.hostname is None:
        raise ConfigError(f"{url!r} is no address of a function, such as http://127.0.0.1:32001.")
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)
    with contextlib.closing(connection):
        try:
            connection.connect()
        except OSError as error:
            return _Reply(problem=str(error), absent=True)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read(_MOST_METRICS).decode(errors="replace")
        except TimeoutError:
            return _Reply(problem="its workers are busy, or hang", busy=True)
        except (OSError, http.client.HTTPException) as error:
            return _Reply(problem=str(error) or type(error).__name__)
    if response.status == http.client.OK:
        return _Reply(text)
    # Nuclio says so while all workers are at work.
    busy = response.status == http.client.SERVICE_UNAVAILABLE
    return _Reply(problem=f"status {response.status}", busy=busy)


def _entries(value: Any) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _without(entries: list[Any], others: list[Any], key: Callable[[Any], object]) -> list[Any]:
    """The entries that none of the others takes the place of."""
    taken = {key(other) for other in others}
    return [entry for entry in entries if key(entry) not in taken]


def _entry_name(entry: Any) -> object:
    return json_object(entry).get("name")


def _mount_path(entry: Any) -> object:
    return json_object(json_object(entry).get("volumeMount")).get("mountPath")


def _unescaped(text: str) -> str:
    """A label's value out of Prometheus' text format."""
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], text)
