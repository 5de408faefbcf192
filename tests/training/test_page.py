"""What the pages share: words, tables, curves and pictures."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from sscloud.errors import ImageError
from sscloud.labels import LabelSchema
from training.metrics import score
from training.page import (
    PICTURE_WIDTH,
    bytes_text,
    compare_maps,
    confusion_table,
    jpeg_uri,
    line_chart,
    name_of,
    panels,
    plural,
    score_text,
    seconds_text,
    share_rows,
    sparkline,
    ticks_between,
)


@pytest.fixture(scope="module")
def schema() -> LabelSchema:
    data = {"labels": [{"name": "Земля", "id": 2, "color": "#b5793c"}, {"name": "Здание", "id": 6}], "void": [7]}
    return LabelSchema.from_dict(data, source="the test")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.034, "0.03 s"),
        (9.96, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00 min"),
        (183.4, "3:03 min"),
        (3599.6, "1:00:00 h"),
        (7384, "2:03:04 h"),
        (math.nan, "—"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(17, "17 B"), (1234, "1 kB"), (2_345_678, "2.3 MB")])
def test_bytes(value: float, text: str) -> None:
    assert bytes_text(value) == text


def test_scores_and_counts() -> None:
    assert [score_text(value) for value in (0.12345, math.nan, None)] == ["0.123", "—", "—"]
    assert [plural(count, "panorama") for count in (0, 1, 2)] == ["0 panoramas", "1 panorama", "2 panoramas"]


def test_names(schema: LabelSchema) -> None:
    assert [name_of(schema, i) for i in (2, 7, 255, 9)] == ["Земля", "not labelled", "not labelled", "id 9"]


def test_shares_stand_in_the_order_of_the_schema(schema: LabelSchema) -> None:
    rows = share_rows({255: 0.1, 6: 0.5, 2: 0.4, 9: 0.0}, schema)
    assert [(row["name"], row["percent"]) for row in rows] == [("Земля", 40), ("Здание", 50), ("not labelled", 10)]
    assert rows[0]["color"] == "#b5793c"


def test_confusion_is_in_percent_of_the_true_pixels(schema: LabelSchema) -> None:
    table = confusion_table(score(np.array([[9_996, 4, 0], [0, 0, 0]]), (2, 6)), schema)
    assert table["names"] == ["Земля", "Здание"]
    assert [[cell["text"] for cell in row["cells"]] for row in table["rows"]] == [["100.0", "<0.1"], ["—", "—"]]
    assert [[cell["right"] for cell in row["cells"]] for row in table["rows"]] == [[True, False], [False, True]]


@pytest.mark.parametrize("high", [1e-6, 0.03, 0.31, 1.0, 1.7, 9.99, 1234.0])
def test_ticks_are_few_and_reach_the_top(high: float) -> None:
    ticks = ticks_between(0.0, high)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-6)


class TestLineChart:
    HISTORY = (
        {"epoch": 1, "loss": 2.0, "rate": 1e-3},
        {"epoch": 2, "loss": math.nan, "rate": 5e-4},
        {"epoch": 3, "loss": 1.0, "rate": 8e-7},
    )

    def test_lines_leave_gaps_out_and_end_at_the_last_epoch(self) -> None:
        chart = line_chart("Loss", self.HISTORY, {"loss": "training", "val_loss": "validation"})
        assert chart is not None
        (line,) = chart["lines"]
        (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line["points"].split())
        assert (x1, x2) == (chart["left"], chart["right"])
        assert (y1, line["last"]) == (chart["top"], "1.000")
        assert y2 == (chart["top"] + chart["bottom"]) / 2

    def test_the_marked_epoch(self) -> None:
        chart = line_chart("Rate", self.HISTORY, {"rate": "rate"}, mark=2, digits=".2g")
        assert chart is not None
        assert chart["mark"] == pytest.approx((chart["left"] + chart["right"]) / 2)
        assert chart["lines"][0]["last"] == "8e-07"
        beyond = line_chart("Rate", self.HISTORY, {"rate": "rate"}, mark=4)
        assert beyond is not None
        assert beyond["mark"] is None

    def test_nothing_to_draw(self) -> None:
        assert line_chart("mIoU", self.HISTORY, {"miou": "mIoU"}) is None


class TestSparkline:
    def test_runs_from_corner_to_corner(self) -> None:
        curve = sparkline([{"epoch": 1, "iou_2": 0.0}, {"epoch": 2}, {"epoch": 9, "iou_2": 1.0}], "iou_2")
        assert curve is not None
        assert curve["points"] == "3.0,41.0 157.0,3.0"
        assert curve["last"] == 1.0

    def test_one_epoch_is_a_point_in_the_middle(self) -> None:
        curve = sparkline([{"epoch": 5, "iou_2": 0.5}], "iou_2")
        assert curve is not None
        assert curve["points"] == "80.0,22.0"

    def test_never_measured(self) -> None:
        assert sparkline([{"epoch": 1, "iou_2": math.nan}], "iou_2") is None


class TestPictures:
    def test_they_shrink_to_the_page_and_are_counted_at_full_size(self, schema: LabelSchema) -> None:
        truth = np.full((100, PICTURE_WIDTH * 2), 2, np.uint8)
        prediction = truth.copy()
        prediction[:25] = 6
        image = np.full((*truth.shape, 3), 90, np.uint8)

        found = compare_maps(image, truth, prediction, schema)

        assert found.size_hw == truth.shape
        for picture in (found.image, found.truth, found.prediction, found.wrong):
            assert (picture.shape, picture.dtype) == ((50, PICTURE_WIDTH, 3), np.uint8)
        assert [(row.label_id, row.prediction_share) for row in found.legend] == [(2, 0.75), (6, 0.25)]
        drawn = panels(found, [("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")])
        assert [(p["role"], p["title"], p["note"]) for p in drawn["pictures"]] == [
            ("input", "a", "1"),
            ("truth", "b", "2"),
            ("answer", "c", "3"),
            ("wrong", "d", "4"),
        ]
        assert drawn["size"] == "2560×100"

    def test_sizes_must_match(self, schema: LabelSchema) -> None:
        image, label_map = np.zeros((64, 128, 3), np.uint8), np.zeros((64, 128), np.uint8)
        with pytest.raises(ImageError, match="127x64 and 128x64"):
            compare_maps(image, label_map[:, :127], label_map, schema)

    def test_a_picture_full_of_detail_is_compressed_further(self) -> None:
        noise = np.random.default_rng(0).normal(128, 20, (128, 256, 3)).clip(0, 255).astype(np.uint8)
        free, bounded = (
            base64.b64decode(jpeg_uri(noise, most_bytes=most).removeprefix("data:image/jpeg;base64,"))
            for most in (None, 12_000)
        )
        assert len(bounded) <= 12_000 < len(free)
        with Image.open(io.BytesIO(bounded)) as picture:
            assert picture.size == (256, 128)
