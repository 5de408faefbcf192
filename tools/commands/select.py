"""`sscloud select`: what to label next, handed out to people and pre-labelled."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server

if TYPE_CHECKING:
    from sscloud.bundle import ModelBundle
    from training.cvat import Server
    from training.prelabel import Report
    from training.prelabel_store import PrelabelStore
    from training.selection import Selection

NAME = "select"
HELP = "choose the panoramas whose labels would teach the model most, and hand them out"
DESCRIPTION = f"""\
Looks at the frames of a project's open jobs in which nobody has drawn, and chooses those that should teach the model
most: where it, and its last versions, remain unsure after several looks at the turned and mirrored panorama, with rare
classes counting more; one scan of a place rather than twenty. Every choice is explained in words and by a picture, in
FOLDER/select.html.

--way jobs gives people the very jobs (each frame has to be alone in its job) and pins an issue with the explanation to
the frame; --way task makes a new task of copies of the files, a job a frame, with the same issues; auto does the first
where it can. With --images, the panoramas of a folder are looked at instead, and become a new task. What was handed out
is marked on the server: it is not chosen again, nor are copies of it. Nothing that is drawn is ever touched.

Then the model draws its pre-labels there, as `sscloud prelabel` does. Stopped, or killed, at any moment, the same
command goes on where it was; --dry-run only chooses and explains.

The model is the champion of the workspace's registry, with up to two earlier versions of the same labels for their
opinions, or what --bundle names: the first one draws.

{CREDENTIALS}"""
EXAMPLES = """\
  sscloud select --project 7 --count 20
  sscloud select --project 7 --count 20 --dry-run                 # see selections/0001/select.html
  sscloud select --project 7 --count 10 --assignee anna --way task
  sscloud select --project 7 --count 10 --images new-scans        # which of these are worth uploading?
  sscloud select --project 7 --bundle runs/street-2/bundle --bundle runs/street/bundle

Exit status: 0 done; 1 some panoramas could not be looked at or pre-labelled (listed); 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--project", type=_from_one, required=True, metavar="N", help="number of the project")
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
        default=0.0,
        metavar="P",
        help="pixels with a probability below it (0 to 1) are not drawn (default: 0)",
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
    from training.handout import hand_out
    from training.prelabel import Report
    from training.prelabel_store import PrelabelStore
    from training.selection import begin_folder, is_over, read_selection

    if args.images is not None and args.way == "jobs":
        raise ConfigError("Panoramas of a folder are in no job yet. Leave --way jobs out.")
    folder = args.output or begin_folder(args.workspace)
    with (
        open_server(args) as server,
        PrelabelStore(args.store or args.workspace / "prelabels", server=server.url) as store,
    ):
        selection = read_selection(folder, server)
        if selection is not None and args.output is not None and is_over(folder):
            raise ConfigError(f"{folder} holds a selection that is done. Name another folder.")
        if selection is not None and selection.project != args.project:
            raise ConfigError(
                f"{folder} holds a selection of project {selection.project} that was stopped. Go on with it by "
                f"--project {selection.project}, or name another folder with --output."
            )
        if selection is None:
            bundles = _bundles(args)
            selection = _choose(args, server, store, bundles, folder)
        else:
            print(f"Going on with {selection.name} ({folder}).", file=sys.stderr)
            bundles = [] if selection.prelabelled or args.no_prelabel else _bundles(args)
        report = Report(model=selection.models[0])
        if selection.choices and not selection.dry_run:
            if selection.handout is None:
                handout = hand_out(
                    server,
                    selection.choices,
                    project=args.project,
                    assignee=selection.assignee,
                    way=selection.way,
                    name=selection.name,
                )
                selection = replace(selection, handout=handout)
                selection.save(folder)
            if not args.no_prelabel:
                _prelabel(args, server, store, bundles[0], selection, report)
            selection = replace(selection, prelabelled=True)
            selection.save(folder)
    _print(selection, folder, report)
    if args.json:
        print(json.dumps({"folder": str(folder), **selection.to_dict()}, ensure_ascii=False))
    return 1 if report.failed else 0


def _bundles(args: argparse.Namespace) -> "list[ModelBundle]":
    """The model that draws, and others with the same labels."""
    from sscloud.bundle import ModelBundle
    from sscloud.errors import ConfigError

    if args.bundle:
        return [ModelBundle.load(path) for path in args.bundle]
    from tools.tracking import quiet_mlflow, store_uri

    quiet_mlflow()
    from training.registry import open_registry

    registry = open_registry(store_uri(args.workspace), name=args.name)
    champion = registry.champion()
    if champion is None:
        raise ConfigError("The registry has no champion yet. `sscloud models promote V` makes one, or name a --bundle.")
    bundles = [registry.bundle(champion.version)]
    labels = bundles[0].manifest.labels.class_ids
    for version in reversed(registry.versions()):
        if version.version < champion.version and version.decision != "refused" and len(bundles) < 3:
            bundle = registry.bundle(version.version)
            if bundle.manifest.labels.class_ids == labels:
                bundles.append(bundle)
    return bundles


def _choose(
    args: argparse.Namespace, server: "Server", store: "PrelabelStore", bundles: "Sequence[ModelBundle]", folder: Path
) -> "Selection":
    """Look at the pool and write down what was chosen."""
    from collections import Counter

    from sscloud.errors import ConfigError
    from sscloud.files import atomic_write
    from tools.inputs import list_images
    from training.acquisition import rank
    from training.manifest import read_manifest
    from training.pool import find_marks, folder_pool, labelled_images, server_pool
    from training.selection import PAGE, Selection
    from training.selection_page import write_selection_page

    manifest = read_manifest(args.dataset or args.workspace / "dataset")
    shares, labelled = labelled_images(manifest) if manifest is not None else (None, frozenset())
    left_out: Counter[str] = Counter()
    if args.images is None:
        pool = server_pool(
            server, store, project=args.project, labelled=labelled, left_out=left_out, quiet=not sys.stderr.isatty()
        )
    else:
        server.project(args.project)
        marked = {mark.sha256 for mark in find_marks(server, server.tasks(args.project))}
        pool = folder_pool(list_images([args.images]), taken=labelled | marked)
    if not pool:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "there are none"
        raise ConfigError(f"No frame of project {args.project} can be chosen (frames left out: {why}).")
    pictures: dict[str, bytes] = {}
    skipped = [f"{count} frame{'s' * (count != 1)} {reason}" for reason, count in sorted(left_out.items()) if count]
    choices = rank(
        pool,
        bundles,
        count=args.count,
        shares=shares,
        seed=args.seed,
        device=args.device,
        turns=args.turns,
        picture=pictures.__setitem__,
        skipped=skipped,
    )
    title = "".join(c for c in bundles[0].manifest.title if c not in "[];" and c.isprintable())
    selection = Selection(
        name=f"To label {datetime.now():%Y-%m-%d %H:%M:%S} ({title:.80})",
        server=server.url,
        project=args.project,
        way="task" if args.images is not None else args.way,
        assignee=args.assignee,
        models=tuple(bundle.manifest.title for bundle in bundles),
        choices=tuple(choices),
        left_out=tuple(skipped),
        dry_run=args.dry_run,
    )
    for place, jpeg in pictures.items():
        atomic_write(folder / f"{place}.jpg", jpeg)
    facts = {
        "project": f"{args.project} of {server.url}",
        "looked at": f"{len(pool)} panoramas",
        "models": ", ".join(selection.models),
        "turns": str(args.turns),
    }
    write_selection_page(folder / PAGE, choices, pictures, facts=facts, left_out=skipped)
    selection.save(folder)
    return selection


def _prelabel(
    args: argparse.Namespace,
    server: "Server",
    store: "PrelabelStore",
    bundle: "ModelBundle",
    selection: "Selection",
    report: "Report",
) -> None:
    """Draw in what was handed out."""
    from training.detector import Detector
    from training.prelabel import Selection as Jobs
    from training.prelabel import prelabel

    if selection.handout is None:
        return
    report.model = bundle.manifest.title
    prelabel(
        server,
        store,
        Detector(bundle, device=args.device),
        selection=Jobs(jobs=selection.handout.jobs),
        report=report,
        threshold=args.threshold,
        replace_auto=True,
    )


def _print(selection: "Selection", folder: Path, report: "Report") -> None:
    from training.selection import PAGE

    for place, choice in enumerate(selection.choices, 1):
        print(f"{place:3}. {choice.frame.title}\n     {choice.reason}")
    for text in selection.left_out:
        print(f"left out: {text}")
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
