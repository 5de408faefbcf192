import numpy as np
import pytest
from numpy.typing import NDArray

from training.latitude import row_weights


def counted(height: int, elevation: tuple[float, float]) -> NDArray[np.float64]:
    """Points spread evenly over the sphere (evenly in z, by Archimedes), counted by row."""
    points = np.degrees(np.arcsin(np.linspace(-1, 1, 2_000_001)))
    points = points[(points <= elevation[0]) & (points >= elevation[1])]
    rows = np.minimum((elevation[0] - points) / (elevation[0] - elevation[1]) * height, height - 1).astype(int)
    counts = np.bincount(rows, minlength=height)
    return np.asarray(counts / counts.mean())


@pytest.mark.parametrize("elevation", [(90.0, -90.0), (90.0, -60.0), (30.0, 10.0)])
@pytest.mark.parametrize("height", [1, 2, 41])
def test_is_the_area_on_the_sphere(height: int, elevation: tuple[float, float]) -> None:
    found = row_weights(height, elevation)

    assert found.shape == (height,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, counted(height, elevation), rtol=5e-3)
    assert found.mean() == pytest.approx(1)


def test_poles_count_little_but_not_nothing() -> None:
    found = row_weights(64, (90.0, -90.0))

    np.testing.assert_allclose(found, found[::-1], atol=1e-12)
    assert 0 < found[0] < 0.05 * found[32]
    assert (np.diff(found[:32]) > 0).all()
