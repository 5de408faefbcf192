"""Corrected annotations on a CVAT server → a dataset folder that mirrors them.

Frames come as they were uploaded, shapes through the API; masks are painted here, because the server's own mask export
runs out of memory on large panoramas. A second run asks for what has changed only. A frame is in the dataset whole or
not at all, and however often the run is killed, it ends in the same bytes.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from sscloud.errors import DatasetError, ImageError, ServerError, UnreachableError
from sscloud.image import MAX_PIXELS, decode_image
from sscloud.labels import LabelSchema
from training.annotations import PAINTED, digest, painting
from training.cvat import Annotations, Frame, Job, Server
from training.manifest import IMAGES, MASKS, DatasetWriter, Manifest, ManifestItem, make_item, read_manifest
from training.names import dataset_names
from training.rasterise import RULE_VERSION, rasterise
from training.rule import Rule, Stranger, require_known
from training.splits import Assignment, Source, Split, SplitPlan, group_key
from training.survey import Selection, Survey, Wanted, survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What `fetch` has done."""

    manifest: Manifest
    splits: Assignment
    survey: Survey
    written: int
    """Frames that are new or have another mask."""
    unchanged: int
    removed: tuple[str, ...]
    """Names of items that left the selection."""
    left_out: tuple[str, ...]
    """Frames that cannot be used, a sentence each."""
    empty: int
    """Frames without shapes that were left out."""
    unpainted: int
    """Frames that were left out because none of their annotations makes a mask."""
    skipped: Mapping[str, int]
    """Kind of annotation that makes no mask → how many."""
    unknown: tuple[Stranger, ...]
    """Labels that the schema lacks, in what was read now."""
    bytes: int


@dataclass(frozen=True, slots=True)
class _Done:
    wanted: Wanted
    item: ManifestItem | None = None
    """None: unchanged, or left out."""
    image: bytes | None = None
    mask: bytes | None = None
    left_out: Literal["empty", "unpainted"] | None = None
    problem: str | None = None


def fetch(
    server: Server,
    output: Path,
    *,
    selection: Selection,
    rule: Rule,
    plan: SplitPlan,
    remove: bool = False,
    server_was: str | None = None,
    parallel: int = 4,
    quiet: bool = False,
) -> Summary:
    """Bring a dataset up to date with a server.

    Args:
        server: logged in.
        output: the dataset, new or already in use.
        selection: which frames count. Items of the looked-at tasks that no longer count leave the dataset; their split
            is remembered.
        rule: how shapes become masks.
        plan: how new frames are dealt out to training, validation and test.
        remove: go on even when more than half of the items of the looked-at tasks would leave.
        server_was: another address under which this server's items are in the dataset; they become this one's.
        parallel: frames in flight.
        quiet: no progress bars.

    Raises:
        ServerError: the server cannot be reached any more, or refuses.
        SchemaError: labels that the schema lacks, with `unknown="error"`; nothing is written.
        DatasetError: the dataset cannot be used, another process writes it, it has these frames from another address,
            or too many items would leave it.
    """
    found = survey(server, selection, quiet=quiet)
    if not found.wanted and read_manifest(output) is None:
        why = ", ".join(f"{count} of {reason}" for reason, count in found.jobs_left_out.items()) or "there are none"
        raise DatasetError(
            f"No frame counts, so {output} was not made (jobs left out: {why}). Which jobs count, --state and --stage "
            "say; people set the state in CVAT when they have finished a job."
        )
    with DatasetWriter(output, schema=rule.schema) as writer, ThreadPoolExecutor(parallel) as pool:
        writer.require_groups(plan, [wanted.frame.name for wanted in found.wanted])
        if server_was is not None:
            _move(writer, server_was.rstrip("/"), server.url)
        _refuse_doubles(writer.manifest, found)
        run = _Run(server, output, found, writer.manifest, rule=rule, plan=plan)
        if not remove:
            run.refuse_emptying(writer.manifest)
        drawn = _Annotations(writer.scratch)
        try:
            loaded = _flow(pool, lambda job: (job, server.annotations(job.id)), run.stale, parallel)
            for job, annotations in tqdm(loaded, "Shapes", len(run.stale), unit="job", disable=quiet or None):
                drawn.keep(job, annotations, [wanted.frame.number for wanted in run.frames_of[job]])
            strangers = drawn.strangers(found, rule.schema)
            require_known(strangers, rule, source=f"What counts on {server.url}")
            with tqdm(total=len(run.work), desc="Frames", unit="frame", disable=quiet or None) as bar:
                run.on_bytes = lambda: bar.set_postfix_str(f"{run.bytes / 1e6:.1f} MB", refresh=False)
                work = ((wanted, drawn.of(wanted), drawn.is_marked(wanted)) for wanted in run.work)
                for done in _flow(pool, run.bring, work, parallel):
                    bar.update()
                    run.record(done)
                    if done.item is not None:
                        writer.stage(done.item, image=done.image, mask=done.mask)
                        writer.commit()
        except BaseException:
            with server.stopping():
                pool.shutdown(cancel_futures=True)
            raise
        removed = run.gone(writer.manifest)
        writer.remove(removed)
        records = run.job_records(writer.manifest, drawn)
        writer.set_jobs(records)
        splits = writer.freeze_splits(plan, pinned=run.pinned(writer.manifest))
        writer.commit()
        return Summary(
            manifest=writer.manifest,
            splits=splits,
            survey=found,
            written=run.written,
            unchanged=run.unchanged,
            removed=tuple(removed),
            left_out=tuple(sorted(run.left_out)),
            **run.notes(writer.manifest, drawn),
            unknown=tuple(strangers),
            bytes=run.bytes,
        )


class _Run:
    """One fetch: what has to be looked at, how a frame is made, and what came of it."""

    def __init__(
        self, server: Server, output: Path, found: Survey, manifest: Manifest, *, rule: Rule, plan: SplitPlan
    ) -> None:
        self._server, self._output, self._found, self._rule, self._plan = server, output, found, rule, plan
        self._items = {_key(item): item for item in manifest.items if item.source.get("server") == server.url}
        self.frames_of: dict[Job, list[Wanted]] = {}
        self._left_out_frames: dict[str, dict[int, list[int]]] = {"empty": {}, "unpainted": {}}
        for wanted in found.wanted:
            self.frames_of.setdefault(wanted.job, []).append(wanted)
        self.stale = [job for job in self.frames_of if not self._is_current(job, manifest)]
        self.work = [wanted for job in self.stale for wanted in self.frames_of[job]]
        self._names = self._choose_names(manifest)
        self.on_bytes: Callable[[], object] = lambda: None
        self.written = self.bytes = 0
        self.unchanged = len(found.wanted) - len(self.work)
        self.left_out: list[str] = []
        self._failed_jobs: set[int] = set()
        self._lock = threading.Lock()

    def _is_current(self, job: Job, manifest: Manifest) -> bool:
        """Whether nothing of a job has changed since it was fetched by the same rule."""
        facts = manifest.jobs.get(_job_key(self._found.server, job.id))
        if facts is None or facts.get("updated") != job.updated or facts.get("rule") != self._rule_key(job):
            return False
        for wanted in self.frames_of[job]:
            item = self._items.get(wanted.key)
            if item is None and not any(wanted.frame.number in facts.get(why, ()) for why in self._left_out_frames):
                return False
            if item is not None and (item.source.get("job") != job.id or not self._is_there(item)):
                return False
        return True

    def _rule_key(self, job: Job) -> str:
        """What the masks of a job depend on beside its shapes: the rule, and what the labels' numbers mean."""
        labels = [[label.id, label.name] for label in self._found.labels[job.task_id]]
        return _hash([self._rule.key, sorted(labels)])

    def refuse_emptying(self, manifest: Manifest) -> None:
        """Stop before a mistaken filter, or another project, costs what was fetched.

        Raises:
            DatasetError: more than half of the items of these tasks would leave.
        """
        here = [item for item in self._items.values() if self._is_in_scope(item.source)]
        gone = self.gone(manifest)
        if 2 * len(gone) > len(here) and len(gone) > 1:
            why = ", ".join(f"{count} of {reason}" for reason, count in self._found.jobs_left_out.items())
            raise DatasetError(
                f"{len(gone)} of {len(here)} panoramas of these tasks would leave {self._output}: they no longer "
                f"count ({why or 'their frames or jobs are gone'}). Nothing was changed. If that is right, run "
                "`sscloud fetch` with --remove; otherwise look at the states and stages of jobs that count."
            )

    def _choose_names(self, manifest: Manifest) -> dict[tuple[int, int], str]:
        """File names of the wanted frames; items keep theirs, so that the order of arrival does not matter."""
        new = [wanted for wanted in self._found.wanted if wanted.key not in self._items]
        taken = [item.image for item in manifest.items]
        names = dataset_names([wanted.frame.name for wanted in new], taken=taken)
        return {key: item.image for key, item in self._items.items()} | {
            wanted.key: name for wanted, name in zip(new, names, strict=True)
        }

    def bring(self, task: tuple[Wanted, Sequence[Mapping[str, Any]], bool]) -> _Done:
        """Make what a frame needs of its shapes, and of whether a track or a tag is on it. Called in threads.

        Raises:
            ServerError: there is no connection or no login any more, so that the other frames would fail as well.
        """
        wanted, raws, marked = task
        try:
            return self._bring(wanted, raws, marked=marked)
        except (ImageError, ServerError, DatasetError) as error:
            if isinstance(error, UnreachableError) or (isinstance(error, ServerError) and error.status in (401, 403)):
                raise
            where = f"frame {wanted.frame.number} of task {wanted.task.id} ({wanted.frame.name!r:.80})"
            return _Done(wanted, problem=f"{where}: {error}")

    def _bring(self, wanted: Wanted, raws: Sequence[Mapping[str, Any]], *, marked: bool) -> _Done:
        _check_size(wanted.frame)
        rule, old = self._rule, self._items.get(wanted.key)
        labels = {label.id: label.name for label in self._found.labels[wanted.task.id]}
        drawing = painting(raws, label_names=labels, size_hw=wanted.frame.size_hw)
        if not drawing.shapes and (raws or marked):
            return _Done(wanted, left_out="unpainted")  # somebody has worked here: it is not "nothing to see"
        if not drawing.shapes and rule.empty == "skip":
            return _Done(wanted, left_out="empty")
        fill = rule.fill_of(drawn=bool(drawing.shapes))
        painted = sorted({(shape.label, rule.label_id_of(shape.label)) for shape in drawing.shapes})
        recipe = _hash([RULE_VERSION, digest(raws), painted, fill])
        source = _source(wanted, self._found.server)
        if old is not None and old.recipe == recipe and self._is_there(old):
            return _Done(wanted) if old.source == source else _Done(wanted, item=replace(old, source=source))
        stored = self._stored_image(old)
        image = stored if stored is not None else self._download(wanted)
        raster = rasterise(
            drawing.shapes,
            size_hw=wanted.frame.size_hw,
            label_id_of=rule.label_id_of,
            fill=fill,
        )
        sha256 = hashlib.sha256(image).hexdigest()
        item, mask = make_item(
            image_name=self._names[wanted.key],
            image=image,
            label_map=raster.label_map,
            source_map=raster.source_map,
            source=source,
            recipe=recipe,
            group=group_key(self._plan.group_by, source=source, name=wanted.frame.name, image_sha256=sha256),
        )
        return _Done(wanted, item=item, image=image if stored is None else None, mask=mask)

    def _download(self, wanted: Wanted) -> bytes:
        """A frame's file, decoded once: a truncated or broken one must not get into the dataset."""

        def on_bytes(count: int) -> None:
            with self._lock:
                self.bytes += count
            self.on_bytes()

        image = self._server.image(wanted.task.id, wanted.frame.number, on_bytes=on_bytes)
        height, width, _ = decode_image(image).shape
        if (height, width) != wanted.frame.size_hw:
            expected = "{1}x{0}".format(*wanted.frame.size_hw)
            raise ImageError(f"the file has {width}x{height} pixels, CVAT says {expected}. Upload the image again.")
        return image

    def _is_there(self, item: ManifestItem) -> bool:
        """Whether the dataset has both files, and nobody has changed the mask; images are too large to look at all."""
        mask = self._output / MASKS / item.mask
        if not (self._output / IMAGES / item.image).is_file() or not mask.is_file():
            return False
        return hashlib.sha256(mask.read_bytes()).hexdigest() == item.mask_sha256

    def _stored_image(self, old: ManifestItem | None) -> bytes | None:
        """The frame's file when the dataset has it, whole."""
        if old is None or not (self._output / IMAGES / old.image).is_file():
            return None
        data = (self._output / IMAGES / old.image).read_bytes()
        return data if hashlib.sha256(data).hexdigest() == old.image_sha256 else None

    def record(self, done: _Done) -> None:
        """Count what came of a frame."""
        job, number = done.wanted.job.id, done.wanted.frame.number
        if done.problem is not None:
            self.left_out.append(done.problem)
            self._failed_jobs.add(job)
        elif done.left_out is not None:
            self._left_out_frames[done.left_out].setdefault(job, []).append(number)
        elif done.mask is not None:
            self.written += 1
        else:
            self.unchanged += 1

    def gone(self, manifest: Manifest) -> list[str]:
        """Names of items that count no more: of the tasks that were looked at, and of tasks that left a project."""
        # A frame whose last shape was deleted is not annotated any more.
        bare = list(self._left_out_frames.values())
        wanted = {
            w.key for w in self._found.wanted if not any(w.frame.number in frames.get(w.job.id, ()) for frames in bare)
        }
        return [
            item.name
            for item in manifest.items
            if item.source.get("server") == self._found.server
            and _key(item) not in wanted
            and self._is_in_scope(item.source)
        ]

    def _is_in_scope(self, facts: Mapping[str, Any]) -> bool:
        return facts.get("task") in self._found.scope or facts.get("project") in self._found.projects

    def notes(self, manifest: Manifest, drawn: "_Annotations") -> dict[str, Any]:
        """What was left out, of jobs that were read now and of those that have not changed."""
        skipped: Counter[str] = Counter()
        counts = dict.fromkeys(self._left_out_frames, 0)
        for job in self.frames_of:
            facts = manifest.jobs.get(_job_key(self._found.server, job.id))
            if facts is None:  # one of its frames failed
                skipped.update(drawn.skipped.get(job.id, {}))
            else:
                skipped.update(facts.get("skipped", {}))
            for why, frames in self._left_out_frames.items():
                counts[why] += len(frames.get(job.id, [])) if facts is None else len(facts.get(why, ()))
        return {**counts, "skipped": dict(skipped)}

    def job_records(self, manifest: Manifest, drawn: "_Annotations") -> dict[str, Mapping[str, Any] | None]:
        """What the next run compares with; a job with a frame that failed is looked at again."""
        server = self._found.server
        here = {_job_key(server, job.id) for job in self.frames_of}
        records: dict[str, Mapping[str, Any] | None] = {
            key: None
            for key, facts in manifest.jobs.items()
            if key.startswith(f"{server}#") and self._is_in_scope(facts) and key not in here
        }
        for job in self.stale:
            facts = {
                "task": job.task_id,
                "project": job.project_id,
                "type": job.type,
                "state": job.state,
                "stage": job.stage,
                "updated": job.updated,
                "rule": self._rule_key(job),
                "skipped": dict(sorted(drawn.skipped.get(job.id, {}).items())),
                **{why: sorted(frames.get(job.id, [])) for why, frames in self._left_out_frames.items()},
            }
            records[_job_key(server, job.id)] = None if job.id in self._failed_jobs else facts
        return records

    def pinned(self, manifest: Manifest) -> dict[str, Split]:
        """Names of the items of ground-truth jobs → test."""
        pinned = {wanted.key for wanted in self._found.wanted if wanted.pinned}
        return {
            item.name: "test"
            for item in manifest.items
            if item.source.get("server") == self._found.server and _key(item) in pinned
        }


def _move(writer: DatasetWriter, old: str, new: str) -> None:
    """Let items of a server's old address be those of its new one; what is known of its jobs is looked up again."""
    for item in writer.manifest.items:
        if item.source.get("server") == old:
            writer.stage(replace(item, source={**item.source, "server": new}), image=None, mask=None)
    writer.set_jobs({key: None for key in writer.manifest.jobs if key.startswith(f"{old}#")})


def _refuse_doubles(manifest: Manifest, found: Survey) -> None:
    """Stop where a server seems to be in the dataset under another address: all its frames would be there twice.

    Raises:
        DatasetError: names the other address.
    """
    wanted = {(*wanted.key, wanted.frame.name) for wanted in found.wanted}
    others = sorted(
        {
            str(item.source["server"])
            for item in manifest.items
            if item.source.get("kind") == "cvat"
            and item.source["server"] != found.server
            and (*_key(item), item.source.get("name")) in wanted
        }
    )
    if others:
        raise DatasetError(
            f"The dataset has these frames from {', '.join(others)} already, and this is {found.server}. If it is the "
            f"same server, set CVAT_URL as before, or add --server-was {others[0]}; otherwise fetch into another "
            "folder."
        )


def _check_size(frame: Frame) -> None:
    """Believe no size for which the label map alone would fill the memory."""
    height, width = frame.size_hw
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ImageError(f"CVAT says it has {width}x{height} pixels; 1 to {MAX_PIXELS} are read.")


class _Annotations:
    """Shapes of jobs, on disk until their frames' turn comes: in memory a hundred large panoramas would not fit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: dict[int, dict[int, Counter[int]]] = {}
        self._held: tuple[int, dict[int, list[dict[str, Any]]]] = (-1, {})
        self._marked: dict[int, frozenset[int]] = {}
        self.skipped: dict[int, Counter[str]] = {}
        """Job → kind of annotation that makes no mask → how many."""

    def keep(self, job: Job, annotations: Annotations, frames: Sequence[int]) -> None:
        """Count and store what is on the frames that count; shapes on others are nobody's business here."""
        here = frozenset(frames)
        shapes = [shape for shape in annotations.shapes if shape["frame"] in here]
        counts = self._counts.setdefault(job.id, {})
        for shape in shapes:
            if shape["type"] in PAINTED:
                counts.setdefault(shape["frame"], Counter())[shape["label_id"]] += 1
        skipped = Counter(shape["type"] for shape in shapes if shape["type"] not in PAINTED)
        skipped.update({"track": annotations.tracks, "tag": annotations.tags})
        self.skipped[job.id] = +skipped
        start = annotations.track_start
        tracked = frozenset(number for number in here if start is not None and number >= start)
        self._marked[job.id] = tracked | (annotations.tag_frames & here)
        (self._folder / f"{job.id}.json").write_text(json.dumps(shapes), encoding="utf-8")

    def is_marked(self, wanted: Wanted) -> bool:
        """Whether a track or a tag is on the frame."""
        return wanted.frame.number in self._marked[wanted.job.id]

    def of(self, wanted: Wanted) -> list[dict[str, Any]]:
        """The shapes of a frame, in the server's order. Ask job by job, from one thread."""
        if self._held[0] != wanted.job.id:
            frames: dict[int, list[dict[str, Any]]] = {}
            for shape in json.loads((self._folder / f"{wanted.job.id}.json").read_bytes()):
                frames.setdefault(shape["frame"], []).append(shape)
            self._held = (wanted.job.id, frames)
        return self._held[1].get(wanted.frame.number, [])

    def strangers(self, found: Survey, schema: LabelSchema) -> list[Stranger]:
        """Labels that the schema lacks, most frequent first."""
        task_of = {wanted.job.id: wanted.task.id for wanted in found.wanted}
        shapes: Counter[str] = Counter()
        images: Counter[str] = Counter()
        for job, frames in self._counts.items():
            names = {label.id: label.name for label in found.labels[task_of[job]] if schema.find(label.name) is None}
            for counts in frames.values():
                here = {names[label_id]: count for label_id, count in counts.items() if label_id in names}
                shapes.update(here)
                images.update(here.keys())
        return [Stranger(name=name, shapes=count, images=images[name]) for name, count in shapes.most_common()]


def _source(wanted: Wanted, server: str) -> Source:
    return {
        "kind": "cvat",
        "server": server,
        "project": wanted.task.project_id,
        "task": wanted.task.id,
        "job": wanted.job.id,
        "frame": wanted.frame.number,
        "name": wanted.frame.name,
    }


def _key(item: ManifestItem) -> tuple[int, int]:
    task, frame = item.source.get("task"), item.source.get("frame")
    return (task, frame) if isinstance(task, int) and isinstance(frame, int) else (-1, -1)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:32]


def _job_key(server: str, job: int) -> str:
    return f"{server}#{job}"


Given = TypeVar("Given")
Made = TypeVar("Made")


def _flow(
    pool: ThreadPoolExecutor, function: Callable[[Given], Made], work: Iterable[Given], parallel: int
) -> Iterator[Made]:
    """Run `function` over `work` in the pool, a bounded number at a time; results come as they are made."""
    running: set[Future[Made]] = set()
    for given in work:
        running.add(pool.submit(function, given))
        if len(running) >= parallel:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)
