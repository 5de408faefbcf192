"""The files of `deploy/`, the Dockerfile and the guide: what they say of each other and of the function must agree."""

import argparse
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.cli import load
from tools.deploy import NETWORK
from tools.nuclio import parse_duration

ROOT = Path(__file__).resolve().parents[1]


def read_yaml(path: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return data


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


class TestCompose:
    def test_cvat_waits_as_long_as_the_function_may_take(self) -> None:
        services = read_yaml("deploy/docker-compose.sscloud.yml")["services"]
        waits = {services[name]["environment"]["CVAT_NUCLIO_DEFAULT_TIMEOUT"] for name in CALLERS}
        spec = read_yaml("serverless/function.yaml")["spec"]
        queue = spec["triggers"]["myHttpTrigger"]["workerAvailabilityTimeoutMilliseconds"] / 1000
        assert waits == {queue + parse_duration(spec["eventTimeout"])}

    def test_the_network_is_the_one_that_deploy_joins(self) -> None:
        assert read_yaml("deploy/docker-compose.sscloud.yml")["networks"] == {"cvat": {"name": NETWORK}}


CALLERS = ("cvat_server", "cvat_worker_annotation")
"""The services of CVAT that call functions: one frame, and whole jobs."""


def test_kubernetes_scales_between_two_numbers() -> None:
    platform = read_yaml("deploy/nuclio-values.yaml")["platform"]
    (augmented,) = platform["functionAugmentedConfigs"]
    spec = augmented["functionConfig"]["spec"]
    assert 1 <= spec["minReplicas"] < spec["maxReplicas"]
    assert spec["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert "cpu" in spec["resources"]["requests"], "without a request there is nothing to measure targetCPU against"
    readiness = read_yaml("serverless/function-gpu.yaml")["spec"]["readinessTimeoutSeconds"]
    assert parse_duration(platform["functionReadinessTimeout"]) >= readiness


class TestImage:
    def test_a_mount_of_app_hides_nothing(self) -> None:
        dockerfile = text_of("Dockerfile")
        assert re.findall(r"^COPY .*", dockerfile, re.MULTILINE) == ["COPY . /opt/sscloud"]
        assert re.findall(r"^WORKDIR (.*)", dockerfile, re.MULTILINE)[-1] == "/app"
        assert "EXPOSE 8888" in dockerfile

    def test_python_and_torch_are_the_functions(self) -> None:
        dockerfile, function = text_of("Dockerfile"), text_of("serverless/function-gpu.yaml")
        torch = re.search(r"torch==[\d.]+", function)
        assert torch is not None
        assert torch.group() in dockerfile
        assert re.search(r"^FROM python:3\.11-", dockerfile, re.MULTILINE)
        assert 'runtime: "python:3.11"' in function

    def test_the_image_gets_what_the_installation_needs(self) -> None:
        project = tomllib.loads(text_of("pyproject.toml"))
        packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
        lines = text_of(".dockerignore").splitlines()
        assert "*" in lines, "everything else stays out"
        let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
        assert let_in == packages | {"pyproject.toml", project["project"]["readme"], "LICENSE"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise AssertionError(message)


def commands() -> list[str]:
    """The lines of the guide that call `sscloud`."""
    blocks = re.findall(r"^```\n(.*?)^```", text_of("docs/first-cvat.md"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("sscloud ")]


@pytest.mark.parametrize("line", commands())
def test_the_guides_commands_are_understood(line: str) -> None:
    _, verb, *arguments = shlex.split(line, comments=True)
    parser = _Parser()
    load(verb).add_arguments(parser)
    parser.parse_args(arguments)


def test_the_guide_calls_sscloud() -> None:
    assert len(commands()) >= 3


def test_the_guide_names_files_that_exist() -> None:
    named = re.findall(r"SSCLOUD/([\w./-]+)|`(deploy/[\w.-]+)`", text_of("docs/first-cvat.md"))
    files = {first or second for first, second in named}
    assert "deploy/docker-compose.sscloud.yml" in files
    assert [file for file in files if not (ROOT / file).is_file()] == []
