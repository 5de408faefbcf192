import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from cvat_sdk import models
from cvat_sdk.api_client.exceptions import NotFoundException
from numpy.typing import NDArray
from PIL import Image

from cvat_standin import CvatStandin, jobs_of, make_task, set_state


class Receiver:
    """Answers 204 to everything, and keeps it."""

    def __init__(self) -> None:
        self.taken: list[tuple[str | None, bytes]] = []
        taken = self.taken

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken.append((self.headers.get("X-Signature-256"), body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/webhook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


@pytest.fixture
def image(tmp_path: Any, make_panorama: Callable[..., NDArray[np.uint8]]) -> bytes:
    Image.fromarray(make_panorama()).save(tmp_path / "1.png")
    data: bytes = (tmp_path / "1.png").read_bytes()
    return data


def test_a_changed_job_is_told_signed(cvat_server: CvatStandin, receiver: Receiver, image: bytes) -> None:
    secret = "a secret of CVAT"
    with cvat_server.site.client() as client:
        project, other = (cvat_server.site.make_project(client, name, [{"name": "Земля"}]) for name in ("a", "b"))
        jobs = [jobs_of(client, make_task(client, each.id, {"1.png": image}).id)[0] for each in (project, other)]
        hooks = client.api_client.webhooks_api
        hook, _ = hooks.create(
            models.WebhookWriteRequest(
                target_url=receiver.url,
                type=models.WebhookType("project"),
                project_id=project.id,
                events=[models.EventsEnum("update:job")],
                secret=secret,
            )
        )
        assert [found.id for found in hooks.list(project_id=project.id)[0].results] == [hook.id]
        assert hooks.list(project_id=other.id)[0].results == []
        set_state(client, jobs[0], state="in progress")
        set_state(client, jobs[0], state="in progress")  # changes nothing
        set_state(client, jobs[1], state="completed")  # of another project
        cvat_server.set_job(jobs[0], state="completed")
        cvat_server.deliveries.wait()
        delivery, _ = hooks.create_ping(hook.id)
        hooks.partial_update(hook.id, patched_webhook_write_request=models.PatchedWebhookWriteRequest(is_active=False))
        cvat_server.set_job(jobs[0], state="rejected")
        cvat_server.deliveries.wait()
        hooks.destroy(hook.id)
        with pytest.raises(NotFoundException, match="404"):
            hooks.retrieve(hook.id)

    assert delivery.status_code == 204
    told = [json.loads(body) for _, body in receiver.taken]
    assert [message["event"] for message in told] == ["update:job", "update:job", "ping"]
    by_state = {message["job"]["state"]: message for message in told[:2]}  # sent at once: either may come first
    assert by_state["completed"]["before_update"] == {"state": "in progress"}
    assert by_state["completed"]["job"]["id"] == jobs[0]
    assert by_state["completed"]["job"]["project_id"] == project.id
    assert by_state["completed"]["webhook_id"] == told[2]["webhook"]["id"] == hook.id
    for signature, body in receiver.taken:
        assert signature == "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    assert all(secret not in body.decode() for _, body in receiver.taken)


def test_nobody_answers(cvat_server: CvatStandin) -> None:
    with cvat_server.site.client() as client:
        project = cvat_server.site.make_project(client, "a", [])
        hooks = client.api_client.webhooks_api
        request = models.WebhookWriteRequest(
            target_url="http://127.0.0.1:9/webhook",
            type=models.WebhookType("project"),
            project_id=project.id,
            events=[models.EventsEnum("update:job")],
        )
        hook, _ = hooks.create(request)
        assert hooks.create_ping(hook.id)[0].status_code == 502
