"""What a cycle is run with: cycle.yaml of the workspace, with flags on top of it; frozen in the journal."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml

from sscloud.errors import ConfigError
from training.config import TrainConfig
from training.gate import GateRules
from training.rule import Empty, Unknown
from training.splits import SplitPlan

SETTINGS: Final = "cycle.yaml"
"""In the workspace."""

_OF_THE_CYCLE: Final = ("dataset", "labels", "load", "max_hours")
"""Of `TrainConfig`, what the cycle itself decides."""

_KINDS: Final = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
}
"""Types in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectRules:
    """Which frames people get next."""

    count: int = 20
    """Frames; 0: none are handed out."""
    assignee: str | None = None
    """Name of a user in CVAT."""
    way: Literal["auto", "task", "jobs"] = "auto"
    """A new task of the chosen frames, or the jobs they are in; auto: jobs where every frame has one of its own."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"'select.count' must be 0 or above, found {self.count}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrelabelRules:
    """How frames are pre-labelled."""

    via: Literal["local", "server"] = "local"
    """Run the champion here, or have CVAT run its function."""
    threshold: float = 0.0
    """Pixels with a probability below it are not drawn."""
    function: str | None = None
    """With `via: server`: the function's name in Nuclio; None: the one that has the labels."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"'prelabel.threshold' must be a probability from 0 to 1, found {self.threshold}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleConfig:
    """All settings of a cycle.

    Raises:
        ConfigError: a value out of its range, with the key's name.
    """

    project: int
    name: str = "sscloud"
    """Of the model."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …; the one setting that a cycle under way does not hold on to."""
    min_new: int = 5
    """New or corrected panoramas to learn from since the last training, below which there is nothing to do; 0: train
    anyway."""
    max_hours: float | None = None
    """Of training."""
    start: Literal["auto", "champion", "scratch"] = "auto"
    """What training starts from; auto: the champion, unless `train` asks for another network or scale than it has."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig`."""
    finetune: Mapping[str, Any] = field(default_factory=lambda: {"replay": 0.3})
    """The same, on top of `train` where training starts from the champion."""

    labels: str | None = None
    """Label schema (YAML), relative to the workspace; None: the dataset's own, or the one that is shipped."""
    stages: tuple[str, ...] | None = None
    """Stages of the jobs whose frames count; None: any."""
    unknown: Unknown = "error"
    empty: Empty = "skip"
    ground_truth: Literal["skip", "test"] = "skip"
    group_by: str | None = None
    validation: float | None = None
    test: float | None = None
    """Percent; None, as for `group_by` and `validation`: as before, else as `sscloud fetch` takes it."""

    function: Mapping[str, Any] | None = None
    """The function in Nuclio that serves the champion, as `sscloud models promote` asks for it; None: there is none, or
    it is none of our business."""
    new_labels: bool = False
    """Without `function`: a model with other labels may become the champion."""
    gate: GateRules = field(default_factory=GateRules)
    select: SelectRules = field(default_factory=SelectRules)
    prelabel: PrelabelRules = field(default_factory=PrelabelRules)

    def __post_init__(self) -> None:
        if self.min_new < 0:
            raise ConfigError(f"'min_new' must be 0 or above, found {self.min_new}.")
        if not self.name.strip():
            raise ConfigError("'name' must not be empty: CVAT shows it.")
        for part in ("validation", "test"):
            share = getattr(self, part)
            if share is not None and 0 < share < 1:
                raise ConfigError(f"{part!r} is a percentage: for {share:.0%} write {100 * share:g}, found {share:g}.")
        self.split_plan(None)
        hints = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name not in _OF_THE_CYCLE}
        for part in ("train", "finetune"):
            values = getattr(self, part)
            require_known(values, list(hints), where=f"'{part}'")
            for name, value in values.items():
                _value(hints[name], value, where=f"{part}.{name}")
        for values in (self.train, {**self.train, **self.finetune}):
            self.training(values, dataset="", load=None)

    def split_plan(self, remembered: SplitPlan | None) -> SplitPlan:
        """How new panoramas are dealt out.

        Args:
            remembered: the dataset's plan; what is left open here is as it was.
        """
        asked = {name: getattr(self, name) for name in ("group_by", "validation", "test")}
        given = {name: value for name, value in asked.items() if value is not None}
        return dataclasses.replace(remembered or SplitPlan(), **given)

    def training(self, values: Mapping[str, Any], *, dataset: str, load: str | None) -> TrainConfig:
        """The configuration of a training.

        Args:
            values: fields of `TrainConfig`.
            dataset: the folder.
            load: the bundle to start from.
        """
        crop = values.get("crop")
        fitting = {**values, "crop": tuple(crop)} if crop is not None else values
        return TrainConfig(dataset=dataset, load=load, max_hours=self.max_hours, **fitting)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; `from_dict` reads it."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str) -> Self:
        """Read a mapping strictly.

        Args:
            data: as in cycle.yaml.
            source: for messages.

        Raises:
            ConfigError: unknown keys, with the nearest known ones; wrong types or values.
        """
        try:
            config: Self = _build(cls, data, where="")
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        return config


def read_settings(path: Path) -> dict[str, Any]:
    """cycle.yaml as a mapping; empty where there is none.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: expected settings such as 'project: 7', found {data!r:.100}.")
    return data


def settled_project(given: int | None, workspace: Path) -> int:
    """The number of the project: that of the flag, else that of cycle.yaml.

    Raises:
        ConfigError: neither names one, or the file cannot be read.
    """
    file = workspace / SETTINGS
    found = read_settings(file).get("project") if given is None else given
    if type(found) is not int or found < 1:
        raise ConfigError(
            f"No project is named. Give --project N, or write 'project: N' into {file}; N is a whole number from 1."
        )
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two configurations, as `to_dict` gives them, differ in what a cycle holds on to: a phrase each."""
    names = sorted({*old, *new} - {"device"})
    return [f"{name} was {old.get(name)!r}, not {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def _build(kind: Any, data: object, *, where: str) -> Any:
    """An instance of a dataclass of a mapping, checked field by field."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the settings'}: expected a mapping, found {data!r:.100}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    require_known(data, list(fields), where=f"'{where}'" if where else "a cycle's configuration")
    hints = get_type_hints(kind)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is missing; set it in {SETTINGS}, or by a flag.")
    names = {name: f"{where}.{name}" if where else name for name in fields}
    return kind(**{name: _value(hints[name], value, where=names[name]) for name, value in data.items()})


def _value(hint: Any, value: object, *, where: str) -> Any:
    """A value of the type that a field has."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where=where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (one for one in arguments if one is not type(None))
        return _value(hint, value, where=where)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise ConfigError(f"'{where}' must be one of {', '.join(arguments)}, found {value!r:.100}.")
    if origin is tuple:
        return _tuple(arguments, value, where=where)
    if origin is Mapping:
        _, of = arguments
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: one if of is Any else _value(of, one, where=f"{where}.{key}") for key, one in value.items()}
        raise ConfigError(f"'{where}' must be a mapping, found {value!r:.100}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise ConfigError(f"'{where}' must be {_KINDS[hint][0]}, found {value!r:.100}.")
    return value


def _tuple(kinds: tuple[Any, ...], value: object, *, where: str) -> tuple[Any, ...]:
    """A list of values of one kind: so many as the field has, or any number."""
    count = None if kinds[-1] is Ellipsis else len(kinds)
    if not isinstance(value, list | tuple) or count not in (None, len(value)):
        many = _KINDS[kinds[0]][1]
        expected = f"a list of {many}" if count is None else f"a list of {count} {many}"
        raise ConfigError(f"'{where}' must be {expected}, found {value!r:.100}.")
    return tuple(_value(kinds[0], one, where=where) for one in value)


def require_known(data: Mapping[str, Any], known: list[str], *, where: str) -> None:
    """Refuse keys that mean nothing.

    Args:
        data: keys and values.
        known: the keys that there are.
        where: what has these keys, for the message.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
    """
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(known)}."
            raise ConfigError(f"{where} has no key {name!r}.{hint}")


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
