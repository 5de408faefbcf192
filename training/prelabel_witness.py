"""Whose the shapes are that appear in a job while CVAT runs a function over it.

CVAT writes what the function has found after every hundredth frame of the task and at the end of the run. People see it
from then on: while the run goes on they correct it, and add shapes, and neither `source` nor the job's time of change
tells theirs from the run's. So the job is looked at all the time, and what the run alone does not explain makes
everything in the job people's work.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Final

from training.annotations import is_auto
from training.cvat import ProjectLabel
from training.prelabel_store import identity

WRITES_EVERY: Final = 100
"""CVAT writes after the frames with these multiples as numbers; 0 is none of them."""
SOON: Final = 5.0
"""Seconds from one look to the next in which nobody can load, correct and save what has just been written."""


class Witness:
    """What was in a job, look by look, from the moment when it was empty.

    Args:
        updated: the job's time of change when it was empty.
        frames: the frames that the run goes through, ascending.
        labels: of the task, that the function's labels mean.
    """

    def __init__(self, updated: str, *, frames: Sequence[int], labels: Sequence[ProjectLabel]) -> None:
        self.updated = updated
        self.doubt = ""
        """Why not everything in the job is the run's, said of the job; empty: everything is."""
        self.first: dict[int, list[str]] = {}
        """Frame → identities of its shapes when they were first seen."""
        self._now: dict[int, tuple[int, str]] = {}
        self._writes = [frame for frame in frames if frame and frame % WRITES_EVERY == 0]
        self._last_write = -1
        self._labels = {label.id: label.attributes.get("model") for label in labels}
        self._models: set[str] = set()

    @property
    def count(self) -> int:
        """Shapes in the job at the last look."""
        return len(self._now)

    @property
    def title(self) -> str:
        """The version that all shapes name which the run has drawn; empty if they name none, or several."""
        return next(iter(self._models)) if len(self._models) == 1 else ""

    def see(self, updated: str, shapes: Sequence[Mapping[str, Any]], *, others: bool, seconds: float) -> None:
        """Take down what is in the job now that its time of change has moved.

        Args:
            updated: the time of change.
            shapes: all of the job, as the server lists them.
            others: whether there are tags, tracks or intervals.
            seconds: since the look at which the time of change had not moved yet.
        """
        found = {int(shape["id"]): (int(shape["frame"]), identity(shape)) for shape in shapes}
        new = sorted((shape for shape in shapes if shape["id"] not in self._now), key=lambda shape: int(shape["id"]))
        if not self.doubt:
            self.doubt = self._doubt(found, new, others=others, seconds=seconds)
        if not self.doubt:
            for shape in new:
                self.first.setdefault(int(shape["frame"]), []).append(found[int(shape["id"])][1])
            self._last_write = max([self._last_write, *(self._write_of(shape["frame"]) for shape in new)])
        self.updated, self._now = updated, found

    def gone(self) -> dict[int, list[str]]:
        """Frame → identities of what was there first, for frames that hold nothing any more."""
        left = {frame for frame, _ in self._now.values()}
        return {frame: shapes for frame, shapes in self.first.items() if frame not in left}

    def _doubt(
        self,
        found: Mapping[int, tuple[int, str]],
        new: Sequence[Mapping[str, Any]],
        *,
        others: bool,
        seconds: float,
    ) -> str:
        if others or not new or any(found.get(number) != shape for number, shape in self._now.items()):
            return "was changed by somebody while the function ran"
        frames = [int(shape["frame"]) for shape in new]
        writes = {self._write_of(frame) for frame in frames}
        self._models |= {model for shape in new if (model := self._model(shape)) is not None}
        in_order = frames == sorted(frames) and int(new[0]["id"]) > max(self._now, default=-1)
        twice = len({found[int(shape["id"])] for shape in new}) < len(new)
        if not all(is_auto(shape) and shape["label_id"] in self._labels for shape in new):
            return "was drawn in by somebody while the function ran"
        if not in_order or twice or len(self._models) > 1 or min(writes) <= self._last_write:
            return "holds shapes that one run of the function cannot have drawn"
        if len(writes) > 1 or seconds > SOON:
            return "could have been changed before its shapes were seen first"
        return ""

    def _write_of(self, frame: int) -> int:
        """Which of the run's writes a frame's shapes come with, from 0."""
        return bisect_left(self._writes, frame)

    def _model(self, shape: Mapping[str, Any]) -> str | None:
        """What the shape says in the attribute `model`; None where its label has none."""
        attribute = self._labels.get(shape["label_id"])
        if attribute is None:
            return None
        values = {value["spec_id"]: value["value"] for value in shape.get("attributes") or []}
        return str(values.get(attribute, ""))
