"""How long people had jobs open, from the event log of CVAT's analytics.

CVAT counts it: from the events that its page sends (clicks, strokes, changes of frame), pauses of more than 100 seconds
left out. Each row of the log whose scope is `send:working_time` holds milliseconds, as `working_time` in its JSON
`payload` (cvat/apps/events/handlers.py). Dates of jobs would tell nothing: who opens a job may go home.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sscloud.errors import ServerError

SCOPE: Final = "send:working_time"


def working_seconds(log: bytes) -> dict[int, float]:
    """Job → seconds that people worked in it, all of them together; jobs without a row are left out.

    Args:
        log: CSV in UTF-8 with a header that has `scope`, `job_id` and `payload`.

    Raises:
        ServerError: it is no such log.
    """
    milliseconds: dict[int, int] = {}
    try:
        for row in _rows(log):
            job = row["job_id"]
            if row["scope"] == SCOPE and job.isascii() and job.isdigit():
                spent = json.loads(row["payload"])["working_time"]
                milliseconds[int(job)] = milliseconds.get(int(job), 0) + max(0, int(spent))
    except (csv.Error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ServerError(f"the event log has a row that is not understood ({error}).") from error
    return {job: spent / 1000 for job, spent in milliseconds.items()}


def _rows(log: bytes) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)  # payloads of other events list every shape
    yield from csv.DictReader(io.StringIO(log.decode(), newline=""))
