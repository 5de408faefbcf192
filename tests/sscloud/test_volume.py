"""The model volume: written by people's commands, which may be killed, and read by functions, which trust nothing."""

import dataclasses
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sscloud.volume
from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError, ConfigError
from sscloud.image import read_image, read_label_map
from sscloud.inference import Predictor
from sscloud.room import panelled_room, room
from sscloud.unet import UNet
from sscloud.volume import (
    BUNDLE,
    CHECK,
    EXPECTED,
    LARGEST_DIFFERENCE,
    POINTER,
    Pointer,
    copy_out,
    drawn_labels,
    fingerprint,
    folder_name,
    parse_pointer,
    point,
    pointed,
    publish,
    published_manifest,
    read_pointer,
    retire,
    run_check,
)

SHA = "0123456789abcdef" * 4
POINTS = {"format": 1, "bundle": "street-v3-1a2b3c4d5e6f", "weights_sha256": SHA, "published": "2026-11-23T10:20:30Z"}


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> list[ModelBundle]:
    folder = tmp_path_factory.mktemp("versions")
    models = [make_unet(seed=seed) for seed in (1, 2)]
    return [
        save_bundle(folder / str(number), model, make_manifest(model.architecture, name="street", version=number))
        for number, model in enumerate(models, 1)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bundles: list[ModelBundle]) -> Path:
    """A volume with both versions that points at the first. Not to be changed."""
    volume = tmp_path_factory.mktemp("volumes") / "served"
    first, _ = [publish(volume, bundle) for bundle in bundles]
    point(volume, first)
    return volume


@pytest.fixture
def volume(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "served"))


def names(volume: Path) -> list[str]:
    return sorted(path.name for path in volume.iterdir() if path.name != ".lock")


class TestPublish:
    def test_a_version(self, made: Path, bundles: list[ModelBundle]) -> None:
        first, second = (folder_name(bundle) for bundle in bundles)
        assert first.startswith("street-v1-")
        assert names(made) == sorted([first, second, POINTER])
        assert sorted(path.name for path in (made / first).rglob("*")) == sorted(
            [BUNDLE, MANIFEST, WEIGHTS, CHECK, EXPECTED]
        )
        for file in (MANIFEST, WEIGHTS):
            assert (made / first / BUNDLE / file).read_bytes() == (bundles[0].path / file).read_bytes()
        now = pointed(made)
        assert now is not None
        assert (now.bundle, now.weights_sha256) == (first, bundles[0].manifest.weights_sha256)
        assert published_manifest(made, first) == bundles[0].manifest

    def test_the_check_is_what_the_model_sees(self, made: Path, bundles: list[ModelBundle]) -> None:
        folder = made / folder_name(bundles[0])
        image, expected = read_image(folder / CHECK), read_label_map(folder / EXPECTED)
        found = Predictor(bundles[0], device="cpu", precision="fp32").predict(image)
        assert found.wrapped
        np.testing.assert_array_equal(found.label_map, expected)
        assert len(np.unique(expected)) > 2, "a check that is one label all over would find little"

    def test_once_more_changes_nothing(self, volume: Path, bundles: list[ModelBundle]) -> None:
        before = {path: path.stat().st_mtime_ns for path in volume.rglob("*") if path.is_file()}
        first = publish(volume, bundles[0])
        point(volume, first)
        assert {path: path.stat().st_mtime_ns for path in volume.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize("file", [f"{BUNDLE}/{WEIGHTS}", f"{BUNDLE}/{MANIFEST}", CHECK, EXPECTED])
    def test_a_damaged_version_is_made_again(self, volume: Path, bundles: list[ModelBundle], file: str) -> None:
        damaged = volume / folder_name(bundles[0]) / file
        whole = damaged.read_bytes()
        damaged.unlink()
        publish(volume, bundles[0])
        assert damaged.read_bytes() == whole

    def test_names_are_safe_and_differ(self, bundles: list[ModelBundle], tmp_path: Path) -> None:
        found = set()
        for number, name in enumerate(["Улица", "../..", "a" * 200, "Street № 5/б", ".hidden", "con\n"]):
            path = tmp_path / str(number)
            path.mkdir()
            manifest = dataclasses.replace(bundles[0].manifest, name=name)
            (path / MANIFEST).write_text(json.dumps(manifest.to_dict()), encoding="utf-8")
            folder = folder_name(ModelBundle(path=path, manifest=manifest))
            found.add(folder)
            parse_pointer(json.dumps({**POINTS, "bundle": folder}).encode(), source="test")
            assert len(folder) < 100
        assert len(found) == 6

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_numbers_that_are_not_finite(
        self, tmp_path: Path, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
    ) -> None:
        model = make_unet()
        with torch.no_grad():
            model.outc.conv.weight *= 1e37
        bundle = save_bundle(tmp_path / "broken", model, make_manifest(model.architecture))
        with pytest.raises(BundleError, match="not finite for the test panorama"):
            publish(tmp_path / "served", bundle)
        assert names(tmp_path / "served") == []

    def test_two_at_once(self, tmp_path: Path, bundles: list[ModelBundle]) -> None:
        with ThreadPoolExecutor(4) as pool:
            published = list(pool.map(lambda bundle: publish(tmp_path, bundle), [*bundles, *bundles]))
        assert names(tmp_path) == sorted(set(published))

    def test_a_volume_that_cannot_be_written(self, tmp_path: Path, bundles: list[ModelBundle]) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"The model volume .*file cannot be written"):
            publish(tmp_path / "file", bundles[0])


class TestKills:
    def test_a_kill_at_any_step(
        self, made: Path, tmp_path: Path, bundles: list[ModelBundle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Functions go on with a whole version, and the next publish leaves what an undisturbed one does."""
        first, second = (folder_name(bundle) for bundle in bundles)
        known = Predictor(bundles[1], device="cpu").predict(read_image(made / second / CHECK))

        class Known:
            def __init__(self, bundle: ModelBundle, **_: Any) -> None:
                pass

            def predict(self, image: Any) -> Any:
                return known

        monkeypatch.setattr(sscloud.volume, "Predictor", Known)  # PyTorch's threads do not survive a fork

        def swing(volume: Path) -> None:
            point(volume, publish(volume, bundles[1]))

        steps, ends = 0, set()
        while "whole" not in ends:
            steps += 1
            volume = Path(shutil.copytree(made, tmp_path / str(steps)))
            shutil.rmtree(volume / second)
            if not killed_at(steps, lambda volume=volume: swing(volume)):
                ends.add("whole")
            now = pointed(volume)
            assert now is not None
            assert now.bundle in (first, second)
            ends.add(now.bundle)
            (tmp_path / f"{steps}-copy").mkdir()
            copy_out(volume, now, tmp_path / f"{steps}-copy")
            swing(volume)
            assert names(volume) == names(made)
            after = pointed(volume)
            assert after is not None
            assert after.bundle == second
            shutil.rmtree(volume)
        assert steps > 10
        assert ends == {first, second, "whole"}


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Run something in a process that ends at its n-th change of the file system; whether it got that far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads is forked
        child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.utime"):
                left -= 1
                if left == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


class TestPointer:
    def test_what_it_says(self) -> None:
        assert parse_pointer(json.dumps(POINTS).encode(), source="test") == Pointer(
            bundle=str(POINTS["bundle"]), weights_sha256=SHA, published=str(POINTS["published"])
        )

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "not valid JSON"),
            (b"\xff\xfe", "not valid JSON"),
            (b"[" * 60_000, "not valid JSON"),
            (b"[]", "expected an object with format"),
            (b"{}", "expected an object with format"),
            ({**POINTS, "more": 1}, "expected an object with format"),
            ({**POINTS, "format": 2}, "format 2; this version"),
            ({**POINTS, "format": True}, "format True"),
            ({**POINTS, "bundle": "../../etc"}, "'bundle' must be the name"),
            ({**POINTS, "bundle": "/street-v3-1a2b3c4d5e6f"}, "'bundle' must be the name"),
            ({**POINTS, "bundle": "street-v3-1a2b3c4d5e6f/.."}, "'bundle' must be the name"),
            ({**POINTS, "bundle": "street-v3-1a2b3c4d5e6f\n"}, "'bundle' must be the name"),
            ({**POINTS, "bundle": "street-v٣-1a2b3c4d5e6f"}, "'bundle' must be the name"),
            ({**POINTS, "bundle": ["street"]}, "'bundle' must be the name"),
            ({**POINTS, "weights_sha256": SHA[:-1]}, "'weights_sha256' must be"),
            ({**POINTS, "weights_sha256": None}, "'weights_sha256' must be"),
            ({**POINTS, "published": 5}, "'published' must be"),
        ],
    )
    def test_anything_else(self, volume: Path, data: bytes | dict[str, Any], message: str) -> None:
        (volume / POINTER).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        with pytest.raises(BundleError, match=message):
            pointed(volume)

    def test_none_yet(self, tmp_path: Path) -> None:
        assert pointed(tmp_path) is None
        assert pointed(tmp_path / "nowhere") is None

    def test_a_huge_one(self, volume: Path) -> None:
        (volume / POINTER).write_bytes(b" " * 70_000)
        with pytest.raises(BundleError, match="larger than 64 KiB"):
            pointed(volume)

    def test_pointing_replaces_a_damaged_one(self, volume: Path, bundles: list[ModelBundle]) -> None:
        (volume / POINTER).write_bytes(b"{")
        point(volume, folder_name(bundles[1]))
        now = pointed(volume)
        assert now is not None
        assert now.bundle == folder_name(bundles[1])

    @pytest.mark.parametrize("folder", ["street-v9-0123456789ab", "../served", ""])
    def test_pointing_at_nothing(self, volume: Path, folder: str) -> None:
        before = read_pointer(volume)
        with pytest.raises(BundleError, match=r"cannot be read|is no name"):
            point(volume, folder)
        assert read_pointer(volume) == before


class TestHostile:
    """Somebody else may write the volume too."""

    def take(self, volume: Path, tmp_path: Path) -> None:
        now = pointed(volume)
        assert now is not None
        (tmp_path / "copy").mkdir()
        copy_out(volume, now, tmp_path / "copy")

    def test_links_out_of_it(self, volume: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        folder = volume / folder_name(bundles[0])
        for path in (folder / BUNDLE / WEIGHTS, folder / CHECK, folder / BUNDLE, folder, volume / POINTER):
            elsewhere = tmp_path / "elsewhere"
            path.rename(elsewhere)
            path.symlink_to(elsewhere)
            with pytest.raises(BundleError, match="is a link"):
                self.take(volume, tmp_path)
            path.unlink()
            elsewhere.rename(path)
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        self.take(volume, tmp_path)

    @pytest.mark.timeout(10)
    def test_a_pipe(self, volume: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        """Nobody waits for its other end."""
        file = volume / folder_name(bundles[0]) / CHECK
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(BundleError, match="is no plain file"):
            self.take(volume, tmp_path)

    def test_other_weights_than_it_means(self, volume: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        first, second = (volume / folder_name(bundle) for bundle in bundles)
        shutil.rmtree(first)
        second.rename(first)
        with pytest.raises(BundleError, match=r"holds other weights .* than champion\.json means"):
            self.take(volume, tmp_path)

    def test_a_damaged_check(self, volume: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        (volume / folder_name(bundles[0]) / EXPECTED).write_bytes(b"no picture")
        now = pointed(volume)
        assert now is not None
        published = copy_out(volume, now, tmp_path)
        with pytest.raises(BundleError, match="street v1: its check cannot be used"):
            run_check(published, Predictor(published.bundle, device="cpu"))

    def test_a_version_that_is_not_there(self, volume: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        shutil.rmtree(volume / folder_name(bundles[0]))
        with pytest.raises(FileNotFoundError):
            self.take(volume, tmp_path)
        assert fingerprint(volume, folder_name(bundles[0])) == (None,) * 4


class TestCheck:
    @pytest.mark.parametrize(("backend", "precision"), [("torch", "bf16"), ("openvino", "fp32"), ("openvino", "auto")])
    def test_another_arithmetic_passes(
        self, made: Path, bundles: list[ModelBundle], tmp_path: Path, backend: Any, precision: Any
    ) -> None:
        now = pointed(made)
        assert now is not None
        published = copy_out(made, now, tmp_path)
        predictor = Predictor(published.bundle, device="cpu", backend=backend, precision=precision)
        assert run_check(published, predictor) < LARGEST_DIFFERENCE / 2

    def test_another_model_does_not(self, made: Path, bundles: list[ModelBundle], tmp_path: Path) -> None:
        now = pointed(made)
        assert now is not None
        published = copy_out(made, now, tmp_path)
        with pytest.raises(BundleError, match=r"[0-9.]+% of the test panorama's pixels get another label"):
            run_check(published, Predictor(bundles[1], device="cpu"))


class TestRetire:
    def test_the_oldest_go(self, volume: Path, bundles: list[ModelBundle]) -> None:
        first, second = (folder_name(bundle) for bundle in bundles)
        older = [f"street-v{number}-{number:012x}" for number in range(3, 7)]
        for age, name in enumerate(older, 1):
            shutil.copytree(volume / second, volume / name)
            os.utime(volume / name, (1e9 - age, 1e9 - age))
        (volume / "notes").mkdir()
        os.utime(volume / first, (1, 1))
        assert retire(volume, keep=3, spare={older[3]}) == sorted(older[1:3])
        assert names(volume) == sorted([POINTER, "notes", first, second, older[0], older[3]])

    def test_the_pointed_one_stays(self, volume: Path, bundles: list[ModelBundle]) -> None:
        os.utime(volume / folder_name(bundles[0]), (1, 1))
        assert retire(volume, keep=0) == [folder_name(bundles[1])]
        assert names(volume) == sorted([POINTER, folder_name(bundles[0])])

    def test_not_when_nobody_knows_which_is_in_use(self, volume: Path) -> None:
        (volume / POINTER).write_bytes(b"{")
        with pytest.raises(BundleError, match="not valid JSON"):
            retire(volume, keep=1)
        assert len(names(volume)) == 3


def test_labels_that_are_drawn(bundles: list[ModelBundle]) -> None:
    assert drawn_labels(bundles[0].manifest) == {"Земля", "Растительность", "Здание", "Конструкции", "Обстановка"}


def test_the_panelled_room() -> None:
    pixels = panelled_room((64, 128))
    bare = (pixels == room((64, 128))).all(axis=-1).mean()
    assert pixels.shape == (64, 128, 3)
    assert pixels.dtype == np.uint8
    assert 0.3 < bare < 0.5
    assert 0.05 < (pixels == 0).all(axis=-1).mean() < 0.2
    normals = pixels[(pixels > 0).any(axis=-1)] / 255 * 2 - 1
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=0.02)
