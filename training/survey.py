"""Which frames of a CVAT server count: those of finished annotation jobs, without deleted ones and replicas."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from sscloud.errors import ServerError
from training.cvat import Frame, Job, ProjectLabel, Server, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which frames count."""

    projects: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()
    states: frozenset[str] = frozenset({"completed"})
    stages: frozenset[str] | None = None
    """None: any."""
    ground_truth: Literal["skip", "test"] = "skip"
    """Leave the frames of ground-truth jobs to the other jobs, or take them, with the shapes drawn there, as test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A frame that belongs into the dataset."""

    task: Task
    job: Job
    frame: Frame
    pinned: bool
    """From a ground-truth job: test for ever."""

    @property
    def key(self) -> tuple[int, int]:
        """What it is on the server."""
        return (self.task.id, self.frame.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the server holds of a selection."""

    server: str
    wanted: tuple[Wanted, ...]
    """By task and number."""
    scope: frozenset[int]
    """Numbers of all tasks that were looked at."""
    projects: frozenset[int]
    """Numbers of the projects that were looked at as a whole."""
    labels: Mapping[int, tuple[ProjectLabel, ...]]
    """Task → its labels."""
    jobs_left_out: Mapping[str, int]
    """Why → jobs."""
    doubles: int
    """Frames in several jobs; the first one's shapes are taken."""
    not_images: int
    """Tasks left out, because they are videos or point clouds."""


def survey(server: Server, selection: Selection, *, quiet: bool = False) -> Survey:
    """Ask what the server holds of a selection: a few small requests a task.

    Raises:
        ServerError: a project or task that does not exist, or no answer.
    """
    tasks = find_tasks(server, projects=selection.projects, tasks=selection.tasks)
    wanted: dict[tuple[int, int], Wanted] = {}
    left_out: Counter[str] = Counter()
    doubles = not_images = 0
    labels: dict[int, tuple[ProjectLabel, ...]] = {}
    book = LabelBook(server)
    for task in tqdm(tasks, "Tasks", unit="task", disable=quiet or None):
        if not task.images:
            not_images += 1
            continue
        jobs = []
        for job in server.jobs(task.id):
            reason = _left_out(job, selection)
            if reason:
                left_out[reason] += 1
            else:
                jobs.append(job)
        if not jobs:
            continue
        labels[task.id] = book.of(task)
        frames = server.frames(task.id)
        # Ground truth first: its frames are taken with the shapes drawn there.
        for job in sorted(jobs, key=lambda job: (job.type != "ground_truth", job.id)):
            for number in sorted(server.job_frames(job)):
                if number >= len(frames):
                    raise ServerError(f"job {job.id} has a frame {number}, its task {task.id} only {len(frames)}.")
                new = Wanted(task=task, job=job, frame=frames[number], pinned=job.type == "ground_truth")
                first = wanted.setdefault(new.key, new)
                doubles += first is not new and not first.pinned
    return Survey(
        server=server.url,
        wanted=tuple(wanted[key] for key in sorted(wanted)),
        scope=frozenset(task.id for task in tasks),
        projects=frozenset(selection.projects),
        labels=labels,
        jobs_left_out=dict(left_out),
        doubles=doubles,
        not_images=not_images,
    )


def find_tasks(server: Server, *, projects: Iterable[int], tasks: Iterable[int]) -> list[Task]:
    """All tasks of some projects, and others by their numbers, each once, by number.

    Raises:
        ServerError: a project or task that does not exist, or no answer.
    """
    found: dict[int, Task] = {}
    for project in projects:
        server.project(project)  # a project without tasks and one that does not exist both list nothing
        found.update({task.id: task for task in server.tasks(project)})
    for number in tasks:
        found[number] = found.get(number) or server.task(number)
    return [found[number] for number in sorted(found)]


class LabelBook:
    """The labels of tasks; a project's are asked for once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._of_project: dict[int, tuple[ProjectLabel, ...]] = {}

    def of(self, task: Task) -> tuple[ProjectLabel, ...]:
        """The labels that can be drawn in a task."""
        if task.project_id is None:
            return tuple(self._server.labels(task_id=task.id))
        if task.project_id not in self._of_project:
            self._of_project[task.project_id] = tuple(self._server.labels(project_id=task.project_id))
        return self._of_project[task.project_id]


def _left_out(job: Job, selection: Selection) -> str | None:
    if job.type == "consensus_replica":
        return "consensus replica"  # its merged result is in the job that it replicates
    if job.type == "ground_truth" and selection.ground_truth == "skip":
        return "ground truth"
    if job.type not in ("annotation", "ground_truth"):
        return f"type {job.type}"
    if job.state not in selection.states:
        return f"state {job.state}"
    if selection.stages is not None and job.stage not in selection.stages:
        return f"stage {job.stage}"
    return None
