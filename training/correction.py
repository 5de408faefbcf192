"""What people changed in a frame: a pre-label beside its result, pixel by pixel and shape by shape."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training.annotations import PAINTED, painting
from training.prelabel_store import identity
from training.rasterise import Shape, cover

SAME: Final = 0.3
"""IoU from which a shape that is gone and one that is new are taken for one shape that was changed: CVAT gives changed
shapes new numbers."""

_ROWS: Final = 256
"""So many rows of a map are counted at a time: counting widens pixels to 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeChanges:
    """Numbers of shapes. A shape of which anything is new, its label alone too, is a changed one."""

    kept: int
    changed: int
    deleted: int
    added: int


def count_pixels(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> dict[tuple[int, int], int]:
    """Pixels by what they were and what they became: (label id, label id) → pixels; pairs without pixels are left out.

    Args:
        before: (H, W) uint8 label ids.
        after: (H, W) uint8 label ids.
    """
    table = np.zeros(1 << 16, np.int64)
    for rows in _row_blocks(len(before)):
        pairs = before[rows].astype(np.int64) << 8 | after[rows]
        table += np.bincount(pairs.ravel(), minlength=1 << 16)
    return {(int(pair >> 8), int(pair & 255)): int(table[pair]) for pair in np.flatnonzero(table)}


def count_shapes(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    label_names: Mapping[int, str],
    size_hw: tuple[int, int],
) -> ShapeChanges:
    """Which shapes people touched.

    Args:
        before: shapes of the pre-label, as the API has them.
        after: shapes of the result.
        label_names: label id → name, of both.
        size_hw: of the image.

    Raises:
        DatasetError: a shape that cannot be painted.
    """
    before = [raw for raw in before if raw["type"] in PAINTED]
    after = [raw for raw in after if raw["type"] in PAINTED]
    gone, new = _beyond(before, after), _beyond(after, before)
    changed = 0
    if gone and new:
        gone_shapes, new_shapes = (
            painting(raws, label_names=label_names, size_hw=size_hw).shapes for raws in (gone, new)
        )
        changed = count_same(gone_shapes, new_shapes, size_hw=size_hw)
    return ShapeChanges(
        kept=len(before) - len(gone), changed=changed, deleted=len(gone) - changed, added=len(new) - changed
    )


def count_same(gone: Sequence[Shape], new: Sequence[Shape], *, size_hw: tuple[int, int]) -> int:
    """Pairs of a gone and a new shape that are one shape, changed: the most alike first, each shape once."""
    maps = [_owners(shapes, size_hw) for shapes in (gone, new)]
    areas: list[Counter[int]] = [Counter(), Counter()]
    shared: Counter[tuple[int, int]] = Counter()
    for rows in _row_blocks(size_hw[0]):
        ours, theirs = (owners[rows].ravel() for owners in maps)
        for area, owners in zip(areas, (ours, theirs), strict=True):
            area.update(_counted(owners[owners > 0]))
        both = (ours > 0) & (theirs > 0)
        pairs = ours[both].astype(np.int64) * (len(new) + 1) + theirs[both]
        shared.update({divmod(pair, len(new) + 1): count for pair, count in _counted(pairs).items()})
    alike = sorted(
        ((count / (areas[0][a] + areas[1][b] - count), a, b) for (a, b), count in shared.items()),
        key=lambda each: (-each[0], each[1:]),
    )
    used: tuple[set[int], set[int]] = (set(), set())
    for iou, a, b in alike:
        if iou >= SAME and a not in used[0] and b not in used[1]:
            used[0].add(a)
            used[1].add(b)
    return len(used[0])


def _beyond(raws: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The shapes that the others do not have, of equal ones as many as the others lack."""
    there = Counter(identity(raw) for raw in others)
    beyond = []
    for raw in raws:
        key = identity(raw)
        if there[key] > 0:
            there[key] -= 1
        else:
            beyond.append(raw)
    return beyond


def _owners(shapes: Sequence[Shape], size_hw: tuple[int, int]) -> NDArray[Any]:
    """(H, W) number of the shape on top, from 1 in the order given; 0: none."""
    owners = np.zeros(size_hw, np.min_scalar_type(len(shapes)))
    for number, shape in sorted(enumerate(shapes, 1), key=lambda pair: pair[1].z_order):
        (x1, y1, x2, y2), mask = cover(shape, size_hw=size_hw)
        owners[y1:y2, x1:x2][mask] = number
    return owners


def _counted(values: NDArray[Any]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _row_blocks(height: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, height, _ROWS))
