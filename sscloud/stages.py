"""Stages: how long each step of one request took."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Stages:
    """A stopwatch with named stages: `with stages("decode"): …`.

    A stage that is entered several times adds up. Stages are not nested.

    Args:
        clock: seconds from any origin. `time.process_time` counts the processor time of all threads.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.milliseconds: dict[str, float] = {}
        """Stage → milliseconds by the clock, in the order of their first use."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage, whether it ends well or not."""
        started = self._clock()
        try:
            yield
        finally:
            spent = (self._clock() - started) * 1000
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent
