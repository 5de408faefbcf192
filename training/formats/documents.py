"""XML, JSON and text files of archives, parsed as hostile input: bounded in size, no entities, no endless nesting."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from sscloud.errors import ArchiveError
from training.formats.archive import ZipArchive

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_JSON_BYTES: Final = 128 << 20
"""Largest JSON. As Python objects it takes up to ten times as much memory."""
MAX_JSON_OBJECTS: Final = 4_000_000
"""Most objects and lists in a JSON: they are what grows most when parsed."""
MAX_XML_DEPTH: Final = 50
"""Deepest nesting of a large XML; CVAT's exports have seven levels."""
MAX_TEXT_BYTES: Final = 16 << 20
"""Largest list of labels or images."""
_SHOWN = 80


def parse_xml(data: bytes, where: str) -> "Element":
    """The root of an XML document.

    Raises:
        ArchiveError: not well-formed, or with a document type or entities; names `where`.
    """
    try:
        root: Element = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        raise _declares_entities(where, error) from error
    except (SyntaxError, ValueError, LookupError) as error:  # SyntaxError is the base of ElementTree's ParseError
        raise _not_well_formed(where, error) from error
    return root


def iterate_xml(data: bytes, where: str) -> Iterator[tuple[str, int, "Element"]]:
    """Every element twice, at its "start" and at its "end", with the number of elements around it.

    A tree of hundreds of megabytes never stands in memory as a whole when the caller clears what it has read.

    Raises:
        ArchiveError: not well-formed, nested too deeply, or with a document type or entities; names `where`.
    """
    depth = 0
    try:
        for event, element in defusedxml.ElementTree.iterparse(
            io.BytesIO(data), events=("start", "end"), forbid_dtd=True
        ):
            depth -= event == "end"
            yield event, depth, element
            depth += event == "start"
            if depth > MAX_XML_DEPTH:
                raise ArchiveError(f"{where} is nested too deeply for any export of CVAT. It is not read.")
    except DefusedXmlException as error:
        raise _declares_entities(where, error) from error
    except (SyntaxError, ValueError, LookupError) as error:
        raise _not_well_formed(where, error) from error


def parse_json(archive: ZipArchive, member: str) -> dict[str, Any]:
    """The object that a JSON member holds.

    Raises:
        ArchiveError: too large, not JSON, nested too deeply, or something else than an object.
    """
    data = archive.read(member, max_bytes=MAX_JSON_BYTES)
    if (objects := data.count(b"{") + data.count(b"[")) > MAX_JSON_OBJECTS:  # some in texts are counted as well
        raise ArchiveError(
            f"{member} holds {objects} objects and lists, at most {MAX_JSON_OBJECTS} are read. Export it in several "
            "parts."
        )
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ArchiveError(f"{member} is nested too deeply for any export of CVAT. It is not read.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise ArchiveError(f"{member} is not JSON ({error}). Export the archive again.") from error
    return mapping(found, member)


def read_lines(archive: ZipArchive, member: str) -> list[str]:
    """The lines of a UTF-8 text, without white space around them, empty ones left out.

    Raises:
        ArchiveError: too large or not UTF-8.
    """
    try:
        text = archive.read(member, max_bytes=MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{member} is not UTF-8 text. Export the archive again.") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def mapping(value: object, where: str) -> dict[str, Any]:
    """`value`, which has to be a JSON object.

    Raises:
        ArchiveError: it is something else.
    """
    if not isinstance(value, dict):
        raise ArchiveError(f"{where}: expected an object of JSON, found {shown(value)}. Export the archive again.")
    return value


def listing(data: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    """The list under `key`; an empty one when the key is missing.

    Raises:
        ArchiveError: it is something else.
    """
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ArchiveError(f"{where}: {key!r} must be a list, found {shown(value)}. Export the archive again.")
    return value


def text(data: Mapping[str, Any], key: str, where: str) -> str:
    """The text under `key`; "" when the key is missing.

    Raises:
        ArchiveError: it is something else.
    """
    value = data.get(key, "")
    if not isinstance(value, str):
        raise ArchiveError(f"{where}: {key!r} must be a text, found {shown(value)}. Export the archive again.")
    return value


def whole(data: Mapping[str, Any], key: str, where: str, *, default: int = 0) -> int:
    """The whole number under `key`.

    Raises:
        ArchiveError: it is something else.
    """
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArchiveError(f"{where}: {key!r} must be a whole number, found {shown(value)}. Export the archive again.")
    return value


def shown(value: object) -> str:
    """A value as a message shows it: short."""
    if isinstance(value, dict | list):  # their whole text might be a hundred megabytes
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _declares_entities(where: str, error: DefusedXmlException) -> ArchiveError:
    return ArchiveError(
        f"{where} declares a document type or entities ({type(error).__name__}), which exports never do and which "
        "can be an attack. Delete everything from '<!DOCTYPE' to its closing '>' or export again."
    )


def _not_well_formed(where: str, error: Exception) -> ArchiveError:
    return ArchiveError(f"{where} is not well-formed XML ({error}). Export the archive again.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
