"""Frames of normals: against rotations and reflections written down with complex numbers."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.frame import Azimuth, reflect_normals, rotate_normals, to_view_frame
from sscloud.image import no_return

MakePanorama = Callable[..., NDArray[np.uint8]]

CONVENTIONS = [
    Azimuth(direction=1, column_0=0.0),
    Azimuth(direction=-1, column_0=90.0),
    Azimuth(direction=1, column_0=217.3),
]
conventions = pytest.mark.parametrize("azimuth", CONVENTIONS, ids=str)


def horizontal(image: NDArray[np.uint8]) -> NDArray[np.complex128]:
    """(H, W) nx + i·ny, in steps of the encoding."""
    x, y = (image[..., channel].astype(float) - 127.5 for channel in (0, 1))
    return x + 1j * y


def off(image: NDArray[np.uint8], expected: NDArray[np.complex128]) -> float:
    """The largest distance along x or y, of returns."""
    difference = (horizontal(image) - expected)[~no_return(image)]
    return float(max(np.abs(difference.real).max(), np.abs(difference.imag).max()))


class TestAzimuth:
    def test_of_columns(self) -> None:
        found = np.degrees(Azimuth(direction=1, column_0=10.0).of_columns(4))
        np.testing.assert_allclose(found, [55, 145, 235, 325])
        found = np.degrees(Azimuth(direction=-1, column_0=10.0).of_columns(4))
        np.testing.assert_allclose(found, [-35, -125, -215, -305])


class TestRotate:
    @pytest.mark.parametrize("degrees", [0.0, 90.0, -33.3])
    def test_turns_counter_clockwise(self, make_panorama: MakePanorama, degrees: float) -> None:
        image = make_panorama()

        turned = rotate_normals(image, np.radians(degrees))

        assert turned.shape == image.shape
        assert turned.dtype == np.uint8
        assert off(turned, horizontal(image) * np.exp(1j * np.radians(degrees))) <= 0.5001
        assert np.array_equal(turned[..., 2], image[..., 2])

    def test_black_stays_as_it_is(self, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        image[:4] = 20  # JPEG noise in a black sky
        black = no_return(image)
        assert 0.1 < black.mean() < 0.5

        for changed in (rotate_normals(image, 1.0), reflect_normals(image, 20.0), to_view_frame(image, CONVENTIONS[2])):
            assert np.array_equal(changed[black], image[black])
            assert not np.array_equal(changed, image)

    def test_leaves_its_input_alone(self, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        before = image.copy()
        rotate_normals(image, 1.0)
        reflect_normals(image, 1.0)
        assert np.array_equal(image, before)


class TestReflect:
    @pytest.mark.parametrize("degrees", [0.0, 90.0, 217.3])
    def test_at_the_plane_through_an_azimuth(self, make_panorama: MakePanorama, degrees: float) -> None:
        image = make_panorama()

        reflected = reflect_normals(image, degrees)

        along = np.exp(1j * np.radians(degrees))
        assert off(reflected, (horizontal(image) / along).conj() * along) <= 0.5001

    def test_at_azimuth_0_negates_y(self, make_panorama: MakePanorama) -> None:
        image = make_panorama(black=0)
        reflected = reflect_normals(image, 0.0)
        assert np.array_equal(reflected[..., 1], 255 - image[..., 1])
        assert np.array_equal(reflected[..., [0, 2]], image[..., [0, 2]])


class TestViewFrame:
    @conventions
    def test_what_faces_the_scanner_points_along_minus_x(self, azimuth: Azimuth) -> None:
        angle = azimuth.of_columns(128)
        normals = np.stack([-np.cos(angle), -np.sin(angle), np.zeros(128)], -1)
        image = np.rint((np.broadcast_to(normals, (4, 128, 3)) * 0.5 + 0.5) * 255).astype(np.uint8)

        viewed = to_view_frame(image, azimuth)

        assert np.abs(viewed.astype(float) - [0, 127.5, 127.5]).max() <= 1.5

    @conventions
    def test_what_lies_to_the_left_is_plus_y(self, azimuth: Azimuth) -> None:
        angle = azimuth.of_columns(128) + np.pi / 2
        normals = np.stack([np.cos(angle), np.sin(angle), np.zeros(128)], -1)
        image = np.rint((np.broadcast_to(normals, (4, 128, 3)) * 0.5 + 0.5) * 255).astype(np.uint8)

        assert np.abs(to_view_frame(image, azimuth).astype(float) - [127.5, 255, 127.5]).max() <= 1.5

    @conventions
    def test_a_turned_scanner_sees_it_rolled(self, azimuth: Azimuth, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        turned = rotate_normals(np.roll(image, 9, 1), azimuth.direction * 2 * np.pi * 9 / 128)

        difference = to_view_frame(turned, azimuth).astype(int) - np.roll(to_view_frame(image, azimuth), 9, 1)

        assert np.abs(difference).max() <= 2  # rounded once more
