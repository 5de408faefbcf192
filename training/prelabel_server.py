"""CVAT's own automatic annotation, pressed for many jobs: one request a job, watched, tried again, written down.

CVAT runs a function over a whole job, so jobs in which a person has worked are left alone as a whole. Its `cleanup` is
never used: it would empty the job when the run begins, whatever has been drawn since. Pre-labels that are to be
replaced are deleted by number instead, in the moment after they were compared with what was drawn. What a failed run
has left is never deleted: people may have begun to correct it.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from tqdm import tqdm

from sscloud.errors import ConfigError, SchemaError, ServerError
from sscloud.labels import LabelSchema
from sscloud.shapes import ATTRIBUTES
from training.annotations import is_auto
from training.cvat import TRANSIENT, Annotations, Function, FunctionRun, ProjectLabel, Server
from training.prelabel import (
    ATTEMPTS,
    PAUSE,
    JobWork,
    Report,
    Selection,
    UnfitError,
    is_gone,
    is_occupied,
    refuse_strangers,
    select,
    shapes_by_frame,
)
from training.prelabel_store import Drawn, FrameRecord, JobRecord, PrelabelStore, ServerRun, identity, judge
from training.prelabel_witness import WRITES_EVERY, Witness
from training.project_labels import match_labels

FIRST_POLL: Final = 0.2
"""Seconds until the server is asked how a run is going; every further pause is half as long again."""
LONGEST_POLL: Final = 1.0

_LISTED: Final = ", listed as "


def prelabel_by_server(
    server: Server,
    store: PrelabelStore,
    *,
    selection: Selection,
    schema: LabelSchema,
    report: Report,
    function: str | None = None,
    threshold: float = 0.0,
    replace_auto: bool = False,
    retries: int = 2,
    quiet: bool = False,
) -> None:
    """Have CVAT run a function over every untouched job of a selection.

    Args:
        server: logged in.
        store: entered; remembers what was drawn.
        selection: which jobs.
        schema: says which labels mean the same.
        report: filled while the run goes on, so that it is right whatever ends the run.
        function: its id in CVAT; None: the only one whose labels meet those of the tasks.
        threshold: least confidence, 0 to 1.
        replace_auto: put this function's shapes in place of those of another one, or drawn with another threshold,
            where nobody has touched them.
        retries: how often a job is tried again after a run over it has failed.
        quiet: no progress bars.

    Raises:
        ConfigError: no such function, or several that would do; or the store is damaged.
        SchemaError: no label of the function is in any of the tasks.
        ServerError: the server cannot be reached any more, or something that was asked for does not exist.
    """
    work = select(server, selection, report, quiet=quiet)
    if not work:
        return
    chosen = choose_function(server.functions(), work, schema=schema, name=function)
    report.model = chosen.name
    met = {item.job.id: match_labels(list(chosen.labels), item.labels, schema=schema) for item in work}
    work = refuse_strangers(work, met, list(chosen.labels), report)
    with tqdm(total=sum(len(item.frames) for item in work), desc="Frames", unit="frame", disable=quiet or None) as bar:
        for item in work:
            watch = _Watch(server, store, chosen, item, met[item.job.id], report, threshold=threshold, bar=bar)
            try:
                watch.annotate(replace_auto=replace_auto, retries=retries)
            except (ServerError, UnfitError) as error:
                if is_gone(error):
                    raise
                report.failed.append(str(error))
            watch.show(len(item.frames))


def choose_function(
    functions: Sequence[Function], work: Sequence[JobWork], *, schema: LabelSchema, name: str | None
) -> Function:
    """The function to run.

    Args:
        functions: as CVAT lists them.
        work: jobs whose labels it has to meet.
        schema: says which labels mean the same.
        name: id that was asked for, or None.

    Raises:
        ConfigError: there is none of that name, or there are several that fit.
        SchemaError: none fits.
    """
    detectors = {function.id: function for function in functions if function.kind == "detector"}
    listed = ", ".join(f"{function.id} ({function.name})" for function in detectors.values()) or "none"
    if name is not None:
        if name not in detectors:
            raise ConfigError(
                f"CVAT lists no detector {name!r}; it lists: {listed}. Deploy it with `sscloud deploy`, or see what is "
                "wrong with `sscloud doctor`."
            )
        return detectors[name]
    fitting = [
        function
        for function in detectors.values()
        if any(match_labels(list(function.labels), item.labels, schema=schema) for item in work)
    ]
    if len(fitting) > 1:
        raise ConfigError(
            f"Several functions have labels of these tasks: {', '.join(function.id for function in fitting)}. Choose "
            "one with --function."
        )
    if not fitting:
        raise SchemaError(
            f"No detector that CVAT lists ({listed}) has a label of task {work[0].task.id} "
            f"({', '.join(label.name for label in work[0].labels) or 'it has none'}): nothing would be drawn. Create "
            "the labels with `sscloud labels push`, or deploy a function that has them."
        )
    return fitting[0]


def make_mapping(function: Function, met: Mapping[str, ProjectLabel]) -> dict[str, Any]:
    """What CVAT needs to know to turn the function's labels and attributes into the task's."""
    return {
        name: {
            "name": label.name,
            "attributes": {
                attribute: attribute
                for attribute in ATTRIBUTES
                if attribute in function.labels[name] and attribute in label.text_attributes
            },
        }
        for name, label in met.items()
    }


def holds_others(annotations: Annotations) -> bool:
    """Whether there is anything in a job that is no shape."""
    return bool(annotations.tags or annotations.tracks or annotations.intervals)


def _settings(settings: str, *, model: str, listed: str) -> str:
    """Settings of a run, with the name by which CVAT listed the version if that was another one's."""
    return settings if model == listed else f"{settings}{_LISTED}{listed}"


class _Watch:
    """One job while the server draws in it."""

    def __init__(
        self,
        server: Server,
        store: PrelabelStore,
        function: Function,
        work: JobWork,
        met: Mapping[str, ProjectLabel],
        report: Report,
        *,
        threshold: float,
        bar: "tqdm[Any]",
    ) -> None:
        self._server, self._store, self._function = server, store, function
        self._work, self._met, self._report = work, met, report
        self._threshold, self._bar = threshold, bar
        self._job = work.job.id
        self._record = store.load(self._job)
        self._settings = f"function {function.id} version {function.version}, threshold {threshold:g}"
        self._witness = Witness("", frames=(), labels=())
        self._seen: dict[int, list[dict[str, Any]]] = {}
        """Frame → its shapes when the job was looked at last."""
        self._looked = -math.inf
        """When the job was looked at last; what another process has started, nobody has seen the beginning of."""
        self._shown = 0

    def annotate(self, *, replace_auto: bool, retries: int) -> None:
        """Press the button for the job unless people have worked in it, and see it through.

        Raises:
            UnfitError: every try failed, or one has left something, or something else works on the task.
            ServerError: the server refuses, or is gone.
        """
        if self._record.run is not None:
            self._resume()
        if not self._is_wanted(replace_auto=replace_auto):
            return
        for attempt in range(1 + retries):
            problem = self._see_through(self._start())
            if not problem:
                return
            if attempt < retries:
                self._report.notes.append(f"{problem} Tried again.")
        raise UnfitError(f"{problem} Its log says more (`nuctl get logs`, `docker logs`).")

    def show(self, frames: int) -> None:
        """Move the progress bar to so many frames of this job."""
        if frames > self._shown:
            self._bar.update(frames - self._shown)
            self._shown = frames

    def _is_wanted(self, *, replace_auto: bool) -> bool:
        """Whether the job may and should be run over; the report gets what it holds if not."""
        annotations = self._server.annotations(self._job)
        verdicts = self._verdicts(annotations)
        people = [frame for frame, verdict in verdicts.items() if verdict == "people"]
        ours = [self._record.of(frame).drawn for frame, verdict in verdicts.items() if verdict == "ours"]
        same = sum(map(self._is_current, ours))
        reason = None
        if people:
            reason = "people's work in it (`--via local` goes frame by frame)"
        elif ours and same == len(verdicts):
            reason = "pre-labelled by this model already"
        elif ours and not replace_auto:
            reason = "pre-labels in some frames (replace them with --replace-auto, or fill up with `--via local`)"
        if reason is None:
            return True
        self._report.jobs_left_out[reason] += 1
        self._report.people += len(people)
        shapes = shapes_by_frame(annotations)
        self._report.strange += sum(
            not self._record.of(frame).drawn.shapes and frame in shapes and all(map(is_auto, shapes[frame]))
            for frame in people
        )
        self._report.already += same
        self._report.other_model += len(ours) - same
        return False

    def _is_current(self, drawn: Drawn) -> bool:
        """Whether the function would draw the same, by its name in CVAT's list and by what this run has seen of it.

        The list may be older than what is served: what was drawn then is known by the title that its shapes name.
        """
        name, seen = self._function.name, self._report.model
        if seen not in (name, drawn.model):
            return False
        if drawn.model == name and _LISTED in drawn.settings:  # the list has caught up, and its version with it
            before, _, after = self._settings.partition(f" version {self._function.version}, ")
            return drawn.settings.startswith(f"{before} version ") and f", {after}{_LISTED}" in drawn.settings
        return drawn.settings == _settings(self._settings, model=drawn.model, listed=name)

    def _verdicts(self, annotations: Annotations) -> dict[int, str]:
        """Frame → whose its shapes are. A frame that is not the job's, or deleted, counts when it has shapes."""
        shapes = shapes_by_frame(annotations)
        return {
            frame: "people"
            if is_occupied(annotations, frame)
            else judge(self._record.of(frame).drawn, (identity(shape) for shape in shapes.get(frame, ())))
            for frame in sorted({*self._work.frames, *shapes})
        }

    def _start(self) -> FunctionRun:
        """Empty the job of replaced pre-labels and ask for the run.

        Raises:
            UnfitError: another run works on the task.
            ServerError: refused, or no answer.
        """
        runs = self._server.function_runs()
        self._refuse_others(runs)
        before = max((run.enqueued for run in runs if self._is_mine(run)), default="")
        self._note(replace(self._record, run=replace(self._noted, enqueued=before)))
        updated = self._delete_drawn()
        self._note(JobRecord(run=replace(self._noted, updated=updated)))
        for attempt in range(ATTEMPTS):
            try:
                run = self._server.start_function(
                    self._function.id,
                    task=self._work.task.id,
                    job=self._job,
                    threshold=self._threshold or None,
                    mapping=make_mapping(self._function, self._met),
                )
            except ServerError as error:
                if error.status != 409 and error.status is not None and error.status not in TRANSIENT:
                    self._note(replace(self._record, run=None))
                    raise
                if error.status != 409:
                    time.sleep(PAUSE * 2**attempt)
                found = self._find()
                if found is None:
                    with self._forgetting():
                        self._refuse_others(self._server.function_runs())
                    if attempt == ATTEMPTS - 1:
                        raise
                    continue
                run = found
            self._note(replace(self._record, run=replace(self._noted, id=run.id, enqueued=run.enqueued)))
            return run
        raise AssertionError("unreachable")

    def _refuse_others(self, runs: Sequence[FunctionRun]) -> None:
        for run in runs:
            if run.task == self._work.task.id and run.status in ("queued", "started"):
                over = f"job {run.job}" if run.job is not None else "the whole task"
                raise UnfitError(
                    f"job {self._job}: {run.function} is at work in task {run.task} ({over}). Wait until it has "
                    "finished and run the same command once more."
                )

    def _delete_drawn(self) -> str:
        """Delete what was drawn here before; nothing else is in the job.

        Returns:
            The job's time of change when it was empty.

        Raises:
            UnfitError: somebody has begun to draw meanwhile, or the deleted comes back.
            ServerError: it cannot be deleted.
        """
        for attempt in range(ATTEMPTS):
            self._looked = time.monotonic()
            updated = self._server.job(self._job).updated
            annotations = self._server.annotations(self._job)
            with self._forgetting():
                begun = annotations.shapes and "people" in self._verdicts(annotations).values()
                if begun or holds_others(annotations):
                    raise UnfitError(f"job {self._job}: somebody has begun to work in it; it is left as it is.")
            if not annotations.shapes:
                return updated
            try:
                self._server.delete_shapes(self._job, annotations.shapes)
            except ServerError as error:
                if attempt == ATTEMPTS - 1 or (error.status is not None and error.status not in TRANSIENT):
                    raise
                time.sleep(PAUSE * 2**attempt)
        raise UnfitError(f"job {self._job}: the former pre-labels could not be deleted. Run the command once more.")

    def _see_through(self, run: FunctionRun) -> str:
        """Wait for the end of a run and write down what it has drawn.

        Returns:
            Why it failed, without leaving anything; empty when it did not.

        Raises:
            UnfitError: it failed and has left something; or the server has forgotten it, or runs something else in its
                place.
        """
        self._witness = Witness(self._noted.updated, frames=self._work.frames, labels=tuple(self._met.values()))
        self._seen = {}
        run = self._wait(run)
        self._check_end(run)
        if run.status == "finished":
            self._collect()
            return ""
        problem = f"job {self._job}: {run.function} failed: {run.error or 'the server does not say why'}"
        self._keep_rest(problem)
        return problem

    def _wait(self, run: FunctionRun) -> FunctionRun:
        """Ask until the run has ended, and look at the job all the time.

        Raises:
            UnfitError: the server has forgotten it, or runs something else in its place.
        """
        pause = FIRST_POLL
        first, size = min(self._work.frames, default=0), self._work.task.size
        try:
            self._look()
            while run.status in ("queued", "started"):
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_POLL)
                found = self._server.function_run(run.id)  # an id is the task's: a later run takes it over
                if found is None or not self._is_mine(found):
                    raise UnfitError(
                        f"job {self._job}: the server does not know the run of {run.function} any more; somebody has "
                        "cancelled it, perhaps. Run the same command once more."
                    )
                run = found
                self._look()
                self._bar.set_postfix_str(f"job {self._job}: {run.status}", refresh=False)
                self.show(min(len(self._work.frames), run.progress * size // 100 - first))
        except KeyboardInterrupt:
            self._report.notes.append(
                f"The server goes on with job {self._job}. The same command waits for it, but what it draws until then "
                "counts as people's work."
            )
            raise
        return run

    def _look(self) -> None:
        """Have the witness see what has changed in the job since the last look."""
        began = time.monotonic()
        updated = self._server.job(self._job).updated
        if updated != self._witness.updated:
            annotations = self._server.annotations(self._job)
            others, seconds = holds_others(annotations), time.monotonic() - self._looked
            self._witness.see(updated, annotations.shapes, others=others, seconds=seconds)
            self._seen = shapes_by_frame(annotations)
        self._looked = began

    def _check_end(self, run: FunctionRun) -> None:
        """Doubt, if the last change of the job may not have been the run's own."""
        self._look()  # somebody may have saved while the last look went on
        try:
            own = datetime.fromisoformat(self._witness.updated) <= datetime.fromisoformat(run.ended)
        except (ValueError, TypeError):
            own = False
        if not own and self._witness.count and not self._witness.doubt:
            self._witness.doubt = "was changed before its pre-labels were written down"

    def _collect(self) -> None:
        """Write down what a finished run has drawn, if nobody can have changed it."""
        self._report.drawn += len(self._work.frames)
        self._report.shapes += self._witness.count
        if self._witness.doubt:
            self._note(self._drawn(self._witness.gone()))
            self._report.notes.append(
                f"Job {self._job} {self._witness.doubt}, so what is in it counts as people's work."
            )
            return
        self._report.model = self._witness.title or self._report.model
        record = self._drawn({frame: self._witness.first.get(frame, []) for frame in self._work.frames})
        # Without a doubt, what is in the job now is what the run has drawn.
        names = {label.id: label.name for label in self._met.values()}
        for frame, entry in record.frames.items():
            self._store.keep(self._job, frame, entry.drawn, self._seen.get(frame, ()), labels=names)
        self._note(record)
        self._store.tidy(self._job, record)

    def _keep_rest(self, problem: str) -> None:
        """Leave to people what a failed run has left, if anything.

        Raises:
            UnfitError: there is something.
        """
        # What somebody has deleted is remembered, so that it is not drawn again.
        self._note(self._drawn(self._witness.gone()))
        if self._witness.count or self._witness.first:
            raise UnfitError(
                f"{problem} {self._witness.count} shapes stay in the job and count as people's work: CVAT writes every "
                f"{WRITES_EVERY} frames, and somebody may have begun to correct. `--via local` draws in the other "
                "frames."
            )

    def _drawn(self, frames: Mapping[int, Sequence[str]]) -> JobRecord:
        model = self._witness.title or self._noted.model
        settings = _settings(self._noted.settings, model=model, listed=self._noted.model)
        drawn = {
            frame: Drawn(model=model, settings=settings, shapes=tuple(sorted(shapes)))
            for frame, shapes in frames.items()
        }
        return JobRecord(frames={frame: FrameRecord(drawn=what) for frame, what in drawn.items()})

    def _resume(self) -> None:
        """See a run through that was started before this process.

        Raises:
            UnfitError: it failed and has left something.
        """
        run = self._find()
        if run is not None:
            if problem := self._see_through(run):
                self._report.notes.append(f"{problem} Tried again.")
            return
        annotations = self._server.annotations(self._job)
        if not annotations.shapes:
            self._note(JobRecord())  # the former pre-labels were deleted already
            return
        # Either nothing has happened yet, or it cannot be told any more: then the shapes count as people's work.
        self._note(replace(self._record, run=None))
        if "people" in self._verdicts(annotations).values():
            self._report.notes.append(
                f"Job {self._job}: the server does not know any more how a run of the function ended that was started "
                "before, so what is in the job counts as people's work."
            )

    def _find(self) -> FunctionRun | None:
        """The server's run that the record speaks of."""
        noted = self._record.run
        if noted is None:
            return None
        if noted.id:
            run = self._server.function_run(noted.id)
            same = run is not None and self._is_mine(run) and noted.enqueued in ("", run.enqueued)
            return run if same else None
        for run in self._server.function_runs():
            if self._is_mine(run) and (not noted.enqueued or run.enqueued != noted.enqueued):
                return run
        return None

    def _is_mine(self, run: FunctionRun) -> bool:
        return run.job == self._job and run.function == self._noted.function

    @property
    def _noted(self) -> ServerRun:
        """The run that the record speaks of, or the one that would be asked for."""
        return self._record.run or ServerRun(
            function=self._function.id, model=self._function.name, settings=self._settings
        )

    def _note(self, record: JobRecord) -> None:
        self._record = record
        self._store.save(self._job, record)

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Take back the note about a run that is not started after all."""
        try:
            yield
        except UnfitError:
            self._note(replace(self._record, run=None))
            raise
