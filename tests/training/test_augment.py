from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.frame import Azimuth
from training.augment import RollFlip, YawMirror, mirror, yaw
from training.sample.generate import render
from training.sample.scanner import Scanner

SIZE_HW = (64, 128)
CONVENTIONS = [
    Azimuth(direction=1, column_0=0.0),
    Azimuth(direction=-1, column_0=0.0),
    Azimuth(direction=1, column_0=90.0),
    Azimuth(direction=-1, column_0=217.3),
]
conventions = pytest.mark.parametrize("azimuth", CONVENTIONS, ids=str)


def directions(azimuth: Azimuth) -> NDArray[np.float64]:
    return Scanner(direction=azimuth.direction, column_0=azimuth.column_0).directions(SIZE_HW)


def facing(azimuth: Azimuth, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Random unit normals that face the scanner, some black, and a random class map."""
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(*SIZE_HW, 3))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    away = (normals * directions(azimuth)).sum(-1, keepdims=True) > 0
    image = (np.where(away, -normals, normals) * 0.5 + 0.5).astype(np.float32)
    image[rng.random(SIZE_HW) < 0.2] = 0
    return image, rng.integers(0, 6, SIZE_HW, dtype=np.uint8)


def against_view(image: NDArray[np.float32], azimuth: Azimuth) -> NDArray[np.float64]:
    """n·d of every return."""
    product = ((image * 2 - 1) * directions(azimuth)).sum(-1)
    return product[image.max(-1) > 0]


@pytest.mark.parametrize("columns", [1, 37, 96])
def test_yaw_is_what_a_turned_scanner_sees(columns: int) -> None:
    def scan(degrees: float) -> Any:
        return render(3, 1, width=128, noise=False, yaw=degrees)

    still, turned = scan(0.0), scan(-columns * 360 / 128)
    azimuth = Azimuth(direction=1, column_0=0.0)

    image, class_map = yaw(still.image.astype(np.float32) / 255, still.label_map, columns, azimuth)

    assert (class_map != turned.label_map).mean() < 0.005  # rays that graze an edge fall to either side
    off = np.abs(image * 255 - turned.image).max(-1) > 1.5  # each encoding rounds by half a step
    assert off.mean() < 0.01
    unturned = np.abs(np.roll(still.image, columns, axis=1).astype(np.float32) - turned.image).max(-1) > 1.5
    if columns > 1:
        assert unturned.mean() > 0.2  # a roll alone is not enough


@conventions
@pytest.mark.parametrize("columns", [0, 1, 50, 127])
def test_surfaces_still_face_the_scanner(azimuth: Azimuth, columns: int) -> None:
    image, class_map = facing(azimuth)
    assert against_view(image, azimuth).max() <= 1e-6

    turned = yaw(image, class_map, columns, azimuth)
    mirrored = mirror(*turned, azimuth)

    assert against_view(turned[0], azimuth).max() <= 1e-5
    assert against_view(mirrored[0], azimuth).max() <= 1e-5


@conventions
def test_only_the_right_convention_keeps_surfaces_facing(azimuth: Azimuth) -> None:
    wrong = Azimuth(direction=-azimuth.direction, column_0=azimuth.column_0)  # type: ignore[arg-type]

    assert against_view(yaw(*facing(azimuth), 32, wrong)[0], azimuth).max() > 0.5


@conventions
def test_yaw_turns_normals_with_the_picture(azimuth: Azimuth) -> None:
    image, class_map = facing(azimuth)

    turned, turned_map = yaw(image, class_map, 32, azimuth)

    quarter = azimuth.direction
    before = np.roll(image, 32, axis=1) * 2 - 1
    returned = turned.max(-1) > 0
    after = turned * 2 - 1
    np.testing.assert_allclose(after[returned][:, 0], -quarter * before[returned][:, 1], atol=1e-6)
    np.testing.assert_allclose(after[returned][:, 1], quarter * before[returned][:, 0], atol=1e-6)
    np.testing.assert_allclose(after[returned][:, 2], before[returned][:, 2], atol=1e-6)
    assert (turned_map == np.roll(class_map, 32, axis=1)).all()


@conventions
def test_mirror_twice_is_nothing(azimuth: Azimuth) -> None:
    image, class_map = facing(azimuth)

    once = mirror(image, class_map, azimuth)
    twice = mirror(*once, azimuth)

    assert (once[1] == class_map[:, ::-1]).all()
    np.testing.assert_allclose(twice[0], image, atol=1e-6)
    assert (twice[1] == class_map).all()


@conventions
def test_mirror_turns_yaw_around(azimuth: Azimuth) -> None:
    start = facing(azimuth)

    one_way = mirror(*yaw(*start, 21, azimuth), azimuth)
    other_way = yaw(*mirror(*start, azimuth), -21, azimuth)

    np.testing.assert_allclose(one_way[0], other_way[0], atol=1e-6)
    assert (one_way[1] == other_way[1]).all()


@conventions
def test_yaws_add_up(azimuth: Azimuth) -> None:
    start = facing(azimuth)

    twice, at_once = yaw(*yaw(*start, 30, azimuth), 100, azimuth), yaw(*start, 2, azimuth)

    np.testing.assert_allclose(twice[0], at_once[0], atol=1e-6)
    assert (twice[1] == at_once[1]).all()


@conventions
def test_black_stays_black(azimuth: Azimuth) -> None:
    image, class_map = facing(azimuth)
    image[:4] = 20 / 255  # JPEG noise in a black sky

    turned, _ = yaw(image, class_map, 10, azimuth)
    mirrored, _ = mirror(image, class_map, azimuth)

    black = image.max(-1) < 28 / 255
    assert (turned[np.roll(black, 10, axis=1)] == np.roll(image, 10, axis=1)[np.roll(black, 10, axis=1)]).all()
    assert (mirrored[black[:, ::-1]] == image[:, ::-1][black[:, ::-1]]).all()


def test_random_augmentation_covers_the_circle() -> None:
    azimuth = CONVENTIONS[0]
    image, _ = facing(azimuth)
    columns = np.broadcast_to(np.arange(128, dtype=np.uint8), SIZE_HW)
    augment = YawMirror(azimuth)
    seen = set()
    for seed in range(400):
        turned, moved = augment(image, columns, np.random.default_rng(seed))
        assert turned.shape == image.shape
        seen.add((int(moved[0, 0]), bool(moved[0, 1] == (int(moved[0, 0]) - 1) % 128)))
    again = augment(image, columns, np.random.default_rng(7))

    assert len({first for first, _ in seen}) > 100
    assert {mirrored for _, mirrored in seen} == {True, False}
    np.testing.assert_array_equal(again[0], augment(image, columns, np.random.default_rng(7))[0])


def test_colours_only_move() -> None:
    """In a picture of colours nothing is turned: each pixel keeps its colour and its class."""
    rng = np.random.default_rng(0)
    image = rng.random((8, 16, 3), np.float32)
    class_map = rng.integers(0, 6, (8, 16), np.uint8)
    pairs = {(tuple(pixel), int(index)) for pixel, index in zip(image.reshape(-1, 3), class_map.ravel(), strict=True)}

    moved, classes = RollFlip()(image, class_map, np.random.default_rng(3))

    assert not np.array_equal(moved, image)
    assert pairs == {(tuple(p), int(i)) for p, i in zip(moved.reshape(-1, 3), classes.ravel(), strict=True)}
