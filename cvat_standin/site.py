"""A CVAT server as a test sees it, and set-up through the real cvat-sdk: the stand-in and live servers alike."""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cvat_sdk import Client, Config, models
from cvat_sdk.core.client import PasswordCredentials
from cvat_sdk.core.helpers import get_paginated_collection
from cvat_sdk.core.proxies.projects import Project
from cvat_sdk.core.proxies.tasks import Task
from cvat_sdk.masks import encode_mask
from numpy.typing import NDArray

Shape = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A CVAT server and a login."""

    url: str
    username: str
    password: str = field(repr=False)
    live: bool = False
    """Somebody's real server."""
    projects: list[int] = field(default_factory=list)
    """Projects that a test has made: they are deleted after it."""

    def environment(self) -> dict[str, str]:
        """Variables that give a program this server and login."""
        return {"CVAT_URL": self.url, "CVAT_USERNAME": self.username, "CVAT_PASSWORD": self.password}

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A logged-in client that polls quickly; its connections and its cache on disk end with it."""
        with tempfile.TemporaryDirectory() as cache:
            config = Config(status_check_period=0.5 if self.live else 0.01, cache_dir=cache)
            with Client(self.url, config=config, check_server_version=False) as client:
                client.login(PasswordCredentials(self.username, self.password))
                yield client

    def make_project(self, client: Client, name: str, labels: Sequence[Mapping[str, Any]]) -> Project:
        """A new project with these labels; it is deleted after the test.

        Args:
            client: of this site.
            name: its name.
            labels: as the API takes them: {"name", "color", "type", "attributes": […]}; only the name is needed.
        """
        specs = [models.PatchedLabelRequest(**_label(label)) for label in labels]
        project = client.projects.create(models.ProjectWriteRequest(name=name, labels=specs))
        self.projects.append(project.id)
        return project

    def delete_projects(self) -> None:
        """Delete the projects that tests have made, and their tasks."""
        if self.projects:
            with self.client() as client:
                client.projects.remove_by_ids(self.projects)
            self.projects.clear()


def _label(label: Mapping[str, Any]) -> dict[str, Any]:
    attributes = [models.AttributeRequest(**attribute) for attribute in label.get("attributes", [])]
    return {**label, "attributes": attributes} if attributes else dict(label)


def make_task(
    client: Client,
    project_id: int,
    images: Mapping[str, bytes],
    *,
    name: str = "Задача",
    segment_size: int = 0,
    chunk_size: int | None = None,
    replicas: int = 0,
    subset: str = "",
) -> Task:
    """A new task with these images as frames.

    Args:
        client: of the site.
        project_id: the task's project.
        images: file name → bytes of the file. CVAT sorts frames by name. Names with folders travel in a zip, which
            is how CVAT keeps folders.
        name: the task's name.
        segment_size: frames a job; 0: one job.
        chunk_size: frames a chunk; None: the server decides.
        replicas: consensus replicas of each job.
        subset: the task's subset.
    """
    spec = {"name": name, "project_id": project_id, "segment_size": segment_size, "subset": subset}
    if replicas:
        spec["consensus_replicas"] = replicas
    parameters: dict[str, Any] = {"image_quality": 70, "use_zip_chunks": True, "use_cache": True}
    if chunk_size is not None:
        parameters["chunk_size"] = chunk_size
    with tempfile.TemporaryDirectory() as folder:
        if any("/" in name for name in images):
            files = [Path(folder) / "images.zip"]
            with zipfile.ZipFile(files[0], "w") as archive:
                for file_name, data in images.items():
                    archive.writestr(file_name, data)
        else:
            files = [Path(folder) / file_name for file_name in images]
            for file, data in zip(files, images.values(), strict=True):
                file.write_bytes(data)
        return client.tasks.create_from_data(models.TaskWriteRequest(**spec), files, data_params=parameters)


def label_ids(client: Client, project_id: int) -> dict[str, int]:
    """Names of a project's labels → their ids."""
    labels = get_paginated_collection(client.api_client.labels_api.list_endpoint, project_id=project_id)
    return {label.name: label.id for label in labels}


def jobs_of(client: Client, task_id: int, *, type: str = "annotation") -> list[int]:
    """Ids of a task's jobs of one type (annotation, ground_truth, consensus_replica), by start frame, then id."""
    # Not by the API's filter: newer SDKs call replicas "replica" and refuse the name that CVAT 2.73 has for them.
    jobs = get_paginated_collection(client.api_client.jobs_api.list_endpoint, task_id=task_id)
    return [job.id for job in sorted(jobs, key=lambda job: (job.start_frame, job.id)) if str(job.type) == type]


def set_state(client: Client, job_id: int, *, state: str | None = None, stage: str | None = None) -> None:
    """Set a job's state (new, in progress, completed, rejected) and stage (annotation, validation, acceptance)."""
    change: dict[str, Any] = {}
    if stage is not None:
        change["stage"] = models.JobStage(stage)
    if state is not None:
        change["state"] = models.OperationStatus(state)
    client.jobs.retrieve(job_id).update(models.PatchedJobWriteRequest(**change))


def make_ground_truth(client: Client, task_id: int, frames: Sequence[int]) -> int:
    """A ground truth job over these frames of a task → its id."""
    spec = models.JobWriteRequest(
        type=models.JobType("ground_truth"),
        task_id=task_id,
        frame_selection_method=models.FrameSelectionMethod("manual"),
        frames=list(frames),
    )
    job, _ = client.api_client.jobs_api.create(spec)
    return int(job.id)


def polygon(label_id: int, frame: int, points: Sequence[float], **more: Any) -> Shape:
    """A polygon for `add_shapes`: [x, y, x, y, …]; more: z_order, source, group, attributes, …"""
    return {"type": "polygon", "label_id": label_id, "frame": frame, "points": [float(v) for v in points], **more}


def mask(label_id: int, frame: int, bitmap: NDArray[np.bool_], **more: Any) -> Shape:
    """A mask for `add_shapes` from a bitmap of the image's size, (H, W) bool; more: as for `polygon`."""
    points = [float(value) for value in encode_mask(bitmap)]
    return {"type": "mask", "label_id": label_id, "frame": frame, "points": points, **more}


def add_shapes(client: Client, job_id: int, shapes: Sequence[Shape]) -> list[int]:
    """Draw shapes, dicts as the API has them, in a job → their ids, in the same order."""
    known = {shape["id"] for shape in job_shapes(client, job_id)}
    requests = []
    for shape in shapes:
        values = [models.AttributeValRequest(**value) for value in shape.get("attributes", [])]
        content = {**shape, "type": models.ShapeType(shape["type"]), "attributes": values}
        requests.append(models.LabeledShapeRequest(**content))
    data = models.PatchedLabeledDataRequest(version=0, tags=[], shapes=requests, tracks=[])
    client.api_client.jobs_api.partial_update_annotations(
        "create", job_id, patched_labeled_data_request=data, _parse_response=False
    )
    return sorted(shape["id"] for shape in job_shapes(client, job_id) if shape["id"] not in known)


def job_shapes(client: Client, job_id: int) -> list[Shape]:
    """A job's shapes as the API lists them."""
    data, _ = client.api_client.jobs_api.retrieve_annotations(job_id)
    return [shape.to_dict() for shape in data.shapes]
