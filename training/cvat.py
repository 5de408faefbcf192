"""The only module that talks to a CVAT server, through cvat-sdk.

Replies are read as JSON and checked here, field by field: shapes keep the very numbers that the server sent (their
hash decides whether anything changed), long masks are not turned into thousands of model objects, and a wrong reply is
one message. Reading is retried with growing pauses; writing is not, because a lost answer does not say whether
the server has written: callers look before they write again.
"""

import contextlib
import io
import json
import logging
import math
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, Self
from urllib.parse import urlsplit

import urllib3
from cvat_sdk.api_client.exceptions import ApiException, OpenApiException
from cvat_sdk.core.auth import AuthStore
from cvat_sdk.core.client import AccessTokenCredentials, Client, PasswordCredentials
from cvat_sdk.core.client import Config as ClientConfig
from cvat_sdk.core.exceptions import AuthStoreError, CvatSdkException
from cvat_sdk.core.helpers import make_request_headers

from sscloud.errors import ConfigError, ServerError, UnreachableError

log = logging.getLogger(__name__)

ATTEMPTS: Final = 6
"""How often a read is tried; with the pauses between, a server may be away for about a minute."""
FIRST_PAUSE: Final = 1.0
"""Seconds before the second try; every further pause is twice as long."""
LONGEST_PAUSE: Final = 60.0
"""Seconds, also where a server asks for more by Retry-After."""
TRANSIENT: Final = frozenset({408, 429, 500, 502, 503, 504})
TIMEOUT: Final = (10.0, 120.0)
"""Seconds to connect, and between two bytes of an answer."""
MAX_IMAGE_BYTES: Final = 512 << 20
MAX_JSON_BYTES: Final = 1 << 30
MAX_PAGES: Final = 10_000
MAX_FRAMES: Final = 10_000_000
"""Most frames of a job."""
MAX_ARCHIVE_BYTES: Final = 256 << 30
PAGE_SIZE: Final = 100
MAX_DETAIL_BYTES: Final = 1 << 16
"""As much of an error's body is looked at."""
_BLOCK: Final = 1 << 18
TESTED: Final = ((2, 73), (2, 81))
"""Server versions, from and below, that this was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where to log in, and as whom. Secrets are not part of its representation."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    organization: str | None = None
    """Slug; None: whatever the server takes by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task."""

    id: int
    name: str
    project_id: int | None
    size: int
    """Frames."""
    images: bool
    """Whether its frames are images; otherwise a video, or point clouds."""
    updated: str
    """The server's time of the last change, as it writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A part of a task's frames, given to one person."""

    id: int
    task_id: int
    project_id: int | None
    type: str
    """annotation, ground_truth, consensus_replica."""
    state: str
    """new, in progress, completed, rejected."""
    stage: str
    """annotation, validation, acceptance."""
    start: int
    stop: int
    """First and last frame."""
    updated: str
    assignee: str | None = None
    """Name of the user who works on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """An image of a task."""

    number: int
    """Place in the task, from 0; shapes refer to it."""
    name: str
    """As the server has it: any text, slashes included."""
    size_hw: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectLabel:
    """A label of a project or task."""

    id: int
    name: str
    color: str
    """#rrggbb, or empty."""
    type: str
    """any, mask, polygon, …"""
    attributes: Mapping[str, int]
    """Attribute name → id."""
    text_attributes: frozenset[str]
    """Names of those that take any text."""
    defaults: Mapping[int, str]
    """Attribute id → value that CVAT gives to shapes that come without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What a job holds."""

    shapes: tuple[dict[str, Any], ...]
    """As listed by the server; `type`, `frame`, `label_id` and `points` are there."""
    tracks: int
    tags: int
    intervals: int
    tag_frames: frozenset[int]
    """Frames that tags are on."""
    track_start: int | None
    """The frame where the first track begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A comment of an issue that is pinned to a frame."""

    job: int
    frame: int
    """Number in the task."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook of a project."""

    id: int
    url: str
    """Where it sends to."""
    events: frozenset[str]
    """What it tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A serverless function as CVAT lists it."""

    id: str
    name: str
    kind: str
    version: int | None
    labels: Mapping[str, frozenset[str]]
    """Label name → names of its attributes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRun:
    """A background run of a function over a task or a job."""

    id: str
    status: Literal["queued", "started", "finished", "failed"]
    progress: int
    """Percent."""
    enqueued: str
    ended: str
    """The server's times, as it writes them; empty before."""
    error: str
    """The server's last line about a failure, or its word for the status."""
    function: str
    task: int | None
    job: int | None


def find_account(environment: Mapping[str, str], *, profile: str | None = None) -> Account:
    """Credentials from the environment, else from the profile store of cvat-sdk and cvat-cli.

    Args:
        environment: CVAT_URL with CVAT_ACCESS_TOKEN, or with CVAT_USERNAME and CVAT_PASSWORD; CVAT_ORGANIZATION.
        profile: name of a stored profile to use instead.

    Raises:
        ConfigError: nothing complete was found, or the store cannot be read.
    """
    organization = environment.get("CVAT_ORGANIZATION") or None
    url = environment.get("CVAT_URL")
    if profile is None and url:
        token, username, password = (environment.get(f"CVAT_{x}") for x in ("ACCESS_TOKEN", "USERNAME", "PASSWORD"))
        if token:
            return Account(url=url, token=token, organization=organization)
        if username and password:
            return Account(url=url, username=username, password=password, organization=organization)
        raise ConfigError(
            "CVAT_URL is set, but not who logs in there. Set CVAT_ACCESS_TOKEN, or CVAT_USERNAME and CVAT_PASSWORD."
        )
    try:
        store = AuthStore()
        if profile is None:
            default = store.get_default_profile()
            entry = default[1] if default else None
        else:
            entry = store.get_profile(profile)
            if entry is None:
                known = ", ".join(store.list_profiles()) or "none"
                raise ConfigError(f"There is no CVAT profile {profile!r}; there are: {known}. See `cvat-cli profile`.")
    except AuthStoreError as error:
        raise ConfigError(f"The CVAT profile store cannot be used: {error}") from error
    if entry is None:
        raise ConfigError(
            "No CVAT server is named. Set CVAT_URL (https://cvat.example.org) with CVAT_ACCESS_TOKEN, or with "
            "CVAT_USERNAME and CVAT_PASSWORD; or store a profile with `cvat-cli profile`."
        )
    return Account(url=entry.server, token=entry.token, organization=organization)


class Server:
    """A CVAT server, logged in. Use as a context manager. Reading is safe from several threads at once.

    Build it with `connect`.
    """

    def __init__(self, client: Client, *, version: str) -> None:
        self._client = client
        self._api = client.api_client
        self._stopped = threading.Event()
        self._lines = _Lines(self._stopped)
        self._lines.watch(self._api.rest_client.pool_manager)
        self.version = version
        self.url = client.api_map.host

    @classmethod
    def connect(cls, account: Account) -> "Server":
        """Log in.

        Raises:
            ServerError: nobody answers, something else than CVAT answers, or the credentials are refused.
            ConfigError: the address is no address.
        """
        _check_address(account.url)
        for value, name in ((account.token, "CVAT_ACCESS_TOKEN"), (account.organization, "CVAT_ORGANIZATION")):
            if value and not (value.isascii() and value.isprintable()):
                raise ConfigError(f"{name} holds letters that no such name has. Copy it from CVAT once more.")
        try:
            client = Client(account.url, config=ClientConfig(status_check_period=1), check_server_version=False)
        except (CvatSdkException, ValueError) as error:
            raise ConfigError(
                f"CVAT_URL {account.url!r} is no address ({error}). Set http://HOST:PORT or https://HOST."
            ) from error
        client.organization_slug = account.organization
        # `Retry-After` and 502 to 504 are waited for below, where dropped connections are, too.
        client.api_client.rest_client.pool_manager.connection_pool_kw["retries"] = urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=3
        )
        server = cls(client, version="")
        try:
            about = _object(server._get(client.api_client.server_api.retrieve_about_endpoint, attempts=2), "about")
            server.version = _text(about, "version")
            server._login(account)
        except ServerError as error:
            client.api_client.close()
            if error.status in (400, 401, 403) and server.version:
                who = "The access token" if account.token else f"The password of {account.username!r}"
                raise ServerError(
                    f"{server.url}: {who} is not accepted (HTTP {error.status}).", status=error.status
                ) from None
            scheme = "" if "://" in account.url else " CVAT_URL names no http:// or https://, so https:// was tried."
            if urlsplit(server.url).path:
                scheme += f" CVAT_URL is the server's address alone: leave {urlsplit(server.url).path} out."
            raise type(error)(f"{server.url}: {error}.{scheme}", status=error.status) from None
        if not TESTED[0] <= parse_version(server.version) < TESTED[1]:
            log.warning(
                "%s is CVAT %s; this was made for %d.%d to %d.%d and may meet differences.",
                server.url, server.version, *TESTED[0], TESTED[1][0], TESTED[1][1] - 1,
            )  # fmt: skip
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Log out, if logged in by password, and close the connections."""
        with contextlib.suppress(ApiException, urllib3.exceptions.HTTPError):
            if not self._api.configuration.access_token:
                self._client.logout()
        self._api.rest_client.pool_manager.clear()
        self._api.close()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Within the block, requests of other threads fail at once, whatever they wait for."""
        self._stopped.set()
        self._lines.cut()
        try:
            yield
        finally:
            self._stopped.clear()

    def _login(self, account: Account) -> None:
        if account.token:
            self._client.login(AccessTokenCredentials(account.token))
            self.user()
            return
        try:
            self._login_by_password(account)
        except UnreachableError:
            self._login_by_password(account)

    def _login_by_password(self, account: Account) -> None:
        try:
            self._client.login(PasswordCredentials(account.username or "", account.password or ""))
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            raise UnreachableError(f"no answer ({_reason(error)})") from None
        except ApiException as error:
            raise ServerError(_reason(error), status=error.status or None) from None
        except (OpenApiException, AssertionError, TypeError, ValueError) as error:
            # What the page of a proxy, or another program, does to the SDK's parser.
            raise ServerError(f"the login is answered by something else than CVAT ({_reason(error)})") from None

    def user(self) -> str:
        """Name of the user."""
        return _text(_object(self._get(self._api.users_api.retrieve_self_endpoint, attempts=2), "user"), "username")

    # Reading

    def project(self, project_id: int) -> Project:
        """A project by its number.

        Raises:
            ServerError: there is none that this user can see.
        """
        with _naming(f"project {project_id}"):
            return _project(_object(self._get(self._api.projects_api.retrieve_endpoint, id=project_id), "project"))

    def projects(self) -> list[Project]:
        """The projects that this user can see, by number."""
        with _naming("the projects"):
            found = [_project(row) for row in self._pages(self._api.projects_api.list_endpoint)]
        return sorted(found, key=lambda project: project.id)

    def task(self, task_id: int) -> Task:
        """A task by its number.

        Raises:
            ServerError: there is none that this user can see.
        """
        with _naming(f"task {task_id}"):
            return _task(_object(self._get(self._api.tasks_api.retrieve_endpoint, id=task_id), "task"))

    def tasks(self, project_id: int) -> list[Task]:
        """The tasks of a project, by number."""
        with _naming(f"the tasks of project {project_id}"):
            found = [_task(row) for row in self._pages(self._api.tasks_api.list_endpoint, project_id=project_id)]
        return sorted(found, key=lambda task: task.id)

    def jobs(self, task_id: int) -> list[Job]:
        """The jobs of a task of every type, by number."""
        with _naming(f"the jobs of task {task_id}"):
            found = [_job(row) for row in self._pages(self._api.jobs_api.list_endpoint, task_id=task_id)]
        return sorted((job for job in found if job.task_id == task_id), key=lambda job: job.id)

    def project_jobs(self, project_id: int) -> list[Job]:
        """The jobs of all tasks of a project, of every type, by number."""
        with _naming(f"the jobs of project {project_id}"):
            found = [_job(row) for row in self._pages(self._api.jobs_api.list_endpoint, project_id=project_id)]
        return sorted((job for job in found if job.project_id == project_id), key=lambda job: job.id)

    def frames(self, task_id: int) -> tuple[Frame, ...]:
        """All images of a task, deleted ones included, by number.

        Raises:
            ServerError: a video or a point cloud.
        """
        with _naming(f"the images of task {task_id}"):
            meta = _object(self._get(self._api.tasks_api.retrieve_data_meta_endpoint, id=task_id), "data meta")
            rows, size = _list(meta, "frames"), _int(meta, "size")
            if len(rows) != size:
                raise ServerError(f"{size} frames, but {len(rows)} images are named; only tasks of images are read.")
            return tuple(
                Frame(number=number, name=_name(row, "name"), size_hw=(_int(row, "height"), _int(row, "width")))
                for number, row in enumerate(rows)
            )

    def job(self, job_id: int) -> Job:
        """A job by its number.

        Raises:
            ServerError: there is none that this user can see.
        """
        with _naming(f"job {job_id}"):
            return _job(_object(self._get(self._api.jobs_api.retrieve_endpoint, id=job_id), "job"))

    def job_frames(self, job: Job) -> frozenset[int]:
        """Numbers of a job's frames that are not deleted.

        Ground-truth jobs hold chosen frames of a task, other jobs a run of them.
        """
        with _naming(f"the frames of job {job.id}"):
            meta = _object(self._get(self._api.jobs_api.retrieve_data_meta_endpoint, id=job.id), "data meta")
            if not 0 <= job.stop - job.start < MAX_FRAMES:
                raise ServerError(f"it has the frames {job.start} to {job.stop}; at most {MAX_FRAMES} are read.")
            numbers = frozenset(range(job.start, job.stop + 1)) - _numbers(meta, "deleted_frames")
            return numbers if meta.get("included_frames") is None else numbers & _numbers(meta, "included_frames")

    def image(self, task_id: int, number: int, *, on_bytes: Callable[[int], None] | None = None) -> bytes:
        """The file of a frame as it was uploaded.

        Args:
            task_id: the task.
            number: of the frame.
            on_bytes: told how many bytes have come, block by block; a negative count takes back a failed try.
        """
        with _naming(f"frame {number} of task {task_id}"):
            return self._get(
                self._api.tasks_api.retrieve_data_endpoint,
                max_bytes=MAX_IMAGE_BYTES,
                on_bytes=on_bytes,
                id=task_id,
                type="frame",
                quality="original",
                number=number,
            )

    def annotations(self, job_id: int) -> Annotations:
        """The shapes of a job, in the order in which CVAT draws those of equal z_order."""
        with _naming(f"the annotations of job {job_id}"):
            data = _object(self._get(self._api.jobs_api.retrieve_annotations_endpoint, id=job_id), "annotations")
            shapes = _list(data, "shapes")
            for shape in shapes:
                _check_shape(shape)
            others = (_list({"of": data.get(kind) or []}, "of") for kind in ("tracks", "tags", "intervals"))
            tracks, tags, intervals = others
            return Annotations(
                shapes=tuple(shapes),
                tracks=len(tracks),
                tags=len(tags),
                intervals=len(intervals),
                tag_frames=frozenset(_int(tag, "frame") for tag in tags),
                track_start=min((_int(track, "frame") for track in tracks), default=None),
            )

    def labels(self, *, project_id: int | None = None, task_id: int | None = None) -> list[ProjectLabel]:
        """The labels of a project or a task, in the server's order; parts of skeletons are left out."""
        which = {"project_id": project_id} if project_id is not None else {"task_id": task_id}
        with _naming("the labels"):
            rows = list(self._pages(self._api.labels_api.list_endpoint, **which))
            return [_label(row) for row in rows if row.get("parent_id") is None]

    # Writing

    def create_shapes(self, job_id: int, shapes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
        """Add shapes, as CVAT's LabeledShapeRequest has them, to a job.

        Returns:
            The shapes with their numbers, as `annotations` lists them; none when the answer does not list them.

        Raises:
            ServerError: refused; or no answer came, and the shapes may or may not be there.
        """
        answer = self._patch_annotations(job_id, "create", [dict(shape) for shape in shapes])
        with contextlib.suppress(ServerError):
            created = _list(_object(answer, "annotations"), "shapes")
            for shape in created:
                _check_shape(shape)
            return tuple(created)
        return ()

    def delete_shapes(self, job_id: int, shapes: Sequence[Mapping[str, Any]]) -> None:
        """Delete shapes from a job, as `annotations` gave them; numbers that are gone already do not matter."""
        self._patch_annotations(job_id, "delete", [dict(shape) for shape in shapes])

    def _patch_annotations(self, job_id: int, action: str, shapes: list[dict[str, Any]]) -> bytes:
        with _naming(f"the annotations of job {job_id}"):
            # As plain JSON: building and checking a model object takes seconds for a mask with many runs.
            return self._send_json("PATCH", f"/api/jobs/{job_id}/annotations/", {"action": action}, {"shapes": shapes})

    def patch_labels(self, project_id: int, labels: Sequence[Mapping[str, Any]]) -> None:
        """Add labels (without `id`) to a project and change others (with `id`); the rest stays as it is."""
        with _naming(f"the labels of project {project_id}"):
            self._send_json("PATCH", f"/api/projects/{project_id}", {}, {"labels": [dict(label) for label in labels]})

    # Handing out work

    def find_user(self, name: str) -> int:
        """The number of a user by the name that the user logs in with.

        Raises:
            ServerError: there is none that this user can see.
        """
        with _naming(f"user {name!r:.80}"):
            for row in self._pages(self._api.users_api.list_endpoint, username=name):
                if _text(row, "username") == name:
                    return _int(row, "id")
            raise ServerError("there is none that this user can see. Check the name; is it in this organisation?")

    def assign(self, job_id: int, user_id: int) -> None:
        """Give a job to a user."""
        with _naming(f"the assignee of job {job_id}"):
            self._send_json("PATCH", f"/api/jobs/{job_id}", {}, {"assignee": user_id})

    def remarks(self, task_id: int) -> list[Remark]:
        """The comments of all issues of a task's frames, resolved ones too, by number."""
        with _naming(f"the issues of task {task_id}"):
            issues = {_int(row, "id"): row for row in self._pages(self._api.issues_api.list_endpoint, task_id=task_id)}
            found = []
            for job in sorted({_int(row, "job") for row in issues.values()}):
                for row in self._pages(self._api.comments_api.list_endpoint, job_id=job):
                    issue = issues.get(_int(row, "issue"))
                    if issue is not None:
                        remark = Remark(job=job, frame=_int(issue, "frame"), text=str(row.get("message") or ""))
                        found.append((_int(row, "id"), remark))
            return [remark for _, remark in sorted(found, key=lambda entry: entry[0])]

    def create_issue(self, job_id: int, *, frame: int, position: Sequence[float], text: str) -> None:
        """Pin an issue to a frame. Nothing that is drawn there changes.

        Args:
            job_id: a job with the frame.
            frame: number in the task.
            position: outline of what it is about, x, y, x, y, …, pixels.
            text: its first comment.

        Raises:
            ServerError: refused; or no answer came, and it may or may not be there.
        """
        body = {"job": job_id, "frame": frame, "position": [float(value) for value in position], "message": text}
        with _naming(f"an issue in job {job_id}"):
            self._send_json("POST", "/api/issues", {}, body)

    def create_task(self, name: str, *, project_id: int, segment_size: int) -> Task:
        """A new task without data in a project.

        Args:
            name: its name.
            project_id: the project, whose labels it has.
            segment_size: frames a job.

        Raises:
            ServerError: refused; or no answer came, and it may or may not be there.
        """
        body = {"name": name, "project_id": project_id, "segment_size": segment_size}
        with _naming(f"a new task in project {project_id}"):
            return _task(_object(self._send_json("POST", "/api/tasks", {}, body), "task"))

    def delete_task(self, task_id: int) -> None:
        """Delete a task with all that is in it."""
        with _naming(f"task {task_id}"):
            self._send_json("DELETE", f"/api/tasks/{task_id}", {}, None)

    def upload(self, task_id: int, files: Sequence[Path]) -> None:
        """Send a new task its images, and wait until the server has made frames of them, by name.

        Args:
            task_id: a task without data.
            files: images, or one zip archive with images in folders.

        Raises:
            ServerError: refused, broken off, or the server cannot use them.
        """
        # CVAT's cache makes chunks when they are asked for, from the very files.
        parameters = {"image_quality": 70, "use_cache": True, "use_zip_chunks": True}
        with _naming(f"the images of task {task_id}"):
            try:
                self._client.tasks.retrieve(task_id).upload_data(
                    resources=[str(file) for file in files], params=parameters, wait_for_completion=False
                )
            except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
                raise UnreachableError(f"no answer ({_reason(error)})") from None
            except ApiException as error:
                raise ServerError(_reason(error), status=error.status or None) from None
            except (CvatSdkException, OpenApiException, AssertionError, TypeError, ValueError, KeyError) as error:
                raise ServerError(f"the upload is answered as CVAT would not ({_reason(error)})") from None
        self.wait_for_data(task_id)

    def wait_for_data(self, task_id: int) -> None:
        """Wait until the server has made frames of what was sent to a task; at once when it remembers nothing.

        Raises:
            ServerError: it could not use what was sent.
        """
        with _naming(f"the images of task {task_id}"):
            which = {"action": "create", "target": "task", "task_id": task_id}
            for row in list(self._pages(self._api.requests_api.list_endpoint, **which)):
                self._wait(_text(row, "id"))

    # Webhooks

    def webhooks(self, project_id: int) -> list[Webhook]:
        """The webhooks of a project; those of its organisation are none of them."""
        with _naming(f"the webhooks of project {project_id}"):
            rows = self._pages(self._api.webhooks_api.list_endpoint, project_id=project_id)
            return [
                Webhook(
                    id=_int(row, "id"),
                    url=_text(row, "target_url"),
                    events=frozenset(str(event) for event in row.get("events") or ()),
                )
                for row in rows
                if row.get("type") == "project"
            ]

    def create_webhook(self, project_id: int, *, url: str, secret: str, events: Sequence[str]) -> int:
        """A new webhook of a project → its number.

        Args:
            project_id: the project.
            url: where it sends to.
            secret: that it signs with.
            events: what it tells of.

        Raises:
            ServerError: refused; or no answer came, and it may or may not be there.
        """
        body = {"target_url": url, "description": "SSCloud", "type": "project", "project_id": project_id}
        settings = {"content_type": "application/json", "secret": secret, "is_active": True, "enable_ssl": True}
        with _naming(f"a webhook of project {project_id}"):
            answer = self._send_json("POST", "/api/webhooks", {}, {**body, **settings, "events": list(events)})
            return _int(_object(answer, "webhook"), "id")

    def update_webhook(self, webhook_id: int, *, secret: str, events: Collection[str]) -> None:
        """Give a webhook a secret, have it tell of these events only, and switch it on."""
        body = {"secret": secret, "is_active": True, "events": sorted(events)}
        with _naming(f"webhook {webhook_id}"):
            self._send_json("PATCH", f"/api/webhooks/{webhook_id}", {}, body)

    def ping_webhook(self, webhook_id: int) -> int | None:
        """Have the server send a webhook's test message → the status that it got; None where it got none."""
        with _naming(f"webhook {webhook_id}"):
            answer = _object(self._send_json("POST", f"/api/webhooks/{webhook_id}/ping", {}, {}), "delivery")
            status = answer.get("status_code")
            return status if isinstance(status, int) else None

    # Serverless functions

    def functions(self) -> list[Function]:
        """The functions that CVAT lists.

        Raises:
            ServerError: CVAT cannot list them (one function with broken metadata is enough), or has no Nuclio.
        """
        with _naming("the list of functions"):
            rows = _rows(_json(self._get(self._api.lambda_api.list_functions_endpoint, attempts=2)), "functions")
            return [_function(row) for row in rows]

    def start_function(
        self, function: str, *, task: int, job: int, threshold: float | None, mapping: Mapping[str, Any]
    ) -> FunctionRun:
        """Press "Automatic annotation" for a job. What is in the job stays there.

        Args:
            function: its id.
            task: number of the job's task.
            job: the job's number.
            threshold: least confidence, 0 to 1.
            mapping: function label → `{"name": task label, "attributes": {function attribute: task attribute}}`.

        Raises:
            ServerError: refused; status 409 when a run for this task is under way.
        """
        # CVAT's cleanup empties the job when the run begins, hours after the question what is in there, perhaps.
        body: dict[str, Any] = {"function": function, "task": task, "job": job, "mapping": dict(mapping)}
        body["cleanup"] = False
        if threshold is not None:
            body["threshold"] = threshold
        with _naming(f"automatic annotation of job {job}"):
            return _function_run(_object(self._send_json("POST", "/api/lambda/requests", {}, body), "request"))

    def function_run(self, run_id: str) -> FunctionRun | None:
        """How a run is going; None when the server has forgotten it."""
        with _naming(f"automatic annotation {run_id}"):
            try:
                data = self._get(self._api.lambda_api.retrieve_requests_endpoint, id=run_id)
            except ServerError as error:
                if error.status == 404:
                    return None
                raise
            return _function_run(_object(data, "request"))

    def function_runs(self) -> list[FunctionRun]:
        """The runs that the server knows of."""
        with _naming("the runs of functions"):
            rows = _rows(_json(self._get(self._api.lambda_api.list_requests_endpoint)), "requests")
            return [_function_run(row) for row in rows]

    # Exports

    def export(
        self, path: Path, *, format_name: str, project_id: int | None = None, task_id: int | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Have the server write an archive with images, and download it.

        Args:
            path: file to write.
            format_name: as CVAT names it, with its version: `CVAT for images 1.1`.
            project_id: the project, or
            task_id: the task.
            on_bytes: told how many bytes have come, block by block; a negative count takes back a failed try.

        Raises:
            ServerError: refused, unknown format, or the export failed on the server.
        """
        api = self._api.projects_api if project_id is not None else self._api.tasks_api
        number = project_id if project_id is not None else task_id
        with _naming(f"the export {format_name!r} of {'project' if project_id is not None else 'task'} {number}"):
            # CVAT makes an archive that is asked for twice once, and answers 409 with its number: so a lost answer may
            # be asked for again.
            endpoint = api.create_dataset_export_endpoint
            answer = self._get(endpoint, accept=(409,), id=number, format=format_name, save_images=True)
            started = _object(answer, "request")
            url = self._wait_for_request(_text(started, "rq_id"))
            # On this server, whatever it calls itself: the credentials go nowhere else.
            place = urlsplit(url)
            address = self.url + place.path + (f"?{place.query}" if place.query else "")
            with path.open("wb") as sink:
                self._read(partial(self._open, address), sink=sink, max_bytes=MAX_ARCHIVE_BYTES, on_bytes=on_bytes)

    def event_log(self, task_id: int, *, patience: float = 30.0) -> bytes:
        """What CVAT's analytics has recorded of a task, as CSV; see `training.working_time`.

        Args:
            task_id: the task.
            patience: seconds until an export that does not end is given up.

        Raises:
            ServerError: the server has no analytics, this user may not see it, or it takes too long.
        """
        with _naming(f"the event log of task {task_id}"):
            # Without a beginning, newer servers give the last 30 days only.
            query = {"task_id": str(task_id), "from": "2000-01-01T00:00:00Z"}
            started = _object(self._send_json("POST", "/api/events/export", query, {}), "request")
            url = self._wait_for_request(_text(started, "rq_id"), patience=patience)
            place = urlsplit(url)
            address = self.url + place.path + (f"?{place.query}" if place.query else "")
            sink = io.BytesIO()
            self._read(partial(self._open, address), sink=sink, attempts=2, max_bytes=MAX_JSON_BYTES, on_bytes=None)
            return sink.getvalue()

    def _wait_for_request(self, request_id: str, *, patience: float = math.inf) -> str:
        """Where the result of a background request lies, when it has finished."""
        return _text(self._wait(request_id, patience=patience), "result_url")

    def _wait(self, request_id: str, *, patience: float = math.inf) -> dict[str, Any]:
        """What the server says of a background request that has finished."""
        pause, end = FIRST_PAUSE / 4, time.monotonic() + patience
        while True:
            request = _object(self._get(self._api.requests_api.retrieve_endpoint, id=request_id), "request")
            status = _text(request, "status")
            if status == "finished":
                return request
            if status == "failed":
                raise ServerError(f"it failed: {_name(request, 'message') or 'CVAT does not say why'}")
            if time.monotonic() > end:
                raise ServerError(f"it has not ended after {patience:.0f} s.")
            self._stopped.wait(pause)
            pause = min(pause * 1.5, 5.0)

    def _open(self, address: str) -> Any:
        headers = make_request_headers(self._api)
        return self._api.rest_client.GET(
            address, headers=headers, _parse_response=False, _check_status=False, _request_timeout=TIMEOUT
        )

    # HTTP

    def _get(
        self,
        endpoint: Any,
        *,
        attempts: int = ATTEMPTS,
        accept: Collection[int] = (),
        max_bytes: int = MAX_JSON_BYTES,
        on_bytes: Callable[[int], None] | None = None,
        **parameters: Any,
    ) -> bytes:
        def open_response() -> Any:
            _, response = endpoint.call_with_http_info(
                **parameters, _parse_response=False, _check_status=False, _request_timeout=TIMEOUT
            )
            return response

        sink = io.BytesIO()
        self._read(open_response, sink=sink, attempts=attempts, accept=accept, max_bytes=max_bytes, on_bytes=on_bytes)
        return sink.getvalue()

    def _read(
        self,
        open_response: Callable[[], Any],
        *,
        sink: BinaryIO,
        attempts: int = ATTEMPTS,
        accept: Collection[int] = (),
        max_bytes: int,
        on_bytes: Callable[[int], None] | None,
    ) -> None:
        """Read an answer of status 2xx, or of one in `accept`, to its end, as often as it takes within `attempts`."""
        for attempt in range(attempts):
            came = 0
            sink.seek(0)
            sink.truncate()
            try:
                with contextlib.closing(open_response()) as response:
                    good = 200 <= response.status <= 299 or response.status in accept
                    detail = bytearray()
                    for block in _blocks(response, max_bytes):
                        if self._stopped.is_set():
                            raise UnreachableError("stopped")
                        if good:
                            sink.write(block)
                        else:
                            detail += block[: MAX_DETAIL_BYTES - len(detail)]
                        if good and on_bytes:
                            came += len(block)
                            on_bytes(len(block))
                if good:
                    return
                error = _refused(response.status, bytes(detail))
                pause = _retry_after(response.headers.get("Retry-After"))
            except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as problem:
                error, pause = UnreachableError(f"no answer ({_reason(problem)})"), None
            except ApiException as problem:  # TLS
                raise UnreachableError(_reason(problem)) from None
            if came and on_bytes:
                on_bytes(-came)
            waited = isinstance(error, UnreachableError) or error.status in TRANSIENT
            if not waited or attempt == attempts - 1 or self._stopped.is_set():
                raise error
            pause = pause if pause is not None else FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)  # noqa: S311
            log.info("%s: %s; trying again in %.1f s", self.url, error, pause)
            self._stopped.wait(min(pause, LONGEST_PAUSE))

    def _pages(self, endpoint: Any, **parameters: Any) -> Iterator[dict[str, Any]]:
        for page in range(1, MAX_PAGES + 1):
            data = _object(self._get(endpoint, **parameters, page=page, page_size=PAGE_SIZE), "page")
            yield from _list(data, "results")
            if not data.get("next"):
                return
        raise ServerError(f"a list has more than {MAX_PAGES} pages.")

    def _send_json(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None) -> bytes:
        headers = self._api.get_common_headers()
        self._api.update_params_for_auth(headers=headers, queries=[], method=method)
        try:
            response = self._api.rest_client.request(
                method,
                self.url + path,
                query_params=list(query.items()),
                headers=headers,
                body=None if body is None else dict(body),
                _request_timeout=TIMEOUT,
                _check_status=False,
            )
        except (urllib3.exceptions.HTTPError, OSError, ApiException) as error:
            raise UnreachableError(f"no answer ({_reason(error)})") from None
        if not 200 <= response.status <= 299:
            raise _refused(response.status, response.data)
        data: bytes = response.data
        return data


class _Lines:
    """The connections to a server, to be cut while other threads wait on them: a read has no other end than its answer.

    Args:
        stopped: set when connections are to be cut, new ones too.
    """

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._open: weakref.WeakSet[urllib3.connection.HTTPConnection] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, manager: urllib3.PoolManager) -> None:
        """Take note of every connection that a pool manager makes from now on."""

        def connection_class(base: type[Any]) -> type[Any]:
            lines = self

            class Noted(base):  # type: ignore[misc]
                def connect(self) -> None:
                    super().connect()
                    lines._note(self)

            return Noted

        def pool_class(base: type[Any]) -> type[Any]:
            return type(base.__name__, (base,), {"ConnectionCls": connection_class(base.ConnectionCls)})

        manager.pool_classes_by_scheme = {
            scheme: pool_class(base) for scheme, base in manager.pool_classes_by_scheme.items()
        }

    def _note(self, connection: "urllib3.connection.HTTPConnection") -> None:
        with self._lock:
            self._open.add(connection)
        if self._stopped.is_set():
            _hang_up(connection)

    def cut(self) -> None:
        """Hang up. Idle connections are lost as well; the next request makes a new one."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            _hang_up(connection)


def _hang_up(connection: "urllib3.connection.HTTPConnection") -> None:
    line = connection.sock
    if isinstance(line, socket.socket):
        with contextlib.suppress(OSError):
            # Not the method of a TLS socket: it would take away the cipher from the thread that is reading.
            socket.socket.shutdown(line, socket.SHUT_RDWR)


def _check_address(url: str) -> None:
    """Refuse an address that carries secrets: it is shown in messages and written into manifests.

    Raises:
        ConfigError: it does, or it is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        parts.port  # noqa: B018 - raises for what is no number
    except ValueError as error:
        raise ConfigError("CVAT_URL is no address. Set http://HOST:PORT or https://HOST.") from error
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "CVAT_URL holds more than an address (a name, a password, or what follows ? or #). Set http://HOST:PORT "
            "or https://HOST; who logs in is said by CVAT_ACCESS_TOKEN, or by CVAT_USERNAME and CVAT_PASSWORD."
        )


def _blocks(response: Any, max_bytes: int) -> Iterator[bytes]:
    total = 0
    while block := response.read(_BLOCK):
        total += len(block)
        if total > max_bytes:
            raise ServerError(f"the answer is longer than {max_bytes} bytes.", status=response.status)
        yield block


def _refused(status: int, body: bytes) -> ServerError:
    """An error with what the server says about it; never headers, which hold cookies."""
    detail: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        detail = json.loads(body)
    if isinstance(detail, dict):
        detail = detail.get("detail") or detail.get("message") or detail.get("non_field_errors") or detail
    text = re.sub(r"[^ -~\w]+", " ", str(detail)).strip()[:300] if detail else ""
    meaning = {
        401: "not logged in, or the access token is not valid any more",
        403: "this user may not do that (is it in the right organisation? CVAT_ORGANIZATION)",
        404: "there is none that this user can see (another number, or another organisation: CVAT_ORGANIZATION)",
        409: "something is under way there already",
        413: "too large for the server",
        429: "the server asks for a pause",
    }.get(status, "the server failed" if status >= 500 else "refused")
    return ServerError(f"{meaning} (HTTP {status}{': ' + text if text else ''})", status=status)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; a date there means no more than the usual pause."""
    return float(value) if value and re.fullmatch(r"\d{1,6}", value) else None


def _reason(error: BaseException) -> str:
    """An exception in a line, without headers and without the address of an object."""
    if isinstance(error, ApiException):
        body = error.body if isinstance(error.body, bytes) else b""
        return str(_refused(error.status, body)) if error.status else str(error.reason).replace("\n", ": ")
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    text = re.sub(r"<[^>]*>|\(host=[^)]*\)", "", str(error)).strip(" :,")
    return re.sub(r"\s+", " ", text)[:200] or type(error).__name__


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say what was being read or written when the server failed."""
    try:
        yield
    except ServerError as error:
        raise type(error)(f"CVAT, {what}: {error}", status=error.status) from error.__cause__


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ServerError(
            f"the answer is not JSON ({data[:40]!r}…). Is CVAT_URL the address of CVAT itself, without a path?"
        ) from error


def _object(data: bytes, what: str) -> dict[str, Any]:
    found = _json(data)
    if not isinstance(found, dict):
        raise ServerError(f"the answer is no {what}, but {str(found)[:80]!r}.")
    return found


def _rows(found: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ServerError(f"the answer is no list of {what}, but {str(found)[:80]!r}.")
    return found


def _list(row: Mapping[str, Any], key: str, of: type | None = dict) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list) or (of is not None and not all(isinstance(entry, of) for entry in value)):
        raise ServerError(f"the answer has no usable list {key!r}, but {str(value)[:80]!r}.")
    return value


def _check_shape(shape: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[a-z_0-9]{1,40}", _text(shape, "type")):
        raise ServerError(f"the answer has a shape of type {_text(shape, 'type')[:40]!r}.")
    _int(shape, "id"), _int(shape, "frame"), _int(shape, "label_id"), _list(shape, "points", of=None)
    for attribute in _list({"attributes": shape.get("attributes") or []}, "attributes"):
        _int(attribute, "spec_id"), _text(attribute, "value")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ServerError(f"the answer has no text {key!r}, but {str(value)[:80]!r}.")
    return value


def _name(row: Mapping[str, Any], key: str) -> str:
    """A text that ends up in messages: what a terminal would obey is replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in _text(row, key))


def _int(row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ServerError(f"the answer has no whole number {key!r}, but {str(value)[:80]!r}.")
    return value


def _optional_int(row: Mapping[str, Any], key: str) -> int | None:
    return None if row.get(key) is None else _int(row, key)


def _numbers(row: Mapping[str, Any], key: str) -> frozenset[int]:
    values = _list(row, key, of=int)
    return frozenset(values)


def _project(row: Mapping[str, Any]) -> Project:
    return Project(id=_int(row, "id"), name=_name(row, "name"))


def _task(row: Mapping[str, Any]) -> Task:
    return Task(
        id=_int(row, "id"),
        name=_name(row, "name"),
        project_id=_optional_int(row, "project_id"),
        size=_optional_int(row, "size") or 0,
        images=row.get("mode") != "interpolation" and row.get("dimension") != "3d",
        updated=_text(row, "updated_date"),
    )


def _job(row: Mapping[str, Any]) -> Job:
    return Job(
        id=_int(row, "id"),
        task_id=_int(row, "task_id"),
        project_id=_optional_int(row, "project_id"),
        type=_text(row, "type"),
        state=_text(row, "state"),
        stage=_text(row, "stage"),
        start=_int(row, "start_frame"),
        stop=_int(row, "stop_frame"),
        updated=_text(row, "updated_date"),
        assignee=_username(row.get("assignee")),
    )


def _username(user: Any) -> str | None:
    return _name(user, "username") if isinstance(user, dict) else None


def _label(row: Mapping[str, Any]) -> ProjectLabel:
    attributes = _list({"of": row.get("attributes") or []}, "of")
    return ProjectLabel(
        id=_int(row, "id"),
        name=_name(row, "name"),
        color=row["color"] if isinstance(row.get("color"), str) else "",
        type=row["type"] if isinstance(row.get("type"), str) else "any",
        attributes={_text(attribute, "name"): _int(attribute, "id") for attribute in attributes},
        text_attributes=frozenset(_text(a, "name") for a in attributes if a.get("input_type") == "text"),
        defaults={_int(a, "id"): str(a.get("default_value") or "") for a in attributes},
    )


def _function(row: Mapping[str, Any]) -> Function:
    labels = {}
    for label in row.get("labels_v2") or []:
        if isinstance(label, dict):
            attributes = [a for a in label.get("attributes") or [] if isinstance(a, dict)]
            labels[_name(label, "name")] = frozenset(_text(attribute, "name") for attribute in attributes)
    version = row.get("version")
    return Function(
        id=_text(row, "id"),
        name=_name(row, "name"),
        kind=row["kind"] if isinstance(row.get("kind"), str) else "",
        version=version if isinstance(version, int) else None,
        labels=labels,
    )


def _function_run(row: Mapping[str, Any]) -> FunctionRun:
    # Others mean that it waits (deferred, scheduled), or that somebody has stopped it.
    status = {"started": "started", "finished": "finished"}
    status |= dict.fromkeys(("failed", "stopped", "canceled"), "failed")
    found = str(row.get("status"))
    what = row.get("function")
    what = what if isinstance(what, dict) else {}
    lines = [line for line in str(row.get("exc_info") or "").strip().splitlines() if line.strip()]
    return FunctionRun(
        id=_text(row, "id"),
        status=status.get(found, "queued"),  # type: ignore[arg-type]
        progress=row["progress"] if isinstance(row.get("progress"), int) else 0,
        enqueued=str(row.get("enqueued") or ""),
        ended=str(row.get("ended") or ""),
        error=lines[-1].strip()[:300] if lines else found,
        function=str(what.get("id", "")),
        task=_optional_int(what, "task"),
        job=_optional_int(what, "job"),
    )


def parse_version(text: str) -> tuple[int, int]:
    """The first two numbers of a server's version; zeros where there are none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
