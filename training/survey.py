"""Which frames of a CVAT server count: those of finished annotation jobs, without deleted ones and replicas."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tqdm import tqdm

from sscloud.errors import ServerError
from training.cvat import Frame, Job, ProjectLabel, Server, Task

STAGES: Final = ("annotation", "validation", "acceptance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which frames count."""

    projects: tuple[int, ...] = ()
    tasks: tuple[int, ...] = ()
    states: frozenset[str] = frozenset({"completed"})
    stages: frozenset[str] = frozenset(STAGES)
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
    tasks = {task.id: task for project in selection.projects for task in _project_tasks(server, project)}
    for number in selection.tasks:
        tasks[number] = tasks.get(number) or server.task(number)
    wanted: dict[tuple[int, int], Wanted] = {}
    left_out: Counter[str] = Counter()
    doubles = not_images = 0
    labels: dict[int, tuple[ProjectLabel, ...]] = {}
    by_project: dict[int, tuple[ProjectLabel, ...]] = {}
    for task in tqdm([tasks[number] for number in sorted(tasks)], "Tasks", unit="task", disable=quiet or None):
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
        if task.project_id is None:
            labels[task.id] = tuple(server.labels(task_id=task.id))
        else:
            if task.project_id not in by_project:
                by_project[task.project_id] = tuple(server.labels(project_id=task.project_id))
            labels[task.id] = by_project[task.project_id]
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
        scope=frozenset(tasks),
        projects=frozenset(selection.projects),
        labels=labels,
        jobs_left_out=dict(left_out),
        doubles=doubles,
        not_images=not_images,
    )


def _project_tasks(server: Server, project: int) -> list[Task]:
    server.project(project)  # a project without tasks and one that does not exist both list nothing
    return server.tasks(project)


def _left_out(job: Job, selection: Selection) -> str | None:
    if job.type == "consensus_replica":
        return "consensus replica"  # its merged result is in the job that it replicates
    if job.type == "ground_truth" and selection.ground_truth == "skip":
        return "ground truth"
    if job.type not in ("annotation", "ground_truth"):
        return f"type {job.type}"
    if job.state not in selection.states:
        return f"state {job.state}"
    if job.stage not in selection.stages:
        return f"stage {job.stage}"
    return None
