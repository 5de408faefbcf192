"""An exported archive, of any format that is read → items of a dataset folder."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from tqdm import tqdm

from sscloud.errors import ArchiveError, DatasetError
from sscloud.labels import LabelSchema, name_key
from training.formats import camvid, cityscapes, coco, cvat_xml, datumaro, labelme, layout, segmentation_mask
from training.formats.archive import ZipArchive
from training.formats.entry import Contents, Entry, Item, read_entry
from training.manifest import DatasetWriter, Manifest, ManifestItem, make_item
from training.names import dataset_names, stem_key
from training.rasterise import RULE_VERSION, EllipseShape, MaskShape, RunLengthShape, Shape, rasterise
from training.rule import Empty, Rule, Stranger, Unknown, require_known
from training.splits import Assignment, Source, SplitPlan, group_key

READERS: Final[Mapping[str, ModuleType]] = {
    layout.CVAT_IMAGES: cvat_xml,
    layout.LABELME: labelme,
    layout.SEGMENTATION_MASK: segmentation_mask,
    layout.COCO: coco,
    layout.DATUMARO: datumaro,
    layout.CAMVID: camvid,
    layout.CITYSCAPES: cityscapes,
}
"""Format, as CVAT's menu names it → the module that lists the entries of such archives."""

_LISTED = 20
"""Most lines of one kind in a message; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `convert_archive` has done."""

    layout: str
    """The archive's format."""
    images: int
    """Images converted, those that were there already included."""
    unchanged: int
    """Of them, images that the dataset already held with the same mask."""
    shapes: int
    pixel_shares: Mapping[int, float]
    """Label id → share of all pixels of the converted images; ids without a pixel are left out."""
    unknown: tuple[Stranger, ...]
    broken: tuple[str, ...]
    """Why images were left out, a sentence each."""
    warnings: tuple[str, ...]
    manifest: Manifest
    """Of the whole dataset, as it is now."""
    splits: Assignment


def convert_archive(
    archive: Path,
    output: Path,
    *,
    schema: LabelSchema,
    unknown: Unknown = "error",
    empty: Empty = "skip",
    plan: SplitPlan | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
    origin: str | None = None,
    progress: bool = False,
) -> Summary:
    """Convert an archive that CVAT exported into a dataset folder, new or already in use.

    Everything is converted out of sight first; nothing appears in the dataset before all of it is known to be good.
    What is there already with the same content is left alone. Pixels that no shape covers get the id of the schema's
    background, or void (255) when it has none.

    Args:
        archive: the zip.
        output: the dataset; archives can be added to one dataset one after the other.
        schema: turns label names into label ids.
        unknown: label names that the schema lacks: stop, or paint them as void or background.
        empty: frames without shapes: leave them out, or take them as all void or all background.
        plan: how the new items are split; None for the dataset's own plan.
        skip_broken: convert the other images when some cannot be read.
        overwrite: replace items of the dataset that differ.
        origin: what the archive is an export of; items of the same origin are replaced even without `overwrite`. None:
            the archive's own name says where items come from.
        progress: show a progress bar on stderr when that is a terminal.

    Raises:
        ArchiveError: not a zip, of no format that is read, hostile, empty, or (without `skip_broken`) an image cannot
            be read.
        SchemaError: label names that the schema lacks, with `unknown="error"`.
        DatasetError: items of other content are in the way, without `overwrite`; or what `DatasetWriter` raises.
        ConfigError: something shall become background, and the schema has none.
    """
    rule = Rule(schema=schema, unknown=unknown, empty=empty)
    with ZipArchive(archive) as opened:
        found = layout.recognise(opened)
        contents = _list_entries(opened, found)
        strangers = _unknown_labels(contents.entries, schema)
        require_known(strangers, rule, source=str(archive))
        with DatasetWriter(output, schema=schema) as writer:
            plan = plan or writer.manifest.plan or SplitPlan()
            writer.require_groups(plan, [entry.name for entry in contents.entries])
            work = _Conversion(opened, str(found), contents, writer, rule=rule, plan=plan, origin=origin)
            work.run(progress=progress)
            work.require_success(skip_broken=skip_broken)
            work.require_room(output, overwrite=overwrite)
            splits = writer.freeze_splits(plan)
            writer.commit()
            return work.summary(strangers, writer.manifest, splits)


class _Conversion:
    """One archive on its way into a dataset, with what there is to say about it."""

    def __init__(
        self,
        archive: ZipArchive,
        found: str,
        contents: Contents,
        writer: DatasetWriter,
        *,
        rule: Rule,
        plan: SplitPlan,
        origin: str | None,
    ) -> None:
        self._origin = origin
        self._archive, self._layout, self._contents, self._writer = archive, found, contents, writer
        self._rule, self._plan = rule, plan
        self._broken = [str(error) for error in contents.broken]
        self._items: list[ManifestItem] = []
        self._in_the_way: list[str] = []
        self._empty: list[str] = []
        self._unpainted: list[str] = []
        self._renamed: list[str] = []
        self._skipped: dict[str, Counter[str]] = {}
        self._unchanged = self._shapes = self._deleted = 0

    def run(self, *, progress: bool) -> None:
        """Stage every image that can be read."""
        entries = self._contents.entries
        names = dataset_names([entry.name for entry in entries])
        bar = tqdm(entries, desc="convert", unit="image", disable=None if progress else True)
        for entry, name in zip(bar, names, strict=True):
            try:
                item = read_entry(self._archive, entry)
            except ArchiveError as error:
                self._broken.append(str(error))
                continue
            self._note(entry, name, item)
            if item.shapes or (self._rule.empty != "skip" and not entry.skipped):
                self._stage(entry, name, item)

    def _note(self, entry: Entry, name: str, item: Item) -> None:
        self._deleted += entry.deleted
        for kind, count in entry.skipped.items():
            self._skipped.setdefault(kind, Counter())[name] += count
        if not item.shapes and entry.skipped:
            self._unpainted.append(name)
        elif not item.shapes:
            self._empty.append(name)
        elif stem_key(name) != stem_key(entry.name):
            self._renamed.append(f"{entry.image} → {name}")

    def _stage(self, entry: Entry, name: str, item: Item) -> None:
        fill = self._rule.fill_of(drawn=bool(item.shapes))
        raster = rasterise(item.shapes, size_hw=item.size_hw, label_id_of=self._rule.label_id_of, fill=fill)
        source: Source = {
            "kind": "archive",
            "archive": self._origin or self._archive.path.name,
            "format": self._layout,
            "member": entry.image,
            "name": entry.name,
            "task": entry.task,
        }
        made, mask = make_item(
            image_name=name,
            image=item.image,
            label_map=raster.label_map,
            source_map=raster.source_map,
            source=source,
            recipe=_recipe(item, fill, self._rule.label_id_of),
            group=group_key(
                self._plan.group_by,
                source=source,
                name=entry.name,
                image_sha256=hashlib.sha256(item.image).hexdigest(),
            ),
        )
        self._shapes += len(item.shapes)
        self._items.append(made)
        old = self._writer.get(made.name)
        if old is None:
            self._writer.stage(made, image=item.image, mask=mask)
            return
        same_image, same_mask = old.image_sha256 == made.image_sha256, old.mask_sha256 == made.mask_sha256
        if old.image == made.image and same_image and same_mask:
            self._unchanged += 1
            return
        if self._origin is not None and old.source.get("archive") == self._origin:
            pass  # a newer export of the same frames
        elif not same_image:
            self._in_the_way.append(f"imgs/{made.image}")
        elif not same_mask:
            self._in_the_way.append(f"masks/{made.mask}")
        replaced_image = None if same_image and old.image == made.image else item.image
        self._writer.stage(made, image=replaced_image, mask=None if same_mask else mask)

    def require_success(self, *, skip_broken: bool) -> None:
        """Refuse an archive of which some images, or all, are missing."""
        total = len(self._contents.entries) + len(self._contents.broken)
        good = total - len(self._broken)
        if self._broken and (not skip_broken or not good):
            raise ArchiveError(
                "\n".join(
                    [
                        f"{self._archive.path}: {len(self._broken)} of {_count(total, 'image')} cannot be read. "
                        "Nothing was written.",
                        *(f"  {problem}" for problem in self._broken[:_LISTED]),
                        *_rest(len(self._broken)),
                        "Correct the archive" + (", or leave these images out with --skip-broken." if good else "."),
                    ]
                )
            )
        if not self._items:
            raise ArchiveError(
                f"{self._archive.path}: none of its {_count(total, 'image')} has a shape. Nothing was written. "
                "Annotate them in CVAT and export again, or take them with --empty background (or void)."
            )

    def require_room(self, output: Path, *, overwrite: bool) -> None:
        """Refuse to replace what the dataset holds, unless that is wanted."""
        if self._in_the_way and not overwrite:
            raise DatasetError(
                "\n".join(
                    [
                        f"{output} already has {len(self._in_the_way)} of these files with other content. Nothing was "
                        "written.",
                        *(f"  {path}" for path in self._in_the_way[:_LISTED]),
                        *_rest(len(self._in_the_way)),
                        "Add --overwrite if the archive is a newer export of the same images. If they are other images "
                        "of the same name, convert into another folder, or export both tasks as one CVAT project.",
                    ]
                )
            )

    def summary(self, strangers: Sequence[Stranger], manifest: Manifest, splits: Assignment) -> Summary:
        """What was done, for a person."""
        pixels: Counter[int] = Counter()
        for item in self._items:
            pixels.update(item.pixels)
        total = pixels.total()
        return Summary(
            layout=self._layout,
            images=len(self._items),
            unchanged=self._unchanged,
            shapes=self._shapes,
            pixel_shares={label_id: pixels[label_id] / total for label_id in sorted(pixels)},
            unknown=tuple(strangers),
            broken=tuple(self._broken),
            warnings=tuple(self._warnings()),
            manifest=manifest,
            splits=splits,
        )

    def _warnings(self) -> Iterable[str]:
        if self._deleted:
            yield f"{_count(self._deleted, 'shape')} marked as deleted left out"
        for kind, images in sorted(self._skipped.items()):
            yield (
                f"{_count(images.total(), 'object')} of type {kind} in {_count(len(images), 'image')} left out: only "
                "shapes that cover an area make a mask"
            )
        background = self._rule.schema.background
        for name in self._contents.merged_with_nobody:
            label = self._rule.schema.find(name)
            if label is None or label != background:
                yield (
                    f"the label {name!r} has the colour of the background: in {self._layout} its pixels cannot be told "
                    f"from pixels that nobody drew, and became {self._rule.fill}. Give it another colour in CVAT, or "
                    f"export as '{layout.CVAT_IMAGES}'"
                )
        left_out = self._rule.empty == "skip"
        what = "left out; --empty takes them" if left_out else f"taken as all {self._rule.empty}"
        yield from _listing(f"without shapes, {what}", self._empty)
        yield from _listing("with shapes of which none makes a mask, left out", self._unpainted)
        yield from _listing("renamed, because the name is taken or not a safe file name", self._renamed)
        yield from _listing("without annotations, not converted", self._contents.without_annotations)


def _list_entries(archive: ZipArchive, found: str | None) -> Contents:
    if found is None or found not in READERS:
        what = f"looks like an export of {found}, which is not read" if found else "holds no annotations that are known"
        raise ArchiveError(
            f"{archive.path} {what}. In CVAT choose 'Export dataset', the format "
            f"'{layout.CVAT_IMAGES}' and switch 'Save images' on. Also read: {', '.join(sorted(READERS))}."
        )
    contents: Contents = READERS[found].list_entries(archive)
    if not contents.entries and not contents.broken:
        raise ArchiveError(f"{archive.path} ({found}) lists no images. Export a task that has some.")
    if contents.entries and all(entry.image is None for entry in contents.entries):
        raise ArchiveError(
            f"{archive.path} ({found}) holds annotations of {_count(len(contents.entries), 'image')}, but not the "
            "images. Export again with 'Save images' switched on."
        )
    return contents


def _recipe(item: Item, fill: int, label_id_of: Callable[[str], int]) -> str:
    """Hash of what the mask is painted from: equal ones give equal masks."""
    digest = hashlib.sha256(repr((RULE_VERSION, item.size_hw, fill)).encode())
    for shape in item.shapes:
        digest.update(repr((label_id_of(shape.label), shape.z_order, shape.auto, _geometry(shape))).encode())
        if isinstance(shape, MaskShape):
            digest.update(shape.mask.tobytes())
        elif isinstance(shape, RunLengthShape):
            digest.update(shape.runs.tobytes())
        elif not isinstance(shape, EllipseShape):
            digest.update(shape.points.tobytes())
    return digest.hexdigest()[:32]


def _geometry(shape: Shape) -> tuple[object, ...]:
    if isinstance(shape, MaskShape | RunLengthShape):
        return ("mask", shape.box_xyxy)
    if isinstance(shape, EllipseShape):
        return ("ellipse", shape.centre_xy, shape.radii_xy, shape.rotation)
    return ("polygon", len(shape.points))


def _unknown_labels(entries: Iterable[Entry], schema: LabelSchema) -> list[Stranger]:
    """Label names that the schema lacks, most frequent first; case and white space do not make two of one name."""
    shapes: Counter[str] = Counter()
    images: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for entry in entries:
        here = Counter(name_key(name) for name in entry.labels if schema.find(name) is None)
        shapes.update(here)
        images.update(here.keys())
        for name in entry.labels:
            spelling.setdefault(name_key(name), name)
    return [Stranger(name=spelling[key], shapes=count, images=images[key]) for key, count in shapes.most_common()]


def _listing(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    listed = ", ".join(names[:_LISTED]) + ("" if len(names) <= _LISTED else ", …")
    return [f"{_count(len(names), 'image')} {what}: {listed}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _rest(count: int) -> list[str]:
    return [f"  … and {count - _LISTED} more"] if count > _LISTED else []
