"""Run lengths against pycocotools and cvat-sdk, and what does not add up."""

import numpy as np
import pytest
from cvat_sdk.masks import encode_mask
from numpy.typing import NDArray
from pycocotools import mask as coco

from training.run_lengths import decode_columns, decode_rows, decompress, integers

Mask = NDArray[np.bool_]


def some_mask(seed: int) -> Mask:
    """Noise, blocks, and all or nothing, of all shapes from 1x1 up."""
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 40, 2)) < (0.0, 0.03, 0.3, 0.7, 1.0)[seed % 5]
    return np.repeat(np.repeat(mask, 5, axis=0), 3, axis=1) if seed % 3 == 0 else mask


@pytest.mark.parametrize("seed", range(60))
def test_cocos_run_lengths_are_read_as_pycocotools_writes_them(seed: int) -> None:
    mask = some_mask(seed)
    compressed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    (x1, y1, x2, y2), crop = decode_columns(decompress(compressed), mask.shape)  # type: ignore[arg-type]
    assert crop.dtype == np.bool_
    assert crop.shape == (y2 - y1, x2 - x1)
    whole = np.zeros_like(mask)
    whole[y1:y2, x1:x2] = crop
    np.testing.assert_array_equal(whole, mask)
    if mask.any():  # the box is the smallest
        assert crop[0].any()
        assert crop[-1].any()
        assert crop[:, 0].any()
        assert crop[:, -1].any()
    else:
        assert (x1, y1, x2, y2) == (0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(4, 40, 5))
def test_cvats_run_lengths_are_read_as_its_sdk_writes_them(seed: int) -> None:
    mask = some_mask(seed)
    mask[:, ::2] = False
    mask[0, 0] = mask[-1, -1] = True
    *runs, left, top, right, bottom = encode_mask(mask)
    assert (left, top, right, bottom) == (0, 0, mask.shape[1] - 1, mask.shape[0] - 1)
    np.testing.assert_array_equal(decode_rows(integers(runs), (mask.shape[0], mask.shape[1])), mask)


def test_texts_are_numbers_too() -> None:
    assert integers(["3", " 4", "0"]).tolist() == [3, 4, 0]
    assert decode_rows(integers(["1", "2", "1"]), (2, 2)).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("values", [["x"], [1.5], [float("nan")], [None], [[1]], [[1], 2], [1e300], ["9" * 400], [""]])
def test_what_is_no_whole_number(values: list[object]) -> None:
    with pytest.raises(ValueError, match="run lengths are whole numbers"):
        integers(values)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "add up to 0 pixels"),
        ([3], "add up to 3 pixels"),
        ([2, 3], "add up to 5 pixels"),
        ([5, -1], "a run of -1 pixels is not possible"),
        ([1 << 62, 1 << 62, 4], "is not possible"),
    ],
)
def test_runs_that_do_not_add_up(runs: list[int], message: str) -> None:
    counts = np.array(runs, np.int64)
    for decode in (decode_rows, decode_columns):
        with pytest.raises(ValueError, match=message):
            decode(counts, (2, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"!", "a character that they cannot hold"),
        (b"p", "a character that they cannot hold"),
        ("ж".encode(), "a character that they cannot hold"),
        (b"1o", "end in the middle of a number"),
        (b"ooooooo0", "a number of more than 35 bits"),
    ],
)
def test_texts_that_are_no_run_lengths(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompress(text)


def test_no_text_is_no_runs() -> None:
    assert decompress(b"").size == 0
