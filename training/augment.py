"""Turning and mirroring panoramas, in which the encoded normals turn along.

A roll of the columns alone would show a scan whose walls face the wrong way. Rolling by k columns moves every surface
by the azimuth direction · 2πk/W, so its normal turns about the vertical axis by the same angle. Reversing the columns
mirrors the scene at the vertical plane through the azimuth of column 0, and with it (nx, ny). No-returns stay black.
"""

import numpy as np
from numpy.typing import NDArray

from sscloud.frame import Azimuth
from sscloud.image import NO_RETURN_BELOW

Image = NDArray[np.float32]
ClassMap = NDArray[np.uint8]


def yaw(image: Image, class_map: ClassMap, columns: int, azimuth: Azimuth) -> tuple[Image, ClassMap]:
    """The same scan by a scanner turned about its axis.

    Args:
        image: (H, W, 3) float32 normals, encoded to 0..1.
        class_map: (H, W) uint8.
        columns: how far the picture moves to the right.
        azimuth: how columns relate to directions.
    """
    angle = azimuth.direction * 2 * np.pi * columns / image.shape[1]
    turned = _transform_normals(image, np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]))
    return np.roll(turned, columns, axis=1), np.roll(class_map, columns, axis=1)


def mirror(image: Image, class_map: ClassMap, azimuth: Azimuth) -> tuple[Image, ClassMap]:
    """The mirrored scene: columns reversed, normals reflected at the vertical plane through the azimuth of column 0."""
    double = 2 * np.deg2rad(azimuth.column_0)
    reflection = np.array([[np.cos(double), np.sin(double)], [np.sin(double), -np.cos(double)]])
    return _transform_normals(image, reflection)[:, ::-1], class_map[:, ::-1]


def _transform_normals(image: Image, matrix: NDArray[np.float64]) -> Image:
    """Apply a 2x2 matrix to (nx, ny) of every return."""
    changed = image.copy()
    changed[..., :2] = (image[..., :2] * 2 - 1) @ matrix.T.astype(np.float32) / 2 + 0.5
    black = image.max(axis=2) < NO_RETURN_BELOW / 255
    changed[black] = image[black]
    return changed


class YawMirror:
    """Random yaw over the full turn, mirrored half of the time; for normals panoramas."""

    def __init__(self, azimuth: Azimuth) -> None:
        self._azimuth = azimuth

    def __call__(self, image: Image, class_map: ClassMap, rng: np.random.Generator) -> tuple[Image, ClassMap]:
        """Augment one panorama."""
        image, class_map = yaw(image, class_map, int(rng.integers(image.shape[1])), self._azimuth)
        if rng.random() < 0.5:
            image, class_map = mirror(image, class_map, self._azimuth)
        return image, class_map


class RollFlip:
    """The same for colours, of which only the pixels move."""

    def __call__(self, image: Image, class_map: ClassMap, rng: np.random.Generator) -> tuple[Image, ClassMap]:
        """Augment one panorama."""
        columns, step = int(rng.integers(image.shape[1])), -1 if rng.random() < 0.5 else 1
        return np.roll(image, columns, axis=1)[:, ::step], np.roll(class_map, columns, axis=1)[:, ::step]
