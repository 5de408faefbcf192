"""`sscloud prelabel`: a model draws in CVAT jobs what people then correct."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.server_arguments import CREDENTIALS, STATES, add_server_arguments, open_server

if TYPE_CHECKING:
    from sscloud.labels import LabelSchema
    from training.prelabel import Report, Selection

NAME = "prelabel"
HELP = "have a model draw in the untouched frames of CVAT tasks"
DESCRIPTION = f"""\
Draws a model's regions in CVAT jobs, for people to correct. Where people have worked, nothing is drawn or deleted: any
shape, track or tag that is not exactly what was drawn by this command before counts as people's work, and so do
pre-labels that somebody has deleted.

--via local runs a bundle on this machine, frame by frame: nothing is too large, and a job that is half done gets its
other half. --via server presses "Automatic annotation" for a function that CVAT lists, job by job: jobs in which people
have worked are left alone as a whole, and what is in a job in which somebody works while the function runs counts as
people's work, all of it. So it does when this command did not watch the whole run.

What was drawn is remembered in the folder --store: a file a job, and the shapes of every frame, which `sscloud effort`
compares with what people make of them. Share it among the people who pre-label a server: without it, old pre-labels
count as people's work. The command can be stopped, or killed, at any moment and run again.

{CREDENTIALS}"""
EXAMPLES = """\
  export CVAT_URL=https://cvat.example.org CVAT_ACCESS_TOKEN=…
  sscloud labels push --project 7                                          # labels, with model and confidence
  sscloud prelabel --via local --bundle bundles/street-v3 --project 7
  sscloud prelabel --via local --bundle bundles/street-v4 --project 7 --replace-auto
  sscloud prelabel --via local --bundle bundles/street-v3 --task 12 --threshold 0.6
  sscloud prelabel --via server --project 7                                # the function that has the project's labels
  sscloud prelabel --via server --function sscloud-street --job 31 --job 32

cvat-cli can run a bundle, too; it asks nobody whose work is there, and writes a task at the end or not at all:

  cvat-cli task auto-annotate 12 --function-module training.detector -p bundle=str:bundles/street-v3

Exit status: 0 done; 1 some frames or jobs could not be pre-labelled (listed); 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--via", choices=("local", "server"), required=True, help="run a bundle here, or a function that CVAT lists"
    )
    which = parser.add_argument_group("which jobs")
    which.add_argument("--project", type=int, action="append", default=[], metavar="N", help="project; can be repeated")
    which.add_argument("--task", type=int, action="append", default=[], metavar="N", help="task; can be repeated")
    which.add_argument("--job", type=int, action="append", default=[], metavar="N", help="job; can be repeated")
    which.add_argument(
        "--state",
        action="append",
        choices=STATES,
        help="state of the jobs; can be repeated (default: new and in progress)",
    )
    local = parser.add_argument_group("with --via local")
    local.add_argument("--bundle", type=Path, metavar="BUNDLE", help="the model's folder")
    local.add_argument("--device", help="auto (the GPU when there is one), cpu, cuda, cuda:1, … (default: auto)")
    local.add_argument(
        "--min-area", type=_from_one, metavar="PIXELS", help="smallest region (default: one pixel of the model's scale)"
    )
    remote = parser.add_argument_group("with --via server")
    remote.add_argument(
        "--function", metavar="ID", help="function's name in Nuclio (default: the one that has labels of these tasks)"
    )
    remote.add_argument(
        "--labels", type=Path, metavar="FILE", help="schema (YAML) whose aliases say which labels mean the same"
    )
    remote.add_argument(
        "--retries", type=_from_zero, metavar="N", help="how often a job is tried again after a failure (default: 2)"
    )
    parser.add_argument(
        "--threshold",
        type=_probability,
        default=0.0,
        metavar="P",
        help="pixels with a probability below it (0 to 1) are not drawn (default: 0, every region is)",
    )
    parser.add_argument(
        "--replace-auto",
        action="store_true",
        help="put the model's shapes in place of another model's, or of those drawn with another --threshold or "
        "--min-area, where they are exactly as they were drawn",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("prelabels"),
        metavar="FOLDER",
        help="memory of what was drawn (default: prelabels, in this folder)",
    )
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    _check(args)
    from training.prelabel import Report

    report = Report(model="")
    try:
        if args.via == "local":
            _run_local(args, report)
        else:
            _run_server(args, report)
    finally:
        _print(report)
    return 1 if report.failed else 0


def _check(args: argparse.Namespace) -> None:
    from sscloud.errors import ConfigError

    if not (args.project or args.task or args.job):
        raise ConfigError("Nothing is named to be pre-labelled. Give --project N, --task N or --job N.")
    if args.via == "local" and args.bundle is None:
        raise ConfigError("--via local runs a bundle on this machine. Name it with --bundle.")
    others = ("function", "labels", "retries") if args.via == "local" else ("bundle", "device", "min_area")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
        raise ConfigError(f"{', '.join(given)} cannot be used with --via {args.via}. Leave it out.")


def _run_local(args: argparse.Namespace, report: "Report") -> None:
    from sscloud.bundle import ModelBundle
    from training.detector import Detector
    from training.prelabel import prelabel
    from training.prelabel_store import PrelabelStore

    bundle = ModelBundle.load(args.bundle)
    report.model = bundle.manifest.title
    detector = Detector(bundle, device=args.device or "auto", min_area=args.min_area)
    with open_server(args) as server, PrelabelStore(args.store, server=server.url) as store:
        prelabel(
            server,
            store,
            detector,
            selection=_selection(args),
            report=report,
            threshold=args.threshold,
            replace_auto=args.replace_auto,
        )


def _run_server(args: argparse.Namespace, report: "Report") -> None:
    from training.prelabel_server import prelabel_by_server
    from training.prelabel_store import PrelabelStore

    schema = _schema(args.labels)
    with open_server(args) as server, PrelabelStore(args.store, server=server.url) as store:
        prelabel_by_server(
            server,
            store,
            selection=_selection(args),
            schema=schema,
            report=report,
            function=args.function,
            threshold=args.threshold,
            replace_auto=args.replace_auto,
            retries=2 if args.retries is None else args.retries,
        )


def _selection(args: argparse.Namespace) -> "Selection":
    from training.prelabel import Selection

    chosen = Selection(projects=tuple(args.project), tasks=tuple(args.task), jobs=tuple(args.job))
    if not args.state:
        return chosen
    return Selection(projects=chosen.projects, tasks=chosen.tasks, jobs=chosen.jobs, states=frozenset(args.state))


def _schema(path: Path | None) -> "LabelSchema":
    from sscloud.labels import LabelSchema

    return LabelSchema.default() if path is None else LabelSchema.from_yaml(path)


def _print(report: "Report") -> None:
    if report.model:
        print(f"{report.model}:")
    print(f"  {_frames(report.drawn)} pre-labelled, {report.shapes} shapes")
    for count, what in (
        (report.already, "pre-labelled by this model before"),
        (
            report.other_model,
            "with pre-labels of another model or other settings, left as they are (--replace-auto replaces them)",
        ),
        (report.people, "with people's work, left as they are"),
    ):
        if count:
            print(f"  {_frames(count)} {what}")
    if report.strange:
        print(
            f"  of these, {_frames(report.strange)} with a model's shapes only, which --store does not know: drawn "
            "from another folder, or by the button in CVAT?"
        )
    for reason, count in sorted(report.jobs_left_out.items()):
        if count:
            print(f"  {count} job{'s' * (count > 1)} left out: {reason}")
    for label, count in sorted(report.unmet.items()):
        dropped = f", {count} shapes not drawn" if count else ""
        print(f"  label {label!r} of the model is missing in a task{dropped} (`sscloud labels push` creates it)")
    for note in report.notes:
        print(f"  {note}")
    for problem in report.failed:
        print(f"not pre-labelled: {problem}", file=sys.stderr)


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _from_one(text: str) -> int:
    return _whole(text, 1)


def _from_zero(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return int(text)
