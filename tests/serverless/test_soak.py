"""Many clients at once for minutes, over real sockets: no error, nobody starves, nothing grows."""

import itertools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CLIENTS = 8
SECONDS = 300
GROWTH_BYTES = 32_000_000
"""What the worker's memory may grow by after the lone requests."""


def resident_bytes(host: Any) -> float:
    """Memory of the worker's process, by its own metrics."""
    series = re.search(r"^process_resident_memory_bytes\{.*\} (\d+)$", host.get_metrics(), re.MULTILINE)
    assert series
    return float(series[1])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_clients_are_served_alike(
    function_folder: Path, run_host: Callable[..., Any], make_picture: Any, make_body: Any
) -> None:
    sent = [make_body(make_picture(seed=client)) for client in range(CLIENTS)]
    with run_host(function_folder) as host:
        expected = [host.post(one) for one in sent]
        assert [answer.status for answer in expected] == [200] * CLIENTS
        assert len({answer.body for answer in expected}) == CLIENTS

        def ask(client: int) -> float:
            started = time.monotonic()
            answer = host.post(sent[client])
            spent = time.monotonic() - started
            assert answer.status == 200, answer.body
            assert answer.body == expected[client].body, "somebody else's answer"
            return spent

        alone = float(np.median([ask(number % CLIENTS) for number in range(100)]))
        before = resident_bytes(host)
        end = time.monotonic() + SECONDS

        def work(client: int) -> list[float]:
            return [ask(client) for _ in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())]

        with ThreadPoolExecutor(CLIENTS) as pool:
            spent = list(pool.map(work, range(CLIENTS)))
        grown = resident_bytes(host) - before
        assert "Traceback" not in host.log
        assert "[error]" not in host.log
        assert host.log.count("Answered") == sum(map(len, spent)) + 100 + CLIENTS, "one line a request"
    counts = [len(one) for one in spent]
    middle, most, nearly_all = np.percentile(np.concatenate(spent), [50, 95, 99]) / alone
    print(
        f"\n{sum(counts)} requests of {CLIENTS} clients in {SECONDS} s; in lone requests of {alone * 1000:.0f} ms, "
        f"p50 {middle:.1f}, p95 {most:.1f}, p99 {nearly_all:.1f}; fewest and most requests of a client {min(counts)}, "
        f"{max(counts)}; memory {before / 1e6:.0f} {grown / 1e6:+.1f} MB"
    )
    assert min(counts) > 0.8 * max(counts)
    assert nearly_all < 3 * CLIENTS, "who waits, waits for the others once"
    assert grown < GROWTH_BYTES
