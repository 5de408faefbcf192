"""Writing files so that a reader never sees half of one, wherever the writer is killed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sscloud.errors import ConfigError

# It can only be read by setting it, for the whole process: so once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` under a temporary name in the same folder, then rename; missing parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_UMASK)  # mkstemp's 0600 would lock other users out of a shared data set
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Args:
        path: the folder to write.
        marker: a file that every such folder holds; a folder without it is somebody else's and never replaced.
        overwrite: replace an existing folder.

    Raises:
        ConfigError: `path` exists and `overwrite` is not set, or it is not a folder of this kind.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already. Name another place, or add --overwrite to replace it.")
    if path.exists() and not (path / marker).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(
            f"{path} is not replaced: it has no {marker}, so it holds something else than what is written here. "
            "Name another place."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-writing-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)
        if path.exists():
            # A folder cannot be renamed over a full one: move the old one aside first, so that it survives a failure.
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
            path.replace(aside / path.name)
            try:
                temporary.replace(path)
            except BaseException:
                (aside / path.name).replace(path)
                aside.rmdir()
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
