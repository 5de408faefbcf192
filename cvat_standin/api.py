"""The endpoints: what is asked → what CVAT would answer."""

import base64
import binascii
import io
import json
import mimetypes
import re
import uuid
import zipfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cvat_standin.state import (
    Background,
    Frame,
    Issue,
    Job,
    Json,
    Label,
    Project,
    RefusedError,
    Task,
    Upload,
    Webhook,
    not_found,
)

if TYPE_CHECKING:
    from cvat_standin.server import CvatStandin

_CONTENT_TYPE = "application/vnd.cvat+json"
_TUS = {"Tus-Resumable": "1.0.0", "Tus-Version": "1.0.0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request."""

    server: "CvatStandin"
    method: str
    base: str
    """Scheme and host as the client wrote them."""
    path: str
    ids: Mapping[str, Any]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    cookies: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        """The body, which must be a JSON object."""
        if not self.body:
            return {}
        try:
            content = json.loads(self.body)
        except ValueError as error:
            raise RefusedError(400, {"detail": f"JSON parse error - {error}"}) from error
        if not isinstance(content, dict):
            raise RefusedError(400, {"non_field_errors": ["Invalid data. Expected a dictionary."]})
        return content

    def url(self, path: str) -> str:
        """An absolute address of this server."""
        return f"{self.base}{path}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back: JSON, or bytes as they are."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = _CONTENT_TYPE

    def response(self) -> Response:
        """As the web framework sends it."""
        body = self.content
        if body is None:
            body = b""
        elif not isinstance(body, bytes):
            body = json.dumps(body, ensure_ascii=False).encode()
        return Response(body, self.status, dict(self.headers), self.media_type if body else None)


Handler = Callable[[Call], Reply]


def make_app(server: "CvatStandin") -> Starlette:
    """The web application over the state of a stand-in."""

    def endpoint(handlers: Mapping[str, Handler], *, public: bool) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            call = Call(
                server=server,
                method=request.method,
                base=f"{request.url.scheme}://{request.url.netloc}",
                path=request.url.path,
                ids=request.path_params,
                query=dict(request.query_params),
                headers={key.lower(): value for key, value in request.headers.items()},
                cookies=request.cookies,
                body=await request.body(),
            )

            def work() -> Response:
                try:
                    if not public:
                        _authenticate(call)
                    reply = handlers.get(request.method, handlers[next(iter(handlers))])(call)
                except RefusedError as refused:
                    if refused.content is None:
                        page = b"\n<!doctype html>\n<html><body><h1>Server Error (500)</h1></body></html>\n"
                        return Response(page, refused.status, media_type="text/html")
                    reply = Reply(refused.content, refused.status)
                return reply.response()

            return await run_in_threadpool(work)

        return answer

    routes = []
    for path, handlers in _ROUTES.items():
        public = path in ("/api/server/about", "/api/auth/login")
        routes.append(Route(path, endpoint(handlers, public=public), methods=list(handlers)))
    return Starlette(routes=routes)


# Who asks


def _authenticate(call: Call) -> None:
    server = call.server
    kind, _, secret = call.headers.get("authorization", "").partition(" ")
    if kind == "Bearer":
        if secret != server.access_token:
            raise RefusedError(401, {"detail": "Invalid access token"})
    elif kind == "Token":
        if secret not in server.sessions.values():
            raise RefusedError(401, {"detail": "Invalid token."})
    elif kind == "Basic":
        try:
            user, _, password = base64.b64decode(secret, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise RefusedError(401, {"detail": "Invalid basic header."}) from error
        if (user, password) != (server.site.username, server.site.password):
            raise RefusedError(401, {"detail": "Invalid username/password."})
    else:
        if call.cookies.get("sessionid") not in server.sessions:
            raise RefusedError(401, {"detail": "Authentication credentials were not provided."})
        token = call.headers.get("x-csrftoken")
        if call.method not in ("GET", "HEAD", "OPTIONS") and (not token or token != call.cookies.get("csrftoken")):
            raise RefusedError(403, {"detail": "CSRF Failed: CSRF token missing."})
    _organization(call)


def _organization(call: Call) -> int | str | None:
    """The organisation that a request asks for: its id, "" for the personal workspace, None for all."""
    wanted = [call.headers.get("x-organization"), call.query.get("org"), call.query.get("org_id")]
    given = [value for value in wanted if value is not None]
    if len(given) > 1:
        raise RefusedError(400, ["X-Organization, org and org_id exclude each other."])
    if not given:
        return None
    if given[0] == "":
        return ""
    for key, slug in call.server.store.organizations.items():
        if given[0] in ((str(key),) if "org_id" in call.query else (slug,)):
            return key
    raise RefusedError(404, {"detail": f"{given[0]} organization does not exist."})


def _new_organization(call: Call) -> int | None:
    found = _organization(call)
    return found if isinstance(found, int) else None


def _login(call: Call) -> Reply:
    body = call.json
    if (body.get("username"), body.get("password")) != (call.server.site.username, call.server.site.password):
        raise RefusedError(400, {"non_field_errors": ["Unable to log in with provided credentials."]})
    session, csrf, key = (uuid.uuid4().hex for _ in range(3))
    call.server.sessions[session] = key
    reply = _LoginReply({"key": key})
    reply.cookies.update({"sessionid": session, "csrftoken": csrf})
    return reply


@dataclass(frozen=True, slots=True)
class _LoginReply(Reply):
    cookies: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        response = Reply.response(self)
        for name, value in self.cookies.items():
            response.set_cookie(name, value, httponly=name == "sessionid", samesite="lax")
        return response


def _logout(call: Call) -> Reply:
    call.server.sessions.pop(call.cookies.get("sessionid", ""), None)
    return Reply({"detail": "Successfully logged out."})


def _about(call: Call) -> Reply:
    return Reply(
        {
            "name": "Computer Vision Annotation Tool",
            "description": "A stand-in for CVAT.",
            "version": call.server.version,
            "logo_url": call.url("/static/logo.svg"),
            "subtitle": "",
        }
    )


def _owner(call: Call) -> Json:
    name = call.server.site.username
    return {"url": call.url("/api/users/1"), "id": 1, "username": name, "first_name": "", "last_name": ""}


def _self(call: Call) -> Reply:
    started = call.server.started.isoformat()
    rights = {"is_staff": True, "is_superuser": True, "is_active": True, "has_analytics_access": True}
    dates = {"last_login": started, "date_joined": started}
    return Reply({**_owner(call), "email": "annotator@example.org", "groups": ["admin"], **rights, **dates})


def _user(call: Call, number: int) -> Json:
    name = call.server.site.username if number == 1 else call.server.store.users[number]
    return {"url": call.url(f"/api/users/{number}"), "id": number, "username": name, "first_name": "", "last_name": ""}


def _users(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_user(call, number) for number in (1, *call.server.store.users)]
    return _listed(call, rows, ["username", "first_name", "last_name"])


def _organizations(call: Call) -> Reply:
    start = call.server.started.isoformat()
    found = [
        {
            "id": key,
            "slug": slug,
            "name": slug,
            "description": "",
            "created_date": start,
            "updated_date": start,
            "contact": {},
            "owner": _owner(call),
        }
        for key, slug in call.server.store.organizations.items()
        if call.query.get("slug", slug) == slug
    ]
    return _page(call, found)


# Lists


def _page(call: Call, rows: Sequence[Json]) -> Reply:
    """One page of a list, with the addresses of its neighbours."""
    server = call.server
    text = call.query.get("page_size", "")
    size = min(int(text), server.largest_page) if text.isascii() and text.isdigit() and int(text) else server.page_size
    number = call.query.get("page", "1")
    last = max(1, -(-len(rows) // size))
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= last):
        raise RefusedError(404, {"detail": "Invalid page."})
    page = int(number)

    def link(to: int) -> str | None:
        return call.url(f"{call.path}?{urlencode({**call.query, 'page': to})}") if 1 <= to <= last else None

    part = list(rows[(page - 1) * size : page * size])
    return Reply({"count": len(rows), "next": link(page + 1), "previous": link(page - 1), "results": part})


def _listed(call: Call, rows: Sequence[Json], fields: Sequence[str]) -> Reply:
    """A page of the rows that the simple filters, `filter` and `search` let through, in the order of `sort`."""
    for name in fields:
        if name in call.query:
            rows = [row for row in rows if str(row.get(name)) == call.query[name]]
    if "search" in call.query:
        rows = [row for row in rows if call.query["search"].lower() in str(row.get("name", "")).lower()]
    if "filter" in call.query:
        try:
            rule = json.loads(call.query["filter"])
            rows = [row for row in rows if _holds(rule, row)]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RefusedError(400, [f"filter: {error}"]) from error
    organization = _organization(call)
    if organization is not None:
        wanted = None if organization == "" else organization
        rows = [row for row in rows if row.get("organization", wanted) == wanted]
    key = call.query.get("sort", "-id")
    rows = sorted(rows, key=lambda row: row[key.removeprefix("-")], reverse=key.startswith("-"))
    return _page(call, rows)


def _holds(rule: Any, row: Json) -> Any:
    """A JSON logic rule for one row."""
    if not isinstance(rule, dict):
        return rule
    [(operator, arguments)] = rule.items()
    if operator == "var":
        return row[arguments]
    values = [_holds(argument, row) for argument in (arguments if isinstance(arguments, list) else [arguments])]
    if operator == "in":
        found: bool = values[0] in values[1]
        return found
    known: dict[str, Callable[[], Any]] = {
        "==": lambda: values[0] == values[1],
        "!": lambda: not values[0],
        "and": lambda: all(values),
        "or": lambda: any(values),
        "<=": lambda: values[0] <= values[1],
        ">=": lambda: values[0] >= values[1],
    }
    return known[operator]()


# Projects and labels


def _storage() -> Json:
    return {"id": 1, "location": "local", "cloud_storage_id": None}


def _show_project(call: Call, project: Project) -> Json:
    store = call.server.store
    tasks = store.tasks_of(project.id)
    done = bool(tasks) and all(job.status == "completed" for task in tasks for job in store.jobs_of(task.id))
    return {
        "url": call.url(f"/api/projects/{project.id}"),
        "id": project.id,
        "name": project.name,
        "owner": _owner(call),
        "assignee": None,
        "guide_id": None,
        "bug_tracker": project.bug_tracker,
        "task_subsets": sorted({task.subset for task in tasks} - {""}),
        "created_date": _date(project.created),
        "updated_date": _date(project.updated),
        "status": "completed" if done else "annotation",
        "dimension": "2d" if tasks else None,
        "organization": project.organization,
        "organization_id": project.organization,
        "target_storage": _storage(),
        "source_storage": _storage(),
        "tasks": {"count": len(tasks), "url": call.url(f"/api/tasks?project_id={project.id}")},
        "labels": {"url": call.url(f"/api/labels?project_id={project.id}")},
        "assignee_updated_date": None,
    }


def _date(value: datetime) -> str:
    return value.isoformat().replace("+00:00", "Z")


def _projects(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_show_project(call, project) for project in call.server.store.projects.values()]
    return _listed(call, rows, ["name", "status"])


def _create_project(call: Call) -> Reply:
    body, store = call.json, call.server.store
    _require_name(body)
    with store.lock:
        now = store.now()
        project = Project(
            id=store.new_id("project"),
            name=body["name"],
            created=now,
            updated=now,
            organization=_new_organization(call),
            bug_tracker=body.get("bug_tracker", ""),
        )
        store.projects[project.id] = project
        try:
            labels = [{key: value for key, value in label.items() if key != "id"} for label in body.get("labels", [])]
            store.change_labels(labels, project_id=project.id, task_id=None)
        except RefusedError:
            del store.projects[project.id]
            raise
        return Reply(_show_project(call, project), 201)


def _require_name(body: Json) -> None:
    name = body.get("name")
    if not isinstance(name, str) or not name or len(name) > 256:
        raise RefusedError(400, {"name": ["This field is required."]})


def _project(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_project(call, call.server.store.project(call.ids["id"])))


def _patch_project(call: Call) -> Reply:
    body, store = call.json, call.server.store
    with store.lock:
        project = store.project(call.ids["id"])
        store.change_labels(body.get("labels", []), project_id=project.id, task_id=None)
        project.name = body.get("name", project.name)
        project.bug_tracker = body.get("bug_tracker", project.bug_tracker)
        project.updated = store.now()
        return Reply(_show_project(call, project))


def _delete_project(call: Call) -> Reply:
    with call.server.store.lock:
        call.server.store.delete_project(call.ids["id"])
    return Reply(status=204)


def _show_label(label: Label) -> Json:
    shown: Json = {
        "id": label.id,
        "name": label.name,
        "color": label.color,
        "attributes": [
            {
                "id": value.id,
                "name": value.name,
                "mutable": value.mutable,
                "input_type": value.input_type,
                "default_value": value.default_value,
                "values": value.values,
            }
            for value in label.attributes
        ],
        "type": label.type,
        "sublabels": [],
        "parent_id": None,
        "has_parent": False,
    }
    if label.project_id is not None:
        shown["project_id"] = label.project_id
    if label.task_id is not None:
        shown["task_id"] = label.task_id
    return shown


def _labels(call: Call) -> Reply:
    store, query = call.server.store, call.query
    with store.lock:
        found = list(store.labels.values())
        if "job_id" in query:
            found = store.labels_of_task(store.task(store.job(_number(query["job_id"])).task_id))
        if "task_id" in query:
            found = store.labels_of_task(store.task(_number(query["task_id"])))
        if "project_id" in query:
            store.project(_number(query["project_id"]))
            found = [label for label in found if label.project_id == int(query["project_id"])]
        rows = [_show_label(label) for label in found]
    if "sort" not in query:
        call = replace(call, query={**query, "sort": "id"})
    return _listed(call, rows, ["name", "color", "type"])


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise RefusedError(400, [f"{text!r} is not a number"])
    return int(text)


def _label(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_label(call.server.store.label(call.ids["id"])))


def _patch_label(call: Call) -> Reply:
    body, store = call.json, call.server.store
    if body.get("deleted"):
        raise RefusedError(400, {"non_field_errors": ["Labels cannot be deleted by updating in this endpoint."]})
    with store.lock:
        label = store.label(call.ids["id"])
        change = {**body, "id": label.id}
        store.change_labels([change], project_id=label.project_id, task_id=label.task_id)
        return Reply(_show_label(label))


def _delete_label(call: Call) -> Reply:
    with call.server.store.lock:
        call.server.store.delete_label(call.ids["id"])
    return Reply(status=204)


# Tasks and their data


def _show_task(call: Call, task: Task) -> Json:
    store = call.server.store
    jobs = store.jobs_of(task.id)
    project = store.projects.get(task.project_id) if task.project_id is not None else None
    has_truth = any(job.type == "ground_truth" for job in jobs)
    done = [job for job in jobs if job.status == "completed"]
    shown: Json = {
        "url": call.url(f"/api/tasks/{task.id}"),
        "id": task.id,
        "name": task.name,
        "project_id": task.project_id,
        "project_name": None if project is None else project.name,
        "owner": _owner(call),
        "assignee": None,
        "bug_tracker": task.bug_tracker,
        "created_date": _date(task.created),
        "updated_date": _date(task.updated),
        "overlap": 0 if task.frames else None,
        "segment_size": task.segment_size,
        "status": "completed" if jobs and len(done) == len(jobs) else "annotation",
        "guide_id": None,
        "dimension": "2d",
        "mode": task.mode if task.frames else "",
        "media_type": "image",
        "subset": task.subset,
        "organization": task.organization,
        "organization_id": task.organization,
        "target_storage": _storage(),
        "source_storage": _storage(),
        "jobs": {
            "count": len(jobs),
            "completed": len(done),
            "validation": sum(job.stage == "validation" for job in jobs),
            "url": call.url(f"/api/jobs?task_id={task.id}"),
        },
        "labels": {"url": call.url(f"/api/labels?task_id={task.id}")},
        "assignee_updated_date": None,
        "validation_mode": "gt" if has_truth else None,
        "consensus_enabled": task.replicas > 0,
    }
    if task.frames:
        shown |= {
            "data_chunk_size": task.chunk_size,
            "data_compressed_chunk_type": "imageset",
            "data_original_chunk_type": "imageset",
            "data_cloud_storage_id": None,
            "size": len(task.frames),
            "image_quality": task.image_quality,
            "data": task.id,
        }
    return shown


def _tasks(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_show_task(call, task) for task in call.server.store.tasks.values()]
    return _listed(call, rows, ["name", "project_id", "project_name", "status", "subset"])


def _create_task(call: Call) -> Reply:
    body, store = call.json, call.server.store
    _require_name(body)
    with store.lock:
        project_id = body.get("project_id")
        labels = [{key: value for key, value in label.items() if key != "id"} for label in body.get("labels") or []]
        if project_id is not None and project_id not in store.projects:
            raise RefusedError(400, [f"The specified project #{project_id} does not exist."])
        if project_id is None and not labels:
            raise RefusedError(400, ["Label set or project_id must be present"])
        if project_id is not None and labels:
            raise RefusedError(400, ["Project must have only one of Label set or project_id"])
        now = store.now()
        task = Task(
            id=store.new_id("task"),
            name=body["name"],
            project_id=project_id,
            segment_size=int(body.get("segment_size") or 0),
            created=now,
            updated=now,
            organization=_new_organization(call),
            subset=body.get("subset", ""),
            replicas=int(body.get("consensus_replicas") or 0),
            bug_tracker=body.get("bug_tracker", ""),
        )
        if task.replicas in (1,) or task.replicas > 10:
            raise RefusedError(400, ["Consensus replicas should be 0, or from 2 to 10"])
        store.tasks[task.id] = task
        try:
            store.change_labels(labels, project_id=None, task_id=task.id)
        except RefusedError:
            del store.tasks[task.id]
            raise
        if project_id is not None:
            store.projects[project_id].updated = store.now()
        return Reply(_show_task(call, task), 201)


def _task(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_task(call, call.server.store.task(call.ids["id"])))


def _patch_task(call: Call) -> Reply:
    body, store = call.json, call.server.store
    with store.lock:
        task = store.task(call.ids["id"])
        if body.get("labels"):
            if task.project_id is not None:
                raise RefusedError(400, ["Tasks inside a project use project's labels."])
            store.change_labels(body["labels"], project_id=None, task_id=task.id)
        task.name = body.get("name", task.name)
        task.subset = body.get("subset", task.subset)
        task.bug_tracker = body.get("bug_tracker", task.bug_tracker)
        task.updated = store.now()
        return Reply(_show_task(call, task))


def _delete_task(call: Call) -> Reply:
    with call.server.store.lock:
        call.server.store.delete_task(call.ids["id"])
    return Reply(status=204)


def _upload(call: Call) -> Reply:
    """The files of a task: start, a bunch at once or one by TUS, finish."""
    store = call.server.store
    with store.lock:
        task = store.task(call.ids["id"])
        if task.frames:
            raise RefusedError(400, ["Adding more data is not supported"])
        if "upload-finish" in call.headers:
            return _finish_upload(call, task)
        if "upload-start" in call.headers:
            task.files.clear()
            return Reply(status=202)
        if "upload-length" in call.headers:
            return _start_tus(call, task)
        if "upload-multiple" in call.headers:
            for name, data in _multipart_files(call):
                task.files[name] = data
            return Reply(status=200)
        return _finish_upload(call, task)


def _start_tus(call: Call, task: Task) -> Reply:
    metadata = {}
    for entry in call.headers.get("upload-metadata", "").split(","):
        key, _, value = entry.partition(" ")
        metadata[key] = base64.b64decode(value).decode()
    name = metadata.get("filename", "")
    if not name or name.startswith("/") or ".." in name.split("/"):
        return Reply(f"File name {name} is not allowed", 400, _TUS)
    if name in task.files:
        return Reply("File with same name already exists", 409, _TUS)
    upload_id = str(uuid.uuid4())
    upload = Upload(name=name, length=int(call.headers["upload-length"]))
    task.uploads[upload_id] = upload
    if upload.length == 0:
        task.files[name] = b""
    headers = {
        "Location": call.url(f"{call.path.rstrip('/')}/{upload_id}"),
        "Upload-Filename": quote(name, safe="/._-") if not name.isascii() else name,
    }
    return Reply(None, 201, {**_TUS, **headers})


def _continue_tus(call: Call) -> Reply:
    store = call.server.store
    with store.lock:
        task = store.task(call.ids["id"])
        upload = task.uploads.get(call.ids["file"])
        if upload is None:
            return Reply(None, 404, _TUS)
        if call.method == "HEAD":
            sizes = {"Upload-Offset": str(len(upload.data)), "Upload-Length": str(upload.length)}
            return Reply(None, 200, {**_TUS, **sizes})
        if int(call.headers.get("upload-offset", 0)) != len(upload.data):
            return Reply(None, 409, _TUS)
        if len(upload.data) + len(call.body) > upload.length:
            return Reply(None, 413, _TUS)
        upload.data += call.body
        if len(upload.data) == upload.length:
            task.files[upload.name] = bytes(upload.data)
        return Reply(None, 204, {**_TUS, "Upload-Offset": str(len(upload.data)), "Upload-Filename": "upload"})


_NAME = re.compile(rb'filename="((?:[^"\\]|\\.)*)"')


def _multipart_files(call: Call) -> list[tuple[str, bytes]]:
    """The files of a form; as in Django only the last part of a name stays."""
    match = re.search(r'boundary="?([^";]+)"?', call.headers.get("content-type", ""))
    if match is None:
        raise RefusedError(400, {"detail": "Multipart form parse error - Invalid boundary"})
    found = []
    for part in (b"\r\n" + call.body).split(b"\r\n--" + match.group(1).encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if name is not None:
            text = name.group(1).decode().replace("%22", '"').replace("\\", "/")
            found.append((text.rsplit("/", 1)[-1], content))
    return found


def _finish_upload(call: Call, task: Task) -> Reply:
    body, store, server = call.json, call.server.store, call.server
    files = dict(task.files)
    key = f"action=create&target=task&id={task.id}"
    request = Background(
        id=key,
        action="create",
        target="task",
        subresource=None,
        ids={"task_id": task.id, "project_id": task.project_id},
        created=store.now(),
        polls=server.polls_until_done,
    )
    store.background[key] = request
    try:
        frames = _frames(files, body)
    except RefusedError as error:
        request.error = str(error.content)
        return Reply({"rq_id": key}, 202)
    task.chunk_size = int(body.get("chunk_size") or 0) or None
    task.image_quality = int(body.get("image_quality") or 70)
    task.files.clear()
    task.uploads.clear()
    store.set_data(task, frames, chunk_size=server.chunk_size)
    return Reply({"rq_id": key}, 202)


def _frames(files: dict[str, bytes], body: Json) -> list[Frame]:
    """The images of an upload, in the order that CVAT gives them."""
    if [name.lower().endswith(".zip") for name in files] == [True]:
        [archive] = files.values()
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            files = {entry.filename: members.read(entry) for entry in members.infolist() if not entry.is_dir()}
    if body.get("sorting_method") == "predefined":
        order = list(body.get("upload_file_order") or files)
        names = sorted(files, key=lambda name: order.index(name) if name in order else len(order))
    else:
        names = sorted(files)
    frames = []
    for name in names:
        try:
            with Image.open(io.BytesIO(files[name])) as image:
                width, height = image.size
        except OSError:
            continue  # CVAT takes the media files and leaves the others
        frames.append(Frame(name=name, data=files[name], width=width, height=height))
    if not frames:
        raise RefusedError(400, "No media data found")
    return frames


def _show_meta(call: Call, task: Task, job: Job | None) -> Json:
    if task.chunks_updated is None:
        raise not_found("Data")
    numbers = range(len(task.frames)) if job is None else range(job.start, job.stop + 1)
    inside = set(numbers if job is None else job.frames)
    deleted = task.deleted | (job.disabled if job is not None else set())
    frames = [
        {
            "width": task.frames[number].width,
            "height": task.frames[number].height,
            # CVAT keeps places for the frames that a ground truth job skips
            "name": task.frames[number].name if number in inside else "placeholder.jpg",
            "related_files": 0,
            "has_related_context": False,
        }
        for number in numbers
    ]
    return {
        "chapters": None,
        "chunks_updated_date": _date(task.chunks_updated),
        "chunk_size": task.chunk_size,
        "size": len(inside),
        "image_quality": task.image_quality,
        "start_frame": numbers[0],
        "stop_frame": numbers[-1],
        "frame_filter": "",
        "frames": frames,
        "deleted_frames": sorted(deleted & inside),
        "included_frames": None if job is None or job.included is None else sorted(job.included),
        "storage": "local",
        "cloud_storage_id": None,
    }


def _parents(call: Call) -> tuple[Task, Job | None]:
    """The task, and the job if the path names one."""
    store = call.server.store
    if call.path.startswith("/api/jobs/"):
        job = store.job(call.ids["id"])
        return store.tasks[job.task_id], job
    return store.task(call.ids["id"]), None


def _meta(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_meta(call, *_parents(call)))


def _patch_meta(call: Call) -> Reply:
    wanted = call.json.get("deleted_frames")
    with call.server.store.lock:
        task, job = _parents(call)
        if wanted is not None:
            chosen = {int(number) for number in wanted}
            if job is None:
                task.deleted = chosen & set(range(len(task.frames)))
            elif job.type == "ground_truth":
                job.disabled = chosen & set(job.frames)
            else:
                task.deleted = (task.deleted - set(job.frames)) | (chosen & set(job.frames))
        return Reply(_show_meta(call, task, job))


def _data(call: Call) -> Reply:
    kind, quality = call.query.get("type"), call.query.get("quality", "compressed")
    if kind not in ("chunk", "frame", "preview", "context_image"):
        raise RefusedError(400, ["Data type not specified or not supported"])
    if quality not in ("compressed", "original"):
        raise RefusedError(400, ["Wrong quality"])
    with call.server.store.lock:
        task, job = _parents(call)
        frames, numbers = list(task.frames), set(range(len(task.frames))) if job is None else set(job.frames)
        size = task.chunk_size or call.server.chunk_size
    if kind == "frame":
        number = _number(call.query.get("number", ""))
        if number not in numbers:
            raise RefusedError(404, {"detail": f"Incorrect requested frame number: {number}"})
        data, media_type = _picture(frames[number], quality, task.image_quality)
        return Reply(data, 200, {}, media_type)
    if kind != "chunk":
        raise RefusedError(404, {"detail": "The stand-in has no previews and no context images."})
    if job is not None and "index" in call.query:
        inside = sorted(numbers)
        chunk = inside[_number(call.query["index"]) * size :][:size]
    else:
        first = _number(call.query.get("number", "")) * size
        chunk = [number for number in range(first, first + size) if number in numbers]
    if not chunk:
        raise RefusedError(404, {"detail": "Incorrect chunk number"})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for index, number in enumerate(chunk):
            data, _ = _picture(frames[number], quality, task.image_quality)
            suffix = "jpeg" if quality == "compressed" else frames[number].name.rpartition(".")[2]
            archive.writestr(zipfile.ZipInfo(f"{index:06d}.{suffix}"), data)
    return Reply(packed.getvalue(), 200, {}, "application/zip")


def _picture(frame: Frame, quality: str, jpeg_quality: int) -> tuple[bytes, str]:
    """The very bytes that were uploaded, or a JPEG of them."""
    if quality == "original":
        return frame.data, mimetypes.guess_type(frame.name)[0] or "application/octet-stream"
    packed = io.BytesIO()
    with Image.open(io.BytesIO(frame.data)) as image:
        image.convert("RGB").save(packed, "JPEG", quality=jpeg_quality)
    return packed.getvalue(), "image/jpeg"


# Jobs


def _show_job(call: Call, job: Job) -> Json:
    store = call.server.store
    task = store.tasks[job.task_id]
    project = store.projects.get(task.project_id) if task.project_id is not None else None
    replicas = sum(other.parent_id == job.id for other in store.jobs.values())
    return {
        "url": call.url(f"/api/jobs/{job.id}"),
        "id": job.id,
        "task_id": job.task_id,
        "task_name": task.name,
        "project_id": task.project_id,
        "project_name": None if project is None else project.name,
        "assignee": None if job.assignee is None else _user(call, job.assignee),
        "guide_id": None,
        "dimension": "2d",
        "mode": "annotation",
        "media_type": "image",
        "bug_tracker": task.bug_tracker,
        "status": job.status,
        "stage": job.stage,
        "state": job.state,
        "frame_count": len(job.frames),
        "start_frame": job.start,
        "stop_frame": job.stop,
        "data_chunk_size": task.chunk_size,
        "data_compressed_chunk_type": "imageset",
        "data_original_chunk_type": "imageset",
        "created_date": _date(job.created),
        "updated_date": _date(job.updated),
        "issues": {
            "url": call.url(f"/api/issues?job_id={job.id}"),
            "count": sum(issue.job_id == job.id for issue in store.issues.values()),
        },
        "labels": {"url": call.url(f"/api/labels?job_id={job.id}")},
        "type": job.type,
        "organization": task.organization,
        "target_storage": _storage(),
        "source_storage": _storage(),
        "assignee_updated_date": None,
        "parent_job_id": job.parent_id,
        "consensus_replicas": replicas,
        "replicas_count": replicas,
    }


def _jobs(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_show_job(call, job) for job in call.server.store.jobs.values()]
    fields = ["task_id", "task_name", "project_id", "project_name", "state", "stage", "type", "parent_job_id"]
    return _listed(call, rows, fields)


def _create_job(call: Call) -> Reply:
    body, store = call.json, call.server.store
    if missing := [key for key in ("task_id", "type") if key not in body]:
        raise RefusedError(400, {key: ["This field is required."] for key in missing})
    with store.lock:
        task = store.tasks.get(body["task_id"])
        if task is None:
            raise RefusedError(400, ["Task does not exist"])
        if body["type"] != "ground_truth":
            raise RefusedError(400, [f"Unexpected job type '{body['type']}'"])
        if any(job.type == "ground_truth" for job in store.jobs_of(task.id)):
            raise RefusedError(400, ['Task with validation mode "gt" cannot have more than 1 GT job'])
        if body.get("frame_selection_method") != "manual":
            raise RefusedError(400, ["The stand-in selects frames by hand only: frame_selection_method=manual"])
        frames = body.get("frames", [])
        if len(set(frames)) != len(frames):
            raise RefusedError(400, ["Frames must not repeat"])
        if wrong := set(frames) - set(range(len(task.frames))):
            raise RefusedError(400, [f"The following frames do not exist in the task: {sorted(wrong)}"])
        job = store.add_job(task, 0, len(task.frames) - 1, type="ground_truth", included=sorted(frames))
        return Reply(_show_job(call, job), 201)


def _job(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_job(call, call.server.store.job(call.ids["id"])))


def _patch_job(call: Call) -> Reply:
    body = call.json
    with call.server.store.lock:
        job = call.server.store.job(call.ids["id"])
        if body.get("assignee") not in (None, 1, *call.server.store.users):
            raise RefusedError(400, {"assignee": [f'Invalid pk "{body["assignee"]}" - object does not exist.']})
        call.server.change_job(job, state=body.get("state"), stage=body.get("stage"))
        if "assignee" in body:
            job.assignee = body["assignee"]
            call.server.store.touch(job)
        return Reply(_show_job(call, job))


def _delete_job(call: Call) -> Reply:
    with call.server.store.lock:
        job = call.server.store.job(call.ids["id"])
        if job.type != "ground_truth":
            raise RefusedError(400, ["Only ground truth jobs can be removed"])
        del call.server.store.jobs[job.id]
    return Reply(status=204)


# Issues


def _show_issue(call: Call, issue: Issue) -> Json:
    return {
        "id": issue.id,
        "frame": issue.frame,
        "position": issue.position,
        "job": issue.job_id,
        "owner": _owner(call),
        "assignee": None,
        "created_date": _date(issue.created),
        "updated_date": _date(issue.created),
        "resolved": issue.resolved,
        "comments": {"count": len(issue.comments), "url": call.url(f"/api/comments?issue_id={issue.id}")},
    }


def _chosen_issues(call: Call) -> list[Issue]:
    """The issues that the query's numbers let through."""
    store = call.server.store
    numbers: dict[str, Callable[[Issue], int]] = {
        "issue_id": lambda issue: issue.id,
        "job_id": lambda issue: issue.job_id,
        "frame_id": lambda issue: issue.frame,
        "task_id": lambda issue: store.jobs[issue.job_id].task_id,
    }
    wanted = {name: _number(call.query[name]) for name in numbers if name in call.query}
    return [v for v in store.issues.values() if all(numbers[name](v) == number for name, number in wanted.items())]


def _issues(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_show_issue(call, issue) for issue in _chosen_issues(call)]
    return _listed(call, rows, [])


def _create_issue(call: Call) -> Reply:
    body, store = call.json, call.server.store
    if missing := [key for key in ("frame", "job", "message", "position") if body.get(key) in (None, "")]:
        raise RefusedError(400, {key: ["This field is required."] for key in missing})
    if not all(type(value) in (int, float) for value in body["position"]):
        raise RefusedError(400, {"position": {"0": ["A valid number is required."]}})
    with store.lock:
        job = store.jobs.get(body["job"])
        if job is None:
            raise RefusedError(400, {"job": [f'Invalid pk "{body["job"]}" - object does not exist.']})
        now = store.now()
        issue = Issue(
            id=store.new_id("issue"),
            job_id=job.id,
            frame=int(body["frame"]),
            position=[float(value) for value in body["position"]],
            comments=[(store.new_id("comment"), str(body["message"]), now)],
            created=now,
            resolved=bool(body.get("resolved", False)),
        )
        store.issues[issue.id] = issue
        return Reply(_show_issue(call, issue), 201)


def _comments(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [
            {
                "id": number,
                "issue": issue.id,
                "owner": _owner(call),
                "message": text,
                "created_date": _date(written),
                "updated_date": _date(written),
            }
            for issue in _chosen_issues(call)
            for number, text, written in issue.comments
        ]
    return _listed(call, rows, [])


# Webhooks


def _show_webhook(call: Call, webhook: Webhook) -> Json:
    sent = [delivery for delivery in call.server.deliveries.done if delivery.webhook_id == webhook.id]
    return {
        "id": webhook.id,
        "url": call.url(f"/api/webhooks/{webhook.id}"),
        "target_url": webhook.target_url,
        "description": webhook.description,
        "type": webhook.type,
        "content_type": "application/json",
        "is_active": webhook.is_active,
        "enable_ssl": webhook.enable_ssl,
        "created_date": _date(webhook.created),
        "updated_date": _date(webhook.updated),
        "owner": _owner(call),
        **({"project_id": webhook.project_id} if webhook.type == "project" else {}),
        "organization": webhook.organization,
        "events": webhook.events,
        **({"last_status": sent[-1].status} if sent else {}),
    }


def _webhooks(call: Call) -> Reply:
    with call.server.store.lock:
        rows = [_show_webhook(call, webhook) for webhook in call.server.store.webhooks.values()]
    return _listed(call, rows, ["target_url", "type", "project_id"])


def _check_webhook(body: Json) -> None:
    if "target_url" in body and not re.match(r"https?://", str(body["target_url"])):
        raise RefusedError(400, {"target_url": ["Enter a valid URL."]})
    if len(body.get("secret") or "") > 64:
        raise RefusedError(400, {"secret": ["Ensure this field has no more than 64 characters."]})
    if any(re.fullmatch(r"\w+:\w+(\[[\w:]+\])?", str(event)) is None for event in body.get("events") or []):
        raise RefusedError(400, {"events": ["is not a valid choice."]})


def _create_webhook(call: Call) -> Reply:
    body, store = call.json, call.server.store
    if missing := [key for key in ("events", "target_url", "type") if not body.get(key)]:
        raise RefusedError(400, {key: ["This field is required."] for key in missing})
    _check_webhook(body)
    with store.lock:
        if body["type"] not in ("project", "organization"):
            raise RefusedError(400, {"type": [f'"{body["type"]}" is not a valid choice.']})
        if body["type"] == "project" and body.get("project_id") not in store.projects:
            raise RefusedError(400, ["Project with the given id does not exist"])
        now = store.now()
        webhook = Webhook(
            id=store.new_id("webhook"),
            target_url=body["target_url"],
            type=body["type"],
            project_id=body.get("project_id"),
            organization=_new_organization(call),
            events=sorted(set(body["events"])),
            secret=body.get("secret") or "",
            is_active=bool(body.get("is_active", True)),
            enable_ssl=bool(body.get("enable_ssl", True)),
            description=body.get("description", ""),
            created=now,
            updated=now,
        )
        store.webhooks[webhook.id] = webhook
        return Reply(_show_webhook(call, webhook), 201)


def _found_webhook(call: Call) -> Webhook:
    if call.ids["id"] not in call.server.store.webhooks:
        raise not_found("Webhook")
    return call.server.store.webhooks[call.ids["id"]]


def _webhook(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(_show_webhook(call, _found_webhook(call)))


def _patch_webhook(call: Call) -> Reply:
    body, store = call.json, call.server.store
    _check_webhook(body)
    with store.lock:
        webhook = _found_webhook(call)
        for name in ("target_url", "events", "secret", "is_active", "enable_ssl", "description"):
            if name in body:
                setattr(webhook, name, body[name])
        webhook.updated = store.now()
        return Reply(_show_webhook(call, webhook))


def _delete_webhook(call: Call) -> Reply:
    with call.server.store.lock:
        del call.server.store.webhooks[_found_webhook(call).id]
    return Reply(status=204)


def _ping_webhook(call: Call) -> Reply:
    with call.server.store.lock:
        webhook = _found_webhook(call)
        payload = {"event": "ping", "webhook": _show_webhook(call, webhook), "sender": _owner(call)}
    delivery = call.server.deliveries.send(webhook, payload)
    return Reply({"webhook_id": webhook.id, "event": "ping", "status_code": delivery.status, "redelivery": False})


def job_message(server: "CvatStandin", job: Job, *, before: Json, webhook_id: int) -> Json:
    """What a webhook is sent when a job has changed.

    Args:
        server: for addresses and names.
        job: as it is now.
        before: what has changed, as it was.
        webhook_id: of the webhook.
    """
    call = Call(server=server, method="", base=server.url, path="", ids={}, query={}, headers={}, cookies={}, body=b"")
    return {
        "event": "update:job",
        "job": _show_job(call, job),
        "before_update": before,
        "webhook_id": webhook_id,
        "sender": _owner(call),
    }


# Annotations


def _annotated(call: Call) -> list[Job]:
    """The jobs that a path means: one, or a task's annotation jobs."""
    task, job = _parents(call)
    if job is not None:
        return [job]
    if task.chunks_updated is None:
        raise RefusedError(400, ["The task has no data"])
    jobs = (job for job in call.server.store.jobs_of(task.id) if job.type == "annotation")
    return sorted(jobs, key=lambda job: job.start)


def _annotations(call: Call) -> Reply:
    with call.server.store.lock:
        return Reply(call.server.store.annotations(_annotated(call)))


def _write_annotations(call: Call) -> Reply:
    action = "put" if call.method == "PUT" else call.query.get("action", "")
    if action not in ("put", "create", "update", "delete"):
        raise RefusedError(400, ["Please specify a correct 'action' for the request"])
    body, store = call.json, call.server.store
    with store.lock:
        by_frame = call.path.startswith("/api/tasks/")
        return Reply(store.write(_annotated(call), body, action, by_frame=by_frame))


def _delete_annotations(call: Call) -> Reply:
    with call.server.store.lock:
        call.server.store.clear(_annotated(call))
    return Reply(status=204)


# Background requests and exports


def _show_background(call: Call, request: Background) -> Json:
    """As the API tells it; every look brings it nearer to its end."""
    store = call.server.store
    done = request.polls <= 0
    status = "finished" if done else "queued" if request.finished is None and request.polls > 1 else "started"
    if done:
        request.finished = request.finished or store.now()
        if request.error is not None:
            status = "failed"
    else:
        request.polls -= 1
    operation: Json = {"type": request.action, "target": request.target, **request.ids}
    if request.subresource is not None:
        operation["type"] = f"{request.action}:{request.subresource}"
    shown: Json = {
        "status": status,
        "message": request.error or "",
        "id": request.id,
        "operation": {**operation, "format": request.format, "function_id": None},
        "progress": 1.0 if done else None,
        "created_date": _date(request.created),
        "started_date": None if status == "queued" else _date(request.created),
        "owner": {"id": 1, "username": call.server.site.username},
    }
    if request.finished is not None:
        shown["finished_date"] = _date(request.finished)
        shown["expiry_date"] = _date(request.finished + timedelta(days=1))
    if status == "finished" and request.result is not None:
        query = {"rq_id": request.id}
        target = f"/api/{request.target}s/{request.ids[request.target + '_id']}/dataset/download"
        shown["result_url"] = call.url(f"{target}?{urlencode(query)}")
    if status == "finished" and request.action == "create":
        shown["result_id"] = request.ids["task_id"]
    return shown


def _requests(call: Call) -> Reply:
    with call.server.store.lock:
        requests = [
            request
            for request in call.server.store.background.values()
            if all(
                call.query.get(name, getattr(request, name)) == getattr(request, name) for name in ("action", "target")
            )
            and call.query.get("task_id") in (None, str(request.ids.get("task_id")))
        ]
        rows = [_show_background(call, request) for request in requests]
    return _listed(call, rows, ["status"])


def _request(call: Call) -> Reply:
    store = call.server.store
    with store.lock:
        if call.ids["id"] not in store.background:
            raise RefusedError(404, {"detail": "There is no request with specified id."})
        return Reply(_show_background(call, store.background[call.ids["id"]]))


def _export(call: Call) -> Reply:
    """Start an export; what it gives is what a test has registered."""
    store = call.server.store
    kind = call.path.split("/")[2].removesuffix("s")
    name = call.query.get("format", "")
    if not name:
        raise RefusedError(400, ["Format is not specified"])
    with store.lock:
        {"project": store.project, "task": store.task, "job": store.job}[kind](call.ids["id"])
        key = (kind, call.ids["id"], name)
        packed = re.sub(r"[. ]", "@", name)
        request_id = f"action=export&target={kind}&id={call.ids['id']}&subresource=dataset&format={packed}&user_id=1"
        running = store.background.get(request_id)
        if running is not None and running.finished is None and running.polls > 0:
            running.polls -= 1
            return Reply({"rq_id": request_id}, 409)
        request = Background(
            id=request_id,
            action="export",
            target=kind,
            subresource="dataset",
            ids={f"{kind}_id": call.ids["id"]},
            created=store.now(),
            polls=call.server.polls_until_done,
            format=name,
            result=store.exports.get(key),
        )
        if request.result is None:
            request.error = f"The stand-in has no export {name!r} of this {kind}: register one with add_export."
        store.background[request_id] = request
        return Reply({"rq_id": request_id}, 202)


def _download(call: Call) -> Reply:
    store = call.server.store
    with store.lock:
        request = store.background.get(call.query.get("rq_id", ""))
        if request is None or request.result is None:
            raise RefusedError(404, {"detail": "Unknown export request id"})
        headers = {"Content-Disposition": f'attachment; filename="{request.target}_dataset.zip"'}
        return Reply(request.result, 200, headers, "application/zip")


# Automatic annotation


def _functions(call: Call) -> Reply:
    return Reply(call.server.lambdas.describe_all())


def _function(call: Call) -> Reply:
    return Reply(call.server.lambdas.describe(call.ids["id"]))


def _call_function(call: Call) -> Reply:
    return Reply(call.server.lambdas.call(call.ids["id"], call.json))


def _runs(call: Call) -> Reply:
    return Reply([run.as_json() for run in list(call.server.lambdas.runs.values()) if run.status != "failed"])


def _start_run(call: Call) -> Reply:
    return Reply(call.server.lambdas.start(call.json).as_json())


def _run(call: Call) -> Reply:
    return Reply(call.server.lambdas.find(call.ids["id"]).as_json())


def _cancel_run(call: Call) -> Reply:
    call.server.lambdas.cancel(call.ids["id"])
    return Reply(status=204)


_ANNOTATIONS: dict[str, Handler] = {
    "GET": _annotations,
    "PUT": _write_annotations,
    "PATCH": _write_annotations,
    "DELETE": _delete_annotations,
}

_ROUTES: dict[str, dict[str, Handler]] = {
    "/api/server/about": {"GET": _about},
    "/api/auth/login": {"POST": _login},
    "/api/auth/logout": {"POST": _logout},
    "/api/users": {"GET": _users},
    "/api/users/self": {"GET": _self},
    "/api/organizations": {"GET": _organizations},
    "/api/projects": {"GET": _projects, "POST": _create_project},
    "/api/projects/{id:int}": {"GET": _project, "PATCH": _patch_project, "DELETE": _delete_project},
    "/api/projects/{id:int}/dataset/export": {"POST": _export},
    "/api/projects/{id:int}/dataset/download": {"GET": _download},
    "/api/labels": {"GET": _labels},
    "/api/labels/{id:int}": {"GET": _label, "PATCH": _patch_label, "DELETE": _delete_label},
    "/api/tasks": {"GET": _tasks, "POST": _create_task},
    "/api/tasks/{id:int}": {"GET": _task, "PATCH": _patch_task, "DELETE": _delete_task},
    "/api/tasks/{id:int}/data": {"GET": _data, "POST": _upload},
    "/api/tasks/{id:int}/data/": {"GET": _data, "POST": _upload},
    "/api/tasks/{id:int}/data/meta": {"GET": _meta, "PATCH": _patch_meta},
    "/api/tasks/{id:int}/data/{file}": {"HEAD": _continue_tus, "PATCH": _continue_tus},
    "/api/tasks/{id:int}/annotations": _ANNOTATIONS,
    "/api/tasks/{id:int}/annotations/": _ANNOTATIONS,
    "/api/tasks/{id:int}/dataset/export": {"POST": _export},
    "/api/tasks/{id:int}/dataset/download": {"GET": _download},
    "/api/webhooks": {"GET": _webhooks, "POST": _create_webhook},
    "/api/webhooks/{id:int}": {"GET": _webhook, "PATCH": _patch_webhook, "DELETE": _delete_webhook},
    "/api/webhooks/{id:int}/ping": {"POST": _ping_webhook},
    "/api/jobs": {"GET": _jobs, "POST": _create_job},
    "/api/jobs/{id:int}": {"GET": _job, "PATCH": _patch_job, "DELETE": _delete_job},
    "/api/jobs/{id:int}/data": {"GET": _data},
    "/api/jobs/{id:int}/data/meta": {"GET": _meta, "PATCH": _patch_meta},
    "/api/jobs/{id:int}/annotations": _ANNOTATIONS,
    "/api/jobs/{id:int}/annotations/": _ANNOTATIONS,
    "/api/jobs/{id:int}/dataset/export": {"POST": _export},
    "/api/jobs/{id:int}/dataset/download": {"GET": _download},
    "/api/issues": {"GET": _issues, "POST": _create_issue},
    "/api/comments": {"GET": _comments},
    "/api/requests": {"GET": _requests},
    "/api/requests/{id:path}": {"GET": _request},
    "/api/lambda/functions": {"GET": _functions},
    "/api/lambda/functions/{id}": {"GET": _function, "POST": _call_function},
    "/api/lambda/requests": {"GET": _runs, "POST": _start_run},
    "/api/lambda/requests/{id:path}": {"GET": _run, "DELETE": _cancel_run},
}
