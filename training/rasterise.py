"""CVAT shapes → label map, pixel for pixel as CVAT's own mask export.

CVAT's export rounds the corners of a polygon to hundredths, keeps them as 32-bit floats and hands them to pycocotools;
an ellipse it draws with OpenCV from a centre and radii rounded to whole pixels. So does this module: no other rules
give the same pixels. Later shapes cover earlier ones, after a stable sort on z_order.

Two habits of CVAT's mask export are not followed, because they lose what people drew: it gives all masks of one group
the label of the largest, and it paints rotated rectangles above all other shapes of their z_order.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from training.run_lengths import decode_columns, decode_rows, decompress

RULE_VERSION: Final = 1
"""Counts changes of what `rasterise` paints, so that a mask painted by an older rule is not taken for current."""

MAX_OUTLINE: Final = 1 << 22
"""Longest outline of one polygon, pixels. pycocotools walks the outline in steps of a fifth of a pixel and takes 40
bytes a pixel for it, so this bounds a polygon to about 170 MB."""

NOBODY: Final = 0
PEOPLE: Final = 1
AUTO: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PolygonShape:
    """A filled polygon in image coordinates, where a pixel is the square [x, x+1] x [y, y+1]."""

    label: str
    points: NDArray[np.float64]
    """(N, 2) float64, x before y, at least three points; the last is joined to the first."""
    z_order: int = 0
    auto: bool = False
    """Whether a model drew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskShape:
    """A binary mask with the box it lies in."""

    label: str
    box_xyxy: tuple[int, int, int, int]
    """Half-open, inside the image."""
    mask: NDArray[np.bool_]
    """(y2 - y1, x2 - x1) bool."""
    z_order: int = 0
    auto: bool = False
    """Whether a model drew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLengthShape:
    """A binary mask as CVAT stores it, unfolded only while it is painted: a panorama's masks do not fit in memory."""

    label: str
    box_xyxy: tuple[int, int, int, int]
    """Half-open, inside the image."""
    runs: NDArray[np.int64]
    """Lengths of alternating runs of zeros and ones along the rows of the box, zeros first."""
    z_order: int = 0
    auto: bool = False
    """Whether a model drew it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EllipseShape:
    """A filled ellipse."""

    label: str
    centre_xy: tuple[float, float]
    radii_xy: tuple[float, float]
    """Half of its width and height before it is turned."""
    rotation: float = 0.0
    """Degrees, clockwise on the screen."""
    z_order: int = 0
    auto: bool = False
    """Whether a model drew it."""


Shape = PolygonShape | MaskShape | RunLengthShape | EllipseShape


class Raster(NamedTuple):
    """A painted frame."""

    label_map: NDArray[np.uint8]
    """(H, W) uint8 label ids."""
    source_map: NDArray[np.uint8]
    """(H, W) uint8: who drew the shape on top, `NOBODY`, `PEOPLE` or `AUTO`."""


def rectangle(
    label: str,
    box_xyxy: tuple[float, float, float, float],
    *,
    rotation: float = 0.0,
    z_order: int = 0,
    auto: bool = False,
) -> PolygonShape:
    """A rectangle, turned by `rotation` degrees about its centre (clockwise on the screen), as CVAT turns it."""
    x1, y1, x2, y2 = box_xyxy
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], np.float64)
    if rotation:
        centre = np.array([(x1 + x2) / 2, (y1 + y2) / 2])
        angle = math.radians(rotation)
        turn = np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])
        corners = (corners - centre) @ turn.T + centre
    return PolygonShape(label=label, points=corners, z_order=z_order, auto=auto)


def rasterise(
    shapes: Iterable[Shape],
    *,
    size_hw: tuple[int, int],
    label_id_of: Callable[[str], int | None],
    fill: int,
) -> Raster:
    """Paint shapes in the order of their z_order, equal ones in the order given, whoever drew them.

    Args:
        shapes: polygons and ellipses may reach over the border, up to one image size; masks lie inside.
        size_hw: of the image.
        label_id_of: the id that shapes with this label name paint; None leaves such shapes out.
        fill: the label id where no shape is.

    Returns:
        The label ids, and who drew them.

    Raises:
        ValueError: a shape that `check_polygon` or `check_ellipse` refuses, or a mask that does not fit its box or the
            image.
    """
    raster = Raster(np.full(size_hw, fill, np.uint8), np.full(size_hw, NOBODY, np.uint8))
    for shape in sorted(shapes, key=lambda shape: shape.z_order):
        label_id = label_id_of(shape.label)
        if label_id is None:
            continue
        values = (label_id, AUTO if shape.auto else PEOPLE)
        if isinstance(shape, EllipseShape):
            _paint_ellipse(raster, shape, values)
            continue
        (x1, y1, x2, y2), mask = cover(shape, size_hw=size_hw)
        for plane, value in zip(raster, values, strict=True):
            np.copyto(plane[y1:y2, x1:x2], np.uint8(value), where=mask)
    return raster


def cover(shape: Shape, *, size_hw: tuple[int, int]) -> tuple[tuple[int, int, int, int], NDArray[np.bool_]]:
    """The pixels that a shape covers.

    Args:
        shape: see `rasterise`.
        size_hw: of the image.

    Returns:
        A half-open box xyxy inside the image, and the (y2 - y1, x2 - x1) bool mask of its pixels.

    Raises:
        ValueError: see `rasterise`.
    """
    if isinstance(shape, PolygonShape):
        return _fill(shape.points, size_hw)
    if isinstance(shape, EllipseShape):
        raster = Raster(np.zeros(size_hw, np.uint8), np.zeros(size_hw, np.uint8))
        _paint_ellipse(raster, shape, (1, 1))
        return (0, 0, size_hw[1], size_hw[0]), raster.label_map.astype(np.bool_)
    mask = _unfold(shape)
    _check_mask(shape.box_xyxy, mask, size_hw)
    return shape.box_xyxy, mask


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


def check_ellipse(shape: EllipseShape, *, size_hw: tuple[int, int]) -> None:
    """Refuse what OpenCV would stumble over.

    Raises:
        ValueError: numbers that are not finite, negative radii, or an ellipse more than one image size outside.
    """
    if not all(map(math.isfinite, (*shape.centre_xy, *shape.radii_xy, shape.rotation))):
        raise ValueError("an ellipse has a number that is not finite")
    if min(shape.radii_xy) < 0:
        raise ValueError(f"an ellipse has the radii {shape.radii_xy[0]:g} and {shape.radii_xy[1]:g}; none is negative")
    height, width = size_hw
    (x, y), radius = shape.centre_xy, max(shape.radii_xy)
    if not (-width <= x <= 2 * width and -height <= y <= 2 * height and radius <= 2 * max(size_hw)):
        raise ValueError(f"an ellipse reaches far outside the image of {width}x{height} pixels")


def _unfold(shape: MaskShape | RunLengthShape) -> NDArray[np.bool_]:
    if isinstance(shape, MaskShape):
        return shape.mask
    x1, y1, x2, y2 = shape.box_xyxy
    return decode_rows(shape.runs, (y2 - y1, x2 - x1))


def _check_mask(box_xyxy: tuple[int, int, int, int], mask: NDArray[np.bool_], size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    x1, y1, x2, y2 = box_xyxy
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height) or mask.shape != (y2 - y1, x2 - x1):
        raise ValueError(
            f"a mask of {mask.shape[1]}x{mask.shape[0]} pixels with the box {box_xyxy} does not fit an image of "
            f"{width}x{height}"
        )


def _fill(points: NDArray[np.float64], size_hw: tuple[int, int]) -> tuple[tuple[int, int, int, int], NDArray[np.bool_]]:
    check_polygon(points, size_hw=size_hw)
    exported = np.round(points, 2).astype(np.float32).astype(np.float64)
    # The outline is walked in the coordinates of the whole image: moved to a crop's, it would be rounded otherwise.
    encoded = coco.frPyObjects([exported.ravel()], *size_hw)[0]
    return decode_columns(decompress(encoded["counts"]), size_hw)


def _paint_ellipse(raster: Raster, shape: EllipseShape, values: tuple[int, int]) -> None:
    check_ellipse(shape, size_hw=raster.label_map.shape)
    centre = (round(shape.centre_xy[0]), round(shape.centre_xy[1]))
    radii = (round(shape.radii_xy[0]), round(shape.radii_xy[1]))
    for plane, value in zip(raster, values, strict=True):
        cv2.ellipse(plane, centre, radii, shape.rotation, 0, 360, value, thickness=cv2.FILLED)
