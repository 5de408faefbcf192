"""Where to cut crops out of cached panoramas, so that rare classes are seen often.

Where a class lies is counted once an item, in bands of rows, and kept beside its label map as `<name>.bands.npz`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sscloud.files import atomic_write
from sscloud.labels import LabelSchema, count_ids
from training.dataset import CachedItem

_BAND_ROWS = 64
"""Rows that are counted, and searched for a pixel, at once."""

_STREAM = 1
"""Sets these random numbers apart from those of augmentation, which come from the same seed, epoch and place."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A place where a crop is cut."""

    item: int
    """Of which panorama."""
    row: int
    column: int
    """Of the upper left corner, pixels at model scale."""
    size_hw: tuple[int, int]
    """Of the crop; beyond the last column it goes on with the first one."""

    def cut(self, array: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """The crop (h, w) or (h, w, 3) of an item's image or label map; of a memory-mapped one no more is read."""
        height, width = self.size_hw
        rows = array[self.row : self.row + height]
        beyond = self.column + width - array.shape[1]
        if beyond <= 0:
            return rows[:, self.column : self.column + width]
        return np.concatenate([rows[:, self.column :], rows[:, :beyond]], axis=1)


class Crops:
    """The crops of every epoch. The same seed, epoch and place give the same crop, whatever was asked before.

    A share of the crops is cut around a pixel of a class that is drawn with favour for the rare ones: with a chance
    inversely proportional to the square root of its share of all pixels. Among the panoramas that hold the class, one
    is drawn with a chance proportional to the square root of its pixels of it: neither does one large surface keep all
    others away, nor a handful of pixels, perhaps a slip of the pen, come as often as a whole object. The pixel lies
    anywhere in the crop. All other crops lie anywhere in the picture.

    Args:
        items: from `build_cache`.
        schema: says which label ids are classes.
        crop: (h, w) of the crops, pixels at model scale; clipped to the panorama, of which w then takes all columns.
        rare_crops: that share, 0 to 1.
        seed: of all choices.
        wrap: whether the items are whole panoramas: then a crop may straddle the seam.
        known: items of which fewer are shown than of the others.
        replay: how much less often a crop around a rare class comes from them, 0 to 1.
    """

    def __init__(
        self,
        items: Sequence[CachedItem],
        schema: LabelSchema,
        *,
        crop: tuple[int, int],
        rare_crops: float,
        seed: int,
        wrap: bool = True,
        known: Collection[int] = (),
        replay: float = 1.0,
    ) -> None:
        self._items, self._ids = items, np.array(schema.class_ids)
        self._crop, self._rare_crops, self._seed, self._wrap = crop, rare_crops, seed, wrap
        self._sizes = [_size_hw(item) for item in items]
        self._bands = [_bands(item.mask) for item in items]
        self._counts = np.array([bands.sum(axis=0)[self._ids] for bands in self._bands], np.float64)  # items x classes
        self._first = np.cumsum([0, *(_crops_of(size, crop) for size in self._sizes)])
        self._often = np.ones(len(items))
        self._often[list(known)] = replay
        total = (self._counts * self._often[:, None]).sum(axis=0)
        favour = np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total > 0)
        self._favour = favour / favour.sum() if favour.any() else None

    def __len__(self) -> int:
        """Crops an epoch: with as many pixels as the panoramas have, at least one a panorama."""
        return int(self._first[-1])

    def places_of(self, items: Collection[int]) -> list[int]:
        """The places of an epoch whose crops come from these items, unless they are cut around a rare class."""
        return [place for item in items for place in range(self._first[item], self._first[item + 1])]

    def choose(self, epoch: int, place: int) -> Window:
        """The crop that an epoch shows at a place, 0 to `len` - 1."""
        rng = np.random.default_rng((self._seed, epoch, place, _STREAM))
        if self._favour is not None and rng.random() < self._rare_crops:
            return self._around_a_pixel(rng, int(rng.choice(len(self._ids), p=self._favour)))
        item = int(np.searchsorted(self._first, place, side="right")) - 1
        (height, width), size_hw = self._sizes[item], self._size_in(item)
        columns = width if self._may_straddle(item) else width - size_hw[1] + 1
        row, column = rng.integers(height - size_hw[0] + 1), rng.integers(columns)
        return Window(item=item, row=int(row), column=int(column), size_hw=size_hw)

    def _around_a_pixel(self, rng: np.random.Generator, class_index: int) -> Window:
        chance = np.sqrt(self._counts[:, class_index]) * self._often
        item = int(rng.choice(len(self._items), p=chance / chance.sum()))
        label_id = self._ids[class_index]
        in_band = self._bands[item][:, label_id]
        band = int(rng.choice(len(in_band), p=in_band / in_band.sum()))
        labels = np.load(self._items[item].mask, mmap_mode="r")[band * _BAND_ROWS : (band + 1) * _BAND_ROWS]
        rows, columns = np.nonzero(labels == label_id)
        pixel = rng.integers(len(rows))
        (height, width), size_hw = self._sizes[item], self._size_in(item)
        row = band * _BAND_ROWS + int(rows[pixel]) - int(rng.integers(size_hw[0]))
        column = int(columns[pixel]) - int(rng.integers(size_hw[1]))
        return Window(
            item=item,
            row=min(max(row, 0), height - size_hw[0]),
            column=column % width if self._may_straddle(item) else min(max(column, 0), width - size_hw[1]),
            size_hw=size_hw,
        )

    def _size_in(self, item: int) -> tuple[int, int]:
        return clipped(self._crop, self._sizes[item])

    def _may_straddle(self, item: int) -> bool:
        """A crop of all columns starts with the first one: turning it is left to augmentation."""
        return self._wrap and self._crop[1] < self._sizes[item][1]


def _crops_of(size_hw: tuple[int, int], crop: tuple[int, int]) -> int:
    height, width = clipped(crop, size_hw)
    return max(1, round(size_hw[0] * size_hw[1] / (height * width)))


def clipped(crop: tuple[int, int], size_hw: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a crop that is not larger than the panorama."""
    return min(crop[0], size_hw[0]), min(crop[1], size_hw[1])


def _size_hw(item: CachedItem) -> tuple[int, int]:
    height, width = np.load(item.mask, mmap_mode="r").shape
    return height, width


def _bands(mask: Path) -> NDArray[np.int64]:
    """(bands, 256) pixels of each label id in every band of rows of a cached label map."""
    kept = mask.with_name(mask.name.removesuffix(".mask.npy") + ".bands.npz")
    if not kept.exists():
        label_map = np.load(mask, mmap_mode="r")
        tops = range(0, len(label_map), _BAND_ROWS)
        counted = np.array([count_ids(label_map[top : top + _BAND_ROWS]) for top in tops])
        ids = np.flatnonzero(counted.any(axis=0))
        buffer = BytesIO()
        np.savez_compressed(buffer, ids=ids, pixels=counted[:, ids].astype(np.uint32))
        atomic_write(kept, buffer.getvalue())
    with np.load(kept) as found:
        bands = np.zeros((len(found["pixels"]), 256), np.int64)
        bands[:, found["ids"]] = found["pixels"]
    return bands
