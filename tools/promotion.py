"""Makes a version of the model the one that is served, and takes that back.

The order is: the version's folder in the model volume, the registry's alias, the volume's pointer, and last what CVAT's
list of models says. Each step finds its own work done, so that a command that was killed is finished by running it
again. Functions take the new version from the volume by themselves (`serverless/champion.py`); nothing is built.
"""

import contextlib
import dataclasses
import http.client
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from sscloud.bundle import Manifest, ModelBundle
from sscloud.errors import BundleError, ConfigError, DeployError
from sscloud.files import atomic_write
from sscloud.inference import Backend
from sscloud.volume import drawn_labels, point, pointed, publish, published_manifest, retire
from tools.deploy import (
    HOST,
    NAMESPACE,
    NETWORK,
    DeployConfig,
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

PATIENCE = 120.0
"""Seconds for a function to take a new version: it notices within one, and loads and checks it in a few."""

_PAUSE = 0.1
_TRIES = 5.0
"""Seconds until a function that does not answer at all is taken for one that does not run, and one that says that it
refuses a version is believed: it may have said so of a damaged folder that was just replaced."""
_MODEL_INFO = re.compile(r'^sscloud_model_info\{worker="([^"]*)",model="((?:[^"\\]|\\.)*)"\} 1$', re.MULTILINE)
_MOST_METRICS = 1024 * 1024

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
    network: str = NETWORK
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
    """From the pointer's swing until every worker that was asked named the champion; None when none was asked."""
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
) -> Promotion:
    """Make a version the champion and let functions serve it.

    A function that does not take the version goes on with the old one; what was changed here is then taken back.

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

    Raises:
        ConfigError: the labels changed and nothing allows that; the function follows no volume; the volume cannot be
            written.
        BundleError: the version's bundle is damaged.
        DeployError: Nuclio fails, or the function does not take the version.
    """
    champion = registry.get(version)
    bundle = registry.bundle(version)
    (volume / ROLLBACK).unlink(missing_ok=True)
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
    begun = _begun_rollback(volume)
    if begun is None:
        now, target = registry.champion(), registry.previous_champion()
        if now is None or target is None:
            raise ConfigError(
                "No champion was served before this one, so there is none to go back to. `sscloud models list` shows "
                "the versions, `sscloud models promote V` serves one of them."
            )
        begun = now.version, target.version
        atomic_write(volume / ROLLBACK, json.dumps({"from": begun[0], "to": begun[1]}).encode())
    else:
        say(f"Finishing the rollback from v{begun[0]} to v{begun[1]} that was interrupted.")
    target = registry.get(begun[1])
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
        back=True,
    )
    (volume / ROLLBACK).unlink(missing_ok=True)
    return dataclasses.replace(promotion, previous=registry.get(begun[0]))


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
    back: bool = False,
) -> Promotion:
    """All steps from the volume to CVAT's list; `back`: they take a promotion back."""
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
    if previous is None or previous.version != champion.version:
        if back:
            registry.roll_back()
        else:
            registry.set_champion(champion.version)
    point(volume, folder)
    say(f"{champion.title} is the champion.")
    address = url if url is not None else (host.address if host is not None else None)
    notes: list[str] = []
    seconds = None
    if address is not None:
        try:
            seconds = wait_until_served(address, manifest.title, folder=folder, within=within)
        except DeployError as error:
            raise DeployError(f"{error} {_take_back(registry, volume, before, back=back)}") from error
        if seconds is None:
            notes.append(f"No function answers at {address}; it serves {champion.title} when it starts.")
    if host is not None:
        notes += host.show(manifest)
    with contextlib.suppress(ConfigError, BundleError):  # tidying is no part of what was asked for
        retire(volume, spare={name for name in (before,) if name is not None})
    return Promotion(champion=champion, previous=previous, folder=folder, seconds=seconds, notes=tuple(notes))


def _take_back(registry: "Registry", volume: Path, before: str | None, *, back: bool) -> str:
    """Undo a promotion that the function refuses; returns what people are to know of it."""
    champion, previous = registry.champion(), registry.previous_champion()
    if back or before is None or previous is None or champion is None:
        return "It goes on with the one that it has. Promote another version."
    point(volume, before)
    registry.roll_back()
    return f"It goes on with the one before, and {previous.title} is the champion again."


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
        entries = self._spec.get("env")
        named = [json_object(entry) for entry in entries] if isinstance(entries, list) else []
        return {str(entry["name"]): str(entry["value"]) for entry in named if "name" in entry and "value" in entry}

    @property
    def address(self) -> str | None:
        """Where it listens on this machine; None when that is not known."""
        port = json_object(json_object(self._data).get("status")).get("httpPort")
        known = self._function.platform == "local" and type(port) is int and port > 0
        return f"http://{HOST}:{port}" if known else None

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
            served = frozenset(label_names(json_object(self._metadata.get("annotations")).get("spec")))
            if served == drawn_labels(manifest):
                return False
            problem = _changed_labels(manifest, served, f"the function {name}")
        if not self._function.redeploy:
            raise ConfigError(
                f"{problem} Add --redeploy to build and start it with this version, or do that yourself: `sscloud "
                f"deploy BUNDLE --name {name} --models {volume}`. Nothing was changed."
            )
        self._say(f"{problem} It is deployed anew.")
        return True

    def _check_volume(self, volume: Path) -> None:
        inside = self._environment[MODELS]
        volumes = self._spec.get("volumes")
        for entry in map(json_object, volumes if isinstance(volumes, list) else []):
            mounted = json_object(entry.get("volumeMount")).get("mountPath")
            path = json_object(json_object(entry.get("volume")).get("hostPath")).get("path")
            if mounted == inside and path is not None and Path(str(path)) != volume.resolve():
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
        function, environment = self._function, self._environment
        backend: Backend = "openvino" if environment.get(BACKEND) == "openvino" else "torch"
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
                    network=function.network,
                    registry=function.registry,
                ),
                say=self._say,
            )
        self._data = self._nuctl.status(function.name)

    def _keep_settings(self, file: Path) -> None:
        """Carry what people set in the function over to the new one's yaml."""
        if self._data is None:
            return
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        new = {entry["name"]: entry["value"] for entry in data["spec"]["env"]}
        data["spec"]["env"] = [{"name": name, "value": value} for name, value in {**self._environment, **new}.items()]
        for key in ("triggers", "resources"):
            if key in self._spec:
                data["spec"][key] = self._spec[key]
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


def wait_until_served(url: str, title: str, *, folder: str, within: float = PATIENCE) -> float | None:
    """Ask a running function until every worker that answers names a model.

    Args:
        url: the function's address.
        title: of the model.
        folder: its folder in the volume, by which the function names what it refuses.
        within: seconds.

    Returns:
        seconds that it took; None when no function answers.

    Raises:
        DeployError: the function refuses the model, or goes on with another one.
    """
    started = time.monotonic()
    seen: dict[str, str] = {}
    in_a_row = 0
    while True:
        text = _metrics(url)
        for worker, name in _MODEL_INFO.findall(text or ""):
            seen[worker] = _unescaped(name)
            in_a_row = in_a_row + 1 if seen[worker] == title else 0
        took = time.monotonic() - started
        # Whoever is free answers: a worker that says nothing for so long is either busy or the same as the others.
        if in_a_row >= max(3, 3 * len(seen)):
            return took
        if text is not None and f'bundle="{folder}"' in text and took > _TRIES:  # not what it said of it before
            raise DeployError(f"The function at {url} refuses {title}; its log says why.")
        if not seen and took > min(within, _TRIES):
            return None
        if took > within:
            named = ", ".join(sorted(set(seen.values())))
            raise DeployError(
                f"The function at {url} names {named} after {within:g} s, not {title}. Does it follow this volume? See "
                "its log."
            )
        time.sleep(_PAUSE)


def _metrics(url: str) -> str | None:
    """What a function answers to `GET /metrics`; None when it does not."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    if parts.hostname is None:
        raise ConfigError(f"{url!r} is no address of a function, such as http://127.0.0.1:32001.")
    try:
        with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read(_MOST_METRICS).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    return text if response.status == http.client.OK else None


def _unescaped(text: str) -> str:
    """A label's value out of Prometheus' text format."""
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], text)
