"""CVAT's webhooks: which messages are the server's own, of this project, and new.

CVAT signs the body of a message with the webhook's secret (`X-Signature-256: sha256=<HMAC-SHA256, hex>`). A message has
no number that is used once, so two things stand in for it: bodies that were taken are remembered, and the job in a
message must be no older than what was heard of it before. What is older than `TOLERANCE` is refused unseen, so nothing
has to be remembered for longer.
"""

import hashlib
import hmac
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from sscloud.errors import ConfigError

if TYPE_CHECKING:
    from training.cvat import Server

SECRET: Final = "SSCLOUD_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable
"""In the environment, and nowhere else."""
SHORTEST_SECRET, LONGEST_SECRET = 16, 64
"""Characters; CVAT takes no longer ones."""

PATH: Final = "/webhook"
EVENT: Final = "update:job"
MAX_BODY: Final = 1 << 20
"""Bytes of a message; those of CVAT have a few thousand."""
TOLERANCE: Final = 24 * 3600.0
"""Seconds between a job's last change and the message of it: CVAT tries again for hours when nobody answers."""
MOST_REMEMBERED: Final = 10_000


class RefusedError(Exception):
    """A message that is not taken.

    Args:
        status: of the HTTP answer.
        reason: for the log, and for the sender.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that is taken."""

    event: str
    job: int | None = None
    finished: bool = False
    """Whether its job is completed: there may be something to learn from."""


@dataclass(slots=True)
class Memory:
    """What was taken lately."""

    bodies: dict[str, float] = field(default_factory=dict)
    """sha256 of a body → when its job was changed last, seconds since 1970."""
    jobs: dict[int, float] = field(default_factory=dict)
    """Job → its last change that was heard of."""

    def forget(self, before: float) -> None:
        """Drop what would be refused as too old anyway, and the oldest of what is too much."""
        for known in (self.bodies, self.jobs):
            kept = sorted(((at, key) for key, at in known.items() if at >= before), key=lambda pair: pair[0])
            known.clear()
            known.update((key, at) for at, key in kept[-MOST_REMEMBERED:])  # type: ignore[misc]


def check_secret(secret: str) -> None:
    """Refuse secrets that can be guessed, or that CVAT does not take.

    Raises:
        ConfigError: too short or too long.
    """
    if not SHORTEST_SECRET <= len(secret) <= LONGEST_SECRET:
        raise ConfigError(
            f"{SECRET} must have {SHORTEST_SECRET} to {LONGEST_SECRET} characters, found {len(secret)}. "
            "`openssl rand -hex 32` makes one."
        )


def check_target(url: str) -> None:
    """Refuse an address that CVAT could not send to, or that holds a login.

    Raises:
        ConfigError: it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigError(
            f"--register needs the address under which CVAT reaches this service, such as https://loop.example.org{PATH}."
        )


def sign(secret: str, body: bytes) -> str:
    """The signature that a body must come with."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def register(server: "Server", *, project: int, url: str, secret: str) -> int:
    """Have a project's webhook that tells an address of changed jobs, with this secret.

    One that sends there already is given what it lacks, and keeps the other events that it tells of.

    Returns:
        its number.

    Raises:
        ServerError: the server does not answer, or refuses.
    """
    for webhook in sorted(server.webhooks(project), key=lambda one: one.id):
        if webhook.url == url:
            server.update_webhook(webhook.id, secret=secret, events=webhook.events | {EVENT})
            return webhook.id
    return server.create_webhook(project, url=url, secret=secret, events=[EVENT])


@dataclass(slots=True, kw_only=True)
class Inbox:
    """Decides which messages are taken."""

    secret: str | None = field(repr=False)
    """None: no message is taken."""
    project: int
    """Of the jobs."""
    webhook: int | None = None
    """The webhook that messages must come from, where it is known."""
    memory: Memory = field(default_factory=Memory)

    def take(self, signature: str | None, body: bytes, *, now: float) -> Message:
        """Check a message, and remember it.

        Args:
            signature: its header.
            body: as it came.
            now: seconds since 1970.

        Raises:
            RefusedError: it is not CVAT's, not of this project, not new, or not understood.
        """
        if self.secret is None:
            raise RefusedError(403, f"No webhooks are taken here: {SECRET} is not set.")
        if signature is None:
            raise RefusedError(401, "The message is not signed. Give the webhook in CVAT the secret of this service.")
        if not hmac.compare_digest(sign(self.secret, body).encode(), signature.encode("utf-8", "surrogateescape")):
            raise RefusedError(401, "The signature is wrong. Give the webhook in CVAT the secret of this service.")
        data = _parsed(body)
        event = data.get("event")
        if not isinstance(event, str):
            raise RefusedError(400, "The message names no event.")
        if event == "ping":
            hook = data.get("webhook")
            if isinstance(hook, dict):
                self._require_ours(hook.get("id"), hook.get("project_id", self.project))
            return Message(event=event)
        self._require_ours(data.get("webhook_id"), self.project)
        if event != EVENT:
            return Message(event=event)
        job = data.get("job")
        if not isinstance(job, dict) or type(job.get("id")) is not int or not isinstance(job.get("state"), str):
            raise RefusedError(400, "The message holds no job.")
        self._require_ours(data.get("webhook_id"), job.get("project_id"))
        self._remember(body, job["id"], _time(job.get("updated_date")), now=now)
        return Message(event=event, job=job["id"], finished=job["state"] == "completed")

    def _require_ours(self, webhook: object, project: object) -> None:
        if type(project) is not int or project != self.project:
            raise RefusedError(403, f"The message is of another project than {self.project}.")
        if self.webhook is not None and webhook != self.webhook:
            raise RefusedError(403, f"The message is from another webhook than {self.webhook}.")

    def _remember(self, body: bytes, job: int, changed: float, *, now: float) -> None:
        sha256 = hashlib.sha256(body).hexdigest()
        if sha256 in self.memory.bodies:
            raise RefusedError(409, "The message was taken before.")
        if abs(now - changed) > TOLERANCE:
            raise RefusedError(409, f"The job's last change is more than {TOLERANCE / 3600:g} hours away from now.")
        if changed < self.memory.jobs.get(job, changed):
            raise RefusedError(409, "A later change of this job is known already.")
        self.memory.forget(now - TOLERANCE)
        self.memory.bodies[sha256] = self.memory.jobs[job] = changed


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "The message is no JSON.") from error
    if not isinstance(data, dict):
        raise RefusedError(400, "The message is no JSON object.")
    return data


def _time(text: object) -> float:
    try:
        found = datetime.fromisoformat(str(text))
        if found.tzinfo is None:
            raise ValueError("no time zone")  # noqa: TRY301
        return found.timestamp()
    except (ValueError, OverflowError) as error:
        raise RefusedError(400, "The message does not say when its job was changed.") from error
