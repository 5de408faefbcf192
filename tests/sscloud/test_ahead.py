"""Loading ahead: in order, errors where they belong, never more than one thing held, and an end."""

import gc
import threading
import weakref

import pytest

from sscloud.ahead import Ahead


class Loads:
    """What was loaded; `slow` waits for `go`."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()
        self.started = threading.Semaphore(0)

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        self.started.release()
        if name == "slow":
            assert self.go.wait(10)
        if name == "broken":
            raise ValueError(name)
        return name.upper()


def test_the_following_one_is_loaded_meanwhile() -> None:
    loads = Loads()
    with Ahead(loads) as ahead:
        assert ahead.take("a", following="b") == "A"
        assert all(loads.started.acquire(timeout=10) for _ in "ab")  # nobody has taken b yet
        assert ahead.take("b", following="c") == "B"
        assert ahead.take("c") == "C"
    assert loads.begun == ["a", "b", "c"]


def test_it_is_another_thread() -> None:
    with Ahead(lambda _: threading.current_thread()) as ahead:
        thread = ahead.take("a", following="b")
        assert thread is ahead.take("b")
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_errors_are_raised_where_they_belong() -> None:
    with Ahead(Loads()) as ahead:
        assert ahead.take("a", following="broken") == "A"
        with pytest.raises(ValueError, match="broken"):
            ahead.take("broken", following="c")
        assert ahead.take("c") == "C"


def test_another_one_than_was_announced() -> None:
    loads = Loads()
    with Ahead(loads) as ahead:
        assert ahead.take("a", following="broken") == "A"
        assert ahead.take("c", following="d") == "C"
        assert ahead.take("d") == "D"
    assert loads.begun.count("d") == 1


def test_what_was_taken_is_not_held() -> None:
    class Picture:
        pass

    with Ahead(lambda _: Picture()) as ahead:
        first = weakref.ref(ahead.take("a", following="b"))
        gc.collect()
        assert first() is None
        second = ahead.take("b")
        assert isinstance(second, Picture)


def test_the_end_waits_for_the_one_that_is_loading() -> None:
    loads = Loads()
    ahead = Ahead(loads)
    assert ahead.take("a", following="slow") == "A"
    assert all(loads.started.acquire(timeout=10) for _ in ("a", "slow"))
    closer = threading.Thread(target=ahead.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    loads.go.set()
    closer.join(10)
    assert not closer.is_alive()


def test_an_interrupted_block_ends_the_thread() -> None:
    def interrupted() -> None:
        with Ahead(str.upper) as ahead:
            ahead.take("a", following="b")
            assert threading.active_count() == before + 1
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before
