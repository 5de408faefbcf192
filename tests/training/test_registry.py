"""Versions of the model in MLflow's store: what they hold, that they never change, and who is champion."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from sscloud.architecture import Architecture
from sscloud.bundle import ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError, ConfigError, RegistryError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training import registry as module
from training.config import RunFacts, TrainConfig, write_config
from training.export import export_bundle
from training.registry import (
    CHAMPION,
    Approval,
    ModelVersion,
    Registry,
    default_uri,
    objection,
    open_registry,
    registered_names,
    without_login,
)

pytestmark = pytest.mark.usefixtures("quick_mlflow_stores")

MakeRun = Callable[..., Path]

NAME = "Улица"
METRICS = {"miou": 0.5, "iou/Земля": 0.7, "iou/Конструкции": math.nan}


@pytest.fixture(scope="module")
def write_run(make_unet: Callable[..., UNet]) -> Callable[..., Path]:
    """Writes a run folder as training leaves it; the seed decides the weights."""

    def write(folder: Path, seed: int = 0, *, parent: str | None = None) -> Path:
        model = make_unet(Architecture(classes=6, base_width=2), seed=seed)
        schema = LabelSchema.default()
        facts = RunFacts(
            snapshot=f"{seed:016x}",
            architecture=model.architecture,
            labels=schema,
            label_ids=schema.class_ids,
            encoding="normals",
            aspect=2.0,
            elevation=(90.0, -90.0),
            azimuth=None,
            parent=parent,
            learned=("a" * 64, "b" * 64),
        )
        write_config(folder, TrainConfig(dataset="data", scale=0.5, base_width=2, crop=(32, 64)), facts)
        (folder / "checkpoints").mkdir()
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 0, "state_dict": state}, folder / "checkpoints/best.ckpt")
        with (folder / "metrics.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["epoch", "train_loss", "miou"], [1, 2.0, 0.4]])
        return folder

    return write


@pytest.fixture
def make_run(tmp_path: Path, write_run: Callable[..., Path]) -> MakeRun:
    """Makes runs in the workspace."""
    return lambda seed=0, **facts: write_run(tmp_path / "work/runs" / f"run-{seed}", seed, **facts)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Of a workspace without a server; empty."""
    return Registry(default_uri(tmp_path / "work"), name=NAME)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Of a store that keeps artifacts elsewhere, as a server does: they go in and out by MLflow's own ways."""
    uri = default_uri(tmp_path / "server")
    (tmp_path / "server/runs").mkdir(parents=True)
    MlflowClient(uri, uri).create_experiment(module.EXPERIMENT, artifact_location=(tmp_path / "store").as_uri())
    monkeypatch.setattr(module, "artifact_location", lambda _: None)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return Registry(uri, name=NAME, cache=tmp_path / "cache")


def add(registry: Registry, run: Path, **facts: Any) -> ModelVersion:
    values: dict[str, Any] = {"metrics": METRICS, "test_snapshot": "t1", "decision": "accepted", "reasons": ["Good."]}
    values["against"] = None
    return registry.register(run, **{**values, **facts})


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def client(registry: Registry) -> MlflowClient:
    return MlflowClient(registry.uri, registry.uri)


class TestRegister:
    def test_a_version_knows_where_it_comes_from(self, registry: Registry, make_run: MakeRun) -> None:
        run = make_run(parent="Улица v7")
        version = add(registry, run)

        assert version == registry.get(1) == registry.find("Улица v1")
        assert (version.title, version.parent, version.snapshot, version.learned) == (
            "Улица v1",
            "Улица v7",
            "0" * 16,
            2,
        )
        assert (version.test_snapshot, version.decision, version.reasons) == ("t1", "accepted", ("Good.",))
        assert (version.against, version.aliases) == (None, frozenset())
        assert version.metrics == pytest.approx(METRICS, nan_ok=True)
        assert version.config["scale"] == 0.5
        assert version.config["crop"] == [32, 64]
        bundle = registry.bundle(1)
        manifest = bundle.manifest
        assert manifest.title == "Улица v1"
        assert (manifest.weights_sha256, manifest.code_version) == (version.weights_sha256, version.code_version)
        assert manifest.created == version.created
        assert (manifest.metrics["validation_miou"], manifest.metrics["test_iou/Земля"]) == (0.4, 0.7)
        assert (run / "mlflow_run_id").read_text().strip() == version.run
        assert bundle.path.parents[2] == registry._artifacts
        record = client(registry).get_run(version.run)
        assert record.data.metrics == {"test/miou": 0.5, "test/iou/Земля": 0.7}
        assert (record.info.run_name, record.info.status) == ("run-0", "FINISHED")
        assert Path(record.info.artifact_uri.removeprefix("file://")) == bundle.path.parent
        assert json.loads(json.dumps(version.to_dict(), allow_nan=False))["metrics"]["iou/Конструкции"] is None

    def test_the_same_run_is_the_same_version(self, registry: Registry, make_run: MakeRun) -> None:
        run = make_run()
        first = add(registry, run)
        before = files(registry.bundle(1).path)
        registry.set_champion(1)

        again = add(registry, run, metrics={}, decision="refused")

        assert replace(again, aliases=frozenset()) == first
        assert files(registry.bundle(1).path) == before
        assert [version.version for version in registry.versions()] == [1]

    def test_other_versions_change_nothing(self, registry: Registry, make_run: MakeRun) -> None:
        first = add(registry, make_run(1))
        before = files(registry.bundle(1).path)
        registry.set_champion(1)

        second = add(registry, make_run(2), decision="refused", reasons=["Worse.", "Much."], against="Улица v1")

        assert (second.version, second.against, second.decision) == (2, "Улица v1", "refused")
        assert second.reasons == ("Worse.", "Much.")
        assert replace(registry.get(1), aliases=frozenset()) == first
        assert files(registry.bundle(1).path) == before

    def test_a_champion_that_the_gate_never_saw(self, registry: Registry, make_run: MakeRun) -> None:
        """It was promoted between the gate and the registration: what was accepted was so without it."""
        add(registry, make_run(1))
        registry.set_champion(1)

        second = add(registry, make_run(2), decision="accepted", against=None)

        assert second.against is None
        assert "the gate compared it with another champion (none" in str(objection(second, registry.champion()))

    def test_another_number_than_the_gate_named(self, registry: Registry, make_run: MakeRun) -> None:
        run = make_run()
        export_bundle(run, run / "bundle", name=NAME, version=1)
        assert add(registry, make_run(1)).version == 1

        version = add(registry, run)

        assert (version.version, version.reasons[0]) == (2, "Good.")
        assert version.reasons[1:] == ("Before it had its number, it was called Улица v1: its reports say so.",)
        assert add(registry, run) == version

    def test_a_run_that_trained_on_is_another_version(
        self, registry: Registry, make_run: MakeRun, make_unet: Callable[..., UNet]
    ) -> None:
        run = make_run()
        first = add(registry, run)
        state = make_unet(Architecture(classes=6, base_width=2), seed=9).state_dict()
        best = {"epoch": 0, "state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
        torch.save(best, run / "checkpoints/best.ckpt")

        second = add(registry, run)

        assert (second.version, second.run) == (2, first.run)
        assert second.weights_sha256 != first.weights_sha256

    def test_a_run_of_another_store_gets_a_record_in_this_one(self, registry: Registry, make_run: MakeRun) -> None:
        run = make_run()
        (run / "mlflow_run_id").write_text("0" * 32)
        version = add(registry, run)
        assert version.run != "0" * 32
        assert add(registry, run) == version

    def test_a_run_that_training_logged(self, registry: Registry, make_run: MakeRun) -> None:
        run = make_run()
        record = registry._new_record("trained")
        (run / "mlflow_run_id").write_text(f"{record}\n")
        assert add(registry, run).run == record

    @pytest.mark.parametrize("step", ["_store", "_log"])
    def test_killed_before_the_seal(
        self, step: str, registry: Registry, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run()

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Registry, step, killed)
            with pytest.raises(KeyboardInterrupt):
                add(registry, run, reasons=["First."])
        assert registry.versions() == []
        with pytest.raises(RegistryError, match=r"Улица has no version 1 in .* It has none yet"):
            registry.set_champion(1)

        version = add(registry, run, reasons=["Second."])

        assert (version.version, version.reasons) == (1, ("Second.",))
        assert registry.bundle(1).manifest.title == "Улица v1"
        assert len(client(registry).search_model_versions(f"name = '{NAME}'")) == 1

    def test_two_at_once_on_a_server(
        self, served: Registry, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run()
        other = Registry(served.uri, name=NAME)
        add(served, make_run(5))
        connected = served._client
        real = type(connected).create_model_version

        def late(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(type(connected), "create_model_version", real)
            add(other, run)
            return real(self, *args, **kwargs)

        (run / "mlflow_run_id").write_text(served._new_record("training"))
        monkeypatch.setattr(type(connected), "create_model_version", late)

        assert add(served, run).version == 2
        assert [version.version for version in served.versions()] == [1, 2]
        assert len(client(served).search_model_versions(f"name = '{NAME}'")) == 2
        assert add(served, make_run(6)).version == 4  # a number is never given twice

    def test_an_unfinished_run(self, registry: Registry, make_run: MakeRun, tmp_path: Path) -> None:
        run = make_run()
        (run / "checkpoints/best.ckpt").unlink()
        with pytest.raises(BundleError, match="no epoch has ended"):
            add(registry, run)
        with pytest.raises(ConfigError, match="is no run"):
            add(registry, tmp_path)
        assert registry.versions() == []


class TestImport:
    def test_old_work_is_the_first_version(self, registry: Registry, tiny_bundle: ModelBundle) -> None:
        before = files(tiny_bundle.path)
        manifest = tiny_bundle.manifest

        version = registry.import_bundle(tiny_bundle, metrics={"miou": 0.25}, test_snapshot="t1")

        assert (version.title, version.decision, version.reasons) == ("Улица v1", None, ("Imported: Улица v3.",))
        assert (version.metrics, version.config) == ({"miou": 0.25}, {})
        assert version.weights_sha256 == manifest.weights_sha256
        imported = registry.bundle(1).manifest
        assert imported == replace(
            manifest, version=1, created=version.created, metrics={**manifest.metrics, "test_miou": 0.25}
        )
        assert registry.import_bundle(tiny_bundle) == version
        assert registry.import_bundle(registry.bundle(1)) == version
        assert files(tiny_bundle.path) == before

    def test_other_conventions_are_another_model(
        self, registry: Registry, tiny_bundle: ModelBundle, make_unet: Callable[..., UNet], tmp_path: Path
    ) -> None:
        registry.import_bundle(tiny_bundle)
        finer = save_bundle(tmp_path / "finer", make_unet(), replace(tiny_bundle.manifest, scale=0.75))
        version = registry.import_bundle(finer)
        assert (version.version, registry.bundle(2).manifest.scale) == (2, 0.75)

    def test_a_damaged_bundle(self, registry: Registry, tiny_bundle: ModelBundle, tmp_path: Path) -> None:
        shutil.copytree(tiny_bundle.path, tmp_path / "copy")
        (tmp_path / "copy/weights.safetensors").write_bytes(b"nothing")
        with pytest.raises(BundleError, match="is damaged or was exchanged"):
            registry.import_bundle(replace(tiny_bundle, path=tmp_path / "copy"))
        assert registry.versions() == []


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, quick_mlflow_stores: None, write_run: Callable[..., Path]) -> Path:
    """A workspace with three versions, to be copied: a store can be moved."""
    folder = tmp_path_factory.mktemp("filled")
    for seed in (1, 2, 3):
        add(Registry(default_uri(folder), name=NAME), write_run(folder / "runs" / f"run-{seed}", seed))
    return folder


@pytest.fixture
def three(registry: Registry, filled: Path, tmp_path: Path) -> Registry:
    """Three versions."""
    shutil.copytree(filled, tmp_path / "work")
    return registry


def number(version: ModelVersion | None) -> int | None:
    return version.version if version is not None else None


class TestChampions:
    def test_promotions_and_the_way_back(self, three: Registry) -> None:
        assert (three.champion(), three.challenger(), three.previous_champion()) == (None, None, None)
        three.set_challenger(1)
        assert number(three.challenger()) == 1
        assert three.set_champion(1) is None
        assert (number(three.champion()), three.challenger()) == (1, None)
        assert number(three.set_champion(2)) == 1
        assert number(three.set_champion(2)) == 2  # nothing happens
        assert number(three.set_champion(3)) == 2
        assert three.get(3).aliases == {CHAMPION}
        assert three.get(2).aliases == frozenset()
        assert number(three.previous_champion()) == 2

        assert tuple(map(number, three.roll_back())) == (3, 2)
        assert tuple(map(number, three.roll_back())) == (2, 1)
        with pytest.raises(RegistryError, match=r"There is nothing to go back to: Улица v1 is the first champion"):
            three.roll_back()
        assert number(three.champion()) == 1

    def test_without_a_champion(self, registry: Registry) -> None:
        with pytest.raises(RegistryError, match="nothing to go back to: there is no champion"):
            registry.roll_back()

    def test_killed_between_history_and_alias(self, three: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        three.set_champion(1)
        three.set_champion(2)
        remember = three._remember

        def killed(history: list[int]) -> None:
            remember(history)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(three, "_remember", killed)
            with pytest.raises(KeyboardInterrupt):
                three.set_champion(3)
        assert (number(three.champion()), number(three.previous_champion())) == (2, 1)
        three.set_champion(3)
        assert (number(three.champion()), number(three.previous_champion())) == (3, 2)

        with monkeypatch.context() as patch:
            patch.setattr(three, "_remember", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                three.roll_back()
        assert (number(three.champion()), number(three.previous_champion())) == (2, 1)
        assert tuple(map(number, three.roll_back())) == (2, 1)

    def test_a_deleted_version_is_passed_over(self, three: Registry) -> None:
        for version in (1, 2, 3):
            three.set_champion(version)
        client(three).delete_model_version(NAME, "2")
        assert number(three.previous_champion()) == 1
        assert tuple(map(number, three.roll_back())) == (3, 1)
        assert three.previous_champion() is None

    def test_the_history_is_bounded(self, three: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_KEPT", 2)
        for version in (1, 2, 3, 1):
            three.set_champion(version)
        assert three._history(but=None) == [2, 3]

    def test_the_way_back_is_open_whatever_was_spoilt(self, three: Registry) -> None:
        for version in (1, 2, 3):
            three.set_champion(version)
        for version in ("2", "3"):
            client(three).set_model_version_tag(NAME, version, "sscloud.metrics", "{")
        champion = three.champion()
        assert champion is not None
        assert (champion.title, champion.aliases) == ("Улица v3", {CHAMPION})
        assert "its tags were changed" in (champion.problem or "")
        assert list(map(number, three.former_champions())) == [1]
        assert tuple(map(number, three.roll_back())) == (3, 1)
        assert three._history(but=None) == []
        with pytest.raises(RegistryError, match=r"says of Улица v2 cannot be used"):
            three.set_champion(2)

    def test_a_spoilt_history(self, three: Registry) -> None:
        for text in ("[1, true]", "{}", "[0]", "nothing"):
            client(three).set_registered_model_tag(NAME, "sscloud.champions", text)
            with pytest.raises(RegistryError, match=r"history of champions of Улица .* was changed .*Set the tag"):
                three.previous_champion()


class TestObjection:
    @pytest.fixture
    def version(self) -> ModelVersion:
        return ModelVersion(
            name="street", version=4, created="", parent=None, snapshot=None, code_version="", weights_sha256="0" * 64,
            metrics={}, test_snapshot=None, config={}, decision="accepted", reasons=("It is worse.",), run=None,
            aliases=frozenset(), against="street v3",
        )  # fmt: skip

    def test_accepted_against_the_champion(self, version: ModelVersion) -> None:
        champion = replace(version, version=3)
        assert objection(version, champion) is None
        assert objection(version, version) is None
        found = objection(version, replace(version, version=2))
        assert found == "the gate compared it with another champion (street v3) than the present one (street v2)"
        found = objection(version, None)
        assert found == "the gate compared it with another champion (street v3) than the present one (none)"

    def test_refused(self, version: ModelVersion) -> None:
        refused = replace(version, decision="refused")
        for champion in (replace(version, version=3), None):
            assert objection(refused, champion) == "the gate refused it: It is worse."

    def test_never_asked(self, version: ModelVersion) -> None:
        imported = replace(version, decision=None, against=None)
        assert objection(imported, None) is None
        assert objection(imported, replace(version, version=3)) == (
            "the gate has not compared it with the champion, street v3"
        )

    def test_approved_later(self, version: ModelVersion) -> None:
        approval = Approval(at="", against="street v2", reasons=("I saw it.",), forced=True)
        refused = replace(version, decision="refused", approvals=(approval,))
        assert objection(refused, replace(version, version=2)) is None
        assert objection(refused, replace(version, version=3)) is not None

    def test_an_approval_holds_for_the_present_champion(self, three: Registry) -> None:
        three.set_champion(1)
        with pytest.raises(RegistryError, match=r"in place of Улица v3, but meanwhile Улица v1 is the champion"):
            three.approve(2, against="Улица v3", reasons=[], forced=False)
        three.approve(2, against="Улица v1", reasons=["Seen\x1b[2J by a person."], forced=True)
        (approval,) = three.get(2).approvals
        assert (approval.against, approval.forced) == ("Улица v1", True)
        assert approval.reasons == ("Seen\N{REPLACEMENT CHARACTER}[2J by a person.",)
        assert objection(three.get(2), three.champion()) is None


class TestTakenOut:
    @pytest.mark.parametrize("damage", ["weights", "manifest", "both", "missing"])
    def test_only_what_was_registered(
        self, damage: str, three: Registry, make_unet: Callable[..., UNet], tmp_path: Path
    ) -> None:
        path = three.bundle(2).path
        manifest = three.bundle(2).manifest
        if damage == "weights":
            weights = path / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        elif damage == "manifest":
            text = (path / "manifest.json").read_text(encoding="utf-8")
            (path / "manifest.json").write_text(text.replace('"scale": 0.5', '"scale": 0.25'), encoding="utf-8")
        elif damage == "both":  # a whole bundle that says that it is this version
            save_bundle(path, make_unet(manifest.architecture, seed=8), manifest, overwrite=True)
        else:
            shutil.rmtree(path)
        with pytest.raises(BundleError, match=r"(The files of Улица v2 cannot be used|does not hold Улица v2).*backup"):
            three.bundle(2)
        assert three.bundle(1).manifest.title == "Улица v1"

    def test_a_workspace_that_was_moved(self, three: Registry, tmp_path: Path, make_run: MakeRun) -> None:
        (tmp_path / "work").rename(tmp_path / "moved")
        moved = Registry(default_uri(tmp_path / "moved"), name=NAME)
        assert moved.bundle(2).manifest.title == "Улица v2"
        assert add(moved, make_run(4)).version == 4
        assert moved.bundle(4).path.is_relative_to(tmp_path / "moved")

    def test_a_server_s_bundles_are_downloaded_once(self, served: Registry, make_run: MakeRun, tmp_path: Path) -> None:
        add(served, make_run())
        path = served.bundle(1).path
        assert path.parent == tmp_path / "cache"
        stored = next((tmp_path / "store").rglob("manifest.json")).parent
        stored.rename(tmp_path / "away")
        assert served.bundle(1).path == path

        (path / "weights.safetensors").write_bytes(b"nothing")
        with pytest.raises(RegistryError, match="does not do what was asked"):
            served.bundle(1)
        assert list((tmp_path / "cache").iterdir()) == []
        (tmp_path / "away").rename(stored)
        assert served.bundle(1).manifest.title == "Улица v1"
        (stored / "weights.safetensors").write_bytes(b"nothing")
        shutil.rmtree(path)
        with pytest.raises(BundleError, match="The files of Улица v1 cannot be used"):
            served.bundle(1)

    def test_a_way_out_of_the_store(self, three: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = three._sealed(2)
        raw._run_id = "../../../etc"
        monkeypatch.setattr(three, "_sealed", lambda _: raw)
        with pytest.raises(
            RegistryError, match=r"v2 cannot be used \(the run '../../../etc' is not of the expected form"
        ):
            three.bundle(2)

    def test_tags_that_somebody_changed(self, three: Registry) -> None:
        mlflow = client(three)
        for tag, text in (
            ("metrics", '{"miou": "high"}'),
            ("decision", '"perhaps"'),
            ("weights_sha256", '"../x"'),
            ("reasons", "null"),
            ("config", "{"),
            ("created", "1"),
            ("approvals", "[{}]"),
        ):
            before = mlflow.get_model_version(NAME, "2").tags.get(f"sscloud.{tag}", "[]")
            mlflow.set_model_version_tag(NAME, "2", f"sscloud.{tag}", text)
            with pytest.raises(RegistryError, match=r"says of Улица v2 cannot be used .* its tags were changed"):
                three.bundle(2)
            assert [version.problem is None for version in three.versions()] == [True, False, True]
            mlflow.set_model_version_tag(NAME, "2", f"sscloud.{tag}", before)
        assert three.get(2).problem is None


class TestStores:
    def test_reading_makes_nothing(self, tmp_path: Path) -> None:
        uri = default_uri(tmp_path)
        registry = Registry(uri, name=NAME)
        assert (registry.versions(), registry.champion(), registry.previous_champion()) == ([], None, None)
        assert registered_names(uri) == []
        with pytest.raises(ConfigError, match=r"holds 0 registered models\. `sscloud models import BUNDLE`"):
            open_registry(uri)
        assert list(tmp_path.iterdir()) == []

    def test_the_only_model(self, registry: Registry, tiny_bundle: ModelBundle) -> None:
        registry.import_bundle(tiny_bundle)
        client(registry).create_registered_model("a stranger's")
        assert open_registry(registry.uri).name == NAME
        Registry(registry.uri, name="yard").import_bundle(tiny_bundle)
        assert registered_names(registry.uri) == ["yard", NAME]
        with pytest.raises(ConfigError, match=r"holds 2 registered models: yard, Улица\. Choose one"):
            open_registry(registry.uri)
        assert open_registry(registry.uri, name="yard").versions()[0].title == "yard v1"

    def test_a_stranger_s_model_is_left_alone(self, registry: Registry, tiny_bundle: ModelBundle) -> None:
        Registry(registry.uri, name="yard").import_bundle(tiny_bundle)
        client(registry).create_registered_model(NAME)
        with pytest.raises(RegistryError, match="that SSCloud did not make"):
            registry.import_bundle(tiny_bundle)

    @pytest.mark.parametrize("name", ["", " a", "a/b", "a:b", "..", "it's", "a\nb", "a" * 101])
    def test_names_that_cannot_be(self, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be the name of a registered model"):
            Registry("sqlite:///x", name=name)

    def test_a_server_that_is_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        registry = Registry("http://anna:geheim-4711@127.0.0.1:1", name=NAME)
        with pytest.raises(
            RegistryError, match=r"The store http://127\.0\.0\.1:1 does not do what was asked"
        ) as caught:
            registry.versions()
        assert "geheim" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("https://user:p@ss@host/x", "https://host/x"),
            ("postgresql://user:a/b:c@d@host/x", "postgresql://host/x"),
            (
                "GET http://token@host:5000/a and http://host/b failed",
                "GET http://host:5000/a and http://host/b failed",
            ),
            ("https://host/Users/anna@example.org", "https://host/Users/anna@example.org"),
            ("sqlite:////home/a@b/runs/mlflow.db", "sqlite:////home/a@b/runs/mlflow.db"),
        ],
    )
    def test_logins_are_hidden(self, text: str, shown: str) -> None:
        assert without_login(text) == shown

    def test_a_file_that_is_no_store(self, tmp_path: Path) -> None:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs/mlflow.db").write_bytes(b"no database" * 100)
        with pytest.raises(RegistryError, match="does not do what was asked"):
            Registry(default_uri(tmp_path), name=NAME).versions()
