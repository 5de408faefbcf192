import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from cvat_standin import CvatStandin
from sscloud.errors import ConfigError
from tools.webhooks import (
    MOST_REMEMBERED,
    TOLERANCE,
    Inbox,
    RefusedError,
    check_secret,
    check_target,
    register,
    sign,
)
from training.cvat import Account, Server

SECRET = "0123456789abcdef0123456789abcdef"
NOW = datetime(2026, 5, 4, 12, tzinfo=UTC).timestamp()


def message(*, job: int = 19, project: object = 7, state: str = "completed", age: float = 5.0, **fields: Any) -> bytes:
    changed = datetime.fromtimestamp(NOW - age, UTC).isoformat().replace("+00:00", "Z")
    shown = {"id": job, "project_id": project, "state": state, "stage": "annotation", "updated_date": changed}
    data = {"event": "update:job", "job": shown, "before_update": {"state": "new"}, "webhook_id": 3, **fields}
    return json.dumps(data).encode()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox(secret=SECRET, project=7, webhook=3)


def refusal(inbox: Inbox, body: bytes, signature: str | None = "right", *, now: float = NOW) -> int:
    """The status that a message is refused with."""
    with pytest.raises(RefusedError, match=r"\.$") as refused:
        inbox.take(sign(SECRET, body) if signature == "right" else signature, body, now=now)
    return refused.value.status


def test_a_finished_job(inbox: Inbox) -> None:
    body = message()

    taken = inbox.take(sign(SECRET, body), body, now=NOW)

    assert (taken.event, taken.job, taken.finished) == ("update:job", 19, True)


@pytest.mark.parametrize("state", ["new", "in progress", "rejected"])
def test_an_unfinished_job(inbox: Inbox, state: str) -> None:
    body = message(state=state)

    assert not inbox.take(sign(SECRET, body), body, now=NOW).finished


class TestForgeries:
    def test_unsigned(self, inbox: Inbox) -> None:
        assert refusal(inbox, message(), None) == 401

    def test_another_secret(self, inbox: Inbox) -> None:
        assert refusal(inbox, message(), sign("another secret, but not ours", message())) == 401

    def test_a_changed_body(self, inbox: Inbox) -> None:
        assert refusal(inbox, message(job=20), sign(SECRET, message(job=19))) == 401

    def test_an_older_kind_of_signature(self, inbox: Inbox) -> None:
        body = message()
        digest = sign(SECRET, body).removeprefix("sha256=")
        assert refusal(inbox, body, f"sha1={digest}") == 401
        assert refusal(inbox, body, digest) == 401
        assert refusal(inbox, body, "") == 401
        assert refusal(inbox, body, "sha256=é\udcff") == 401

    def test_without_a_secret_nothing_is_taken(self) -> None:
        inbox = Inbox(secret=None, project=7)
        assert refusal(inbox, message(), sign("", message())) == 403

    @pytest.mark.parametrize("project", [8, None, "7", True, 7.0])
    def test_another_project(self, inbox: Inbox, project: object) -> None:
        assert refusal(inbox, message(project=project)) == 403

    def test_another_webhook(self, inbox: Inbox) -> None:
        assert refusal(inbox, message(webhook_id=4)) == 403
        anybody = Inbox(secret=SECRET, project=7)
        body = message(webhook_id=4)
        assert anybody.take(sign(SECRET, body), body, now=NOW).finished


class TestReplays:
    def test_the_same_again(self, inbox: Inbox) -> None:
        body = message()
        inbox.take(sign(SECRET, body), body, now=NOW)

        assert refusal(inbox, body) == 409
        assert refusal(inbox, body, now=NOW + TOLERANCE * 2) == 409

    def test_an_older_change_of_the_same_job(self, inbox: Inbox) -> None:
        for body in (message(age=5, state="in progress"), message(job=20, age=60), message(age=5)):
            inbox.take(sign(SECRET, body), body, now=NOW)

        assert refusal(inbox, message(age=6)) == 409

    @pytest.mark.parametrize("age", [TOLERANCE + 1, -TOLERANCE - 1])
    def test_far_from_now(self, inbox: Inbox, age: float) -> None:
        assert refusal(inbox, message(age=age)) == 409

    def test_what_is_refused_is_not_remembered(self, inbox: Inbox) -> None:
        refusal(inbox, message(age=1), "sha256=0")
        refusal(inbox, message(age=1, project=8))

        body = message(age=2)
        assert inbox.take(sign(SECRET, body), body, now=NOW).finished

    def test_memory_is_bounded(self, inbox: Inbox) -> None:
        memory = inbox.memory
        for number in range(MOST_REMEMBERED + 5):
            memory.bodies[f"{number:064x}"] = NOW - number
        memory.jobs[1] = NOW - TOLERANCE - 1
        body = message()

        inbox.take(sign(SECRET, body), body, now=NOW)

        assert len(memory.bodies) == MOST_REMEMBERED + 1
        assert f"{MOST_REMEMBERED + 4:064x}" not in memory.bodies
        assert list(memory.jobs) == [19]


class TestOtherMessages:
    def test_a_ping_may_come_again(self, inbox: Inbox) -> None:
        body = json.dumps({"event": "ping", "webhook": {"id": 3, "project_id": 7}}).encode()
        for _ in range(2):
            taken = inbox.take(sign(SECRET, body), body, now=NOW)
            assert (taken.event, taken.job, taken.finished) == ("ping", None, False)

    def test_a_ping_of_another_project(self, inbox: Inbox) -> None:
        assert refusal(inbox, json.dumps({"event": "ping", "webhook": {"id": 3, "project_id": 8}}).encode()) == 403

    def test_other_events_mean_nothing(self, inbox: Inbox) -> None:
        body = json.dumps({"event": "delete:task", "task": {"id": 1}, "webhook_id": 3}).encode()

        assert not inbox.take(sign(SECRET, body), body, now=NOW).finished

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[1]",
            b"7",
            b"[" * 100_000,
            b"{}",
            b'{"event": 5}',
            b'{"event": "update:job", "webhook_id": 3}',
            b'{"event": "update:job", "webhook_id": 3, "job": {"id": "19", "state": "completed"}}',
            b'{"event": "update:job", "webhook_id": 3, "job": {"id": true, "state": "completed"}}',
            b'{"event": "update:job", "webhook_id": 3, "job": {"id": 1, "state": "completed", "project_id": 7}}',
            message(age=0).replace(b'Z"', b'"'),
        ],
    )
    def test_nonsense(self, inbox: Inbox, body: bytes) -> None:
        assert refusal(inbox, body) == 400


def test_the_secret_is_not_shown(inbox: Inbox) -> None:
    assert SECRET not in repr(inbox)


@pytest.mark.parametrize("secret", ["", "short", "x" * 65])
def test_weak_secrets(secret: str) -> None:
    with pytest.raises(ConfigError, match=f"SSCLOUD_WEBHOOK_SECRET must have 16 to 64 characters, found {len(secret)}"):
        check_secret(secret)


@pytest.mark.parametrize(
    "url", ["loop.example.org/webhook", "ftp://a/webhook", "https://user:pass@a/webhook", "http://"]
)
def test_targets(url: str) -> None:
    with pytest.raises(ConfigError, match="needs the address under which CVAT reaches this service"):
        check_target(url)


def test_register_makes_one_webhook(cvat_server: CvatStandin) -> None:
    site = cvat_server.site
    with site.client() as client:
        project = site.make_project(client, "Улица", []).id
        other = site.make_project(client, "Двор", []).id
    account = Account(url=cvat_server.url, token=cvat_server.access_token)
    with Server.connect(account) as server:
        first = register(server, project=project, url="https://loop.example.org/webhook", secret=SECRET)
        again = register(server, project=project, url="https://loop.example.org/webhook", secret=SECRET[::-1])
        elsewhere = register(server, project=other, url="https://loop.example.org/webhook", secret=SECRET)

    assert first == again != elsewhere
    webhook = cvat_server.store.webhooks[first]
    assert webhook.project_id == project
    assert (webhook.events, webhook.secret, webhook.is_active) == (["update:job"], SECRET[::-1], True)
    assert all(SECRET not in str(entry.path) + str(entry.query) for entry in cvat_server.log)


def test_register_mends_what_somebody_made_otherwise(cvat_server: CvatStandin) -> None:
    url = "https://loop.example.org/webhook"
    with cvat_server.site.client() as client:
        project = cvat_server.site.make_project(client, "Улица", []).id
    account = Account(url=cvat_server.url, token=cvat_server.access_token)
    with Server.connect(account) as server:
        theirs = server.create_webhook(project, url=url, secret="", events=["update:task", "create:job"])
        mended = cvat_server.store.webhooks[theirs]
        mended.is_active = False
        whole = dataclasses.replace(mended, id=theirs - 1, type="organization", project_id=None)
        cvat_server.store.webhooks[whole.id] = whole  # tells the same address of everything in an organisation

        assert register(server, project=project, url=url, secret=SECRET) == theirs

    assert mended.events == ["create:job", "update:job", "update:task"]
    assert (mended.secret, mended.is_active) == (SECRET, True)
    assert (whole.secret, whole.is_active) == ("", False)
