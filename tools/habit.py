"""Old commands over new verbs: the same flags, with the folders filled in that the old scripts used."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.cli import Command, load, run_command


@dataclass(frozen=True)
class Habit:
    """A verb whose required arguments have defaults.

    Args:
        verb: the verb that does the work.
        defaults: argument name → value.
        examples: shown in the help.
    """

    verb: Command
    defaults: Mapping[str, Any]
    EXAMPLES: str

    @property
    def NAME(self) -> str:  # noqa: N802 - the protocol of commands
        """The verb's name."""
        return self.verb.NAME

    @property
    def HELP(self) -> str:  # noqa: N802
        """The verb's help."""
        return self.verb.HELP

    @property
    def DESCRIPTION(self) -> str:  # noqa: N802
        """The verb's description, and the folders."""
        folders = ", ".join(f"{name} {_shown(value)}" for name, value in self.defaults.items())
        return f"{self.verb.DESCRIPTION}\n\nDefaults here: {folders}. Otherwise this is `sscloud {self.verb.NAME}`."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The verb's arguments, none of the defaulted ones required."""
        self.verb.add_arguments(parser)
        for action in parser._actions:
            if action.dest in self.defaults:
                action.required = False
                action.default = self.defaults[action.dest]
                if not action.option_strings and action.nargs == "+":
                    action.nargs = "*"

    def run(self, args: argparse.Namespace) -> int:
        """Run the verb."""
        return self.verb.run(args)


def main(verb: str, defaults: Mapping[str, Any], *, examples: str) -> int:
    """Run a verb as an old script."""
    habit = Habit(load(verb), defaults, examples)
    return run_command(habit, sys.argv[1:], prog=f"python tools/{Path(sys.argv[0]).name}")


def visualize(folder: Path) -> int:
    """`visualize_prediction.py`: overlays of the predictions and masks of one of the old folders."""
    predictions = folder / "predictions"
    defaults: dict[str, Any] = {"images": [folder / "imgs"], "mask": folder / "masks", "output": folder / "overlays"}
    if predictions.is_dir():
        defaults["prediction"] = predictions
    name = Path(sys.argv[0]).name
    return main(
        "visualize",
        defaults,
        examples=f"  python tools/{name}\n  python tools/{name} --prediction predicted --alpha 0.3 --overwrite",
    )


def convert(folder: Path) -> int:
    """`convert_labelme.py`: an archive into one of the old folders, of which each is a part by itself."""
    name = Path(sys.argv[0]).name
    # An image without shapes is all background, as the old script had it.
    defaults = {"output": folder, "empty": "background", "validation": 0.0, "test": 0.0}
    return main("convert", defaults, examples=f"  python tools/{name} street.zip")


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
