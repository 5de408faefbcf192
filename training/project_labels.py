"""Labels of a CVAT project beside those of a schema: which means which, and what to send to make them meet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sscloud.labels import Label, LabelSchema, default_color, name_key
from sscloud.shapes import ATTRIBUTES
from training.cvat import ProjectLabel

DRAWABLE: Final = frozenset({"any", "mask", "polygon"})
"""Types of labels that a region can be drawn with."""

NEW_TYPE: Final = "any"
"""Of labels that are made: people correct with brush, polygons and ellipses; `mask` would leave them the brush only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPlan:
    """What happens to a label of the project."""

    name: str
    """In the project."""
    action: Literal["create", "change", "same", "other"]
    """`other`: not of the schema, left alone."""
    details: tuple[str, ...] = ()
    """What changes, or is noteworthy, a few words each."""
    request: Mapping[str, Any] | None = None
    """What CVAT is sent; None: nothing."""


def match_labels(
    names: Sequence[str], labels: Sequence[ProjectLabel], *, schema: LabelSchema
) -> dict[str, ProjectLabel]:
    """Labels of a model → the project's labels that mean them; those without one are left out.

    A label of the same name comes first, then the schema's names and aliases in their order. Case and runs of white
    space do not count.

    Args:
        names: of the model's labels.
        labels: of the project or task.
        schema: says which names mean the same.
    """
    exact = {label.name: label for label in labels}
    loose: dict[str, ProjectLabel] = {}
    for label in labels:
        loose.setdefault(name_key(label.name), label)
    found = {}
    for name in names:
        known = schema.find(name)
        spellings = (name, known.name, *known.aliases) if known else (name,)
        candidates = [exact.get(name), *(loose.get(name_key(spelling)) for spelling in spellings)]
        drawable = [label for label in candidates if label is not None and label.type in DRAWABLE]
        if drawable:
            found[name] = drawable[0]
    return found


def plan_labels(schema: LabelSchema, labels: Sequence[ProjectLabel]) -> list[LabelPlan]:
    """What makes a project's labels meet a schema: nothing is renamed, deleted or given another type.

    Of several labels that mean the same, the one that pre-labels get is changed. The background is created too: people
    draw it over what a model took for something. It gets no attributes, because no model draws it.

    Returns:
        The schema's labels in their order, then the project's others.
    """
    met = match_labels([label.name for label in schema.labels], labels, schema=schema)
    by_key = {name_key(label.name): label for label in labels}
    plans = []
    used = {label.id for label in met.values()}
    for label in schema.labels:
        blocked = by_key.get(name_key(label.name))
        if label.name in met:
            plans.append(_change(label, met[label.name]))
        elif blocked is not None:
            used.add(blocked.id)
            details = (f"its type is {blocked.type}, so no mask can be drawn with it; change the type in CVAT",)
            plans.append(LabelPlan(name=blocked.name, action="same", details=details))
        else:
            plans.append(_creation(label))
    for other in labels:
        if other.id not in used:
            meant = schema.find(other.name)
            details = (f"also means {meant.name}",) if meant is not None else ("not in the schema",)
            plans.append(LabelPlan(name=other.name, action="other", details=details))
    return plans


def _creation(label: Label) -> LabelPlan:
    attributes = [] if label.background else [_attribute(name) for name in ATTRIBUTES]
    request = {"name": label.name, "color": _color(label), "type": NEW_TYPE, "attributes": attributes}
    added = f" with {', '.join(ATTRIBUTES)}" if attributes else ""
    return LabelPlan(name=label.name, action="create", details=(f"{_color(label)}{added}",), request=request)


def _change(label: Label, old: ProjectLabel) -> LabelPlan:
    missing = [] if label.background else [name for name in ATTRIBUTES if name not in old.attributes]
    details = [f"attribute {name}" for name in missing]
    # A colour that the schema does not state is nothing to people who have chosen one in CVAT.
    color = old.color.lower() if old.color and label.color == default_color(label.id) else _color(label)
    if old.color.lower() != color:
        details.insert(0, f"colour {old.color or 'none'} → {color}")
    notes = [] if name_key(old.name) == name_key(label.name) else [f"means {label.name}"]
    notes += [
        f"its attribute {name} takes no free text, so it stays empty"
        for name in ATTRIBUTES
        if name in old.attributes and name not in old.text_attributes and not label.background
    ]
    if not details:
        return LabelPlan(name=old.name, action="same", details=tuple(notes))
    # CVAT takes a label without a colour for one that wants a new one; attributes that are not named stay.
    request = {
        "id": old.id,
        "name": old.name,
        "type": old.type,
        "color": color,
        "attributes": [_attribute(name) for name in missing],
    }
    return LabelPlan(name=old.name, action="change", details=(*details, *notes), request=request)


def _attribute(name: str) -> dict[str, Any]:
    return {"name": name, "mutable": False, "input_type": "text", "default_value": "", "values": [""]}


def _color(label: Label) -> str:
    return "#{:02x}{:02x}{:02x}".format(*label.color)


def schema_of(labels: Sequence[ProjectLabel], *, like: LabelSchema) -> LabelSchema:
    """A label schema of a project's names and colours.

    Args:
        labels: of one project or several; names count once.
        like: a schema whose ids, aliases and background are taken where it knows a name. Other labels get the next free
            ids: CVAT knows no codes.

    Raises:
        SchemaError: no labels, or more than fit into a byte.
    """
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    ids = {label.id for label in like.labels} | like.void_ids
    free = (number for number in range(1, 256) if number not in ids)
    for label in labels:
        known = like.find(label.name)
        key = known.name if known else name_key(label.name)
        if key in seen:
            continue
        seen.add(key)
        entry: dict[str, Any] = {"name": label.name, "id": known.id if known else next(free, None)}
        if known:
            others = [name for name in (known.name, *known.aliases) if name != label.name]
            entry |= {"aliases": others} if others else {}
            entry |= {"background": True} if known.background else {}
        color = label.color if re.fullmatch(r"#[0-9a-fA-F]{6}", label.color) else None
        entries.append(entry | ({"color": color} if color else {}))
    if like.background and like.background.name not in seen:
        entries.insert(0, {"name": like.background.name, "id": like.background.id, "background": True})
    return LabelSchema.from_dict({"labels": entries}, source="the labels of the project")
