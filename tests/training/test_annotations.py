"""Shapes as CVAT lists them, drawn in ASCII."""

import copy
from typing import Any

import numpy as np
import pytest
from cvat_sdk.masks import decode_mask, encode_mask

from sscloud.errors import DatasetError
from training.annotations import digest, fingerprint, painting
from training.rasterise import rasterise

SIZE_HW = (6, 8)
NAMES = {1: "Земля", 2: "Здание"}
IDS = {"Земля": 2, "Здание": 6}


def shape(kind: str, points: list[Any], **fields: Any) -> dict[str, Any]:
    """A shape as the API lists it."""
    return {
        "id": 7, "type": kind, "label_id": 1, "frame": 0, "points": points, "z_order": 0, "rotation": 0.0, "group": 0,
        "source": "manual", "occluded": False, "outside": False, "attributes": [], "elements": [],
    } | fields  # fmt: skip


def drawn(*shapes: dict[str, Any]) -> list[str]:
    """Rows of the label map, `.` where nobody drew."""
    found = painting(shapes, label_names=NAMES, size_hw=SIZE_HW)
    raster = rasterise(found.shapes, size_hw=SIZE_HW, label_id_of=IDS.__getitem__, fill=0)
    return ["".join("." if value == 0 else str(value) for value in row) for row in raster.label_map]


def test_polygons_rectangles_and_masks() -> None:
    assert drawn(
        shape("polygon", [0, 0, 3, 0, 3, 2, 0, 2]),
        shape("rectangle", [4, 0, 8, 2], label_id=2),
        shape("mask", [0, 2, 2, 1, 4, 1, 1, 3, 5, 4]),
    ) == [
        "222.6666",
        "222.6666",
        "........",
        ".22..2..",
        ".....2..",
        "........",
    ]


def test_an_ellipse_turns_with_its_rotation() -> None:
    lying = drawn(shape("ellipse", [4, 3, 7, 2]))
    standing = drawn(shape("ellipse", [4, 3, 7, 2], rotation=90.0))
    assert [bool(row.strip(".")) for row in lying] == [False, False, True, True, True, False]
    assert max(row.count("2") for row in lying) == 7
    assert all(1 < row.count("2") <= 3 for row in standing)


def test_later_shapes_cover_earlier_ones_of_the_same_z_order_whoever_drew_them() -> None:
    person = shape("polygon", [0, 0, 4, 0, 4, 1, 0, 1], label_id=1)
    model = shape("polygon", [2, 0, 6, 0, 6, 1, 2, 1], label_id=2, source="auto")
    assert drawn(person, model)[0] == "226666.."
    assert drawn(model, person)[0] == "222266.."
    assert drawn(person | {"z_order": 1}, model)[0] == "222266.."


def test_a_shape_keeps_its_label_in_a_group() -> None:
    small = shape("mask", [0, 2, 0, 0, 1, 0], label_id=1, group=3)
    large = shape("mask", [0, 6, 2, 0, 7, 0], label_id=2, group=3)
    assert drawn(small, large)[0] == "22666666"


def test_what_covers_no_pixels_is_counted() -> None:
    found = painting(
        [shape("polyline", [0, 0, 5, 5]), shape("points", [1, 1]), shape("points", [2, 2]), shape("cuboid", [1] * 16)],
        label_names=NAMES,
        size_hw=SIZE_HW,
    )
    assert not found.shapes
    assert found.skipped == {"polyline": 1, "points": 2, "cuboid": 1}


def test_people_and_models_are_told_apart_by_the_source() -> None:
    raws = [shape("mask", [0, 3, 0, 0, 2, 0], source="auto"), shape("mask", [0, 1, 2, 0, 2, 0], source="semi-auto")]
    found = painting(raws, label_names=NAMES, size_hw=SIZE_HW)
    raster = rasterise(found.shapes, size_hw=SIZE_HW, label_id_of=IDS.__getitem__, fill=0)
    assert raster.source_map[0].tolist() == [2, 2, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_painted_as_the_sdk_decodes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = encode_mask(rng.random((37, 53)) < rng.random())
    found = painting([shape("mask", points)], label_names=NAMES, size_hw=(37, 53))
    raster = rasterise(found.shapes, size_hw=(37, 53), label_id_of=IDS.__getitem__, fill=0)
    assert np.array_equal(raster.label_map == 2, decode_mask(points, image_width=53, image_height=37))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (shape("mask", [1, 2, 3]), "no run lengths"),
        (shape("mask", [0, 6, 0, 0, 4, 1]), "add up to 6 pixels"),
        (shape("mask", [-4, 8, 0, 0, 3, 0]), "a run of -4"),
        (shape("mask", [0, 4, 6, 0, 9, 0]), "leaves the image of 8x6"),
        (shape("mask", [0, 1e300, 0, 0, 3, 0]), "no run lengths"),
        (shape("mask", [0, 4.5, 0, 0, 3, 0]), "no run lengths"),
        (shape("polygon", [0, 0, 3, 0, 3]), "no pairs"),
        (shape("polygon", [0, 0, 3, 0]), "at least 3"),
        (shape("polygon", [0, 0, 1e9, 0, 1, 1]), "far outside"),
        (shape("polygon", [0, 0, float("nan"), 0, 1, 1]), "finite"),
        (shape("polygon", ["a", 0, 1, 0, 1, 1]), "not all numbers"),
        (shape("polygon", [[0, 0], [1, 1], [2, 0]]), "finite numbers|not all numbers"),
        (shape("rectangle", [0, 0, 3]), "has 4 numbers"),
        (shape("ellipse", [4, 4, 3, 3]), "none is negative"),
        (shape("ellipse", [4, 4, 1e6, 3]), "far outside"),
        (shape("rectangle", [0, 0, 3, 3], rotation=float("inf")), "rotation inf"),
        (shape("polygon", [0, 0, 3, 0, 3, 3], z_order="top"), "z_order 'top'"),
        (shape("polygon", [0, 0, 3, 0, 3, 3], label_id=9), "a label that the task does not have"),
    ],
)
def test_shapes_that_cannot_be_painted_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=rf"shape 7 .*({message})"):
        painting([raw], label_names=NAMES, size_hw=SIZE_HW)


def test_a_fingerprint_ignores_the_number_and_sees_every_change() -> None:
    raw = shape("mask", [0, 4, 0, 0, 3, 0], source="auto", attributes=[{"spec_id": 5, "value": "unet v3"}])
    assert fingerprint(raw | {"id": 8, "score": 0.5}) == fingerprint(raw)
    assert fingerprint(raw | {"points": [0.0, 4.0, 0.0, 0.0, 3.0, 0.0]}) == fingerprint(raw)
    changes: list[dict[str, Any]] = [
        {"label_id": 2}, {"points": [0, 3, 0, 0, 2, 0]}, {"z_order": 1}, {"source": "manual"}, {"occluded": True},
        {"attributes": [{"spec_id": 5, "value": "seen"}]}, {"group": 2}, {"rotation": 5.0}, {"type": "polygon"},
    ]  # fmt: skip
    assert len({fingerprint(raw), *(fingerprint(raw | change) for change in changes)}) == len(changes) + 1


def test_a_digest_depends_on_the_order() -> None:
    first, second = shape("mask", [0, 4, 0, 0, 3, 0], id=1), shape("mask", [0, 4, 2, 0, 5, 0], id=2)
    assert digest([first, second]) == digest(copy.deepcopy([first, second]))
    assert digest([first, second]) != digest([second, first])
    assert digest([first]) != digest([])
