from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.labels import LabelSchema
from training.crops import Crops, Window
from training.dataset import CachedItem

SCHEMA = LabelSchema.default()
COMMON, OTHER, RARE = SCHEMA.class_ids[:3]
VOID_ID = 255
CROP = (32, 48)

MakeItem = Callable[..., CachedItem]


@pytest.fixture
def make_item(tmp_path: Path) -> MakeItem:
    """A cached panorama whose pixels tell their places, with a label map of two halves, or the one that is given."""

    def make(
        name: str, size_hw: tuple[int, int] = (100, 200), label_map: NDArray[np.uint8] | None = None
    ) -> CachedItem:
        if label_map is None:
            label_map = np.full(size_hw, COMMON, np.uint8)
            label_map[size_hw[0] // 2 :] = OTHER
        rows, columns = np.indices(size_hw)
        paths = {kind: tmp_path / f"{name}-0.{kind}.npy" for kind in ("image", "mask")}
        np.save(paths["image"], np.stack([rows, columns, rows ^ columns], axis=2).astype(np.uint8))
        np.save(paths["mask"], label_map)
        return CachedItem(name=name, image=paths["image"], mask=paths["mask"], pixels={}, digest=name)

    return make


def crops_of(items: list[CachedItem], *, rare: float = 0.5, seed: int = 0, **options: object) -> Crops:
    return Crops(items, SCHEMA, rare_crops=rare, seed=seed, **{"crop": CROP, **options})  # type: ignore[arg-type]


def label_crop(items: list[CachedItem], window: Window) -> NDArray[np.uint8]:
    return window.cut(np.load(items[window.item].mask, mmap_mode="r"))


def with_rare_patch(size_hw: tuple[int, int] = (100, 200)) -> NDArray[np.uint8]:
    label_map = np.full(size_hw, COMMON, np.uint8)
    label_map[50:] = OTHER
    label_map[70:73, 150:154] = RARE
    label_map[:5] = VOID_ID
    return label_map


class TestCut:
    @pytest.mark.parametrize("column", [0, 100, 152, 153, 199])
    def test_equals_the_cut_of_a_rolled_panorama(self, make_item: MakeItem, column: int) -> None:
        item = make_item("a")
        window = Window(item=0, row=10, column=column, size_hw=CROP)
        for path in (item.image, item.mask):
            whole = np.load(path)
            expected = np.roll(whole, -column, axis=1)[10:42, :48]
            found = window.cut(np.load(path, mmap_mode="r"))
            assert found.shape[:2] == CROP
            assert np.array_equal(found, expected)

    def test_reads_no_more_than_the_crop(self, make_item: MakeItem) -> None:
        array = np.load(make_item("a").image, mmap_mode="r")
        found = Window(item=0, row=3, column=5, size_hw=CROP).cut(array)
        assert np.shares_memory(found, array)


class TestChoose:
    def test_every_place_lies_within_the_rows(self, make_item: MakeItem) -> None:
        items = [make_item("a"), make_item("b", label_map=with_rare_patch())]
        crops = crops_of(items)
        windows = [crops.choose(epoch, place) for epoch in range(60) for place in range(len(crops))]
        assert {window.size_hw for window in windows} == {CROP}
        assert all(0 <= window.row <= 100 - 32 and 0 <= window.column < 200 for window in windows)
        assert {window.item for window in windows} == {0, 1}

    @pytest.mark.slow
    def test_some_straddle_the_seam_of_panoramas_only(self, make_item: MakeItem) -> None:
        items = [make_item("a")]
        for rare in (0.0, 1.0):
            beyond = {
                wrap: sum(crops_of(items, rare=rare, wrap=wrap).choose(epoch, 0).column > 152 for epoch in range(400))
                for wrap in (True, False)
            }
            assert 0.15 < beyond[True] / 400 < 0.35  # 47 of 200 columns
            assert beyond[False] == 0

    def test_depends_on_seed_epoch_and_place_only(self, make_item: MakeItem) -> None:
        items = [make_item("a"), make_item("b", label_map=with_rare_patch())]
        first, resumed = crops_of(items), crops_of(items)
        for epoch in range(3):
            for place in range(len(first)):
                first.choose(epoch, place)
        assert [first.choose(7, place) for place in range(8)] == [resumed.choose(7, place) for place in range(8)]
        assert [first.choose(7, 0), first.choose(7, 1)] != [first.choose(8, 0), first.choose(8, 1)]
        assert first.choose(7, 0) != crops_of(items, seed=1).choose(7, 0)

    def test_rare_classes_are_seen_far_more_often(self, make_item: MakeItem) -> None:
        """12 of 400 000 pixels, in one of 20 panoramas: half the crops ask for a class, most of those for this one."""
        items = [make_item(str(n)) for n in range(19)] + [make_item("rare", label_map=with_rare_patch())]

        def share(rare: float) -> float:
            crops = crops_of(items, rare=rare)
            found = [RARE in label_crop(items, crops.choose(epoch, epoch % len(crops))) for epoch in range(600)]
            return float(np.mean(found))

        assert share(0.0) < 0.03
        assert 0.4 < share(0.5) < 0.6
        assert share(1.0) > 0.9

    def test_the_pixel_lies_anywhere_in_the_crop(self, make_item: MakeItem) -> None:
        label_map = np.full((100, 200), VOID_ID, np.uint8)
        label_map[50, 3] = RARE
        items = [make_item("a", label_map=label_map)]
        crops = crops_of(items, rare=1.0)
        places = [np.argwhere(label_crop(items, crops.choose(epoch, 0)) == RARE) for epoch in range(400)]
        assert all(len(found) == 1 for found in places)
        rows, columns = np.concatenate(places).T
        for found, size in ((rows, 32), (columns, 48)):
            assert set(np.bincount(found * 4 // size, minlength=4) // 50) <= {1, 2}  # about 100 in each quarter
            assert found.min() < size // 8
            assert found.max() >= size - size // 8

    def test_panoramas_that_hold_more_of_a_class_come_more_often(self, make_item: MakeItem) -> None:
        maps = [np.full((100, 200), VOID_ID, np.uint8) for _ in range(3)]
        maps[0][0, :4] = RARE
        maps[1][0, :100] = RARE
        items = [make_item(str(n), label_map=label_map) for n, label_map in enumerate(maps)]
        crops = crops_of(items, rare=1.0)
        counts = np.bincount([crops.choose(epoch, 0).item for epoch in range(600)], minlength=3)
        assert counts[2] == 0
        assert counts[1] / counts[0] == pytest.approx(5, rel=0.35)  # sqrt(100 / 4)

    def test_panoramas_without_any_class_are_cut_anywhere(self, make_item: MakeItem) -> None:
        items = [make_item("a", label_map=np.full((100, 200), VOID_ID, np.uint8))]
        crops = crops_of(items, rare=1.0)
        assert len({crops.choose(epoch, 0) for epoch in range(20)}) > 15

    def test_a_crop_larger_than_the_panorama_is_all_of_it(self, make_item: MakeItem) -> None:
        items = [make_item("a"), make_item("b", label_map=with_rare_patch())]
        crops = crops_of(items, crop=(400, 200))
        assert len(crops) == 2
        for place in range(2):
            window = crops.choose(0, place)
            assert (window.row, window.column, window.size_hw) == (0, 0, (100, 200))
            assert np.array_equal(label_crop(items, window), np.load(items[window.item].mask))

    def test_all_columns_begin_with_the_first(self, make_item: MakeItem) -> None:
        items = [make_item("a")]
        for rare in (0.0, 1.0):
            crops = crops_of(items, crop=(32, 500), rare=rare)
            windows = [crops.choose(epoch, 0) for epoch in range(30)]
            assert {(window.column, window.size_hw) for window in windows} == {(0, (32, 200))}
            assert len({window.row for window in windows}) > 10


def test_an_epoch_has_as_many_pixels_as_the_panoramas(make_item: MakeItem) -> None:
    items = [make_item("a"), make_item("b"), make_item("small", (40, 50))]
    pixels = 2 * 100 * 200 + 40 * 50
    assert len(crops_of(items, crop=(25, 50))) == 16 + 16 + 2
    assert len(crops_of(items)) * CROP[0] * CROP[1] == pytest.approx(pixels, rel=0.05)
    assert len(crops_of(items, crop=(1000, 1000))) == 3
    assert crops_of(items, crop=(25, 50)).places_of([0, 2]) == [*range(16), 32, 33]


@pytest.mark.slow
def test_known_panoramas_come_less_often(make_item: MakeItem) -> None:
    items = [make_item("a"), make_item("b")]
    shown = {
        replay: [crops_of(items, rare=1.0, known=[0], replay=replay).choose(epoch, 0).item for epoch in range(200)]
        for replay in (0.0, 0.25, 1.0)
    }

    assert set(shown[0.0]) == {1}
    assert shown[0.25].count(0) == pytest.approx(200 * 0.2, abs=20)
    assert shown[1.0].count(0) == pytest.approx(100, abs=25)
    # Where nothing else is left, the places of an epoch are what `EpochSampler` leaves of them.
    assert crops_of(items, rare=1.0, known=[0, 1], replay=0.0).choose(0, 0).item == 0


def test_where_classes_lie_is_counted_once(make_item: MakeItem) -> None:
    item = make_item("a", label_map=with_rare_patch())
    window = crops_of([item], rare=1.0).choose(0, 0)
    kept = item.mask.with_name("a-0.bands.npz")
    with np.load(kept) as found:
        counts = {int(i): found["pixels"][:, place].tolist() for place, i in enumerate(found["ids"])}
    assert counts == {COMMON: [9000, 0], OTHER: [2800, 7188], RARE: [0, 12], VOID_ID: [1000, 0]}
    before = kept.stat().st_mtime_ns
    assert crops_of([item], rare=1.0).choose(0, 0) == window
    assert kept.stat().st_mtime_ns == before
