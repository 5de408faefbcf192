"""The command line: `sscloud VERB …`. Verbs are modules of `tools.commands`, imported when they are needed."""

import argparse
import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, Protocol

from sscloud import __version__

GROUPS = {
    "Data": ("sample", "fetch", "convert"),
    "Models": ("train", "evaluate", "compare", "gate", "report", "export", "import-checkpoint", "models"),
    "Pictures and masks": ("predict", "visualize"),
    "CVAT and Nuclio": ("package", "deploy", "serve", "labels", "prelabel", "effort", "doctor"),
    "The loop": ("cycle", "select", "watch"),
    "All at once": ("demo",),
}


DEFECT = 70
"""Exit status of an error that no message explains: sysexits' EX_SOFTWARE. Python's own 1 is a verb's answer."""


class Command(Protocol):
    """What a module of `tools.commands` offers."""

    @property
    def NAME(self) -> str:  # noqa: N802 - constants of a module
        """The verb."""

    @property
    def HELP(self) -> str:  # noqa: N802
        """One line."""

    @property
    def DESCRIPTION(self) -> str:  # noqa: N802
        """What it does, in a paragraph."""

    @property
    def EXAMPLES(self) -> str:  # noqa: N802
        """Command lines, shown below the flags."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit status."""


class _Parser(argparse.ArgumentParser):
    """argparse whose errors say where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 when something was left out as asked, or refused; 2 for an error that a message explains; 70 for a defect,
        after its traceback; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = [name for group in GROUPS.values() for name in group]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"sscloud {__version__}")
        return 0
    if arguments[0] not in names:
        near = difflib.get_close_matches(arguments[0], names, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"sscloud: there is no verb {arguments[0]!r}.{hint} Verbs: {', '.join(names)}.", file=sys.stderr)
        return 2
    try:
        return run_command(load(arguments[0]), arguments[1:], prog=f"sscloud {arguments[0]}")
    except Exception:
        traceback.print_exc()
        return DEFECT


def load(name: str) -> Command:
    """Import the module of a verb."""
    module: Command = importlib.import_module(f"tools.commands.{name.replace('-', '_')}")
    return module


def run_command(command: Command, arguments: Sequence[str], *, prog: str) -> int:
    """Parse a command's arguments and run it; errors become one message and a status."""
    parser = _Parser(
        prog=prog,
        description=command.DESCRIPTION,
        epilog=f"examples:\n{command.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        return command.run(args)
    except KeyboardInterrupt:
        print(f"{prog}: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: that is its right. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from sscloud.errors import SSCloudError

        if isinstance(error, SSCloudError):
            print(f"{prog}: {error}", file=sys.stderr)
            return 2
        if isinstance(error, ModuleNotFoundError) and error.name in _EXTRA_OF:
            extra = _EXTRA_OF[error.name]
            print(
                f"{prog}: the package {error.name} is missing. Install it: pip install 'sscloud[{extra}]' (from a "
                f"checkout: pip install -e '.[{extra}]').",
                file=sys.stderr,
            )
            return 2
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or error
            print(f"{prog}: {where}{reason}. Check the path, its permissions and the free space.", file=sys.stderr)
            return 2
        raise


_EXTRA_OF = {
    "lightning": "train",
    "mlflow": "train",
    "sqlalchemy": "train",
    "torchmetrics": "train",
    "filelock": "archives",
    "tqdm": "archives",
    "fastapi": "serve",
    "uvicorn": "serve",
    "jinja2": "report",
    "embreex": "sample",
    "pycocotools": "archives",
    "defusedxml": "archives",
    "cvat_sdk": "cvat",
    "openvino": "openvino",
}


def _overview() -> str:
    lines = [
        "usage: sscloud VERB [options]",
        "",
        "Semi-automatic semantic annotation of laser-scan panoramas in CVAT.",
        "",
    ]
    for title, names in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {name:18} {load(name).HELP}" for name in names]
        lines.append("")
    lines += [
        "`sscloud VERB --help` explains a verb by examples.",
        "First steps: sscloud demo   or   sscloud sample scenes && sscloud train scenes",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
