"""ModelHandler: what an answer holds when it would cost CVAT too much."""

import io
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serverless.model_handler import ModelHandler
from serverless.settings import Settings
from sscloud.bundle import ModelBundle
from sscloud.shapes import paint_answer
from sscloud.stages import Stages
from training.rasterise import PolygonShape, rasterise

SIZE_HW = (64, 128)


@pytest.fixture
def picture(make_panorama: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(make_panorama(SIZE_HW)).save(stream, "PNG")
    return stream.getvalue()


def ask(bundle: ModelBundle, picture: bytes, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    handler = ModelHandler(bundle.path, Settings(device="cpu", min_area=1, **settings))
    answer = handler.annotate(picture, threshold=0, stages=Stages())
    items: list[dict[str, Any]] = json.loads(answer.body)
    assert len(items) == answer.regions
    return items, answer.notes


def painted(items: list[dict[str, Any]], bundle: ModelBundle) -> NDArray[np.uint8]:
    """Masks and polygons as CVAT draws them."""
    ids = {label.name: label.id for label in bundle.manifest.labels.labels}
    masks = [item for item in items if item["type"] == "mask"]
    label_map = paint_answer(masks, SIZE_HW, label_id_of=ids.__getitem__, fill=255)
    polygons = [
        PolygonShape(label=item["label"], points=np.reshape(item["points"], (-1, 2)))
        for item in items
        if item["type"] == "polygon"
    ]
    drawn = rasterise(polygons, size_hw=SIZE_HW, label_id_of=ids.__getitem__, fill=255).label_map
    assert not ((label_map != 255) & (drawn != 255)).any()
    return np.minimum(label_map, drawn)


@pytest.mark.parametrize("share", [0.8, 0.3, 0.0])
def test_all_pixels_are_there_within_a_budget(tiny_bundle: ModelBundle, picture: bytes, share: float) -> None:
    whole, notes = ask(tiny_bundle, picture)
    assert notes == {}
    budget = max(1, round(share * sum(len(item["mask"]) - 4 for item in whole)))
    cut, notes = ask(tiny_bundle, picture, budget=budget)
    assert notes.get("masks_as_polygons", 0) == sum(item["type"] == "polygon" for item in cut)
    assert sum(len(item["mask"]) - 4 for item in cut if item["type"] == "mask") <= budget
    assert np.array_equal(painted(cut, tiny_bundle), painted(whole, tiny_bundle))


def test_the_longest_outlines_are_left_out(
    tiny_bundle: ModelBundle, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ask(tiny_bundle, picture)
    sizes = sorted(len(item["points"]) for item in whole)
    monkeypatch.setattr("serverless.model_handler.MAX_POINTS", sum(sizes[:-2]))
    items, notes = ask(tiny_bundle, picture)
    assert notes == {"masks_without_outline": 2}
    assert sorted(len(item["points"]) for item in items if "points" in item) == sizes[:-2]
    assert [item["mask"] for item in items] == [item["mask"] for item in whole]
    items, notes = ask(tiny_bundle, picture, shapes="polygon")
    assert notes == {}, "a polygon is its outline"
