"""The model volume: a folder from which functions take the model to serve, so that a new one needs no new image.

    VOLUME/
      street-v3-1a2b3c4d5e6f/   a published version, never changed
        bundle/                 weights and manifest
        check.png               a small panorama
        expected.png            its label map as PyTorch computes it in fp32, for those who compute otherwise
      champion.json             which of them is served; replaced as a whole

People's commands write it, one at a time; functions only read it, at any moment, and trust nothing in it.
"""

import contextlib
import functools
import hashlib
import json
import math
import operator
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sscloud.architecture import STRIDE
from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle
from sscloud.errors import BundleError, ConfigError, ImageError
from sscloud.files import atomic_folder, atomic_write
from sscloud.image import read_image, read_label_map
from sscloud.inference import Predictor, Segmentation
from sscloud.room import panelled_room

FORMAT = 1
"""Version of champion.json."""

POINTER = "champion.json"
BUNDLE, CHECK, EXPECTED = "bundle", "check.png", "expected.png"

_FILES = (BUNDLE, MANIFEST), (CHECK,), (EXPECTED,), (BUNDLE, WEIGHTS)
"""Of a published version; the large one last."""

KEPT = 5
"""Versions that `retire` leaves: the served one, and those that people may want back at once."""

LARGEST_DIFFERENCE = 0.05
"""Share of the check's pixels that may get another label than expected. In bf16 it is up to 0.02 for untrained
networks, which hesitate everywhere, and int8 is packaged only when it changes less than 0.005 of real panoramas
(`tools.openvino_check.LEAST_EQUAL`); other weights, or a network that is computed wrongly, change most of them."""

_FOLDER = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-v[0-9]{1,9}-[0-9a-f]{12}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LONGEST_NAME = 40
_CHECK_ROWS = 64
"""Of the check, as the network sees it."""
_MOST_CHECK_ROWS = 2048
_MIB = 1024 * 1024
_MOST_BYTES = {POINTER: 64 * 1024, MANIFEST: 64 * _MIB, WEIGHTS: 8192 * _MIB, CHECK: 64 * _MIB, EXPECTED: 64 * _MIB}
"""What a reader takes of each file; far above what is written."""
_PATIENCE = 120.0
"""Seconds to wait for another writer; publishing takes some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """What champion.json says."""

    bundle: str
    """Name of a folder of the volume."""
    weights_sha256: str
    published: str
    """When it was pointed at, ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version, copied out of the volume."""

    bundle: ModelBundle
    check: Path
    expected: Path


def publish(volume: Path, bundle: ModelBundle) -> str:
    """Copy a bundle into the volume, with its check. Nobody serves it before `point`.

    A version that is there already stays as it is, unless it is damaged. What killed writers left is removed.

    Args:
        volume: the folder; made when it is missing.
        bundle: a loaded bundle.

    Returns:
        the name of its folder in the volume.

    Raises:
        BundleError: the bundle is damaged, or gives no finite numbers.
        ConfigError: the volume cannot be written.
    """
    with _writing(volume):
        name = folder_name(bundle)
        target = volume / name
        if _is_whole(target, bundle):
            return name
        if target.exists():
            shutil.rmtree(target)  # damaged: whoever points at it serves what was loaded before
        with atomic_folder(target, marker=CHECK) as folder:
            (folder / BUNDLE).mkdir()
            for file in (WEIGHTS, MANIFEST):
                shutil.copyfile(bundle.path / file, folder / BUNDLE / file)
            _write_check(folder, ModelBundle.load(folder / BUNDLE))
            for path in folder.rglob("*.*"):
                _flush(path)
    return name


def point(volume: Path, folder: str) -> None:
    """Let functions serve a published version from now on. Pointing at the one that is pointed at changes nothing.

    Args:
        volume: the folder.
        folder: what `publish` returned.

    Raises:
        BundleError: there is no such version, or it is damaged.
        ConfigError: the volume cannot be written.
    """
    manifest = published_manifest(volume, folder)
    with _writing(volume):
        try:
            now = pointed(volume)
        except BundleError:
            now = None  # a damaged pointer is replaced
        if now is not None and (now.bundle, now.weights_sha256) == (folder, manifest.weights_sha256):
            return
        pointer = {
            "format": FORMAT,
            "bundle": folder,
            "weights_sha256": manifest.weights_sha256,
            "published": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.utime(volume / folder)  # `retire` keeps what was used last
        atomic_write(volume / POINTER, (json.dumps(pointer, indent=2) + "\n").encode())


def pointed(volume: Path) -> Pointer | None:
    """What the volume says is to be served; None while it says nothing.

    Raises:
        BundleError: champion.json is not what `point` writes, or cannot be read.
    """
    try:
        return parse_pointer(read_pointer(volume), source=str(volume / POINTER))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{volume / POINTER} cannot be read: {error.strerror or error}.") from error


def read_pointer(volume: Path) -> bytes:
    """The text of champion.json, unchecked.

    Raises:
        OSError: there is none, or it cannot be read now.
        BundleError: it is no plain file, or far too large.
    """
    return _read(volume, POINTER)


def fingerprint(volume: Path, folder: str) -> tuple[tuple[int, int, int] | None, ...]:
    """By which a change of a published version's files is noticed: of each, inode, time and size; None: not there.

    Raises:
        OSError: the volume cannot be read now.
    """
    found: list[tuple[int, int, int] | None] = []
    for parts in _FILES:
        try:
            status = volume.joinpath(folder, *parts).lstat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
    return tuple(found)


def parse_pointer(data: bytes, *, source: str) -> Pointer:
    """Read the text of champion.json strictly.

    Raises:
        BundleError: it is not what `point` writes.
    """
    again = "Promote a version again: that writes it anew."
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not valid JSON ({error}). {again}") from error
    if not isinstance(values, dict) or values.keys() != {"format", "bundle", "weights_sha256", "published"}:
        raise BundleError(f"{source}: expected an object with format, bundle, weights_sha256 and published. {again}")
    if values["format"] != FORMAT or isinstance(values["format"], bool):
        raise BundleError(f"{source}: format {values['format']!r}; this version of SSCloud reads format {FORMAT}.")
    if not _fits(_FOLDER, values["bundle"]):
        raise BundleError(f"{source}: 'bundle' must be the name of a published version, such as {_EXAMPLE}. {again}")
    if not _fits(_SHA256, values["weights_sha256"]):
        raise BundleError(f"{source}: 'weights_sha256' must be 64 hexadecimal digits. {again}")
    if not isinstance(values["published"], str):
        raise BundleError(f"{source}: 'published' must be a text. {again}")
    return Pointer(bundle=values["bundle"], weights_sha256=values["weights_sha256"], published=values["published"][:64])


def published_manifest(volume: Path, folder: str) -> Manifest:
    """What a published version says of itself; its weights are not looked at.

    Raises:
        BundleError: there is no such version, or its manifest is damaged.
    """
    if not _fits(_FOLDER, folder):
        raise BundleError(f"{folder[:80]!r} is no name of a published version, such as {_EXAMPLE}.")
    source = volume / folder / BUNDLE / MANIFEST
    try:
        data = json.loads(_read(volume, folder, BUNDLE, MANIFEST))
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror or error}. Promote the version again.") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}. Promote the version again.") from error
    return Manifest.from_dict(data, source=str(source))


def copy_out(volume: Path, pointer: Pointer, target: Path) -> Published:
    """Copy the version that is pointed at out of the volume, and verify the copy.

    A model that runs from a copy of its own does not care whether the volume goes away or changes under it.

    Args:
        volume: the folder.
        pointer: what `pointed` says.
        target: an empty folder that nobody else writes.

    Raises:
        OSError: the volume, or a file of the version, is not there or cannot be read now.
        BundleError: the version is damaged, or is not the one that the pointer means.
    """
    (target / BUNDLE).mkdir()
    for parts in _FILES:
        _copy(volume, (pointer.bundle, *parts), target.joinpath(*parts))
    bundle = ModelBundle.load(target / BUNDLE)
    if bundle.manifest.weights_sha256 != pointer.weights_sha256:
        raise BundleError(
            f"{volume / pointer.bundle} holds other weights ({bundle.manifest.weights_sha256[:12]}…) than {POINTER} "
            f"means ({pointer.weights_sha256[:12]}…). Promote the version again."
        )
    return Published(bundle=bundle, check=target / CHECK, expected=target / EXPECTED)


def run_check(published: Published, predictor: Predictor) -> float:
    """Let a model segment the version's panorama.

    Returns:
        the share of its pixels that get another label than expected.

    Raises:
        BundleError: that is above `LARGEST_DIFFERENCE`, the numbers are not finite, or the check is damaged.
    """
    title = published.bundle.manifest.title
    try:
        image, expected = read_image(published.check), read_label_map(published.expected)
        found = predictor.predict(image)
    except ImageError as error:
        raise BundleError(f"{title}: its check cannot be used: {error}") from error
    _require_finite(found, title)
    label_map = found.label_map
    if label_map.shape != expected.shape:
        raise BundleError(f"{title}: {EXPECTED} has {expected.shape} pixels, {CHECK} {label_map.shape}.")
    difference = float(np.mean(label_map != expected))
    if difference > LARGEST_DIFFERENCE:
        raise BundleError(
            f"{title}: {difference:.1%} of the test panorama's pixels get another label here than where it was "
            f"published, at most {LARGEST_DIFFERENCE:.0%} were expected. Is the function of the same version of "
            "SSCloud? Package and deploy it again."
        )
    return difference


def retire(volume: Path, *, keep: int = KEPT, spare: Collection[str] = ()) -> list[str]:
    """Remove the versions that were not used for longest; the one that is pointed at always stays.

    Args:
        volume: the folder.
        keep: versions that stay, the one that is pointed at among them.
        spare: names of folders that stay besides, and do not count.

    Returns:
        the names of those that were removed.

    Raises:
        ConfigError: the volume cannot be written.
        BundleError: champion.json is damaged, so nobody knows which is in use.
    """
    with _writing(volume):
        now = pointed(volume)
        used = {now.bundle} if now is not None else set()
        names = [path.name for path in volume.iterdir() if _FOLDER.fullmatch(path.name) and not path.is_symlink()]
        others = sorted(set(names) - used - set(spare), key=lambda name: (volume / name).stat().st_mtime, reverse=True)
        removed = others[max(0, keep - len(used)) :]
        for name in removed:
            shutil.rmtree(volume / name)
    return sorted(removed)


def folder_name(bundle: ModelBundle) -> str:
    """The name of a bundle's folder in a volume: readable, of Latin letters, and its own for every manifest.

    Raises:
        BundleError: the manifest cannot be read.
    """
    try:
        digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(f"{bundle.path / MANIFEST} cannot be read: {error.strerror or error}.") from error
    slug = re.sub(r"[^a-z0-9]+", "-", bundle.manifest.name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return f"{slug or 'model'}-v{bundle.manifest.version}-{digest[:12]}"


def drawn_labels(manifest: Manifest) -> frozenset[str]:
    """Names of the labels that a model's answers may have: what the function's spec has to declare."""
    return frozenset(label.name for label in manifest.labels.classes if not label.background)


_EXAMPLE = "street-v3-1a2b3c4d5e6f"


def _fits(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _write_check(folder: Path, bundle: ModelBundle) -> None:
    """Write the check of a bundle: a panorama and its label map."""
    manifest = bundle.manifest
    least = math.ceil(STRIDE / manifest.scale) + 1
    height = max(least, min(_MOST_CHECK_ROWS, math.ceil(_CHECK_ROWS / manifest.scale)))
    image = panelled_room((height, max(least, round(height * manifest.aspect))))
    found = Predictor(bundle, device="cpu", precision="fp32").predict(image)
    _require_finite(found, manifest.title)
    for name, pixels in ((CHECK, image), (EXPECTED, found.label_map)):
        Image.fromarray(pixels).save(folder / name, "PNG")


def _require_finite(found: Segmentation, title: str) -> None:
    if not np.isfinite(found.confidence.values).all():
        raise BundleError(
            f"{title}: its network gives numbers that are not finite for the test panorama, so its training diverged "
            "or its weights are damaged. Train again, or promote another version."
        )


def _is_whole(target: Path, bundle: ModelBundle) -> bool:
    """Whether a folder of the volume holds this bundle, undamaged, with a check."""
    try:
        there = ModelBundle.load(target / BUNDLE)
    except BundleError:
        return False
    same = there.manifest.weights_sha256 == bundle.manifest.weights_sha256
    return same and all((target / name).is_file() for name in (CHECK, EXPECTED))


@contextlib.contextmanager
def _writing(volume: Path) -> Iterator[None]:
    """Be the only writer of a volume; what killed ones left is removed first."""
    from filelock import FileLock, Timeout  # comes with PyTorch; functions, which only read, may have neither

    try:
        volume.mkdir(parents=True, exist_ok=True)
        with FileLock(volume / ".lock", timeout=_PATIENCE):
            _sweep(volume)
            yield
    except Timeout:
        raise ConfigError(
            f"Another process has been writing {volume} for {_PATIENCE:g} s. Wait for it, or end it, and try again."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The model volume {volume} cannot be written: {error}. Free the disk, or give another folder."
        ) from error


def _sweep(volume: Path) -> None:
    """Remove what `atomic_folder` and `atomic_write` leave when they are killed; the lock says that nobody is at it."""
    for path in volume.glob(".*"):
        if path.is_dir() and not path.is_symlink() and re.search(r"-(writing|old)-\w+$", path.name):
            shutil.rmtree(path)
        elif path.name.startswith(".writing-"):
            path.unlink()


def _flush(path: Path) -> None:
    """Bring a file to the disk before its folder takes its name."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _read(volume: Path, *parts: str) -> bytes:
    """A small file of the volume.

    Raises:
        OSError: it cannot be read.
        BundleError: it is no plain file, or too large.
    """
    with _opened(volume, parts) as handle, os.fdopen(handle, "rb", closefd=False) as stream:
        data = stream.read(_MOST_BYTES[parts[-1]] + 1)
    if len(data) > _MOST_BYTES[parts[-1]]:
        raise _too_large(volume, parts)
    return data


def _copy(volume: Path, parts: tuple[str, ...], target: Path) -> None:
    """Copy a file out of the volume; errors as in `_read`."""
    left = _MOST_BYTES[parts[-1]]
    with (
        _opened(volume, parts) as handle,
        os.fdopen(handle, "rb", closefd=False) as source,
        target.open("wb") as stream,
    ):
        while chunk := source.read(_MIB):
            left -= len(chunk)
            if left < 0:
                raise _too_large(volume, parts)
            stream.write(chunk)


@contextlib.contextmanager
def _opened(volume: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """Open a file of the volume, without following links out of it or waiting for pipes."""
    path = volume
    for part in parts:
        path /= part
        if path.is_symlink():
            raise BundleError(f"{path} is a link. A model volume holds plain files only; promote the version again.")
    flags = [getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")]  # where the system has them
    handle = os.open(path, functools.reduce(operator.or_, flags, os.O_RDONLY))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BundleError(f"{path} is no plain file. Promote the version again.")
        yield handle
    finally:
        os.close(handle)


def _too_large(volume: Path, parts: tuple[str, ...]) -> BundleError:
    path, most = volume.joinpath(*parts), _MOST_BYTES[parts[-1]]
    return BundleError(f"{path} is larger than {most >> 10} KiB, so it is not what SSCloud writes.")
