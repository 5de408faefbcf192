"""Counts and latencies of a function, as Prometheus reads them (text format 0.0.4).

`GET /metrics` on the function's own port answers them; no library is needed. Each worker is a process that counts for
itself and knows itself by the label `worker`: with several workers, a scrape meets whichever is free, so sum the
series over `worker` as they were last seen (`sum(max_over_time(sscloud_requests_total[1h]))`). A worker answers
one request at a time: give a scrape as long as an image takes (`scrape_timeout: 60s`).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histogram of a request's seconds."""


class Metrics:
    """Counts of one worker.

    Args:
        worker: the worker's id.
        model: title of the model, with its version.
    """

    def __init__(self, *, worker: str, model: str) -> None:
        self._labels = f'worker="{_escaped(worker)}"'
        self._model = _escaped(model)
        self._changes: Counter[str] = Counter(taken=0, refused=0)
        self._refused: str | None = None
        self._requests: Counter[int] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds = 0.0
        self._stage_seconds: dict[str, float] = {}
        self._stage_counts: Counter[str] = Counter()
        self._totals: Counter[str] = Counter(regions=0, request_bytes=0, answer_bytes=0)
        self._notes: Counter[str] = Counter()

    def add(
        self,
        status: int,
        *,
        milliseconds: float,
        stages: Mapping[str, float],
        request_bytes: int,
        answer_bytes: int = 0,
        regions: int = 0,
        notes: Mapping[str, int] | None = None,
    ) -> None:
        """Count one request.

        Args:
            status: the HTTP status that it was answered with.
            milliseconds: how long it took.
            stages: stage → milliseconds.
            request_bytes: size of its body.
            answer_bytes: size of the answer's body.
            regions: regions in the answer.
            notes: what was left out, split or sent otherwise, and how often.
        """
        self._requests[status] += 1
        self._seconds += milliseconds / 1000
        for bound in BUCKETS:
            self._buckets[bound] += milliseconds / 1000 <= bound
        for stage, spent in stages.items():
            self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + spent / 1000
            self._stage_counts[stage] += 1
        self._totals.update(regions=regions, request_bytes=request_bytes, answer_bytes=answer_bytes)
        self._notes.update(notes or {})

    def take(self, model: str) -> None:
        """Another model answers from now on. This and the next two may be called from another thread.

        Args:
            model: its title.
        """
        self._model, self._refused = _escaped(model), None
        self._changes["taken"] += 1

    def refuse(self, bundle: str) -> None:
        """A new model was refused.

        Args:
            bundle: what the model volume calls it.
        """
        self._refused = _escaped(bundle)
        self._changes["refused"] += 1

    def settle(self) -> None:
        """What was refused is wanted no more."""
        self._refused = None

    def text(self) -> str:
        """All series."""
        return "".join(line + "\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        labels = self._labels
        yield from _head("sscloud_model_info", "gauge", "The model that is served.")
        yield f'sscloud_model_info{{{labels},model="{self._model}"}} 1'
        yield from _head(
            "sscloud_model_changes_total", "counter", "New models of the model volume, by what became of them."
        )
        for result, number in self._changes.items():
            yield f'sscloud_model_changes_total{{{labels},result="{result}"}} {number}'
        refused = self._refused  # it may change meanwhile
        if refused is not None:
            yield from _head("sscloud_model_refused", "gauge", "The model volume points at it, and it is not served.")
            yield f'sscloud_model_refused{{{labels},bundle="{refused}"}} 1'
        yield from _head("sscloud_requests_total", "counter", "Requests by the HTTP status of their answer.")
        for status in sorted({200, 400, 500, *self._requests}):
            yield f'sscloud_requests_total{{{labels},status="{status}"}} {self._requests[status]}'
        yield from _head("sscloud_request_seconds", "histogram", "From the parsed HTTP request to the answer's text.")
        for bound in BUCKETS:
            yield f'sscloud_request_seconds_bucket{{{labels},le="{bound:g}"}} {self._buckets[bound]}'
        count = sum(self._requests.values())
        yield f'sscloud_request_seconds_bucket{{{labels},le="+Inf"}} {count}'
        yield f"sscloud_request_seconds_sum{{{labels}}} {self._seconds:.6f}"
        yield f"sscloud_request_seconds_count{{{labels}}} {count}"
        yield from _head("sscloud_stage_seconds", "summary", "Time spent in each stage of a request.")
        for stage, seconds in self._stage_seconds.items():
            yield f'sscloud_stage_seconds_sum{{{labels},stage="{_escaped(stage)}"}} {seconds:.6f}'
            yield f'sscloud_stage_seconds_count{{{labels},stage="{_escaped(stage)}"}} {self._stage_counts[stage]}'
        for name, meaning in (
            ("regions", "Regions sent."),
            ("request_bytes", "Bytes of the requests' bodies."),
            ("answer_bytes", "Bytes of the answers' bodies."),
        ):
            yield from _head(f"sscloud_{name}_total", "counter", meaning)
            yield f"sscloud_{name}_total{{{labels}}} {self._totals[name]}"
        yield from _head("sscloud_notes_total", "counter", "What was left out, split or sent otherwise.")
        for note, number in sorted(self._notes.items()):
            yield f'sscloud_notes_total{{{labels},note="{_escaped(note)}"}} {number}'
        memory = resident_bytes()
        if memory is not None:
            yield from _head("process_resident_memory_bytes", "gauge", "Memory of the worker's process.")
            yield f"process_resident_memory_bytes{{{labels}}} {memory}"


def resident_bytes() -> int | None:
    """The process's resident memory now; None where there is no /proc (outside Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _head(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    """A label's value as the text format wants it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
