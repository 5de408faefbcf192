import functools

import numpy as np
import pytest

from training.sample import scene
from training.sample.mesh import GLASS
from training.sample.scene import Scene, build_scene
from training.sample.site import Band, Ground, Site

FLAT = Ground(
    bands=(
        Band(inner=-130, outer=0, z_inner=0, z_outer=0, paved=True),
        Band(inner=0, outer=4, z_inner=0, z_outer=0, paved=True),
        Band(inner=4, outer=4.03, z_inner=0, z_outer=0.15, paved=True),
        Band(inner=4.03, outer=130, z_inner=0.15, z_outer=0.15, paved=False),
    ),
    bend=(0.0, 30.0, 0.0),
    slope=0.0,
    waves=np.zeros((1, 4)),
)


@functools.cache
def built(index: int) -> Scene:
    return build_scene((1, index), kind=scene.KINDS[index % 3])


@pytest.fixture
def site() -> Site:
    return Site(np.random.default_rng(0), FLAT, (0.0, -3.0))


def test_a_seed_makes_one_scene() -> None:
    first, again, other = built(0), build_scene((1, 0), kind="street"), built(3)

    assert (first.mesh.triangles == again.mesh.triangles).all()
    assert (first.mesh.labels == again.mesh.labels).all()
    assert first.mesh.triangles.shape != other.mesh.triangles.shape


def test_scenes_hold_every_class_and_stay_small() -> None:
    for index in range(7):
        made = built(index)
        assert made.kind == scene.KINDS[index % 3]
        triangles = made.mesh.triangles
        assert set(made.mesh.labels.tolist()) == {2, 5, 6, 65, 66}
        assert 30_000 < len(triangles) < 500_000
        assert np.isfinite(triangles).all()
        lengths = np.linalg.norm(made.mesh.normals, axis=-1)
        assert (np.abs(lengths - 1) < 1e-3).mean() > 0.99
        glass = made.mesh.materials == GLASS
        assert glass.any()
        assert set(made.mesh.labels[glass].tolist()) <= {6, 66}


def test_nothing_stands_where_the_tripod_stands() -> None:
    for index in range(7):
        made = built(index).mesh
        solid = made.triangles[~np.isin(made.labels, [2, 5])].reshape(-1, 3)
        near = (np.hypot(solid[:, 0], solid[:, 1]) < 0.4) & (solid[:, 2] < 2.2)

        assert not near.any()


def test_ground_has_a_kerb() -> None:
    assert FLAT.height(0.0, [3.9, 4.1]).tolist() == pytest.approx([0.0, 0.15])
    assert FLAT.paved_range() == (-130, 4.03)


def test_ground_mesh_lies_on_the_ground(site: Site) -> None:
    FLAT.build(site.mesh, near=0.0)

    built = site.mesh.build(origin=np.zeros(3), yaw=0.0)

    points = built.triangles.reshape(-1, 3)
    level = np.abs(points[:, 1] - 4) > 0.1
    np.testing.assert_allclose(points[level, 2], FLAT.height(points[level, 0], points[level, 1]), atol=1e-3)


def test_taken_ground_is_not_given_twice(site: Site) -> None:
    assert site.take(10, 0, 6, 2, 0.0)
    assert not site.take(12, 0, 1, 1, 0.0)
    assert site.take(10, 4, 6, 2, 0.0)
    assert site.take(20, 0, 6, 2, np.pi / 2)
    assert site.take(23, 0, 2, 2, 0.0)
    assert not site.take(0, -3, 0.1, 0.1, 0.0)


def test_far_ground_can_be_taken(site: Site) -> None:
    assert site.take(-150, 0, 10, 10, 0.0)
    assert site.take(150, 150, 10, 10, 0.0)
