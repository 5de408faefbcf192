"""A CVAT project of sampled scenes, and somebody who works in it as people do: opens jobs, corrects, completes them."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import urllib3
from cvat_sdk import Client, Config, models
from cvat_sdk.core.client import AccessTokenCredentials, PasswordCredentials
from cvat_sdk.core.exceptions import CvatSdkException
from cvat_sdk.exceptions import ApiException

from cvat_standin import CvatStandin, jobs_of, make_ground_truth, make_task, set_state
from sscloud.errors import ServerError
from sscloud.labels import LabelSchema
from tools.simulation.scenes import Scenes
from training.cvat import Account, Job, Server
from training.oracle import Correction, Person, correct
from training.prelabel import shapes_by_frame
from training.project_labels import plan_labels

EXACT: Final = Person(speck=1, border=0.0, accepted=1.0, patch=0.0)
"""Who draws the truth itself: for the test panoramas."""


@contextlib.contextmanager
def standing_in() -> Iterator[Account]:
    """A CVAT of this process, until the block ends."""
    with CvatStandin() as server:
        site = server.site
        yield Account(url=site.url, username=site.username, password=site.password)


@contextlib.contextmanager
def browsing(account: Account) -> Iterator[Client]:
    """A login of the people's own.

    Raises:
        ServerError: it is refused, or the server refuses something within the block.
    """
    local = "127.0.0.1" in account.url
    with _asking(account.url), tempfile.TemporaryDirectory() as cache:
        config = Config(status_check_period=0.02 if local else 1.0, cache_dir=Path(cache))
        with Client(account.url, config=config, check_server_version=False) as client:
            client.organization_slug = account.organization
            if account.token:
                client.login(AccessTokenCredentials(account.token))
            else:
                client.login(PasswordCredentials(account.username or "", account.password or ""))
            yield client


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    try:
        yield
    except ApiException as error:
        raise ServerError(f"{url}: {error.status} {error.reason}", status=error.status) from error
    except (CvatSdkException, urllib3.exceptions.HTTPError) as error:
        raise ServerError(f"{url}: {error}") from error


@dataclass(frozen=True, slots=True)
class Project:
    """The simulation's project on the server."""

    id: int
    test_jobs: tuple[int, ...]
    """Ground-truth jobs."""
    seed_jobs: tuple[int, ...]
    panoramas: int
    """Of the seed and of the pool."""


def set_up(server: Server, client: Client, scenes: Scenes, schema: LabelSchema) -> Project:
    """Make the project: labels, a task a site, a job a scan, and ground-truth jobs over the test sites.

    Args:
        server: logged in.
        client: of the same server.
        scenes: sampled.
        schema: the labels.
    """
    name = f"SSCloud simulation {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    project = client.projects.create(models.ProjectWriteRequest(name=name)).id
    try:
        requests = [plan.request for plan in plan_labels(schema, []) if plan.request is not None]
        server.patch_labels(project, requests)
        test_jobs, seed_jobs, panoramas = [], [], 0
        for site in scenes.plan.sites():
            images = {image: scenes.image(image) for image in site.images}
            task = make_task(client, project, images, name=site.name, segment_size=1)
            if site.role == "test":
                test_jobs.append(make_ground_truth(client, task.id, range(site.scans)))
                for job in jobs_of(client, task.id):  # nobody labels them a second time
                    set_state(client, job, state="completed")
                continue
            panoramas += site.scans
            if site.role == "seed":
                seed_jobs += jobs_of(client, task.id)
    except BaseException:
        delete_project(client, project)
        raise
    return Project(project, tuple(test_jobs), tuple(seed_jobs), panoramas)


def delete_project(client: Client, project: int) -> None:
    """Delete the simulation's project with its tasks."""
    client.projects.remove_by_ids([project])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A frame that somebody has corrected."""

    name: str
    correction: Correction


class People:
    """Somebody who corrects jobs.

    Args:
        server: logged in.
        client: of the same server.
        scenes: the truth.
        schema: the labels.
        project: the simulation's.
    """

    def __init__(self, server: Server, client: Client, scenes: Scenes, schema: LabelSchema, project: int) -> None:
        self._server, self._client, self._scenes = server, client, scenes
        labels = server.labels(project_id=project)
        self._label_ids = {label.id: found.id for label in labels if (found := schema.find(label.name)) is not None}
        self._background = schema.background.id if schema.background is not None else 0

    def work(self, jobs: Iterable[int], *, person: Person | None = None) -> list[Work]:
        """Open jobs one by one, correct what is in them, and complete them.

        Args:
            jobs: their numbers.
            person: who does it.
        """
        return [done for number in jobs for done in self._work(self._server.job(number), person or Person())]

    def _work(self, job: Job, person: Person) -> list[Work]:
        set_state(self._client, job.id, state="in progress")
        frames = self._server.frames(job.task_id)
        shapes = shapes_by_frame(self._server.annotations(job.id))
        done = []
        for number in sorted(self._server.job_frames(job)):
            correction = correct(
                shapes.get(number, []),
                self._scenes.truth(frames[number].name),
                frame=number,
                label_ids=self._label_ids,
                background=self._background,
                person=person,
            )
            self._save(job.id, "delete", correction.deleted)
            self._save(job.id, "update", correction.updated)
            self._save(job.id, "create", correction.created)
            done.append(Work(name=frames[number].name, correction=correction))
        set_state(self._client, job.id, state="completed")
        return done

    def _save(self, job: int, action: str, shapes: tuple[Mapping[str, Any], ...]) -> None:
        if shapes:
            data = models.PatchedLabeledDataRequest(
                version=0, tags=[], shapes=[_request(shape) for shape in shapes], tracks=[]
            )
            self._client.api_client.jobs_api.partial_update_annotations(
                action, job, patched_labeled_data_request=data, _parse_response=False
            )


_SENT: Final = ("id", "frame", "label_id", "points", "z_order", "rotation", "occluded", "outside", "group", "source")


def _request(shape: Mapping[str, Any]) -> models.LabeledShapeRequest:
    attributes = [models.AttributeValRequest(**value) for value in shape["attributes"]]
    content = {name: shape[name] for name in _SENT if shape.get(name) is not None}
    return models.LabeledShapeRequest(type=models.ShapeType(shape["type"]), attributes=attributes, **content)
