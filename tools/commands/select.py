"""`sscloud select`: what to label next, handed out to people and pre-labelled."""

import argparse
import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server

if TYPE_CHECKING:
    from sscloud.bundle import ModelBundle
    from training.cvat import Server
    from training.handout import Way
    from training.prelabel import Report
    from training.prelabel_store import PrelabelStore
    from training.registry import Registry
    from training.selection import Selection

NAME = "select"
HELP = "choose the panoramas whose labels would teach the model most, and hand them out"
DESCRIPTION = f"""\
Looks at the frames of a project's open jobs in which nobody has drawn, and chooses those that should teach the model
most: where it, and its last versions, remain unsure after several looks at the turned and mirrored panorama, with rare
classes counting more; one scan of a place rather than twenty, and rather places unlike those that are labelled or
handed out. Every choice is explained in words and by a picture, in FOLDER/select.html.

--way jobs gives people the very jobs (each frame has to be alone in its job) and pins an issue with the explanation to
the frame; --way task makes a new task of copies of the files, a job a frame, with the same issues; auto does the first
where it can. With --images, the panoramas of a folder are looked at instead, and become a new task. What was handed out
is marked on the server: it is not chosen again, nor are copies of it.

Then the model draws its pre-labels there, as `sscloud prelabel --replace-auto` does: what people have drawn or changed
is never touched; pre-labels of another model that nobody has touched make way for its own; and jobs that somebody has
opened stay as they are. Stopped, or killed, at any moment, the same command goes on where it was; --dry-run only
chooses and explains, and goes on with nothing.

The model is the champion of the workspace's registry, with up to two earlier versions of the same labels for their
opinions, or what --bundle names: the first one draws.

{CREDENTIALS}"""
EXAMPLES = """\
  sscloud select --count 20                                       # of the project in cycle.yaml
  sscloud select --project 7 --count 20 --dry-run                 # see selections/0001/select.html
  sscloud select --project 7 --count 10 --assignee anna --way task
  sscloud select --project 7 --count 10 --images new-scans        # which of these are worth uploading?
  sscloud select --project 7 --bundle runs/street-2/bundle --bundle runs/street/bundle

Exit status: 0 done; 1 some panoramas could not be looked at or pre-labelled (listed); 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--project", type=_from_one, metavar="N", help="project in CVAT (default: that of WORKSPACE/cycle.yaml)"
    )
    parser.add_argument("--count", type=_from_one, default=20, metavar="K", help="panoramas to choose (default: 20)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="choose among the panoramas of a folder instead")
    handing = parser.add_argument_group("handing out")
    handing.add_argument(
        "--way", choices=("auto", "task", "jobs"), default="auto", help="their jobs, or a new task of copies"
    )
    handing.add_argument("--assignee", metavar="NAME", help="user who gets the jobs (default: nobody)")
    handing.add_argument(
        "--dry-run", action="store_true", help="choose and explain only; nothing changes on the server"
    )
    handing.add_argument("--no-prelabel", action="store_true", help="do not draw pre-labels")
    handing.add_argument(
        "--threshold",
        type=_probability,
        metavar="P",
        help="pixels with a probability below it (0 to 1) are not drawn (default: as in WORKSPACE/cycle.yaml, else 0)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="a model's folder; can be repeated, for more opinions (default: the registry's champion)",
    )
    model.add_argument("--name", help="of the model in the registry, if that has several")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    model.add_argument(
        "--turns",
        type=_from_one,
        default=4,
        metavar="N",
        help="opinions of each model, turned and mirrored (default: 4)",
    )
    model.add_argument("--seed", type=int, default=0, metavar="N", help="decides between equal ones (default: 0)")
    place = parser.add_argument_group("places")
    place.add_argument(
        "--workspace", type=Path, default=Path(), metavar="FOLDER", help="of the loop (default: this folder)"
    )
    place.add_argument(
        "--dataset", type=Path, help="what is labelled, for which classes are rare (default: WORKSPACE/dataset)"
    )
    place.add_argument("--store", type=Path, help="memory of `sscloud prelabel` (default: WORKSPACE/prelabels)")
    place.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="page and record (default: WORKSPACE/selections/NNNN)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Choose, hand out, pre-label."""
    from sscloud.errors import ConfigError
    from tools.inputs import list_images
    from training.cycle_config import settled_project
    from training.handout import hand_out
    from training.prelabel import Report
    from training.prelabel_store import PrelabelStore
    from training.selection import begin_folder, read_selection
    from training.selection_choice import choose

    if args.images is not None and args.way == "jobs":
        raise ConfigError("Panoramas of a folder are in no job yet. Leave --way jobs out.")
    args.project = settled_project(args.project, args.workspace)
    folder = args.output or begin_folder(args.workspace, dry_run=args.dry_run)
    settings = _settings(args)
    with (
        open_server(args) as server,
        PrelabelStore(args.store or args.workspace / "prelabels", server=server.url) as store,
    ):
        selection = read_selection(folder, server)
        if selection is None:
            bundles = _bundles(args)
            title = "".join(c for c in bundles[0].manifest.title if c not in "[];" and c.isprintable())
            selection = choose(
                server,
                store,
                bundles,
                folder=folder,
                name=f"To label {datetime.now():%Y-%m-%d %H:%M:%S} ({title:.80})",
                project=args.project,
                count=args.count,
                way=_way(args),
                assignee=args.assignee,
                dataset=args.dataset or args.workspace / "dataset",
                images=None if args.images is None else list_images([args.images]),
                seed=args.seed,
                device=args.device,
                turns=args.turns,
                settings=settings,
                dry_run=args.dry_run,
            )
        else:
            _require_the_same(args, selection, settings, folder)
            bundles = [] if args.no_prelabel else [_bundle_of(args, selection.models[0], folder)]
            print(
                f"Going on with {selection.name}. To choose anew instead, delete {folder}: what was handed out stays "
                "handed out.",
                file=sys.stderr,
            )
        report = Report(model=selection.models[0])
        if not selection.dry_run:
            if selection.handout is None:
                handout = hand_out(
                    server,
                    selection.choices,
                    project=selection.project,
                    assignee=selection.assignee,
                    way=selection.way,
                    name=selection.name,
                )
                selection = replace(selection, handout=handout)
                selection.save(folder)
            if not args.no_prelabel:
                _prelabel(server, store, bundles[0], selection, report, device=args.device)
            if not report.failed:
                selection = replace(selection, prelabelled=True)
                selection.save(folder)
    _print(selection, folder, report)
    if args.json:
        print(json.dumps({"folder": str(folder), **selection.to_dict()}, ensure_ascii=False))
    return 1 if report.failed or selection.failed else 0


def _way(args: argparse.Namespace) -> "Way":
    way: Way = "task" if args.images is not None else args.way
    return way


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked for, by the names of the flags; a selection that was stopped goes on with the same only."""
    threshold = args.threshold
    if threshold is None:
        from training.cycle_config import SETTINGS, CycleConfig, read_settings

        file = args.workspace / SETTINGS
        threshold = CycleConfig.from_dict(
            {**read_settings(file), "project": args.project}, source=str(file)
        ).prelabel.threshold
    return {
        "count": args.count,
        "images": None if args.images is None else str(args.images.resolve()),
        "no-prelabel": args.no_prelabel,
        "seed": args.seed,
        "threshold": threshold,
        "turns": args.turns,
    }


def _require_the_same(args: argparse.Namespace, selection: "Selection", settings: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a selection that is over, or that was asked for otherwise.

    Raises:
        ConfigError: it is.
    """
    from sscloud.errors import ConfigError
    from training.selection import is_stopped

    if not is_stopped(folder):
        raise ConfigError(f"{folder} holds a selection that is done. Name another folder.")
    if args.dry_run:
        raise ConfigError(
            f"{folder} holds a selection that was stopped, and --dry-run goes on with nothing. Name another folder."
        )
    was = {
        **selection.settings,
        "project": selection.project,
        "way": selection.way,
        "assignee": selection.assignee,
    }
    given = {**settings, "project": args.project, "way": _way(args), "assignee": args.assignee}
    differing = [
        f"--{name} was {was.get(name)!r}, not {given.get(name)!r}"
        for name in sorted(was.keys() | given.keys())
        if was.get(name) != given.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds a selection that was stopped, and goes on as it was begun ({'; '.join(differing)}). Give "
            "the same flags, or name another folder with --output; or delete this one to choose anew: what was handed "
            "out stays handed out."
        )


def _bundle_of(args: argparse.Namespace, title: str, folder: Path) -> "ModelBundle":
    """The model that a stopped selection was to be drawn by, whoever is the champion by now.

    Raises:
        ConfigError: it is not there.
    """
    from sscloud.bundle import ModelBundle
    from sscloud.errors import ConfigError

    found = None
    if args.bundle:
        given = ModelBundle.load(args.bundle[0])
        found = given if given.manifest.title == title else None
    else:
        registry = _registry(args)
        version = registry.find(title)
        found = registry.bundle(version.version) if version is not None else None
    if found is None:
        raise ConfigError(
            f"{folder} holds a selection that was stopped, and is to be pre-labelled by {title}, which is not the "
            f"model that was named. Name its bundle with --bundle, or delete {folder} to choose anew: what was handed "
            "out stays handed out."
        )
    return found


def _registry(args: argparse.Namespace) -> "Registry":
    from tools.tracking import quiet_mlflow, store_uri

    quiet_mlflow()
    from training.registry import open_registry

    return open_registry(store_uri(args.workspace), name=args.name)


def _bundles(args: argparse.Namespace) -> "list[ModelBundle]":
    """The model that draws, and others with the same labels."""
    from sscloud.bundle import ModelBundle
    from sscloud.errors import ConfigError

    if args.bundle:
        return [ModelBundle.load(path) for path in args.bundle]
    from training.jury import jury_of

    registry = _registry(args)
    champion = registry.champion()
    if champion is None:
        raise ConfigError("The registry has no champion yet. `sscloud models promote V` makes one, or name a --bundle.")
    return jury_of(registry, champion, say=lambda line: print(line, file=sys.stderr))


def _prelabel(
    server: "Server",
    store: "PrelabelStore",
    bundle: "ModelBundle",
    selection: "Selection",
    report: "Report",
    *,
    device: str,
) -> None:
    """Draw in what was handed out, where nobody is at work yet."""
    from training.detector import Detector
    from training.prelabel import Selection as Jobs
    from training.prelabel import prelabel

    if selection.handout is None:
        return
    report.model = bundle.manifest.title
    prelabel(
        server,
        store,
        Detector(bundle, device=device),
        selection=Jobs(jobs=selection.handout.jobs, states=frozenset({"new"})),
        report=report,
        threshold=selection.settings["threshold"],
        replace_auto=True,
    )


def _print(selection: "Selection", folder: Path, report: "Report") -> None:
    from training.selection import PAGE

    for place, choice in enumerate(selection.choices, 1):
        print(f"{place:3}. {choice.frame.title}\n     {choice.reason}")
    for text in selection.left_out:
        print(f"left out: {text}")
    for text in selection.failed:
        print(f"not looked at: {text}", file=sys.stderr)
    handed = selection.handout
    if handed is not None:
        what = f"task {handed.task}" if handed.task is not None else "their jobs"
        print(f"Handed out as {what}: jobs {', '.join(map(str, handed.jobs))} ({selection.name})")
        for note in handed.notes:
            print(f"  {note}")
    if report.drawn or report.already:
        print(f"Pre-labelled by {report.model}: {report.drawn} panoramas, {report.shapes} shapes")
    for problem in report.failed:
        print(f"not pre-labelled: {problem}", file=sys.stderr)
    if report.failed:
        print("The same command tries to pre-label these once more.", file=sys.stderr)
    for reason, count in sorted(report.jobs_left_out.items()):
        print(f"left as they are: {count} jobs ({reason})")
    print(f"Written to {folder / PAGE}")


def _from_one(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
