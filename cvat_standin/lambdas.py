"""Automatic annotation: Nuclio functions as CVAT lists, calls and believes them (cvat/apps/lambda_manager)."""

import base64
import json
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from cvat_standin.state import Job, Json, Label, RefusedError, Store, Task

Handler = Callable[[bytes, Json], list[Json]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function in the memory of the stand-in, deployed as far as CVAT can tell."""

    id: str
    labels: Sequence[str | Mapping[str, Any]]
    """Names, or entries of the label spec: {"name", "type", "attributes": [{"name", "input_type", "values"}]}."""
    handler: Handler
    """Takes the image's bytes and the whole payload, gives the results; what it raises becomes a status of 500."""
    version: Any = 1
    """Anything but an integer breaks the list of functions for everybody."""
    kind: str = "detector"
    name: str | None = None
    description: str | None = "A function of the stand-in."
    """None: broken as well."""

    def metadata(self) -> Json:
        """What Nuclio's dashboard tells about it."""
        spec = [{"name": label, "type": "mask"} if isinstance(label, str) else dict(label) for label in self.labels]
        annotations = {"name": self.name or self.id, "type": self.kind, "version": str(self.version)}
        return {
            "metadata": {"name": self.id, "annotations": {**annotations, "spec": json.dumps(spec)}},
            "spec": {} if self.description is None else {"description": self.description},
            "status": {"state": "ready", "httpPort": 32001},
        }


@dataclass(slots=True, kw_only=True)
class Run:
    """A request for automatic annotation."""

    id: str
    function: str
    task_id: int
    job_id: int | None
    threshold: float | None
    enqueued: datetime
    status: str = "queued"
    progress: int = 0
    started: datetime | None = None
    ended: datetime | None = None
    error: str | None = None
    thread: threading.Thread | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> Json:
        """As the API tells it."""
        function: Json = {"id": self.function, "threshold": self.threshold, "task": self.task_id}
        if self.job_id is not None:
            function["job"] = self.job_id
        dates = {
            name: None if value is None else value.isoformat()
            for name, value in (("enqueued", self.enqueued), ("started", self.started), ("ended", self.ended))
        }
        return {
            "id": self.id,
            "function": function,
            "status": self.status,
            "progress": self.progress,
            "exc_info": self.error,
            **dates,
        }


class Lambdas:
    """The functions and the runs."""

    def __init__(self, store: Store) -> None:
        self.nuclio_url: str | None = None
        self.timeout = 30.0
        self.functions: dict[str, Function] = {}
        self.runs: dict[str, Run] = {}
        self._store = store

    def describe_all(self) -> list[Json]:
        """All functions, as the API lists them.

        Raises:
            RefusedError: 500 when the metadata of one of them is not as CVAT needs it, 503 without a dashboard.
        """
        found = {name: function.metadata() for name, function in self.functions.items()}
        if self.nuclio_url is not None:
            found |= self._ask("/api/functions")
        listed = []
        for data in found.values():
            try:
                listed.append(_described(_parse(data)))
            except _BadMetadataError:
                continue  # CVAT writes a line to its log
        return listed

    def get(self, name: str) -> Json:
        """One function's parsed metadata.

        Raises:
            RefusedError: 404, or as `describe_all`.
        """
        if name in self.functions:
            data = self.functions[name].metadata()
        elif self.nuclio_url is None:
            raise RefusedError(404, f"404 Client Error: Not Found for url: http://nuclio:8070/api/functions/{name}")
        else:
            data = self._ask(f"/api/functions/{name}")
        try:
            return _parse(data)
        except _BadMetadataError as error:
            raise RefusedError(500, None) from error

    def describe(self, name: str) -> Json:
        """One function, as the API tells it."""
        return _described(self.get(name))

    def call(self, name: str, body: Json) -> list[Json]:
        """One frame, now.

        Raises:
            RefusedError: wrong arguments, or the function failed.
        """
        with self._store.lock:
            job = self._store.jobs.get(body["job"]) if body.get("job") is not None else None
            task = self._store.tasks.get(job.task_id if job else body.get("task", -1))
        if task is None or (body.get("job") is not None and job is None):
            raise RefusedError(400, f"`{name}` lambda function was run with wrong arguments")
        if body.get("frame") is None:
            raise RefusedError(400, f"`{name}` lambda function was called without mandatory argument: frame")
        mapping, threshold = body.get("mapping"), body.get("threshold")
        return self._invoke(self.get(name), task, job, int(body["frame"]), mapping=mapping, threshold=threshold)

    def start(self, body: Json) -> Run:
        """A run over a task or a job, in a thread.

        Raises:
            RefusedError: wrong arguments, no such function, 409 while another run works on the task.
        """
        if missing := [key for key in ("function", "task") if body.get(key) in (None, "")]:
            raise RefusedError(400, {key: ["This field is required."] for key in missing})
        function = self.get(body["function"])
        store = self._store
        with store.lock:
            task = store.tasks.get(body["task"])
            job = store.jobs.get(body["job"]) if body.get("job") is not None else None
            if task is None or (body.get("job") is not None and job is None):
                raise RefusedError(
                    400, "Job matching query does not exist." if task else "Task matching query does not exist."
                )
            key = f"action=autoannotate&target=task&id={task.id}"
            old = self.runs.get(key)
            if old is not None and old.status not in ("finished", "failed"):
                raise RefusedError(409, f"Only one running request is allowed for the same task #{task.id}")
            run = Run(
                id=key,
                function=body["function"],
                task_id=task.id,
                job_id=None if job is None else job.id,
                threshold=body.get("threshold"),
                enqueued=store.now(),
            )
            self.runs[key] = run
        work = threading.Thread(target=self._run, args=(run, function, task, job, dict(body)), daemon=True)
        run.thread = work
        work.start()
        return run

    def cancel(self, run_id: str) -> None:
        """Forget a run; it ends after the frame that it works on.

        Raises:
            RefusedError: no such run.
        """
        run = self.find(run_id)
        run.cancelled.set()
        del self.runs[run_id]

    def find(self, run_id: str) -> Run:
        """The run of this id.

        Raises:
            RefusedError: no such run.
        """
        if run_id not in self.runs:
            raise RefusedError(404, f"{run_id} lambda job is not found")
        return self.runs[run_id]

    def stop(self) -> None:
        """End the runs."""
        for run in list(self.runs.values()):
            run.cancelled.set()
            if run.thread is not None:
                run.thread.join(self.timeout)

    def _run(self, run: Run, function: Json, task: Task, job: Job | None, body: Json) -> None:
        store = self._store
        run.started = store.now()
        run.status = "started"
        try:
            with store.lock:
                jobs = [job] if job is not None else _annotation_jobs(store, task)
                if body.get("cleanup"):
                    store.clear(jobs)
                labels = {label.name: label for label in store.labels_of_task(task)}
                frames = range(len(task.frames)) if job is None else job.frames
            results: list[Json] = []

            def submit() -> None:
                with store.lock:
                    store.write(jobs, {"shapes": results}, "create", by_frame=job is None)
                results.clear()

            for frame in frames:
                if frame in task.deleted:
                    continue
                found = self._invoke(
                    function, task, job, frame, mapping=body.get("mapping"), threshold=body.get("threshold")
                )
                run.progress = int((frame + 1) / len(task.frames) * 100)
                if run.cancelled.is_set():
                    break
                convert = bool(body.get("conv_mask_to_poly", body.get("convMaskToPoly", False)))
                results += [_shape(item, frame, labels[item["label"]], convert=convert) for item in found]
                if frame and frame % 100 == 0:
                    submit()
            if results:
                submit()
        except RefusedError as error:
            run.error = f"Traceback (most recent call last):\n  …\n{_words(error)}\n"
        except Exception:  # whatever the function sent: a worker of CVAT survives it
            run.error = traceback.format_exc()
        run.ended = store.now()
        run.status = "finished" if run.error is None else "failed"

    def _invoke(
        self,
        function: Json,
        task: Task,
        job: Job | None,
        frame: int,
        *,
        mapping: Mapping[str, Json] | None,
        threshold: float | None,
    ) -> list[Json]:
        """Call the function for a frame; its results with the labels of the task."""
        with self._store.lock:
            labels = self._store.labels_of_task(task)
            if job is not None and (job.task_id != task.id or frame not in job.frames):
                raise RefusedError(400, "The frame is outside the job range")
            if not 0 <= frame < len(task.frames):
                raise RefusedError(400, f"Invalid frame number: {frame}")
            image = task.frames[frame].data
        known = _mapping(function["labels"], labels, mapping)
        payload: Json = {"threshold": threshold} if threshold else {}
        payload["image"] = base64.b64encode(image).decode()
        kept = []
        for item in self._results(function["id"], image, payload):
            if item["label"] not in known:
                continue
            label, attributes = known[item["label"]]
            kept.append({**item, "label": label.name, "attributes": _attributes(item, label, attributes)})
        return kept

    def _results(self, name: str, image: bytes, payload: Json) -> list[Json]:
        if name not in self.functions:
            headers = {"x-nuclio-function-name": name, "x-nuclio-path": "/"}
            answer: list[Json] = self._ask("/api/function_invocations", payload, headers)
            return answer
        try:
            # Through JSON, as over the wire: what cannot be sent is an error here too.
            return list(json.loads(json.dumps(self.functions[name].handler(image, json.loads(json.dumps(payload))))))
        except Exception as error:
            url = "http://nuclio:8070/api/function_invocations"
            raise RefusedError(500, f"500 Server Error: Internal Server Error for url: {url}") from error

    def _ask(self, path: str, data: Json | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """Nuclio's dashboard: GET, or POST with data → the parsed reply."""
        url = f"{self.nuclio_url}{path}"
        request = Request(
            url,
            data=None if data is None else json.dumps(data).encode(),
            headers={
                "Content-Type": "application/json",
                "x-nuclio-project-name": "cvat",
                "x-nuclio-function-namespace": "nuclio",
                "x-nuclio-invoke-via": "domain-name",
                "X-Nuclio-Invoke-Timeout": f"{self.timeout:g}s",
                **(headers or {}),
            },
        )
        try:
            with urlopen(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except HTTPError as error:
            with error:
                kind = "Client" if error.code < 500 else "Server"
                raise RefusedError(error.code, f"{error.code} {kind} Error: {error.reason} for url: {url}") from error
        except TimeoutError as error:
            raise RefusedError(504, f"HTTPConnectionPool: Read timed out. (read timeout={self.timeout:g})") from error
        except (URLError, ConnectionError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise RefusedError(504, f"Connection to {url} timed out") from error
            raise RefusedError(503, f"HTTPConnectionPool: Max retries exceeded with url: {path} ({error})") from error
        except ValueError as error:
            raise RefusedError(500, f"Expecting value: {error}") from error


class _BadMetadataError(Exception):
    """Metadata that make CVAT leave the function out; others break the list."""


def _parse(data: Json) -> Json:
    """What CVAT reads from Nuclio's reply; a KeyError or ValueError here is its status 500."""
    try:
        name, notes = data["metadata"]["name"], data["metadata"]["annotations"]
        if notes.get("type") not in ("detector", "interactor", "reid", "tracker"):
            raise _BadMetadataError(name)
        labels = []
        for entry in json.loads(notes.get("spec") or "[]"):
            attributes = [
                {"name": value["name"], "input_type": value["input_type"], "values": value["values"]}
                for value in entry.get("attributes", [])
            ]
            if len({value["name"] for value in attributes}) != len(attributes):
                raise _BadMetadataError(name)
            labels.append({"name": entry["name"], "type": entry.get("type", "unknown"), "attributes": attributes})
        if len({label["name"] for label in labels}) != len(labels):
            raise _BadMetadataError(name)
        return {
            "id": name,
            "kind": notes["type"],
            "labels": labels,
            "description": data["spec"]["description"],
            "name": notes.get("name", name),
            "version": int(notes.get("version", "1")),
            "port": data["status"].get("httpPort"),
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RefusedError(500, None) from error


def _described(parsed: Json) -> Json:
    described = {key: parsed[key] for key in ("id", "kind", "description", "name", "version")}
    return {**described, "labels_v2": parsed["labels"]}


def _compatible(model_type: str, label: Label) -> bool:
    both = {model_type, label.type}
    return (
        len(both) == 1
        or (label.type == "any" and model_type != "skeleton")
        or (model_type == "unknown" and label.type != "skeleton")
        or both == {"mask", "polygon"}
    )


def _mapping(
    model: Sequence[Json], labels: Sequence[Label], given: Mapping[str, Json] | None
) -> dict[str, tuple[Label, dict[str, str]]]:
    """Model label → (task label, model attribute → task attribute).

    Raises:
        RefusedError: the given mapping names labels or attributes that do not exist, or that cannot meet.
    """
    by_name = {label.name: label for label in labels}
    by_model = {entry["name"]: entry for entry in model}
    if not given:
        return {
            name: (by_name[name], _same_names(entry, by_name[name]))
            for name, entry in by_model.items()
            if name in by_name and _compatible(entry["type"], by_name[name])
        }
    known = {}
    for name, target in given.items():
        if name not in by_model:
            raise RefusedError(400, f'Invalid mapping. Unknown model label "{name}"')
        label = by_name.get(target["name"])
        if label is None:
            raise RefusedError(400, f'Invalid mapping. Unknown db label "{target["name"]}"')
        if not _compatible(by_model[name]["type"], label):
            raise RefusedError(
                400, f'Invalid mapping. Model label "{name}" and database label "{label.name}" are not compatible'
            )
        attributes = dict(target.get("attributes") or {})
        for source, destination in attributes.items():
            if source not in {value["name"] for value in by_model[name]["attributes"]}:
                raise RefusedError(400, f'Invalid mapping. Unknown model attribute "{source}"')
            if destination not in {value.name for value in label.attributes}:
                raise RefusedError(400, f'Invalid mapping. Unknown db attribute "{destination}"')
        known[name] = (label, attributes)
    return known


def _same_names(entry: Json, label: Label) -> dict[str, str]:
    declared = {value.name for value in label.attributes}
    return {value["name"]: value["name"] for value in entry["attributes"] if value["name"] in declared}


def _attributes(item: Json, label: Label, mapping: Mapping[str, str]) -> list[Json]:
    by_name = {value.name: value for value in label.attributes}
    kept = []
    for value in item.get("attributes", []):
        target = by_name.get(mapping.get(value["name"], ""))
        if target is None:
            continue
        text = value["value"]
        fits = {
            "number": text.isnumeric(),
            "checkbox": text in ("true", "false"),
            "text": True,
            "select": text in target.values,
            "radio": text in target.values,
        }
        if fits[target.input_type]:
            kept.append({"name": target.name, "value": text})
    return kept


def _shape(item: Json, frame: int, label: Label, *, convert: bool) -> Json:
    """A result of a function as it is stored."""
    specs = {attribute.name: attribute.id for attribute in label.attributes}
    kind = item["type"]
    points = item.get("mask", []) if kind == "mask" else item.get("points", [])
    if kind == "mask" and "points" in item and convert:
        kind, points = "polygon", item["points"]
    elif kind == "mask":
        points = [*_run_lengths(points[:-4]), *points[-4:]]
    return {
        "type": kind,
        "frame": frame,
        "label_id": label.id,
        "source": "auto",
        "group": item.get("group_id"),
        "outside": item.get("outside", False),
        "rotation": item.get("rotation", 0) if kind in ("rectangle", "ellipse") else 0,
        "points": points,
        "z_order": 0,
        "attributes": [{"spec_id": specs[value["name"]], "value": value["value"]} for value in item["attributes"]],
    }


def _run_lengths(pixels: Sequence[int]) -> list[int]:
    """Lengths of the runs of equal pixels, the first of zeros."""
    runs, current, length = [], 0, 0
    for pixel in pixels:
        if pixel != current:
            runs.append(length)
            current, length = pixel, 0
        length += 1
    return [*runs, length]


def _annotation_jobs(store: Store, task: Task) -> list[Job]:
    return sorted((job for job in store.jobs_of(task.id) if job.type == "annotation"), key=lambda job: job.start)


def _words(error: RefusedError) -> str:
    name = "requests.exceptions.HTTPError" if isinstance(error.content, str) else "ValidationError"
    return f"{name}: {error.content}"
