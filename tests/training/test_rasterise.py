"""Shapes → label map: pycocotools' pixels, OpenCV's ellipses, painting order, who drew what, refusals."""

import math
import warnings

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from training.rasterise import (
    EllipseShape,
    MaskShape,
    PolygonShape,
    Shape,
    check_polygon,
    rasterise,
    rectangle,
)

IDS = {"a": 1, "b": 2}
SIZE = (6, 8)


def polygon(label: str, *points: tuple[float, float], z_order: int = 0) -> PolygonShape:
    return PolygonShape(label=label, points=np.array(points, np.float64), z_order=z_order)


def square(label: str, x1: float, y1: float, x2: float, y2: float, z_order: int = 0) -> PolygonShape:
    return polygon(label, (x1, y1), (x2, y1), (x2, y2), (x1, y2), z_order=z_order)


def draw(*shapes: Shape, size_hw: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return rasterise(shapes, size_hw=size_hw, label_id_of=IDS.get, fill=0).label_map


def art(label_map: NDArray[np.uint8]) -> str:
    return "\n".join("".join(".123456789"[value] for value in row) for row in label_map)


def test_a_polygon_on_pixel_edges_fills_exactly_its_pixels() -> None:
    label_map = draw(square("a", 1, 1, 5, 3))
    assert label_map.dtype == np.uint8
    assert label_map.shape == SIZE
    assert art(label_map) == "........\n.1111...\n.1111...\n........\n........\n........"


def test_a_triangle_has_the_pixels_of_pycocotools() -> None:
    assert art(draw(polygon("a", (0, 0), (6, 0), (0, 6)))) == (
        "11111...\n1111....\n111.....\n11......\n1.......\n........"
    )


def test_later_shapes_cover_earlier_ones() -> None:
    assert art(draw(square("a", 0, 0, 4, 2), square("b", 2, 0, 6, 2))).startswith("112222..\n112222..")
    assert art(draw(square("b", 2, 0, 6, 2), square("a", 0, 0, 4, 2))).startswith("111122..\n111122..")


def test_z_order_comes_before_the_order_of_the_list_and_the_sort_is_stable() -> None:
    top, below = square("a", 0, 0, 4, 2, z_order=1), square("b", 2, 0, 6, 2)
    assert art(draw(top, below)).startswith("111122..")
    first, second = square("a", 0, 0, 4, 2, z_order=3), square("b", 2, 0, 6, 2, z_order=3)
    assert art(draw(square("b", 0, 0, 8, 6, z_order=-1), first, second)).startswith("11222222")


def test_a_mask_is_pasted_into_its_box() -> None:
    mask = MaskShape(label="b", box_xyxy=(5, 4, 8, 6), mask=np.array([[1, 0, 1], [0, 1, 0]], np.bool_))
    assert art(draw(square("a", 4, 3, 8, 6), mask)) == "........\n........\n........\n....1111\n....1212\n....1121"


def test_an_empty_mask_paints_nothing() -> None:
    empty = MaskShape(label="a", box_xyxy=(0, 0, 0, 0), mask=np.zeros((0, 0), np.bool_))
    assert not draw(empty).any()


def test_who_drew_what_is_known_pixel_by_pixel() -> None:
    shapes = [
        square("a", 0, 0, 4, 2),
        MaskShape(label="b", box_xyxy=(2, 0, 6, 2), mask=np.ones((2, 4), np.bool_), auto=True),
        rectangle("a", (5, 0, 8, 1), auto=True, z_order=1),
        EllipseShape(label="a", centre_xy=(1, 4), radii_xy=(1, 0), auto=True),
        square("a", 0, 4, 1, 5),
        PolygonShape(label="stranger", points=np.array([(0, 3), (8, 3), (8, 6)], np.float64)),
    ]
    label_map, source_map = rasterise(shapes, size_hw=SIZE, label_id_of=IDS.get, fill=7)
    assert source_map.dtype == np.uint8
    assert art(source_map) == "11222222\n112222..\n........\n........\n122.....\n........"
    assert art(label_map) == "11222111\n11222277\n77777777\n77777777\n11177777\n77777777"


def test_at_one_z_order_the_later_shape_wins_whoever_drew_it() -> None:
    person, model = square("a", 0, 0, 8, 6), rectangle("b", (0, 0, 8, 6), auto=True)
    assert (rasterise([person, model], size_hw=SIZE, label_id_of=IDS.get, fill=0).source_map == 2).all()
    assert (rasterise([model, person], size_hw=SIZE, label_id_of=IDS.get, fill=0).source_map == 1).all()


def reference(points: NDArray[np.float64], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """CVAT's export: corners in hundredths as 32-bit floats, filled by pycocotools on the whole image."""
    corners = np.round(points, 2).astype(np.float32).ravel().tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its way to hand over an array
        return np.asarray(coco.decode(coco.frPyObjects([corners], *size_hw)[0]), np.bool_)


@pytest.mark.parametrize("seed", range(40))
def test_polygons_have_the_pixels_of_cvats_export(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(2, 60, 2))
    points = rng.uniform((-width / 3, -height / 3), (width * 4 / 3, height * 4 / 3), (int(rng.integers(3, 12)), 2))
    if seed % 2:
        points = np.round(points, 1)  # in tenths, outlines run through the points where pycocotools rounds
    drawn = draw(PolygonShape(label="a", points=points), size_hw=(height, width))
    np.testing.assert_array_equal(drawn == 1, reference(points, (height, width)))


def test_a_corner_is_rounded_as_cvats_export_rounds_it() -> None:
    """20.7 as a 64-bit number lies on the other side of a fifth of a pixel than as a 32-bit one."""
    points = np.array([(20.7, 3.1), (31.3, 3.3), (29.9, 18.7), (18.5, 20.1)])
    drawn = draw(PolygonShape(label="a", points=points + 0.004), size_hw=(24, 40))
    np.testing.assert_array_equal(drawn == 1, reference(points, (24, 40)))


def test_a_polygon_with_rows_of_its_own_costs_only_their_pixels_but_has_all_of_them() -> None:
    ring = polygon(
        "a", (10, 10), (90, 10), (90, 40), (10, 40), (10, 11), (20, 20), (20, 30), (80, 30), (80, 20), (11, 11)
    )
    np.testing.assert_array_equal(draw(ring, size_hw=(50, 100)) == 1, reference(ring.points, (50, 100)))


@pytest.mark.parametrize("rotation", [0.0, 30.0, -100.0, 359.5])
@pytest.mark.parametrize(
    ("centre", "radii"), [((20.5, 11.5), (9.5, 4.4)), ((2.0, 3.0), (12.0, 30.0)), ((5.4, 7.6), (0, 3))]
)
def test_ellipses_are_opencvs_with_rounded_numbers(
    centre: tuple[float, float], radii: tuple[float, float], rotation: float
) -> None:
    drawn = draw(EllipseShape(label="b", centre_xy=centre, radii_xy=radii, rotation=rotation), size_hw=(24, 40))
    expected = np.zeros((24, 40), np.uint8)
    rounded = (round(centre[0]), round(centre[1])), (round(radii[0]), round(radii[1]))
    cv2.ellipse(expected, *rounded, rotation, 0, 360, 2, thickness=-1)
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn == 2).any()


def test_ellipses_lie_in_the_order_of_the_others() -> None:
    ellipse = EllipseShape(label="b", centre_xy=(4, 3), radii_xy=(1, 1), z_order=0)
    assert art(draw(ellipse, square("a", 0, 0, 8, 6, z_order=-1)))[9 * 3 + 4] == "2"
    assert "2" not in art(draw(ellipse, square("a", 0, 0, 8, 6)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"centre_xy": (math.nan, 1.0)}, "a number that is not finite"),
        ({"rotation": math.inf}, "a number that is not finite"),
        ({"radii_xy": (1.0, -2.0)}, "has the radii 1 and -2; none is negative"),
        ({"radii_xy": (1e9, 1.0)}, "an ellipse reaches far outside the image of 8x6"),
        ({"centre_xy": (1.0, 1e12)}, "an ellipse reaches far outside the image of 8x6"),
    ],
)
def test_ellipses_that_cannot_be_drawn_are_refused(fields: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"label": "a", "centre_xy": (1.0, 1.0), "radii_xy": (1.0, 1.0), **fields}
    with pytest.raises(ValueError, match=message):
        draw(EllipseShape(**values))  # type: ignore[arg-type]


def test_a_label_without_an_id_is_left_out() -> None:
    assert not draw(square("stranger", 0, 0, 8, 6)).any()


def test_pixels_without_a_shape_get_the_fill() -> None:
    assert (rasterise([], size_hw=SIZE, label_id_of=IDS.get, fill=255).label_map == 255).all()


def test_a_polygon_over_the_border_is_clipped() -> None:
    assert art(draw(square("a", -3, -2, 2, 1), square("b", 6, 4, 12, 9))) == (
        "11......\n........\n........\n........\n......22\n......22"
    )


def test_a_polygon_outside_paints_nothing() -> None:
    assert not draw(square("a", 9, 1, 12, 4)).any()


def test_a_rectangle_turns_about_its_centre() -> None:
    upright = rectangle("a", (2, 2, 6, 4), rotation=90)
    np.testing.assert_allclose(upright.points, [(5, 1), (5, 5), (3, 5), (3, 1)], atol=1e-12)
    assert art(draw(upright)) == "........\n...11...\n...11...\n...11...\n...11...\n........"


def test_a_rectangle_turns_clockwise_on_the_screen() -> None:
    corner = rectangle("a", (0, 0, 4, 4), rotation=30).points[0]  # the left upper one moves to the right and up
    assert corner[0] > 0
    assert corner[1] < 0


def test_a_rectangle_that_is_not_turned_keeps_its_corners() -> None:
    assert rectangle("a", (1, 2, 3, 4)).points.tolist() == [[1, 2], [3, 2], [3, 4], [1, 4]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0, 0), (1, 1)], "a polygon of 2 points encloses nothing"),
        ([], "a polygon of 0 points encloses nothing"),
        ([(0, 0), (1, float("nan")), (2, 2)], "not a finite number"),
        ([(0, 0), (float("inf"), 1), (2, 2)], "not a finite number"),
        ([(0, 0), (1e9, 1), (2, 2)], "far outside the image of 8x6"),
        ([(0, 0), (1, -7), (2, 2)], "far outside the image of 8x6"),
    ],
)
def test_polygons_that_cannot_be_filled_are_refused(points: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(polygon("a", *points))


def test_an_endless_outline_is_refused() -> None:
    points = np.array([(0, 0), (4000, 1)] * 1000, np.float64)
    with pytest.raises(ValueError, match=r"outline of a polygon is \d+ pixels long; at most 4194304"):
        check_polygon(np.concatenate([points, points]), size_hw=(4096, 8192))


@pytest.mark.parametrize("box", [(0, 0, 2, 2), (6, 0, 9, 2), (-1, 0, 2, 2)])
def test_a_mask_that_does_not_fit_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not fit an image of 8x6"):
        draw(MaskShape(label="a", box_xyxy=box, mask=np.ones((2, 3), np.bool_)))
