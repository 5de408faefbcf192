"""What comes next is loaded while the caller works on this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Ahead(Generic[Item, Loaded]):
    """Loads one thing after the other, in one thread of its own. Use as a context manager.

    At most two loaded things are held: the one that was taken last, by the caller, and the following one, here.

    Args:
        load: item → what is to be taken; it may raise.
    """

    def __init__(self, load: Callable[[Item], Loaded]) -> None:
        self._load = load
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: tuple[Item, Future[Loaded]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was begun; returns when the thread has ended."""
        self._begun = None
        self._pool.shutdown(cancel_futures=True)

    def take(self, item: Item, *, following: Item | None = None) -> Loaded:
        """What `load` makes of an item, and begin with the following one.

        Args:
            item: named as `following` before, or loaded now; what was begun for another one is dropped.
            following: what will probably be taken next.

        Raises:
            Exception: whatever `load` raised for this item; what comes after it can still be taken.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == item:
            current = begun[1]
        else:
            if begun is not None:
                begun[1].cancel()
            current = self._pool.submit(self._load, item)
        if following is not None:
            self._begun = following, self._pool.submit(self._load, following)
        return current.result()
