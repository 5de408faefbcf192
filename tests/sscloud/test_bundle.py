"""Bundles: round trip, damage, strict manifests; milesial's checkpoints read without running them."""

import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sscloud import checkpoint as module
from sscloud.architecture import Architecture
from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle, channels_to_label_map
from sscloud.checkpoint import channel_ids, load_model, read_checkpoint, save_bundle, save_checkpoint
from sscloud.errors import BundleError, ConfigError
from sscloud.frame import Azimuth
from sscloud.labels import LabelSchema
from sscloud.unet import UNet

MakeUNet = Callable[..., UNet]
MakeManifest = Callable[..., Manifest]
SMALL = Architecture(classes=6, base_width=2)


@pytest.fixture
def saved(tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest) -> ModelBundle:
    """A bundle that a test may damage."""
    return save_bundle(tmp_path / "bundle", make_unet(SMALL), make_manifest(SMALL))


def edit(bundle: ModelBundle, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest on disk."""
    file = bundle.path / MANIFEST
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    return bundle.path


class TestRoundTrip:
    def test_manifest_and_weights(self, tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest) -> None:
        architecture = Architecture(classes=3, base_width=2, upsampling="bilinear", wrap=True)
        model = make_unet(architecture)
        manifest = make_manifest(
            architecture,
            label_ids=(5, 0, 0),
            azimuth=Azimuth(direction=-1, column_0=180.0),
            parent="Улица v2",
            snapshot="2026-11",
            metrics={"miou": 0.71},
            elevation=(90.0, -60.0),
            aspect=2.4,
        )
        written = save_bundle(tmp_path / "а" / "bundle", model, manifest)
        assert written.path == tmp_path / "а" / "bundle"
        assert {file.name for file in written.path.iterdir()} == {MANIFEST, WEIGHTS}
        found = ModelBundle.load(written.path)
        assert found == written
        assert found.manifest == dataclasses.replace(manifest, weights_sha256=found.manifest.weights_sha256)
        assert len(found.manifest.weights_sha256) == 64
        assert found.manifest.title == "Улица v3"
        loaded = load_model(found)
        assert not loaded.training
        assert loaded.architecture == architecture
        state = model.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())

    def test_the_manifest_is_readable_json(self, tiny_bundle: ModelBundle) -> None:
        text = (tiny_bundle.path / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(text)["format"] == 1
        assert '"name": "Растительность"' in text

    def test_dict_round_trip(self, make_manifest: MakeManifest) -> None:
        manifest = make_manifest(SMALL, azimuth=Azimuth(direction=1, column_0=0))
        again = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())), source="here")
        assert again == manifest

    def test_weights_that_are_no_longer_contiguous(
        self, tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest
    ) -> None:
        model = make_unet(SMALL)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = load_model(save_bundle(tmp_path / "bundle", model, make_manifest(SMALL)))
        assert torch.equal(found.outc.conv.weight, model.outc.conv.weight)


class TestSaving:
    def test_nothing_is_overwritten_unasked(self, saved: ModelBundle, make_unet: MakeUNet) -> None:
        other = make_unet(SMALL, seed=5)
        with pytest.raises(ConfigError, match=r"bundle exists already.*--overwrite"):
            save_bundle(saved.path, other, saved.manifest)
        assert ModelBundle.load(saved.path) == saved
        replaced = save_bundle(saved.path, other, saved.manifest, overwrite=True)
        assert replaced.manifest.weights_sha256 != saved.manifest.weights_sha256
        assert ModelBundle.load(saved.path) == replaced

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_in_the_middle_leaves_nothing(
        self,
        tmp_path: Path,
        make_unet: MakeUNet,
        make_manifest: MakeManifest,
        monkeypatch: pytest.MonkeyPatch,
        overwrite: bool,
    ) -> None:
        model, manifest, path = make_unet(SMALL), make_manifest(SMALL), tmp_path / "bundle"
        if overwrite:
            save_bundle(path, model, manifest)
        write = module.atomic_write

        def fail_at_the_manifest(file: Path, data: bytes) -> None:
            if file.name == MANIFEST:
                raise OSError("No space left on device")
            write(file, data)

        monkeypatch.setattr(module, "atomic_write", fail_at_the_manifest)
        with pytest.raises(OSError, match="No space left"):
            save_bundle(path, make_unet(SMALL, seed=1), manifest, overwrite=overwrite)
        assert [file.name for file in tmp_path.iterdir()] == (["bundle"] if overwrite else [])
        if overwrite:
            assert torch.equal(load_model(ModelBundle.load(path)).outc.conv.weight, model.outc.conv.weight)

    def test_the_manifest_must_fit_the_model(
        self, tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest
    ) -> None:
        with pytest.raises(
            BundleError, match=r"The manifest describes Architecture\(classes=6, base_width=4.*the model"
        ):
            save_bundle(tmp_path / "b", make_unet(SMALL), make_manifest(dataclasses.replace(SMALL, base_width=4)))
        with pytest.raises(BundleError, match="The manifest: 'label_ids' must be 6 ids"):
            save_bundle(tmp_path / "b", make_unet(SMALL), make_manifest(SMALL, label_ids=(0, 2)))
        assert not (tmp_path / "b").exists()


class TestDamage:
    def test_no_bundle(self, tmp_path: Path, saved: ModelBundle) -> None:
        with pytest.raises(BundleError, match=r"none is no bundle: a folder with manifest\.json.*import-checkpoint"):
            ModelBundle.load(tmp_path / "none")
        with pytest.raises(BundleError, match=r"safetensors is no bundle: a folder with"):
            ModelBundle.load(saved.path / WEIGHTS)
        (tmp_path / "empty").mkdir()
        with pytest.raises(BundleError, match=r"manifest\.json cannot be read: No such file"):
            ModelBundle.load(tmp_path / "empty")

    def test_missing_weights(self, saved: ModelBundle) -> None:
        (saved.path / WEIGHTS).unlink()
        with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read: No such file.*Copy the bundle"):
            ModelBundle.load(saved.path)

    @pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
    def test_damaged_weights(self, saved: ModelBundle, damage: str) -> None:
        data = bytearray((saved.path / WEIGHTS).read_bytes())
        data[-5] ^= 1
        (saved.path / WEIGHTS).write_bytes({"flip": bytes(data), "cut": bytes(data[:-7]), "empty": b""}[damage])
        with pytest.raises(BundleError, match=r"damaged or was exchanged: its sha256 is [0-9a-f]{12}…"):
            ModelBundle.load(saved.path)

    def test_exchanged_weights(
        self, saved: ModelBundle, tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest
    ) -> None:
        other = save_bundle(tmp_path / "other", make_unet(SMALL, seed=9), make_manifest(SMALL))
        (saved.path / WEIGHTS).write_bytes((other.path / WEIGHTS).read_bytes())
        with pytest.raises(BundleError, match="damaged or was exchanged"):
            ModelBundle.load(saved.path)

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
    def test_a_manifest_that_is_no_json(self, saved: ModelBundle, text: bytes) -> None:
        (saved.path / MANIFEST).write_bytes(text)
        with pytest.raises(BundleError, match=r"manifest\.json is not valid JSON: .*Copy the bundle again"):
            ModelBundle.load(saved.path)

    def test_weights_of_another_architecture(self, saved: ModelBundle) -> None:
        path = edit(saved, lambda data: data["architecture"].update(base_width=4))
        with pytest.raises(BundleError, match=r"double_conv\.0\.weight: shape \(2, 3, 3, 3\), expected \(4, 3, 3, 3\)"):
            load_model(ModelBundle.load(path))

    def test_weights_that_are_no_safetensors(self, saved: ModelBundle) -> None:
        import hashlib

        (saved.path / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle in disguise")
        digest = hashlib.sha256((saved.path / WEIGHTS).read_bytes()).hexdigest()
        path = edit(saved, lambda data: data.update(weights_sha256=digest))
        with pytest.raises(BundleError, match="is not a safetensors file"):
            load_model(ModelBundle.load(path))


class TestManifest:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 2}, r"format 2; this version of SSCloud \(.*\) reads format 1"),
            ({"format": None}, "format None"),
            ({"wrap": True}, r"unknown keys \['wrap'\], missing keys \[\]"),
            ({"name": 3}, "'name' must be a text, found 3"),
            ({"name": " "}, "'name' must be a text, found ' '"),
            ({"version": 0}, "'version' must be a whole number from 1, found 0"),
            ({"version": "3"}, "'version' must be a whole number from 1, found '3'"),
            ({"version": 1.5}, r"'version' must be a whole number from 1, found 1\.5"),
            ({"version": True}, "'version' must be a whole number from 1, found True"),
            ({"label_ids": [0, 2, 5, 6, 65, 67]}, r"'label_ids' must be 6 ids that the labels have \(\[0.*found .*67"),
            ({"label_ids": [0, 2, 5, 6, 65]}, "'label_ids' must be 6 ids"),
            ({"label_ids": [0, 2, 5, 6, 65, "66"]}, "'label_ids' must be 6 ids"),
            ({"label_ids": 5}, "manifest.json: .*not iterable"),
            ({"scale": 0}, "'scale' must be a number above 0, at most 1, found 0"),
            ({"scale": 1.01}, r"'scale' must be a number above 0, at most 1, found 1\.01"),
            ({"scale": float("nan")}, "'scale' must be a number above 0, at most 1, found nan"),
            ({"scale": "0.5"}, r"'scale' must be a number above 0, at most 1, found '0\.5'"),
            ({"scale": True}, "'scale' must be a number above 0, at most 1, found True"),
            ({"resample": "nearest"}, r"'resample' must be one of \('bicubic', 'valid-area'\), found 'nearest'"),
            ({"resample": ["bicubic"]}, "'resample' must be one of"),
            ({"encoding": "bgr"}, r"'encoding' must be one of \('normals', 'rgb'\), found 'bgr'"),
            ({"aspect": 0}, r"'aspect' must be a number above 0 \(width / height\), found 0"),
            ({"aspect": float("inf")}, "'aspect' must be a number above 0.*found inf"),
            ({"aspect": 10**400}, "'aspect' must be a number above 0"),
            ({"elevation": [-90, 90]}, "'elevation' must be two angles from 90 to -90 degrees, the top one first"),
            ({"elevation": [90]}, "'elevation' must be two angles"),
            ({"elevation": [90, "-90"]}, "'elevation' must be two angles"),
            ({"elevation": [90, -91]}, "'elevation' must be two angles"),
            ({"azimuth": {"direction": 2, "column_0": 0}}, "'azimuth' must be a direction and degrees"),
            ({"azimuth": {"direction": 1, "column_0": "0"}}, "'azimuth' must be a direction and degrees"),
            ({"azimuth": {"direction": 1}}, "manifest.json: .*column_0"),
            ({"azimuth": [1, 0]}, "manifest.json: .*mapping"),
            ({"labels": {"labels": []}}, "manifest.json, labels: 'labels' must be a list with at least one label"),
            ({"architecture": {}}, "manifest.json: .*classes"),
            ({"architecture": {"classes": 6, "depth": 5}}, "manifest.json: .*depth"),
            ({"architecture": {"classes": "6"}}, "manifest.json: "),
            ({"architecture": {"classes": 6.0}}, "'architecture' has values of a wrong type"),
            ({"architecture": {"classes": 6, "wrap": 1}}, "'architecture' has values of a wrong type"),
            ({"architecture": {"classes": 6, "upsampling": "cubic"}}, "unknown upsampling 'cubic'"),
            ({"architecture": None}, "manifest.json: "),
            ({"metrics": [1]}, "'metrics' must be "),
            ({"metrics": {"miou": "good"}}, "'metrics' must be "),
            ({"parent": 3}, "'parent' must be "),
            ({"snapshot": ["a"]}, "'snapshot' must be "),
            ({"weights_sha256": 7}, "'weights_sha256' must be "),
            ({"created": 7}, "'created' must be "),
            ({"code_version": None}, "'code_version' must be "),
        ],
    )
    def test_a_wrong_value_is_named(self, saved: ModelBundle, changes: dict[str, object], message: str) -> None:
        path = edit(saved, lambda data: data.update(changes))
        with pytest.raises(BundleError, match=message):
            ModelBundle.load(path)

    @pytest.mark.parametrize("key", ["name", "version", "architecture", "labels", "label_ids", "scale", "aspect"])
    def test_a_missing_key_is_named(self, saved: ModelBundle, key: str) -> None:
        path = edit(saved, lambda data: data.pop(key))
        with pytest.raises(BundleError, match=rf"unknown keys \[\], missing keys \['{key}'\]"):
            ModelBundle.load(path)

    def test_a_list_is_no_manifest(self) -> None:
        with pytest.raises(BundleError, match="here: expected an object, found list"):
            Manifest.from_dict([], source="here")


class Trap:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.target, "the pickle was run"))


class TestReadCheckpoint:
    @pytest.fixture
    def content(self, make_unet: MakeUNet) -> dict[str, Any]:
        model = make_unet(Architecture(classes=6, base_width=2, wrap=False))
        return {**model.state_dict(), "mask_values": [0, 2, 5, 6, 65, 66]}

    def save(self, content: object, tmp_path: Path) -> Path:
        torch.save(content, tmp_path / "checkpoint_epoch48.pth")
        return tmp_path / "checkpoint_epoch48.pth"

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear-aligned"])
    @pytest.mark.parametrize(("base", "classes"), [(2, 6), (4, 3), (6, 68)])
    def test_the_architecture_is_found(
        self, tmp_path: Path, make_unet: MakeUNet, upsampling: Any, base: int, classes: int
    ) -> None:
        architecture = Architecture(classes=classes, base_width=base, upsampling=upsampling, wrap=False)
        model = make_unet(architecture)
        path = self.save({**model.state_dict(), "mask_values": [0, 2, 5]}, tmp_path)
        found = read_checkpoint(path)
        assert found.model.architecture == architecture
        assert found.mask_values == (0, 2, 5)
        assert not found.model.training
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in found.model.state_dict().items())

    def test_save_checkpoint_writes_what_is_read(self, tmp_path: Path, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=3, base_width=2, wrap=False))
        save_checkpoint(tmp_path / "deep" / "a.pth", model, np.array([0, 2, 65], np.uint8))
        found = read_checkpoint(tmp_path / "deep" / "a.pth")
        assert found.mask_values == (0, 2, 65)
        assert torch.equal(found.model.outc.conv.weight, model.outc.conv.weight)
        content = torch.load(tmp_path / "deep" / "a.pth", weights_only=True)
        assert set(content) == {*model.state_dict(), "mask_values"}

    def test_the_old_file_format_of_torch(self, tmp_path: Path, content: dict[str, Any]) -> None:
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        assert read_checkpoint(tmp_path / "a.pth").mask_values == (0, 2, 5, 6, 65, 66)

    def test_without_mask_values(self, tmp_path: Path, content: dict[str, Any]) -> None:
        del content["mask_values"]
        assert read_checkpoint(self.save(content, tmp_path)).mask_values is None

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_malicious_pickle_is_not_run(self, tmp_path: Path, content: dict[str, Any], zipped: bool) -> None:
        path, target = tmp_path / "a.pth", tmp_path / "trapped"
        torch.save({**content, "trap": Trap(target)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(BundleError, match=r"a\.pth is not a checkpoint that can be loaded safely"):
            read_checkpoint(path)
        assert not target.exists()

    def test_a_bare_malicious_pickle_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "a.pth").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
        with pytest.raises(BundleError, match="loaded safely"):
            read_checkpoint(tmp_path / "a.pth")
        assert not (tmp_path / "trapped").exists()

    @pytest.mark.parametrize(
        "data",
        [b"", b"hello", b"\x80\x02.", b"\x80\x02K\x05.", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", bytes(64), b"(" * 9],
    )
    def test_other_bytes(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.pth").write_bytes(data)
        with pytest.raises(BundleError, match=r"a\.pth (is not a checkpoint that can be loaded safely|holds a)"):
            read_checkpoint(tmp_path / "a.pth")

    def test_truncated(self, tmp_path: Path, content: dict[str, Any]) -> None:
        data = self.save(content, tmp_path).read_bytes()
        for share in (0.1, 0.5, 0.99):
            (tmp_path / "a.pth").write_bytes(data[: int(len(data) * share)])
            with pytest.raises(BundleError, match="loaded safely"):
                read_checkpoint(tmp_path / "a.pth")

    def test_a_zip_of_something_else(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("annotations.xml", "<a/>")
        with pytest.raises(BundleError, match="loaded safely"):
            read_checkpoint(tmp_path / "a.pth")

    def test_a_missing_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"no\.pth cannot be read: No such file"):
            read_checkpoint(tmp_path / "no.pth")
        with pytest.raises(BundleError, match="cannot be read: Is a directory"):
            read_checkpoint(tmp_path)

    def test_a_list(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="holds a list, expected a state dict"):
            read_checkpoint(self.save([torch.zeros(1)], tmp_path))

    def test_another_network(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"not a checkpoint of milesial's UNet.*first keys are \['fc\.weight'\]"):
            read_checkpoint(self.save({"fc.weight": torch.zeros(2, 2)}, tmp_path))

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("up3.up.weight", torch.zeros(8, 4, 3, 3), "up3.up.weight: shape (8, 4, 3, 3), expected (8, 4, 2, 2)"),
            ("inc.double_conv.1.running_var", torch.zeros(3), "double_conv.1.running_var: shape (3,), expected (2,)"),
            ("outc.conv.bias", torch.zeros(68), "outc.conv.bias: shape (68,), expected (6,)"),
            ("inc.double_conv.0.weight", torch.zeros(2, 1, 3, 3), "shape (2, 1, 3, 3), expected (2, 3, 3, 3)"),
            ("inc.double_conv.0.weight", torch.zeros(4, 3, 3, 3), "double_conv.1.weight: shape (2,), expected (4,)"),
            ("down2.maxpool_conv.1.double_conv.3.weight", None, "down2.maxpool_conv.1.double_conv.3.weight: missing"),
            ("attention.weight", torch.zeros(1), "attention.weight: not part of the network"),
            ("outc.conv.bias", torch.full((6,), float("nan")), "outc.conv.bias: holds values that are not finite"),
        ],
    )
    def test_the_tensor_that_does_not_fit_is_named(
        self, tmp_path: Path, content: dict[str, Any], name: str, tensor: torch.Tensor | None, message: str
    ) -> None:
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
        with pytest.raises(BundleError, match=r"checkpoint_epoch48\.pth.*" + re.escape(message)):
            read_checkpoint(self.save(content, tmp_path))

    def test_mask_values_that_are_too_many(self, tmp_path: Path, content: dict[str, Any]) -> None:
        content["mask_values"] = list(range(7))
        with pytest.raises(BundleError, match="'mask_values' names 7 label ids, but the network has only 6 channels"):
            read_checkpoint(self.save(content, tmp_path))

    @pytest.mark.parametrize(
        "values", [[[0, 0, 0], [255, 255, 255]], [0, 0.5], [0, 256], [0, -1], ["0"], [True], 5, {"a": 1}, "027"]
    )
    def test_mask_values_that_are_no_ids(self, tmp_path: Path, content: dict[str, Any], values: object) -> None:
        content["mask_values"] = values
        with pytest.raises(
            BundleError, match=r"'mask_values' must be a list of label ids from 0 to 255, found .*masks"
        ):
            read_checkpoint(self.save(content, tmp_path))


class TestChannels:
    def checkpoint(self, classes: int, values: tuple[int, ...] | None) -> module.Checkpoint:
        return module.Checkpoint(
            model=UNet(Architecture(classes=classes, base_width=1, wrap=False)), mask_values=values
        )

    def test_channels_beyond_mask_values_write_0(self) -> None:
        ids = channel_ids(self.checkpoint(68, (0, 2, 5, 6, 65, 66)), LabelSchema.default(), source="a.pth")
        assert ids == (0, 2, 5, 6, 65, 66, *[0] * 62)
        class_map = np.arange(68, dtype=np.uint8)[None]
        assert channels_to_label_map(class_map, ids).tolist() == [[0, 2, 5, 6, 65, 66, *[0] * 62]]

    def test_mask_values_need_not_be_sorted(self) -> None:
        assert channel_ids(self.checkpoint(3, (66, 0, 2)), LabelSchema.default(), source="a.pth") == (66, 0, 2)

    @pytest.mark.parametrize(
        ("classes", "ids"), [(6, (0, 2, 5, 6, 65, 66)), (8, (0, 2, 5, 6, 65, 66, 0, 0)), (2, (0, 2))]
    )
    def test_without_mask_values_the_labels_give_the_order(self, classes: int, ids: tuple[int, ...]) -> None:
        assert channel_ids(self.checkpoint(classes, None), LabelSchema.default(), source="a.pth") == ids

    def test_ids_that_the_labels_lack(self) -> None:
        with pytest.raises(BundleError, match=r"a\.pth writes the label ids \[7, 9\], which the labels lack.*id: 7"):
            channel_ids(self.checkpoint(3, (9, 0, 7)), LabelSchema.default(), source="a.pth")

    def test_zero_must_be_a_label_when_channels_write_it(self) -> None:
        labels = LabelSchema.from_dict({"labels": [{"name": "a", "id": 2}]}, source="here")
        assert channel_ids(self.checkpoint(1, (2,)), labels, source="a.pth") == (2,)
        with pytest.raises(BundleError, match=r"writes the label ids \[0\], which the labels lack"):
            channel_ids(self.checkpoint(2, (2,)), labels, source="a.pth")
