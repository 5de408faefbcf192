"""`sscloud doctor`: a set-up from end to end → what to fix."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server

if TYPE_CHECKING:
    from tools.doctor import Finding
    from training.cvat import Server

NAME = "doctor"
HELP = "look at CVAT, Nuclio, the function and this machine, and say what to fix"
DESCRIPTION = f"""\
Looks at a set-up from end to end: disk, GPU, the bundle, Nuclio's functions (their metadata, state and port), CVAT
(version, login, list of models), the labels of a project, and whether its largest frame passes the function's limits:
that frame is sent to the function. Nothing is changed. What cannot be reached is left out, and said.

{CREDENTIALS}"""
EXAMPLES = """\
  sscloud doctor
  sscloud doctor --project 7
  sscloud doctor --project 7 --function function --nuclio http://gpu-server:8070

Exit status: 0 no problem was found; 1 there are problems; 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--project", type=int, metavar="N", help="project in CVAT: its labels and its largest frame")
    parser.add_argument(
        "--function",
        metavar="NAME|FOLDER",
        help="function in Nuclio, or its function folder (default: all whose name starts with sscloud)",
    )
    parser.add_argument("--bundle", type=Path, help="bundle to look at (default: that of the function folder)")
    parser.add_argument(
        "--nuclio", metavar="URL", default="http://localhost:8070", help="Nuclio's dashboard (default: %(default)s)"
    )
    parser.add_argument("--namespace", default="nuclio", help="Nuclio's namespace (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, default=Path(), metavar="FOLDER", help="folder of data and runs, for the disk (default: .)"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=120.0,
        metavar="SECONDS",
        help="how long CVAT waits for a function: its CVAT_NUCLIO_DEFAULT_TIMEOUT (default: 120)",
    )
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from tools.doctor import DoctorConfig, examine

    config = DoctorConfig(
        project=args.project,
        function=args.function,
        bundle=args.bundle,
        nuclio=args.nuclio,
        namespace=args.namespace,
        folder=args.data,
        timeout=args.timeout,
    )
    counts = {"ok": 0, "warning": 0, "problem": 0}

    def show(finding: "Finding") -> None:
        counts[finding.level] += 1
        print(*finding.lines(), sep="\n", flush=True)

    server = _connect(args, show)
    try:
        for finding in examine(config, server=server):
            show(finding)
    finally:
        if server is not None:
            server.close()
    print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems.", file=sys.stderr)
    return 1 if counts["problem"] else 0


def _connect(args: argparse.Namespace, show: "Callable[[Finding], None]") -> "Server | None":
    """Log in, or say why CVAT is left out."""
    from sscloud.errors import ConfigError, ServerError
    from tools.doctor import Finding

    try:
        return open_server(args)
    except ConfigError as error:
        show(Finding(level="warning", check="CVAT", what="CVAT was not looked at.", remedy=str(error)))
    except ServerError as error:
        show(Finding(level="problem", check="CVAT", what=str(error)))
    return None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to 86400")
    return seconds
