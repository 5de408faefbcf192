"""Ends a run at a chosen step, as a kill would."""


class Killed(BaseException):
    """The end of a process, in the middle of its work."""


class Executioner:
    """Ends a run after so many steps."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    def step(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise Killed
