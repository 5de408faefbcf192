"""A data set on disk: `imgs/` and `masks/` with the same stems, labels, and what is known of the panoramas.

DATASET/
  manifest.json           optional: what belongs to it, where it came from, frozen splits; see `training.manifest`
  imgs/1_normals.jpg      panoramas
  masks/1_normals.png     label maps: 8-bit, one channel, label ids
  labels.yaml             optional; the users' schema otherwise
  dataset.yaml            optional: encoding, elevation range, azimuth convention
  .cache/                 panoramas and masks scaled for training, made once
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from sscloud.architecture import STRIDE
from sscloud.errors import ConfigError, DatasetError, ImageError, SSCloudError
from sscloud.files import atomic_write
from sscloud.frame import Azimuth
from sscloud.image import (
    RESAMPLE_VERSION,
    SUFFIXES,
    Encoding,
    Resample,
    image_size,
    no_return,
    read_image,
    read_label_map,
    resize_image,
    resize_label_map,
)
from sscloud.image import scaled_size as scaled_size_of
from sscloud.labels import VOID, LabelSchema, count_ids
from training.batch import DRAWS, Batch
from training.manifest import IMAGES, LABELS, MANIFEST, MASKS, Manifest, read_manifest, settle_if_free
from training.splits import Split

if TYPE_CHECKING:
    from training.crops import Crops

FACTS, CACHE = "dataset.yaml", ".cache"

VALIDATION_PERCENT = 10.0
"""Of the panoramas, where neither the data set nor the user says."""

_PROBLEMS_SHOWN = 12

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What `dataset.yaml` says of all panoramas of a data set."""

    encoding: Encoding = "normals"
    elevation: tuple[float, float] | None = None
    """Elevation of the top and bottom edge, degrees."""
    azimuth: Azimuth | None = None
    """None when unknown; then nothing may turn or mirror the normals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A panorama and its mask."""

    name: str
    image: Path
    mask: Path
    size_hw: tuple[int, int]
    split: Split | None = None
    """Frozen in the manifest; None where it says nothing."""
    sha256: tuple[str, str] | None = None
    """Of the image's and the mask's file, as the manifest has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFolder:
    """An opened data set: every item has an image and a mask of the same size."""

    path: Path
    schema: LabelSchema
    facts: Facts
    items: tuple[Item, ...]
    manifest: Manifest | None = None
    """None for a folder that was filled by hand."""

    @property
    def aspect(self) -> float:
        """W/H that most panoramas have."""
        ratios = [round(item.size_hw[1] / item.size_hw[0], 3) for item in self.items]
        return max(sorted(set(ratios)), key=ratios.count)


def open_dataset(path: Path, *, labels: Path | None = None) -> DatasetFolder:
    """Find the items of a data set and check them as far as headers tell.

    With a manifest they are exactly the manifest's; other files are left out with a warning.

    Args:
        path: the folder that holds `imgs/` and `masks/`.
        labels: a label schema to use instead of the data set's own.

    Raises:
        DatasetError: one error that names everything found wrong.
        SchemaError: the label schema is wrong.
    """
    settle_if_free(path)
    manifest = read_manifest(path)
    for folder in (path / IMAGES, path / MASKS):
        if not folder.is_dir():
            raise DatasetError(
                f"{folder} is missing. A data set is a folder with {IMAGES}/ (panoramas) and {MASKS}/ (label maps of "
                "the same names); `sscloud sample` makes one to try, `sscloud convert` makes one from an archive."
            )
    own = path / LABELS
    if labels or own.exists():
        schema = LabelSchema.from_yaml(labels or own)
    else:
        schema = manifest.schema if manifest else LabelSchema.default()
    items, problems = _paired(path) if manifest is None else _named_by(manifest, path)
    _raise_if(problems, path)
    if not items:
        raise DatasetError(f"{path / IMAGES} holds no images ({', '.join(sorted(SUFFIXES))}).")
    items.sort(key=lambda item: _natural(item.name))
    return DatasetFolder(
        path=path, schema=schema, facts=read_facts(path / FACTS), items=tuple(items), manifest=manifest
    )


def _paired(path: Path) -> tuple[list[Item], list[str]]:
    """Images and masks of the same stem, and what is wrong with the others."""
    images, masks, problems = _by_stem(path / IMAGES), _by_stem(path / MASKS), []
    for stems, kind in ((images, "images"), (masks, "masks")):
        problems += [
            f"{stem}: several {kind}: {', '.join(p.name for p in files)}"
            for stem, files in stems.items()
            if len(files) > 1
        ]
    problems += [f"{images[stem][0]}: has no mask {MASKS}/{stem}.png" for stem in sorted(images.keys() - masks.keys())]
    problems += [f"{masks[stem][0]}: has no image {IMAGES}/{stem}.jpg" for stem in sorted(masks.keys() - images.keys())]
    items = []
    for stem in sorted(images.keys() & masks.keys(), key=_natural):
        image, mask = images[stem][0], masks[stem][0]
        try:
            image_hw, mask_hw = image_size(image), image_size(mask)
        except ImageError as error:
            problems.append(str(error))
            continue
        if image_hw != mask_hw:
            problems.append(
                f"{stem}: the image is {image_hw[1]}x{image_hw[0]}, its mask {mask_hw[1]}x{mask_hw[0]}; "
                "they must be of one size"
            )
        items.append(Item(name=stem, image=image, mask=mask, size_hw=image_hw))
    return items, problems


def _named_by(manifest: Manifest, path: Path) -> tuple[list[Item], list[str]]:
    """The manifest's items, and what is wrong with their files."""
    items, problems = [], []
    for entry in manifest.items:
        item = Item(
            name=entry.name,
            image=path / IMAGES / entry.image,
            mask=path / MASKS / entry.mask,
            size_hw=entry.size_hw,
            split=entry.split,
            sha256=(entry.image_sha256, entry.mask_sha256),
        )
        for file in (item.image, item.mask):
            try:
                height, width = image_size(file)
            except ImageError as error:
                problems.append(f"{error} {MANIFEST} names it: {_RESTORE}")
                continue
            if (height, width) != entry.size_hw:
                expected = f"{entry.size_hw[1]}x{entry.size_hw[0]}"
                problems.append(f"{file}: is {width}x{height}, but {MANIFEST} says {expected}: {_RESTORE}")
        items.append(item)
    named = {file for item in items for file in (item.image, item.mask)}
    strangers = [
        f"{folder}/{file.name}"
        for folder in (IMAGES, MASKS)
        for files in _by_stem(path / folder).values()
        for file in files
        if file not in named
    ]
    if strangers:
        log.warning(
            "%s: %d picture(s) that %s does not name are left out: %s%s.",
            path,
            len(strangers),
            MANIFEST,
            ", ".join(strangers[:_PROBLEMS_SHOWN]),
            ", …" if len(strangers) > _PROBLEMS_SHOWN else "",
        )
    return items, problems


_RESTORE = "run the same fetch or convert again, it brings back what is missing"


def read_facts(path: Path) -> Facts:
    """Read `dataset.yaml`; a missing file says nothing.

    Raises:
        DatasetError: not YAML, unknown keys, values out of range.
    """
    if not path.exists():
        return Facts()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read as YAML: {error}") from error
    known = {"encoding", "elevation", "azimuth"}
    if not isinstance(data, dict) or data.keys() - known:
        raise DatasetError(f"{path}: expected the keys {sorted(known)}, found {data!r:.200}.")
    encoding, elevation, azimuth = data.get("encoding", "normals"), data.get("elevation"), data.get("azimuth")
    if encoding not in ("normals", "rgb"):
        raise DatasetError(f"{path}: 'encoding' is normals or rgb, found {encoding!r}.")
    try:
        return Facts(
            encoding=encoding,
            elevation=None if elevation is None else _elevation(elevation),
            azimuth=None if azimuth is None else _azimuth(azimuth),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path}: {error}. Expected elevation: [90, -90] and azimuth: {{direction: 1, column_0: 0.0}} (degrees)."
        ) from error


def _elevation(value: Any) -> tuple[float, float]:
    top, bottom = (float(angle) for angle in value)
    if not -90 <= bottom < top <= 90:
        raise ValueError(f"'elevation' runs from the top down within 90 to -90 degrees, found {value!r}")
    return top, bottom


def _azimuth(value: Any) -> Azimuth:
    direction: Literal[1, -1] = {1: 1, -1: -1}[value["direction"]]  # type: ignore[assignment]
    column_0 = float(value["column_0"])
    if not math.isfinite(column_0):
        raise ValueError(f"'column_0' must be an angle in degrees, found {column_0}")
    return Azimuth(direction=direction, column_0=column_0)


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            found.setdefault(file.stem, []).append(file)
    return found


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts 2_normals before 10_normals."""
    digits = "".join(character if character.isdigit() else " " for character in name).split()
    return (*((0, int(number)) for number in digits), (1, name))


def _raise_if(problems: Sequence[str], path: Path) -> None:
    if problems:
        more = f"\n  … and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:_PROBLEMS_SHOWN])
        raise DatasetError(f"{path} cannot be used, {len(problems)} problem(s):{lines}{more}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedItem:
    """A panorama scaled for training."""

    name: str
    image: Path
    """.npy, (h, w, 3) uint8."""
    mask: Path
    """.npy, (h, w) uint8 label ids."""
    pixels: dict[int, int]
    """Pixels of each label id in the full-size mask."""
    digest: str
    """sha256 of the image file and the mask file."""
    split: Split | None = None


def build_cache(
    dataset: DatasetFolder, *, scale: float, resample: Resample, folder: Path, quiet: bool = False
) -> list[CachedItem]:
    """Decode and scale every panorama that `folder` does not hold yet, and check all masks.

    Raises:
        DatasetError: unreadable files, ids that the schema lacks, or panoramas too small at this scale; all at once.
    """

    def cache(item: Item) -> CachedItem | str:
        try:
            return _cached(item, dataset, scale=scale, resample=resample, folder=folder)
        except SSCloudError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or item.name}: {error.strerror}. Name a folder for scaled panoramas with --cache"

    # Decoders and filters release the interpreter lock; more threads would only hold more full-size panoramas at once.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(cache, dataset.items)
        results = list(
            tqdm(found, "Scaling panoramas", len(dataset.items), unit="img", leave=False, disable=quiet or None)
        )
    _raise_if([result for result in results if isinstance(result, str)], dataset.path)
    return [result for result in results if isinstance(result, CachedItem)]


def _cached(item: Item, dataset: DatasetFolder, *, scale: float, resample: Resample, folder: Path) -> CachedItem:
    size_hw = scaled_size_of(item.size_hw, scale)
    if min(size_hw) < STRIDE:
        raise DatasetError(
            f"{item.image}: {item.size_hw[1]}x{item.size_hw[0]} at scale {scale:g} is {size_hw[1]}x{size_hw[0]}; the "
            f"network needs at least {STRIDE} pixels on each side. Use a larger --scale"
        )
    # Apart, so that a corrected mask does not make the image again.
    image_rule = (_state(item.image), size_hw, resample, RESAMPLE_VERSION, dataset.facts.encoding)
    no_return_void = dataset.schema.no_return_void and dataset.facts.encoding == "normals"
    mask_rule = (_state(item.mask), size_hw, *(item.sha256 or ()), *(image_rule if no_return_void else ()))
    image_npy = folder / f"{item.name}-{_key(image_rule)}.image.npy"
    mask_npy = folder / f"{item.name}-{_key((mask_rule, _state(item.image)))}.mask.npy"
    meta = mask_npy.with_name(mask_npy.name.removesuffix(".mask.npy") + ".json")
    if not meta.exists() or not image_npy.exists():  # arrays are written whole, and the meta data after its mask
        checksum = digest(item)
        label_map = read_label_map(item.mask)
        image = read_image(item.image)
        if image.shape[:2] != label_map.shape:
            raise DatasetError(f"{item.name}: image {image.shape[:2]} and mask {label_map.shape} differ in size")
        if no_return_void:
            label_map = np.where(no_return(image), np.uint8(VOID), label_map)
        counts = count_ids(label_map)
        if not image_npy.exists():
            _write_array(image_npy, resize_image(image, size_hw, resample=resample, encoding=dataset.facts.encoding))
        _write_array(mask_npy, resize_label_map(label_map, size_hw))
        pixels = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
        atomic_write(meta, json.dumps({"pixels": pixels, "digest": checksum}).encode())
    facts = json.loads(meta.read_bytes())
    pixels = {int(label_id): count for label_id, count in facts["pixels"].items()}
    schema = dataset.schema
    unknown = [i for i in pixels if schema.by_id(i) is None and i not in schema.void_ids]
    if unknown:
        known = ", ".join(f"{label.id} {label.name}" for label in schema.labels)
        raise DatasetError(
            f"{item.mask}: holds ids {unknown} that the schema lacks (it has {known}). Add them to {LABELS} as labels, "
            "or to its 'void'"
        )
    return CachedItem(
        name=item.name, image=image_npy, mask=mask_npy, pixels=pixels, digest=facts["digest"], split=item.split
    )


def _state(file: Path) -> tuple[int, int]:
    """What changes when a file does."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _key(rule: object) -> str:
    return hashlib.sha256(repr(rule).encode()).hexdigest()[:16]


def digest(item: Item) -> str:
    """sha256 of both files, each of which is the one that the manifest names.

    Raises:
        DatasetError: one of them is another.
    """
    image, mask = item.image.read_bytes(), item.mask.read_bytes()
    if item.sha256 is not None:
        for file, data, expected in zip((item.image, item.mask), (image, mask), item.sha256, strict=True):
            if hashlib.sha256(data).hexdigest() != expected:
                raise DatasetError(
                    f"{file}: was changed by hand since it was fetched or converted ({MANIFEST} has another sha256). "
                    "Correct annotations in CVAT and fetch them; to undo the change, delete the file and "
                    f"{_RESTORE}"
                )
    return hashlib.sha256(image + mask).hexdigest()


def _write_array(path: Path, array: NDArray[np.uint8]) -> None:
    buffer = BytesIO()
    np.save(buffer, array)
    atomic_write(path, buffer.getvalue())


Named = TypeVar("Named", Item, CachedItem)


def snapshot_id(items: Iterable[CachedItem]) -> str:
    """Identity of a data set: hashed from the names and contents of its items, whatever their order."""
    lines = sorted(f"{item.name} {item.digest}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def snapshot_of(dataset: DatasetFolder, items: Iterable[CachedItem]) -> str:
    """The manifest's snapshot, or that of all the items of a folder without one."""
    return snapshot_id(items) if dataset.manifest is None else dataset.manifest.snapshot


def class_shares(items: Iterable[CachedItem], schema: LabelSchema) -> NDArray[np.float64]:
    """(classes,) share of each class among the pixels that are not void, at full size."""
    counts = np.zeros(len(schema.classes))
    index_of = {label.id: index for index, label in enumerate(schema.classes)}
    for item in items:
        for label_id, count in item.pixels.items():
            if label_id in index_of:
                counts[index_of[label_id]] += count
    shares: NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares


def split(items: Sequence[Named], validation_percent: float) -> tuple[list[Named], list[Named]]:
    """Split off a validation part, by the hash of each item's own name: new items move no old ones.

    The parts have the given sizes on average only. Each has at least one item (validation: unless 0 % are asked for),
    so in a very small data set the first items may change sides.

    Returns:
        (training, validation)

    Raises:
        DatasetError: the share leaves nothing to train on.
    """
    if validation_percent > 0 and len(items) < 2:
        raise DatasetError(
            f"{len(items)} panorama(s) with {validation_percent:g} % for validation leave none to train on. "
            "Add panoramas, or use --validation 0."
        )
    place = {item.name: int.from_bytes(hashlib.sha256(item.name.encode()).digest()) / 2**256 for item in items}
    ordered = sorted(place, key=place.__getitem__)
    count = sum(100 * position < validation_percent for position in place.values())
    held_out = set(ordered[: min(max(count, 1 if validation_percent > 0 else 0), len(items) - 1)])
    return [i for i in items if i.name not in held_out], [i for i in items if i.name in held_out]


def learning_parts(dataset: DatasetFolder, validation_percent: float | None = None) -> tuple[list[Item], list[Item]]:
    """What to train on and what to choose the best epoch by: the frozen splits, or a part by the names' hashes.

    Args:
        dataset: test items of it are in neither part.
        validation_percent: for data sets without frozen splits; None for 10.

    Returns:
        (training, validation)

    Raises:
        ConfigError: a percentage is given, but the splits are frozen.
        DatasetError: an interrupted fetch or convert left items without a split, or nothing is left to train on.
    """
    items = [item for item in dataset.items if item.split != "test"]
    waiting = [item.name for item in items if item.split is None]
    frozen = len(waiting) < len(items)
    if dataset.manifest is not None and waiting and (frozen or dataset.manifest.plan is None):
        raise DatasetError(
            f"{dataset.path}: {len(waiting)} of {len(dataset.items)} panoramas have no split yet "
            f"({', '.join(waiting[:_PROBLEMS_SHOWN])}): a fetch or convert was interrupted. Run it again to its end."
        )
    if not items:
        raise DatasetError(f"{dataset.path} holds {len(dataset.items)} panoramas, all for test: none to train on.")
    if not frozen:
        return split(items, VALIDATION_PERCENT if validation_percent is None else validation_percent)
    if validation_percent is not None:
        raise ConfigError(
            f"--validation {validation_percent:g} cannot be used: the splits of {dataset.path} are frozen in its "
            f"{MANIFEST}. Leave --validation out."
        )
    training = [item for item in items if item.split == "train"]
    if not training:
        raise DatasetError(f"{dataset.path}: no panorama is in the split train. Fetch or convert more.")
    return training, [item for item in items if item.split == "validation"]


def part(dataset: DatasetFolder, name: Split | Literal["all"] | None) -> tuple[DatasetFolder, str]:
    """The items of one split, to measure on.

    Args:
        dataset: the whole.
        name: a split, or all; None for test where the data set has frozen test items, else all.

    Returns:
        The data set with these items only, and which split they are.

    Raises:
        DatasetError: the split has no items.
    """
    if name is None:
        name = "test" if any(item.split == "test" for item in dataset.items) else "all"
    if name == "all":
        return dataset, name
    items = tuple(item for item in dataset.items if item.split == name)
    if not items:
        found = sorted({item.split for item in dataset.items if item.split})
        raise DatasetError(
            f"{dataset.path} has no panoramas in the split {name} (it has {', '.join(found) or 'no frozen splits'}). "
            "Name another split, or all."
        )
    return replace(dataset, items=items), name


class Panoramas(Dataset[Batch]):
    """Cached panoramas or crops of them, each a `Batch` of one.

    Args:
        items: from `build_cache`; the arrays are memory-mapped.
        schema: turns label ids into class indices.
        encoding: of the images; decides what a black pixel is.
        crops: where to cut; None for whole panoramas.
        seed: with the index it determines an item's random numbers, whatever ran before.

    The index (e, i) is panorama or crop i as epoch e sees it; a plain i means epoch 0.
    """

    def __init__(
        self,
        items: Sequence[CachedItem],
        schema: LabelSchema,
        *,
        encoding: Encoding = "normals",
        crops: "Crops | None" = None,
        seed: int = 0,
    ) -> None:
        self._items = items
        self._schema = schema
        self._encoding = encoding
        self._crops = crops
        self._seed = seed

    def __len__(self) -> int:
        return len(self._items) if self._crops is None else len(self._crops)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        epoch, place = index if isinstance(index, tuple) else (0, index)
        if self._crops is None:
            item, window = self._items[place], None
        else:
            window = self._crops.choose(epoch, place)
            item = self._items[window.item]
        image, label_map = np.load(item.image, mmap_mode="r"), np.load(item.mask, mmap_mode="r")
        whole_hw = image.shape[0], image.shape[1]
        if window is not None:
            image, label_map = window.cut(image), window.cut(label_map)
        class_map = self._schema.class_map(label_map)
        if self._schema.no_return_void and self._encoding == "normals":
            class_map[no_return(np.asarray(image))] = VOID
        rng = np.random.default_rng((self._seed, epoch, place))
        return Batch(
            images=torch.from_numpy(np.array(image)).permute(2, 0, 1)[None],
            class_maps=torch.from_numpy(class_map)[None],
            origins=torch.tensor([[0.0, 0.0] if window is None else [window.row, window.column]]),
            whole_hw=whole_hw,
            draws=torch.from_numpy(rng.random((1, DRAWS), np.float32)),
        )


class EpochSampler(Sampler[tuple[int, int]]):
    """A new order every epoch that depends on seed and epoch only, dealt out to the processes of a distributed run.

    Every process gets the same number of items; the order is repeated from its start where it does not divide. The
    indices carry the epoch, as `Panoramas` takes it.

    Args:
        size: items there are.
        seed: of the order.
        rank: of this process.
        world_size: processes.
        known: items of which an epoch shows only a share, another one every time.
        replay: that share, 0 to 1.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        known: Collection[int] = (),
        replay: float = 1.0,
    ) -> None:
        self._size, self._seed, self._rank, self._world_size = size, seed, rank, world_size
        self._known = np.array(sorted(known), np.int64)
        self._replayed = len(self._known) if replay >= 1 else round(replay * len(self._known))
        if len(self._known) == size:  # an epoch shows something
            self._replayed = max(1, self._replayed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-(self._size - len(self._known) + self._replayed) // self._world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self._seed, self.epoch))
        order = rng.permutation(self._size)
        if self._replayed < len(self._known):
            left_out = rng.permutation(self._known)[self._replayed :]
            order = order[~np.isin(order, left_out)]
        dealt = np.resize(order, len(self) * self._world_size)[self._rank :: self._world_size]
        return iter([(self.epoch, int(place)) for place in dealt])
