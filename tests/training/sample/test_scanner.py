import numpy as np
import numpy.typing as npt
import pytest

from training.sample import mesh, scanner
from training.sample.mesh import Floats, Mesh
from training.sample.scanner import Scan, Scanner

SIZE_HW = (64, 128)


def square(z: float, reach: float = 500.0) -> Floats:
    return np.array([[-reach, -reach, z], [reach, -reach, z], [reach, reach, z], [-reach, reach, z]])


def wall(x: float, half: float = 500.0) -> Floats:
    return np.array([[x, -half, -half], [x, half, -half], [x, half, half], [x, -half, half]])


def scene(*parts: tuple[Floats, int, int]) -> Mesh:
    builder = mesh.MeshBuilder()
    for corners, label, material in parts:
        builder.add(mesh.quads(corners), label, material)
    return builder.build(origin=np.zeros(3), yaw=0.0)


def decode(image: npt.NDArray[np.uint8]) -> Floats:
    return image / 255 * 2 - 1


def scan(parts: Mesh, **options: object) -> Scan:
    quiet = {"range_noise": 0.0, "height": 2.0, **options}
    return Scanner(**quiet).scan(parts, size_hw=SIZE_HW)  # type: ignore[arg-type]


def test_directions_go_through_pixel_centres() -> None:
    directions = Scanner().directions((2, 4))

    assert directions.shape == (2, 4, 3)
    half = 0.5**0.5
    np.testing.assert_allclose(directions[0, 0], [0.5, 0.5, half])
    np.testing.assert_allclose(directions[1, 2], [-0.5, -0.5, -half])


def test_directions_follow_the_conventions() -> None:
    plain = Scanner().directions(SIZE_HW)

    np.testing.assert_allclose(Scanner(direction=-1).directions(SIZE_HW), plain[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(Scanner(column_0=90.0).directions(SIZE_HW), np.roll(plain, -32, axis=1), atol=1e-12)
    np.testing.assert_allclose(Scanner(elevation=(0.0, -90.0)).directions((32, 128)), plain[32:], atol=1e-12)
    np.testing.assert_allclose(Scanner().directions(SIZE_HW, slice(3, 5)), plain[3:5])


def test_floor() -> None:
    scanned = scan(scene((square(0.0), 2, mesh.SOLID)), lowest=-90.0)

    elevation = np.radians(90 - (np.arange(64) + 0.5) * 180 / 64)
    expected = np.where(elevation < np.arcsin(-2 / 110), -2 / np.sin(elevation), 0)
    np.testing.assert_allclose(scanned.range_m, np.broadcast_to(expected[:, None], SIZE_HW), rtol=1e-4)
    assert (scanned.label_map == np.where(expected > 0, 2, 0)[:, None]).all()
    assert (scanned.image[expected > 0] == [128, 128, 255]).all()
    assert (scanned.image[expected == 0] == 0).all()


def test_normals_face_the_scanner_whichever_way_triangles_wind() -> None:
    for corners in (wall(5.0), wall(5.0)[::-1]):
        scanned = scan(scene((corners, 6, mesh.SOLID)))

        assert scanned.image[32, 1].tolist() == [0, 128, 128]


def test_blind_cone_and_range() -> None:
    scanned = scan(scene((square(0.0), 2, mesh.SOLID)), lowest=-45.0, max_range=20.0)

    assert (scanned.image[48:] == 0).all()
    assert (scanned.label_map[48:] == 0).all()
    assert (scanned.label_map[47] == 2).all()
    assert scanned.range_m.max() <= 20


def test_glass_returns_nothing_and_belongs_to_its_wall() -> None:
    pane = np.array([[4.9, -1, 1], [4.9, 1, 1], [4.9, 1, 3], [4.9, -1, 3]])

    scanned = scan(scene((wall(5.0), 6, mesh.SOLID), (pane, 6, mesh.GLASS)))

    assert scanned.label_map[31, 0] == scanned.label_map[31, 20] == 6
    assert scanned.image[31, 0].tolist() == [0, 0, 0]
    assert scanned.range_m[31, 0] == 0
    assert scanned.image[31, 20].tolist() != [0, 0, 0]


def test_near_things_hide_far_ones() -> None:
    board = np.array([[3.0, -1, 1], [3.0, 1, 1], [3.0, 1, 3], [3.0, -1, 3]])

    scanned = scan(scene((wall(5.0), 6, mesh.SOLID), (board, 66, mesh.SOLID)))

    assert scanned.label_map[31, 0] == 66
    assert scanned.range_m[31, 0] == pytest.approx(3.0, abs=0.01)
    assert scanned.label_map[31, 20] == 6


def test_noise_and_losses_grow_with_range_and_grazing_angle() -> None:
    floor = scene((square(0.0), 2, mesh.SOLID))

    scanned = Scanner(height=2.0).scan(floor, size_hw=(256, 512), seed=1)

    near, far = slice(180, 190), slice(130, 134)
    lost = (scanned.range_m == 0) & (scanned.label_map == 2)
    spread = [decode(scanned.image[rows])[~lost[rows]][:, :2].std() for rows in (near, far)]
    assert spread[0] < spread[1]
    assert lost[near].mean() < 0.01 < lost[far].mean()
    assert (scanned.image[lost] == 0).all()


def test_noise_belongs_to_the_seed() -> None:
    floor = scene((square(0.0), 2, mesh.SOLID))

    first, again, other = (Scanner().scan(floor, size_hw=SIZE_HW, seed=seed).image for seed in ((1, 2), (1, 2), (1, 3)))

    assert (first == again).all()
    assert (first != other).any()


def test_strips_and_threads_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = scene((square(0.0), 2, mesh.ROUGH), (wall(9.0), 6, mesh.SOLID))
    whole = scan(parts)
    monkeypatch.setattr(scanner, "_STRIP_PIXELS", 5 * 128)

    strips = scan(parts)
    many = Scanner().scan(parts, size_hw=SIZE_HW)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    one = Scanner().scan(parts, size_hw=SIZE_HW)

    assert (whole.image == strips.image).all()
    assert (whole.label_map == strips.label_map).all()
    assert (many.image == one.image).all()


def test_small_sky_patches_in_a_crown_belong_to_it() -> None:
    label_map = np.zeros((8, 8), np.uint8)
    label_map[2:7] = 5
    label_map[4, [0, 4]] = 0
    label_map[5, 4] = 6

    scanner._fill_crowns(label_map)

    drawn = ["".join(".T" if label == 0 else "T" if label == 5 else "#" for label in row) for row in label_map]
    assert [row.replace(".T", ".") for row in drawn] == [
        "........",
        "........",
        "TTTTTTTT",
        "TTTTTTTT",
        "TTTTTTTT",
        "TTTT#TTT",
        "TTTTTTTT",
        "........",
    ]
