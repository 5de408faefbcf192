"""`sscloud predict`: images and folders → label-id PNGs."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.bundle import ModelBundle
from sscloud.image import read_image, read_label_map
from sscloud.inference import Predictor, Segmentation
from tools.cli import main
from tools.commands.predict import predict_files
from tools.inputs import list_images


@pytest.fixture
def scans(tmp_path: Path, make_panorama: Callable[..., NDArray[np.uint8]]) -> Path:
    folder = tmp_path / "съёмка"
    folder.mkdir()
    for seed, name in enumerate(("1_normals.png", "2_normals.PNG", ".hidden.png")):
        Image.fromarray(make_panorama(seed=seed)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder(scans: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(["predict", str(tiny_bundle.path), str(scans), "-o", str(output), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"2 label map(s) in {output}\n"
    assert sorted(path.name for path in output.iterdir()) == ["1_normals.png", "2_normals.png"]
    predictor = Predictor(tiny_bundle, device="cpu")
    for name, image in (("1_normals.png", "1_normals.png"), ("2_normals.png", "2_normals.PNG")):
        assert np.array_equal(read_label_map(output / name), predictor.predict_file(scans / image).label_map)


def test_single_images(scans: Path, tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    arguments = ["predict", str(tiny_bundle.path), str(scans / "1_normals.png"), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1_normals.png"]
    values = np.unique(read_label_map(tmp_path / "out" / "1_normals.png"))
    assert set(values.tolist()) <= {0, 2, 5, 6, 65, 66}


def test_nothing_is_overwritten_unasked(
    scans: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "2_normals.png").write_bytes(b"corrected by hand")
    arguments = ["predict", str(tiny_bundle.path), str(scans), "-o", str(output)]
    assert main(arguments) == 2
    assert "2_normals.png exists already (1 such file(s)). Add --overwrite" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["2_normals.png"]
    assert (output / "2_normals.png").read_bytes() == b"corrected by hand"
    assert main([*arguments, "--overwrite"]) == 0
    assert read_label_map(output / "2_normals.png").shape == (64, 128)


def test_broken_images_are_named_and_the_others_predicted(
    scans: Path, tiny_bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though each is read while the model works on another one."""
    (scans / "1b_normals.png").write_bytes(b"hello")
    Image.new("RGB", (16, 8)).save(scans / "0_small.png")
    output = tmp_path / "out"
    assert main(["predict", str(tiny_bundle.path), str(scans), "-o", str(output)]) == 2
    err = capsys.readouterr().err
    assert "1b_normals.png: These 5 bytes are not a picture" in err
    assert "0_small.png: The image is 16x8 pixels, too small" in err
    assert f"2 label map(s) of the other images are in {output}." in err
    assert sorted(path.name for path in output.iterdir()) == ["1_normals.png", "2_normals.png"]


def test_the_next_image_is_read_while_the_model_works(
    scans: Path, tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [threading.Event(), threading.Event()]
    images, waits = list_images([scans]), iter([begun[1]])

    def read(path: Path) -> NDArray[np.uint8]:
        begun[images.index(path)].set()
        return read_image(path)

    class Patient(Predictor):
        def predict(self, *args: Any, **options: Any) -> Segmentation:
            if (event := next(waits, None)) is not None:
                assert event.wait(10)
            return super().predict(*args, **options)

    monkeypatch.setattr("sscloud.image.read_image", read)
    predictor = Patient(tiny_bundle, device="cpu")
    predict_files(predictor, images, [tmp_path / f"{image.stem}.png" for image in images], overwrite=False)
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["no.png"], "There is no image"),
        (["empty"], "empty holds no images"),
        (["съёмка/1_normals.png", "other/1_normals.png"], "would be written to the same file: 1_normals.png"),
        (["other/broken.png"], "broken.png: These 5 bytes are not a picture"),
        (["other/small.png"], "small.png: The image is 16x8 pixels, too small"),
    ],
)
def test_wrong_images(
    scans: Path,
    tiny_bundle: ModelBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    Image.new("RGB", (128, 64)).save(tmp_path / "other" / "1_normals.png")
    Image.new("RGB", (16, 8)).save(tmp_path / "other" / "small.png")
    (tmp_path / "other" / "broken.png").write_bytes(b"hello")
    paths = [str(tmp_path / image) for image in images]
    assert main(["predict", str(tiny_bundle.path), *paths, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "message"), [(("--device", "abacus"), "The device 'abacus' cannot be used here")])
def test_wrong_device(
    scans: Path,
    tiny_bundle: ModelBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    assert main(["predict", str(tiny_bundle.path), str(scans), "-o", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
