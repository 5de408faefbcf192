"""What a function counts, in the text format that Prometheus reads."""

import mmap
import re

from serverless.metrics import Metrics, resident_bytes

SERIES = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\} (\d+(?:\.\d+)?)')


def parse(text: str) -> dict[tuple[str, str], float]:
    """Every series → its value; fails on a line that is none, or that no HELP and TYPE come before."""
    found: dict[tuple[str, str], float] = {}
    announced: set[str] = set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            announced.add(line.split()[2])
            continue
        series = SERIES.fullmatch(line)
        assert series, line
        assert re.sub("_(bucket|sum|count)$", "", series[1]) in announced or series[1] in announced, line
        assert (series[1], series[2]) not in found, line
        found[series[1], series[2]] = float(series[3])
    return found


def test_counts() -> None:
    metrics = Metrics(worker="3", model="roads v1")
    stages = {"parse": 20.0, "decode": 80.0}
    for milliseconds in (80, 100, 3000):
        metrics.add(
            200,
            milliseconds=milliseconds,
            stages=stages,
            request_bytes=1000,
            answer_bytes=50,
            regions=4,
            notes={"specks_left_out": 2},
        )
    metrics.add(400, milliseconds=200_000, stages={"parse": 1.0}, request_bytes=5)
    found = parse(metrics.text())
    assert found["sscloud_model_info", 'worker="3",model="roads v1"'] == 1
    assert [found["sscloud_requests_total", f'worker="3",status="{status}"'] for status in (200, 400, 500)] == [3, 1, 0]
    buckets = {
        le: found["sscloud_request_seconds_bucket", f'worker="3",le="{le}"'] for le in ("0.1", "2.5", "5", "100")
    }
    assert buckets == {"0.1": 2, "2.5": 2, "5": 3, "100": 3}
    assert found["sscloud_request_seconds_bucket", 'worker="3",le="+Inf"'] == 4
    assert found["sscloud_request_seconds_count", 'worker="3"'] == 4
    assert found["sscloud_request_seconds_sum", 'worker="3"'] == 203.18
    assert found["sscloud_stage_seconds_sum", 'worker="3",stage="parse"'] == 0.061
    assert found["sscloud_stage_seconds_count", 'worker="3",stage="decode"'] == 3
    assert found["sscloud_regions_total", 'worker="3"'] == 12
    assert found["sscloud_request_bytes_total", 'worker="3"'] == 3005
    assert found["sscloud_answer_bytes_total", 'worker="3"'] == 150
    assert found["sscloud_notes_total", 'worker="3",note="specks_left_out"'] == 6


def test_new_models() -> None:
    metrics = Metrics(worker="0", model="street v1")
    metrics.refuse("street-v2-1a2b3c4d5e6f")
    found = parse(metrics.text())
    assert found["sscloud_model_info", 'worker="0",model="street v1"'] == 1
    assert found["sscloud_model_refused", 'worker="0",bundle="street-v2-1a2b3c4d5e6f"'] == 1
    metrics.settle()
    assert "sscloud_model_refused" not in metrics.text()
    metrics.refuse("street-v3-1a2b3c4d5e6f")
    metrics.take('the "new" v4')
    found = parse(metrics.text())
    assert found["sscloud_model_info", r'worker="0",model="the \"new\" v4"'] == 1
    assert not any(name == "sscloud_model_refused" for name, _ in found)
    changes = {
        result: found["sscloud_model_changes_total", f'worker="0",result="{result}"'] for result in ("taken", "refused")
    }
    assert changes == {"taken": 1, "refused": 2}


def test_before_the_first_request() -> None:
    found = parse(Metrics(worker="0", model="roads v1").text())
    assert found["sscloud_request_seconds_count", 'worker="0"'] == 0


def test_names_are_escaped() -> None:
    found = parse(Metrics(worker="0", model='a "b"\\ c\nd v1').text())
    assert ("sscloud_model_info", 'worker="0",model="a \\"b\\"\\\\ c\\nd v1"') in found


def test_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = mmap.mmap(-1, 50_000_000)  # pages of its own, which no allocator has lying about
    held.write(bytes(range(250)) * 200_000)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert 40_000_000 < after - before < 100_000_000
    assert parse(Metrics(worker="0", model="m v1").text())["process_resident_memory_bytes", 'worker="0"'] > len(held)
