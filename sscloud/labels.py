"""LabelSchema: label name ↔ label id ↔ class index ↔ colour, from a YAML file.

A label id is the value stored in a mask (a LAS code: sparse). A class index is a channel of the network (contiguous
from 0): the position of the label among those whose id is not void. Void pixels carry 255 in a class map.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sscloud.errors import SchemaError

VOID = 255
"""The class index of void, and a label id that is always void."""

_LABEL_KEYS = {"name", "id", "aliases", "color", "background"}
_SCHEMA_KEYS = {"labels", "void", "no_return"}
_NO_RETURN = ("label", "void")
_UNKNOWN_GREY = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One label of a CVAT project."""

    name: str
    """What people see in CVAT."""
    id: int
    """The value in masks, 0 to 255."""
    aliases: tuple[str, ...] = ()
    """Other names that mean the same label."""
    color: tuple[int, int, int]
    """RGB, 0 to 255."""
    background: bool = False
    """True for the one label that stands for everything nobody drew."""


@dataclass(frozen=True, kw_only=True)
class LabelSchema:
    """The labels of a project, in order. Build it with `from_yaml`, `from_dict` or `default`, which check it."""

    labels: tuple[Label, ...]
    void_ids: frozenset[int] = field(default_factory=lambda: frozenset({VOID}))
    """Label ids that loss and metrics leave out; always holds 255."""
    no_return_void: bool = False
    """Whether pixels that are black in a normals panorama are void too, whatever label they have."""

    @classmethod
    def default(cls) -> "LabelSchema":
        """The six labels of the users' projects: Фон, Земля, Растительность, Здание, Конструкции, Обстановка."""
        return cls.from_yaml(Path(__file__).with_name("labels.yaml"))

    @classmethod
    def from_yaml(cls, path: Path) -> "LabelSchema":
        """Read a schema from a UTF-8 YAML file.

        Raises:
            SchemaError: the file cannot be read, is not YAML, or breaks a rule of `from_dict`.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SchemaError(f"The label schema {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise SchemaError(f"The label schema {path} is not UTF-8 text. Save it as UTF-8.") from error
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            raise SchemaError(f"The label schema {path} is not valid YAML: {error}") from error
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: object, *, source: str) -> "LabelSchema":
        """Build and check a schema from parsed YAML or JSON.

        Args:
            data: `{"labels": [{"name", "id", "color"?, "aliases"?, "background"?}, …], "void": [ids]?,
                "no_return": "label" | "void"?}`.
            source: where it came from, for the messages.

        Raises:
            SchemaError: unknown or missing keys, wrong types, duplicate names, aliases or ids, ids outside 0-255,
                several backgrounds, or no label left that is not void.
        """
        root = _mapping(data, source, "the schema")
        _refuse_unknown_keys(root, _SCHEMA_KEYS, source, "the schema")
        entries = root.get("labels")
        if not isinstance(entries, list) or not entries:
            raise SchemaError(f"{source}: 'labels' must be a list with at least one label, found {entries!r}.")
        labels = tuple(_label(entry, position, source) for position, entry in enumerate(entries))
        void = root.get("void", [])
        if not isinstance(void, list):
            raise SchemaError(f"{source}: 'void' must be a list of label ids, found {void!r}.")
        no_return = root.get("no_return", "label")
        if no_return not in _NO_RETURN:
            raise SchemaError(
                f"{source}: 'no_return' says whether pixels without a return keep their label or are left out: "
                f"expected one of {', '.join(_NO_RETURN)}, found {no_return!r}."
            )
        schema = cls(
            labels=labels,
            void_ids=frozenset({VOID, *(_label_id(value, source, "'void'") for value in void)}),
            no_return_void=no_return == "void",
        )
        schema._check(source)
        return schema

    def _check(self, source: str) -> None:
        names: dict[str, str] = {}
        ids: dict[int, str] = {}
        for label in self.labels:
            for name in (label.name, *label.aliases):
                if name_key(name) in names:
                    raise SchemaError(
                        f"{source}: the name or alias {name!r} is used twice (labels {names[name_key(name)]!r} and "
                        f"{label.name!r}; case and white space do not count). Names and aliases must be unique."
                    )
                names[name_key(name)] = label.name
            if label.id in ids:
                raise SchemaError(
                    f"{source}: the id {label.id} is used twice, by {ids[label.id]!r} and {label.name!r}. "
                    "Every label needs an id of its own; join labels that mean the same with 'aliases'."
                )
            ids[label.id] = label.name
        backgrounds = [label.name for label in self.labels if label.background]
        if len(backgrounds) > 1:
            raise SchemaError(
                f"{source}: {len(backgrounds)} labels are marked as background ({', '.join(backgrounds)}). "
                "Leave 'background: true' on one of them."
            )
        if not self.classes:
            raise SchemaError(f"{source}: every label is void, so there is nothing to learn. Shorten 'void'.")

    def to_dict(self) -> dict[str, Any]:
        """The schema as `from_dict` takes it."""
        return {
            "labels": [
                {
                    "name": label.name,
                    "id": label.id,
                    **({"aliases": list(label.aliases)} if label.aliases else {}),
                    "color": "#{:02x}{:02x}{:02x}".format(*label.color),
                    **({"background": True} if label.background else {}),
                }
                for label in self.labels
            ],
            "void": sorted(self.void_ids),
            **({"no_return": "void"} if self.no_return_void else {}),
        }

    def to_yaml(self) -> str:
        """The schema as a YAML text that `from_yaml` reads back."""
        text: str = yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)
        return text

    @cached_property
    def classes(self) -> tuple[Label, ...]:
        """The labels that are learned, by class index."""
        return tuple(label for label in self.labels if label.id not in self.void_ids)

    @property
    def background(self) -> Label | None:
        """The label that stands for everything nobody drew, if the schema has one."""
        return next((label for label in self.labels if label.background), None)

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Label ids by class index."""
        return tuple(label.id for label in self.classes)

    def find(self, name: str) -> Label | None:
        """The label with this name or alias; case and runs of white space do not count."""
        return self._by_name.get(name_key(name))

    def by_id(self, label_id: int) -> Label | None:
        """The label with this id."""
        return self._by_id.get(label_id)

    @cached_property
    def _by_name(self) -> dict[str, Label]:
        return {name_key(name): label for label in self.labels for name in (label.name, *label.aliases)}

    @cached_property
    def _by_id(self) -> dict[int, Label]:
        return {label.id: label for label in self.labels}

    def unknown_ids(self, label_map: NDArray[np.uint8]) -> list[int]:
        """Ids in a (H, W) uint8 label map that are neither a label's nor void, ascending."""
        present = np.flatnonzero(count_ids(label_map)).tolist()
        return [i for i in present if i not in self._by_id and i not in self.void_ids]

    def class_map(self, label_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) uint8 label ids → (H, W) uint8 class indices; void becomes 255.

        Raises:
            SchemaError: the map holds ids that the schema lacks.
        """
        if unknown := self.unknown_ids(label_map):
            raise SchemaError(
                f"The label map holds ids {unknown} that the schema lacks; it knows {sorted(self._by_id)} and void "
                f"{sorted(self.void_ids)}. Add the labels to the schema, or the ids to its 'void'."
            )
        table = np.full(256, VOID, np.uint8)
        for index, label in enumerate(self.classes):
            table[label.id] = index
        return table[label_map]

    def label_map(self, class_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) uint8 class indices → (H, W) uint8 label ids; whatever is no class becomes 255."""
        table = np.full(256, VOID, np.uint8)
        table[: len(self.classes)] = self.class_ids
        return table[class_map]

    def colorize(self, label_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) uint8 label ids → (H, W, 3) uint8 RGB; ids that the schema lacks are mid-grey."""
        table = np.full((256, 3), _UNKNOWN_GREY, np.uint8)
        for label in self.labels:
            table[label.id] = label.color
        return table[label_map]

    def cvat_spec(self, attributes: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The labels as CVAT reads them from a function's `spec` annotation: type mask, background left out.

        Args:
            attributes: names of text attributes that every label declares; CVAT drops undeclared ones.
        """
        declared = [{"name": name, "input_type": "text", "values": [""]} for name in attributes]
        return [
            {"name": label.name, "type": "mask", "attributes": declared}
            for label in self.classes
            if not label.background
        ]


def count_ids(label_map: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(256,) pixels of each id in a (H, W) uint8 map."""
    # Row by row: bincount widens its input to 64 bits, 270 MB for a whole panorama of 8192x4096.
    total: NDArray[np.int64] = np.sum([np.bincount(row, minlength=256) for row in label_map], axis=0, dtype=np.int64)
    return total


def name_key(name: str) -> str:
    """What two spellings of a label's name have in common: case and runs of white space do not count."""
    return re.sub(r"\s+", " ", name).strip().casefold()


def _mapping(data: object, source: str, what: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise SchemaError(f"{source}: {what} must be a mapping of keys to values, found {type(data).__name__}.")
    return data


def _refuse_unknown_keys(data: Mapping[str, Any], known: set[str], source: str, what: str) -> None:
    if unknown := sorted(str(key) for key in data if key not in known):
        raise SchemaError(f"{source}: {what} has unknown keys {unknown}; known are {sorted(known)}.")


def _label(entry: object, position: int, source: str) -> Label:
    where = f"label {position + 1}"
    data = _mapping(entry, source, where)
    _refuse_unknown_keys(data, _LABEL_KEYS, source, where)
    name = data.get("name")
    if not isinstance(name, str) or not name.strip():
        raise SchemaError(f"{source}: {where} needs a 'name' (text), found {name!r}.")
    where = f"label {name!r}"
    aliases = data.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        raise SchemaError(f"{source}: 'aliases' of {where} must be a list of texts, found {aliases!r}.")
    background = data.get("background", False)
    if not isinstance(background, bool):
        raise SchemaError(f"{source}: 'background' of {where} must be true or false, found {background!r}.")
    label_id = _label_id(data.get("id"), source, f"'id' of {where}")
    return Label(
        name=re.sub(r"\s+", " ", name).strip(),
        id=label_id,
        aliases=tuple(aliases),
        color=_color(data["color"], source, where) if "color" in data else default_color(label_id),
        background=background,
    )


def _label_id(value: object, source: str, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise SchemaError(f"{source}: {what} must be a whole number from 0 to 255 (masks are 8-bit), found {value!r}.")
    return value


def _color(value: object, source: str, where: str) -> tuple[int, int, int]:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    raise SchemaError(f"{source}: 'color' of {where} must look like \"#3f9b46\" (in quotes), found {value!r}.")


def default_color(label_id: int) -> tuple[int, int, int]:
    """The colour of a label whose schema states none."""
    """A colour for a label that names none: bits of the id spread over the channels, as in PASCAL VOC's palette."""
    channels = [0, 0, 0]
    code = label_id
    for shift in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= ((code >> channel) & 1) << shift
        code >>= 3
    return channels[0], channels[1], channels[2]
