import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sscloud.errors import ConfigError
from sscloud.frame import Azimuth
from sscloud.frame import to_view_frame as numpy_view_frame
from training.augment import Augment, mirror, tilt, to_view_frame, yaw
from training.batch import DRAWS, Batch
from training.sample.mesh import Mesh
from training.sample.scanner import Scan, Scanner
from training.sample.scene import build_scene

SIZE_HW = (64, 128)
SPHERE = (90.0, -90.0)
CONVENTIONS = [
    Azimuth(direction=1, column_0=0.0),
    Azimuth(direction=-1, column_0=0.0),
    Azimuth(direction=1, column_0=90.0),
    Azimuth(direction=-1, column_0=217.3),
]
conventions = pytest.mark.parametrize("azimuth", CONVENTIONS, ids=str)


def directions(azimuth: Azimuth, elevation: tuple[float, float] = SPHERE) -> Tensor:
    """(3, H, W) viewing directions, from the scanner's own code."""
    scanner = Scanner(direction=azimuth.direction, column_0=azimuth.column_0, elevation=elevation)
    return torch.from_numpy(scanner.directions(SIZE_HW)).permute(2, 0, 1)


def facing(azimuth: Azimuth, *, count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random unit normals that face the scanner, some black, and random class maps."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, 3, *SIZE_HW, generator=generator, dtype=torch.float64)
    normals /= normals.norm(dim=1, keepdim=True)
    away = (normals * directions(azimuth)).sum(1, keepdim=True) > 0
    images = (torch.where(away, -normals, normals) * 0.5 + 0.5).float()
    images *= torch.rand(count, 1, *SIZE_HW, generator=generator) > 0.2
    return images, torch.randint(0, 6, (count, *SIZE_HW), generator=generator, dtype=torch.uint8)


def black(images: Tensor) -> Tensor:
    """(N, H, W) bool."""
    return images.amax(1) < 28 / 255


def against_view(images: Tensor, azimuth: Azimuth) -> Tensor:
    """n·d of every return."""
    product = ((images.double() * 2 - 1) * directions(azimuth)).sum(1)
    return product[~black(images)]


def tensors(*scans: Scan) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.stack([scan.image for scan in scans])).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(np.stack([scan.label_map for scan in scans]))


@cache
def scene() -> Mesh:
    return build_scene((3, 1), kind="suburb").mesh


def scan(*, width: int = 128, yaw: float = 0.0, azimuth: Azimuth = CONVENTIONS[0]) -> Scan:
    """The scene by a scanner turned by `yaw` degrees, without noise."""
    scanner = Scanner(yaw=yaw, direction=azimuth.direction, column_0=azimuth.column_0, range_noise=0.0)
    return scanner.scan(scene(), size_hw=(width // 2, width))


def shifts(*columns: float) -> Tensor:
    return torch.tensor(columns)


def batch(images: Tensor, class_maps: Tensor, *, seed: int = 0, **fields: Any) -> Batch:
    count = len(images)
    values = {
        "images": images,
        "class_maps": class_maps,
        "origins": torch.zeros(count, 2),
        "whole_hw": SIZE_HW,
        "draws": torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed)),
    }
    return Batch(**{**values, **fields})


def cut(whole: Batch, origins: list[tuple[int, int]], size_hw: tuple[int, int]) -> Batch:
    """The same window of every channel; over the seam where it goes that far."""
    height, width = size_hw
    images, class_maps = [], []
    for index, (row, column) in enumerate(origins):
        columns = torch.arange(column, column + width) % whole.whole_hw[1]
        images.append(whole.images[index, :, row : row + height][..., columns])
        class_maps.append(whole.class_maps[index, row : row + height][..., columns])
    return whole._replace(
        images=torch.stack(images), class_maps=torch.stack(class_maps), origins=torch.tensor(origins).float()
    )


class TestYaw:
    @pytest.mark.parametrize("columns", [1, 37])
    def test_whole_columns_are_what_a_turned_scanner_sees(self, columns: int) -> None:
        still, turned = tensors(scan()), tensors(scan(yaw=-columns * 360 / 128))

        images, class_maps = yaw(*still, shifts(columns), CONVENTIONS[0])

        assert (class_maps != turned[1]).float().mean() < 0.005  # rays that graze an edge fall to either side
        off = (images - turned[0]).abs().amax(1) > 1.5 / 255  # each encoding rounds by half a step
        assert off.float().mean() < 0.01
        unturned = (still[0].roll(columns, 3) - turned[0]).abs().amax(1) > 1.5 / 255
        if columns > 1:
            assert unturned.float().mean() > 0.2  # a roll alone is not enough

    @pytest.mark.parametrize("columns", [0.25, 81.5])
    def test_parts_of_columns_are_what_a_turned_scanner_sees_away_from_edges(self, columns: float) -> None:
        still, turned = tensors(scan(width=512)), tensors(scan(width=512, yaw=-columns * 360 / 512))

        images, class_maps = yaw(*still, shifts(columns), CONVENTIONS[0])

        def off(images: Tensor, other: Tensor) -> Tensor:
            """(N, H, W) degrees between normals."""
            return torch.rad2deg(((images * 2 - 1) * (other * 2 - 1)).sum(1).clamp(-1, 1).acos())

        seen = turned[0]
        smooth = torch.stack([off(seen, seen.roll(step, 3)) < 3 for step in (-1, 1)]).all(0) & ~black(seen)
        assert smooth.float().mean() > 0.1
        assert off(images, seen)[smooth].quantile(0.95) < 1
        upright = smooth & ((seen[:, 2] - 0.5).abs() < 0.15)
        assert upright.float().mean() > 0.005
        assert off(images, seen)[upright].quantile(0.9) < 1
        assert (black(images) != black(seen)).float().mean() < 0.02
        assert (class_maps != turned[1]).float().mean() < 0.04
        if columns > 1:
            assert off(still[0].roll(round(columns), 3), seen)[upright].quantile(0.5) > 20  # a roll alone

    @conventions
    def test_normals_turn_with_the_picture(self, azimuth: Azimuth) -> None:
        images, class_maps = facing(azimuth)

        turned, turned_maps = yaw(images, class_maps, shifts(32, 0), azimuth)

        before, after = images[0].roll(32, 2) * 2 - 1, turned[0] * 2 - 1
        returned = ~black(turned)[0]
        quarter = azimuth.direction
        torch.testing.assert_close(after[0][returned], -quarter * before[1][returned], atol=2e-6, rtol=0)
        torch.testing.assert_close(after[1][returned], quarter * before[0][returned], atol=2e-6, rtol=0)
        torch.testing.assert_close(after[2][returned], before[2][returned], atol=2e-6, rtol=0)
        torch.testing.assert_close(turned[1], images[1], atol=2e-6, rtol=0)
        assert torch.equal(turned_maps, torch.stack([class_maps[0].roll(32, 1), class_maps[1]]))

    @conventions
    def test_yaws_add_up(self, azimuth: Azimuth) -> None:
        start = facing(azimuth)

        twice = yaw(*yaw(*start, shifts(30, 5), azimuth), shifts(100, -70), azimuth)
        at_once = yaw(*start, shifts(2, 63), azimuth)

        torch.testing.assert_close(twice[0], at_once[0], atol=2e-6, rtol=0)
        assert torch.equal(twice[1], at_once[1])

    @pytest.mark.parametrize("columns", [0.4, -0.4, 12.6, 127.7])
    def test_between_columns_returns_are_averaged_and_of_unit_length(self, columns: float) -> None:
        """Against a loop over pixels."""
        azimuth = CONVENTIONS[3]
        images, class_maps = facing(azimuth, count=1)

        turned, turned_maps = yaw(images, class_maps, shifts(columns), azimuth)

        angle = azimuth.direction * 2 * math.pi * columns / 128
        matrix = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        for row, column in np.random.default_rng(0).integers(0, SIZE_HW, (300, 2)):
            left = math.floor(column - columns)
            weights = {left % 128: left + 1 - (column - columns), (left + 1) % 128: column - columns - left}
            nearer = max(weights, key=lambda place: weights[place])
            assert turned_maps[0, row, column] == class_maps[0, row, nearer]
            if black(images)[0, row, nearer]:
                assert turned[0, :, row, column].tolist() == [0, 0, 0]
                continue
            total = np.zeros(3)
            for place, weight in weights.items():
                if not black(images)[0, row, place]:
                    total += weight * (images[0, :, row, place].double().numpy() * 2 - 1)
            expected = matrix @ (total / np.linalg.norm(total)) * 0.5 + 0.5
            np.testing.assert_allclose(turned[0, :, row, column].numpy(), expected, atol=2e-5)

    def test_opposite_normals_half_a_column_away_do_not_cancel_out(self) -> None:
        images = torch.full((1, 3, 1, 4), 0.5)
        images[0, 1] = torch.tensor([1.0, 0.0, 1.0, 0.0])

        turned, _ = yaw(images, torch.zeros(1, 1, 4, dtype=torch.uint8), shifts(0.5), CONVENTIONS[0])

        torch.testing.assert_close((turned * 2 - 1).norm(dim=1), torch.ones(1, 1, 4))

    def test_colours_are_averaged_and_not_turned(self) -> None:
        images = torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
        images[..., 2] = 0

        moved, _ = yaw(images, torch.zeros(1, 4, 8, dtype=torch.uint8), shifts(3.25), None)

        torch.testing.assert_close(moved, 0.75 * images.roll(3, 3) + 0.25 * images.roll(4, 3))


class TestMirror:
    @conventions
    def test_twice_is_nothing(self, azimuth: Azimuth) -> None:
        images, class_maps = facing(azimuth)
        which = torch.tensor([True, False])

        once = mirror(images, class_maps, which, azimuth)
        twice = mirror(*once, which, azimuth)

        assert torch.equal(once[1], torch.stack([class_maps[0].flip(1), class_maps[1]]))
        assert torch.equal(once[0][1], images[1])
        torch.testing.assert_close(twice[0], images, atol=1e-6, rtol=0)
        assert torch.equal(twice[1], class_maps)

    @conventions
    def test_turns_yaw_around(self, azimuth: Azimuth) -> None:
        start, both = facing(azimuth), torch.tensor([True, True])

        one_way = mirror(*yaw(*start, shifts(21, 7.3), azimuth), both, azimuth)
        other_way = yaw(*mirror(*start, both, azimuth), shifts(-21, -7.3), azimuth)

        torch.testing.assert_close(one_way[0], other_way[0], atol=1e-4, rtol=0)
        assert torch.equal(one_way[1], other_way[1])

    @conventions
    def test_rendered_scenes_still_face_the_scanner(self, azimuth: Azimuth) -> None:
        images, class_maps = tensors(scan(azimuth=azimuth))
        tolerance = 0.012  # each of three components is rounded by 1/255 at most
        assert against_view(images, azimuth).max() <= tolerance

        mirrored, _ = mirror(images, class_maps, torch.tensor([True]), azimuth)

        assert against_view(mirrored, azimuth).max() <= tolerance
        assert against_view(images.flip(3), azimuth).max() > 0.5

    def test_colours_only_move(self) -> None:
        images, class_maps = facing(CONVENTIONS[0])

        moved = mirror(images, class_maps, torch.tensor([True, True]), None)

        assert torch.equal(moved[0], images.flip(3))
        assert torch.equal(moved[1], class_maps.flip(2))


class TestFacing:
    @conventions
    @pytest.mark.parametrize("columns", [0.0, 1.0, 50.0, 127.0])
    def test_surfaces_still_face_the_scanner(self, azimuth: Azimuth, columns: float) -> None:
        start = facing(azimuth)
        assert against_view(start[0], azimuth).max() <= 1e-6

        turned = yaw(*start, shifts(columns, 3), azimuth)
        mirrored = mirror(*turned, torch.tensor([True, True]), azimuth)

        assert against_view(turned[0], azimuth).max() <= 1e-5
        assert against_view(mirrored[0], azimuth).max() <= 1e-5

    @conventions
    def test_only_under_the_right_convention(self, azimuth: Azimuth) -> None:
        wrong = Azimuth(direction=-azimuth.direction, column_0=azimuth.column_0)  # type: ignore[arg-type]

        assert against_view(yaw(*facing(azimuth), shifts(32, 32), wrong)[0], azimuth).max() > 0.5


class TestBlack:
    @conventions
    def test_stays_exactly_black(self, azimuth: Azimuth) -> None:
        images, class_maps = facing(azimuth)
        before = black(images)

        turned = yaw(images, class_maps, shifts(10.3, 10.3), azimuth)[0]
        mirrored = mirror(images, class_maps, torch.tensor([True, True]), azimuth)[0]
        tilted = tilt(images, class_maps, torch.tensor([[0.05, 1.0], [0.0, 0.0]]), azimuth, SPHERE)[0]
        viewed = to_view_frame(images, torch.zeros(2, 2), SIZE_HW, azimuth)

        assert torch.equal(black(turned), before.roll(10, 2))
        assert torch.equal(black(mirrored), before.flip(2))
        assert torch.equal(black(tilted)[1], before[1])
        assert torch.equal(black(viewed), before)
        for changed in (turned, mirrored, tilted, viewed):
            dark = black(changed)
            assert 0.15 < dark.float().mean() < 0.25
            assert changed.permute(1, 0, 2, 3)[:, dark].abs().max() == 0

    def test_noise_in_it_is_no_normal(self) -> None:
        """JPEG leaves some grey in a black sky."""
        azimuth = CONVENTIONS[3]
        images, class_maps = facing(azimuth)
        images[:, :, :4] = 20 / 255

        turned = yaw(images, class_maps, shifts(10.3, 10), azimuth)[0]
        mirrored = mirror(images, class_maps, torch.tensor([True, True]), azimuth)[0]

        assert (turned[:, :, :4] == 20 / 255).all()
        assert (mirrored[:, :, :4] == 20 / 255).all()


class TestTilt:
    @conventions
    def test_by_nothing_is_nothing(self, azimuth: Azimuth) -> None:
        images, class_maps = facing(azimuth)

        tilted, tilted_maps = tilt(images, class_maps, torch.zeros(2, 2), azimuth, SPHERE)

        torch.testing.assert_close(tilted, images, atol=1e-3, rtol=0)
        assert torch.equal(tilted_maps, class_maps)

    @conventions
    @pytest.mark.parametrize("elevation", [SPHERE, (80.0, -60.0)])
    def test_is_a_rotation_of_the_sphere(self, azimuth: Azimuth, elevation: tuple[float, float]) -> None:
        """Every normal looks back along its pixel's direction: so it has to after any rotation."""
        images = (-directions(azimuth, elevation) * 0.5 + 0.5).float().expand(2, -1, -1, -1)
        angles = torch.tensor([[0.3, 0.7], [-0.1, 4.0]])

        tilted, classes = tilt(images, torch.zeros(2, *SIZE_HW, dtype=torch.uint8), angles, azimuth, elevation)

        outside = black(tilted)
        assert torch.equal(outside, classes == 255)
        assert outside.any() == (elevation != SPHERE)
        cosine = -((tilted * 2 - 1) * directions(azimuth, elevation)).sum(1)
        inner = cosine[:, 4:-4][~outside[:, 4:-4]]
        assert torch.rad2deg(torch.acos(inner.clamp(-1, 1))).max() < 1.5  # interpolated within pixels of 2.8 degrees

    @conventions
    def test_moves_things_about_the_axis(self, azimuth: Azimuth) -> None:
        """One patch, and where a rotation written down another way puts it."""
        angle, axis = 0.4, 1.1
        view = directions(azimuth)
        patch = torch.tensor([0.9, 0.2, 0.3], dtype=torch.float64)
        patch /= patch.norm()
        near = (view * patch[:, None, None]).sum(0) > math.cos(0.25)
        class_maps = near[None].to(torch.uint8)
        images = torch.full((1, 3, *SIZE_HW), 0.5)
        images[:, 2] = 1

        tilted, tilted_maps = tilt(images, class_maps, torch.tensor([[angle, axis]]), azimuth, SPHERE)

        def turned(vector: Tensor) -> Tensor:
            along = torch.tensor([math.cos(axis), math.sin(axis), 0], dtype=torch.float64)
            matrix = torch.linalg.matrix_exp(
                angle
                * torch.tensor(
                    [[0, -along[2], along[1]], [along[2], 0, -along[0]], [-along[1], along[0], 0]],
                    dtype=torch.float64,
                )
            )
            return matrix @ vector

        expected = (view * turned(patch)[:, None, None]).sum(0) > math.cos(0.25)
        assert (tilted_maps[0].bool() != expected).float().mean() < 0.005
        up = turned(torch.tensor([0, 0, 1], dtype=torch.float64)).float() * 0.5 + 0.5
        torch.testing.assert_close(tilted, up[None, :, None, None].expand_as(tilted), atol=1e-5, rtol=0)

    def test_keeps_its_precision_under_autocast(self) -> None:
        azimuth = CONVENTIONS[3]
        start, angles = facing(azimuth), torch.tensor([[0.05, 1.0], [0.02, 2.0]])

        plain = tilt(*start, angles, azimuth, SPHERE)
        with torch.autocast("cpu", torch.bfloat16):
            half = tilt(*start, angles, azimuth, SPHERE)

        assert torch.equal(plain[0], half[0])
        assert torch.equal(plain[1], half[1])

    def test_invents_no_normals(self) -> None:
        azimuth = CONVENTIONS[0]
        images, class_maps = facing(azimuth)

        tilted, _ = tilt(images, class_maps, torch.tensor([[0.08, 1.0], [0.02, 2.0]]), azimuth, SPHERE)

        length = (tilted * 2 - 1).norm(dim=1)[~black(tilted)]
        torch.testing.assert_close(length, torch.ones_like(length), atol=1e-4, rtol=0)

    def test_colours_move_and_may_be_black(self) -> None:
        images = torch.rand(1, 3, *SIZE_HW, generator=torch.Generator().manual_seed(0)) * 0.1
        class_maps = torch.zeros(1, *SIZE_HW, dtype=torch.uint8)

        tilted, tilted_maps = tilt(images, class_maps, torch.tensor([[0.2, 0.0]]), None, (60.0, -60.0))

        inside = tilted_maps[0] == 0
        assert 0.05 < (~inside).float().mean() < 0.2
        assert (tilted[0].amax(0)[inside] > 0).all()
        assert (tilted[0][:, ~inside] == 0).all()
        assert tilted.max() <= images.max()


class TestViewFrame:
    @conventions
    def test_is_numpys(self, azimuth: Azimuth, make_panorama: Any) -> None:
        panoramas = [make_panorama(seed=seed) for seed in range(2)]
        images = torch.from_numpy(np.stack(panoramas)).permute(0, 3, 1, 2).float() / 255

        found = to_view_frame(images, torch.zeros(2, 2), SIZE_HW, azimuth)

        expected: NDArray[np.uint8] = np.stack([numpy_view_frame(image, azimuth) for image in panoramas])
        difference = found.permute(0, 2, 3, 1).numpy() * 255 - expected
        assert np.abs(difference).max() <= 0.501
        assert np.abs(expected.astype(int) - np.stack(panoramas)).max() > 100

    @conventions
    def test_of_a_crop_is_the_crop_of_it(self, azimuth: Azimuth) -> None:
        whole = batch(*facing(azimuth))
        crops = cut(whole, [(3, 100), (20, 7)], (32, 48))

        found = to_view_frame(crops.images, crops.origins, crops.whole_hw, azimuth)

        viewed = whole._replace(images=to_view_frame(whole.images, whole.origins, whole.whole_hw, azimuth))
        expected = cut(viewed, [(3, 100), (20, 7)], (32, 48)).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    @conventions
    def test_a_turn_is_a_roll_and_a_mirror_negates_y(self, azimuth: Azimuth) -> None:
        start, origins = facing(azimuth), torch.zeros(2, 2)
        viewed = to_view_frame(start[0], origins, SIZE_HW, azimuth)

        turned = to_view_frame(yaw(*start, shifts(17, 17), azimuth)[0], origins, SIZE_HW, azimuth)
        mirrored = to_view_frame(mirror(*start, torch.tensor([True, True]), azimuth)[0], origins, SIZE_HW, azimuth)

        torch.testing.assert_close(turned, viewed.roll(17, 3), atol=1e-5, rtol=0)
        reflected = viewed.clone()
        reflected[:, 1] = torch.where(black(viewed), viewed[:, 1], 1 - viewed[:, 1])
        torch.testing.assert_close(mirrored, reflected.flip(3), atol=1e-5, rtol=0)


class TestAugment:
    def test_covers_the_circle_between_columns_and_mirrors_half(self) -> None:
        azimuth = CONVENTIONS[0]
        count = 400
        columns = torch.arange(128, dtype=torch.uint8).expand(count, 2, 128)
        images = torch.full((count, 3, 2, 128), 0.5)
        images[:, 0] = torch.linspace(0, 1, 128)
        images[:, 1] = 0.5 + (0.25 - (images[:, 0] - 0.5) ** 2).sqrt()
        augment = Augment(encoding="normals", azimuth=azimuth, elevation=SPHERE, tilt=0.0)

        found = augment(batch(images, columns, whole_hw=(2, 128)))

        first = found.class_maps[:, 0, 0].int()
        mirrored = found.class_maps[:, 0, 1].int() == (first - 1) % 128
        assert len(first.unique()) > 100
        assert 0.4 < mirrored.float().mean() < 0.6
        assert torch.equal(found.draws[:, 1] < 0.5, mirrored)
        assert found.images.shape == images.shape
        assert torch.equal(found.origins, torch.zeros(count, 2))

    @pytest.mark.parametrize("degrees", [0.0, 5.0])
    def test_depends_on_the_draws_only(self, degrees: float) -> None:
        azimuth = CONVENTIONS[3]
        start = facing(azimuth, count=3)
        augment = Augment(encoding="normals", azimuth=azimuth, elevation=SPHERE, tilt=degrees)

        first, again, other = (augment(batch(*start, seed=seed)) for seed in (1, 1, 2))

        assert torch.equal(first.images, again.images)
        assert torch.equal(first.class_maps, again.class_maps)
        assert not torch.equal(first.images, other.images)
        alone = augment(Batch(*(value[2:] if isinstance(value, Tensor) else value for value in batch(*start, seed=1))))
        assert torch.equal(alone.images[0], first.images[2])

    @conventions
    def test_is_what_its_parts_do(self, azimuth: Azimuth) -> None:
        start = facing(azimuth)
        draws = torch.zeros(2, DRAWS)
        draws[:, :4] = torch.tensor([[0.3, 0.2, 0.9, 0.6], [0.01, 0.7, 0.1, 0.2]])
        which = torch.tensor([True, False])

        upright = Augment(encoding="normals", azimuth=azimuth, elevation=SPHERE, tilt=0.0)(batch(*start, draws=draws))
        tilted = Augment(encoding="normals", azimuth=azimuth, elevation=SPHERE, tilt=5.0)(batch(*start, draws=draws))

        turned = yaw(*start, shifts(0.3 * 128, 0.01 * 128), azimuth)
        expected = mirror(*turned, which, azimuth)
        assert torch.equal(upright.images, expected[0])
        assert torch.equal(upright.class_maps, expected[1])
        whole = mirror(*yaw(*start, shifts(38, 1), azimuth), which, azimuth)
        degrees = torch.tensor([[0.8 * 5, 0.6 * 360], [-0.8 * 5, 0.2 * 360]])
        expected = tilt(*whole, degrees.deg2rad(), azimuth, SPHERE)
        torch.testing.assert_close(tilted.images, expected[0], atol=1e-3, rtol=0)
        assert (tilted.class_maps != expected[1]).float().mean() < 1e-3

    @conventions
    @pytest.mark.parametrize("tilted", [0.0, 5.0])
    def test_to_cut_and_augment_is_to_augment_and_cut(self, azimuth: Azimuth, tilted: float) -> None:
        """A crop is turned by whole columns, so the same whole panorama turned by as many holds it."""
        whole = batch(*facing(azimuth, count=4), seed=3)
        origins = [(3, 100), (20, 7), (0, 90), (30, 60)]
        crops = cut(whole, origins, (32, 48))

        found = Augment(encoding="normals", azimuth=azimuth, elevation=SPHERE, tilt=tilted)(crops)

        which = whole.draws[:, 1] < 0.5
        images, class_maps = mirror(
            *yaw(whole.images, whole.class_maps, (whole.draws[:, 0] * 128).floor(), azimuth), which, azimuth
        )
        augmented = whole._replace(images=images, class_maps=class_maps)
        places = [(int(row), int(column)) for row, column in found.origins]
        expected = cut(augmented, places, (32, 48))
        assert which.any()
        assert not which.all()
        assert [row for row, _ in places] == [row for row, _ in origins]
        assert all(0 <= column < 128 for _, column in places)
        assert places != origins
        torch.testing.assert_close(found.images, expected.images, atol=2e-6, rtol=0)
        assert torch.equal(found.class_maps, expected.class_maps)
        torch.testing.assert_close(
            to_view_frame(found.images, found.origins, SIZE_HW, azimuth),
            cut(
                augmented._replace(images=to_view_frame(images, whole.origins, SIZE_HW, azimuth)), places, (32, 48)
            ).images,
            atol=1e-5,
            rtol=0,
        )

    def test_colours_only_move(self) -> None:
        """With whole columns nothing is blended: each pixel keeps its colour and its class."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, 8, 16, generator=generator)
        class_maps = torch.randint(0, 6, (1, 8, 16), generator=generator, dtype=torch.uint8)
        draws = torch.tensor([[5 / 16, 0.3, *[0.0] * (DRAWS - 2)]])
        augment = Augment(encoding="rgb", azimuth=None, elevation=SPHERE, tilt=0.0)

        found = augment(batch(images, class_maps, draws=draws, whole_hw=(8, 16)))

        assert torch.equal(found.images, images.roll(5, 3).flip(3))
        assert torch.equal(found.class_maps, class_maps.roll(5, 2).flip(2))

    def test_crops_of_colours_keep_their_pixels(self) -> None:
        whole = batch(*facing(CONVENTIONS[0]))
        crops = cut(whole, [(3, 100), (20, 7)], (32, 48))

        found = Augment(encoding="rgb", azimuth=None, elevation=SPHERE, tilt=5.0)(crops)

        which = crops.draws[:, 1] < 0.5
        expected = torch.where(which[:, None, None, None], crops.images.flip(3), crops.images)
        assert torch.equal(found.images, expected)

    def test_normals_need_an_azimuth(self) -> None:
        with pytest.raises(ConfigError, match=r"Normals cannot be turned without knowing.*State the azimuth"):
            Augment(encoding="normals", azimuth=None, elevation=SPHERE, tilt=0.0)
