"""Which model answers: the packaged one, or the one that a model volume points at, followed while requests go on.

A thread of each worker looks at the volume's pointer. What it points at is copied, loaded, warmed up and checked beside
the model that answers, and takes its place between two requests. What does not pass is refused: it is logged once, and
tried again when the pointer or the version's files change.

The thread writes its lines to the standard error, which is the function's log as well: `context.logger` writes to the
socket that the answers go through, and belongs to the thread of the requests.
"""

import atexit
import contextlib
import shutil
import sys
import tempfile
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sscloud.bundle import Manifest, ModelBundle
from sscloud.errors import BundleError, SSCloudError
from sscloud.volume import POINTER, Pointer, copy_out, drawn_labels, fingerprint, parse_pointer, read_pointer

if TYPE_CHECKING:
    from serverless.metrics import Metrics
    from serverless.model_handler import ModelHandler
    from serverless.settings import Settings
else:
    from model_handler import ModelHandler

_LONGEST_PAUSE = 60.0
"""Seconds between two tries to copy a version that the volume does not give."""

_UNREADABLE = "The model volume cannot be read now; it is tried again"
_EMPTY = "The model volume names no version: none was promoted yet, or it is not mounted; it is looked at again"

_PATIENCE = 1.5
"""Seconds to wait for the thread at the end; whoever ends a worker waits a little longer."""


class Champion:
    """The model that answers.

    Args:
        packaged: folder of the bundle that was packaged: it says which labels the function declares, and answers where
            no volume is followed, or nothing in it can be served.
        settings: of the function.

    Raises:
        BundleError: the packaged bundle is missing, damaged, or does not fit.
        ConfigError: the device does not exist, or cannot compute in the precision.
    """

    def __init__(self, packaged: Path, settings: "Settings") -> None:
        self._settings = settings
        self._labels = drawn_labels(ModelBundle.load(packaged).manifest)
        self._served: Pointer | None = None
        self._refused: str | None = None
        self._title: str | None = None
        """Of the model that answers."""
        self._seen: object = None
        """What the volume held when it was settled what to do about it."""
        self._failed: object = None
        """What it held when that could not be copied: it is tried again, at `_again_at`."""
        self._again_at, self._pause = 0.0, settings.poll
        self._reported: str | None = None
        """What the log says already of a volume that gives nothing, until it does."""
        self._metrics: Metrics | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.model = self._look() or ModelHandler(packaged, settings)
        """The model that answers now. A request takes it once, at its beginning."""
        self._title = self.model.manifest.title

    def follow(self, metrics: "Metrics") -> None:
        """Follow the volume, if there is one, until the process ends.

        Args:
            metrics: told of every change from now on, and of what was refused so far.
        """
        self._metrics = metrics
        if self._settings.models is None:
            return
        if self._refused is not None:
            metrics.refuse(self._refused)
        self._thread = threading.Thread(target=self._follow, name="champion", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread; a model that it is loading is forgotten."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def look(self) -> None:
        """Look at the volume, and take what it points at if that is new and good."""
        model = self._look()
        if model is not None:
            self.model = model  # a running request keeps the one that it took
            self._title = model.manifest.title
            if self._metrics is not None:
                self._metrics.take(self._title)

    def _follow(self) -> None:
        while not self._ended.wait(self._settings.poll):
            self.look()

    def _look(self) -> "ModelHandler | None":
        """The model that the volume points at, loaded and checked, if it is new and good."""
        volume = self._settings.models
        if volume is None:
            return None
        try:
            data = read_pointer(volume)
        except (OSError, BundleError) as error:
            never = self._seen is None and isinstance(error, FileNotFoundError)
            self._report(_EMPTY if never else _UNREADABLE, error)
            return None
        model: ModelHandler | None = None
        pointer: Pointer | None = None
        seen: tuple[bytes, object] = data, None
        try:
            pointer = parse_pointer(data, source=str(volume / POINTER))
            seen = data, fingerprint(volume, pointer.bundle)
            if seen == self._failed and time.monotonic() < self._again_at:
                return None
            if seen == self._seen:
                pass  # nothing new, but the volume is there: its next outage is one of its own
            elif self._served is not None and _same(pointer, self._served):
                self._settle()
            else:
                model = self._load(volume, pointer)
        except OSError as error:
            self._report(_UNREADABLE, error)
            self._failed, self._again_at = seen, time.monotonic() + self._pause
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
            return None
        except Exception as error:  # whatever is wrong with a new model, the old one goes on
            if seen != self._seen:
                self._refuse(pointer, error)
        self._seen, self._failed, self._reported = seen, None, None
        self._pause = self._settings.poll
        return model

    def _load(self, volume: Path, pointer: Pointer) -> "ModelHandler":
        started = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="sscloud-model-"))
        try:
            published = copy_out(volume, pointer, folder)
            self._check_labels(published.bundle.manifest)
            model = ModelHandler(published.bundle.path, self._settings)
            model.check(published)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        self._served, self._refused = pointer, None
        _log(
            "A new champion is served",
            model=model.manifest.title,
            before=self._title,
            bundle=pointer.bundle,
            runs_on=model.describe(),
            milliseconds=round((time.perf_counter() - started) * 1000),
        )
        return model

    def _check_labels(self, manifest: Manifest) -> None:
        labels = drawn_labels(manifest)
        if labels != self._labels:
            raise BundleError(
                f"{manifest.title} has the labels {', '.join(sorted(labels))}, but this function declares "
                f"{', '.join(sorted(self._labels))} to CVAT. Deploy a function made of this version."
            )

    def _settle(self) -> None:
        """The volume points at what is served already."""
        self._refused = None
        if self._metrics is not None:
            self._metrics.settle()

    def _refuse(self, pointer: Pointer | None, error: Exception) -> None:
        self._refused = POINTER if pointer is None else pointer.bundle
        if self._metrics is not None:
            self._metrics.refuse(self._refused)
        _log(
            "The champion of the model volume is refused",
            model=self._title or "the packaged one",
            refused=self._refused,
            error=str(error) if isinstance(error, SSCloudError) else repr(error),
        )

    def _report(self, message: str, error: Exception) -> None:
        if message != self._reported:
            _log(message, model=self._title or "the packaged one", error=str(error))
        self._reported = message


def _same(one: Pointer, other: Pointer) -> bool:
    return (one.bundle, one.weights_sha256) == (other.bundle, other.weights_sha256)


def _log(message: str, **facts: Any) -> None:
    line = f"{datetime.now(UTC).isoformat(sep=' ', timespec='milliseconds')} {message}: {facts}\n"
    with contextlib.suppress(OSError, ValueError):  # a log that is gone must not end the thread
        sys.stderr.write(line)
        sys.stderr.flush()
