"""File names that are safe on every system, from names that come from outside."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from sscloud.image import SUFFIXES

MAX_BYTES = 200
"""Longest file name in UTF-8; file systems take 255, and masks, numbers and scaled copies add to it."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)
_FORBIDDEN = frozenset('<>:"|?*')


def safe_name(name: str) -> str:
    """The last part of a path as a picture's file name: visible, no longer than `MAX_BYTES`, without surprises.

    Folders go, both kinds of slashes count. Letters are composed (NFC); control characters and what Windows forbids
    become `_`, as does a first dot; Windows' device names get a `_` in front. A name without the ending of a picture
    gets `.jpg`. What is too long is cut, and a hash of the whole name keeps it apart from others with that beginning.
    """
    last = next((part for part in reversed(re.split(r"[/\\]", name)) if part.strip(". ")), "")
    text = "".join(_visible(character) for character in unicodedata.normalize("NFC", last)).strip()
    stem, suffix = PurePosixPath(text).stem, PurePosixPath(text).suffix
    if suffix.lower() not in SUFFIXES:
        stem, suffix = text, ".jpg"
    stem = stem.strip().rstrip(".") or "image"
    if stem.startswith("."):
        stem = "_" + stem[1:]
    if _RESERVED.match(stem):
        stem = "_" + stem
    room = MAX_BYTES - len(suffix)
    if len(stem.encode()) > room:
        digest = "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        stem = stem.encode()[: room - len(digest)].decode(errors="ignore").rstrip(". ") + digest
    return stem + suffix


def dataset_names(images: Sequence[str], *, taken: Iterable[str] = ()) -> list[str]:
    """File names in a data set for pictures from outside: `safe_name`, or `NAME_1` when the stem is taken.

    Names that differ in case or in the way letters are composed only are the same: on some file systems they are. A
    picture keeps a free name of its own even where an earlier one would be numbered to it.

    Args:
        images: names outside, in the order in which they choose.
        taken: file names or stems that others have.
    """
    names = [safe_name(image) for image in images]
    wished = {stem_key(name) for name in names}
    used = {stem_key(name) for name in taken}
    numbers: dict[str, int] = {}
    unique = []
    for name in names:
        path, key = PurePosixPath(name), stem_key(name)
        if key in used:
            number = numbers.get(key, 0) + 1
            while (numbered := stem_key(f"{path.stem}_{number}{path.suffix}")) in used or numbered in wished:
                number += 1
            numbers[key] = number
            name = f"{path.stem}_{number}{path.suffix}"
        used.add(stem_key(name))
        unique.append(name)
    return unique


def stem_key(name: str) -> str:
    """What two file names have in common when one mask could belong to both."""
    path = PurePosixPath(name)
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def _visible(character: str) -> str:
    # Cc control, Cf invisible and direction marks, Cs half characters, Co and Cn no characters, Zl and Zp line ends.
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "_" if hidden or character in _FORBIDDEN else character
