import numpy as np
import pytest

from training.sample import mesh
from training.sample.mesh import Floats, Surface


def outward(surface: Surface, centre: Floats) -> bool:
    """Whether every vertex normal points away from `centre`."""
    return bool((((surface.triangles - centre) * surface.normals).sum(-1) > -1e-9).all())


def is_unit(vectors: Floats) -> bool:
    return bool(np.allclose(np.linalg.norm(vectors, axis=-1), 1))


def test_boxes_stand_on_their_bases() -> None:
    surface = mesh.boxes([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], [2.0, 4.0, 6.0], [0.0, np.pi / 2])

    first, second = surface.triangles[:12], surface.triangles[12:]

    assert surface.triangles.shape == surface.normals.shape == (24, 3, 3)
    np.testing.assert_allclose(first.reshape(-1, 3).min(0), [0, 0, 3])
    np.testing.assert_allclose(first.reshape(-1, 3).max(0), [2, 4, 9])
    np.testing.assert_allclose(second.reshape(-1, 3).max(0), [2, 1, 6])
    assert is_unit(surface.normals)


def test_box_is_closed() -> None:
    triangles = mesh.boxes([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]).triangles

    areas = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2

    assert areas.sum() == pytest.approx(2 * (1 * 2 + 2 * 3 + 1 * 3))


@pytest.mark.parametrize("end", [[0, 0, 2], [3, 0, 0], [1, -1, 1]])
def test_tube_normals_point_away_from_the_axis(end: list[float]) -> None:
    surface = mesh.tubes([0, 0, 0], end, 0.5, sides=12)
    axis = np.array(end) / np.linalg.norm(end)

    from_axis = surface.triangles - (surface.triangles @ axis)[..., None] * axis

    assert len(surface.triangles) == 24
    np.testing.assert_allclose(from_axis, 0.5 * surface.normals, atol=1e-12)


def test_ellipsoid() -> None:
    surface = mesh.ellipsoids([[5.0, 0.0, 0.0]], [1.0, 2.0, 3.0])

    scaled = (surface.triangles - [5, 0, 0]) / [1, 2, 3]

    np.testing.assert_allclose(np.linalg.norm(scaled, axis=-1), 1)
    assert outward(surface, np.array([5.0, 0, 0]))


def test_lattice_of_a_plane_is_smooth() -> None:
    x, y = np.meshgrid(np.arange(4.0), np.arange(3.0), indexing="ij")

    surface = mesh.lattice(np.stack([x, y, 0.5 * x], -1))

    assert len(surface.triangles) == 2 * 3 * 2
    np.testing.assert_allclose(surface.normals, np.broadcast_to(np.array([-1, 0, 2]) / 5**0.5, (12, 3, 3)))


def test_closed_lattice_has_no_seam() -> None:
    angle = np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)

    surface = mesh.lattice(np.stack([ring, ring + np.array([0, 0, 1])]), closed=True)

    assert len(surface.triangles) == 16
    np.testing.assert_allclose(np.abs((surface.normals * surface.triangles * [1, 1, 0]).sum(-1)), 1)


def test_builder_moves_turns_and_labels() -> None:
    builder = mesh.MeshBuilder()
    builder.add(mesh.quads(np.array([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]])), 6)
    builder.add(mesh.discs([0, 0, 5], [0, 0, 1], 1.0, sides=6), 65, mesh.GLASS)

    built = builder.build(origin=np.array([1.0, 0.0, 0.0]), yaw=np.pi / 2)

    np.testing.assert_allclose(built.triangles[0], [[0, 0, 0], [-1, 0, 0], [-1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(built.normals[0, 0], [0, 1, 0], atol=1e-6)
    assert built.labels.tolist() == [6] * 2 + [65] * 6
    assert built.materials.tolist() == [mesh.SOLID] * 2 + [mesh.GLASS] * 6
    assert (built.triangles.dtype, built.labels.dtype) == (np.float32, np.uint8)
