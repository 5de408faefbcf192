"""`sscloud cycle` put together: its settings, and how a version becomes the served champion."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sscloud.errors import ConfigError
from tools.promotion import FunctionUpdate, promote
from training.cycle import Deploy
from training.cycle_config import SETTINGS, CycleConfig, read_settings, require_known
from training.registry import Registry
from training.workspace import Workspace


def settings_of(workspace: Path, flags: Mapping[str, Any], assignments: Sequence[str] = ()) -> CycleConfig:
    """The settings of a cycle: cycle.yaml of the workspace, what is assigned on top of it, and flags above all.

    Args:
        workspace: the folder.
        flags: dotted key → value, as `select.count`.
        assignments: `KEY=VALUE`, the value as YAML.

    Raises:
        ConfigError: something is unknown, missing, or out of its range.
    """
    path = workspace / SETTINGS
    settings = read_settings(path)
    assigned: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not (key and sign):
            raise ConfigError(f"--set {text!r} is no KEY=VALUE, such as train.epochs=20.")
        try:
            assigned[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: {value!r} is no value of YAML: {error}") from error
    for key, value in {**assigned, **flags}.items():
        _put(settings, key.split("."), value)
    config = CycleConfig.from_dict(settings, source=str(path) if path.exists() else "the settings")
    function_update(config)
    return config


def _put(settings: dict[str, Any], keys: Sequence[str], value: object) -> None:
    """Set a value in a mapping of mappings; those on the way are made where they are missing.

    Raises:
        ConfigError: something on the way is no mapping.
    """
    for place, key in enumerate(keys[:-1], 1):
        inner = settings.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            way = ".".join(keys[:place])
            raise ConfigError(
                f"{'.'.join(keys)!r} cannot be set: {way!r} is {inner!r:.100}, not a mapping. Set {way!r} right first."
            )
        settings[key] = dict(inner or {})
        settings = settings[key]
    settings[keys[-1]] = value


def function_update(config: CycleConfig) -> FunctionUpdate | None:
    """The function that follows the volume; None where the settings name none.

    Raises:
        ConfigError: 'function' has no name, or keys or values that mean nothing.
    """
    if config.function is None:
        return None
    fields = {field.name: field.type for field in dataclasses.fields(FunctionUpdate)}
    require_known(config.function, list(fields), where="'function'")
    for name, value in config.function.items():
        expected: type = bool if fields[name] is bool else str
        if not isinstance(value, expected):
            kind = "true or false" if expected is bool else "a text"
            raise ConfigError(f"'function.{name}' must be {kind}, found {value!r:.100}.")
    if "name" not in config.function:
        raise ConfigError("'function' must name the function in Nuclio: function: {name: sscloud-street}.")
    return FunctionUpdate(**config.function)


def deployer(workspace: Path, config: CycleConfig, say: Callable[[str], None]) -> Deploy:
    """What makes a version the served champion of a workspace.

    Args:
        workspace: the folder.
        config: names the function, if there is one.
        say: gets lines of progress.
    """
    update, volume = function_update(config), Workspace(workspace.resolve()).served

    def deploy(registry: Registry, version: int, *, expected: int | None) -> None:
        found = promote(
            registry,
            version,
            volume=volume,
            function=update,
            say=say,
            new_labels=config.new_labels,
            expected=expected,
        )
        for note in found.notes:
            say(note)

    return deploy
