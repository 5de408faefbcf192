"""What pre-labels have saved: each one laid beside what people made of it.

A pre-label is what `sscloud prelabel` has sent and kept, or, of frames pre-labelled by the button in CVAT, what the
version that the shapes name draws once more (`training.reconstruction` says when that is believed). What people made of
it is the mask that was fetched. Both are painted by the same rule, so a pixel is one of these:

    accepted       the same label in both
    added          nobody drew in the pre-label, somebody did then
    removed        the other way round
    re-labelled    drawn in both, with another label

Pixels are counted as they are, not by solid angle: people work on pixels. Where neither drew, nothing was saved and
nothing was done. So the effort is the share of changed pixels among those that the model or people have drawn: 0 where
a pre-label was taken as it was, 1 where nothing of it was of use, as without a model. Pixels that are void in the mask
are left out, unless the schema has no background: then void is where nobody drew.

Only frames of completed jobs count: elsewhere an untouched pre-label is one that nobody has looked at yet. A frame
without any shape is in no data set (unless `--empty` takes it): a pre-label that was deleted whole counts as unknown
where the store has it. Of the button's it is not seen at all, nor is one all of whose shapes were drawn anew. So the
worst pre-labels are missing, and the effort comes out lower than it was.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.bundle import ModelBundle
from sscloud.errors import ServerError, SSCloudError
from sscloud.files import atomic_write
from sscloud.image import decode_image, read_label_map
from sscloud.labels import VOID, LabelSchema
from training.annotations import PAINTED, painting
from training.correction import count_pixels, count_shapes
from training.cvat import ProjectLabel, Server
from training.detector import Detector
from training.effort_records import FrameEffort, add_effort, read_effort
from training.effort_summary import EffortSummary, summarise_effort
from training.manifest import IMAGES, MASKS, Manifest, ManifestItem, read_manifest
from training.prelabel import is_gone, shapes_by_frame
from training.prelabel_store import Drawn, FrameRecord, JobRecord, PrelabelStore, identity
from training.rasterise import rasterise
from training.reconstruction import reconstruct, titles_of
from training.rule import Rule
from training.survey import LabelBook
from training.working_time import working_seconds

__all__ = [
    "EffortSummary",
    "FrameEffort",
    "measure_effort",
    "read_effort",
    "summarise_effort",
    "write_effort_page",
]

log = logging.getLogger(__name__)

BATCH: Final = 50
"""Frames after which what was measured is written: so much is measured again after a kill."""
COMPLETED: Final = "completed"

NO_MODEL: Final = "its shapes name no version"
SEVERAL_MODELS: Final = "its shapes name several versions"
NO_BUNDLE: Final = "its version is not at hand"
NOT_PROVEN: Final = "what is left of it does not show that the version drew it with its default settings"
NOT_SETTLED: Final = "`sscloud prelabel` was stopped while it replaced it"
DELETED_WHOLE: Final = "all its shapes were deleted, so the frame is not in the data set"
FAILED: Final = "it could not be measured; the next fetch tries again"

_PROBLEMS: Final = (SSCloudError, OSError, ValueError, RuntimeError)
"""What one job may raise: answers and files that are no good, and all that a network runs into, such as memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prelabel:
    """What a model drew in a frame; `unknown` says why nobody knows."""

    model: str
    shapes: Sequence[Mapping[str, Any]] = ()
    labels: Mapping[int, str] | None = None
    """Names of the labels at that time; None: as they are now."""
    unknown: str = ""


def measure_effort(
    server: Server,
    store: Path,
    dataset: Path,
    *,
    bundle_of: Callable[[str], ModelBundle | None],
    device: str = "auto",
    quiet: bool = False,
) -> list[FrameEffort]:
    """Measure every fetched frame of this server that was pre-labelled, and keep the records in the data set.

    What was measured in this state of pre-label and mask is not measured again. A job that was changed since it was
    fetched is left to the next fetch. The frames of a job that cannot be measured are unknown until the next call.

    Args:
        server: logged in.
        store: the store of pre-labels; it may be missing.
        dataset: the data set's folder.
        bundle_of: title of a version → its bundle, None if there is none; for frames that the store does not know.
        device: on which pre-labels are drawn again; see `Predictor`.
        quiet: no progress bar.

    Returns:
        What was measured in this snapshot of the data set, by this call or by one before.

    Raises:
        ServerError: the server cannot be reached any more.
        DatasetError: the manifest cannot be read, or what was measured neither read nor written.
    """
    manifest = read_manifest(dataset)
    if manifest is None:
        return []
    bench = _Bench(server, store, dataset, manifest, bundle_of=bundle_of, device=device)
    jobs: dict[int, list[ManifestItem]] = {}
    for item in manifest.items:
        if item.source.get("kind") == "cvat" and item.source["server"] == server.url:
            jobs.setdefault(int(item.source["job"] or 0), []).append(item)
    due = {job: found for job, items in jobs.items() if (found := bench.due(job, items))}
    deleted = bench.deleted()
    fresh = [record for records in deleted.values() for record in records if not bench.knows(record)]
    try:
        with tqdm(total=sum(map(len, due.values())), desc="Effort", unit="frame", disable=quiet or None) as bar:
            for job, items in due.items():
                frames = len(jobs[job]) + len(deleted.get(job, ()))
                try:
                    fresh += bench.measure(job, items, frames=frames)
                except _PROBLEMS as error:
                    if isinstance(error, SSCloudError) and is_gone(error):
                        raise
                    log.warning("What the pre-labels of job %d have saved could not be measured: %s", job, error)
                    fresh += bench.failed(job, items, frames=frames)
                bar.update(len(items))
                if len(fresh) >= BATCH:
                    add_effort(dataset, fresh)
                    fresh = []
    except (SSCloudError, KeyboardInterrupt):
        add_effort(dataset, fresh)
        raise
    if fresh:
        add_effort(dataset, fresh)
    return [record for record in read_effort(dataset) if record.snapshot == manifest.snapshot]


def write_effort_page(path: Path, summary: EffortSummary, *, schema: LabelSchema | None = None) -> None:
    """Write a summary as a page for people, atomically.

    Args:
        path: the HTML file.
        summary: of the records.
        schema: the labels' colours; None for those of the shipped schema.
    """
    from training.effort_page import render_effort_page  # what draws pages is installed apart

    atomic_write(path, render_effort_page(summary, schema=schema or LabelSchema.default()).encode("utf-8"))


class _Bench:
    """One measurement: what is due, and what was looked up for it."""

    def __init__(
        self,
        server: Server,
        store: Path,
        dataset: Path,
        manifest: Manifest,
        *,
        bundle_of: Callable[[str], ModelBundle | None],
        device: str,
    ) -> None:
        self._server, self._dataset, self._manifest = server, dataset, manifest
        self._store = PrelabelStore(store, server=server.url)
        self._rule = Rule(schema=manifest.schema, unknown="void")
        self._snapshot = manifest.snapshot
        self._known = {record.key: record for record in read_effort(dataset)}
        """The last record of each frame."""
        self._book = LabelBook(server)
        self._labels: dict[int, tuple[ProjectLabel, ...]] = {}
        self._bundle_of, self._device = bundle_of, device
        self._bundles: dict[str, ModelBundle | None] = {}
        self._detector: tuple[str, Detector | None] = ("", None)
        self._seconds: dict[int, Mapping[int, float]] = {}
        self._has_log = True

    def due(self, job: int, items: Sequence[ManifestItem]) -> list[ManifestItem]:
        """The job's items that are to be measured, by what is known without asking the server."""
        facts = self._manifest.jobs.get(f"{self._server.url}#{job}")
        if facts is None or facts.get("state") != COMPLETED:
            return []
        try:
            record = self._store.load(job)
        except _PROBLEMS:  # `measure` says it
            return [item for item in items if not self._is_measured(item)]
        return [item for item in items if self._is_due(item, record.of(_frame(item)))]

    def _is_measured(self, item: ManifestItem) -> bool:
        """Whether something is known of the item's mask."""
        known = self._known.get(_key(item))
        return known is not None and known.mask_sha256 == item.mask_sha256 and known.unknown != FAILED

    def _is_due(self, item: ManifestItem, record: FrameRecord) -> bool:
        if record == FrameRecord() and not item.auto_pixels:
            return False  # drawn by people from the beginning
        known = self._known.get(_key(item))
        if known is None or known.state != (*_key(item), _identity(record), item.mask_sha256):
            return True
        return known.unknown == FAILED or (known.unknown == NO_BUNDLE and self._find(known.model) is not None)

    def knows(self, record: FrameEffort) -> bool:
        """Whether this is the last that was written of the frame."""
        known = self._known.get(record.key)
        return known is not None and known.state == record.state

    def deleted(self) -> dict[int, list[FrameEffort]]:
        """Job → records of the frames that have left the data set because nothing of their pre-label is there."""
        found: dict[int, list[FrameEffort]] = {}
        prefix = f"{self._server.url}#"
        for key, facts in self._manifest.jobs.items():
            bare = {*facts.get("empty", ()), *facts.get("unpainted", ())}
            if not bare or not key.startswith(prefix) or facts.get("state") != COMPLETED:
                continue
            job = int(key.removeprefix(prefix))
            try:
                record = self._store.load(job)
            except _PROBLEMS as error:
                log.warning("Which pre-labels of job %d were deleted is not known: %s", job, error)
                continue
            found[job] = [
                FrameEffort(
                    server=self._server.url,
                    project=_optional(facts["project"]),
                    task=int(facts["task"]),
                    job=job,
                    frame=frame,
                    name="",
                    group="",
                    model=record.of(frame).drawn.model,
                    prelabel=_identity(record.of(frame)),
                    mask_sha256="",
                    fetched=str(facts["updated"]),
                    snapshot=self._snapshot,
                    unknown=DELETED_WHOLE,
                )
                for frame in sorted(bare)
                if record.of(frame).drawn.shapes
            ]
        return found

    def measure(self, job: int, items: Sequence[ManifestItem], *, frames: int) -> list[FrameEffort]:
        """Records of a job's items; none if the job was changed since it was fetched.

        Args:
            job: the job.
            items: of those that are due.
            frames: how many frames share the job's time.

        Raises:
            SSCloudError: the job cannot be measured.
        """
        record = self._store.load(job)
        shapes = shapes_by_frame(self._server.annotations(job))
        fetched = str(self._manifest.jobs[f"{self._server.url}#{job}"]["updated"])
        if self._server.job(job).updated != fetched:
            return []
        found = []
        for item in items:
            facts = self._measure_frame(item, record.of(_frame(item)), shapes.get(_frame(item), []))
            if facts is not None:
                found.append((item, facts))
        seconds = self._seconds_of(int(items[0].source["task"] or 0), job) if found else None
        return [
            self._record(item, record.of(_frame(item)), job_seconds=seconds, job_frames=frames, **facts)
            for item, facts in found
        ]

    def failed(self, job: int, items: Sequence[ManifestItem], *, frames: int) -> list[FrameEffort]:
        """Records of items that could not be measured; see `measure`."""
        try:
            record = self._store.load(job)
        except _PROBLEMS:
            record = JobRecord()
        return [
            self._record(
                item,
                record.of(_frame(item)),
                model=record.of(_frame(item)).drawn.model,
                unknown=FAILED,
                job_frames=frames,
            )
            for item in items
        ]

    def _record(self, item: ManifestItem, prelabel: FrameRecord, **facts: Any) -> FrameEffort:
        job = int(item.source["job"] or 0)
        return FrameEffort(
            server=self._server.url,
            project=_optional(item.source["project"]),
            task=int(item.source["task"] or 0),
            job=job,
            frame=_frame(item),
            name=item.name,
            group=item.group,
            mask_sha256=item.mask_sha256,
            fetched=str(self._manifest.jobs[f"{self._server.url}#{job}"]["updated"]),
            snapshot=self._snapshot,
            prelabel=_identity(prelabel),
            **facts,
        )

    def _measure_frame(
        self, item: ManifestItem, record: FrameRecord, present: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """What is measured of a frame; None if there is no mask, or no pre-label to compare it with."""
        mask = self._mask(item)
        if mask is None:
            return None
        labels = self._labels_of(int(item.source["task"] or 0))
        prelabel = self._prelabel(item, record, present, labels)
        if prelabel is None:
            return None
        if prelabel.unknown:
            return {"model": prelabel.model, "unknown": prelabel.unknown}
        names = {label.id: label.name for label in labels}
        before = {**names, **(prelabel.labels or {})}
        nothing = self._rule.fill
        # A frame in which all was deleted may be void all over, and yet somebody said that nothing is there.
        result = mask if any(raw["type"] in PAINTED for raw in present) else np.full_like(mask, nothing)
        pixels = count_pixels(self._paint(prelabel.shapes, before, item.size_hw), result)
        pixels = {pair: count for pair, count in pixels.items() if pair[1] != VOID or nothing == VOID}
        changes = count_shapes(prelabel.shapes, present, label_names={**before, **names}, size_hw=item.size_hw)
        ids = {nothing, *(number for pair in pixels for number in pair)}
        return {
            "model": prelabel.model,
            "nothing": nothing,
            "labels": {number: self._name_of(number) for number in sorted(ids)},
            "pixels": pixels,
            "kept": changes.kept,
            "changed": changes.changed,
            "deleted": changes.deleted,
            "added": changes.added,
        }

    def _paint(
        self, shapes: Sequence[Mapping[str, Any]], names: Mapping[int, str], size_hw: tuple[int, int]
    ) -> NDArray[np.uint8]:
        drawing = painting(shapes, label_names=names, size_hw=size_hw)
        return rasterise(
            drawing.shapes, size_hw=size_hw, label_id_of=self._rule.label_id_of, fill=self._rule.fill
        ).label_map

    def _name_of(self, label_id: int) -> str:
        label = self._manifest.schema.by_id(label_id)
        return label.name if label is not None else "not in the schema" if label_id == VOID else f"id {label_id}"

    def _mask(self, item: ManifestItem) -> NDArray[np.uint8] | None:
        """The fetched mask; None if it is not the one of the manifest."""
        path = self._dataset / MASKS / item.mask
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != item.mask_sha256:
            return None
        return read_label_map(path)

    def _labels_of(self, task: int) -> tuple[ProjectLabel, ...]:
        if task not in self._labels:
            self._labels[task] = self._book.of(self._server.task(task))
        return self._labels[task]

    # What was drawn

    def _prelabel(
        self,
        item: ManifestItem,
        record: FrameRecord,
        present: Sequence[Mapping[str, Any]],
        labels: Sequence[ProjectLabel],
    ) -> _Prelabel | None:
        drawn = _settled(record, [identity(shape) for shape in present])
        if drawn is None:
            return _Prelabel(model="", unknown=NOT_SETTLED)
        if drawn.model:
            kept = self._store.kept(int(item.source["job"] or 0), _frame(item), drawn)
            if kept is not None:
                return _Prelabel(model=drawn.model, shapes=kept.shapes, labels=kept.labels)
            return self._drawn_again(drawn.model, item, present, labels)
        titles = titles_of(present, labels)
        if len(titles) != 1:
            return _Prelabel(model="", unknown=SEVERAL_MODELS if titles else NO_MODEL)
        return self._drawn_again(titles.pop(), item, present, labels)

    def _drawn_again(
        self,
        title: str,
        item: ManifestItem,
        present: Sequence[Mapping[str, Any]],
        labels: Sequence[ProjectLabel],
    ) -> _Prelabel:
        detector = self._detector_of(title)
        if detector is None:
            return _Prelabel(model=title, unknown=NO_BUNDLE)
        image = decode_image((self._dataset / IMAGES / item.image).read_bytes())
        shapes = reconstruct(detector, image, present, labels=labels)
        if shapes is None:
            return _Prelabel(model=title, unknown=NOT_PROVEN)
        return _Prelabel(model=title, shapes=shapes)

    def _find(self, title: str) -> ModelBundle | None:
        if title not in self._bundles:
            try:
                self._bundles[title] = self._bundle_of(title)
            except _PROBLEMS as error:
                log.warning("%s is not looked up: %s", title, error)
                self._bundles[title] = None
        return self._bundles[title]

    def _detector_of(self, title: str) -> Detector | None:
        """The version as it draws; the last one is held."""
        if self._detector[0] != title:
            bundle = self._find(title)
            self._detector = title, None if bundle is None else Detector(bundle, device=self._device)
        return self._detector[1]

    # How long it took

    def _seconds_of(self, task: int, job: int) -> float | None:
        """How long people had a job open; None where CVAT does not say."""
        if self._has_log and task not in self._seconds:
            try:
                self._seconds[task] = working_seconds(self._server.event_log(task))
            except ServerError as error:
                # No analytics, or not for this user: it would be the same for every task.
                self._has_log = False
                log.info("How long people worked is not known: %s", error)
        return self._seconds.get(task, {}).get(job)


def _key(item: ManifestItem) -> tuple[str, int, int]:
    return str(item.source["server"]), int(item.source["task"] or 0), _frame(item)


def _frame(item: ManifestItem) -> int:
    return int(item.source["frame"] or 0)


def _optional(value: str | int | None) -> int | None:
    return None if value is None else int(value)


def _identity(record: FrameRecord) -> str:
    """Of the pre-label that the store knows of."""
    parts = [drawn.key for drawn in (record.drawn, record.next) if drawn is not None and drawn.model]
    return "+".join(parts)


def _settled(record: FrameRecord, present: Sequence[str]) -> Drawn | None:
    """What was drawn in a frame, also if a killed run left open whether it was replaced; None: it cannot be told."""
    if record.next is None:
        return record.drawn
    for drawn, other in ((record.next, record.drawn), (record.drawn, record.next)):
        if (set(drawn.shapes) - set(other.shapes)) & set(present):
            return drawn
    return None
