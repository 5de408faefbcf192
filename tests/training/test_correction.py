"""Pre-labels beside results, drawn in ASCII."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cvat_standin import mask, polygon
from training.correction import ShapeChanges, count_pixels, count_shapes

LABELS = {"g": 1, "h": 2}
NAMES = {1: "Земля", 2: "Здание"}


def letters(text: str) -> NDArray[np.str_]:
    rows = [list(row.strip()) for row in text.strip().splitlines()]
    return np.array(rows)


def shapes(text: str, **more: Any) -> list[Mapping[str, Any]]:
    """A mask for each letter."""
    drawn = letters(text)
    return [mask(LABELS[name], 0, drawn == name, **more) for name in sorted({*drawn.ravel().tolist()} - {"."})]


BEFORE = """
    ....hhhh
    gggghhhh
    gggg....
"""


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (BEFORE, (2, 0, 0, 0)),
        ("........\n........\n........", (0, 0, 2, 0)),
        ("....hhhh\ngggghhhh\nggg.....", (1, 1, 0, 0)),  # cut
        ("....gggg\ngggggggg\ngggg....", (0, 1, 1, 0)),  # one mask over both
        ("....hhhh\n.....hhh\ng.......", (0, 1, 1, 1)),  # so little is left of the ground that it was drawn anew
    ],
)
def test_shapes(after: str, expected: tuple[int, int, int, int]) -> None:
    found = count_shapes(shapes(BEFORE), shapes(after), label_names=NAMES, size_hw=(3, 8))
    assert (found.kept, found.changed, found.deleted, found.added) == expected


def test_another_label_or_attribute_is_a_change() -> None:
    before = shapes(BEFORE)
    for change in ({"label_id": 2}, {"attributes": [{"spec_id": 1, "value": "x"}]}, {"source": "manual"}):
        after = [{**before[0], **change}, before[1]]
        found = count_shapes(before, after, label_names=NAMES, size_hw=(3, 8))
        assert found == ShapeChanges(kept=1, changed=1, deleted=0, added=0)


def test_equal_shapes_are_counted_one_by_one_and_lines_are_none() -> None:
    (ground, house), line = shapes(BEFORE), {**polygon(1, 0, [0, 0, 5, 2]), "type": "polyline"}
    found = count_shapes([ground, ground], [ground, house, line], label_names=NAMES, size_hw=(3, 8))
    assert found == ShapeChanges(kept=1, changed=0, deleted=1, added=1)


def test_hundreds_of_shapes_that_all_moved() -> None:
    size_hw = (40, 80)
    before, after = [], []
    for place in range(300):
        y, x = 2 * (place // 20), 4 * (place % 20)
        for found, right in ((before, x + 3), (after, x + 2)):
            points = [x, y, right, y, right, y + 2, x, y + 2]
            found.append(polygon(1, 0, points))
    found = count_shapes(before, after[::-1], label_names=NAMES, size_hw=size_hw)
    assert found == ShapeChanges(kept=0, changed=300, deleted=0, added=0)


def test_a_shape_that_covers_another_takes_its_place() -> None:
    wide = polygon(1, 0, [0, 0, 8, 0, 8, 3, 0, 3])
    narrow = {"type": "ellipse", "label_id": 2, "frame": 0, "points": [3, 1, 6, 0], "z_order": 1}
    found = count_shapes([wide], [{**wide, "rotation": 360}, narrow], label_names=NAMES, size_hw=(3, 8))
    assert found == ShapeChanges(kept=0, changed=1, deleted=0, added=1)


def test_pixels_of_tall_maps() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.choice([0, 2, 6, 255], (2, 600, 5)).astype(np.uint8)
    counted = count_pixels(before, after)
    assert sum(counted.values()) == 3000
    for pair, count in counted.items():
        assert count == np.count_nonzero((before == pair[0]) & (after == pair[1])) > 0
