"""`sscloud deploy` against stand-ins for nuctl and docker that run functions for real."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml
from model_versions import Versions

from sscloud.architecture import Architecture
from sscloud.bundle import WEIGHTS, Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError, ConfigError, DeployError
from sscloud.image import decode_image
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from sscloud.volume import point, pointed, publish, read_pointer
from tools.deploy import (
    DeployConfig,
    Deployed,
    Nuctl,
    check_reply,
    deploy,
    find_nuctl,
    read_folder,
    smoke_request,
)
from tools.function_folder import mount_models, package
from tools.promotion import FunctionUpdate, promote, roll_back

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime.datetime(2026, 11, 23, 10, 20, 30, tzinfo=datetime.UTC)
NAME = "sscloud-street"
ENDING = ["--platform", "local", "--namespace", "nuclio"]

GROUND = [{"label": "Земля", "type": "mask", "mask": [1, 1, 0, 1, 4, 5, 5, 6]}]
BUILDING = [{**GROUND[0], "label": "Здание"}]


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands leave behind goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


class Machine:
    """A machine with Nuclio and Docker: its folder, and the calls made to the two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.update(projects=["cvat"], networks=["cvat_cvat"], functions={}, containers={}, images={})

    @property
    def state(self) -> dict[str, Any]:
        file = self.folder / "state.json"
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return state

    def update(self, **changes: Any) -> None:
        (self.folder / "state.json").write_text(json.dumps({**self.state, **changes}), encoding="utf-8")

    @property
    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def deployments(self) -> list[list[str]]:
        return [call[2:] for call in self.calls if call[:2] == ["nuctl", "deploy"]]

    def deploy(self, folder: Path, **settings: Any) -> Deployed:
        """Deploy, an hour after the last time."""
        at = NOW + datetime.timedelta(hours=len(self.deployments()))
        return deploy(DeployConfig(folder=folder, **settings), say=self.lines.append, now=at)

    def answer(self) -> str:
        """The label in the answer of the function that runs."""
        from tools.deploy import ask

        ((port, _),) = self.state["containers"].values()
        return str(json.loads(ask(port, b"{}", within=10))[0]["label"])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """nuctl and docker first on the path; functions end with the test."""
    machine = Machine(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, flags in (("nuctl", ""), ("docker", "-S -E")):
        script = Path(__file__).with_name("nuclio_programs.py")
        (programs / name).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" {flags} "{script}" "{tmp_path}" {name} "$@"\n'
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    yield machine
    for _, pid in machine.state["containers"].values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def packaged(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions") / "function"
    package(tiny_bundle.path, folder, name=NAME)
    return folder


@pytest.fixture
def light(packaged: Path, tmp_path: Path) -> Callable[..., Path]:
    """A packaged folder that the stand-in runs as a function with a fixed answer."""

    def make(name: str = "function", *, answer: Any = GROUND, status: int = 200, port: Any = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(packaged, folder)
        (folder / "answer.json").write_text(json.dumps([status, json.dumps(answer)]), encoding="utf-8")
        for file in (folder / "function.yaml", folder / "function-gpu.yaml"):
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
            data["spec"]["readinessTimeoutSeconds"] = 20
            if port is not None:
                data["spec"]["triggers"]["myHttpTrigger"]["attributes"]["port"] = port
            file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        return folder

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def value_of(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


class TestSuccess:
    def test_the_whole_command(self, machine: Machine, tiny_bundle: ModelBundle) -> None:
        """A bundle is packaged, and the function itself answers."""
        machine.update(gpu="there")
        port = free_port()
        command = [sys.executable, "-m", "tools.cli", "deploy", str(tiny_bundle.path), "--name", NAME, "--gpu"]
        done = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"{NAME} runs on port {port}, image cvat.{NAME}:v3-" in done.stdout
        assert "It answered a test panorama with" in done.stdout
        assert f"  nuctl Deploying function {NAME}" in done.stderr.splitlines(), "nuctl's lines are passed on"
        assert "Answered" not in done.stderr

    def test_what_nuctl_is_told(self, machine: Machine, light: Callable[..., Path]) -> None:
        folder, port = light(), free_port()
        deployed = machine.deploy(folder, port=port, network="cvat_cvat")
        assert deployed == Deployed(NAME, f"cvat.{NAME}:v3-20261123102030", port, 1)
        (arguments,) = machine.deployments()
        triggers = json.loads(value_of(arguments, "--triggers"))
        assert arguments == [
            *("--project-name", "cvat", "--path", str(folder), "--file", str(folder / "function.yaml")),
            *("--image", deployed.image, "--triggers", json.dumps(triggers)),
            *("--platform-config", '{"attributes": {"network": "cvat_cvat"}}', *ENDING),
        ]
        written = yaml.safe_load((folder / "function.yaml").read_text(encoding="utf-8"))["spec"]["triggers"]
        assert triggers["myHttpTrigger"]["attributes"].pop("port") == port
        assert triggers == written, "--triggers replaces a trigger as a whole: nothing of the yaml's may be lost"
        spec = machine.state["functions"][NAME]["spec"]
        assert spec["platform"]["attributes"]["restartPolicy"]["name"] == "always"
        assert spec["platform"]["attributes"]["network"] == "cvat_cvat"

    def test_the_gpu_file(self, machine: Machine, light: Callable[..., Path]) -> None:
        machine.update(gpu="there")
        folder = light()
        machine.deploy(folder, gpu=True, port=free_port())
        image = "nvidia/cuda:13.0.0-base-ubuntu22.04"
        assert ["docker", "run", "--rm", "--gpus", "all", image, "nvidia-smi", "-L"] in machine.calls
        assert value_of(machine.deployments()[0], "--file") == str(folder / "function-gpu.yaml")

    def test_makes_the_project(self, machine: Machine, light: Callable[..., Path]) -> None:
        machine.update(projects=[])
        machine.deploy(light(), port=free_port())
        assert ["nuctl", "create", "project", "cvat", *ENDING] in machine.calls
        assert machine.state["projects"] == ["cvat"]

    def test_a_second_deployment_keeps_the_port_and_both_images(
        self, machine: Machine, light: Callable[..., Path]
    ) -> None:
        port = free_port()
        machine.deploy(light("one"), port=port)
        deployed = machine.deploy(light("two", answer=BUILDING))
        assert deployed.port == port
        assert list(machine.state["images"]) == [f"cvat.{NAME}:v3-20261123102030", f"cvat.{NAME}:v3-20261123112030"]
        assert machine.answer() == "Здание"

    def test_the_yamls_port(self, machine: Machine, light: Callable[..., Path]) -> None:
        port = free_port()
        assert machine.deploy(light(port=port)).port == port

    @pytest.mark.slow
    def test_a_port_that_docker_gave_is_not_kept(
        self, machine: Machine, light: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = machine.deploy(light("one"), port=free_port())
        functions = machine.state["functions"]
        del functions[NAME]["spec"]["triggers"]["myHttpTrigger"]["attributes"]["port"]
        machine.update(functions=functions)
        port = free_port()
        monkeypatch.setattr("tools.deploy.PORTS", [port])
        assert before.port != port == machine.deploy(light("two")).port

    def test_the_first_free_port(
        self, machine: Machine, light: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            first, second, third = taken.getsockname()[1], free_port(), free_port()
            monkeypatch.setattr("tools.deploy.PORTS", [first, second, third])
            machine.update(containers={"somebody": [second, 2**22 + 1]})
            assert machine.deploy(light()).port == third

    @pytest.mark.slow
    def test_a_nuctl_that_fails_now_and_then(self, machine: Machine, light: Callable[..., Path]) -> None:
        """While it waits for the function: that one is up, and stays up."""
        machine.update(failing_gets_after=2)
        machine.deploy(light(answer=BUILDING), port=free_port())
        assert machine.state["failing_gets"] == 0, "they did fail"
        assert len(machine.deployments()) == 1
        assert machine.answer() == "Здание"


class TestFailureBringsThePreviousBack:
    @pytest.mark.parametrize(
        "fault", ["build", "unhealthy", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("start", "port"))]
    )
    def test_of_nuclio(self, machine: Machine, light: Callable[..., Path], fault: str) -> None:
        port = free_port()
        before = machine.deploy(light("one"), port=port)
        stored = machine.state["functions"][NAME]
        machine.update(fault=fault)
        two = light("two", answer=BUILDING)
        file = two / "function.yaml"
        text = file.read_text(encoding="utf-8").replace("readinessTimeoutSeconds: 20", "readinessTimeoutSeconds: 1")
        file.write_text(text.replace("Улица v3", "Другая v3"), encoding="utf-8")
        with pytest.raises(DeployError, match=f"(?s)The previous image runs again: {before.image}") as caught:
            machine.deploy(two)
        expected = {
            "build": "no space left on device",
            "start": "Function wasn't ready in time",
            "port": f"should listen on port {port}",
            "unhealthy": "Nuclio calls it 'unhealthy'",
        }
        assert expected[fault] in str(caught.value)
        assert machine.answer() == "Земля"
        after = machine.state["functions"][NAME]
        assert after["metadata"] == stored["metadata"], "labels and version of the previous function"
        assert after["spec"]["triggers"] == stored["spec"]["triggers"]
        assert after["status"] == {"state": "ready", "httpPort": port}
        back = machine.deployments()[-1]
        config = value_of(back, "--file")
        assert back == [NAME, "--project-name", "cvat", "--file", config, *ENDING]
        assert not Path(config).exists()

    @pytest.mark.slow
    def test_of_a_nuctl_that_goes_on_failing(self, machine: Machine, light: Callable[..., Path]) -> None:
        before = machine.deploy(light("one"), port=free_port())
        two = light("two", answer=BUILDING)
        file = two / "function.yaml"
        text = file.read_text(encoding="utf-8").replace("readinessTimeoutSeconds: 20", "readinessTimeoutSeconds: 1")
        file.write_text(text, encoding="utf-8")
        machine.update(failing_gets_after=2**20)
        message = "cannot be seen. nuctl cannot list functions: Failed to create a Docker client"
        with pytest.raises(DeployError, match=rf"{message}(?s:.*)The previous image runs again: {before.image}"):
            machine.deploy(two)
        assert machine.answer() == "Земля"

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([{**GROUND[0], "label": "Дом"}], "has the label 'Дом', which is none of"),
            ({"error": "no"}, "answer is a JSON dict"),
        ],
    )
    def test_of_a_wrong_answer(self, machine: Machine, light: Callable[..., Path], answer: Any, message: str) -> None:
        machine.deploy(light("one"), port=free_port())
        with pytest.raises(DeployError, match=message):
            machine.deploy(light("two", answer=answer))
        assert machine.answer() == "Земля"

    def test_of_an_error_in_the_function(self, machine: Machine, light: Callable[..., Path]) -> None:
        with pytest.raises(DeployError, match=r"status 500: \{(?s:.*)No function sscloud-street ran before"):
            machine.deploy(light(answer={"error": "no"}, status=500), port=free_port())

    def test_of_going_back_too(self, machine: Machine, light: Callable[..., Path]) -> None:
        machine.deploy(light("one"), port=free_port())
        machine.update(fault="start", back="start")
        with pytest.raises(DeployError, match="could not be brought back either: The previous function could not be"):
            machine.deploy(light("two"))

    def test_of_patience(self, machine: Machine, light: Callable[..., Path]) -> None:
        """Ctrl-C, when the old container is gone and the new one not there yet."""
        before = machine.deploy(light("one"), port=free_port())
        machine.update(fault="hang")
        folder = light("two")
        with subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "deploy", str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        ) as process:
            while not (folder / "hanging").exists():
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            assert process.stderr is not None
            text = process.stderr.read()
        assert process.returncode == 130, text
        assert f"The previous image runs again: {before.image}." in text
        assert machine.answer() == "Земля"

    @pytest.mark.slow
    def test_one_that_never_ran_is_not_brought_back(self, machine: Machine, light: Callable[..., Path]) -> None:
        machine.update(fault="build")
        for name in ("one", "two"):
            with pytest.raises(DeployError, match="docker logs nuclio-nuclio-sscloud-street"):
                machine.deploy(light(name), port=free_port())
        assert len(machine.deployments()) == 2


class TestRefusals:
    """Nothing is deployed."""

    @pytest.mark.parametrize("port", ["x", [1]])
    def test_a_port_in_the_yaml_that_is_none(self, machine: Machine, light: Callable[..., Path], port: Any) -> None:
        with pytest.raises(ConfigError, match=r"is no function that CVAT can use: (Value|Type)Error"):
            machine.deploy(light(port=port))

    @pytest.fixture(autouse=True)
    def nothing_is_deployed(self, machine: Machine) -> Iterator[None]:
        yield
        assert machine.deployments() == []

    def test_no_nuctl(self, machine: Machine, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(machine.folder))
        with pytest.raises(ConfigError, match=r"nuctl, Nuclio's command, is not on the path. Download"):
            machine.deploy(packaged)

    def test_no_docker(self, machine: Machine, packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (machine.folder / "bin" / "docker").unlink()
        monkeypatch.setenv("PATH", str(machine.folder / "bin"))
        with pytest.raises(ConfigError, match="docker is not on the path"):
            machine.deploy(packaged)

    def test_docker_is_not_running(self, machine: Machine, packaged: Path) -> None:
        machine.update(docker="down")
        with pytest.raises(ConfigError, match=r"Docker is not running(?s:.*)systemctl start docker"):
            machine.deploy(packaged)

    def test_no_network(self, machine: Machine, packaged: Path) -> None:
        with pytest.raises(ConfigError, match=r"no network 'cvat_other'(?s:.*)--network"):
            machine.deploy(packaged, network="cvat_other")

    def test_no_gpu(self, machine: Machine, packaged: Path) -> None:
        with pytest.raises(ConfigError, match=r"could not select device driver(?s:.*)NVIDIA container toolkit"):
            machine.deploy(packaged, gpu=True)

    def test_port_of_a_container(self, machine: Machine, packaged: Path) -> None:
        machine.update(containers={"grafana": [32001, 2**22 + 1]})
        with pytest.raises(ConfigError, match=r"Port 32001 is taken by the container grafana.*--port 32002"):
            machine.deploy(packaged, port=32001)

    def test_port_of_a_program(self, machine: Machine, packaged: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            with pytest.raises(ConfigError, match="is taken by a program on this machine"):
                machine.deploy(packaged, port=taken.getsockname()[1])

    def test_nuctl_fails(self, machine: Machine, packaged: Path) -> None:
        machine.update(get="broken")
        with pytest.raises(DeployError, match="nuctl cannot list functions: Failed to create a Docker client"):
            machine.deploy(packaged)

    def test_no_function_folder(self, machine: Machine, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot be read.*sscloud package"):
            machine.deploy(tmp_path)

    def test_a_damaged_bundle(self, machine: Machine, light: Callable[..., Path]) -> None:
        folder = light()
        with (folder / "bundle" / WEIGHTS).open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(BundleError, match=r"sha256|damaged|changed"):
            machine.deploy(folder)

    def test_a_yaml_without_a_trigger(self, machine: Machine, light: Callable[..., Path]) -> None:
        folder = light()
        (folder / "function.yaml").write_text("metadata: {name: x, annotations: {version: '1', spec: '[]'}}\nspec: {}")
        with pytest.raises(ConfigError, match="KeyError: 'triggers'"):
            machine.deploy(folder)


class TestKubernetes:
    def test_node_port(self, machine: Machine, light: Callable[..., Path]) -> None:
        port = free_port()
        deployed = machine.deploy(
            light(), platform="kube", port=port, namespace="cvat", registry="registry.example.org/cvat"
        )
        assert (deployed.port, deployed.regions) == (port, 1)
        (arguments,) = machine.deployments()
        attributes = json.loads(value_of(arguments, "--triggers"))["myHttpTrigger"]["attributes"]
        assert (attributes["port"], attributes["serviceType"]) == (port, "NodePort")
        assert arguments[-6:] == [
            *("--registry", "registry.example.org/cvat"),
            *("--platform", "kube", "--namespace", "cvat"),
        ]
        assert "--platform-config" not in arguments
        assert [call for call in machine.calls if call[0] == "docker"] == []

    def test_inside_the_cluster(self, machine: Machine, light: Callable[..., Path]) -> None:
        machine.update(cluster="closed")
        command = [sys.executable, "-m", "tools.cli", "deploy", str(light()), "--platform", "kube"]
        done = subprocess.run(
            [*command, "--registry", "example.org"], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
        )
        assert (done.returncode, done.stdout[: len(NAME) + 5]) == (0, f"{NAME} runs")
        assert "note: no test panorama was sent, because the cluster gives it no address outside" in done.stderr
        assert "It answered" not in done.stdout
        assert "--triggers" not in machine.deployments()[0]

    def test_a_wrong_answer(self, machine: Machine, light: Callable[..., Path]) -> None:
        answer = [{**GROUND[0], "type": "tag"}]
        with pytest.raises(DeployError, match=r"is of type 'tag'(?s:.*)kubectl logs -n nuclio"):
            machine.deploy(light(answer=answer), platform="kube")

    def test_needs_a_registry(self, packaged: Path) -> None:
        command = [sys.executable, "-m", "tools.cli", "deploy", str(packaged), "--platform", "kube"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
        assert done.returncode == 2
        assert "Name one with --registry" in done.stderr


class TestReply:
    LABELS = ("Земля", "Здание")

    def check(self, items: Any) -> int:
        body = items if isinstance(items, bytes) else json.dumps(items).encode()
        return check_reply(body, labels=self.LABELS, size_hw=(10, 20))

    def test_right(self) -> None:
        item = {"label": "Земля", "type": "mask", "mask": [1, 0, 1, 1, 18, 8, 19, 9]}
        assert self.check([item, item]) == 2
        assert self.check([]) == 0
        assert self.check([{"label": "Земля", "type": "polygon", "points": [0, 0, 20, 0, 20.0, 10]}]) == 1

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            (None, "no points: an even number of numbers, at least 6"),
            ([0, 0, 5, 0], "no points"),
            ([0, 0, 5, 0, 5, 5, 1], "no points"),
            ([0, 0, 5, 0, 5, "5"], "no points"),
            ([0, 0, 5, 0, 5, 11], "points outside the picture"),
            ([0, 0, 5, 0, float("nan"), 5], "points outside the picture"),
        ],
    )
    def test_wrong_polygons(self, points: Any, message: str) -> None:
        with pytest.raises(DeployError, match=f"Item 0 of the function's answer has {message}"):
            self.check([{"label": "Земля", "type": "polygon", "points": points}])

    def test_another_type(self) -> None:
        with pytest.raises(DeployError, match="is of type 'tag', neither 'mask' nor 'polygon'"):
            self.check([{"label": "Земля", "type": "tag"}])

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (None, "no mask of whole numbers"),
            ([1, 0, 0, 0], "no mask of whole numbers"),
            ([True, 0, 0, 0, 0], "no mask of whole numbers"),
            ([1, 1, 19, 0, 20, 0], "a box outside the picture"),
            ([1, 0, -1, 0, 0], "a box outside the picture"),
            ([1, 1, 1, 0, 0, 1, 0], "a mask whose pixels do not fill its box"),
            ([2, 0, 0, 0, 0], "a mask whose pixels do not fill its box"),
        ],
    )
    def test_wrong_masks(self, mask: Any, message: str) -> None:
        right = {"label": "Земля", "type": "mask", "mask": [1, 0, 0, 0, 0]}
        with pytest.raises(DeployError, match=f"Item 1 of the function's answer has {message}"):
            self.check([right, {**right, "mask": mask}])

    @pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 100_000])
    def test_not_json(self, body: bytes) -> None:
        with pytest.raises(DeployError, match="not JSON"):
            self.check(body)

    def test_not_an_object(self) -> None:
        with pytest.raises(DeployError, match="Item 0 of the function's answer is a int"):
            self.check([1])


class TestModelVolume:
    """A function that takes its model from a volume, and what Nuclio shows of it."""

    @pytest.fixture
    def volume(self, tiny_bundle: ModelBundle, tmp_path: Path) -> Path:
        volume = tmp_path / "served"
        point(volume, publish(volume, tiny_bundle))
        return volume

    @pytest.fixture
    def versions(
        self, tiny_bundle: ModelBundle, tmp_path: Path, make_unet: Callable[..., UNet],
        make_manifest: Callable[..., Manifest],
    ) -> Versions:  # fmt: skip
        """Version 3 is the champion, 4 the next one, 5 has other labels."""
        model = make_unet(seed=4)
        fourth = save_bundle(tmp_path / "4", model, make_manifest(model.architecture, version=4))
        labels = [{"name": "Фон", "id": 0, "background": True}, {"name": "Дом", "id": 6}]
        schema = LabelSchema.from_dict({"labels": labels}, source="test")
        model = make_unet(Architecture(classes=2, base_width=4))
        manifest = make_manifest(model.architecture, version=5, labels=schema, label_ids=(0, 6))
        return Versions([tiny_bundle, fourth, save_bundle(tmp_path / "5", model, manifest)], champion=3)

    def test_the_folder_is_mounted(self, machine: Machine, light: Callable[..., Path], tmp_path: Path) -> None:
        folder, volume = light(), tmp_path / "моя served"
        before = (folder / "function.yaml").read_bytes()
        machine.deploy(folder, port=free_port(), models=volume)
        spec = machine.state["functions"][NAME]["spec"]
        assert spec["volumes"] == [
            {
                "volume": {"name": "models", "hostPath": {"path": str(volume)}},
                "volumeMount": {"name": "models", "mountPath": "/opt/sscloud/models", "readOnly": True},
            }
        ]
        assert spec["env"] == [{"name": "SSCLOUD_MODELS", "value": "/opt/sscloud/models"}]
        assert volume.is_dir(), "Docker would make it root's"
        assert (folder / "function.yaml").read_bytes() == before, "the folder stays as it was packaged"

    def test_a_folder_of_an_older_version(self, machine: Machine, light: Callable[..., Path], tmp_path: Path) -> None:
        folder = light()
        file = folder / "function.yaml"
        file.write_text(file.read_text(encoding="utf-8").replace("volumes: []", ""), encoding="utf-8")
        with pytest.raises(ConfigError, match="has no list 'volumes', so the model volume cannot be mounted"):
            machine.deploy(folder, port=free_port(), models=tmp_path / "served")

    def have(self, machine: Machine, folder: Path, models: Path | None) -> None:
        """Let Nuclio have a function without deploying it, which takes its time."""
        text = (folder / "function.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text if models is None else mount_models(text, models))
        config["spec"]["image"] = f"cvat.{NAME}:v3"
        machine.update(functions={NAME: {**config, "status": {"state": "ready"}}})

    def nuctl(self, machine: Machine) -> Nuctl:
        return find_nuctl(platform="local", namespace="nuclio", say=machine.lines.append)

    NEW = MappingProxyType({"name": "street v4", "version": "4"})

    def test_the_number_in_the_list_changes_without_a_restart(self, machine: Machine, packaged: Path) -> None:
        self.have(machine, packaged, None)
        before = machine.state["functions"][NAME]
        assert self.nuctl(machine).relabel(NAME, annotations=self.NEW, description="Street v4")
        assert machine.state["functions"][NAME] == {
            **before,
            "metadata": {**before["metadata"], "annotations": {**before["metadata"]["annotations"], **self.NEW}},
            "spec": {**before["spec"], "description": "Street v4"},
        }
        assert machine.deployments() == []

    @pytest.mark.parametrize("store", ["elsewhere", "changed", "lost"])
    def test_a_store_of_another_kind(self, machine: Machine, packaged: Path, store: str) -> None:
        """Nuclio keeps its files elsewhere or otherwise, or does not show the change: nothing breaks."""
        self.have(machine, packaged, None)
        machine.update(store=store)
        before = machine.state["functions"]
        assert not self.nuctl(machine).relabel(NAME, annotations=self.NEW, description="Street v4")
        assert machine.state["functions"] == before

    def test_promotion(self, machine: Machine, light: Callable[..., Path], volume: Path, versions: Versions) -> None:
        folder = light()
        machine.deploy(folder, port=free_port(), models=volume)
        function = FunctionUpdate(name=NAME)
        info = 'sscloud_model_info{worker="0",model="%s"} 1\n'
        (folder / "metrics.txt").write_text(info % "Улица v4", encoding="utf-8")
        done = promote(versions, 4, volume=volume, function=function, say=machine.lines.append)
        assert (done.champion.title, done.notes) == ("Улица v4", ())
        assert done.seconds is not None
        assert machine.state["functions"][NAME]["metadata"]["annotations"]["version"] == "4"
        now = pointed(volume)
        assert now is not None
        assert now.bundle == done.folder

        machine.update(store="elsewhere")
        (folder / "metrics.txt").write_text(info % "Улица v3", encoding="utf-8")
        back = roll_back(versions, volume=volume, function=function, say=machine.lines.append)
        assert back.champion.title == "Улица v3"
        assert (
            "still shows the function as Улица v4; the attribute 'model' of every shape names Улица v3" in back.notes[0]
        )
        assert machine.state["functions"][NAME]["metadata"]["annotations"]["version"] == "4"
        calls = len(machine.deployments())
        again = promote(versions, 3, volume=volume, function=replace(function, redeploy=True), say=machine.lines.append)
        assert again.notes == ()
        assert len(machine.deployments()) == calls + 1
        function_now = machine.state["functions"][NAME]
        assert function_now["metadata"]["annotations"]["version"] == "3"
        assert function_now["spec"]["image"] == f"cvat.{NAME}:v3-20261123102030", "started again, not built"
        assert machine.answer() == "Земля"

    def test_other_labels_need_a_new_image(
        self, machine: Machine, packaged: Path, volume: Path, versions: Versions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.have(machine, packaged, volume)
        functions = machine.state["functions"]
        functions[NAME]["spec"]["env"].append({"name": "SSCLOUD_MIN_AREA", "value": "400"})
        functions[NAME]["spec"]["triggers"]["myHttpTrigger"]["numWorkers"] = 3
        secret = {"name": "SSCLOUD_DEVICE", "valueFrom": {"secretKeyRef": {"name": "set", "key": "device"}}}
        claim = {"name": "models", "persistentVolumeClaim": {"claimName": "models"}}
        functions[NAME]["spec"]["env"].append(secret)
        functions[NAME]["spec"]["volumes"][0]["volume"] = claim
        functions[NAME]["spec"]["nodeSelector"] = {"disk": "fast"}
        functions[NAME]["spec"]["build"]["image"] = "old"
        functions[NAME]["metadata"]["labels"]["team"] = "streets"
        functions[NAME]["metadata"]["annotations"]["contact"] = "anna"
        machine.update(functions=functions)
        state, pointer = machine.state, pointed(volume)
        with pytest.raises(ConfigError, match=r"new: Дом; gone: Здание, .* --redeploy .* Nothing was changed"):
            promote(versions, 5, volume=volume, function=FunctionUpdate(name=NAME), say=machine.lines.append)
        assert (machine.state, pointed(volume), versions.number) == (state, pointer, 3)

        built: list[DeployConfig] = []

        def build(config: DeployConfig, **_: Any) -> None:
            made = yaml.safe_load((config.folder / "function.yaml").read_text(encoding="utf-8"))
            machine.update(functions={NAME: {**made, "status": {"state": "ready"}}})
            built.append(config)

        monkeypatch.setattr("tools.promotion.deploy", build)
        redeploy = FunctionUpdate(name=NAME, redeploy=True)
        done = promote(versions, 5, volume=volume, function=redeploy, say=machine.lines.append)
        assert (len(built), versions.number, done.champion.version) == (1, 5, 5)
        spec = machine.state["functions"][NAME]["spec"]
        assert spec["env"] == [
            {"name": "SSCLOUD_MODELS", "value": "/opt/sscloud/models"},
            {"name": "SSCLOUD_MIN_AREA", "value": "400"},
            secret,
        ], "what people set stays"
        assert spec["nodeSelector"] == {"disk": "fast"}
        (volume_now,) = spec["volumes"]
        assert volume_now["volume"] == claim
        assert volume_now["volumeMount"]["mountPath"] == "/opt/sscloud/models"
        assert (spec["build"]["image"], "image" in spec) == (f"cvat.{NAME}", False)
        assert "v5" in spec["description"]
        metadata = machine.state["functions"][NAME]["metadata"]
        assert (metadata["labels"]["team"], metadata["annotations"]["contact"]) == ("streets", "anna")
        assert (metadata["annotations"]["version"], "Дом" in metadata["annotations"]["spec"]) == ("5", True)
        assert spec["triggers"]["myHttpTrigger"]["numWorkers"] == 3
        promote(versions, 5, volume=volume, function=redeploy, say=machine.lines.append)
        assert len(built) == 1, "the labels are the function's now"

    @pytest.mark.parametrize("back", [True, False, None])
    def test_a_new_image_that_is_not_taken(
        self, machine: Machine, packaged: Path, volume: Path, versions: Versions, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path, back: bool | None,
    ) -> None:  # fmt: skip
        """The function before it comes back with its version, or both stay and the message says so.

        Args:
            back: whether it comes back; None: it was built by a command that was killed, so nobody knows it any more.
        """
        self.have(machine, packaged, volume)
        before = machine.state["functions"][NAME]

        def build(config: DeployConfig, **_: Any) -> None:
            made = yaml.safe_load((config.folder / "function.yaml").read_text(encoding="utf-8"))
            machine.update(functions={NAME: {**made, "status": {"state": "ready"}}})

        def wait(*_: Any, **__: Any) -> None:
            raise DeployError("It names another.")

        def deploy_again(_: Nuctl, name: str, config: Any, failed: str, *, within: float) -> None:
            if not back:
                raise DeployError(failed)
            machine.update(functions={name: {**config, "status": {"state": "ready"}}})

        monkeypatch.setattr(Nuctl, "deploy_again", deploy_again)
        monkeypatch.setattr("tools.promotion.deploy", build)
        monkeypatch.setattr("tools.promotion.wait_until_served", wait)
        function = FunctionUpdate(name=NAME, redeploy=True)
        said = {
            True: "Улица v3 is the champion again",
            False: "The previous function .* So Улица v5 stays the champion",
            None: "was built for Улица v5 and does not take Улица v3, so Улица v5 stays the champion",
        }[back]
        if back is None:
            package(versions.bundle(5).path, tmp_path / "built", name=NAME)
            self.have(machine, tmp_path / "built", volume)
        with pytest.raises(DeployError, match=f"It names another.*{said}"):
            promote(versions, 5, volume=volume, function=function, say=machine.lines.append, url="127.0.0.1:9")
        now = pointed(volume)
        assert now is not None
        assert (versions.number, now.bundle.rpartition("-")[0][-2:]) == ((3, "v3") if back else (5, "v5"))
        if back:
            assert machine.state["functions"][NAME]["spec"]["image"] == before["spec"]["image"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("absent", f"Nuclio has no function {NAME} in the namespace nuclio"),
            ("follows none", f"The function {NAME} follows no model volume"),
            ("follows another", r"follows the model volume .*other, not"),
        ],
    )
    def test_a_function_that_does_not_follow_it(
        self, machine: Machine, packaged: Path, volume: Path, versions: Versions, change: str, message: str
    ) -> None:
        if change != "absent":
            self.have(machine, packaged, volume.with_name("other") if change == "follows another" else None)
        before = read_pointer(volume)
        with pytest.raises(ConfigError, match=message):
            promote(versions, 4, volume=volume, function=FunctionUpdate(name=NAME), say=machine.lines.append)
        assert (read_pointer(volume), versions.number) == (before, 3)


def test_the_test_panorama_is_one(tiny_bundle: ModelBundle) -> None:
    """The model takes it for a full turn, and its normals are unit vectors towards the scanner."""
    import base64

    body, size_hw = smoke_request(tiny_bundle.manifest)
    image = base64.b64decode(json.loads(body)["image"])
    pixels = decode_image(image)
    assert pixels.shape == (*size_hw, 3)
    assert Predictor(tiny_bundle, device="cpu").predict(image).wrapped
    normals = pixels / 255 * 2 - 1
    np.testing.assert_allclose(np.median(np.linalg.norm(normals, axis=-1)), 1, atol=0.05)
    np.testing.assert_allclose(normals[0, :, 2], -1, atol=0.05)  # the ceiling faces down
    np.testing.assert_allclose(normals[size_hw[0] // 2, 0], [-1, 0, 0], atol=0.05)  # azimuth 0 sees the wall at +x


def test_reading_a_folder(packaged: Path, tiny_bundle: ModelBundle) -> None:
    function = read_folder(packaged, gpu=False)
    names = tuple(label["name"] for label in tiny_bundle.manifest.labels.cvat_spec(()))
    assert (function.name, function.version, function.labels) == (NAME, "3", names)
    assert (function.image, function.base_image) == (f"cvat.{NAME}", "python:3.11-slim-bookworm")
    assert (function.trigger, function.port, function.readiness) == ("myHttpTrigger", None, 180)


@pytest.mark.parametrize("port", ["0", "80", "65536", "x"])
def test_ports_on_the_command_line(port: str) -> None:
    command = [sys.executable, "-m", "tools.cli", "deploy", "f", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 2
    assert "give a number from 1024 to 65535" in done.stderr


def test_a_folder_keeps_its_name(packaged: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "deploy", str(packaged), "--name", "other"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert (done.returncode, "--name goes with a bundle" in done.stderr) == (2, True)
