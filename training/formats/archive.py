"""Zip archives from people and servers, read as hostile input: nothing is ever unpacked to disk under its own name.

`ZipArchive` checks the whole table of contents before the first byte is decompressed, and reads members with a bound.
"""

import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from sscloud.errors import ArchiveError

MAX_MEMBERS: Final = 200_000
"""Most entries in an archive; a project of a thousand panoramas with a hundred masks each has half of it."""
MAX_MEMBER_BYTES: Final = 256 << 20
"""Largest member when decompressed; an 8192x4096 panorama as PNG is at most 100 MB."""
MAX_TOTAL_BYTES: Final = 256 << 30
"""Most bytes of all members together. They are read one at a time: this bounds time, not memory."""
MAX_RATIO: Final = 200
"""Most bytes out per byte in, of members and archives over `RATIO_FLOOR_BYTES`. XML reaches 40, deflate 1032."""
RATIO_FLOOR_BYTES: Final = 16 << 20
"""Below this size nobody is hurt by a high ratio, and honest empty masks, compressed twice, do reach 400."""

_UTF8_NAME = 0x800
_ENCRYPTED = 0x1
_BEYOND_CYRILLIC = 0x530

# What zipfile lets through from damaged archives: NotImplementedError is a RuntimeError, wrong names are ValueErrors.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)


class ZipArchive:
    """An open zip whose table of contents is sane. Use as a context manager.

    Raises:
        ArchiveError: not a zip, truncated, encrypted, compressed by a rare method, with links, with names that lead
            out of the archive, twice the same name, or sizes of a decompression bomb.
    """

    def __init__(self, path: Path, *, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise ArchiveError(f"{path} does not exist. Give the path of the zip that CVAT exported.") from error
        except OSError as error:
            raise ArchiveError(f"{path} cannot be read: {error.strerror or error}.") from error
        except _UNREADABLE as error:
            raise ArchiveError(
                f"{path} is not a complete zip archive ({error}). Download or export it again; "
                "archives of other kinds (rar, 7z, tar) have to be packed as zip."
            ) from error
        try:
            self.members: Mapping[str, zipfile.ZipInfo] = self._checked(max_total_bytes)
        except ArchiveError:
            self._zip.close()
            raise
        # Archives packed on a Mac hold decomposed letters (и + breve), the XML in them composed ones (й).
        self._by_key = {_key(name): name for name in self.members}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._zip.close()

    def find(self, name: str) -> str | None:
        """The member of this name, however its letters are composed."""
        return name if name in self.members else self._by_key.get(_key(name))

    def read(self, name: str, *, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
        """The bytes of a member.

        Raises:
            ArchiveError: broken, truncated, or larger than `max_bytes`.
        """
        info = self.members[name]
        if info.file_size > max_bytes:
            raise ArchiveError(
                f"{self.path}: {name} has {info.file_size} bytes, at most {max_bytes} are read. "
                "Take it out of the archive, or export smaller images."
            )
        try:
            with self._zip.open(info) as stream:
                # With a count, zlib stops there; without one it would inflate whatever a lying header hides.
                return stream.read(info.file_size + 1)
        except _UNREADABLE as error:
            raise self._cannot_be_unpacked(name, error) from error

    def peek(self, name: str, count: int) -> bytes:
        """The first bytes of a member, at most `count`.

        Raises:
            ArchiveError: broken or truncated.
        """
        try:
            with self._zip.open(self.members[name]) as stream:
                return stream.read(count)
        except _UNREADABLE as error:
            raise self._cannot_be_unpacked(name, error) from error

    def _cannot_be_unpacked(self, name: str, error: Exception) -> ArchiveError:
        return ArchiveError(
            f"{self.path}: {name} cannot be unpacked ({error}). It is damaged: export the archive again."
        )

    def _checked(self, max_total_bytes: int) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise ArchiveError(
                f"{self.path} has {len(infos)} members, at most {MAX_MEMBERS} are read. Export it in several parts."
            )
        members: dict[str, zipfile.ZipInfo] = {}
        keys: set[str] = set()
        for info in infos:
            name = _member_name(info).replace("\\", "/")
            self._check_member(info, name)
            if info.is_dir() or _is_litter(name):
                continue
            if _key(name) in keys:
                raise ArchiveError(f"{self.path} holds {name!r} twice. Pack it again, with each file once.")
            keys.add(_key(name))
            members[name] = info
        total = sum(info.file_size for info in infos)
        if total > max_total_bytes:
            raise ArchiveError(
                f"{self.path} unpacks to {total} bytes, at most {max_total_bytes} are read. Export it in several parts."
            )
        packed = max(1, self.path.stat().st_size)
        if total > RATIO_FLOOR_BYTES and total > MAX_RATIO * packed:
            raise ArchiveError(
                f"{self.path} unpacks to {total / packed:.0f} times its size: a decompression bomb. It is not read; "
                "export the archive again from CVAT."
            )
        return members

    def _check_member(self, info: zipfile.ZipInfo, name: str) -> None:
        if problem := unsafe_path(name):
            raise ArchiveError(
                f"{self.path}: the member {name!r} {problem}. CVAT writes no such names: the archive is not read. "
                "Export it again."
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ArchiveError(f"{self.path}: {name} is a symbolic link. Pack the file itself instead.")
        if info.flag_bits & _ENCRYPTED:
            raise ArchiveError(f"{self.path}: {name} is encrypted. Pack the archive without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(
                f"{self.path}: {name} is compressed by method {info.compress_type}; stored and deflated members are "
                "read. Pack the archive again with the ordinary zip method (deflate)."
            )
        if info.file_size > MAX_MEMBER_BYTES:
            raise ArchiveError(
                f"{self.path}: {name} unpacks to {info.file_size} bytes, at most {MAX_MEMBER_BYTES} are read. "
                "Take it out of the archive."
            )
        if info.file_size > RATIO_FLOOR_BYTES and info.file_size > MAX_RATIO * max(1, info.compress_size):
            raise ArchiveError(
                f"{self.path}: {name} unpacks to {info.file_size / max(1, info.compress_size):.0f} times its size: a "
                "decompression bomb. The archive is not read; export it again from CVAT."
            )


def unsafe_path(name: str) -> str | None:
    """What is wrong with a path from outside, as the end of a sentence; None when it stays inside its folder."""
    if not name or any(unicodedata.category(letter) == "Cc" for letter in name):
        return "is empty or holds control characters"
    path = name.replace("\\", "/")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is an absolute path"
    if ".." in path.split("/"):
        return "leads out of the archive with '..'"
    return None


def _member_name(info: zipfile.ZipInfo) -> str:
    """The member's name. Russian Windows packs names in code page 866, some tools in UTF-8, both without saying so;
    Python then reads them as code page 437."""
    if info.flag_bits & _UTF8_NAME or info.filename.isascii():
        return info.filename
    try:
        raw = info.filename.encode("cp437")
    except UnicodeEncodeError:
        return info.filename
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp866")
    # Some short words of code page 866 are UTF-8 by chance, but of rare letters: "ска" is one in Tai Tham.
    return name if all(ord(letter) < _BEYOND_CYRILLIC for letter in name) else raw.decode("cp866")


def _is_litter(name: str) -> bool:
    """Whether the member is a file manager's own bookkeeping."""
    *folders, last = name.split("/")
    return "__MACOSX" in folders or last.startswith("._") or last in (".DS_Store", "Thumbs.db", "desktop.ini")


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)
