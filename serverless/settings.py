"""What people set about a function: environment variables, checked when it starts."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sscloud.errors import ConfigError
from sscloud.image import MAX_PIXELS, MOST_PIXELS
from sscloud.inference import Backend, Precision
from sscloud.regions import MAX_REGIONS

PREFIX = "SSCLOUD_"
"""What the names of all settings begin with; a name with it that is none of them is a mistake."""

Shapes = Literal["mask", "polygon"]
Decode = Literal["full", "draft"]

_MOST_BUDGET = 1000
"""Millions; more is meant as pixels."""

_NUMBER = re.compile(r"\d{1,9}(\.\d{0,9})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment sets, and what holds where it sets nothing."""

    min_area: int | None = None
    """SSCLOUD_MIN_AREA: smallest region that is sent, pixels; None for one pixel of the model's scale."""
    max_regions: int = MAX_REGIONS
    """SSCLOUD_MAX_REGIONS: most regions in one answer, the largest first."""
    shapes: Shapes = "mask"
    """SSCLOUD_SHAPES: what regions are sent as."""
    tolerance: float = 0.0
    """SSCLOUD_TOLERANCE: how far an outline may run from the region's pixel edges, pixels."""
    budget: int = 20_000_000
    """SSCLOUD_BUDGET (in millions): most pixels in the crops of all masks of one answer together."""
    max_pixels: int = MAX_PIXELS
    """SSCLOUD_MAX_PIXELS: largest picture that is decoded, pixels."""
    max_bytes: int = 128 * 1024 * 1024
    """SSCLOUD_MAX_BYTES: largest request, bytes of its body."""
    device: str = "auto"
    """SSCLOUD_DEVICE: `auto`, `cpu`, `cuda`, `cuda:1`, …"""
    precision: Precision = "auto"
    """SSCLOUD_PRECISION: what the network computes in."""
    decode: Decode = "full"
    """SSCLOUD_DECODE: `draft` decodes JPEGs scaled down, which is faster and loses small things."""
    backend: Backend = "torch"
    """SSCLOUD_BACKEND: what runs the network. Packaging sets it."""
    models: Path | None = None
    """SSCLOUD_MODELS: folder of the model volume to follow; None serves the packaged bundle for good."""
    poll: float = 1.0
    """SSCLOUD_POLL: seconds between two looks at the volume."""

    def given(self) -> dict[str, Any]:
        """What differs from what holds when nothing is set, for a log."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}  # JSON types
        return {field.name: shown[field.name] for field in fields(self) if given[field.name] != field.default}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read the settings; an empty value is one that is not set.

        Raises:
            ConfigError: a value that does not fit, or a name that begins as a setting's and is none.
        """
        names = {PREFIX + name.upper(): name for name in cls.__slots__}
        given = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
        for name in sorted(given.keys() - names.keys()):
            raise ConfigError(f"{name} is no setting of this function. The settings are {', '.join(sorted(names))}.")
        readers: dict[str, Callable[[str, str], Any]] = {
            "min_area": _whole_number,
            "max_regions": _whole_number,
            "shapes": lambda name, text: _choice(name, text, get_args(Shapes)),
            "tolerance": _number,
            "budget": lambda name, text: _budget(name, text),
            "max_pixels": lambda name, text: _whole_number(name, text, most=MOST_PIXELS),
            "max_bytes": _whole_number,
            "device": lambda _, text: text,  # checked by whoever looks for it
            "precision": lambda name, text: _choice(name, text, get_args(Precision)),
            "decode": lambda name, text: _choice(name, text, get_args(Decode)),
            "backend": lambda name, text: _choice(name, text, get_args(Backend)),
            "models": lambda _, text: Path(text),
            "poll": lambda name, text: _number(name, text, above_zero=True),
        }
        return cls(**{names[name]: readers[names[name]](name, text) for name, text in given.items() if text})


def _whole_number(name: str, text: str, *, most: int = 10**9 - 1) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise ConfigError(f"{name} is {text[:40]!r}. Set a whole number from 1 to {most}, or leave it out.")
    return int(text)


def _budget(name: str, text: str) -> int:
    millions = _number(name, text, above_zero=True)
    if millions > _MOST_BUDGET:
        raise ConfigError(
            f"{name} is {text[:40]!r}. It is in millions of pixels: set a number up to {_MOST_BUDGET}, such as 20."
        )
    return max(1, round(millions * 1e6))


def _number(name: str, text: str, *, above_zero: bool = False) -> float:
    if not _NUMBER.fullmatch(text) or (above_zero and float(text) == 0):
        least = "above 0" if above_zero else "from 0"
        raise ConfigError(f"{name} is {text[:40]!r}. Set a number {least} such as 1.5, or leave it out.")
    return float(text)


def _choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"{name} is {text[:40]!r}. Set one of {', '.join(choices)}, or leave it out.")
    return text
