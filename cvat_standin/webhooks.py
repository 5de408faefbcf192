"""Messages to the addresses of webhooks, as CVAT's workers send them: signed, in the background, once."""

import contextlib
import hashlib
import hmac
import http.client
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from cvat_standin.state import Json, Webhook

_TIMEOUT = 10.0  # seconds, as CVAT's


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A message that was sent."""

    webhook_id: int
    event: str
    body: bytes
    status: int
    """Of the answer; 502 without one, as CVAT notes it."""


class Deliveries:
    """Sends messages, and remembers what became of them."""

    def __init__(self) -> None:
        self.done: list[Delivery] = []
        self._threads: list[threading.Thread] = []

    def send_later(self, webhook: Webhook, payload: Json) -> None:
        """Send a message in a thread."""
        thread = threading.Thread(target=self.send, args=(webhook, payload), daemon=True)
        self._threads.append(thread)
        thread.start()

    def send(self, webhook: Webhook, payload: Json) -> Delivery:
        """Send a message, and wait for the answer."""
        body = json.dumps(payload).encode()
        headers = {"Content-Type": "application/json"}
        if webhook.secret:
            digest = hmac.new(webhook.secret.encode(), body, hashlib.sha256).hexdigest()
            headers["X-Signature-256"] = f"sha256={digest}"
        status = 502
        if urlsplit(webhook.target_url).scheme in ("http", "https"):
            request = urllib.request.Request(webhook.target_url, body, headers, method="POST")
            with contextlib.suppress(OSError, http.client.HTTPException):
                try:
                    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                        status = answer.status
                except urllib.error.HTTPError as error:
                    with error:
                        status = error.code
        delivery = Delivery(webhook_id=webhook.id, event=payload["event"], body=body, status=status)
        self.done.append(delivery)
        return delivery

    def wait(self) -> None:
        """Wait until all is sent."""
        while self._threads:
            self._threads.pop().join()
