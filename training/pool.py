"""The panoramas that could be labelled next: frames of a CVAT project without people's work, or files of a folder.

A frame that was handed out carries an issue with a mark, `[sscloud select: NAME; image SHA256]`. So the server itself
remembers what was handed out, whichever workspace asks: such a frame is not chosen again while its job is open, nor is
another copy of the same file, wherever it lies in the project, open or finished.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from training.acquisition import PoolFrame
from training.annotations import is_auto
from training.cvat import Annotations, Frame, Job, Server, Task
from training.manifest import Manifest
from training.prelabel import is_occupied, shapes_by_frame
from training.prelabel_store import FrameRecord, JobRecord, PrelabelStore, holds, identity, judge

OPEN: Final = frozenset({"new", "in progress"})
"""States of jobs whose frames can be chosen."""

_MARK = re.compile(r"\[sscloud select: (?P<name>[^][\n]{1,200}); image (?P<sha256>[0-9a-f]{64})\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a frame that was handed out carries."""

    name: str
    """Of the hand-out."""
    sha256: str
    """Of the image."""
    task: int
    job: int
    frame: int


def mark_text(name: str, sha256: str) -> str:
    """The mark of an image in a hand-out; `find_marks` reads it."""
    return f"[sscloud select: {name}; image {sha256}]"


def find_marks(server: Server, tasks: Iterable[Task]) -> list[Mark]:
    """What was handed out in tasks, this time and before.

    Raises:
        ServerError: no answer.
    """
    return [
        Mark(name=found["name"], sha256=found["sha256"], task=task.id, job=remark.job, frame=remark.frame)
        for task in tasks
        if task.size
        for remark in server.remarks(task.id)
        for found in _MARK.finditer(remark.text)
    ]


def server_pool(
    server: Server,
    store: PrelabelStore,
    *,
    project: int,
    labelled: Collection[str] = (),
    marks: Sequence[Mark] | None = None,
    left_out: Counter[str] | None = None,
    quiet: bool = True,
) -> list[PoolFrame]:
    """The frames of a project's open annotation jobs in which nobody has drawn, and that were not handed out.

    Pre-labels that are exactly as this program drew them are nobody's work. Shapes that are a model's as CVAT says, but
    that the store does not know, may have been corrected: such frames are left out.

    Args:
        server: logged in.
        store: what this program drew.
        project: number of the project.
        labelled: sha256 of images that are labelled already, in a data set perhaps.
        marks: of the project, where they were looked up already.
        left_out: told why frames are not in the pool: reason → frames.
        quiet: no progress bar.

    Returns:
        By task and number, each frame once.

    Raises:
        ServerError: there is no such project, or no answer.
        ConfigError: the store is damaged.
    """
    left_out = Counter() if left_out is None else left_out
    server.project(project)
    tasks = server.tasks(project)
    marks = find_marks(server, tasks) if marks is None else marks
    taken = frozenset(labelled) | {mark.sha256 for mark in marks}
    given = {(mark.task, mark.frame) for mark in marks}
    pool = []
    for task in tqdm(tasks, "Tasks", unit="task", disable=quiet or None):
        if not task.images:
            left_out["of videos and point clouds"] += task.size
        elif task.size:
            here = {frame for number, frame in given if number == task.id}
            pool += _of_task(server, store, task, given=here, taken=taken, left_out=left_out)
    return pool


def _of_task(
    server: Server,
    store: PrelabelStore,
    task: Task,
    *,
    given: Collection[int],
    taken: frozenset[str],
    left_out: Counter[str],
) -> list[PoolFrame]:
    """The frames of one task."""
    numbers = {job: sorted(server.job_frames(job)) for job in server.jobs(task.id) if job.type != "consensus_replica"}
    opened = [job for job in numbers if job.type == "annotation" and job.state in OPEN]
    why: dict[int, str] = {}
    for job in numbers:
        if job not in opened:
            state = "of ground-truth jobs" if job.type == "ground_truth" else f"of jobs that are {job.state}"
            why.update(dict.fromkeys(numbers[job], state))
    if not opened:
        left_out.update(why.values())
        return []
    place: dict[int, Job] = {}
    for job in opened:
        annotations, record = server.annotations(job.id), store.load(job.id)
        shapes = shapes_by_frame(annotations)
        for number in numbers[job]:
            place.setdefault(number, job)
            here = shapes.get(number, [])
            reason = _occupied(annotations, record, number, [identity(shape) for shape in here])
            if (
                reason == "with people's work"
                and here
                and all(map(is_auto, here))
                and not record.of(number).drawn.shapes
            ):
                reason = "with a model's shapes that the store of pre-labels does not know"
            if reason is None and number in given:
                reason = "handed out before"
            if reason is not None:
                why.setdefault(number, reason)
    left_out.update(why.values())
    frames = server.frames(task.id)
    return [
        _pool_frame(server, task, place[number], frames[number], alone=len(numbers[place[number]]) == 1, taken=taken)
        for number in sorted(place)
        if number not in why and number < len(frames)
    ]


def _pool_frame(server: Server, task: Task, job: Job, frame: Frame, *, alone: bool, taken: frozenset[str]) -> PoolFrame:
    return PoolFrame(
        name=frame.name,
        read=partial(server.image, task.id, frame.number),
        task=task.id,
        job=job.id,
        number=frame.number,
        alone=alone,
        taken=taken,
    )


def _occupied(annotations: Annotations, record: JobRecord, number: int, present: Sequence[str]) -> str | None:
    """Why a frame cannot be chosen, by what is drawn there; None if it can."""
    if record.run is not None:
        return "of jobs that a function may be at work in"
    if is_occupied(annotations, number):
        return "with people's work"
    if _is_nobodys(record.of(number), present):
        return None
    return "with people's work"


def _is_nobodys(record: FrameRecord, present: Sequence[str]) -> bool:
    """Whether nothing is drawn, or what this program drew, or was about to draw when it was stopped."""
    if record.next is None:
        return judge(record.drawn, present) != "people"
    both = [*record.drawn.shapes, *record.next.shapes]
    return set(present) <= set(both) and (holds(present, record.drawn) or holds(present, record.next) or not present)


def folder_pool(images: Iterable[Path], *, taken: Collection[str] = ()) -> list[PoolFrame]:
    """Files of this machine, by name.

    Args:
        images: the files.
        taken: sha256 of images that were labelled or handed out already.
    """
    known = frozenset(taken)
    return [PoolFrame(name=path.name, read=path.read_bytes, path=path, taken=known) for path in sorted(images)]


def known_frames(
    server: Server,
    marks: Iterable[Mark],
    manifest: Manifest | None,
    images: Path,
    *,
    most: int,
    tasks: Collection[int] = (),
    seed: int = 0,
) -> list[PoolFrame]:
    """What the next choices should differ from: what was handed out, then what is labelled, without the test's.

    Every one has to be looked at, so of many there is a sample: what was handed out last, then panoramas of the tasks
    that the pool is in, which may show the same places, then others.

    Args:
        server: logged in.
        marks: of the project.
        manifest: of the data set; None: there is none.
        images: the data set's folder of images.
        most: how many at most.
        tasks: that the pool is in.
        seed: of the sample.
    """
    items = [item for item in manifest.items if item.split != "test"] if manifest is not None else []
    in_set = {item.image_sha256 for item in manifest.items} if manifest is not None else set()
    waiting = {mark.sha256: mark for mark in marks if mark.sha256 not in in_set}
    newest = sorted(waiting.values(), key=lambda mark: (mark.task, mark.job, mark.frame), reverse=True)
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    near = sorted(order, key=lambda place: items[place].source.get("task") not in tasks)
    handed = [
        PoolFrame(
            name=f"handed out, job {mark.job}",
            read=partial(server.image, mark.task, mark.frame),
            task=mark.task,
            job=mark.job,
            number=mark.frame,
        )
        for mark in newest[:most]
    ]
    labelled = folder_pool(images / items[place].image for place in near[: most - len(handed)])
    return handed + labelled


def labelled_images(manifest: Manifest) -> tuple[dict[int, float], frozenset[str]]:
    """What a data set has labels of: label id → share of the pixels without the test's, and sha256 of the images."""
    counts: Counter[int] = Counter()
    for item in manifest.items:
        if item.split != "test":
            counts.update(item.pixels)
    total = max(counts.total(), 1)
    shares = {label_id: count / total for label_id, count in counts.items()}
    return shares, frozenset(item.image_sha256 for item in manifest.items)
