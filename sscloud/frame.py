"""The frame in which the network sees normals: the scanner's, or that of each pixel's viewing direction.

A convolution does not know its column, so in the scanner's frame the same wall has other colours at every azimuth. In
the view frame x points away from the scanner along the pixel's azimuth and y to the left of it; z stays up. A turn of
the scanner is then a mere roll of the columns, and a mirrored scene has y negated.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sscloud.image import no_return

Frame = Literal["scanner", "view"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Azimuth:
    """How columns relate to directions in a panorama, in the frame its normals are given in."""

    direction: Literal[1, -1]
    """+1 when the azimuth grows with the column."""
    column_0: float
    """Azimuth of the left edge of column 0, degrees counter-clockwise from +x seen from above."""

    def of_columns(self, width: int) -> NDArray[np.float64]:
        """(W,) azimuth of the middle of each column, radians."""
        angles: NDArray[np.float64] = np.radians(self.column_0) + self.direction * (np.arange(width) + 0.5) * (
            2 * np.pi / width
        )
        return angles


def to_view_frame(image: NDArray[np.uint8], azimuth: Azimuth) -> NDArray[np.uint8]:
    """Turn the normals of a whole panorama from the scanner's frame into the view frame.

    Args:
        image: (H, W, 3) uint8, encoded normals; no-returns stay as they are.
        azimuth: how its columns relate to directions.

    Returns:
        (H, W, 3) uint8.
    """
    return rotate_normals(image, -azimuth.of_columns(image.shape[1]))


def rotate_normals(image: NDArray[np.uint8], angle: NDArray[np.float64] | float) -> NDArray[np.uint8]:
    """Rotate the normals of every return about the vertical axis; the pixels stay where they are.

    Args:
        image: (H, W, 3) uint8, encoded normals; no-returns stay as they are.
        angle: of all columns, or (W,) of each; radians, counter-clockwise seen from above.

    Returns:
        (H, W, 3) uint8.
    """
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x, y = image[..., 0] - np.float32(127.5), image[..., 1] - np.float32(127.5)
    return _with_horizontal(image, cosine * x - sine * y, sine * x + cosine * y)


def reflect_normals(image: NDArray[np.uint8], azimuth: float) -> NDArray[np.uint8]:
    """Reflect the normals of every return at the vertical plane through an azimuth; the pixels stay where they are.

    Args:
        image: (H, W, 3) uint8, encoded normals; no-returns stay as they are.
        azimuth: of the plane, degrees.

    Returns:
        (H, W, 3) uint8.
    """
    double = 2 * np.radians(azimuth)
    cosine, sine = np.float32(np.cos(double)), np.float32(np.sin(double))
    x, y = image[..., 0] - np.float32(127.5), image[..., 1] - np.float32(127.5)
    return _with_horizontal(image, cosine * x + sine * y, sine * x - cosine * y)


def _with_horizontal(image: NDArray[np.uint8], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image with other (nx, ny), (H, W) float32 in steps of the encoding from zero, where there is a return."""
    changed = image.copy()
    changed[..., 0] = np.rint(x + np.float32(127.5)).clip(0, 255)
    changed[..., 1] = np.rint(y + np.float32(127.5)).clip(0, 255)
    black = no_return(image)
    changed[black] = image[black]
    return changed
