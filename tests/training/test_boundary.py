import numpy as np
import pytest
from numpy.typing import NDArray

from training.boundary import boundary_counts, boundary_distance, boundary_iou


def drawn(text: str) -> NDArray[np.uint8]:
    """ASCII art → class indices; v is void."""
    return np.array([[255 if c == "v" else int(c) for c in line] for line in text.split()], np.uint8)


def reference(
    truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int, *, distance: int, wrap: bool
) -> NDArray[np.int64]:
    """The definition pixel by pixel, on three copies of a panorama side by side."""
    width = truth.shape[1]
    if wrap:
        truth, predicted = np.tile(truth, 3), np.tile(predicted, 3)
    core = slice(width, 2 * width) if wrap else slice(None)
    valid = truth != 255

    def near_contour(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        outside = valid & ~mask
        result = np.zeros_like(mask)
        for y, x in zip(*np.nonzero(mask & valid), strict=True):
            window = outside[max(0, y - distance) : y + distance + 1, max(0, x - distance) : x + distance + 1]
            result[y, x] = window.any()
        return result

    rows = []
    for index in range(classes):
        ours, theirs = near_contour(truth == index)[:, core], near_contour(predicted == index)[:, core]
        rows.append([np.count_nonzero(ours & theirs), np.count_nonzero(ours | theirs)])
    return np.array(rows, np.int64)


def test_by_hand() -> None:
    truth = drawn("""
        00000000
        01111100
        01111100
        01111100
        01111100
        01111100
        00000000""")
    predicted = np.roll(truth, 1, axis=1)

    counts = boundary_counts(truth, predicted, 2, distance=1, wrap=False)

    # Rings of 16 pixels, one column apart: the rows above and below share 4 pixels each, the sides none.
    np.testing.assert_array_equal(counts[1], [8, 24])
    assert counts.dtype == np.int64
    assert boundary_iou(counts)[1] == pytest.approx(1 / 3)


def test_the_seam_is_no_contour_of_a_panorama_and_the_border_never_is() -> None:
    truth = drawn("""
        1100011
        1100011
        1100011""")

    round_trip = boundary_counts(truth, truth, 2, distance=1, wrap=True)
    crop = boundary_counts(truth, truth, 2, distance=1, wrap=False)

    np.testing.assert_array_equal(round_trip, [[6, 6], [6, 6]])
    np.testing.assert_array_equal(crop, [[6, 6], [6, 6]])
    # Cut where the mask's edge is: around the seam it is a contour, in a crop nobody knows.
    rolled = np.roll(truth, 2, axis=1)
    np.testing.assert_array_equal(boundary_counts(rolled, rolled, 2, distance=1, wrap=True), round_trip)
    np.testing.assert_array_equal(boundary_counts(rolled, rolled, 2, distance=1, wrap=False), [[3, 3], [3, 3]])


def test_the_edge_of_void_is_no_contour() -> None:
    truth = drawn("""
        111vv
        111vv
        111vv""")

    counts = boundary_counts(truth, np.ones_like(truth), 2, distance=1, wrap=False)

    assert not counts.any()
    assert np.isnan(boundary_iou(counts)).all()


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("distance", [1, 3])
def test_equals_the_definition(wrap: bool, distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.boundary._BAND_ROWS", 10)
    rng = np.random.default_rng(distance)
    truth, predicted = (np.kron(rng.integers(0, 4, (8, 7)), np.ones((4, 5))).astype(np.uint8) for _ in range(2))
    truth[rng.random(truth.shape) < 0.05] = 255

    counts = boundary_counts(truth, predicted, 3, distance=distance, wrap=wrap)

    assert counts.shape == (3, 2)
    np.testing.assert_array_equal(counts, reference(truth, predicted, 3, distance=distance, wrap=wrap))
    assert (counts[:, 0] < counts[:, 1]).all()
    turned = boundary_counts(np.roll(truth, 9, 1), np.roll(predicted, 9, 1), 3, distance=distance, wrap=wrap)
    assert (turned == counts).all() == wrap


def test_distance_is_a_share_of_the_diagonal() -> None:
    assert boundary_distance((4096, 8192)) == 46
    assert boundary_distance((64, 128)) == 1
    assert boundary_distance((10, 10)) == 1


def test_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"Truth \(2, 3\) and prediction \(3, 2\) differ in shape"):
        boundary_counts(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2, distance=1, wrap=False)
