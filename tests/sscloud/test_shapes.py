"""The function's answer: its text, and painted back."""

import json
import re
from typing import Any

import numpy as np
import pytest

from sscloud.outlines import outlines, points_json
from sscloud.regions import Region, find_regions
from sscloud.shapes import Drawing, answer_json, paint_answer


def answer(label_map: np.ndarray[Any, np.dtype[np.uint8]], *, polygons: bool = False) -> str:
    regions = find_regions(label_map, background_ids=(0,)).regions
    points = points_json(outlines(regions, (label_map.shape[0], label_map.shape[1])))
    drawings = [
        Drawing(region=region, label=f"№ {region.label_id}", points=text, as_polygon=polygons)
        for region, text in zip(regions, points, strict=True)
    ]
    return answer_json(drawings, model="street v3")


class TestAnswerJson:
    def test_golden(self) -> None:
        label_map = np.array([[2, 2, 0], [0, 2, 0]], np.uint8)
        (item,) = json.loads(answer(label_map))
        assert item == {
            "label": "№ 2",
            "type": "mask",
            "mask": [1, 1, 0, 1, 0, 0, 1, 1],
            "points": item["points"],
            "confidence": "1.00",
            "attributes": [{"name": "model", "value": "street v3"}, {"name": "confidence", "value": "1.00"}],
        }
        corners = set(zip(item["points"][0::2], item["points"][1::2], strict=True))
        assert corners == {(0, 0), (2, 0), (2, 2), (1, 2), (1, 1), (0, 1)}

    def test_polygons_have_no_pixels(self) -> None:
        items = json.loads(answer(np.array([[2, 2, 0], [0, 5, 0]], np.uint8), polygons=True))
        assert [(item["type"], item["label"], len(item["points"])) for item in items] == [
            ("polygon", "№ 2", 8),
            ("polygon", "№ 5", 8),
        ]
        assert not any("mask" in item for item in items)

    @pytest.mark.parametrize("polygons", [False, True])
    def test_no_region(self, polygons: bool) -> None:
        assert answer(np.zeros((3, 4), np.uint8), polygons=polygons) == "[]"

    def test_is_compact_ascii_at_every_alignment(self) -> None:
        rng = np.random.default_rng(0)
        for width in range(1, 12):
            text = answer(rng.choice(np.array([0, 2, 10, 255], np.uint8), (7, width)))
            assert text.isascii()
            packed = json.dumps(json.loads(text), separators=(",", ":"))
            assert len(packed) <= len(text) <= len(packed) + text.count("{")

    def test_rebuilds_the_label_map(self) -> None:
        label_map = np.random.default_rng(1).choice(np.array([0, 2, 66], np.uint8), (16, 24))
        items = json.loads(answer(label_map))
        found = paint_answer(items, (16, 24), label_id_of=lambda name: int(name.split()[1]), fill=0)
        assert np.array_equal(found, label_map)

    def test_a_region_that_fills_its_box(self) -> None:
        ones = np.full((2, 3), 2, np.uint8)
        assert json.loads(answer(ones))[0]["mask"] == [1] * 6 + [0, 0, 2, 1]
        assert isinstance(find_regions(ones).regions[0], Region)


class TestPaintAnswer:
    def paint(self, *items: tuple[str, list[int]]) -> list[list[int]]:
        answer = [{"label": label, "type": "mask", "mask": mask} for label, mask in items]
        found = paint_answer(answer, (3, 4), label_id_of={"a": 2, "b": 66}.__getitem__, fill=9)
        assert found.dtype == np.uint8
        assert found.shape == (3, 4)
        rows: list[list[int]] = found.tolist()
        return rows

    def test_boxes_are_inclusive_and_later_items_cover_earlier_ones(self) -> None:
        assert self.paint(("a", [1, 1, 1, 0, 1, 1, 0, 0, 2, 1]), ("b", [1, 2, 0, 2, 0])) == [
            [2, 2, 66, 9],
            [9, 2, 2, 9],
            [9, 9, 9, 9],
        ]

    def test_no_item_leaves_the_fill(self) -> None:
        assert self.paint() == [[9] * 4] * 3

    def test_the_whole_image(self) -> None:
        assert self.paint(("b", [1] * 12 + [0, 0, 3, 2])) == [[66] * 4] * 3

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([1, 1, 1, 0, 0, 1, 1], "A mask of 3 pixels with the box x 0-1, y 0-1 does not fit an image of 4x3"),
            ([1, 4, 0, 4, 0], "the box x 4-4, y 0-0 does not fit"),
            ([1, 0, 3, 0, 3], "the box x 0-0, y 3-3 does not fit"),
            ([1, -1, 0, -1, 0], "the box x -1--1, y 0-0 does not fit"),
            ([2, 1, 1, 0], "A mask of 0 pixels with the box x 2-1, y 1-0 does not fit"),
        ],
    )
    def test_masks_that_do_not_fit(self, mask: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self.paint(("a", mask))

    def test_only_masks(self) -> None:
        with pytest.raises(ValueError, match="Only masks are painted, found a polygon"):
            paint_answer([{"type": "polygon", "points": []}], (3, 4), label_id_of=int, fill=0)
