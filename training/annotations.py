"""Shapes as CVAT's API lists them → shapes that can be painted, and what identifies them.

The rules are those of CVAT's serializers (`LabeledShape`): `points` of a polygon is [x, y, …]; of a rectangle
[x1, y1, x2, y2]; of an ellipse [centre x, centre y, right-most x, top-most y]; both are turned by `rotation` degrees
about their centre; of a mask run lengths of its box, row by row, zeros first, then the box with its last column and
row.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sscloud.errors import DatasetError
from training.rasterise import (
    EllipseShape,
    PolygonShape,
    RunLengthShape,
    Shape,
    check_ellipse,
    check_polygon,
    rectangle,
)
from training.run_lengths import check_rows

AUTO: Final = "auto"
"""The `source` of what a function drew, until a person draws it anew. CVAT leaves it when a person only cuts pixels."""
PAINTED: Final = frozenset({"polygon", "mask", "rectangle", "ellipse"})
"""The types that cover pixels. The others mark places, boxes in space, or whole frames."""
MAX_POINTS: Final = 1 << 24
"""Most numbers of one shape; a mask of 8192x4096 with every second pixel set has 2^24."""

_PAINTED_BY: Final = ("type", "label_id", "points", "z_order", "rotation", "source")
_IDENTITY: Final = ("type", "label_id", "points", "z_order", "rotation", "occluded", "outside", "group", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Painting:
    """The shapes of one frame."""

    shapes: tuple[Shape, ...]
    """In the server's order."""
    skipped: Mapping[str, int]
    """Type → number of shapes that cover no pixels."""


def painting(
    raws: Iterable[Mapping[str, Any]], *, label_names: Mapping[int, str], size_hw: tuple[int, int]
) -> Painting:
    """Turn a frame's shapes into what `rasterise` paints.

    Every shape keeps its own label, in a group as well. (CVAT's own mask export gives all masks of a group the label of
    the largest one.)

    Args:
        raws: shapes of one frame, as `Server.annotations` lists them.
        label_names: label id → name; ids of the project or task.
        size_hw: of the image.

    Raises:
        DatasetError: a shape that cannot be painted; names it by its number.
    """
    shapes: list[Shape] = []
    skipped: Counter[str] = Counter()
    for raw in raws:
        kind = raw["type"]
        if kind not in PAINTED:
            skipped[str(kind)] += 1
            continue
        name = label_names.get(raw["label_id"])
        where = f"shape {raw.get('id')} ({kind}, {name or raw['label_id']})"
        if name is None:
            raise DatasetError(
                f"{where} has a label that the task does not have. Reload the task in CVAT and correct it."
            )
        try:
            shapes.append(_shape(raw, kind, name, size_hw))
        except ValueError as error:
            raise DatasetError(f"{where}: {error}. Correct or delete it in CVAT.") from error
    return Painting(shapes=tuple(shapes), skipped=dict(skipped))


def is_auto(raw: Mapping[str, Any]) -> bool:
    """Whether CVAT says that a function drew the shape."""
    return raw.get("source") == AUTO


def fingerprint(raw: Mapping[str, Any]) -> str:
    """What makes two shapes of a frame the same: everything a person can change, but not the number.

    CVAT gives a shape a new number whenever it is saved after a change.
    """
    values = {key: raw.get(key) for key in _IDENTITY}
    values["group"] = values["group"] or 0
    values["attributes"] = sorted((a.get("spec_id"), a.get("value")) for a in raw.get("attributes") or [])
    values["points"] = [float(point) for point in raw["points"]]
    return _hash(values)


def digest(raws: Sequence[Mapping[str, Any]]) -> str:
    """Identity of a frame's shapes in their order, as far as a mask depends on them: not of numbers and attributes."""
    return _hash([[raw.get(key) for key in _PAINTED_BY] for raw in raws])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def _shape(raw: Mapping[str, Any], kind: str, label: str, size_hw: tuple[int, int]) -> Shape:
    points = _numbers(raw["points"])
    z_order, rotation = raw.get("z_order") or 0, raw.get("rotation") or 0.0
    if not isinstance(z_order, int) or not isinstance(rotation, int | float) or not math.isfinite(rotation):
        raise ValueError(f"its z_order {z_order!r:.40} or rotation {rotation!r:.40} is no number")
    auto = is_auto(raw)
    if kind == "mask":
        box_xyxy, runs = _mask(points, size_hw)
        return RunLengthShape(label=label, box_xyxy=box_xyxy, runs=runs, z_order=z_order, auto=auto)
    if kind == "polygon":
        if len(points) % 2:
            raise ValueError(f"{len(points)} numbers are no pairs of x and y")
        corners = points.reshape(-1, 2)
        check_polygon(corners, size_hw=size_hw)
        return PolygonShape(label=label, points=corners, z_order=z_order, auto=auto)
    if len(points) != 4:
        raise ValueError(f"a {kind} has 4 numbers, this one {len(points)}")
    x1, y1, x2, y2 = (float(value) for value in points)
    if kind == "rectangle":
        shape = rectangle(label, (x1, y1, x2, y2), rotation=rotation, z_order=z_order, auto=auto)
        check_polygon(shape.points, size_hw=size_hw)
        return shape
    ellipse = EllipseShape(
        label=label, centre_xy=(x1, y1), radii_xy=(x2 - x1, y1 - y2), rotation=rotation, z_order=z_order, auto=auto
    )
    check_ellipse(ellipse, size_hw=size_hw)
    return ellipse


def _mask(points: NDArray[np.float64], size_hw: tuple[int, int]) -> tuple[tuple[int, int, int, int], NDArray[np.int64]]:
    """Half-open box xyxy and run lengths of a mask's points."""
    # 2^53: above it not every whole number is a float, and far above it none is an integer of 64 bits.
    if len(points) < 5 or not (points == np.floor(points)).all() or np.abs(points).max() > 2**53:
        raise ValueError("its points are no run lengths with a box")
    left, top, right, bottom = (int(value) for value in points[-4:])
    height, width = size_hw
    if not (0 <= left <= right < width and 0 <= top <= bottom < height):
        raise ValueError(f"its box {left, top, right, bottom} leaves the image of {width}x{height} pixels")
    runs = points[:-4].astype(np.int64)
    check_rows(runs, (bottom + 1 - top, right + 1 - left))
    return (left, top, right + 1, bottom + 1), runs


def _numbers(points: Sequence[Any]) -> NDArray[np.float64]:
    if len(points) > MAX_POINTS:
        raise ValueError(f"it has {len(points)} numbers; at most {MAX_POINTS} are read")
    try:
        numbers = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its points are not all numbers") from error
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError("its points are not all finite numbers")
    return numbers
