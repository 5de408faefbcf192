"""How shapes become a mask: which id each label paints, what nobody drew, and what a frame without shapes is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sscloud.errors import ConfigError, SchemaError
from sscloud.labels import VOID, LabelSchema
from training.rasterise import RULE_VERSION

Unknown = Literal["error", "void", "background"]
Empty = Literal["skip", "void", "background"]

_LISTED = 20
"""Most lines of a message; the rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What people decide about painting.

    Raises:
        ConfigError: something shall become background, and the schema has none.
    """

    schema: LabelSchema
    unknown: Unknown = "error"
    """Label names that the schema lacks: stop, or paint void or the background."""
    empty: Empty = "skip"
    """Frames without shapes: leave them out, or take them as all void or all background."""

    def __post_init__(self) -> None:
        for value, what in ((self.unknown, "Unknown labels"), (self.empty, "Frames without shapes")):
            if value == "background" and self.schema.background is None:
                raise ConfigError(
                    f"{what} cannot become background: no label of the schema is marked 'background: true'. Mark one, "
                    "or choose void."
                )

    @property
    def fill(self) -> int:
        """The label id where nobody drew."""
        return VOID if self.schema.background is None else self.schema.background.id

    def fill_of(self, *, drawn: bool) -> int:
        """The label id where nobody drew, in a frame with or without shapes."""
        return VOID if not drawn and self.empty == "void" else self.fill

    def label_id_of(self, name: str) -> int:
        """The id that shapes of this label paint."""
        label = self.schema.find(name)
        if label is not None:
            return label.id
        return self.fill if self.unknown == "background" else VOID

    @property
    def key(self) -> str:
        """Changes whenever the same shapes could make another mask; colours make none."""
        labels = [[label.name, label.aliases, label.id, label.background] for label in self.schema.labels]
        text = json.dumps([labels, self.unknown, self.empty, RULE_VERSION])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A label name that the schema lacks."""

    name: str
    shapes: int
    images: int

    @property
    def found(self) -> str:
        """How often, as a phrase."""
        return f"{_count(self.shapes, 'shape')} in {_count(self.images, 'image')}"


def require_known(strangers: Sequence[Stranger], rule: Rule, *, source: str) -> None:
    """Stop when there are labels that the schema lacks, unless the rule says what to paint.

    Args:
        strangers: most frequent first.
        rule: with the schema.
        source: where they are: an archive, a project.

    Raises:
        SchemaError: names them with their counts and the line to add.
    """
    if not strangers or rule.unknown != "error":
        return
    schema = rule.schema
    taken = {label.id for label in schema.labels} | schema.void_ids
    free = [label_id for label_id in range(1, 256) if label_id not in taken]
    lines = [f"{source} has {_count(len(strangers), 'label name')} that the schema lacks. Nothing was written."]
    for position, stranger in enumerate(strangers[:_LISTED]):
        name = json.dumps(stranger.name, ensure_ascii=False)
        usual = LabelSchema.default().find(stranger.name)
        label_id = free[position] if position < len(free) else "ID"
        if usual is not None and usual.id not in taken:
            label_id = usual.id
        add = f"to add:  - {{name: {name}, id: {label_id}}}" if stranger.name else "name the objects in CVAT"
        lines.append(f"  {stranger.name or '(no name)'}: {stranger.found}; {add}")
    if len(strangers) > _LISTED:
        lines.append(f"  … and {len(strangers) - _LISTED} more")
    known = ", ".join(label.name for label in schema.labels)
    lines.append(
        "Add these lines to 'labels' of your labels.yaml (--labels) with ids of your choice, or the names to the "
        f"'aliases' of a label it has ({known}); or paint such shapes as void or background (--unknown)."
    )
    raise SchemaError("\n".join(lines))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
