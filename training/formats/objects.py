"""What the two JSON formats, COCO and Datumaro, share: objects whose masks are COCO's run lengths."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.formats.documents import shown
from training.formats.entry import Size
from training.rasterise import MaskShape, PolygonShape, check_polygon, rectangle
from training.run_lengths import decode_columns, decompress, integers


def mask(value: object, *, label: str, size_hw: Size, z_order: int = 0) -> MaskShape:
    """A mask from `{"size": [H, W], "counts": …}`, run lengths as numbers or compressed.

    Raises:
        ValueError: of another form or size, or runs that do not add up.
    """
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str | list):
        raise ValueError(  # noqa: TRY004 - what is wrong is the file, here and below
            f"its mask must hold 'size' and 'counts', found {shown(value)}"
        )
    if value.get("size") != list(size_hw):
        raise ValueError(f"its mask is made for the size {shown(value.get('size'))}, the image has {list(size_hw)}")
    counts = value["counts"]
    # Characters that compressed run lengths cannot hold are refused there, also those beyond ASCII.
    runs = decompress(counts.encode()) if isinstance(counts, str) else integers(counts)
    box_xyxy, pixels = decode_columns(runs, size_hw)
    return MaskShape(label=label, box_xyxy=box_xyxy, mask=pixels, z_order=z_order)


def polygon(value: object, *, label: str, size_hw: Size, z_order: int = 0) -> PolygonShape:
    """A polygon from [x, y, …].

    Raises:
        ValueError: not such a list, or one that `check_polygon` refuses.
    """
    points = numbers(value)
    if len(points) % 2:
        raise ValueError(f"its {len(points)} numbers are no pairs of x and y")
    shape = PolygonShape(label=label, points=points.reshape(-1, 2), z_order=z_order)
    check_polygon(shape.points, size_hw=size_hw)
    return shape


def box(value: object, attributes: Mapping[str, Any], *, label: str, size_hw: Size, z_order: int = 0) -> PolygonShape:
    """A rectangle from [x, y, width, height], turned by the attribute `rotation` in degrees.

    Raises:
        ValueError: not four numbers, or far outside the image.
    """
    values = numbers(value)
    if len(values) != 4:
        raise ValueError(f"its bbox must hold 4 numbers, found {len(values)}")
    x, y, width, height = values.tolist()
    shape = rectangle(label, (x, y, x + width, y + height), rotation=rotation(attributes), z_order=z_order)
    check_polygon(shape.points, size_hw=size_hw)
    return shape


def rotation(attributes: Mapping[str, Any]) -> float:
    """The attribute `rotation` in degrees; 0 without one.

    Raises:
        ValueError: it is no finite number.
    """
    value = attributes.get("rotation", 0.0)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"its rotation is {shown(value)}, a number of degrees is expected")
    return float(value)


def numbers(value: object) -> NDArray[np.float64]:
    """(N,) float64 of a list of numbers.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"a list of numbers is expected, found {shown(value)}")  # noqa: TRY004
    try:
        found = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its coordinates are not all numbers") from error
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError("its coordinates are not all finite numbers")
    return found
