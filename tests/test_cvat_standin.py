"""The stand-in answers the real cvat-sdk as CVAT 2.73 does, and fails when it is told to."""

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import numpy as np
import pytest
import urllib3
from cvat_sdk import Client, models
from cvat_sdk.api_client.exceptions import ApiException, ForbiddenException, NotFoundException, ServiceException
from cvat_sdk.core.client import AccessTokenCredentials, PasswordCredentials
from cvat_sdk.core.exceptions import BackgroundRequestException
from cvat_sdk.core.helpers import get_paginated_collection
from cvat_sdk.core.proxies.annotations import AnnotationUpdateAction
from cvat_sdk.core.proxies.tasks import Task
from cvat_sdk.core.uploading import DataUploader
from PIL import Image

import cvat_standin as standin
from cvat_standin import CvatStandin, Function, Site, add_shapes, job_shapes, jobs_of, label_ids, make_task, polygon

LABELS: list[dict[str, Any]] = [
    {
        "name": "Земля",
        "color": "#aa5500",
        "type": "any",
        "attributes": [
            {"name": "model", "mutable": False, "input_type": "text", "values": [""], "default_value": "?"},
        ],
    },
    {"name": "Фон", "type": "mask"},
    {"name": "Линия", "type": "polyline"},
]
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 9.0, 7.0]


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A file of random pixels, 16 wide and 8 high."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, kind)
    return packed.getvalue()


@pytest.fixture
def client(cvat_server: CvatStandin) -> Iterator[Client]:
    with cvat_server.site.client() as client:
        yield client


@pytest.fixture
def project(cvat_server: CvatStandin, client: Client) -> int:
    return int(cvat_server.site.make_project(client, "Улица", LABELS).id)


@pytest.fixture
def task(client: Client, project: int) -> Task:
    """Four frames, two jobs."""
    return make_task(client, project, {f"{n}.png": picture(n) for n in range(4)}, segment_size=2)


def send(client: Client, method: str, path: str, body: Any) -> Any:
    """A request that the SDK's models would not let through → the parsed reply."""
    auth = client.api_client.projects_api.partial_update_endpoint.settings["auth"]
    _, reply = client.api_client.call_api(path, method, body=body, auth_settings=auth, _parse_response=False)
    return json.loads(reply.data)


def raw(server: CvatStandin, path: str, **options: Any) -> urllib3.BaseHTTPResponse:
    """One request without the SDK and without retries."""
    headers = {"Authorization": f"Bearer {server.access_token}"}
    with urllib3.PoolManager(retries=False) as pool:
        return pool.request("GET", server.url + path, headers=headers, **options)


def updated(client: Client, task: Task, job: int) -> tuple[datetime, datetime, datetime]:
    """Dates of a job, its task, its project."""
    return (
        client.jobs.retrieve(job).updated_date,
        client.tasks.retrieve(task.id).updated_date,
        client.projects.retrieve(task.project_id).updated_date,
    )


# On the stand-in and on a live server


def test_a_round_trip_is_the_same_on_a_live_server(cvat_site: Site) -> None:
    images = {"дом/1.jpg": picture(1, "JPEG"), "дом/2.jpg": picture(2, "JPEG"), "a.png": picture(3)}
    with cvat_site.client() as client:
        project = cvat_site.make_project(client, "sscloud: a test of the stand-in", LABELS)
        task = make_task(client, project.id, images, segment_size=2)
        assert [frame.name for frame in task.get_frames_info()] == sorted(images)
        assert [(frame.width, frame.height) for frame in task.get_frames_info()] == [(16, 8)] * 3
        for number, name in enumerate(sorted(images)):
            assert task.get_frame(number, quality="original").read() == images[name]
        ids = label_ids(client, project.id)
        assert set(ids) == {"Земля", "Фон", "Линия"}
        first, second = jobs_of(client, task.id)
        bitmap = np.zeros((8, 16), bool)
        bitmap[2:4, 3:6] = True
        shapes = [polygon(ids["Земля"], 0, TRIANGLE), standin.mask(ids["Фон"], 1, bitmap, z_order=3, source="auto")]
        drawn = add_shapes(client, first, shapes)
        found = {shape["id"]: shape for shape in job_shapes(client, first)}
        assert set(found) == set(drawn)
        assert [found[key]["points"] for key in drawn] == [TRIANGLE, [0, 6, 3, 2, 5, 3]]
        assert [(found[key]["source"], found[key]["z_order"]) for key in drawn] == [("manual", 0), ("auto", 3)]
        assert [value["value"] for value in found[drawn[0]]["attributes"]] == ["?"]
        assert job_shapes(client, second) == []
        standin.set_state(client, first, stage="acceptance", state="completed")
        job = client.jobs.retrieve(first)
        assert (str(job.stage), str(job.state)) == ("acceptance", "completed")
        truth = client.jobs.retrieve(standin.make_ground_truth(client, task.id, [1]))
        assert (truth.start_frame, truth.stop_frame, truth.frame_count) == (0, 2, 1)
        assert truth.get_meta().included_frames == [1]


# Who asks


def test_credentials_are_checked(cvat_server: CvatStandin) -> None:
    site = cvat_server.site
    with Client(cvat_server.url, check_server_version=False) as client:
        with pytest.raises(ApiException, match="Authentication credentials were not provided") as refused:
            client.users.retrieve_current_user()
        assert refused.value.status == 401
        with pytest.raises(ApiException, match="Unable to log in"):
            client.login(PasswordCredentials(site.username, "wrong"))
        client.login(PasswordCredentials(site.username, site.password))
        assert client.users.retrieve_current_user().username == site.username
        client.logout()
        with pytest.raises(ApiException, match="not provided"):
            client.projects.list()
        client.login(AccessTokenCredentials(cvat_server.access_token))
        assert client.projects.list() == []
        client.login(AccessTokenCredentials("token-of-somebody"))
        with pytest.raises(ApiException, match="Invalid access token"):
            client.projects.list()


def test_a_write_needs_the_csrf_token(cvat_server: CvatStandin, client: Client) -> None:
    client.api_client.configuration.api_key.pop("csrfHeaderAuth")
    with pytest.raises(ForbiddenException, match="CSRF"):
        client.projects.create(models.ProjectWriteRequest(name="x"))
    assert client.projects.list() == []


def test_lists_are_of_the_organisation(cvat_server: CvatStandin, client: Client) -> None:
    cvat_server.site.make_project(client, "mine", LABELS)
    cvat_server.add_organization("scanners")
    with client.organization_context("scanners"):
        cvat_server.site.make_project(client, "ours", LABELS)
        assert [project.name for project in client.projects.list()] == ["ours"]
    with client.organization_context(""):
        assert [project.name for project in client.projects.list()] == ["mine"]
    assert [project.name for project in client.projects.list()] == ["ours", "mine"]
    assert [organization.slug for organization in client.organizations.list()] == ["scanners"]
    with client.organization_context("nobody"), pytest.raises(NotFoundException, match="nobody"):
        client.projects.list()


def test_the_version_warning_of_the_sdk(cvat_server: CvatStandin, caplog: pytest.LogCaptureFixture) -> None:
    with Client(cvat_server.url):
        assert "Server version '2.73.0' is not compatible" in caplog.text
    cvat_server.version = "2.80.0"
    caplog.clear()
    with Client(cvat_server.url):
        assert caplog.text == ""


# Lists


def test_lists_come_in_pages_and_newest_first(cvat_server: CvatStandin, client: Client) -> None:
    names = [f"проект {n}" for n in range(5)]
    for name in names:
        cvat_server.site.make_project(client, name, LABELS)
    cvat_server.page_size = 2
    assert [project.name for project in client.projects.list()] == names[::-1]
    assert cvat_server.count("GET", r"/api/projects$") == 3
    with pytest.raises(NotFoundException, match="Invalid page"):
        client.api_client.projects_api.list(page=4)
    page, _ = client.api_client.projects_api.list(page_size=4)
    assert (page.count, len(page.results)) == (5, 4)
    cvat_server.largest_page = 3
    page, _ = client.api_client.projects_api.list(page_size=4)
    assert len(page.results) == 3
    found, _ = client.api_client.projects_api.list(search="ЕКТ 3")
    assert [project.name for project in found.results] == ["проект 3"]
    rule = json.dumps({"and": [{"in": ["1", {"var": "name"}]}, {"<=": [{"var": "id"}, 3]}]})
    found, _ = client.api_client.projects_api.list(filter=rule)
    assert [project.name for project in found.results] == ["проект 1"]


def test_jobs_of_a_task(client: Client, project: int, task: Task) -> None:
    jobs = client.jobs.list()
    assert [(job.start_frame, job.stop_frame) for job in jobs] == [(2, 3), (0, 1)]  # the newest first
    make_task(client, project, {"x.png": picture(9)})
    endpoint = client.api_client.jobs_api.list_endpoint
    assert len(get_paginated_collection(endpoint, task_id=task.id)) == 2
    assert len(get_paginated_collection(endpoint, project_id=project)) == 3
    assert [(str(job.type), str(job.state), str(job.stage)) for job in jobs] == [
        ("annotation", "new", "annotation")
    ] * 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state": "completed"}, ("annotation", "completed", "annotation")),
        ({"stage": "validation"}, ("validation", "new", "validation")),
        ({"stage": "acceptance", "state": "completed"}, ("acceptance", "completed", "completed")),
    ],
)
def test_state_and_stage(client: Client, task: Task, change: dict[str, str], expected: tuple[str, str, str]) -> None:
    job = jobs_of(client, task.id)[0]
    before = updated(client, task, job)
    standin.set_state(client, job, state="in progress")
    standin.set_state(client, job, **change)
    found = client.jobs.retrieve(job)
    assert (str(found.stage), str(found.state), str(found.status)) == expected
    assert updated(client, task, job)[0] > before[0]


# Labels


def test_labels_change_as_nested_lists_say(client: Client, project: int, task: Task) -> None:
    ids = label_ids(client, project)
    job = jobs_of(client, task.id)[0]
    add_shapes(client, job, [polygon(ids["Земля"], 0, TRIANGLE), polygon(ids["Линия"], 0, TRIANGLE)])
    before = updated(client, task, job)
    request = models.PatchedLabelRequest
    attribute = models.AttributeRequest(name="confidence", mutable=False, input_type="text", values=[""])
    proxy = client.projects.retrieve(project)
    proxy.update(
        models.PatchedProjectWriteRequest(
            labels=[
                request(name="Столб", color="#123456"),
                request(id=ids["Фон"], name="Background", color="#000000", attributes=[attribute]),
                request(id=ids["Линия"], deleted=True),
            ]
        )
    )
    labels = {label.name: label for label in proxy.get_labels()}
    assert list(labels) == ["Земля", "Background", "Столб"]
    assert labels["Background"].id == ids["Фон"]
    assert labels["Столб"].color == "#123456"
    assert labels["Земля"].color == "#aa5500"
    assert [value.name for value in labels["Background"].attributes] == ["confidence"]
    assert [shape["label_id"] for shape in job_shapes(client, job)] == [ids["Земля"]]
    assert all(new > old for new, old in zip(updated(client, task, job), before, strict=True))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"name": "a"}, {"name": "a"}], "unique"),
        ([{"name": "a" * 64, "type": "circle"}], "not a valid choice"),
        ([{"name": "b"}, {"id": 99, "name": "c"}], "Not found label with id #99"),
    ],
)
def test_wrong_labels_change_nothing(client: Client, project: int, labels: list[Any], message: str) -> None:
    before = label_ids(client, project)
    with pytest.raises(ApiException, match=message):
        send(client, "PATCH", f"/api/projects/{project}", {"labels": labels})
    assert label_ids(client, project) == before


# Data


def test_large_files_come_by_tus(client: Client, project: int, tmp_path: Path, cvat_server: CvatStandin) -> None:
    big, small = picture(1, "BMP"), picture(2)
    (tmp_path / "большой.bmp").write_bytes(big)
    (tmp_path / "small.png").write_bytes(small)
    task = client.tasks.create(models.TaskWriteRequest(name="tus", project_id=project))
    uploader = DataUploader(client, max_request_size=100)
    url = client.api_client.configuration.host + f"/api/tasks/{task.id}/data/"
    reply = uploader.upload_files(url, sorted(tmp_path.iterdir()), image_quality=70)
    client.wait_for_completion(json.loads(reply.data)["rq_id"])
    task.fetch()
    assert [frame.name for frame in task.get_frames_info()] == ["small.png", "большой.bmp"]
    assert task.get_frame(1, quality="original").read() == big
    assert cvat_server.count("PATCH", rf"/api/tasks/{task.id}/data/[0-9a-f-]+$") == 2


def test_an_upload_without_pictures_fails_in_the_background(client: Client, project: int, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    spec = models.TaskWriteRequest(name="none", project_id=project)
    with pytest.raises(BackgroundRequestException, match="No media data found"):
        client.tasks.create_from_data(spec, [tmp_path / "notes.txt"])


def test_a_background_request_takes_its_time(client: Client, project: int, cvat_server: CvatStandin) -> None:
    cvat_server.polls_until_done = 3
    make_task(client, project, {"x.png": picture(1)})
    asked = cvat_server.find("GET", r"/api/requests/")
    assert len(asked) == 4
    seen = []
    cvat_server.add_export("project", project, "X", b"")
    api = client.api_client
    rq_id = json.loads(api.projects_api.create_dataset_export("X", project)[1].data)["rq_id"]
    while not seen or seen[-1] != "finished":
        seen.append(str(api.requests_api.retrieve(rq_id)[0].status))
    assert seen == ["queued", "queued", "started", "finished"]


def test_frames_and_chunks(client: Client, project: int, cvat_server: CvatStandin) -> None:
    images = {f"{n}.png": picture(n) for n in range(5)}
    task = make_task(client, project, images, segment_size=3, chunk_size=2)
    assert (task.size, task.data_chunk_size) == (5, 2)
    chunk = io.BytesIO()
    task.download_chunk(1, chunk, quality="original")
    with zipfile.ZipFile(chunk) as archive:
        assert archive.namelist() == ["000000.png", "000001.png"]
        assert [archive.read(name) for name in archive.namelist()] == [images["2.png"], images["3.png"]]
    # Not through the SDK's Job: it parses frames of jobs into files that it leaves open in the temporary folder.
    first, second = (f"/api/jobs/{job}/data?quality=original&type=" for job in jobs_of(client, task.id))
    reply = raw(cvat_server, f"{second}frame&number=3")
    assert (reply.data, reply.headers["Content-Type"]) == (images["3.png"], "image/png")
    assert raw(cvat_server, f"{first}frame&number=3").status == 404
    with zipfile.ZipFile(io.BytesIO(raw(cvat_server, f"{second}chunk&index=0").data)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [images["3.png"], images["4.png"]]
    assert raw(cvat_server, f"{first}chunk&index=2").status == 404
    compressed = task.get_frame(0).read()
    assert compressed[:2] == b"\xff\xd8"
    meta = client.jobs.retrieve(jobs_of(client, task.id)[1]).get_meta()
    assert (meta.start_frame, meta.stop_frame, meta.size, meta.included_frames) == (3, 4, 2, None)
    assert [frame.name for frame in meta.frames] == ["3.png", "4.png"]


def test_deleted_frames_are_numbered_by_the_task(client: Client, task: Task) -> None:
    first, second = (client.jobs.retrieve(job) for job in jobs_of(client, task.id))
    task.remove_frames_by_ids([0, 3])
    assert task.get_meta().deleted_frames == [0, 3]
    assert first.get_meta().deleted_frames == [0]
    assert second.get_meta().deleted_frames == [3]
    second.remove_frames_by_ids([2])
    assert task.get_meta().deleted_frames == [0, 2]


def test_replicas_and_ground_truth_are_jobs_of_their_own(
    client: Client, project: int, cvat_server: CvatStandin
) -> None:
    task = make_task(client, project, {"a.png": picture(1), "b.png": picture(2)}, replicas=2)
    [job] = jobs_of(client, task.id)
    replicas = jobs_of(client, task.id, type="consensus_replica")
    assert [client.jobs.retrieve(replica).parent_job_id for replica in replicas] == [job, job]
    assert len(cvat_server.make_replicas(job, 1)) == 1
    assert len(jobs_of(client, task.id, type="consensus_replica")) == 3
    truth = standin.make_ground_truth(client, task.id, [1])
    with pytest.raises(ApiException, match="more than 1 GT job"):
        standin.make_ground_truth(client, task.id, [0])
    land = label_ids(client, project)["Земля"]
    for number in (*replicas, truth):
        add_shapes(client, number, [polygon(land, 1, TRIANGLE)])
    assert task.get_annotations().shapes == []
    assert [frame.name for frame in client.jobs.retrieve(truth).get_frames_info()] == ["placeholder.jpg", "b.png"]
    client.jobs.retrieve(truth).remove_frames_by_ids([1])
    assert client.jobs.retrieve(truth).get_meta().deleted_frames == [1]
    assert task.get_meta().deleted_frames == []


# Annotations


def test_shapes_are_listed_by_frame_and_a_changed_one_last(client: Client, task: Task, project: int) -> None:
    land = label_ids(client, project)["Земля"]
    job = jobs_of(client, task.id)[0]
    ids = add_shapes(client, job, [polygon(land, frame, TRIANGLE) for frame in (1, 0, 0)])
    assert [shape["id"] for shape in job_shapes(client, job)] == [ids[1], ids[2], ids[0]]
    before = updated(client, task, job)
    change = models.LabeledShapeRequest(
        **(polygon(land, 0, [*TRIANGLE, 2, 5], id=ids[1]) | {"type": models.ShapeType("polygon")})
    )
    patch = models.PatchedLabeledDataRequest(version=0, tags=[], shapes=[change], tracks=[])
    client.jobs.retrieve(job).update_annotations(patch, action=AnnotationUpdateAction.UPDATE)
    assert [shape["id"] for shape in job_shapes(client, job)] == [ids[2], ids[1], ids[0]]
    assert len(job_shapes(client, job)[1]["points"]) == 8
    assert all(new > old for new, old in zip(updated(client, task, job), before, strict=True))
    client.jobs.retrieve(job).remove_annotations(ids=[ids[0], ids[2]])
    assert [shape["id"] for shape in job_shapes(client, job)] == [ids[1]]
    client.jobs.retrieve(job).remove_annotations()
    assert job_shapes(client, job) == []


def test_a_task_gives_each_job_its_frames(client: Client, task: Task, project: int) -> None:
    ids = label_ids(client, project)
    tag = models.LabeledImageRequest(frame=3, label_id=ids["Фон"])
    track = models.LabeledTrackRequest(
        frame=2,
        label_id=ids["Земля"],
        shapes=[models.TrackedShapeRequest(type=models.ShapeType("rectangle"), frame=2, points=[1.0, 1.0, 4.0, 4.0])],
    )
    shapes = [
        models.LabeledShapeRequest(
            type=models.ShapeType("polygon"), frame=frame, label_id=ids["Земля"], points=TRIANGLE
        )
        for frame in (0, 3, 99)
    ]
    task.set_annotations(models.LabeledDataRequest(version=0, tags=[tag], shapes=shapes, tracks=[track]))
    first, second = (client.jobs.retrieve(job).get_annotations() for job in jobs_of(client, task.id))
    assert [shape.frame for shape in first.shapes] == [0]
    assert [shape.frame for shape in second.shapes] == [3]
    assert (len(first.tags), len(second.tags), len(second.tracks)) == (0, 1, 1)
    assert [shape.frame for shape in task.get_annotations().shapes] == [0, 3]
    task.set_annotations(models.LabeledDataRequest(version=0, tags=[], shapes=[], tracks=[]))
    assert task.get_annotations().shapes == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": [1.0, 2.0, 3.0, 4.0]}, "4 numbers are no polygon"),
        ({"points": [1.0] * 7}, "7 numbers are no polygon"),
        ({"label_id": 77}, "label_id `77` is invalid"),
        ({"attributes": [{"spec_id": 5, "value": "x"}]}, "spec_id `5` is invalid"),
        ({"rotation": 361.0}, "360"),
    ],
)
def test_wrong_shapes_are_refused(
    client: Client, task: Task, project: int, cvat_server: CvatStandin, fields: dict[str, Any], message: str
) -> None:
    job = jobs_of(client, task.id)[0]
    good = polygon(label_ids(client, project)["Земля"], 0, TRIANGLE)
    body = {"version": 0, "tags": [], "tracks": [], "shapes": [good, {**good, **fields}]}
    with pytest.raises(ApiException, match=message):
        send(client, "PATCH", f"/api/jobs/{job}/annotations/?action=create", body)
    assert cvat_server.shapes(job) == []


def test_people_work_behind_the_back(client: Client, task: Task, project: int, cvat_server: CvatStandin) -> None:
    land = label_ids(client, project)["Земля"]
    job = jobs_of(client, task.id)[0]
    ids = add_shapes(client, job, [polygon(land, 0, TRIANGLE, source="auto") for _ in range(3)])
    cvat_server.set_shape_order(job, ids[::-1])
    assert [shape["id"] for shape in job_shapes(client, job)] == ids[::-1]
    before = updated(client, task, job)
    cvat_server.edit_shape(ids[1], points=[1.0, 1.0, 5.0, 1.0, 5.0, 5.0])
    assert job_shapes(client, job)[1]["points"] == [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]
    assert job_shapes(client, job)[1]["source"] == "auto"
    assert all(new > old for new, old in zip(updated(client, task, job), before, strict=True))
    cvat_server.set_job(job, state="completed")
    assert str(client.jobs.retrieve(job).state) == "completed"
    cvat_server.rename_frame(task.id, 1, "../../evil.png")
    assert client.tasks.retrieve(task.id).get_frames_info()[1].name == "../../evil.png"
    cvat_server.replace_frame(task.id, 1, b"no picture")
    with pytest.raises(ValueError, match=r"not \[1\]"):
        cvat_server.set_shape_order(job, [1])
    with pytest.raises(ValueError, match="no shape 99"):
        cvat_server.edit_shape(99, z_order=1)


def test_jobs_are_given_to_users(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    cvat_server.store.users[2] = "anna"
    users = get_paginated_collection(client.api_client.users_api.list_endpoint, username="anna")
    assert [(user.id, user.username) for user in users] == [(2, "anna")]
    assert len(get_paginated_collection(client.api_client.users_api.list_endpoint)) == 2
    job = client.jobs.retrieve(jobs_of(client, task.id)[0])
    before = job.updated_date

    job.update(models.PatchedJobWriteRequest(assignee=2))

    job.fetch()
    assert job.assignee.username == "anna"
    assert job.updated_date > before
    job.update(models.PatchedJobWriteRequest(state=models.OperationStatus("completed")))
    assert job.fetch().assignee.id == 2
    with pytest.raises(ApiException, match="object does not exist"):
        job.update(models.PatchedJobWriteRequest(assignee=9))


def test_issues_are_pinned_to_frames(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    job = jobs_of(client, task.id)[0]
    spec = models.IssueWriteRequest(frame=0, position=[1.0, 2.0, 3.0, 4.0], job=job, message="Почему?")

    issue, _ = client.api_client.issues_api.create(spec)

    found = client.jobs.retrieve(job).get_issues()
    assert [(entry.id, entry.frame, entry.job, entry.position, entry.resolved) for entry in found] == [
        (issue.id, 0, job, [1.0, 2.0, 3.0, 4.0], False)
    ]
    assert client.jobs.retrieve(job).issues.count == 1
    for which in ({"job_id": job}, {"issue_id": issue.id}, {"job_id": job, "frame_id": 0}):
        comments = get_paginated_collection(client.api_client.comments_api.list_endpoint, **which)
        assert [(comment.issue, comment.message) for comment in comments] == [(issue.id, "Почему?")]
    for other in ({"task_id": task.id + 1}, {"job_id": job + 100}):
        assert get_paginated_collection(client.api_client.issues_api.list_endpoint, **other) == []
    spec = models.IssueWriteRequest(frame=0, position=[1.0], job=99, message="?")
    with pytest.raises(ApiException, match="object does not exist"):
        client.api_client.issues_api.create(spec)
    client.tasks.retrieve(task.id).remove()
    assert cvat_server.store.issues == {}


def test_requests_are_found_by_their_task(client: Client, task: Task) -> None:
    endpoint = client.api_client.requests_api.list_endpoint
    found = get_paginated_collection(endpoint, action="create", target="task", task_id=task.id)
    assert [request.operation.task_id for request in found] == [task.id]
    assert get_paginated_collection(endpoint, action="create", task_id=task.id + 1) == []
    assert get_paginated_collection(endpoint, action="export", task_id=task.id) == []


def test_deleting_takes_everything_below(client: Client, task: Task, project: int, cvat_server: CvatStandin) -> None:
    job = jobs_of(client, task.id)[0]
    cvat_server.site.delete_projects()
    for retrieve, number in ((client.projects, project), (client.tasks, task.id), (client.jobs, job)):
        with pytest.raises(NotFoundException, match="matches the given query"):
            retrieve.retrieve(number)
    assert cvat_server.site.projects == []


def test_exports_are_what_was_registered(
    client: Client, project: int, cvat_server: CvatStandin, tmp_path: Path
) -> None:
    cvat_server.add_export("project", project, "LabelMe 3.0", b"an archive")
    proxy = client.projects.retrieve(project)
    found = proxy.export_dataset("LabelMe 3.0", tmp_path / "x.zip", include_images=False)
    assert found is not None
    assert found.read_bytes() == b"an archive"
    [asked] = cvat_server.find("POST", r"/dataset/export$")
    assert asked.query == {"format": "LabelMe 3.0", "save_images": "False"}
    with pytest.raises(BackgroundRequestException, match=r"no export 'COCO 1\.0'"):
        proxy.export_dataset("COCO 1.0", tmp_path / "y.zip")


# Automatic annotation


def box(label: str, **more: Any) -> dict[str, Any]:
    """A mask of 2x3 pixels with one of them out, as a function sends it."""
    return {"label": label, "type": "mask", "mask": [1, 1, 0, 0, 1, 1, 4, 2, 6, 3], **more}


def request(client: Client, **fields: Any) -> Any:
    """Start a run and wait for it."""
    run, _ = client.api_client.lambda_api.create_requests(models.FunctionCallRequest(**fields))
    return wait(client, run.id)


def wait(client: Client, run_id: str) -> Any:
    """The run when it has ended."""
    while True:
        run, _ = client.api_client.lambda_api.retrieve_requests(run_id)
        if run.status in ("finished", "failed"):
            return run
        time.sleep(0.005)


def test_a_run_stores_what_meets_the_labels(client: Client, task: Task, project: int, cvat_server: CvatStandin) -> None:
    payloads: list[dict[str, Any]] = []

    def handler(image: bytes, payload: dict[str, Any]) -> list[dict[str, Any]]:
        payloads.append(payload)
        values = [{"name": "model", "value": "7"}, {"name": "unknown", "value": "x"}]
        return [box("Земля", attributes=values, confidence=0.5), box("Небо"), box("Линия")]

    spec = {"name": "model", "input_type": "text", "values": []}
    labels = [{"name": "Земля", "type": "mask", "attributes": [spec]}, "Небо", {"name": "Линия", "type": "mask"}]
    cvat_server.add_function(Function(id="unet", labels=labels, handler=handler))
    task.remove_frames_by_ids([1])
    run = request(client, function="unet", task=task.id, threshold=0.25)
    assert (run.status, run.progress, run.exc_info) == ("finished", 100, None)
    assert [base64.b64decode(payload["image"]) for payload in payloads] == [picture(0), picture(2), picture(3)]
    assert [payload["threshold"] for payload in payloads] == [0.25] * 3
    shapes = task.get_annotations().shapes
    assert [shape.frame for shape in shapes] == [0, 2, 3]  # Небо and the polyline Линия did not meet
    assert [(shape.source, shape.z_order, shape.score) for shape in shapes] == [("auto", 0, 1.0)] * 3
    assert shapes[0].points == [0, 2, 2, 2, 4, 2, 6, 3]
    assert [value.value for value in shapes[0].attributes] == ["7"]


def test_a_mapping_renames_and_is_checked_in_the_run(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    cvat_server.add_function(Function(id="unet", labels=["ground"], handler=lambda image, payload: [box("ground")]))
    entry = models.LabelMappingEntryRequest
    job = jobs_of(client, task.id)[1]
    run = request(client, function="unet", task=task.id, job=job, mapping={"ground": entry(name="Земля")})
    assert run.status == "finished"
    assert [shape["frame"] for shape in job_shapes(client, job)] == [2, 3]
    run = request(client, function="unet", task=task.id, mapping={"ground": entry(name="Вода")}, cleanup=True)
    assert (run.status, "Unknown db label" in run.exc_info) == ("failed", True)
    assert task.get_annotations().shapes == []  # cleanup came first


def test_masks_become_polygons_only_with_points(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    both = [box("Фон", points=TRIANGLE), box("Фон")]
    cvat_server.add_function(Function(id="unet", labels=["Фон"], handler=lambda image, payload: both))
    job = jobs_of(client, task.id)[0]
    request(client, function="unet", task=task.id, job=job, conv_mask_to_poly=True)
    assert [str(shape["type"]) for shape in job_shapes(client, job)] == ["polygon", "mask"] * 2


def test_a_failed_frame_fails_the_run(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    def handler(image: bytes, payload: dict[str, Any]) -> list[dict[str, Any]]:
        if image == picture(3):
            raise RuntimeError("out of memory")
        return [box("Фон")]

    cvat_server.add_function(Function(id="unet", labels=["Фон"], handler=handler))
    run = request(client, function="unet", task=task.id)
    assert run.status == "failed"
    assert "500 Server Error: Internal Server Error for url" in run.exc_info
    assert "out of memory" not in run.exc_info
    assert task.get_annotations().shapes == []  # the frames before are lost too
    bad = {"label": "Фон", "type": "polygon", "points": [1, 2, 3]}
    cvat_server.add_function(Function(id="unet", labels=["Фон"], handler=lambda image, payload: [bad]))
    assert "3 numbers are no polygon" in request(client, function="unet", task=task.id).exc_info


def test_one_run_a_task_at_a_time(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    go = threading.Event()

    def handler(image: bytes, payload: dict[str, Any]) -> list[dict[str, Any]]:
        go.wait(30)
        return [box("Фон")]

    cvat_server.add_function(Function(id="unet", labels=["Фон"], handler=handler))
    api = client.api_client.lambda_api
    first, second = jobs_of(client, task.id)
    run, _ = api.create_requests(models.FunctionCallRequest(function="unet", task=task.id, job=first))
    try:
        with pytest.raises(ApiException, match="Only one running request") as refused:
            api.create_requests(models.FunctionCallRequest(function="unet", task=task.id, job=second))
        assert refused.value.status == 409
        assert [entry.id for entry in api.list_requests()[0]] == [run.id]
    finally:
        go.set()
    assert wait(client, run.id).status == "finished"
    assert request(client, function="unet", task=task.id, job=second).status == "finished"
    api.delete_requests(run.id)
    with pytest.raises(NotFoundException, match="lambda job is not found"):
        api.retrieve_requests(run.id)


def test_one_frame_at_once(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    cvat_server.add_function(Function(id="unet", labels=["Фон"], handler=lambda image, payload: [box("Фон")]))

    def call(body: dict[str, Any]) -> Any:
        return send(client, "POST", "/api/lambda/functions/unet", body)

    assert call({"task": task.id, "frame": 1}) == [box("Фон", attributes=[])]
    assert task.get_annotations().shapes == []
    with pytest.raises(ApiException, match="outside the job range"):
        call({"job": jobs_of(client, task.id)[0], "frame": 3})
    with pytest.raises(ApiException, match="wrong arguments"):
        call({"frame": 1})


@pytest.mark.parametrize("broken", [{"version": "latest"}, {"description": None}])
def test_one_broken_function_breaks_the_list(client: Client, cvat_server: CvatStandin, broken: dict[str, Any]) -> None:
    api = client.api_client.lambda_api
    cvat_server.add_function(Function(id="good", labels=["Фон"], handler=lambda image, payload: []))
    cvat_server.add_function(Function(id="strange", labels=["a", "a"], handler=lambda image, payload: []))
    listed = json.loads(api.list_functions(_parse_response=False)[1].data)
    assert [(entry["id"], entry["version"]) for entry in listed] == [("good", 1)]
    assert listed[0]["labels_v2"] == [{"name": "Фон", "type": "mask", "attributes": []}]
    cvat_server.add_function(Function(id="bad", labels=["Фон"], handler=lambda image, payload: [], **broken))
    with pytest.raises(ServiceException, match="500"):
        api.list_functions(_parse_response=False)
    assert json.loads(api.retrieve_functions("good", _parse_response=False)[1].data)["id"] == "good"
    with pytest.raises(ServiceException, match="500"):
        api.retrieve_functions("bad", _parse_response=False)


@contextmanager
def dashboard(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """The two addresses of a Nuclio dashboard that CVAT asks."""
    notes = {"type": "detector", "name": "UNet", "version": "4", "spec": json.dumps([{"name": "Фон", "type": "mask"}])}
    function = {
        "metadata": {"name": "unet", "annotations": notes},
        "spec": {"description": "of the dashboard"},
        "status": {"state": "ready", "httpPort": 1},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"unet": function} if self.path == "/api/functions" else function)

        def do_POST(self) -> None:
            assert self.headers["x-nuclio-function-name"] == "unet"
            self.answer(*reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_functions_of_a_nuclio_dashboard(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    images = []

    def reply(payload: dict[str, Any]) -> tuple[int, Any]:
        images.append(base64.b64decode(payload["image"]))
        return (200, [box("Фон")]) if len(images) <= 4 else (413, {"error": "too large"})

    with dashboard(reply) as url:
        cvat_server.nuclio_url = url
        listed = json.loads(client.api_client.lambda_api.list_functions(_parse_response=False)[1].data)
        assert [(entry["id"], entry["name"], entry["version"]) for entry in listed] == [("unet", "UNet", 4)]
        assert request(client, function="unet", task=task.id).status == "finished"
        assert images == [picture(n) for n in range(4)]
        assert len(task.get_annotations().shapes) == 4
        assert "413 Client Error" in request(client, function="unet", task=task.id).exc_info
    assert raw(cvat_server, "/api/lambda/functions").status == 503


def test_the_sdks_own_auto_annotation(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    class Detector:
        spec = cvataa.DetectionFunctionSpec(labels=[cvataa.label_spec("Фон", 0, type="mask")])

        def detect(self, context: cvataa.DetectionFunctionContext, image: Image.Image) -> list[Any]:
            return [cvataa.mask(0, [0.0, 6.0, 3.0, 2.0, 5.0, 3.0])] if context.frame_name != "1.png" else []

    cvataa.annotate_task(client, task.id, Detector(), allow_unmatched_labels=False)
    assert [(shape.frame, shape.source) for shape in task.get_annotations().shapes] == [
        (0, "auto"),
        (2, "auto"),
        (3, "auto"),
    ]


# Faults and the log


def test_a_dropped_connection(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    path = f"/api/tasks/{task.id}/data/?type=frame&number=0&quality=original"
    cvat_server.fail("GET", r"/api/tasks/\d+/data/$", standin.Drop(after=100), times=2)
    for _ in range(2):
        with pytest.raises(urllib3.exceptions.ProtocolError, match=r"100 bytes read"):
            raw(cvat_server, path)
    assert raw(cvat_server, path).data == picture(0)
    sent = [(entry.status, entry.sent) for entry in cvat_server.find("GET", r"/data/$", type="frame")]
    assert sent == [(None, 100), (None, 100), (200, len(picture(0)))]
    cvat_server.fail("GET", r"/data/$", standin.Drop(after=None))
    with pytest.raises(urllib3.exceptions.ProtocolError, match="Connection aborted"):
        raw(cvat_server, path)
    cvat_server.fail("GET", r"/data/$", standin.Drop(after=10**9))
    with pytest.raises(urllib3.exceptions.ProtocolError, match="1 more expected"):
        raw(cvat_server, path)


def test_error_replies(cvat_server: CvatStandin) -> None:
    cvat_server.fail("GET", r"/api/projects$", standin.Status(429, retry_after=2), skip=1)
    assert [raw(cvat_server, "/api/projects").status for _ in range(3)] == [200, 429, 200]
    cvat_server.fail("*", "", standin.Status(503, retry_after=0), times=None)
    for _ in range(3):
        reply = raw(cvat_server, "/api/jobs")
        assert (reply.status, reply.headers["Retry-After"]) == (503, "0")
        assert b"503 Service Unavailable" in reply.data
    cvat_server.heal()
    assert raw(cvat_server, "/api/jobs").status == 200
    cvat_server.fail("GET", r"/api/jobs$", standin.Status(404), query={"page": "2"})
    assert raw(cvat_server, "/api/jobs").status == 200
    assert raw(cvat_server, "/api/jobs?page=2").data == b'{"detail": "The stand-in was told to fail."}'


@pytest.mark.parametrize(("before", "stored"), [(False, 1), (True, 0)])
def test_a_write_can_get_lost_or_only_its_reply(
    client: Client, task: Task, project: int, cvat_server: CvatStandin, before: bool, stored: int
) -> None:
    job = jobs_of(client, task.id)[0]
    cvat_server.fail("PATCH", r"/annotations", standin.Status(502), before=before)
    with pytest.raises(ServiceException, match="502 Bad Gateway"):
        add_shapes(client, job, [polygon(label_ids(client, project)["Земля"], 0, TRIANGLE)])
    assert len(cvat_server.shapes(job)) == stored


def test_other_bodies(cvat_server: CvatStandin) -> None:
    cvat_server.fail("GET", r"/api/projects$", standin.Body(b"<html>"))
    cvat_server.fail("GET", r"/api/projects$", standin.Truncated(12))
    cvat_server.fail("GET", r"/api/projects$", standin.Slow(0.02, bytes=20))
    assert raw(cvat_server, "/api/projects").data == b"<html>"
    assert raw(cvat_server, "/api/projects").data == b'{"count": 0,'
    started = time.monotonic()
    assert json.loads(raw(cvat_server, "/api/projects").data)["results"] == []
    assert time.monotonic() - started >= 0.06


def test_it_stops_in_the_middle_of_a_reply() -> None:
    with CvatStandin() as server:
        server.fail("GET", r"/api/server/about$", standin.Slow(30, bytes=1))
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"GET /api/server/about HTTP/1.1\r\nHost: x\r\n\r\n")
            while not server.log:
                time.sleep(0.005)
            server.stop()
            connection.settimeout(10)
            while connection.recv(1000):
                pass
    with pytest.raises(urllib3.exceptions.NewConnectionError, match="refused"):
        raw(server, "/api/server/about")


def test_the_log_knows_requests_but_no_secrets(client: Client, task: Task, cvat_server: CvatStandin) -> None:
    standin.set_state(client, jobs_of(client, task.id)[0], state="completed")
    [patch] = cvat_server.find("PATCH", r"/api/jobs/\d+$")
    assert patch.json == {"state": "completed"}
    assert patch.status == 200
    assert cvat_server.count("GET", r"/api/jobs$", task_id=str(task.id)) == 1
    raw(cvat_server, "/api/jobs")
    text = "".join(str(entry.headers) for entry in cvat_server.log)
    assert cvat_server.access_token not in text
    assert "sessionid" not in text
    times = [entry.time for entry in cvat_server.log]
    assert times == sorted(times)
    cvat_server.forget()
    assert cvat_server.log == []
    assert cvat_server.site.password not in repr(cvat_server.site)


def test_by_hand(tmp_path: Path) -> None:
    folder = Path(standin.__file__).parent.parent
    command = [sys.executable, "-m", "cvat_standin", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            url, word, username, _, password = process.stdout.readline().split()
            assert (word, url.rpartition(":")[0]) == ("login", "http://127.0.0.1")
            site = Site(url=url, username=username, password=password)
            with site.client() as client:
                assert client.projects.list() == []
            assert site.environment()["CVAT_URL"] == url
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def test_pictures_differ() -> None:
    """The helpers above would prove little with one picture for all frames."""
    assert len({hashlib.sha256(picture(n)).digest() for n in range(5)}) == 5
