"""The function's yaml files against Nuclio's documented fields and what CVAT reads of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import serverless
from sscloud.bundle import ModelBundle
from tools.function_folder import TEMPLATES
from tools.nuclio import parse_duration

STRING, INTEGER, BOOLEAN, STRINGS = "a string", "an integer", "a boolean", "a map of strings"
DIRECTIVES = [{"kind": STRING, "value": STRING}]

# Nuclio's documentation, reference/function-configuration/function-configuration-reference.md and
# reference/triggers/http.md, of version 1.15; restricted to what our files use.
DOCUMENTED = {
    "metadata": {"name": STRING, "namespace": STRING, "labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "description": STRING,
        "handler": STRING,
        "runtime": STRING,
        "env": [{"name": STRING, "value": STRING}],
        "volumes": [
            {
                "volume": {"name": STRING, "hostPath": {"path": STRING}},
                "volumeMount": {"name": STRING, "mountPath": STRING, "readOnly": BOOLEAN},
            }
        ],
        "eventTimeout": STRING,
        "readinessTimeoutSeconds": INTEGER,
        "build": {
            "image": STRING,
            "baseImage": STRING,
            "directives": {"preCopy": DIRECTIVES, "postCopy": DIRECTIVES},
        },
        "triggers": {
            "myHttpTrigger": {
                "kind": STRING,
                "numWorkers": INTEGER,
                "workerAvailabilityTimeoutMilliseconds": INTEGER,
                "workerTerminationTimeout": STRING,
                "attributes": {"port": INTEGER, "maxRequestBodySize": INTEGER},
            }
        },
        "resources": {"limits": {"nvidia.com/gpu": INTEGER}},
        "platform": {
            "attributes": {"restartPolicy": {"name": STRING, "maximumRetryCount": INTEGER}, "mountMode": STRING}
        },
    },
}
DOCKERFILE_INSTRUCTIONS = {"ENV", "RUN", "WORKDIR", "USER", "COPY"}


def undocumented(value: Any, schema: Any, path: str = "") -> list[str]:
    """Fields of `value` that `schema` does not have, or has with another type."""
    if schema == STRINGS:
        fine = isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
        return [] if fine else [f"{path} is not {schema}"]
    if isinstance(schema, str):
        kind = {STRING: str, INTEGER: int, BOOLEAN: bool}[schema]
        return [] if type(value) is kind else [f"{path} is not {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is not a list"]
        return [problem for i, item in enumerate(value) for problem in undocumented(item, schema[0], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path} is not a map"]
    unknown = [f"{path}.{key} is not documented" for key in value if key not in schema]
    known = [key for key in value if key in schema]
    return unknown + [p for key in known for p in undocumented(value[key], schema[key], f"{path}.{key}")]


@pytest.fixture(params=[(kind, name) for kind in ("template", "packaged") for name in TEMPLATES], ids="-".join)
def path(request: pytest.FixtureRequest, function_folder: Path) -> Path:
    kind, name = request.param
    folder = Path(serverless.__file__).parent if kind == "template" else function_folder
    return Path(folder) / name


@pytest.fixture
def config(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data


def test_the_lint_finds_what_is_wrong() -> None:
    wrong = {"metadata": {"name": 5, "annotations": {"version": 1}}, "spec": {"env": {}, "evenTimeout": "3s"}}
    assert undocumented(wrong, DOCUMENTED) == [
        ".metadata.name is not a string",
        ".metadata.annotations is not a map of strings",
        ".spec.evenTimeout is not documented",
        ".spec.env is not a list",
    ]


def test_fields_are_documented(config: dict[str, Any]) -> None:
    assert undocumented(config, DOCUMENTED) == []
    assert {d["kind"] for d in config["spec"]["build"]["directives"]["preCopy"]} <= DOCKERFILE_INSTRUCTIONS


def test_metadata_is_what_cvat_takes(config: dict[str, Any]) -> None:
    annotations = config["metadata"]["annotations"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", config["metadata"]["name"])
    assert config["metadata"]["namespace"] == "cvat"
    assert config["metadata"]["labels"] == {"nuclio.io/project-name": "cvat"}
    assert annotations["type"] == "detector"
    assert annotations["framework"] == "pytorch"
    assert str(int(annotations["version"])) == annotations["version"]
    assert config["spec"]["description"].strip()
    spec = json.loads(annotations["spec"])
    names = [label["name"] for label in spec]
    assert len(names) == len(set(names))
    assert {label["type"] for label in spec} <= {"mask"}
    for label in spec:
        assert [(a["name"], a["input_type"]) for a in label["attributes"]] == [
            ("model", "text"),
            ("confidence", "text"),
        ]
        assert all(isinstance(value, str) for a in label["attributes"] for value in a["values"])


def test_limits(config: dict[str, Any]) -> None:
    spec = config["spec"]
    http = spec["triggers"]["myHttpTrigger"]
    assert spec["handler"] == "main:handler"
    assert spec["runtime"] == "python:3.11"
    assert parse_duration(spec["eventTimeout"]) >= 120, "CVAT waits for 120 s"
    assert http["kind"] == "http"
    assert http["numWorkers"] == 1
    assert http["workerTerminationTimeout"] == spec["eventTimeout"], "a running request is finished"
    assert http["attributes"]["maxRequestBodySize"] >= 4 / 3 * 8192 * 4096 * 2, "a PNG of 2 bytes a pixel, in base64"
    assert spec["platform"]["attributes"] == {
        "restartPolicy": {"name": "always", "maximumRetryCount": 3},
        "mountMode": "volume",
    }


def test_dependencies_are_pinned(config: dict[str, Any]) -> None:
    commands = [d["value"] for d in config["spec"]["build"]["directives"]["preCopy"] if "pip install" in d["value"]]
    requirements = [
        word
        for command in commands
        for word in command.split("pip install", 1)[1].split()
        if not word.startswith(("-", "http"))
    ]
    assert all(re.fullmatch(r"[\w-]+==[\w.+]+", word) for word in requirements)
    assert {word.split("==")[0].lower() for word in requirements} == {
        "torch",
        "numpy",
        "pillow",
        "opencv-python-headless",
        "safetensors",
        "pyyaml",
        "simplejpeg",
    }


def test_only_the_gpu_file_asks_for_one(path: Path, config: dict[str, Any]) -> None:
    if path.name == "function-gpu.yaml":
        assert config["spec"]["resources"]["limits"] == {"nvidia.com/gpu": 1}
        assert config["spec"]["build"]["baseImage"].startswith("nvidia/cuda:")
    else:
        assert "resources" not in config["spec"]
        assert config["spec"]["build"]["baseImage"].startswith("python:3.11")


def test_the_two_files_differ_in_the_build_only(function_folder: Path) -> None:
    cpu, gpu = (yaml.safe_load((function_folder / name).read_text(encoding="utf-8")) for name in TEMPLATES)
    del gpu["spec"]["resources"], gpu["spec"]["build"], cpu["spec"]["build"]
    assert cpu == gpu


def test_packaged_metadata_is_the_bundles(function_folder: Path, varied_bundle: Path) -> None:
    manifest = ModelBundle.load(varied_bundle).manifest
    for name in TEMPLATES:
        text = (function_folder / name).read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        spec = json.loads(config["metadata"]["annotations"]["spec"])
        assert [label["name"] for label in spec] == ["Земля", "Растительность", "Здание", "Конструкции", "Обстановка"]
        assert config["metadata"]["annotations"]["version"] == str(manifest.version)
        assert config["metadata"]["annotations"]["name"] == "varied v3"
        assert "varied v3" in config["spec"]["description"]
        assert '"name": "Земля"' in text, "people read the spec"
        assert "# an integer: CVAT's model list" in text, "comments of the template stay"
