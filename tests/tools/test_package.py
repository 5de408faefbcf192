"""`sscloud package`: a bundle → a function folder."""

import argparse
import dataclasses
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import segmentation_standin
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import WEIGHTS, Manifest, ModelBundle
from sscloud.checkpoint import load_model, save_bundle
from sscloud.errors import BundleError, ConfigError, ImageError
from sscloud.labels import LabelSchema
from sscloud.networks import build_network
from sscloud.openvino_forward import RANGES, OpenVinoForward
from sscloud.unet import UNet
from tools.commands import package as verb
from tools.function_folder import (
    OPENVINO_TEMPLATE,
    TEMPLATES,
    add_build_steps,
    check_name,
    describe,
    fill_template,
    find_name,
    mount_models,
    package,
    replace_scalars,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    torch.manual_seed(0)
    architecture = Architecture(classes=6, base_width=2)
    schema = LabelSchema.default()
    manifest = Manifest(
        name="Street 2026",
        version=12,
        architecture=architecture,
        labels=schema,
        label_ids=schema.class_ids,
        scale=0.25,
        resample="valid-area",
        encoding="normals",
        aspect=2.0,
        elevation=(90, -90),
    )
    return save_bundle(tmp_path_factory.mktemp("bundles") / "street", UNet(architecture), manifest)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def template(name: str) -> str:
    return (Path(verb.__file__).parents[2] / "serverless" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def noisy_bundle(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """One whose classes are close to each other everywhere, so that int8 changes some pixels in a hundred."""
    torch.manual_seed(0)
    architecture = Architecture(classes=6, base_width=8)
    model = UNet(architecture).eval()
    with torch.inference_mode():
        model.outc.conv.weight.normal_()
        model.outc.conv.bias -= model(torch.rand(1, 3, 32, 64)).mean((0, 2, 3))
    manifest = dataclasses.replace(bundle.manifest, architecture=architecture)
    return save_bundle(tmp_path_factory.mktemp("bundles") / "noisy", model, manifest)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    """A folder with two panoramas and a crop."""
    folder = tmp_path_factory.mktemp("images")
    for number, size_hw in enumerate([(128, 256), (128, 256), (100, 120)]):
        Image.fromarray(make_panorama(size_hw, seed=number)).save(folder / f"{number}.png")
    return folder


class TestPackage:
    def test_the_folder_is_self_contained(self, bundle: ModelBundle, tmp_path: Path) -> None:
        assert package(bundle.path, tmp_path / "function") == "sscloud-street-2026"
        found = files(tmp_path / "function")
        core = {name for name in found if name.startswith("sscloud/")}
        assert found - core == {
            "function.yaml",
            "function-gpu.yaml",
            "champion.py",
            "main.py",
            "metrics.py",
            "model_handler.py",
            "settings.py",
            "bundle/manifest.json",
            "bundle/weights.safetensors",
        }
        assert {"sscloud/__init__.py", "sscloud/inference.py", "sscloud/labels.yaml"} <= core
        assert ModelBundle.load(tmp_path / "function" / "bundle").manifest == bundle.manifest

    def test_it_imports_nothing_from_outside_the_folder(self, bundle: ModelBundle, tmp_path: Path) -> None:
        package(bundle.path, tmp_path / "function")
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import main, model_handler, sscloud;"
            "ours = [m for m in sys.modules.values() if (m.__name__ or '').split('.')[0] in "
            "('champion', 'main', 'metrics', 'model_handler', 'settings', 'sscloud', 'serverless', 'tools', "
            "'training')];"
            "print(len(ours), all(m.__file__.startswith(sys.argv[1]) for m in ours),"
            "[m for m in ('lightning', 'fastapi', 'torchmetrics', 'cvat_sdk', 'pycocotools') if m in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-P", "-B", "-c", code, str(tmp_path / "function")],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        count, inside, heavy = result.stdout.split(maxsplit=2)
        assert int(count) > 8
        assert (inside, heavy.strip()) == ("True", "[]")

    def test_an_existing_folder_is_kept(self, bundle: ModelBundle, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"exists already.*--overwrite"):
            package(bundle.path, tmp_path)
        assert files(tmp_path) == {"precious"}

    def test_overwrite_replaces_it_whole(self, bundle: ModelBundle, tmp_path: Path) -> None:
        package(bundle.path, tmp_path / "function")
        (tmp_path / "function" / "old").write_text("", encoding="utf-8")
        package(bundle.path, tmp_path / "function", overwrite=True)
        assert "old" not in files(tmp_path / "function")
        assert [entry.name for entry in tmp_path.iterdir()] == ["function"]

    def test_another_folder_is_never_replaced(self, bundle: ModelBundle, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "precious").write_text("", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"data is not replaced: it has no function\.yaml"):
            package(bundle.path, tmp_path / "data", overwrite=True)
        assert files(tmp_path / "data") == {"precious"}

    def test_a_damaged_bundle_leaves_nothing(self, bundle: ModelBundle, tmp_path: Path) -> None:
        broken = tmp_path / "bundle"
        save_bundle(broken, load_model(bundle), bundle.manifest)
        (broken / WEIGHTS).write_bytes(b"?")
        with pytest.raises(BundleError, match="is damaged"):
            package(broken, tmp_path / "function")
        assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]

    def test_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="is no bundle"):
            package(tmp_path / "nowhere", tmp_path / "function")

    def test_the_verb(self, bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        folder = tmp_path / "function"
        assert verb.run(parser.parse_args([str(bundle.path), "-o", str(folder), "--name", "my-function"])) == 0
        assert (
            yaml.safe_load((folder / "function.yaml").read_text(encoding="utf-8"))["metadata"]["name"] == "my-function"
        )
        printed = capsys.readouterr().out
        assert f"nuctl deploy --project-name cvat --path {folder} --file {folder / 'function-gpu.yaml'}" in printed
        assert f"sscloud serve {folder}" in printed
        assert "self-contained" in printed
        models = ["--models", str(tmp_path / "served"), "--overwrite"]
        assert verb.run(parser.parse_args([str(bundle.path), "-o", str(folder), *models])) == 0
        printed = capsys.readouterr().out
        assert f"takes its models from {tmp_path / 'served'}: that folder must exist" in printed
        assert "self-contained" not in printed


class TestOpenVino:
    def test_function_yaml_differs_in_what_computes_only(self) -> None:
        cpu, openvino = (yaml.safe_load(template(name)) for name in ("function.yaml", OPENVINO_TEMPLATE))
        assert openvino["metadata"]["annotations"].pop("framework") == "openvino"
        assert openvino["spec"].pop("env") == [{"name": "SSCLOUD_BACKEND", "value": "openvino"}]
        del cpu["metadata"]["annotations"]["framework"], cpu["spec"]["env"]
        steps, others = (config["spec"]["build"]["directives"].pop("preCopy") for config in (openvino, cpu))
        assert openvino == cpu
        torch_steps = [step for step in others if "torch==" in step["value"]]
        assert [step for step in others if step not in steps] == torch_steps
        (step,) = (step for step in steps if step not in others)
        assert re.match(r"pip install openvino==\d+\.\d+\.\d+ && cd .* && rm ", step["value"])

    def test_comments_stay_the_same(self) -> None:
        cpu, openvino = (template(name).splitlines() for name in ("function.yaml", OPENVINO_TEMPLATE))
        changed = [line for line in difflib.ndiff(cpu, openvino) if line.startswith(("- ", "+ "))]
        assert len(changed) < 20, changed

    def test_the_folder_says_so(self, bundle: ModelBundle, tmp_path: Path) -> None:
        told: list[str] = []
        package(bundle.path, tmp_path / "function", backend="openvino", tell=told.append)
        package(bundle.path, tmp_path / "torch")
        assert files(tmp_path / "function") == files(tmp_path / "torch")
        config = yaml.safe_load((tmp_path / "function/function.yaml").read_text(encoding="utf-8"))
        assert config["spec"]["env"] == [{"name": "SSCLOUD_BACKEND", "value": "openvino"}]
        assert config["metadata"]["annotations"]["name"] == "Street 2026 v12"
        gpu = "function-gpu.yaml"
        assert (tmp_path / "function" / gpu).read_bytes() == (tmp_path / "torch" / gpu).read_bytes()
        assert len(told) == 1
        assert re.fullmatch(r"OpenVINO's logits differ from PyTorch's by \de-0[5-8] of the largest one, .*", told[0])

    def test_a_network_that_computes_something_else_is_not_packaged(
        self, bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sscloud.openvino_forward._EPSILON", 0.5)
        with pytest.raises(BundleError, match=r"Street 2026 v12: OpenVINO's logits differ from PyTorch's by \d"):
            package(bundle.path, tmp_path / "function", backend="openvino")
        assert not list(tmp_path.iterdir())

    def test_int8_takes_images(
        self, noisy_bundle: ModelBundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tools.openvino_check.LEAST_EQUAL", 0.85)
        told: list[str] = []
        package(
            noisy_bundle.path,
            tmp_path / "function",
            backend="openvino",
            calibrate=sorted(images.iterdir()),
            tell=told.append,
        )
        assert re.match(r"In int8, [89]\d\.\d+% of these images' pixels keep their label", told[1])
        packaged = ModelBundle.load(tmp_path / "function" / "bundle")
        assert OpenVinoForward(packaged).describe() == "openvino cpu int8"
        assert not (noisy_bundle.path / RANGES).exists()

    def test_int8_that_changes_labels_is_refused(self, noisy_bundle: ModelBundle, images: Path, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"in int8 only \d+\.\d+% of the pixels keep their label"):
            package(noisy_bundle.path, tmp_path / "function", backend="openvino", calibrate=sorted(images.iterdir()))
        assert not (tmp_path / "function").exists()

    def test_images_without_openvino(self, bundle: ModelBundle, images: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Add --backend openvino"):
            package(bundle.path, tmp_path / "function", calibrate=sorted(images.iterdir()))

    def test_an_image_that_is_too_small(self, noisy_bundle: ModelBundle, tmp_path: Path) -> None:
        Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
        with pytest.raises(ImageError, match=r"small\.png: The image is 40x40 pixels, too small .*Leave it out"):
            package(noisy_bundle.path, tmp_path / "function", backend="openvino", calibrate=[tmp_path / "small.png"])

    def test_the_verb(
        self,
        noisy_bundle: ModelBundle,
        images: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("tools.openvino_check.LEAST_EQUAL", 0.85)
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        arguments = [str(noisy_bundle.path), "-o", str(tmp_path / "function"), "--backend", "openvino"]
        assert verb.run(parser.parse_args([*arguments, "--calibrate", str(images)])) == 0
        printed = capsys.readouterr().out
        assert "OpenVINO's logits differ" in printed
        assert "In int8" in printed


class TestOtherFamilies:
    @pytest.fixture
    def other_bundle(self, bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelBundle:
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", segmentation_standin)
        architecture = Architecture(classes=6, family="segformer", encoder="mit_b0")
        manifest = dataclasses.replace(bundle.manifest, architecture=architecture)
        return save_bundle(tmp_path / "other", build_network(architecture), manifest)

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_the_library_is_installed_last(
        self, other_bundle: ModelBundle, bundle: ModelBundle, tmp_path: Path, name: str
    ) -> None:
        package(other_bundle.path, tmp_path / "function")
        package(bundle.path, tmp_path / "unet")
        found, unet = ((tmp_path / folder / name).read_text(encoding="utf-8") for folder in ("function", "unet"))
        added = [line[2:] for line in difflib.ndiff(unet.splitlines(), found.splitlines()) if line[0] in "+-?"]
        assert len(added) == 4, "nothing else changes"
        steps, others = (yaml.safe_load(text)["spec"]["build"]["directives"]["preCopy"] for text in (found, unet))
        assert steps[: len(others)] == others
        assert [step["kind"] for step in steps[len(others) :]] == ["RUN", "RUN"]
        torchvision, library = (step["value"] for step in steps[len(others) :])
        assert re.fullmatch(r"pip install segmentation-models-pytorch==\d+\.\d+\.\d+ timm==\d+\.\d+\.\d+", library)
        (torch_step,) = (step["value"] for step in others if "torch==" in step["value"])
        # torch 2.N and torchvision 0.(N + 15) are made for each other, and come from one index.
        minor, patch, rest = re.fullmatch(r"pip install torch==2\.(\d+)\.(\d+)(.*)", torch_step).groups()  # type: ignore[union-attr]
        assert torchvision == f"pip install torchvision==0.{int(minor) + 15}.{patch}{rest}"

    def test_openvino_is_for_unets(self, other_bundle: ModelBundle, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"other holds a network 'segformer'; OpenVINO computes unets only here"):
            package(other_bundle.path, tmp_path / "function", backend="openvino")
        assert not (tmp_path / "function").exists()

    @pytest.mark.parametrize(
        "text", ["a: 1", "spec: {build: {directives: 3}}", "spec: {build: {directives: {preCopy: x}}}"]
    )
    def test_a_yaml_without_steps(self, text: str) -> None:
        with pytest.raises(KeyError, match=r"spec\.build\.directives\.preCopy"):
            add_build_steps(text, ["true"])


class TestNames:
    @pytest.mark.parametrize(
        ("bundle_name", "name"),
        [("street", "sscloud-street"), ("Street_2026.v1", "sscloud-street-2026-v1"), ("sscloud-x", "sscloud-x")],
    )
    def test_of_a_bundle(self, bundle_name: str, name: str) -> None:
        assert find_name(bundle_name) == name

    def test_a_bundle_with_a_russian_name_needs_one(self) -> None:
        with pytest.raises(ConfigError, match=r"'Улица' has no Latin letters or digits.*--name"):
            find_name("Улица")

    @pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a b", "улица", "a" * 57, "a\n"])
    def test_names_that_nuclio_refuses(self, name: str) -> None:
        with pytest.raises(ConfigError, match="is no name for a Nuclio function"):
            check_name(name)


class TestDescription:
    def test_without_metrics(self, bundle: ModelBundle) -> None:
        expected = "Semantic segmentation of laser-scan panoramas: Street 2026 v12, scale 0.25"
        assert describe(bundle.manifest) == expected

    def test_with_metrics(self, bundle: ModelBundle) -> None:
        manifest = dataclasses.replace(bundle.manifest, metrics={"validation_miou": 0.7349})
        assert describe(manifest).endswith("scale 0.25, mIoU 0.73 on its validation panoramas")


class TestTemplates:
    TEXT = "# head\na: 1  # one\nb:\n  c: |\n    old\n    text\n\n  # tail\n  d: x\n"

    def test_scalars_are_replaced_where_they_stand(self) -> None:
        filled = replace_scalars(self.TEXT, {("a",): "2", ("b", "c"): "|\n    new\n\n"})
        assert filled == "# head\na: 2  # one\nb:\n  c: |\n    new\n\n  # tail\n  d: x\n"

    @pytest.mark.parametrize("path", [("z",), ("b",), ("a", "b")])
    def test_a_scalar_that_is_not_there(self, path: tuple[str, ...]) -> None:
        with pytest.raises(KeyError, match=r"\.".join(path)):
            replace_scalars(self.TEXT, {path: "2"})

    @pytest.mark.parametrize("name", ["function.yaml", "function-gpu.yaml", "function-openvino.yaml"])
    def test_a_model_volume(self, name: str, tmp_path: Path) -> None:
        """Settings that are there stay, comments too, and once more changes nothing."""
        text = (Path(verb.__file__).parents[2] / "serverless" / name).read_text(encoding="utf-8")
        before = yaml.safe_load(text)["spec"]
        mounted = mount_models(text, tmp_path / "served: №1")
        after = yaml.safe_load(mounted)["spec"]
        assert after.pop("env") == [*before.pop("env"), {"name": "SSCLOUD_MODELS", "value": "/opt/sscloud/models"}]
        ((volume),) = after.pop("volumes")
        assert volume["volume"]["hostPath"]["path"] == str(tmp_path / "served: №1")
        assert volume["volumeMount"] == {"name": "models", "mountPath": "/opt/sscloud/models", "readOnly": True}
        assert before.pop("volumes") == []
        assert after == before
        assert mounted.count("#") == text.count("#")
        assert mount_models(mounted, tmp_path / "served: №1") == mounted

    def test_a_model_volume_among_others(self) -> None:
        other = {"volume": {"name": "a", "hostPath": {"path": "/a"}}, "volumeMount": {"name": "a", "mountPath": "/a"}}
        text = yaml.safe_dump({"spec": {"env": [{"name": "A", "value": "1"}], "volumes": [other]}})
        spec = yaml.safe_load(mount_models(text, Path("/srv/served")))["spec"]
        assert [entry["name"] for entry in spec["env"]] == ["A", "SSCLOUD_MODELS"]
        assert spec["volumes"][0] == other
        assert len(spec["volumes"]) == 2

    @pytest.mark.parametrize(
        "text", ["spec:\n  env: []\n  volumes:\n", "spec: {env: []}", "spec: {env: [], volumes: []}"]
    )
    def test_a_yaml_without_volumes(self, text: str) -> None:
        with pytest.raises(KeyError, match=r"volumes|spec\.env"):
            mount_models(text, Path("served"))

    def test_hostile_names_stay_text(self, bundle: ModelBundle) -> None:
        name = 'a": b # c\n\u0085\u2028\x7f{{ .Name }}'
        manifest = dataclasses.replace(bundle.manifest, name=name)
        text = (Path(verb.__file__).parents[2] / "serverless" / "function.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(fill_template(text, manifest, name="sscloud-x"))
        assert config["metadata"]["annotations"]["name"] == f"{name} v12"
        assert len(json.loads(config["metadata"]["annotations"]["spec"])) == 5
