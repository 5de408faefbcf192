"""A panorama that needs no scan: a room seen from its middle, for asking a model whether it works at all."""

import numpy as np
from numpy.typing import NDArray

_PANEL = 1 / 16
"""Height of a panel, as a share of the picture's."""


def room(size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: encoded normals of a cube around the scanner."""
    height, width = size_hw
    elevation = (0.5 - (np.arange(height) + 0.5) / height) * np.pi
    azimuth = (np.arange(width) + 0.5) / width * 2 * np.pi
    level = np.cos(elevation)[:, None]
    up = np.broadcast_to(np.sin(elevation)[:, None], size_hw)
    direction = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), up], axis=-1)
    face = np.abs(direction).argmax(axis=-1)[..., None]
    normal = np.zeros_like(direction)
    np.put_along_axis(normal, face, -np.sign(np.take_along_axis(direction, face, axis=-1)), axis=-1)
    return _encoded(normal)


def panelled_room(size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: `room` with panels that face anywhere, and some that return nothing.

    A bare wall is one colour all over: where a model hesitates between two labels for it, rounding decides about a
    sixth of the picture. A panel is a two-hundredth or less.
    """
    height, width = size_hw
    side = max(1, round(height * _PANEL))
    rng = np.random.default_rng(0)
    panels_hw = -(-height // side), -(-width // side)
    normals = rng.normal(size=(*panels_hw, 3))
    panels = _encoded(normals / np.linalg.norm(normals, axis=-1, keepdims=True))
    kind = rng.random(panels_hw)
    panels[kind < 0.1] = 0

    def spread(values: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.uint8] | NDArray[np.bool_]:
        return values.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]

    return np.where(spread(kind < 0.6)[..., None], spread(panels), room(size_hw))


def _encoded(normals: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint((normals * 0.5 + 0.5) * 255).astype(np.uint8)
