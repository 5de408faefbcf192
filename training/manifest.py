"""DATASET/manifest.json: what a data set holds, where it came from, and the only door by which items enter it.

DATASET/
  manifest.json        items, what is known of CVAT's jobs, frozen splits; replacing it is the commit
  imgs/ masks/         the items' files
  labels.yaml          the labels that the masks are painted by
  .staged/             files of a commit to come, or of one that was not finished; `settle` puts it right
  .lock                held by the one that writes

Files are written into .staged first, then the manifest is replaced, then they are moved into place. Killed before the
manifest, the data set is as it was; killed after it, the next one that opens it finishes the moves.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from sscloud.errors import ConfigError, DatasetError, SchemaError
from sscloud.files import atomic_write
from sscloud.image import MAX_PIXELS, SUFFIXES, encode_label_map, image_size, image_size_of, read_label_map
from sscloud.labels import LabelSchema, count_ids
from training.names import safe_name, stem_key
from training.splits import SPLITS, Assignment, Source, Split, SplitMemory, SplitPlan, assign, group_key, require_match

MANIFEST, IMAGES, MASKS, LABELS = "manifest.json", "imgs", "masks", "labels.yaml"

VERSION = 1

_STAGED, _LOCK, _OBSOLETE = ".staged", ".lock", "obsolete.json"
_MAX_BYTES = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")

_PATIENCE_S = 5.0
"""How long a reader waits for a writer before it reads what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestItem:
    """A panorama and its mask, and where they come from."""

    name: str
    """The stem of its files."""
    image: str
    """File name in imgs/."""
    mask: str
    """File name in masks/: NAME.png."""
    size_hw: tuple[int, int]
    image_sha256: str
    mask_sha256: str
    pixels: Mapping[int, int]
    """Label id → pixels; ids without a pixel are left out."""
    people_pixels: int
    """Pixels that shapes of people cover."""
    auto_pixels: int
    """Pixels that shapes of a model cover."""
    source: Source
    """{"kind": "cvat", "server", "project", "task", "job", "frame", "name"},
    {"kind": "archive", "archive", "format", "member"} or {"kind": "folder", "name"}."""
    recipe: str
    """Hash of the shapes and of the rule they were painted by: equal recipes give equal masks."""
    group: str
    """Key of the panoramas it belongs together with; see `training.splits.group_key`."""
    split: Split | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a data set holds."""

    schema: LabelSchema
    """By which the masks are painted."""
    items: tuple[ManifestItem, ...] = ()
    """Sorted by name."""
    jobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What is known of CVAT's jobs, JSON values: "server#job" → facts."""
    plan: SplitPlan | None = None
    """What the splits were made by; None before they were."""
    memory: SplitMemory = field(default_factory=SplitMemory)
    """Every split that was ever decided."""

    @property
    def snapshot(self) -> str:
        """Identity of the data, 16 hex digits: names, contents, splits and labels; not where they come from."""
        rows = [[i.name, i.image_sha256, i.mask_sha256, i.split] for i in self.items]
        return hashlib.sha256(_encode(_dump([self.schema.to_dict(), rows]))).hexdigest()[:16]


def make_item(
    *,
    image_name: str,
    image: bytes,
    label_map: NDArray[np.uint8],
    source_map: NDArray[np.uint8],
    source: Source,
    recipe: str,
    group: str,
) -> tuple[ManifestItem, bytes]:
    """Describe a panorama and encode its mask.

    Args:
        image_name: file name in the data set, from `training.names.dataset_names`.
        image: the picture's file.
        label_map: (H, W) uint8 label ids.
        source_map: (H, W) uint8: 0 nobody drew there, 1 people did, 2 a model did.
        source: where it comes from.
        recipe: hash of the shapes and the painting rule.
        group: from `training.splits.group_key`.

    Returns:
        The item, without a split, and its mask as a PNG.

    Raises:
        ImageError: `image` is no picture.
        DatasetError: picture and mask differ in size.
    """
    size_hw = image_size_of(image)
    if not size_hw == label_map.shape == source_map.shape:
        raise DatasetError(
            f"{image_name}: the image is {size_hw[1]}x{size_hw[0]}, its annotations are for "
            f"{label_map.shape[1]}x{label_map.shape[0]}. They must be of one size: fetch or export both again."
        )
    mask = encode_label_map(label_map)
    counts, drawn = count_ids(label_map), count_ids(source_map)
    stem = PurePosixPath(image_name).stem
    item = ManifestItem(
        name=stem,
        image=image_name,
        mask=f"{stem}.png",
        size_hw=size_hw,
        image_sha256=hashlib.sha256(image).hexdigest(),
        mask_sha256=hashlib.sha256(mask).hexdigest(),
        pixels={int(i): int(counts[i]) for i in np.flatnonzero(counts)},
        people_pixels=int(drawn[1]),
        auto_pixels=int(drawn[2]),
        source=dict(source),
        recipe=recipe,
        group=group,
    )
    return item, mask


def read_manifest(path: Path) -> Manifest | None:
    """Read and check DATASET/manifest.json; None when the folder has none.

    Args:
        path: the data set's folder.

    Raises:
        DatasetError: unreadable, or not what is written here.
    """
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise DatasetError(f"{file} is larger than {_MAX_BYTES >> 30} GiB. {_REMEDY}")
        data = json.loads(file.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=_once)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not JSON: {error}. {_REMEDY}") from error
    try:
        return _manifest(data)
    except (_WrongError, SchemaError, RecursionError) as error:
        raise DatasetError(f"{file} cannot be used: {error}. {_REMEDY}") from error


_REMEDY = "Put back the file that sscloud wrote, or fetch or convert into a new folder."


def settle(path: Path) -> None:
    """Finish or undo what a killed writer left; call it with the lock held.

    Raises:
        DatasetError: the manifest cannot be used.
    """
    staged = path / _STAGED
    for leftover in path.glob(".writing-*"):
        leftover.unlink(missing_ok=True)
    if not staged.is_dir():
        return
    manifest = read_manifest(path)
    if manifest is not None:
        wanted = {
            file: sha256
            for item in manifest.items
            for file, sha256 in zip(_files(item), (item.image_sha256, item.mask_sha256), strict=True)
        }
        # A manifest that still names an obsolete file was written before the list: that commit did not happen.
        _finish(
            path,
            moves=[file for file in _staged_files(staged) if _sha256(staged / file) == wanted.get(file)],
            labels=_says(staged / LABELS, manifest.schema),
            obsolete=[file for file in _listed_obsolete(staged) if file not in wanted],
        )
    shutil.rmtree(staged)


def _finish(path: Path, *, moves: Iterable[str], labels: bool, obsolete: Iterable[str]) -> None:
    """What follows the commit: old files out first, because to some file systems `A.jpg` and `a.jpg` are one file."""
    for file in obsolete:
        (path / file).unlink(missing_ok=True)
    for file in moves:
        (path / file).parent.mkdir(exist_ok=True)
        (path / _STAGED / file).replace(path / file)
    if labels:
        (path / _STAGED / LABELS).replace(path / LABELS)


def settle_if_free(path: Path) -> None:
    """`settle`, unless a writer is at work (or the data set cannot be written): then it is read as it is.

    Raises:
        DatasetError: the manifest cannot be used.
    """
    if not (path / _STAGED).is_dir():
        return
    with contextlib.suppress(Timeout, OSError), FileLock(path / _LOCK, timeout=_PATIENCE_S):
        settle(path)


class DatasetWriter:
    """The one that changes a data set: stage items, then commit them together.

    Use it as a context manager; what was staged but not committed is dropped at the end. Not for several threads. A
    folder of panoramas and masks without a manifest is taken over as it is.

    Args:
        path: the data set's folder; made when it is not there.
        schema: the labels that masks are painted by.

    Raises:
        DatasetError: (on entering) somebody else is writing, the manifest cannot be used, the folder holds pictures
            that are no panoramas with masks, or the labels of its masks have another meaning in `schema`.
        SSCloudError: (on entering) a picture or labels.yaml of a folder without a manifest cannot be read.
    """

    def __init__(self, path: Path, *, schema: LabelSchema) -> None:
        self._path, self._schema = path, schema
        self._lock: FileLock | None = None

    def __enter__(self) -> "DatasetWriter":
        path = self._path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / _LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DatasetError(
                f"Another sscloud fetch or convert is writing to {path}. Wait until it has ended, or stop it."
            ) from error
        except OSError as error:
            raise DatasetError(f"{path} cannot be written: {error.strerror or error}. Name another folder.") from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A commit that failed after its manifest is finished here, or by the next one to open the data set.
        with contextlib.suppress(OSError, DatasetError):
            settle(self._path)
        if self._lock is not None:
            self._lock.release()

    def _open(self) -> None:
        path = self._path
        with _writing(path):
            settle(path)
            _require_one_disk(path)
        found = read_manifest(path)
        before = found or _adopted(path, self._schema)
        _require_same_meaning(path, before, self._schema)
        self._items = {item.name: item for item in before.items}
        self._jobs = {key: dict(facts) for key, facts in before.jobs.items()}
        self._plan, self._memory = before.plan, before.memory
        self._stems = {stem_key(item.image): item.name for item in before.items}
        # Text of the entries: a commit joins them, and describes anew only what changed.
        self._item_lines = {item.name: _item_line(item) for item in before.items}
        self._job_lines = {key: _pair_line(key, facts) for key, facts in self._jobs.items()}
        self._head, self._tail = _head(self._schema), _tail(self._plan, self._memory)
        self._staged: set[str] = set()
        self._owned = {file for item in before.items for file in _files(item)}
        self._obsolete: set[str] = set()
        self._manifest: Manifest | None = None
        self._write_labels = not _says(path / LABELS, self._schema)

    @property
    def manifest(self) -> Manifest:
        """What the next commit will write."""
        if self._manifest is None:
            self._manifest = Manifest(
                schema=self._schema,
                items=tuple(self._items[name] for name in sorted(self._items)),
                jobs=dict(self._jobs),
                plan=self._plan,
                memory=self._memory,
            )
        return self._manifest

    def get(self, name: str) -> ManifestItem | None:
        """The item of that name, as `manifest` has it."""
        return self._items.get(name)

    def stage(self, item: ManifestItem, *, image: bytes | None, mask: bytes | None) -> None:
        """Write the files of a new or changed item where nobody sees them, until `commit`.

        An image that was seen before gets the split that it had.

        Args:
            item: from `make_item`.
            image: the picture's file; None when the data set has it already, under this name.
            mask: the PNG; None when the data set has it already.

        Raises:
            DatasetError: the name is another item's or a stranger's file, the bytes are not those that the item names,
                or nothing can be written.
        """
        old = self._items.get(item.name)
        owner = self._stems.get(stem_key(item.image))
        if owner is not None and owner != item.name:
            raise DatasetError(f"{item.image} would share its mask's name with {owner}. Give it another name.")
        image_file, mask_file = _files(item)
        have = dict(zip(_files(old), (old.image_sha256, old.mask_sha256), strict=True)) if old is not None else {}
        new: dict[str, bytes] = {}
        for file, data, sha256 in ((image_file, image, item.image_sha256), (mask_file, mask, item.mask_sha256)):
            if data is None:
                if have.get(file) != sha256:
                    raise DatasetError(f"{file} of that content is not in {self._path} yet, so its bytes are needed.")
                continue
            if hashlib.sha256(data).hexdigest() != sha256:
                raise DatasetError(f"{file}: these are not the bytes that were described. Describe them again.")
            if file not in self._owned and (self._path / file).exists():
                raise DatasetError(
                    f"{self._path / file} is in the way: the manifest does not name it, so it is not replaced. Move it "
                    "away."
                )
            new[file] = data
        with _writing(self._path):
            for file, data in new.items():
                atomic_write(self._path / _STAGED / file, data)
        self._staged.update(new)
        self._manifest = None
        self._forget(old)
        known = self._memory.images.get(item.image_sha256)
        item = replace(item, split=known) if known is not None else item
        self._items[item.name] = item
        self._stems[stem_key(item.image)] = item.name
        self._item_lines[item.name] = _item_line(item)
        self._obsolete.difference_update(_files(item))

    def remove(self, names: Iterable[str]) -> None:
        """Drop items at the next commit; their splits are remembered. Unknown names are none of its business."""
        self._manifest = None
        for name in names:
            self._forget(self._items.pop(name, None))
            self._item_lines.pop(name, None)

    def _forget(self, old: ManifestItem | None) -> None:
        if old is not None:
            self._obsolete.update(_files(old))
            self._stems.pop(stem_key(old.image), None)

    def set_jobs(self, jobs: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Remember what is known of CVAT's jobs ("server#job" → JSON values); None forgets one."""
        self._manifest = None
        for key, facts in jobs.items():
            if facts is None:
                self._jobs.pop(key, None)
                self._job_lines.pop(key, None)
            else:
                self._jobs[key] = dict(facts)
                self._job_lines[key] = _pair_line(key, facts)

    @property
    def scratch(self) -> Path:
        """A folder for what is needed until the writer closes; opening the dataset again clears what a crash left."""
        folder = self._path / _STAGED / "scratch"
        with _writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _require_same_groups(self, plan: SplitPlan) -> None:
        frozen = set(self._memory.images) - set(self._memory.pinned)
        if frozen and self._plan is not None and plan.group_by != self._plan.group_by:
            raise DatasetError(
                f"The splits of {self._path} were made with --group-by {self._plan.group_by} and are frozen: by "
                f"{plan.group_by} they would straddle. Leave --group-by out, or start a new dataset."
            )

    def require_groups(self, plan: SplitPlan, names: Iterable[str] = ()) -> None:
        """Check that every item, and every file name still to come, has a group.

        Raises:
            DatasetError: the plan's rule is an expression that does not match some of them, or another rule than the
                one that the frozen splits were made by.
        """
        known = (_outer_name(item) for _, item in sorted(self._items.items()))
        self._require_same_groups(plan)
        require_match(plan.group_by, list(dict.fromkeys([*known, *names])))

    def freeze_splits(self, plan: SplitPlan, *, pinned: Mapping[str, Split] | None = None) -> Assignment:
        """Give every item that has none a split, in groups by the plan's rule; the next commit writes it.

        Call it when all items are there: what comes together is dealt out together.

        Args:
            plan: how; it is remembered.
            pinned: name → split of panoramas that were chosen whatever their group.

        Raises:
            DatasetError: the rule finds no group in a name, or splits were frozen by another rule.
        """
        self.require_groups(plan)
        names = {item.name: _outer_name(item) for item in self.manifest.items}
        grouped = [
            replace(
                item,
                group=group_key(
                    plan.group_by, source=item.source, name=names[item.name], image_sha256=item.image_sha256
                ),
            )
            for item in self.manifest.items
        ]
        assignment = assign(grouped, memory=self._memory, plan=plan, pinned=pinned)
        for item in grouped:
            decided = replace(item, split=assignment.splits[item.name])
            if decided != self._items[item.name]:
                self._items[item.name] = decided
                self._item_lines[item.name] = _item_line(decided)
        self._plan, self._memory, self._manifest = plan, assignment.memory, None
        self._tail = _tail(self._plan, self._memory)
        return assignment

    def commit(self) -> None:
        """Make all that was staged, removed and set since the last commit the data set, at once.

        Raises:
            DatasetError: it cannot be written; then nothing has changed, or opening the data set again finishes it.
        """
        path, staged = self._path, self._path / _STAGED
        obsolete = self._obsolete & self._owned
        moves = sorted(self._staged - self._obsolete)
        with _writing(path):
            if self._write_labels:
                atomic_write(staged / LABELS, self._schema.to_yaml().encode())
            if obsolete:
                atomic_write(staged / _OBSOLETE, json.dumps(sorted(obsolete)).encode())
            for folder in (IMAGES, MASKS):
                (path / folder).mkdir(exist_ok=True)
            atomic_write(path / MANIFEST, _text(self._head, self._item_lines, self._job_lines, self._tail))
            # From here on the new state counts; for a writer that is killed, `settle` does the rest.
            _finish(path, moves=moves, labels=self._write_labels, obsolete=sorted(obsolete))
            (staged / _OBSOLETE).unlink(missing_ok=True)
        self._owned = (self._owned | set(moves)) - obsolete
        self._staged, self._obsolete, self._write_labels = set(), set(), False


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{error.filename or path} cannot be written: {error.strerror or error}. Check permissions and free space, "
            "then start the command again: it goes on where it was."
        ) from error


def _files(item: ManifestItem) -> tuple[str, str]:
    """The item's files, relative to the data set."""
    return f"{IMAGES}/{item.image}", f"{MASKS}/{item.mask}"


def _outer_name(item: ManifestItem) -> str:
    """The name of the image where it comes from."""
    return str(item.source.get("name") or item.source.get("member") or item.image)


def _staged_files(staged: Path) -> list[str]:
    return sorted(
        f"{folder}/{file.name}"
        for folder in (IMAGES, MASKS)
        if (staged / folder).is_dir()
        for file in (staged / folder).iterdir()
        if file.is_file() and not file.is_symlink()
    )


def _listed_obsolete(staged: Path) -> list[str]:
    try:
        found = json.loads((staged / _OBSOLETE).read_bytes())
    except (OSError, ValueError):
        return []
    files = found if isinstance(found, list) else []
    return [f for f in files if isinstance(f, str) and _is_safe(f.partition("/")) and f.count("/") == 1]


def _is_safe(parts: tuple[str, str, str]) -> bool:
    return parts[0] in (IMAGES, MASKS) and safe_name(parts[2]) == parts[2]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _says(path: Path, schema: LabelSchema) -> bool:
    """Whether a labels.yaml holds this schema; its comments and the order of its keys do not count."""
    try:
        return LabelSchema.from_yaml(path) == schema
    except SchemaError:
        return False


def _require_one_disk(path: Path) -> None:
    for folder in (path / IMAGES, path / MASKS):
        if folder.exists() and folder.stat().st_dev != path.stat().st_dev:
            raise DatasetError(f"{folder} is on another disk than {path}, so files cannot be moved in whole. Move it.")


def _adopted(path: Path, schema: LabelSchema) -> Manifest:
    """What a manifest would say of a folder that was filled by hand or by an older version: all in it stays in it."""
    images, masks = (
        sorted(f.name for f in (path / folder).iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        if (path / folder).is_dir()
        else []
        for folder in (IMAGES, MASKS)
    )
    lonely = {f"{PurePosixPath(name).stem}.png" for name in images} ^ set(masks)
    odd = [name for name in images if safe_name(name) != name]
    if lonely or odd or len({stem_key(name) for name in images}) != len(images):
        raise DatasetError(
            f"{path} holds pictures but no {MANIFEST}, and they are no pairs of {IMAGES}/NAME.jpg and {MASKS}/NAME.png "
            f"({', '.join(sorted([*lonely, *odd])[:_SHOWN]) or 'names differ in case only'}). Put that right, or name "
            "a new folder."
        )
    own = path / LABELS
    return Manifest(
        schema=LabelSchema.from_yaml(own) if own.exists() else schema,
        items=tuple(_adopt(path, name) for name in images),
    )


def _adopt(path: Path, image_name: str) -> ManifestItem:
    stem = PurePosixPath(image_name).stem
    image, mask = path / IMAGES / image_name, path / MASKS / f"{stem}.png"
    label_map, size_hw = read_label_map(mask), image_size(image)
    if label_map.shape != size_hw:
        raise DatasetError(f"{image}: the image and its mask differ in size. Remove both, or name a new folder.")
    counts = count_ids(label_map)
    sha256 = _sha256(image)
    return ManifestItem(
        name=stem,
        image=image_name,
        mask=mask.name,
        size_hw=size_hw,
        image_sha256=sha256,
        mask_sha256=_sha256(mask),
        pixels={int(i): int(counts[i]) for i in np.flatnonzero(counts)},
        people_pixels=0,  # nobody knows
        auto_pixels=0,
        source={"kind": "folder", "name": image_name},
        recipe="",
        group=f"image:{sha256}",
    )


def _require_same_meaning(path: Path, before: Manifest, schema: LabelSchema) -> None:
    """Refuse labels by which the masks that are there would mean something else."""
    used = {label_id for item in before.items for label_id in item.pixels}
    changed = []
    for label in before.schema.labels:
        now = schema.by_id(label.id)
        if label.id in used and (now is None or schema.find(label.name) != now):
            changed.append(f"{label.id} is {label.name!r} there, {now.name if now else 'nothing'!r} in the new labels")
    if changed:
        raise DatasetError(
            f"The masks of {path} were painted by other labels: {'; '.join(changed)}. Keep the ids (a new name needs "
            "the old one among its aliases), or start a new folder."
        )


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _item_line(item: ManifestItem) -> bytes:
    values = {name: getattr(item, name) for name in _ITEM_KEYS}
    pixels = {str(label_id): count for label_id, count in item.pixels.items()}
    return _encode("    " + _dump({**values, "pixels": pixels, "source": dict(item.source)}))


def _pair_line(key: str, value: object, *, indent: int = 4) -> bytes:
    return _encode(f"{' ' * indent}{_dump(key)}: {_dump(value)}")


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # half a character from outside: as JSON escapes it


def _head(schema: LabelSchema) -> bytes:
    return _encode(f'{{\n  "version": {VERSION},\n  "labels": {_dump(schema.to_dict())},\n')


def _tail(plan: SplitPlan | None, memory: SplitMemory) -> bytes:
    values = plan and {"group_by": plan.group_by, "validation": float(plan.validation), "test": float(plan.test)}
    images, groups = (
        _block(b"{", [_pair_line(key, entries[key], indent=6) for key in sorted(entries)], b"}", indent=4)
        for entries in (memory.images, memory.groups)
    )
    pinned = _block(b"[", [_encode(f"      {_dump(sha)}") for sha in sorted(memory.pinned)], b"]", indent=4)
    splits = b'    "images": ' + images + b',\n    "groups": ' + groups + b',\n    "pinned": ' + pinned
    return _encode(f'  "plan": {_dump(values)},\n') + b'  "splits": {\n' + splits + b"\n  }\n}\n"


def _text(head: bytes, item_lines: Mapping[str, bytes], job_lines: Mapping[str, bytes], tail: bytes) -> bytes:
    items = _block(b"[", [item_lines[name] for name in sorted(item_lines)], b"]", indent=2)
    jobs = _block(b"{", [job_lines[key] for key in sorted(job_lines)], b"}", indent=2)
    return head + b'  "items": ' + items + b',\n  "jobs": ' + jobs + b",\n" + tail


def _block(begin: bytes, lines: list[bytes], end: bytes, *, indent: int) -> bytes:
    return b"".join((begin, b"\n", b",\n".join(lines), b"\n", b" " * indent, end)) if lines else begin + end


_ITEM_KEYS = (
    "image",
    "size_hw",
    "image_sha256",
    "mask_sha256",
    "pixels",
    "people_pixels",
    "auto_pixels",
    "source",
    "recipe",
    "group",
    "split",
)
"""In the file; the names of an item and of its mask follow from that of its image."""


class _WrongError(Exception):
    """What is wrong in a manifest, without the file's name."""


def _manifest(data: object) -> Manifest:
    root = _mapping(data, "the manifest", {"version", "labels", "items", "jobs", "plan", "splits"})
    if root["version"] != VERSION:
        raise _WrongError(
            f"'version' is {root['version']!r:.50}, this sscloud reads {VERSION}: use the version that wrote it"
        )
    if not isinstance(root["items"], list):
        raise _WrongError(f"'items' must be a list, found {root['items']!r:.100}")
    items = sorted((_item(entry, place) for place, entry in enumerate(root["items"])), key=lambda item: item.name)
    stems: dict[str, str] = {}
    for item in items:
        other = stems.setdefault(stem_key(item.image), item.image)
        if other is not item.image:
            raise _WrongError(f"the images {other} and {item.image} would share a mask")
    jobs = _mapping(root["jobs"], "'jobs'")
    splits = _mapping(root["splits"], "'splits'", {"images", "groups", "pinned"})
    images = _mapping(splits["images"], "'splits.images'")
    groups = _mapping(splits["groups"], "'splits.groups'")
    pinned = splits["pinned"]
    if not isinstance(pinned, list):
        raise _WrongError(f"'splits.pinned' must be a list, found {pinned!r:.100}")
    return Manifest(
        schema=LabelSchema.from_dict(root["labels"], source="'labels'"),
        items=tuple(items),
        jobs={key: _mapping(facts, f"the job {key!r:.100}") for key, facts in jobs.items()},
        plan=None if root["plan"] is None else _plan(root["plan"]),
        memory=SplitMemory(
            images={_hash(key, "a key of 'splits.images'"): _split(value, key) for key, value in images.items()},
            groups={key: _split(value, key) for key, value in groups.items()},
            pinned=frozenset(_hash(value, "an entry of 'splits.pinned'") for value in pinned),
        ),
    )


def _item(entry: object, place: int) -> ManifestItem:
    data = _mapping(entry, f"item {place + 1}", set(_ITEM_KEYS))
    image = data["image"]
    if not isinstance(image, str) or safe_name(image) != image:
        raise _WrongError(f"'image' of item {place + 1} is no file name of a picture: {image!r:.100}")
    where = f"of {image}"
    size = data["size_hw"]
    if not (isinstance(size, list) and len(size) == 2 and all(_is_count(side) and side for side in size)):
        raise _WrongError(f"'size_hw' {where} must be [height, width], found {size!r:.100}")
    area = size[0] * size[1]
    if area > MAX_PIXELS:
        raise _WrongError(f"'size_hw' {where} is {size[0] * size[1]} pixels, at most {MAX_PIXELS} are used")
    pixels = _mapping(data["pixels"], f"'pixels' {where}")
    if not all(re.fullmatch("[0-9]{1,3}", key) and int(key) < 256 and _is_count(n) for key, n in pixels.items()) or (
        sum(pixels.values()) != area
    ):
        raise _WrongError(f"'pixels' {where} must give {area} pixels by label id, found {pixels!r:.200}")
    for key in ("people_pixels", "auto_pixels"):
        if not _is_count(data[key]) or data[key] > area:
            raise _WrongError(f"'{key}' {where} must be a number of pixels up to {area}, found {data[key]!r:.50}")
    source = _mapping(data["source"], f"'source' {where}")
    if not all(value is None or type(value) in (str, int) for value in source.values()):
        raise _WrongError(f"'source' {where} may hold texts and whole numbers only, found {source!r:.200}")
    for key in ("recipe", "group"):
        if not isinstance(data[key], str):
            raise _WrongError(f"'{key}' {where} must be a text, found {data[key]!r:.50}")
    stem = PurePosixPath(image).stem
    return ManifestItem(
        name=stem,
        image=image,
        mask=f"{stem}.png",
        size_hw=(size[0], size[1]),
        image_sha256=_hash(data["image_sha256"], f"'image_sha256' {where}"),
        mask_sha256=_hash(data["mask_sha256"], f"'mask_sha256' {where}"),
        pixels={int(key): count for key, count in pixels.items()},
        people_pixels=data["people_pixels"],
        auto_pixels=data["auto_pixels"],
        source=source,
        recipe=data["recipe"],
        group=data["group"],
        split=None if data["split"] is None else _split(data["split"], image),
    )


def _plan(value: object) -> SplitPlan:
    data = _mapping(value, "'plan'", {"group_by", "validation", "test"})
    numbers = [data["validation"], data["test"]]
    if not isinstance(data["group_by"], str) or not all(type(number) in (int, float) for number in numbers):
        raise _WrongError(f"'plan' must hold a text and two percentages, found {data!r:.200}")
    try:
        return SplitPlan(**data)
    except ConfigError as error:
        raise _WrongError(f"'plan': {error}") from error


def _mapping(value: object, what: str, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongError(f"{what} must be a mapping, found {value!r:.100}")
    if keys is not None and value.keys() != keys:
        unknown, lost = sorted(value.keys() - keys), sorted(keys - value.keys())
        raise _WrongError(f"{what} must have the keys {sorted(keys)}; unknown are {unknown!r:.200}, missing {lost}")
    return value


def _split(value: object, of: str) -> Split:
    for name in SPLITS:
        if value == name:
            return name
    raise _WrongError(f"the split of {of!r:.100} must be one of {', '.join(SPLITS)}, found {value!r:.50}")


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _WrongError(f"{what} must be 64 hex digits, found {value!r:.100}")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs][:_SHOWN]}")
    return found


_SHOWN = 12
