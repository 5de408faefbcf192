import argparse
import functools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from sscloud.labels import LabelSchema
from tools.commands import sample
from training.sample import generate as module
from training.sample.generate import generate, panorama_size, render
from training.sample.scanner import Scanner

WIDTH = 128

seen = functools.cache(render)
"""Scans that several tests look at."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("width", "elevation", "size_hw"),
    [
        (2048, (90.0, -90.0), (1024, 2048)),
        (8192, (90.0, -90.0), (4096, 8192)),
        (1200, (90.0, -60.0), (500, 1200)),
        (128, (90.0, -60.0), (54, 128)),
        (1000, (40.0, -30.0), (194, 1000)),
    ],
)
def test_size_follows_from_the_elevation(width: int, elevation: tuple[float, float], size_hw: tuple[int, int]) -> None:
    assert panorama_size(width, elevation) == size_hw


@pytest.mark.parametrize("width", [0, -2, 62, 127, 8194])
def test_impossible_width(width: int) -> None:
    with pytest.raises(ConfigError, match=r"The width is -?\d+ pixels; expected an even number from 64 to 8192"):
        panorama_size(width, (90, -90))


@pytest.mark.parametrize("elevation", [(-60, 90), (0, 0), (91, 0), (90, -91), (float("nan"), 0)])
def test_impossible_elevation(elevation: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"expected 90 >= top > bottom >= -90. Give the top first"):
        panorama_size(128, elevation)


def test_too_narrow_elevation() -> None:
    with pytest.raises(ConfigError, match=r"leave 2 rows; expected 16 or more"):
        panorama_size(128, (10, 5))


def test_render_has_documented_shapes() -> None:
    scan = seen(1, 1, width=WIDTH, elevation=(90, -60))

    assert (scan.image.shape, scan.image.dtype) == ((54, 128, 3), np.uint8)
    assert (scan.label_map.shape, scan.label_map.dtype) == ((54, 128), np.uint8)
    assert (scan.range_m.shape, scan.range_m.dtype) == ((54, 128), np.float32)
    assert set(np.unique(scan.label_map)) <= {0, 2, 5, 6, 65, 66}


def test_render_refuses_negative_seeds() -> None:
    with pytest.raises(ConfigError, match=r"The seed is -1 and the index 1; expected 0 or more"):
        render(-1, 1, width=WIDTH)


def test_same_arguments_same_bytes() -> None:
    first, again = seen(1, 1, width=WIDTH), render(1, 1, width=WIDTH)

    assert (first.image == again.image).all()
    assert (first.label_map == again.label_map).all()
    assert (first.range_m == again.range_m).all()


def test_scene_does_not_depend_on_size_or_elevation() -> None:
    small, large = (seen(1, 1, width=width, noise=False) for width in (WIDTH, 3 * WIDTH))
    upper = render(1, 1, width=WIDTH, elevation=(90, 0), noise=False)

    # With three times the pixels, the middle one of three looks where the coarse pixel looks.
    assert (small.label_map == large.label_map[1::3, 1::3]).mean() > 0.97
    np.testing.assert_array_equal(small.image[:31], upper.image[:31])


@pytest.mark.parametrize("index", [1, 2])
def test_turning_the_scanner_rolls_columns_and_turns_normals(index: int) -> None:
    columns = 40
    angle = 2 * np.pi * columns / WIDTH
    plain = seen(1, index, width=WIDTH, noise=False)

    turned = render(1, index, width=WIDTH, noise=False, yaw=np.degrees(angle))

    rolled = np.roll(plain.image, -columns, axis=1).astype(float) / 255 * 2 - 1
    x, y, z = np.moveaxis(rolled, -1, 0)
    rotated = np.stack([np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x, z], -1)
    expected = np.rint((rotated * 0.5 + 0.5) * 255)
    returned = np.roll(plain.range_m, -columns, axis=1) > 0
    close = np.abs(turned.image.astype(float) - expected).max(-1) <= 2
    # Rays differ in the last bit: at the rims of thin things a few of them hit something else.
    assert ((turned.range_m > 0) == returned).mean() > 0.995
    assert close[returned].mean() > 0.99
    assert (turned.label_map == np.roll(plain.label_map, -columns, axis=1)).mean() > 0.995


@pytest.mark.parametrize("noise", [False, True])
def test_visible_normals_face_the_scanner(noise: bool) -> None:
    directions = Scanner().directions((WIDTH // 2, WIDTH))
    for index in (1, 2):
        scan = seen(1, index, width=WIDTH, noise=noise)
        returned = scan.range_m > 0

        normals = scan.image[returned] / 255 * 2 - 1

        assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 0.01
        # A hundredth towards the scanner, less half a level of rounding in each channel.
        assert (normals * directions[returned]).sum(-1).max() < 0.0


def test_no_return_is_black_and_nothing_else_is() -> None:
    scan = seen(1, 3, width=WIDTH)

    assert ((scan.image == 0).all(-1) == (scan.range_m == 0)).all()
    sky = scan.label_map == 0
    assert (scan.image[sky] == 0).all()
    # Glass, drop-outs and gaps in crowns are black, and yet belong to something.
    assert ((scan.range_m == 0) & ~sky).any()


def test_blind_cone_is_black_background() -> None:
    scan = render(1, 3, width=180)

    assert (scan.label_map[75:] == 0).all()
    assert (scan.image[75:] == 0).all()
    assert (scan.label_map[74] != 0).mean() > 0.9


@pytest.mark.slow
def test_classes_are_as_unbalanced_as_in_life() -> None:
    shares = {label_id: [] for label_id in (0, 2, 5, 6, 65, 66)}
    for index in range(1, 10):
        label_map = seen(1, index, width=WIDTH).label_map
        for label_id, values in shares.items():
            values.append(float((label_map == label_id).mean()))

    mean = {label_id: np.mean(values) for label_id, values in shares.items()}

    assert 0.02 < mean[65] + mean[66] < 0.07
    assert mean[0] > 0.35
    assert all(mean[label_id] > 0.03 for label_id in (2, 5, 6))
    assert all(np.median(values) > 0 for values in shares.values())


def test_dataset_layout(tmp_path: Path) -> None:
    output = tmp_path / "Сканы двора" / "Набор 1"

    generate(output, count=2, seed=1, width=WIDTH, elevation=(90, -60))

    assert set(files(output)) == {
        "imgs/1_normals.jpg",
        "imgs/2_normals.jpg",
        "masks/1_normals.png",
        "masks/2_normals.png",
        "labels.yaml",
        "dataset.yaml",
    }
    assert yaml.safe_load((output / "dataset.yaml").read_text(encoding="utf-8")) == {
        "encoding": "normals",
        "elevation": [90.0, -60.0],
        "azimuth": {"direction": 1, "column_0": 0.0},
    }
    assert LabelSchema.from_yaml(output / "labels.yaml") == LabelSchema.default()
    scan = render(1, 2, width=WIDTH, elevation=(90, -60))
    with Image.open(output / "masks" / "2_normals.png") as mask:
        assert mask.mode == "L"
        assert (np.asarray(mask) == scan.label_map).all()
    with Image.open(output / "imgs" / "2_normals.jpg") as image:
        assert image.size == (128, 54)
        assert np.abs(np.asarray(image, float) - scan.image).mean() < 20


@pytest.mark.slow
def test_two_goes_equal_one(tmp_path: Path) -> None:
    generate(tmp_path / "one", count=2, seed=3, width=WIDTH)
    generate(tmp_path / "two", count=1, seed=3, width=WIDTH)
    generate(tmp_path / "two", count=1, seed=3, width=WIDTH, first=2, overwrite=True)

    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_archives_hold_the_same_panoramas(tmp_path: Path) -> None:
    generate(tmp_path, count=2, seed=3, width=WIDTH, archive=True)

    for name in ("labelme-3-0.zip", "cvat-for-images-1-1.zip"):
        with zipfile.ZipFile(tmp_path / "archives" / name) as archive:
            images = {Path(entry).name: archive.read(entry) for entry in archive.namelist() if entry.endswith(".jpg")}
        assert images == {path.name: path.read_bytes() for path in (tmp_path / "imgs").iterdir()}


def test_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "мой файл.txt").write_text("важно", encoding="utf-8")

    with pytest.raises(ConfigError, match=r"is not empty. Name another folder, or add --overwrite"):
        generate(tmp_path, count=1, seed=1, width=WIDTH)

    assert set(files(tmp_path)) == {"мой файл.txt"}
    generate(tmp_path, count=1, seed=1, width=WIDTH, overwrite=True)
    assert "мой файл.txt" in files(tmp_path)


def test_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"is a file; expected a folder"):
        generate(tmp_path / "file", count=1, seed=1, width=WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "The count is 0"),
        ({"first": 0}, "the first number 0"),
        ({"seed": -1}, "The seed is -1"),
        ({"width": 9000}, "The width is 9000 pixels"),
        ({"elevation": (-60, 90)}, "runs from -60 to 90 degrees"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path: Path, options: dict[str, int], message: str) -> None:
    arguments = {"count": 1, "seed": 1, "width": WIDTH, **options}

    with pytest.raises(ConfigError, match=message):
        generate(tmp_path / "out", **arguments)  # type: ignore[arg-type]

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calls", [2, 3])
def test_interruption_leaves_whole_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    written = []

    def interrupted(path: Path, data: bytes) -> None:
        if len(written) == calls:
            raise KeyboardInterrupt
        written.append(path)
        atomic_write(path, data)

    generate(tmp_path, count=1, seed=1, width=WIDTH)
    monkeypatch.setattr(module, "atomic_write", interrupted)

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, count=1, seed=1, width=WIDTH, first=2, overwrite=True)

    assert set(files(tmp_path / "imgs")) == {"1_normals.jpg"}
    assert set(files(tmp_path / "masks")) == {"1_normals.png"}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    arguments = parser.parse_args(
        [str(tmp_path / "данные"), "--count", "1", "--width", "128", "--elevation", "90", "-60"]
    )

    assert sample.run(arguments) == 0

    assert "данные: 1 panoramas" in capsys.readouterr().out
    assert (tmp_path / "данные" / "imgs" / "1_normals.jpg").exists()


@pytest.mark.slow
def test_full_size() -> None:
    import resource

    scan = render(1, 3, width=8192)

    assert scan.image.shape == (4096, 8192, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 1024 * 1024
