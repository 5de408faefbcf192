"""CVAT shapes → label map, pixel for pixel as CVAT's own mask export.

CVAT's export hands polygons to pycocotools, so this module does too: no other filling rule gives the same pixels. Later
shapes cover earlier ones; where shapes have a z_order, a stable sort on it comes first.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

MAX_OUTLINE = 1 << 22
"""Longest outline of one polygon, pixels. pycocotools walks the outline in steps of a fifth of a pixel and takes 40
bytes a pixel for it, so this bounds a polygon to about 170 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolygonShape:
    """A filled polygon in image coordinates, where a pixel is the square [x, x+1] x [y, y+1]."""

    label: str
    points: NDArray[np.float64]
    """(N, 2) float64, x before y, at least three points; the last is joined to the first."""
    z_order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskShape:
    """A binary mask with the box it lies in."""

    label: str
    box_xyxy: tuple[int, int, int, int]
    """Half-open, inside the image."""
    mask: NDArray[np.bool_]
    """(y2 - y1, x2 - x1) bool."""
    z_order: int = 0


Shape = PolygonShape | MaskShape


def rectangle(
    label: str, box_xyxy: tuple[float, float, float, float], *, rotation: float = 0.0, z_order: int = 0
) -> PolygonShape:
    """A rectangle, turned by `rotation` degrees about its centre (clockwise on the screen), as CVAT turns it."""
    x1, y1, x2, y2 = box_xyxy
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], np.float64)
    if rotation:
        centre = np.array([(x1 + x2) / 2, (y1 + y2) / 2])
        angle = math.radians(rotation)
        turn = np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])
        corners = (corners - centre) @ turn.T + centre
    return PolygonShape(label=label, points=corners, z_order=z_order)


def rasterise(
    shapes: Iterable[Shape],
    *,
    size_hw: tuple[int, int],
    label_id_of: Callable[[str], int | None],
    fill: int,
) -> NDArray[np.uint8]:
    """Paint shapes in the order of their z_order, equal ones in the order given.

    Args:
        shapes: polygons may reach over the border, up to one image size; masks lie inside.
        size_hw: of the image.
        label_id_of: the id that shapes with this label name paint; None leaves such shapes out.
        fill: the label id where no shape is.

    Returns:
        (H, W) uint8 label ids.

    Raises:
        ValueError: a polygon that `check_polygon` refuses, or a mask that does not fit its box or the image.
    """
    height, width = size_hw
    label_map = np.full(size_hw, fill, np.uint8)
    for shape in sorted(shapes, key=lambda shape: shape.z_order):
        label_id = label_id_of(shape.label)
        if label_id is None:
            continue
        if isinstance(shape, MaskShape):
            x1, y1, x2, y2 = shape.box_xyxy
            if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height) or shape.mask.shape != (y2 - y1, x2 - x1):
                raise ValueError(
                    f"a mask of {shape.mask.shape[1]}x{shape.mask.shape[0]} pixels with the box {shape.box_xyxy} "
                    f"does not fit an image of {width}x{height}"
                )
            label_map[y1:y2, x1:x2][shape.mask] = label_id
        else:
            _paint_polygon(label_map, shape.points, label_id)
    return label_map


def check_polygon(points: NDArray[np.float64], *, size_hw: tuple[int, int]) -> None:
    """Refuse what pycocotools would crash on or fill with gigabytes.

    Raises:
        ValueError: not (N, 2) with N of at least 3, numbers that are not finite, points more than one image size
            outside, or an outline longer than `MAX_OUTLINE`.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError(f"a polygon of {len(points)} points encloses nothing; at least 3 are needed")
    if not np.isfinite(points).all():
        raise ValueError("a polygon has a coordinate that is not a finite number")
    size_xy = np.array(size_hw[::-1], np.float64)
    if (points < -size_xy).any() or (points > 2 * size_xy).any():
        raise ValueError(f"a polygon reaches far outside the image of {size_hw[1]}x{size_hw[0]} pixels")
    outline = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        raise ValueError(f"the outline of a polygon is {outline:.0f} pixels long; at most {MAX_OUTLINE} are filled")


def _paint_polygon(label_map: NDArray[np.uint8], points: NDArray[np.float64], label_id: int) -> None:
    height, width = label_map.shape
    check_polygon(points, size_hw=(height, width))
    encoded = coco.frPyObjects([points.ravel()], height, width)[0]
    left, top, box_width, box_height = (int(value) for value in coco.toBbox(encoded))
    box = np.s_[top : top + box_height, left : left + box_width]
    with warnings.catch_warnings():
        # pycocotools 2.0.11 returns its array by a protocol that numpy 2 calls outdated; the result is right.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        filled = coco.decode(encoded)
    label_map[box][filled[box].astype(bool)] = label_id
