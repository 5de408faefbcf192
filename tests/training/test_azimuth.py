import io
from functools import cache
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.errors import DatasetError
from sscloud.frame import Azimuth, rotate_normals
from sscloud.image import resize_image
from training.azimuth import UndecidedError, facing_share, find_azimuth
from training.sample.mesh import SOLID, Mesh, MeshBuilder, quads
from training.sample.scanner import Scanner
from training.sample.scene import build_scene

Panorama = NDArray[np.uint8]

SPHERE = (90.0, -90.0)
KINDS = ("street", "suburb", "yard")
PLAIN = Azimuth(direction=1, column_0=0.0)


@cache
def meshes() -> tuple[Mesh, ...]:
    return tuple(build_scene((7, number), kind=kind).mesh for number, kind in enumerate(KINDS))


@cache
def scans(azimuth: Azimuth = PLAIN) -> tuple[Panorama, ...]:
    """Three scenes as a data set's cache has them: noisy, from JPEG files twice as large."""
    found = []
    for number, mesh in enumerate(meshes()):
        scanner = Scanner(yaw=100.0 * number, direction=azimuth.direction, column_0=azimuth.column_0)
        scan = scanner.scan(mesh, size_hw=(256, 512), seed=number)
        stream = io.BytesIO()
        Image.fromarray(scan.image).save(stream, "JPEG", quality=90)
        picture = np.asarray(Image.open(stream))
        found.append(resize_image(picture, (128, 256), resample="valid-area", encoding="normals"))
    return tuple(found)


def under(azimuth: Azimuth, image: Panorama) -> Panorama:
    """What a scanner of another convention than `PLAIN` would have written of the same place."""
    turned = rotate_normals(image, np.radians(azimuth.column_0))
    return turned if azimuth.direction == 1 else turned[:, ::-1]


def walls(corners: NDArray[np.float64], *, floor: bool = True) -> Panorama:
    """A place between upright walls through (n, 2) corners, without anything in it."""
    builder = MeshBuilder()
    first, second = np.pad(corners[:-1], ((0, 0), (0, 1))), np.pad(corners[1:], ((0, 0), (0, 1)))
    up = np.array([0.0, 0.0, 4.0])
    builder.add(quads(np.stack([first, second, second + up, first + up], 1)), 6, SOLID)
    if floor:
        builder.add(quads(30 * np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])), 2, SOLID)
    mesh = builder.build(origin=np.zeros(3), yaw=0.0)
    return Scanner(range_noise=0.0).scan(mesh, size_hw=(64, 128)).image


def circle(radius: float) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 181)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


class TestFinds:
    @pytest.mark.parametrize("direction", [1, -1])
    @pytest.mark.parametrize("column_0", [0.0, 90.0, 180.0, 270.0])
    def test_quarter_turns_exactly(self, direction: Literal[1, -1], column_0: float) -> None:
        azimuth = Azimuth(direction=direction, column_0=column_0)
        assert find_azimuth((under(azimuth, scan) for scan in scans()), SPHERE) == azimuth

    @pytest.mark.slow
    def test_what_the_scanner_was_told(self) -> None:
        azimuth = Azimuth(direction=-1, column_0=270.0)
        assert find_azimuth(scans(azimuth), SPHERE) == azimuth

    @pytest.mark.parametrize("direction", [1, -1])
    def test_odd_angles_within_some_degrees(self, direction: Literal[1, -1]) -> None:
        azimuth = Azimuth(direction=direction, column_0=45.0)

        found = find_azimuth([under(azimuth, scan) for scan in scans()], SPHERE)

        assert found.direction == direction
        assert found.column_0 == pytest.approx(45.0, abs=6)
        assert found.column_0 % 0.5 == 0

    def test_in_a_square_room(self) -> None:
        corners = 6.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1], [1, 1]])
        assert find_azimuth([walls(corners)], SPHERE) == PLAIN

    def test_whatever_the_elevation_range(self) -> None:
        """Without its blind cone a panorama is the same; told the wrong range, its ground faces away."""
        cut = [scan[:107] for scan in scans()]
        assert find_azimuth(cut, (90.0, 90 - 107 * 180 / 128)) == PLAIN
        with pytest.raises(UndecidedError, match="normals face the scanner"):
            find_azimuth(cut, (90.0, 45.0))

    def test_panoramas_without_returns_say_nothing(self) -> None:
        assert find_azimuth([*scans(), np.zeros((128, 256, 3), np.uint8)], SPHERE) == PLAIN


class TestRefuses:
    def test_is_an_error_of_the_data(self) -> None:
        assert issubclass(UndecidedError, DatasetError)
        with pytest.raises(UndecidedError, match=r"State it in dataset\.yaml, for example azimuth: {direction: 1"):
            find_azimuth([], SPHERE)

    def test_no_returns(self) -> None:
        with pytest.raises(UndecidedError, match="0 pixels lie on a surface with unit normals, at least 500"):
            find_azimuth([np.zeros((64, 128, 3), np.uint8)] * 3, SPHERE)

    def test_noise(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (128, 256, 3), np.uint8)
        with pytest.raises(UndecidedError, match=r"pixels lie on a surface with unit normals.*encoding: rgb"):
            find_azimuth([noise], SPHERE)

    def test_a_photograph(self) -> None:
        """Smooth colours, of which some happen to be as long as normals."""
        small = np.random.default_rng(1).integers(0, 256, (6, 12, 3), np.uint8)
        photograph = np.asarray(Image.fromarray(small).resize((256, 128), Image.Resampling.BICUBIC))
        with pytest.raises(UndecidedError, match=r"normals face the scanner|unit normals"):
            find_azimuth([photograph], SPHERE)

    def test_normals_that_point_into_the_surfaces(self) -> None:
        flipped = [np.where(scan.max(2, keepdims=True) < 28, scan, 255 - scan) for scan in scans()]
        with pytest.raises(
            UndecidedError, match=r"at best .* of the normals face the scanner.*point into the surfaces"
        ):
            find_azimuth(flipped, SPHERE)

    def test_panoramas_of_different_conventions(self) -> None:
        """As when the normals are in the frame of the site, and each scanner was set up another way round."""
        one, two, three = scans()
        turned = [one, rotate_normals(two, np.radians(120)), rotate_normals(three, np.radians(240))]
        with pytest.raises(UndecidedError, match=r"panoramas disagree; alone, column 0 would be at .*°, .*°, .*frame"):
            find_azimuth(turned, SPHERE)

    def test_one_odd_panorama_among_many(self) -> None:
        odd = under(Azimuth(direction=1, column_0=180.0), scans()[2])
        with pytest.raises(UndecidedError, match=r"the panoramas disagree|worst panorama"):
            find_azimuth([*scans() * 4, odd], SPHERE)

    def test_a_round_room(self) -> None:
        with pytest.raises(UndecidedError, match=r"for column 0 anywhere in a range of 1[0-9]{2}"):
            find_azimuth([walls(circle(6.0))], SPHERE)

    def test_an_empty_field(self) -> None:
        with pytest.raises(UndecidedError, match="whether the azimuth grows to the right or to the left"):
            find_azimuth([walls(circle(6.0)[:1].repeat(2, 0))], SPHERE)

    def test_a_canyon_between_two_walls(self) -> None:
        sides = [np.array([[-200.0, y], [200.0, y]]) for y in (-5.0, 5.0)]
        canyon = np.maximum(walls(sides[0]), walls(sides[1]))
        with pytest.raises(UndecidedError, match="whether the azimuth grows to the right or to the left"):
            find_azimuth([canyon], SPHERE)

    def test_an_angle_that_may_as_well_be_a_quarter_turn(self) -> None:
        azimuth = Azimuth(direction=1, column_0=18.0)
        with pytest.raises(UndecidedError, match=r"column 0 is near .*, but 0° would do as well; more panoramas"):
            find_azimuth([under(azimuth, scans()[0])], SPHERE)


class TestFacingShare:
    @pytest.mark.parametrize("azimuth", [PLAIN, Azimuth(direction=-1, column_0=37.0)], ids=str)
    def test_tells_right_from_wrong(self, azimuth: Azimuth) -> None:
        wrong = [
            Azimuth(direction=-azimuth.direction, column_0=azimuth.column_0),  # type: ignore[arg-type]
            Azimuth(direction=azimuth.direction, column_0=azimuth.column_0 + 90),
            Azimuth(direction=azimuth.direction, column_0=azimuth.column_0 + 180),
        ]
        for scan in (under(azimuth, scan) for scan in scans()):
            assert facing_share(scan, azimuth, SPHERE) > 0.98
            assert all(facing_share(scan, other, SPHERE) < 0.9 for other in wrong)

    def test_is_a_share_of_pixels(self) -> None:
        """A wall of which the far half has been given away-facing normals."""
        image = walls(circle(6.0), floor=False)
        image[:, 64:] = np.where(image[:, 64:].max(2, keepdims=True) == 0, 0, 255 - image[:, 64:])
        assert facing_share(image, PLAIN, SPHERE) == pytest.approx(0.5, abs=0.01)

    def test_is_one_where_nothing_tells(self) -> None:
        assert facing_share(np.zeros((64, 128, 3), np.uint8), PLAIN, SPHERE) == 1.0
