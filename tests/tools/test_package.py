"""`sscloud package`: a bundle → a function folder."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sscloud.bundle import WEIGHTS, Manifest, ModelBundle, save_bundle
from sscloud.errors import BundleError, ConfigError
from sscloud.labels import LabelSchema
from sscloud.unet import Architecture, UNet
from tools.commands import package as verb
from tools.function_folder import check_name, describe, fill_template, find_name, package, replace_scalars


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


class TestPackage:
    def test_the_folder_is_self_contained(self, bundle: ModelBundle, tmp_path: Path) -> None:
        assert package(bundle.path, tmp_path / "function") == "sscloud-street-2026"
        found = files(tmp_path / "function")
        core = {name for name in found if name.startswith("sscloud/")}
        assert found - core == {
            "function.yaml",
            "function-gpu.yaml",
            "main.py",
            "model_handler.py",
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
            "('main', 'model_handler', 'sscloud', 'serverless', 'tools', 'training')];"
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
        save_bundle(broken, bundle.model(), bundle.manifest)
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

    def test_hostile_names_stay_text(self, bundle: ModelBundle) -> None:
        name = 'a": b # c\n\u0085\u2028\x7f{{ .Name }}'
        manifest = dataclasses.replace(bundle.manifest, name=name)
        text = (Path(verb.__file__).parents[2] / "serverless" / "function.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(fill_template(text, manifest, name="sscloud-x"))
        assert config["metadata"]["annotations"]["name"] == f"{name} v12"
        assert len(json.loads(config["metadata"]["annotations"]["spec"])) == 5
