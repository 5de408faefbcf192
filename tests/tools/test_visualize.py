"""The verb `visualize`: what it writes, and how it refuses."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest
from sscloud.checkpoint import save_bundle
from sscloud.errors import BundleError, ConfigError, ImageError, SchemaError
from sscloud.image import read_image, write_label_map
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from tools.commands import visualize


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    visualize.add_arguments(parser)
    return visualize.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """imgs/, masks/ and predictions/ of three 64x128 scenes."""
    rng = np.random.default_rng(0)
    (tmp_path / "imgs").mkdir()
    for number in range(3):
        image = rng.integers(0, 256, (64, 128, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "imgs" / f"{number}_normals.jpg", quality=95)
        label_map = np.full((64, 128), 2, np.uint8)
        label_map[:30] = 0
        label_map[10:40, 20:60] = 6
        write_label_map(tmp_path / "masks" / f"{number}_normals.png", label_map)
        write_label_map(tmp_path / "predictions" / f"{number}_normals.png", np.roll(label_map, 5, axis=1))
    return tmp_path


def test_a_folder_with_masks_and_predictions(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = data / "out"
    args = (data / "imgs", "--mask", data / "masks", "--prediction", data / "predictions", "-o", output)
    assert run(*args, "--width", "800") == 0
    written = [output / f"{number}_normals_overlay.jpg" for number in range(3)]
    assert sorted(output.iterdir()) == written
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(path) for path in written]
    assert "warning" not in printed.err
    heights = {read_image(path).shape[0] for path in written}
    assert run(data / "imgs", "--mask", data / "masks", "-o", data / "masks only", "--width", "800") == 0
    assert read_image(data / "masks only" / "0_normals_overlay.jpg").shape[1] == 800
    assert read_image(data / "masks only" / "0_normals_overlay.jpg").shape[0] < min(heights)


def test_one_image_and_one_file(data: Path) -> None:
    prediction = data / "predictions" / "1_normals.png"
    assert run(data / "imgs" / "0_normals.jpg", "--prediction", prediction, "-o", data / "out") == 0
    assert (data / "out" / "0_normals_overlay.jpg").is_file()


def test_a_bundle_predicts_with_its_own_labels(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "labels.yaml").write_text("labels: [{name: not these, id: 9}]", encoding="utf-8")
    architecture = Architecture(classes=6, base_width=2)
    labels = LabelSchema.default()
    manifest = Manifest(
        name="tiny",
        version=1,
        architecture=architecture,
        labels=labels,
        label_ids=labels.class_ids,
        scale=0.5,
        resample="valid-area",
        encoding="normals",
        aspect=2.0,
        elevation=(90.0, -90.0),
    )
    torch.manual_seed(0)
    bundle = save_bundle(data / "bundle", UNet(architecture), manifest)
    assert run(data / "imgs", "--bundle", bundle.path, "--mask", data / "masks", "-o", data / "out") == 0
    assert len(list((data / "out").iterdir())) == 3
    assert "warning" not in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(data: Path) -> None:
    args = (data / "imgs", "--mask", data / "masks", "-o", data / "out")
    assert run(*args) == 0
    sheet = data / "out" / "2_normals_overlay.jpg"
    sheet.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"2_normals_overlay\.jpg already.*--overwrite"):
        run(*args)
    assert sheet.read_bytes() == b"mine"
    assert run(*args, "--overwrite") == 0
    assert sheet.read_bytes() != b"mine"


def test_missing_masks_are_named(data: Path) -> None:
    (data / "masks" / "1_normals.png").unlink()
    with pytest.raises(ConfigError, match=r"--mask: 1 of 3 images .*1_normals\.jpg"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out")
    assert not (data / "out").exists()


def test_many_missing_masks_are_counted(data: Path) -> None:
    for number in range(20):
        Image.new("RGB", (8, 8)).save(data / "imgs" / f"extra{number}.png")
    with pytest.raises(ConfigError, match=r"20 of 23 images .* and 10 more"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out")


def test_differing_sizes_are_named_before_anything_is_written(data: Path) -> None:
    write_label_map(data / "masks" / "2_normals.png", np.zeros((64, 100), np.uint8))
    with pytest.raises(ImageError, match=r"2_normals\.jpg is 128x64 but .*2_normals\.png is 100x64"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out")
    assert not (data / "out").exists()


def test_unknown_ids_are_drawn_grey_with_a_warning(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_map = np.full((64, 128), 2, np.uint8)
    label_map[0, :7] = 17
    write_label_map(data / "masks" / "0_normals.png", label_map)
    assert run(data / "imgs", "--mask", data / "masks", "-o", data / "out") == 0
    assert "ids without a label, drawn grey: 17 (7 pixels)" in capsys.readouterr().err


def test_labels_beside_the_images_are_used(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "labels.yaml").write_text('labels: [{name: Луг, id: 2, color: "#00ff00"}]', encoding="utf-8")
    assert run(data / "imgs", "--mask", data / "masks", "-o", data / "out") == 0
    printed = capsys.readouterr().err
    assert f"labels: {data / 'labels.yaml'}" in printed
    assert "6 (3600 pixels)" in printed


def test_given_labels_win(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "labels.yaml").write_text("labels: [{name: Луг, id: 2}]", encoding="utf-8")
    (data / "mine.yaml").write_text("labels: [{name: a, id: 0}, {name: b, id: 2}, {name: c, id: 6}]", encoding="utf-8")
    assert run(data / "imgs", "--mask", data / "masks", "-o", data / "out", "--labels", data / "mine.yaml") == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imgs"], "nothing to draw"),
        (["imgs", "--prediction", "predictions", "--bundle", "b"], "Both --prediction and --bundle"),
        (["nowhere", "--mask", "masks"], "no image or folder .*nowhere"),
        (["empty", "--mask", "masks"], "holds no images"),
        (["imgs", "--mask", "nowhere"], "--mask: there is no file or folder"),
        (["imgs", "--mask", "masks/0_normals.png"], "is one file, but there are 3 images"),
        (["imgs", "imgs/0_normals.jpg", "--mask", "masks"], "Several images are named 0_normals"),
        (["imgs", "--mask", "masks", "--width", "100"], "takes 480 to 8192"),
        (["imgs", "--mask", "masks", "--alpha", "2"], "opacity is 2"),
        (["imgs", "--mask", "masks", "-o", "labels.txt"], "is a file"),
        (["imgs", "--mask", "double"], "several files named"),
    ],
)
def test_bad_settings(data: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(data)
    (data / "empty").mkdir()
    (data / "labels.txt").write_text("x")
    for number in range(3):
        for suffix in (".png", ".bmp"):
            (data / "double").mkdir(exist_ok=True)
            Image.new("L", (128, 64)).save(data / "double" / f"{number}_normals{suffix}")
    with pytest.raises(ConfigError, match=message):
        run("-o", "out", *words)
    assert not (data / "out").exists()


def test_a_color_picture_is_no_mask(data: Path) -> None:
    Image.new("RGB", (128, 64)).save(data / "masks" / "0_normals.png")
    with pytest.raises(ImageError, match=r"0_normals\.png"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out")


def test_a_broken_image_is_named(data: Path) -> None:
    (data / "imgs" / "1_normals.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(ImageError, match=r"1_normals\.jpg"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out")


def test_missing_labels_and_bundles_are_told(data: Path) -> None:
    with pytest.raises(SchemaError, match=r"none\.yaml"):
        run(data / "imgs", "--mask", data / "masks", "-o", data / "out", "--labels", data / "none.yaml")
    with pytest.raises(BundleError, match="nowhere"):
        run(data / "imgs", "--bundle", data / "nowhere", "-o", data / "out")
