"""Shapes → label map: pycocotools' pixels, painting order, refusals."""

import numpy as np
import pytest
from numpy.typing import NDArray

from training.rasterise import MaskShape, PolygonShape, Shape, check_polygon, rasterise, rectangle

IDS = {"a": 1, "b": 2}
SIZE = (6, 8)


def polygon(label: str, *points: tuple[float, float], z_order: int = 0) -> PolygonShape:
    return PolygonShape(label=label, points=np.array(points, np.float64), z_order=z_order)


def square(label: str, x1: float, y1: float, x2: float, y2: float, z_order: int = 0) -> PolygonShape:
    return polygon(label, (x1, y1), (x2, y1), (x2, y2), (x1, y2), z_order=z_order)


def draw(*shapes: Shape, size_hw: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return rasterise(shapes, size_hw=size_hw, label_id_of=IDS.get, fill=0)


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


def test_a_label_without_an_id_is_left_out() -> None:
    assert not draw(square("stranger", 0, 0, 8, 6)).any()


def test_pixels_without_a_shape_get_the_fill() -> None:
    assert (rasterise([], size_hw=SIZE, label_id_of=IDS.get, fill=255) == 255).all()


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
