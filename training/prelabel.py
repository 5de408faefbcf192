"""Model → tasks: a bundle run here draws in CVAT jobs what people then correct.

A frame is written as one change, and only where nobody has worked. What is about to be written is noted down before, so
a run that is killed at any moment and started again ends in the same shapes, each of them once.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.ahead import Ahead
from sscloud.errors import ImageError, SchemaError, ServerError, SSCloudError, UnreachableError
from sscloud.image import decode_image
from training.annotations import AUTO, is_auto
from training.cvat import TRANSIENT, Annotations, Frame, Job, ProjectLabel, Server, Task
from training.detector import Detector, region_points
from training.prelabel_store import (
    Drawn,
    FrameRecord,
    PrelabelStore,
    Verdict,
    holds,
    identity,
    is_sent,
    judge,
    surplus,
)
from training.project_labels import DRAWABLE, match_labels
from training.survey import LabelBook, find_tasks

log = logging.getLogger(__name__)

ATTEMPTS: Final = 4
"""How often a frame is written when no answer comes; before each time the server is asked what it holds."""
PAUSE: Final = 1.0
"""Seconds between a lost answer and the question; every further pause is twice as long."""


class UnfitError(SSCloudError):
    """A frame or a job that cannot be pre-labelled, while others can: caught here, it becomes a line of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which jobs are pre-labelled."""

    projects: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()
    states: frozenset[str] = frozenset({"new", "in progress"})
    """CVAT makes a new job one in progress as soon as somebody opens it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWork:
    """A job with what is needed to draw in it."""

    task: Task
    job: Job
    frames: tuple[int, ...]
    """Numbers, ascending; without deleted ones."""
    labels: tuple[ProjectLabel, ...]


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run has done."""

    model: str
    drawn: int = 0
    """Frames pre-labelled by this run."""
    shapes: int = 0
    """Written by this run."""
    already: int = 0
    """Frames that hold this model's pre-labels, drawn with the same settings, from an earlier run."""
    other_model: int = 0
    """Frames that hold pre-labels of another model, or drawn with other settings, and were not to be replaced."""
    people: int = 0
    """Frames with people's work."""
    strange: int = 0
    """Of them, frames whose shapes are all a model's as CVAT says, while the store knows nothing of them."""
    jobs_left_out: Counter[str] = field(default_factory=Counter)
    """Why → jobs."""
    unmet: Counter[str] = field(default_factory=Counter)
    """Label of the model that a task lacks → shapes that were not drawn; a server does not count them."""
    notes: list[str] = field(default_factory=list)
    """What people should know, a sentence each."""
    failed: list[str] = field(default_factory=list)
    """Frames and jobs that could not be pre-labelled, a sentence each."""


def select(server: Server, selection: Selection, report: Report, *, quiet: bool = False) -> list[JobWork]:
    """Ask the server for the jobs of a selection: annotation jobs in one of its states, by task and number.

    Args:
        server: logged in.
        selection: which jobs.
        report: told about those that are left out.
        quiet: no progress bar.

    Raises:
        ServerError: something that does not exist, or no answer.
    """
    named = [server.job(number) for number in selection.jobs]
    numbers = (*selection.tasks, *(job.task_id for job in named))
    tasks = find_tasks(server, projects=selection.projects, tasks=numbers)
    work = []
    book = LabelBook(server)
    for task in tqdm(tasks, "Tasks", unit="task", disable=quiet or None):
        whole = task.id in selection.tasks or task.project_id in selection.projects
        jobs = server.jobs(task.id) if whole else [job for job in named if job.task_id == task.id]
        wanted = []
        for job in jobs:
            if not task.images:
                report.jobs_left_out["a video, or point clouds"] += 1
            elif job.type != "annotation":
                report.jobs_left_out[f"type {job.type}"] += 1
            elif job.state not in selection.states:
                report.jobs_left_out[f"state {job.state}"] += 1
            else:
                wanted.append(job)
        if not wanted:
            continue
        labels = book.of(task)
        for job in sorted({job.id: job for job in wanted}.values(), key=lambda job: job.id):
            work.append(JobWork(task=task, job=job, frames=tuple(sorted(server.job_frames(job))), labels=labels))
    return work


def prelabel(
    server: Server,
    store: PrelabelStore,
    detector: Detector,
    *,
    selection: Selection,
    report: Report,
    threshold: float = 0.0,
    replace_auto: bool = False,
    quiet: bool = False,
) -> None:
    """Run a bundle here over the untouched frames of jobs.

    Args:
        server: logged in.
        store: entered; remembers what was drawn.
        detector: the bundle.
        selection: which jobs.
        report: filled while the run goes on, so that it is right whatever ends the run.
        threshold: pixels with a probability below it (0 to 1) are not drawn.
        replace_auto: put this model's shapes in place of those of another model, or drawn with other settings, where
            nobody has touched them.
        quiet: no progress bars.

    Raises:
        SchemaError: no label of the model is in any of the tasks.
        ServerError: the server cannot be reached any more, or something that was asked for does not exist.
        ConfigError: the store is damaged.
    """
    work = select(server, selection, report, quiet=quiet)
    names = [label.name for label in detector.labels]
    met = {item.job.id: match_labels(names, item.labels, schema=detector.manifest.labels) for item in work}
    work = refuse_strangers(work, met, names, report)
    with tqdm(total=sum(len(item.frames) for item in work), desc="Frames", unit="frame", disable=quiet or None) as bar:
        for item in work:
            desk = _Desk(server, store, detector, item, met[item.job.id], report, threshold=threshold)
            try:
                desk.draw_all(replace_auto=replace_auto, on_frame=bar.update)
            except (ServerError, UnfitError) as error:
                if is_gone(error):
                    raise
                report.failed.append(str(error))


def refuse_strangers(
    work: Sequence[JobWork], met: Mapping[int, Mapping[str, ProjectLabel]], names: Sequence[str], report: Report
) -> list[JobWork]:
    """Leave out jobs whose task has none of the model's labels.

    Args:
        work: the jobs.
        met: job → model's label → task's label.
        names: the model's labels.
        report: told about labels and jobs that do not meet.

    Raises:
        SchemaError: all of them are such.
    """
    for item in work:
        for name in names:
            if name not in met[item.job.id]:
                report.unmet[name] += 0  # named, even when nothing of it is found
    fitting = [item for item in work if met[item.job.id]]
    if work and not fitting:
        item = work[0]
        theirs = ", ".join(
            label.name if label.type in DRAWABLE else f"{label.name} (type {label.type})" for label in item.labels
        )
        where = f"--project {item.task.project_id}" if item.task.project_id is not None else "--project N"
        raise SchemaError(
            f"None of the model's labels ({', '.join(names) or 'it has none'}) is a label of task {item.task.id}, "
            f"which has {theirs or 'none'}: nothing would be drawn. Create them with `sscloud labels push {where}`, or "
            "add the task's names as aliases to the schema."
        )
    if len(fitting) < len(work):
        report.jobs_left_out["none of the model's labels in the task"] += len(work) - len(fitting)
    return fitting


def is_gone(error: SSCloudError) -> bool:
    """Whether the next job would fare no better: nobody answers, or the login is no longer good."""
    return isinstance(error, UnreachableError) or (isinstance(error, ServerError) and error.status == 401)


def shapes_by_frame(annotations: Annotations) -> dict[int, list[dict[str, Any]]]:
    """Frame → its shapes."""
    frames: dict[int, list[dict[str, Any]]] = {}
    for shape in annotations.shapes:
        frames.setdefault(shape["frame"], []).append(shape)
    return frames


def is_occupied(annotations: Annotations, frame: int) -> bool:
    """Whether a tag or a track is on a frame. A track is taken to go on to the end."""
    on_track = annotations.track_start is not None and frame >= annotations.track_start
    return on_track or frame in annotations.tag_frames or annotations.intervals > 0


def request_of(
    region_label: ProjectLabel, *, kind: str, points: list[float], frame: int, attributes: Mapping[str, str]
) -> dict[str, Any]:
    """A shape as it is sent: complete, so that the server has nothing to add and the identity is known before.

    Args:
        region_label: the task's label.
        kind: mask or polygon.
        points: see `region_points`.
        frame: number in the task.
        attributes: name → value; used where the label has text attributes of these names.
    """
    values = dict(region_label.defaults)
    for name, value in attributes.items():
        if name in region_label.text_attributes:
            values[region_label.attributes[name]] = value
    return {
        "type": kind,
        "frame": frame,
        "label_id": region_label.id,
        "points": points,
        "z_order": 0,
        "rotation": 0.0,
        "occluded": False,
        "outside": False,
        "group": 0,
        "source": AUTO,
        "attributes": [{"spec_id": number, "value": value} for number, value in sorted(values.items())],
    }


class _Desk:
    """One job while its frames are drawn."""

    def __init__(
        self,
        server: Server,
        store: PrelabelStore,
        detector: Detector,
        work: JobWork,
        met: Mapping[str, ProjectLabel],
        report: Report,
        *,
        threshold: float,
    ) -> None:
        self._server, self._store, self._detector = server, store, detector
        self._work, self._met, self._report = work, met, report
        self._threshold = threshold
        self._job = work.job.id
        self._record = store.load(self._job)
        self._updated: str | None = None
        self._annotations: Annotations | None = None
        self._last_number: int | None = None
        """Of the shapes that were created last."""
        self._images: Ahead[Frame, NDArray[np.uint8]] = Ahead(self._load)

    def draw_all(self, *, replace_auto: bool, on_frame: Callable[[], object]) -> None:
        """Go through the frames; what is wrong with one of them is reported, and the next one follows.

        Raises:
            UnfitError: of the whole job.
            ServerError: of the whole job, or the server is gone.
        """
        if self._record.run is not None:
            raise UnfitError(
                f"job {self._job}: the function {self._record.run.function} was started over it, and its end was not "
                "seen. Run `sscloud prelabel --via server` over this job once more."
            )
        frames = self._server.frames(self._work.task.id)
        try:
            for place, number in enumerate(self._work.frames):
                if number >= len(frames):
                    raise UnfitError(f"job {self._job} has a frame {number}, its task only {len(frames)}.")
                later = (frames[other] for other in self._work.frames[place + 1 :] if other < len(frames))
                try:
                    self._draw(frames[number], later, replace_auto=replace_auto)
                except (ImageError, ServerError, UnfitError) as error:
                    if is_gone(error):
                        raise
                    self._report.failed.append(
                        f"task {self._work.task.id}, frame {number} ({frames[number].name}): {error}"
                    )
                on_frame()
            self._store.tidy(self._job, self._record)
        finally:
            with self._server.stopping():
                self._images.close()

    def _draw(self, frame: Frame, later: Iterable[Frame], *, replace_auto: bool) -> None:
        report, title = self._report, self._detector.manifest.title
        settings = self._detector.settings(threshold=self._threshold)
        self._settle(frame.number)
        verdict = self._verdict(frame.number)
        drawn = self._record.of(frame.number).drawn
        if verdict == "ours" and self._is_current(drawn):
            report.already += 1
            return
        if verdict == "ours" and not replace_auto:
            report.other_model += 1
            return
        if verdict != "people":
            likely = (other for other in later if self._is_likely(other.number, replace_auto=replace_auto))
            shapes = self._detect(frame, following=next(likely, None))
            verdict = self._verdict(frame.number)  # somebody may have begun meanwhile
        if verdict == "people":
            report.people += 1
            shapes = self._present(frame.number)
            report.strange += not drawn.shapes and bool(shapes) and all(map(is_auto, shapes))
            return
        target = Drawn(model=title, settings=settings, shapes=tuple(sorted(identity(shape) for shape in shapes)))
        names = {label.id: label.name for label in self._met.values()}
        self._store.keep(self._job, frame.number, target, shapes, labels=names)
        self._note(frame.number, FrameRecord(drawn=drawn, next=target))
        self._write(frame.number, shapes, target)
        if not self._settle(frame.number):
            report.people += 1
            return
        report.drawn += 1
        report.shapes += len(shapes)

    def _is_current(self, drawn: Drawn) -> bool:
        settings = self._detector.settings(threshold=self._threshold)
        return (drawn.model, drawn.settings) == (self._detector.manifest.title, settings)

    def _is_likely(self, number: int, *, replace_auto: bool) -> bool:
        """Whether a frame will be drawn, by what is known without asking the server once more."""
        record = self._record.of(number)
        if self._annotations is None or record.next is not None or is_occupied(self._annotations, number):
            return False
        present = (identity(shape) for shape in self._annotations.shapes if shape["frame"] == number)
        verdict = judge(record.drawn, present)
        return verdict == "empty" or (verdict == "ours" and replace_auto and not self._is_current(record.drawn))

    def _load(self, frame: Frame) -> NDArray[np.uint8]:
        return decode_image(self._server.image(self._work.task.id, frame.number))

    def _detect(self, frame: Frame, *, following: Frame | None) -> list[dict[str, Any]]:
        """The shapes to send for a frame; meanwhile the image of the following one comes."""
        image = self._images.take(frame, following=following)
        if image.shape[:2] != frame.size_hw:
            raise ImageError(
                f"the file has {image.shape[1]}x{image.shape[0]} pixels, CVAT says {frame.size_hw[1]}x"
                f"{frame.size_hw[0]}. Upload the image again."
            )
        names = {label.id: label.name for label in self._detector.labels}
        shapes = []
        for region in self._detector.regions(image, threshold=self._threshold):
            name = names[region.label_id]
            label = self._met.get(name)
            if label is None:
                self._report.unmet[name] += 1
                continue
            kind = "polygon" if label.type == "polygon" else "mask"
            points = region_points(region, kind=kind)
            attributes = self._detector.attributes(region)
            shapes.append(request_of(label, kind=kind, points=points, frame=frame.number, attributes=attributes))
        return shapes

    def _write(self, number: int, shapes: Sequence[Mapping[str, Any]], target: Drawn) -> None:
        """Create shapes that `target` describes; they are there when this returns.

        Raises:
            UnfitError: the server has made something else of them.
            ServerError: they are not there, or nobody knows.
        """
        before = self._record.of(number).drawn
        for attempt in range(ATTEMPTS):
            lost: ServerError | None = None
            if shapes:
                try:
                    created = self._server.create_shapes(self._job, shapes)
                except ServerError as error:
                    if error.status is not None and error.status not in TRANSIENT:
                        self._note(number, FrameRecord(drawn=before))
                        raise
                    lost = error
                    log.info("%s; looking whether the shapes have come", error)
                    time.sleep(PAUSE * 2**attempt)
                    self._annotations = None
                else:
                    self._take_over(created, target)
            present = [identity(shape) for shape in self._present(number)]
            if holds(present, target):
                return
            if lost is None or judge(before, present) == "people":
                self._note(number, FrameRecord(drawn=before))
                raise UnfitError(
                    f"{len(shapes)} shapes were sent, and the server now holds others. Look at the frame in CVAT: it "
                    "counts as people's work from now on."
                )
        raise lost or ServerError("no answer")

    def _take_over(self, created: Sequence[dict[str, Any]], target: Drawn) -> None:
        """Put new shapes beside those that are known, if nothing else can have come to the job meanwhile.

        A large job cannot be read again after every frame. But its time of change has just moved by this very write,
        and hides what somebody else did in the moment before. The numbers of shapes tell: the server counts them on
        for all jobs together, so numbers that follow the last ones leave no room for anybody's.
        """
        numbers = sorted(shape["id"] for shape in created)
        first, self._last_number = self._last_number, numbers[-1] if numbers else None
        follow = first is not None and numbers == list(range(first + 1, first + 1 + len(numbers)))
        as_sent = tuple(sorted(identity(shape) for shape in created)) == target.shapes
        if self._annotations is None or not follow or not as_sent:
            self._annotations = None
            return
        self._updated = self._server.job(self._job).updated
        self._annotations = replace(self._annotations, shapes=(*self._annotations.shapes, *created))

    def _settle(self, number: int) -> bool:
        """Bring a frame that was being written to an end: either it was written (True), or it was not."""
        record = self._record.of(number)
        for attempt in range(ATTEMPTS):
            if record.next is None:
                return False
            raws = self._present(number)
            present = [(int(raw["id"]), identity(raw)) for raw in raws]
            if surplus(record, present):
                # What is going to be deleted is looked at once more: it may be somebody's by now.
                raws = self._present(number, anew=True)
                present = [(int(raw["id"]), identity(raw)) for raw in raws]
            shapes = [shape for _, shape in present]
            # That nothing is there, where nothing was found, says nothing: then what was there has to be untouched.
            written = holds(shapes, record.next) if record.next.shapes else self._is_ours(record.drawn, shapes)
            if not written:
                # What was sent, and changed by a person before this was seen, is what the person has corrected.
                drawn = record.next if is_sent(record, shapes) else record.drawn
                self._note(number, FrameRecord(drawn=drawn))
                return False
            left = set(surplus(record, present))
            if not left:
                self._note(number, FrameRecord(drawn=record.next))
                return True
            try:
                self._server.delete_shapes(self._job, [raw for raw in raws if raw["id"] in left])
            except ServerError as error:
                if attempt == ATTEMPTS - 1 or (error.status is not None and error.status not in TRANSIENT):
                    raise
                time.sleep(PAUSE * 2**attempt)
            self._annotations = None
        raise UnfitError("the former pre-labels could not be deleted. Run the same command once more.")

    @staticmethod
    def _is_ours(drawn: Drawn, shapes: Sequence[str]) -> bool:
        # After a deletion whose answer was lost nothing is there.
        return not shapes or judge(drawn, shapes) == "ours"

    def _verdict(self, number: int) -> Verdict:
        present = self._present(number)
        if self._annotations is not None and is_occupied(self._annotations, number):
            return "people"
        return judge(self._record.of(number).drawn, (identity(shape) for shape in present))

    def _present(self, number: int, *, anew: bool = False) -> list[dict[str, Any]]:
        """The frame's shapes as the server holds them now; the job is read again only when it has changed."""
        updated = self._server.job(self._job).updated
        if anew or self._annotations is None or updated != self._updated:
            self._annotations = self._server.annotations(self._job)
            self._updated = updated
        return [shape for shape in self._annotations.shapes if shape["frame"] == number]

    def _note(self, number: int, record: FrameRecord) -> None:
        self._record = self._record.put(number, record)
        self._store.save(self._job, self._record)
