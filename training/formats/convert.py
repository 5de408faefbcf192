"""An exported archive → a dataset folder: `imgs/NAME.jpg`, `masks/NAME.png`, `labels.yaml`."""

import filecmp
import json
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.errors import ArchiveError, ConfigError, DatasetError, SchemaError
from sscloud.files import atomic_write
from sscloud.image import write_label_map
from sscloud.labels import VOID, LabelSchema
from training.formats import labelme
from training.formats.archive import ZipArchive
from training.formats.layout import LABELME, recognise
from training.rasterise import rasterise

UnknownLabels = Literal["error", "void", "background"]

_LISTED = 20
"""Most lines of one kind in a message; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownLabel:
    """A label name in the archive that the schema lacks."""

    name: str
    shapes: int
    images: int

    @property
    def found(self) -> str:
        """How often, as a phrase."""
        return f"{_count(self.shapes, 'shape')} in {_count(self.images, 'image')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `convert_archive` has done."""

    images: int
    """Images converted, those that were there already included."""
    unchanged: int
    """Of them, images that the dataset already held with the same mask."""
    shapes: int
    pixel_shares: dict[int, float]
    """Label id → share of all pixels of the archive's images; ids without a pixel are left out."""
    unknown: tuple[UnknownLabel, ...]
    broken: tuple[str, ...]
    """Why images were left out, a sentence each."""
    warnings: tuple[str, ...]


def convert_archive(
    archive: Path,
    output: Path,
    *,
    schema: LabelSchema,
    unknown: UnknownLabels = "error",
    skip_broken: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Convert a LabelMe 3.0 archive into a dataset folder, new or already in use.

    Everything is converted into a temporary folder first; nothing appears in `output` before all of it is known to be
    good. Files that are there already with the same content are left alone. Pixels that no shape covers get the id of
    the schema's background, or void (255) when it has none.

    Args:
        archive: the zip.
        output: the dataset; archives can be added to one dataset one after the other.
        schema: turns label names into label ids.
        unknown: what to do with label names that the schema lacks: stop, or paint void or the background.
        skip_broken: convert the other images when some cannot be read.
        overwrite: replace files of the dataset that differ.
        progress: show a progress bar on stderr when that is a terminal.

    Raises:
        ArchiveError: not a zip, not LabelMe 3.0, hostile, empty, or (without `skip_broken`) an image cannot be read.
        SchemaError: label names that the schema lacks, with `unknown="error"`.
        DatasetError: files of other content are in the way, without `overwrite`.
        ConfigError: `unknown="background"` without a background, or the dataset cannot be written.
    """
    if unknown == "background" and schema.background is None:
        raise ConfigError(
            "Unknown labels cannot become background: no label of the schema is marked 'background: true'. "
            "Mark one, or choose void."
        )
    with ZipArchive(archive) as opened:
        _require_labelme(opened)
        contents = labelme.list_entries(opened)
        strangers = _unknown_labels(contents.entries, schema)
        if strangers and unknown == "error":
            raise SchemaError(_unknown_message(archive, strangers, schema))
        try:
            base = _existing_folder(output)
            staging = Path(tempfile.mkdtemp(dir=base, prefix=".converting-"))
            try:
                summary = _convert(
                    opened,
                    contents,
                    staging,
                    schema=schema,
                    label_id_of=_painter(schema, unknown),
                    skip_broken=skip_broken,
                    progress=progress,
                )
                atomic_write(staging / "labels.yaml", schema.to_yaml().encode())
                unchanged = _publish(staging, output, schema=schema, overwrite=overwrite)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise ConfigError(
                f"The dataset {output} cannot be written: {error.strerror or error}. Check the path, its permissions "
                "and the free space."
            ) from error
    return replace(summary, unchanged=unchanged, unknown=tuple(strangers))


def dataset_names(images: Sequence[str]) -> list[str]:
    """File names in the dataset for members of an archive: the member's own name, `NAME_1` when the stem is taken.

    Names that differ in case or in the way letters are composed only are the same: on some file systems they are.
    """
    names = [unicodedata.normalize("NFC", PurePosixPath(image).name) for image in images]
    taken = {_stem_key(name) for name in names}
    used: set[str] = set()
    unique = []
    for name in names:
        path = PurePosixPath(name)
        number = 0
        while _stem_key(name) in used or (number and _stem_key(name) in taken):
            number += 1
            name = f"{path.stem}_{number}{path.suffix}"
        used.add(_stem_key(name))
        unique.append(name)
    return unique


def _require_labelme(archive: ZipArchive) -> None:
    layout = recognise(archive.members)
    if layout != LABELME:
        found = f"looks like an export of {layout}" if layout else "holds no annotations that are known"
        raise ArchiveError(
            f"{archive.path} {found}; an archive of {LABELME} is expected. In CVAT choose 'Export task dataset', the "
            f"format '{LABELME}' and switch 'Save images' on."
        )


def _unknown_labels(entries: Iterable[labelme.Entry], schema: LabelSchema) -> list[UnknownLabel]:
    """Label names that the schema lacks, most frequent first; case and white space do not make two of one name."""
    shapes: Counter[str] = Counter()
    images: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for entry in entries:
        here = Counter(" ".join(name.split()).casefold() for name in entry.labels if schema.find(name) is None)
        shapes.update(here)
        images.update(here.keys())
        for name in entry.labels:
            spelling.setdefault(" ".join(name.split()).casefold(), name)
    return [UnknownLabel(name=spelling[key], shapes=count, images=images[key]) for key, count in shapes.most_common()]


def _unknown_message(archive: Path, strangers: Sequence[UnknownLabel], schema: LabelSchema) -> str:
    taken = {label.id for label in schema.labels} | schema.void_ids
    free = [label_id for label_id in range(1, 256) if label_id not in taken]
    lines = [f"{archive} has {_count(len(strangers), 'label name')} that the schema lacks. Nothing was written."]
    for position, stranger in enumerate(strangers[:_LISTED]):
        name = json.dumps(stranger.name, ensure_ascii=False)
        label_id = free[position] if position < len(free) else "ID"
        add = f"to add:  - {{name: {name}, id: {label_id}}}" if stranger.name else "name the objects in CVAT"
        lines.append(f"  {stranger.name or '(no name)'}: {stranger.found}; {add}")
    lines += _rest(len(strangers))
    known = ", ".join(label.name for label in schema.labels)
    lines.append(
        "Add these lines to 'labels' of your labels.yaml (--labels) with ids of your choice, or the names to the "
        f"'aliases' of a label it has ({known}); or paint such shapes as void or background (--unknown)."
    )
    return "\n".join(lines)


def _painter(schema: LabelSchema, unknown: UnknownLabels) -> Callable[[str], int]:
    background = schema.background
    other = background.id if unknown == "background" and background is not None else VOID

    def label_id_of(name: str) -> int:
        label = schema.find(name)
        return other if label is None else label.id

    return label_id_of


def _convert(
    archive: ZipArchive,
    contents: labelme.Contents,
    staging: Path,
    *,
    schema: LabelSchema,
    label_id_of: Callable[[str], int],
    skip_broken: bool,
    progress: bool,
) -> Summary:
    """Convert all entries into `staging`; the counts of unchanged and unknown are left to the caller."""
    fill = VOID if schema.background is None else schema.background.id
    names = dataset_names([entry.image or entry.xml for entry in contents.entries])
    broken = [str(error) for error in contents.broken]
    histogram = np.zeros(256, np.int64)
    shapes = deleted = 0
    empty: list[str] = []
    renamed: list[str] = []
    for entry, name in zip(
        tqdm(contents.entries, desc="convert", unit="image", disable=None if progress else True), names, strict=True
    ):
        try:
            item = labelme.read_entry(archive, entry)
        except ArchiveError as error:
            broken.append(str(error))
            continue
        label_map = rasterise(item.shapes, size_hw=item.size_hw, label_id_of=label_id_of, fill=fill)
        atomic_write(staging / "imgs" / name, item.image)
        write_label_map(staging / "masks" / PurePosixPath(name).with_suffix(".png"), label_map)
        histogram += _histogram(label_map)
        shapes += len(item.shapes)
        deleted += item.deleted
        if not item.shapes:
            empty.append(name)
        if _stem_key(name) != _stem_key(item.name):
            renamed.append(f"{entry.image} → {name}")
    images = len(contents.entries) + len(contents.broken) - len(broken)
    if broken and (not skip_broken or not images):
        total = images + len(broken)
        raise ArchiveError(
            "\n".join(
                [
                    f"{archive.path}: {len(broken)} of {_count(total, 'image')} cannot be read. Nothing was written.",
                    *(f"  {problem}" for problem in broken[:_LISTED]),
                    *_rest(len(broken)),
                    "Correct the archive" + (", or leave these images out with --skip-broken." if images else "."),
                ]
            )
        )
    warnings = [
        *([f"{_count(deleted, 'shape')} marked as deleted left out"] if deleted else []),
        *_warning("without shapes, with a mask that is all " + ("background" if schema.background else "void"), empty),
        *_warning("renamed, because another image has the name", renamed),
        *_warning("without an XML, not converted", contents.without_annotations),
    ]
    return Summary(
        images=images,
        unchanged=0,
        shapes=shapes,
        pixel_shares={int(i): float(histogram[i] / histogram.sum()) for i in np.flatnonzero(histogram)},
        unknown=(),
        broken=tuple(broken),
        warnings=tuple(warnings),
    )


def _publish(staging: Path, output: Path, *, schema: LabelSchema, overwrite: bool) -> int:
    """Move the staged files into the dataset; returns how many images it already held with the same mask."""
    staged = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    same = {path for path in staged if _same(staging / path, output / path, schema)}
    in_the_way = [path for path in staged if (output / path).exists() and path not in same]
    doubles = _doubles([path for path in staged if path.parts[0] == "imgs"], output)
    if doubles:
        raise DatasetError(
            "\n".join(
                [
                    f"{output} has other files of the same stem, so that it would be unclear which one a mask belongs "
                    "to. Nothing was written.",
                    *(f"  {old} and {new}" for old, new in doubles[:_LISTED]),
                    *_rest(len(doubles)),
                    "Delete the old ones, or convert into another folder.",
                ]
            )
        )
    if in_the_way and not overwrite:
        raise DatasetError(
            "\n".join(
                [
                    f"{output} already has {len(in_the_way)} of these files with other content. Nothing was written.",
                    *(f"  {path}" for path in in_the_way[:_LISTED]),
                    *_rest(len(in_the_way)),
                    "Add --overwrite if the archive is a newer export of the same images. If they are other images of "
                    "the same name, convert into another folder, or export both tasks as one CVAT project.",
                ]
            )
        )
    for path in staged:
        if path not in same:
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            (staging / path).replace(output / path)
    return sum(
        path.parts[0] == "imgs" and path in same and (Path("masks") / path.with_suffix(".png").name) in same
        for path in staged
    )


def _same(new: Path, old: Path, schema: LabelSchema) -> bool:
    if not old.is_file():
        return False
    if new.name == "labels.yaml":  # people's comments and order of keys do not make another schema
        return LabelSchema.from_yaml(old) == schema
    return filecmp.cmp(new, old, shallow=False)


def _doubles(images: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    folder = output / "imgs"
    here = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    by_stem = {_stem_key(name): name for name in here}
    return [
        (Path("imgs") / by_stem[key], path)
        for path in images
        if (key := _stem_key(path.name)) in by_stem and path.name not in here
    ]


def _existing_folder(path: Path) -> Path:
    """The folder itself or its nearest parent that exists: on the same file system as the files to come."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ConfigError(f"{folder} is a file. Name a folder for the dataset.")
    return Path()


def _histogram(label_map: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.bincount(label_map.ravel(), minlength=256).astype(np.int64)


def _stem_key(name: str) -> str:
    return unicodedata.normalize("NFC", PurePosixPath(name).stem).casefold()


def _warning(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    listed = ", ".join(names[:_LISTED]) + ("" if len(names) <= _LISTED else ", …")
    return [f"{_count(len(names), 'image')} {what}: {listed}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rest(count: int) -> list[str]:
    return [f"  … and {count - _LISTED} more"] if count > _LISTED else []
