"""What the stand-in remembers: projects, labels, tasks, frames, jobs, annotations."""

import copy
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

Json = dict[str, Any]

SHAPE_TYPES = ("rectangle", "polygon", "polyline", "points", "ellipse", "cuboid", "mask", "skeleton")
LABEL_TYPES = ("any", "cuboid", "ellipse", "mask", "points", "polygon", "polyline", "rectangle", "skeleton", "tag")
_COLORS = ("#fa3253", "#24b353", "#2080c0", "#ffcc33", "#8c78f0", "#33ddff", "#ff6a4d", "#aaf0d1")


class RefusedError(Exception):
    """A request that CVAT answers with an error."""

    def __init__(self, status: int, content: Any) -> None:
        super().__init__(status, content)
        self.status = status
        self.content = content


def not_found(kind: str) -> RefusedError:
    """CVAT's 404."""
    return RefusedError(404, {"detail": f"No {kind} matches the given query."})


@dataclass(slots=True, kw_only=True)
class Attribute:
    """An attribute of a label."""

    id: int
    name: str
    mutable: bool
    input_type: str
    default_value: str
    values: list[str]


@dataclass(slots=True, kw_only=True)
class Label:
    """A label of a project, or of a task without one."""

    id: int
    name: str
    color: str
    type: str
    attributes: list[Attribute]
    project_id: int | None
    task_id: int | None


@dataclass(slots=True, kw_only=True)
class Project:
    """A project."""

    id: int
    name: str
    created: datetime
    updated: datetime
    organization: int | None
    bug_tracker: str = ""


@dataclass(slots=True, kw_only=True)
class Frame:
    """An image of a task."""

    name: str
    data: bytes
    width: int
    height: int


@dataclass(slots=True, kw_only=True)
class Upload:
    """A file on its way in."""

    name: str
    length: int
    data: bytearray = field(default_factory=bytearray)


@dataclass(slots=True, kw_only=True)
class Task:
    """A task; without data until the upload is finished."""

    id: int
    name: str
    project_id: int | None
    segment_size: int
    created: datetime
    updated: datetime
    organization: int | None
    subset: str = ""
    replicas: int = 0
    mode: str = "annotation"
    """`interpolation` for a video."""
    bug_tracker: str = ""
    frames: list[Frame] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    chunk_size: int | None = None
    image_quality: int = 70
    chunks_updated: datetime | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Files of the current upload by name."""
    uploads: dict[str, Upload] = field(default_factory=dict)
    """TUS uploads by id."""


@dataclass(slots=True, kw_only=True)
class Job:
    """A job with what is drawn in it."""

    id: int
    task_id: int
    start: int
    stop: int
    type: str
    created: datetime
    updated: datetime
    state: str = "new"
    stage: str = "annotation"
    status: str = "annotation"
    included: list[int] | None = None
    """The frames of a ground truth job; others have all from start to stop."""
    disabled: set[int] = field(default_factory=set)
    """Frames that were taken out of the ground truth."""
    parent_id: int | None = None
    shapes: list[Json] = field(default_factory=list)
    tags: list[Json] = field(default_factory=list)
    tracks: list[Json] = field(default_factory=list)
    assignee: int | None = None
    """Number of a user."""

    @property
    def frames(self) -> Sequence[int]:
        """Frame numbers, as the task counts them."""
        return range(self.start, self.stop + 1) if self.included is None else self.included


@dataclass(slots=True, kw_only=True)
class Issue:
    """An issue that is pinned to a frame."""

    id: int
    job_id: int
    frame: int
    position: list[float]
    comments: list[tuple[int, str, datetime]]
    """Number, text, time."""
    created: datetime
    resolved: bool = False


@dataclass(slots=True, kw_only=True)
class Webhook:
    """An address that is told of events."""

    id: int
    target_url: str
    type: str
    project_id: int | None
    organization: int | None
    events: list[str]
    secret: str
    is_active: bool
    enable_ssl: bool
    description: str
    created: datetime
    updated: datetime


@dataclass(slots=True, kw_only=True)
class Background:
    """A background request: import of data, export of a dataset."""

    id: str
    action: str
    target: str
    subresource: str | None
    ids: Json
    created: datetime
    polls: int
    """Polls until it is finished."""
    format: str | None = None
    error: str | None = None
    result: bytes | None = None
    finished: datetime | None = None


class Store:
    """All of it, behind one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.projects: dict[int, Project] = {}
        self.labels: dict[int, Label] = {}
        self.tasks: dict[int, Task] = {}
        self.jobs: dict[int, Job] = {}
        self.background: dict[str, Background] = {}
        self.organizations: dict[int, str] = {}
        self.issues: dict[int, Issue] = {}
        self.users: dict[int, str] = {}
        """Number → name of users beside the one who logs in, who is number 1."""
        self.webhooks: dict[int, Webhook] = {}
        self.exports: dict[tuple[str, int, str], bytes] = {}
        self._ids: dict[str, Iterator[int]] = {}
        self._last = datetime.now(UTC)

    def new_id(self, kind: str) -> int:
        """The next id of a table."""
        return next(self._ids.setdefault(kind, itertools.count(1)))

    def now(self) -> datetime:
        """The time, later than every time before."""
        self._last = max(self._last + timedelta(microseconds=1), datetime.now(UTC))
        return self._last

    def project(self, project_id: int) -> Project:
        """The project, or 404."""
        if project_id not in self.projects:
            raise not_found("Project")
        return self.projects[project_id]

    def task(self, task_id: int) -> Task:
        """The task, or 404."""
        if task_id not in self.tasks:
            raise not_found("Task")
        return self.tasks[task_id]

    def job(self, job_id: int) -> Job:
        """The job, or 404."""
        if job_id not in self.jobs:
            raise not_found("Job")
        return self.jobs[job_id]

    def label(self, label_id: int) -> Label:
        """The label, or 404."""
        if label_id not in self.labels:
            raise not_found("Label")
        return self.labels[label_id]

    def tasks_of(self, project_id: int) -> list[Task]:
        """A project's tasks."""
        return [task for task in self.tasks.values() if task.project_id == project_id]

    def jobs_of(self, task_id: int) -> list[Job]:
        """A task's jobs of all types."""
        return [job for job in self.jobs.values() if job.task_id == task_id]

    def labels_of_task(self, task: Task) -> list[Label]:
        """The labels that may be drawn in a task."""
        if task.project_id is not None:
            return [label for label in self.labels.values() if label.project_id == task.project_id]
        return [label for label in self.labels.values() if label.task_id == task.id]

    def touch(self, job: Job) -> None:
        """New dates for a job, its task, its project: what CVAT does after each change of annotations."""
        now = self.now()
        task = self.tasks[job.task_id]
        job.updated = task.updated = now
        if task.project_id is not None:
            self.projects[task.project_id].updated = now

    def touch_all(self, project_id: int | None, task_id: int | None) -> None:
        """New dates below a project or task: what CVAT does after a change of labels."""
        now = self.now()
        if project_id is not None:
            self.projects[project_id].updated = now
        for task in self.tasks.values():
            if task.id == task_id or (project_id is not None and task.project_id == project_id):
                task.updated = now
                for job in self.jobs_of(task.id):
                    job.updated = now

    # Labels

    def change_labels(self, items: Sequence[Json], *, project_id: int | None, task_id: int | None) -> None:
        """Add, change and delete labels as the nested lists of project and task do.

        Raises:
            RefusedError: a name twice, an unknown id or type, a deletion without id. Nothing is changed then.
        """
        before = copy.deepcopy(self.labels)
        try:
            for item in items:
                self._change_label(item, project_id=project_id, task_id=task_id)
        except RefusedError:
            self.labels = before
            raise
        if items:
            self.touch_all(project_id, task_id)

    def _change_label(self, item: Json, *, project_id: int | None, task_id: int | None) -> None:
        siblings = [v for v in self.labels.values() if v.project_id == project_id and v.task_id == task_id]
        names = [attribute.get("name") for attribute in item.get("attributes", [])]
        if len(names) != len(set(names)):
            raise RefusedError(400, [f"Duplicate attribute with name '{names[0]}' exists"])
        if item.get("type") is not None and item["type"] not in LABEL_TYPES:
            raise RefusedError(400, {"labels": [{"type": [f'"{item["type"]}" is not a valid choice.']}]})
        if item.get("id") is None:
            if item.get("deleted"):
                raise RefusedError(400, {"labels": [{"non_field_errors": ["Deleted label must have an ID"]}]})
            if not item.get("name"):
                raise RefusedError(400, {"labels": [{"name": ["This field is required."]}]})
            label = Label(
                id=self.new_id("label"),
                name=str(item["name"]),
                color=item.get("color") or _free_color(siblings),
                type=item.get("type") or "any",
                attributes=[],
                project_id=project_id,
                task_id=task_id,
            )
        else:
            label = next((v for v in siblings if v.id == item["id"]), None)  # type: ignore[assignment]
            if label is None:
                raise RefusedError(404, {"detail": f"Not found label with id #{item['id']} to change"})
            siblings.remove(label)
            if item.get("deleted"):
                self._delete_label(label)
                return
            label.name = item.get("name") or label.name
            label.type = item.get("type") or label.type
            label.color = item.get("color") or _free_color(siblings)  # CVAT too forgets a colour that is not sent again
        if len(label.name) > 64:
            raise RefusedError(400, {"labels": [{"name": ["Ensure this field has no more than 64 characters."]}]})
        if any(other.name == label.name for other in siblings):
            raise RefusedError(400, ["All label names must be unique"])
        self.labels[label.id] = label
        for attribute in item.get("attributes", []):
            self._change_attribute(label, attribute)

    def _change_attribute(self, label: Label, item: Json) -> None:
        if missing := [key for key in ("name", "mutable", "input_type", "values") if key not in item]:
            raise RefusedError(
                400, {"labels": [{"attributes": [{key: ["This field is required."] for key in missing}]}]}
            )
        if item.get("id") is not None:
            old = next((v for v in label.attributes if v.id == item["id"]), None)
            if old is None:
                raise RefusedError(404, {"detail": f"Attribute with id #{item['id']} does not exist"})
        else:
            old = next((v for v in label.attributes if v.name == item["name"]), None)
        if old is not None and item.get("deleted"):
            label.attributes.remove(old)
            return
        attribute = Attribute(
            id=self.new_id("attribute") if old is None else old.id,
            name=item["name"],
            mutable=bool(item["mutable"]),
            input_type=item["input_type"],
            default_value=item.get("default_value", "" if old is None else old.default_value),
            values=[str(value) for value in item["values"]],
        )
        if old is None:
            label.attributes.append(attribute)
        else:
            label.attributes[label.attributes.index(old)] = attribute

    def delete_label(self, label_id: int) -> None:
        """Delete a label and all that was drawn with it."""
        label = self.label(label_id)
        self._delete_label(label)
        self.touch_all(label.project_id, label.task_id)

    def _delete_label(self, label: Label) -> None:
        del self.labels[label.id]
        for job in self.jobs.values():
            job.shapes = [item for item in job.shapes if item["label_id"] != label.id]
            job.tags = [item for item in job.tags if item["label_id"] != label.id]
            job.tracks = [item for item in job.tracks if item["label_id"] != label.id]

    # Data

    def set_data(self, task: Task, frames: Iterable[Frame], *, chunk_size: int) -> None:
        """The uploaded frames, and the jobs over them."""
        task.frames = list(frames)
        task.chunk_size = task.chunk_size or chunk_size
        task.chunks_updated = task.updated = self.now()
        size = len(task.frames)
        segment = task.segment_size or size
        task.segment_size = segment
        for start in range(0, size, segment):
            stop = min(start + segment, size) - 1
            job = self.add_job(task, start, stop, type="annotation")
            for _ in range(task.replicas):
                self.add_job(task, start, stop, type="consensus_replica", parent_id=job.id)

    def add_job(
        self,
        task: Task,
        start: int,
        stop: int,
        *,
        type: str,
        included: list[int] | None = None,
        parent_id: int | None = None,
    ) -> Job:
        """A new job over a task's frames."""
        now = self.now()
        job = Job(
            id=self.new_id("job"),
            task_id=task.id,
            start=start,
            stop=stop,
            type=type,
            created=now,
            updated=now,
            included=included,
            parent_id=parent_id,
        )
        self.jobs[job.id] = job
        return job

    def delete_task(self, task_id: int) -> None:
        """Delete a task with its jobs."""
        task = self.task(task_id)
        for job in self.jobs_of(task_id):
            del self.jobs[job.id]
        self.issues = {key: issue for key, issue in self.issues.items() if issue.job_id in self.jobs}
        self.labels = {key: label for key, label in self.labels.items() if label.task_id != task_id}
        del self.tasks[task_id]
        if task.project_id is not None:
            self.projects[task.project_id].updated = self.now()

    def delete_project(self, project_id: int) -> None:
        """Delete a project with its tasks."""
        self.project(project_id)
        for task in self.tasks_of(project_id):
            self.delete_task(task.id)
        self.labels = {key: label for key, label in self.labels.items() if label.project_id != project_id}
        del self.projects[project_id]

    # Annotations

    def annotations(self, jobs: Sequence[Job]) -> Json:
        """What is drawn in these jobs, as the API lists it (copies)."""
        data: Json = {"version": 0, "tags": [], "shapes": [], "tracks": [], "intervals": []}
        for job in jobs:
            for kind in ("tags", "shapes", "tracks"):
                data[kind] += [self._listed(item) for item in sorted(getattr(job, kind), key=lambda v: v["frame"])]
        return data

    def _listed(self, item: Json) -> Json:
        """With the default values of attributes that were declared after the shape was drawn."""
        item = copy.deepcopy(item)
        item["attributes"] = self._with_defaults(item["attributes"], item["label_id"])
        return item

    def _with_defaults(self, values: Sequence[Json], label_id: int) -> list[Json]:
        declared = self.labels[label_id].attributes
        known = {value["spec_id"] for value in values}
        missing = [{"spec_id": v.id, "value": v.default_value} for v in declared if v.id not in known]
        return [*values, *missing]

    def write(self, jobs: Sequence[Job], data: Mapping[str, Any], action: str, *, by_frame: bool) -> Json:
        """Change annotations: "put", "create", "update" or "delete" → what was written, with ids.

        Args:
            jobs: the jobs of a task, or one job.
            data: what the client sent.
            action: what to do with it.
            by_frame: each job gets the items of its frames only: so CVAT does for a task. For a job it takes all.

        Raises:
            RefusedError: the data are not as CVAT wants them. Nothing is changed then.
        """
        if not jobs:
            return self.annotations([])
        task = self.tasks[jobs[0].task_id]
        parts = {kind: [_checked(item, kind) for item in data.get(kind) or []] for kind in ("tags", "shapes", "tracks")}
        allowed = {label.id: label for label in self.labels_of_task(task)}
        for item in itertools.chain.from_iterable(parts.values()):
            if action != "delete":
                _check_label(item, allowed)
        if action == "update" and any(item.get("id") is None for item in itertools.chain(*parts.values())):
            raise RefusedError(400, {"detail": "An item without id cannot be updated."})
        written: Json = {"version": 0, "tags": [], "shapes": [], "tracks": [], "intervals": []}
        for job in jobs:
            mine = {k: [v for v in items if not by_frame or v["frame"] in _range(job)] for k, items in parts.items()}
            changed = any(mine.values()) or (action == "put" and bool(job.shapes or job.tags or job.tracks))
            for kind, items in mine.items():
                stored: list[Json] = getattr(job, kind)
                given = {item.get("id") for item in items}
                owned = {item["id"] for item in stored} & given
                if action == "put":
                    stored = []
                elif action in ("update", "delete"):
                    stored = [item for item in stored if item["id"] not in given]
                if action != "delete":
                    for item in items:
                        keep = action in ("put", "update") and item.get("id") in owned
                        item["id"] = item["id"] if keep else self.new_id(kind)
                        item["attributes"] = self._with_defaults(item["attributes"], item["label_id"])
                        for child in item.get("shapes", []):
                            child["id"] = self.new_id("tracked")
                    stored = stored + items  # a changed row goes to the end: ids do not ascend
                setattr(job, kind, stored)
                written[kind] += copy.deepcopy(items)
            if changed:
                self.touch(job)
        return written

    def clear(self, jobs: Sequence[Job]) -> None:
        """Delete all that is drawn in these jobs."""
        for job in jobs:
            if job.shapes or job.tags or job.tracks:
                job.shapes, job.tags, job.tracks = [], [], []
                self.touch(job)


def _range(job: Job) -> range:
    """CVAT slices by the first and last frame also where a job has only some of the frames between."""
    return range(job.start, job.stop + 1)


def _free_color(labels: Sequence[Label]) -> str:
    used = {label.color for label in labels}
    return next((color for color in _COLORS if color not in used), _COLORS[0])


def _check_label(item: Json, allowed: Mapping[int, Label]) -> None:
    if item["label_id"] not in allowed:
        raise RefusedError(400, [f"label_id `{item['label_id']}` is invalid"])
    declared = {attribute.id for attribute in allowed[item["label_id"]].attributes}
    for value in item["attributes"]:
        if value["spec_id"] not in declared:
            raise RefusedError(400, [f"spec_id `{value['spec_id']}` is invalid"])


def _checked(item: Any, kind: str) -> Json:
    """One tag, shape or track as it is stored."""
    if not isinstance(item, dict):
        raise RefusedError(400, {kind: [{"non_field_errors": ["Invalid data. Expected a dictionary."]}]})
    wanted = ["frame", "label_id", *(["type"] if kind == "shapes" else ["shapes"] if kind == "tracks" else [])]
    if missing := [key for key in wanted if item.get(key) is None]:
        raise RefusedError(400, {kind: [{key: ["This field is required."] for key in missing}]})
    for key in ("frame", "label_id"):
        if not isinstance(item[key], int) or item[key] < 0:
            raise RefusedError(400, {kind: [{key: ["A valid integer is required."]}]})
    stored: Json = {
        "id": item.get("id"),
        "frame": item["frame"],
        "label_id": item["label_id"],
        "group": item.get("group") or 0,
        "source": str(item.get("source", "manual")),
        "attributes": [
            {"spec_id": int(value["spec_id"]), "value": str(value["value"])} for value in item.get("attributes") or []
        ],
    }
    if kind == "shapes":
        stored |= _checked_geometry(item) | {"score": float(item.get("score", 1.0)), "elements": []}
    elif kind == "tracks":
        stored["shapes"] = [
            {
                "frame": int(child["frame"]),
                "attributes": list(child.get("attributes") or []),
                **_checked_geometry(child),
            }
            for child in item["shapes"]
        ]
        stored["elements"] = []
    return stored


def _checked_geometry(item: Json) -> Json:
    kind, points = item.get("type"), item.get("points", [])
    if kind not in SHAPE_TYPES:
        raise RefusedError(400, {"shapes": [{"type": [f'"{kind}" is not a valid choice.']}]})
    if not isinstance(points, list) or any(type(value) not in (int, float) for value in points):
        raise RefusedError(400, {"shapes": [{"points": {"0": ["Value must be a float or an integer"]}}]})
    count = len(points)
    # Masks are stored as they come: CVAT looks neither at the sum of the run lengths nor at the box.
    wrong = {
        "polygon": count < 6 or count % 2 == 1,
        "polyline": count < 4 or count % 2 == 1,
        "points": count < 2 or count % 2 == 1,
        "rectangle": count != 4,
        "ellipse": count != 4,
        "cuboid": count != 16,
        "mask": count < 5,
    }
    if wrong.get(str(kind), False):
        raise RefusedError(400, {"shapes": [{"points": [f"{count} numbers are no {kind}."]}]})
    rotation = float(item.get("rotation", 0))
    if not 0 <= rotation <= 360:
        raise RefusedError(400, {"shapes": [{"rotation": ["Ensure this value is between 0 and 360."]}]})
    return {
        "type": kind,
        "occluded": bool(item.get("occluded", False)),
        "outside": bool(item.get("outside", False)),
        "z_order": int(item.get("z_order", 0)),
        "rotation": rotation,
        "points": [float(value) for value in points],
    }
