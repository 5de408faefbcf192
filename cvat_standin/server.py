"""The stand-in: a server in a thread, and the control that tests have over it."""

import copy
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import uvicorn

from cvat_standin.api import job_message, make_app
from cvat_standin.faults import Fault, FaultBook, FaultyServer, Logged
from cvat_standin.lambdas import Function, Lambdas
from cvat_standin.site import Site
from cvat_standin.state import Job, Json, RefusedError, Store
from cvat_standin.webhooks import Deliveries

_START_SECONDS = 30.0


class CvatStandin:
    """A CVAT server of its own; the module's docstring has the whole interface."""

    def __init__(self, *, port: int = 0) -> None:
        """Bind the port (0: any free one); the server answers after `start`."""
        self.version = "2.73.0"
        self.page_size = 10
        self.largest_page = 500
        self.polls_until_done = 1
        self.chunk_size = 36
        self.access_token = f"token-{uuid.uuid4().hex}"
        self.started = datetime.now(UTC)
        self.store = Store()
        self.lambdas = Lambdas(self.store)
        self.deliveries = Deliveries()
        self.sessions: dict[str, str] = {}
        self._book = FaultBook()
        # asyncio turns Nagle's algorithm off for sockets that name their protocol only: 40 ms a reply otherwise.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.site = Site(url=self.url, username="annotator", password=f"password-{uuid.uuid4().hex}")
        config = uvicorn.Config(
            FaultyServer(make_app(self), self._book),
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> Self:
        """Serve, in a thread.

        Raises:
            RuntimeError: it did not start.
        """
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"The stand-in on {self.url} does not start.")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Hang up and end the thread; a second time does nothing."""
        self.lambdas.stop()
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def nuclio_url(self) -> str | None:
        """Address of the Nuclio dashboard whose functions are offered; None: those of `add_function` only."""
        return self.lambdas.nuclio_url

    @nuclio_url.setter
    def nuclio_url(self, url: str | None) -> None:
        self.lambdas.nuclio_url = None if url is None else url.rstrip("/")

    @property
    def dashboard_timeout(self) -> float:
        """Seconds that a function may take for a frame."""
        return self.lambdas.timeout

    @dashboard_timeout.setter
    def dashboard_timeout(self, seconds: float) -> None:
        self.lambdas.timeout = seconds

    # Faults and the log

    def fail(
        self,
        method: str,
        path: str,
        fault: Fault,
        *,
        times: int | None = 1,
        skip: int = 0,
        before: bool = False,
        query: dict[str, str] | None = None,
    ) -> None:
        """Let requests fail.

        Args:
            method: GET, POST, …, or * for all.
            path: a regular expression, searched in the path (without the query).
            fault: what happens.
            times: how often; None: until `heal`.
            skip: how many matching requests pass before.
            before: the server does not do what it is asked. Without: it does, only the reply is spoilt.
            query: parameters that the request must have.
        """
        self._book.plan(method, path, fault, times=times, skip=skip, before=before, query=query or {})

    def heal(self) -> None:
        """No more faults."""
        self._book.clear()

    @property
    def log(self) -> list[Logged]:
        """The requests so far, in the order in which their replies ended (a copy)."""
        return list(self._book.log)

    def count(self, method: str, path: str, **query: str) -> int:
        """How many requests had this method, a path with this pattern, and these parameters."""
        return len(self.find(method, path, **query))

    def find(self, method: str, path: str, **query: str) -> list[Logged]:
        """The requests of the log that `count` counts."""
        return self._book.find(method, path, query)

    def forget(self) -> None:
        """Empty the log."""
        self._book.log.clear()

    # What others do meanwhile

    def shapes(self, job_id: int) -> list[Json]:
        """A job's shapes, as the API lists them (copies)."""
        with self.store.lock:
            found: list[Json] = self.store.annotations([self.store.job(job_id)])["shapes"]
        return found

    def set_shape_order(self, job_id: int, ids: Sequence[int]) -> None:
        """The order in which the API lists a job's shapes within a frame; dates stay."""
        with self.store.lock:
            job = self.store.job(job_id)
            by_id = {shape["id"]: shape for shape in job.shapes}
            if sorted(by_id) != sorted(ids):
                raise ValueError(f"Job {job_id} has the shapes {sorted(by_id)}, not {sorted(ids)}.")
            job.shapes = [by_id[key] for key in ids]

    def edit_shape(self, shape_id: int, **fields: Any) -> None:
        """A person's edit: these fields change, all others (`source` too) and the id stay, dates move on."""
        with self.store.lock:
            for job in self.store.jobs.values():
                for shape in job.shapes:
                    if shape["id"] == shape_id:
                        shape.update(copy.deepcopy(fields))
                        self.store.touch(job)
                        return
        raise ValueError(f"There is no shape {shape_id}.")

    def make_replicas(self, job_id: int, count: int) -> list[int]:
        """Consensus replicas of an annotation job → their ids."""
        with self.store.lock:
            job = self.store.job(job_id)
            task = self.store.tasks[job.task_id]
            task.replicas = count
            return [
                self.store.add_job(task, job.start, job.stop, type="consensus_replica", parent_id=job.id).id
                for _ in range(count)
            ]

    def set_job(self, job_id: int, *, state: str | None = None, stage: str | None = None) -> None:
        """Set a job's state and stage, as a person would."""
        with self.store.lock:
            self.change_job(self.store.job(job_id), state=state, stage=stage)

    def change_job(self, job: Job, *, state: str | None, stage: str | None) -> None:
        """Set a job's state and stage; a new stage alone starts with the state "new".

        Raises:
            RefusedError: no such state or stage.
        """
        if state is not None and state not in ("new", "in progress", "completed", "rejected"):
            raise RefusedError(400, {"state": [f'"{state}" is not a valid choice.']})
        if stage is not None and stage not in ("annotation", "validation", "acceptance"):
            raise RefusedError(400, {"stage": [f'"{stage}" is not a valid choice.']})
        if stage is not None and stage != job.stage and state is None:
            state = "new"
        before = {"stage": job.stage, "state": job.state}
        job.stage, job.state = stage or job.stage, state or job.state
        if job.stage == "annotation":
            job.status = "annotation"
        else:
            job.status = "completed" if (job.stage, job.state) == ("acceptance", "completed") else "validation"
        job.updated = self.store.now()
        changed = {name: value for name, value in before.items() if getattr(job, name) != value}
        if changed:
            self._tell(job, changed)

    def _tell(self, job: Job, before: Json) -> None:
        """Send the webhooks that are for it what has changed in a job."""
        task = self.store.tasks[job.task_id]
        for webhook in self.store.webhooks.values():
            ours = (
                webhook.project_id == task.project_id
                if webhook.type == "project"
                else (webhook.organization == task.organization)
            )
            if ours and webhook.is_active and "update:job" in webhook.events:
                self.deliveries.send_later(webhook, job_message(self, job, before=before, webhook_id=webhook.id))

    def rename_frame(self, task_id: int, frame: int, name: str) -> None:
        """Give a frame a name that no upload would get through."""
        with self.store.lock:
            self.store.task(task_id).frames[frame].name = name

    def replace_frame(self, task_id: int, frame: int, data: bytes) -> None:
        """Other bytes for a frame; name and size stay as they are listed."""
        with self.store.lock:
            self.store.task(task_id).frames[frame].data = data

    def add_organization(self, slug: str) -> int:
        """An organisation → its id."""
        with self.store.lock:
            key = self.store.new_id("organization")
            self.store.organizations[key] = slug
        return key

    def add_export(self, kind: str, object_id: int, format_name: str, archive: bytes) -> None:
        """What exports of a project, task or job in a format give; without it they fail."""
        with self.store.lock:
            self.store.exports[kind, object_id, format_name] = archive

    def add_function(self, function: Function) -> None:
        """Deploy a function in memory, in place of one with the same id."""
        self.lambdas.functions[function.id] = function
