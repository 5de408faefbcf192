"""Chosen panoramas → work for people in CVAT: a new task of them, or the jobs that they are in.

Everything is looked up on the server by the name of the hand-out before it is made. So a hand-out that is killed at any
moment and started again, by its name, makes nothing twice and ends in the same state; what others do meanwhile does not
make it larger. Annotations are never touched.

A new task holds copies: the very files of the chosen frames. `fetch` takes the copy when its job is completed, and the
original when that one's is: both into the same split, because a picture that was seen before keeps its split. The marks
keep originals of copies from being chosen again, so that nobody is asked to label both.
"""

import hashlib
import logging
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeVar

from sscloud.errors import ConfigError, ServerError
from training.acquisition import Choice
from training.cvat import TRANSIENT, Frame, Job, Server, Task
from training.names import dataset_names
from training.pool import Mark, find_marks, mark_text

log = logging.getLogger(__name__)

Way = Literal["auto", "task", "jobs"]

ATTEMPTS: Final = 4
"""How often something is made whose answer is lost; before each time the server is asked what it holds."""
PAUSE: Final = 1.0
"""Seconds between a lost answer and the question; every further pause is twice as long."""
MAX_NAME: Final = 200

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handout:
    """What people got."""

    name: str
    way: Literal["task", "jobs"]
    task: int | None
    """The new task."""
    jobs: tuple[int, ...]
    """The jobs with the chosen frames, ascending."""
    notes: tuple[str, ...] = ()
    """What people should know, a sentence each."""


def hand_out(
    server: Server,
    choices: Sequence[Choice],
    *,
    project: int,
    assignee: str | None,
    way: Way,
    name: str,
) -> Handout:
    """Give chosen panoramas to people.

    Args:
        server: logged in.
        choices: what was chosen, the most instructive first.
        project: number of the project.
        assignee: name of the user who gets the jobs; jobs that somebody has already stay theirs. None: nobody.
        way: `jobs` assigns the jobs that the frames are in, each of which has to be alone in its job; `task` makes a
            new task with copies; `auto`: jobs where all frames are alone in theirs.
        name: of the hand-out and of the new task; the same name goes on with what was begun.

    Raises:
        ConfigError: the frames are not alone in their jobs, there is nothing to hand out, or the name cannot be used.
        ServerError: no such project or user, refused, or no answer.
    """
    if not name.strip() or len(name) > MAX_NAME or any(c in "[];" or not c.isprintable() for c in name):
        raise ConfigError(
            f"The hand-out's name must be a line of at most {MAX_NAME} letters without [ ] ;, found {name!r:.80}."
        )
    if not choices:
        raise ConfigError("There is nothing to hand out: no panorama was chosen.")
    user = None if assignee is None else server.find_user(assignee)
    tasks = server.tasks(project)
    begun = next((task for task in tasks if task.name == name), None)
    marks = [mark for mark in find_marks(server, tasks) if mark.name == name]
    if begun is None and not marks:
        fitting = all(choice.frame.alone for choice in choices)
        if way == "jobs" and not fitting:
            shared = next(choice for choice in choices if not choice.frame.alone)
            raise ConfigError(
                f"{shared.frame.title} is not alone in a job of its own, so its job cannot be handed out for it. "
                "Choose --way task, which makes a task of copies."
            )
        way = way if way != "auto" else "jobs" if fitting else "task"
    else:
        way = "jobs" if begun is None else "task"
    if way == "task":
        return _as_task(server, choices, begun, project=project, name=name, assignee=assignee, user=user)
    return _as_jobs(server, choices, marks, name=name, assignee=assignee, user=user)


def _as_jobs(
    server: Server,
    choices: Sequence[Choice],
    marks: Sequence[Mark],
    *,
    name: str,
    assignee: str | None,
    user: int | None,
) -> Handout:
    """Assign and mark the jobs that the frames are in."""
    done = {(mark.task, mark.frame): mark.job for mark in marks}
    notes: list[str] = []
    for choice in choices:
        frame = choice.frame
        if frame.task is None or frame.job is None or frame.number is None:
            raise ConfigError(f"{frame.title} is in no job of the server. Choose --way task.")
        if (frame.task, frame.number) in done:
            continue
        if len(done) >= len(choices):
            break
        _mark(server, frame.task, frame.job, frame.number, choice, name=name)
        done[frame.task, frame.number] = frame.job
    for job in sorted(set(done.values())):
        _assign(server, server.job(job), assignee=assignee, user=user, notes=notes)
    return Handout(name=name, way="jobs", task=None, jobs=tuple(sorted(set(done.values()))), notes=tuple(notes))


def _as_task(
    server: Server,
    choices: Sequence[Choice],
    task: Task | None,
    *,
    project: int,
    name: str,
    assignee: str | None,
    user: int | None,
) -> Handout:
    """Make a task of the frames' files, a job a frame."""
    task = _filled_task(server, choices, task, project=project, name=name)
    jobs = [job for job in server.jobs(task.id) if job.type == "annotation"]
    frames = server.frames(task.id)
    choice_of = dict(zip(_names(choices), choices, strict=True))
    marked = {mark.frame for mark in find_marks(server, [task]) if mark.name == name}
    notes: list[str] = []
    for job in jobs:
        for number in range(job.start, job.stop + 1):
            if number not in marked:
                choice = choice_of.get(frames[number].name)
                _mark(server, task.id, job.id, number, choice, name=name, frame=frames[number])
        _assign(server, job, assignee=assignee, user=user, notes=notes)
    numbers = tuple(sorted(job.id for job in jobs))
    return Handout(name=name, way="task", task=task.id, jobs=numbers, notes=tuple(notes))


def _filled_task(server: Server, choices: Sequence[Choice], task: Task | None, *, project: int, name: str) -> Task:
    """The task of this name, with its frames."""
    if task is not None and not task.size:
        # Either it is being made, or an upload was broken off. What was sent then is not to be joined with what comes.
        try:
            server.wait_for_data(task.id)
        except ServerError as error:
            log.info("%s; the task is made anew", error)
        task = server.task(task.id)
        if not task.size and not server.jobs(task.id):
            server.delete_task(task.id)
            task = None
    if task is not None:
        return task

    def find() -> Task | None:
        return next((found for found in server.tasks(project) if found.name == name), None)

    task = _make(lambda: server.create_task(name, project_id=project, segment_size=1), find)
    with tempfile.TemporaryDirectory() as folder:
        server.upload(task.id, _files(choices, Path(folder)))
    return server.task(task.id)


def _files(choices: Sequence[Choice], folder: Path) -> list[Path]:
    """The original files under their names; in an archive where names have folders, which CVAT keeps only so.

    Raises:
        ServerError: a file is not the one that was looked at any more.
    """
    names = _names(choices)
    files = []
    for name, choice in zip(names, choices, strict=True):
        data = choice.frame.read()
        if hashlib.sha256(data).hexdigest() != choice.sha256:
            raise ServerError(f"{choice.frame.title} has changed since it was chosen. Choose again.")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        files.append(path)
    if not any("/" in name for name in names):
        return files
    archive = folder / "panoramas.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for name, path in zip(names, files, strict=True):
            packed.write(path, name)
    return [archive]


def _names(choices: Sequence[Choice]) -> list[str]:
    """Names of the copies: the frames' own, made safe, and numbered where several tasks have the same one."""
    folders: dict[str, list[int]] = {}
    for place, choice in enumerate(choices):
        parts = [part for part in PurePosixPath(choice.frame.name.replace("\\", "/")).parts[:-1] if part.strip("./ ")]
        folders.setdefault("".join(f"{part}/" for part in parts), []).append(place)
    names = [""] * len(choices)
    for folder, places in folders.items():
        safe = dataset_names([choices[place].frame.name for place in places])
        for place, own in zip(places, safe, strict=True):
            names[place] = folder + own
    return names


def _mark(
    server: Server,
    task: int,
    job: int,
    number: int,
    choice: Choice | None,
    *,
    name: str,
    frame: Frame | None = None,
) -> None:
    """Pin the explanation and the mark to a frame."""
    if choice is None:
        # The task was made by an earlier start, which had chosen others: it stays as it was handed out.
        sha256 = hashlib.sha256(server.image(task, number)).hexdigest()
        reason, (left, top, right, bottom) = "Chosen to be labelled.", (0.0, 0.0, 32.0, 32.0)
    else:
        sha256, reason, (left, top, right, bottom) = choice.sha256, choice.reason, choice.focus_xyxy
    outline = (left, top, right, top, right, bottom, left, bottom)
    text = f"{reason}\n{mark_text(name, sha256)}"

    def find() -> Mark | None:
        marks = find_marks(server, [server.task(task)])
        return next((mark for mark in marks if mark.name == name and mark.frame == number), None)

    def make() -> Mark:
        server.create_issue(job, frame=number, position=outline, text=text)
        return Mark(name=name, sha256=sha256, task=task, job=job, frame=number)

    _make(make, find)


def _assign(server: Server, job: Job, *, assignee: str | None, user: int | None, notes: list[str]) -> None:
    """Give a job to a user, unless somebody has it."""
    if user is None or assignee is None or job.assignee == assignee:
        return
    if job.assignee is not None:
        notes.append(f"Job {job.id} stays with {job.assignee}, who has it already.")
        return
    for attempt in range(ATTEMPTS):
        try:
            server.assign(job.id, user)
        except ServerError as error:
            if attempt == ATTEMPTS - 1 or not _is_lost(error):
                raise
            time.sleep(PAUSE * 2**attempt)
        else:
            return


def _make(make: Callable[[], Found], find: Callable[[], Found | None]) -> Found:
    """Make something that is not there yet, once, though answers may be lost."""
    for attempt in range(ATTEMPTS):
        try:
            return make()
        except ServerError as error:
            if attempt == ATTEMPTS - 1 or not _is_lost(error):
                raise
            log.info("%s; looking whether it is there", error)
            time.sleep(PAUSE * 2**attempt)
            found = find()
            if found is not None:
                return found
    raise AssertionError("unreachable")


def _is_lost(error: ServerError) -> bool:
    return error.status is None or error.status in TRANSIENT
