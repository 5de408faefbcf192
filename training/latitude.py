"""What a row of a panorama is worth: pixels near the zenith cover less of the sphere than those at the horizon."""

import numpy as np
from numpy.typing import NDArray


def row_weights(height: int, elevation: tuple[float, float]) -> NDArray[np.float64]:
    """(H,) solid angle of a pixel in each row, relative to the mean of all rows.

    A pixel at elevation e of an equirectangular panorama covers a solid angle proportional to cos e; here integrated
    over the row's height, so that the rows at the poles do not vanish.

    Args:
        height: rows.
        elevation: of the top and the bottom edge, degrees.
    """
    edges = np.sin(np.radians(np.linspace(*elevation, height + 1)))
    covered = edges[:-1] - edges[1:]
    weights: NDArray[np.float64] = covered / covered.mean()
    return weights
