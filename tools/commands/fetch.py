"""`sscloud fetch`: corrected annotations on a CVAT server → a dataset folder."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.rule_arguments import add_labels_argument, add_rule_arguments, schema_for
from tools.server_arguments import CREDENTIALS, STAGES, STATES, add_server_arguments, open_server
from tools.split_arguments import add_split_arguments, plan_from, split_lines

if TYPE_CHECKING:
    from sscloud.bundle import ModelBundle
    from sscloud.labels import LabelSchema
    from training.cvat import Server
    from training.fetch import Summary

NAME = "fetch"
HELP = "bring people's corrections from a CVAT server into a dataset"
DESCRIPTION = f"""\
Makes a dataset of a CVAT project, or brings one up to date: images as they were uploaded, masks painted here from the
shapes, pixel for pixel as CVAT's own mask export, and manifest.json, which says of every panorama where it comes from
and which split it is in. Only frames of finished jobs count. A second run downloads what has changed only; it can be
stopped, or killed, at any moment and started again. The dataset mirrors the server: frames whose job is reopened or
deleted leave it, and come back into the split they had.

{CREDENTIALS}"""
EXAMPLES = """\
  export CVAT_URL=https://cvat.example.org CVAT_ACCESS_TOKEN=…
  sscloud fetch --project 7 -o dataset                     # frames of completed jobs
  sscloud fetch --project 7 -o dataset                     # later: what has changed since
  sscloud fetch --project 7 --stage acceptance -o dataset  # accepted work only
  sscloud fetch --task 12 --task 13 -o dataset

What belongs together never straddles training, validation and test; decided once, kept for ever:

  sscloud fetch --project 7 -o dataset --group-by '^(site\\d+)_'
  sscloud fetch --project 7 -o dataset --ground-truth test # frames of ground-truth jobs are the test set

What people made of the pre-labels is measured too, where `sscloud prelabel` has kept them (see `sscloud effort`):

  sscloud fetch --project 7 -o dataset --prelabels prelabels

Labels:

  sscloud fetch --project 7 -o dataset --labels labels.yaml
  sscloud fetch --project 7 -o dataset --labels-from-project   # a schema of the project's names and colours

Exit status: 0 everything is there; 1 some frames cannot be used (listed); 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    which = parser.add_argument_group("which frames")
    which.add_argument("--project", type=int, action="append", default=[], metavar="N", help="project; can be repeated")
    which.add_argument("--task", type=int, action="append", default=[], metavar="N", help="task; can be repeated")
    which.add_argument(
        "--state",
        action="append",
        choices=STATES,
        help="state of the jobs whose frames count; can be repeated (default: completed)",
    )
    which.add_argument(
        "--stage",
        action="append",
        choices=STAGES,
        help="stage of the jobs whose frames count; can be repeated (default: any)",
    )
    which.add_argument(
        "--ground-truth",
        choices=("skip", "test"),
        default="skip",
        help="frames of ground-truth jobs: leave them to the other jobs (skip, the default), or take them, with the "
        "shapes drawn there, as the test split for ever",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DATASET", help="dataset folder, new or not"
    )
    labels = parser.add_mutually_exclusive_group()
    add_labels_argument(labels)
    labels.add_argument(
        "--labels-from-project",
        action="store_true",
        help="write DATASET/labels.yaml from the project's names and colours; ids are those of the shipped schema "
        "where it has the name, else the next free ones",
    )
    add_rule_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument(
        "--remove",
        action="store_true",
        help="go on when more than half of the panoramas of these tasks would leave the dataset; without it the "
        "command stops, because a mistaken --state is more likely",
    )
    parser.add_argument(
        "--server-was",
        metavar="URL",
        help="the address under which this server is in the dataset, if it has another one now",
    )
    parser.add_argument(
        "--parallel", type=_parallel, default=4, metavar="N", help="frames in flight at a time, 1 to 16 (default: 4)"
    )
    parser.add_argument(
        "--prelabels",
        type=Path,
        default=Path("prelabels"),
        metavar="FOLDER",
        help="what `sscloud prelabel` has kept: with it, the fetched frames are compared with their pre-labels for "
        "`sscloud effort` (default: prelabels, in this folder, if it is there)",
    )
    parser.add_argument(
        "--export",
        metavar="FORMAT",
        help="have CVAT export this format instead ('CVAT for images 1.1', …) and read the archive as "
        "`sscloud convert` does; every frame of the project or task counts then",
    )
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from sscloud.errors import ConfigError

    with open_server(args) as server:
        if not args.project and not args.task:
            listed = "\n".join(f"  --project {project.id}   {project.name}" for project in server.projects()[:30])
            raise ConfigError("Name a --project or a --task." + (f" On {server.url}:\n{listed}" if listed else ""))
        schema = _schema(args, server)
        return _export(args, server, schema) if args.export else _fetch(args, server, schema)


def _schema(args: argparse.Namespace, server: "Server") -> "LabelSchema":
    from sscloud.errors import ConfigError
    from sscloud.labels import LabelSchema
    from training.project_labels import schema_of

    own = args.output / "labels.yaml"
    if args.labels_from_project:
        if own.is_file():
            raise ConfigError(f"{own} exists already. Leave --labels-from-project out, or fetch into a new folder.")
        labels = [label for number in args.project for label in server.labels(project_id=number)]
        labels += [label for number in args.task for label in server.labels(task_id=number)]
        return schema_of(labels, like=LabelSchema.default())
    return schema_for(args.labels, args.output)


def _fetch(args: argparse.Namespace, server: "Server", schema: "LabelSchema") -> int:
    from training.fetch import fetch
    from training.manifest import read_manifest
    from training.rule import Rule
    from training.survey import Selection

    before = read_manifest(args.output)
    summary = fetch(
        server,
        args.output,
        selection=Selection(
            projects=tuple(args.project),
            tasks=tuple(args.task),
            states=frozenset(args.state or ["completed"]),
            stages=frozenset(args.stage) if args.stage else None,
            ground_truth=args.ground_truth,
        ),
        rule=Rule(schema=schema, unknown=args.unknown, empty=args.empty),
        plan=plan_from(args, before.plan if before else None),
        remove=args.remove,
        server_was=args.server_was,
        parallel=args.parallel,
    )
    _print(summary, args, server, schema)
    _measure_effort(args, server)
    return 1 if summary.left_out else 0


def _measure_effort(args: argparse.Namespace, server: "Server") -> None:
    """What the pre-labels of fetched frames have saved; the data set is there whatever becomes of this."""
    if not args.prelabels.is_dir():
        return
    from sscloud.errors import SSCloudError
    from training.effort import measure_effort, summarise_effort
    from training.effort_summary import percent

    try:
        measured = summarise_effort(measure_effort(server, args.prelabels, args.output, bundle_of=_bundle_of))
    except (SSCloudError, OSError) as error:
        print(f"warning: what the pre-labels have saved could not be measured: {error}", file=sys.stderr)
        return
    for row in measured.models:
        print(
            f"  pre-labels of {row.name}: {percent(row.effort)} changed, in {row.frames} panorama(s) of this snapshot"
        )
    if unknown := sum(measured.unknown.values()):
        print(f"  pre-labels of {unknown} panorama(s) are not known (`sscloud effort` says why)")


def _bundle_of(title: str) -> "ModelBundle | None":
    """The version of that title in the registry of this folder, if there is one."""
    from sscloud.errors import SSCloudError
    from tools.tracking import quiet_mlflow, store_uri

    quiet_mlflow()
    try:
        from training.registry import open_registry, registered_names

        uri = store_uri(Path())
        name = title.rpartition(" v")[0]
        if name not in registered_names(uri):
            return None
        registry = open_registry(uri, name=name)
        version = registry.find(title)
        return None if version is None else registry.bundle(version.version)
    except ModuleNotFoundError:
        return None  # what trains is not installed here
    except SSCloudError as error:
        print(f"warning: {title} is not looked up: {error}", file=sys.stderr)
        return None


def _print(summary: "Summary", args: argparse.Namespace, server: "Server", schema: "LabelSchema") -> None:
    manifest = summary.manifest
    print(f"{server.url} → {args.output}   snapshot {manifest.snapshot}")
    print(f"  new or changed  {summary.written:>6}   ({summary.bytes / 1e6:.1f} MB downloaded)")
    print(f"  unchanged       {summary.unchanged:>6}")
    if summary.removed:
        print(f"  left            {len(summary.removed):>6}   (no longer selected: {_listed(summary.removed)})")
    people = sum(item.people_pixels for item in manifest.items)
    auto = sum(item.auto_pixels for item in manifest.items)
    total = sum(item.size_hw[0] * item.size_hw[1] for item in manifest.items)
    if total:
        print(f"  drawn by people {people / total:6.1%}, by a model {auto / total:.1%}, by nobody the rest")
    lines, warnings = split_lines(manifest.items, schema, summary.splits)
    for line in lines:
        print(f"  {line}")
    for line in (*warnings, *_warnings(summary, args, schema)):
        print(f"warning: {line}", file=sys.stderr)


def _warnings(summary: "Summary", args: argparse.Namespace, schema: "LabelSchema") -> list[str]:
    found = summary.survey
    lines = [f"left out: {problem}" for problem in summary.left_out]
    jobs = summary.manifest.jobs
    finished = {key for key, facts in jobs.items() if facts.get("state") == "completed"}
    untouched = [
        item.name
        for item in summary.manifest.items
        if item.auto_pixels
        and not item.people_pixels
        and item.source.get("kind") == "cvat"
        and f"{item.source['server']}#{item.source['job']}" not in finished
    ]
    if untouched:
        lines.append(
            f"{len(untouched)} panorama(s) show a model's drawing that nobody has finished ({_listed(untouched)}): who "
            "trains on them teaches the model its own mistakes. --state completed takes what people have finished."
        )
    if summary.empty:
        lines.append(
            f"{summary.empty} frame(s) of these jobs have no shape and were left out. If they show nothing to label, "
            "take them with --empty background (or void)."
        )
    if summary.unpainted:
        lines.append(f"{summary.unpainted} frame(s) were left out, because nothing that is on them makes a mask.")
    if summary.skipped:
        kinds = ", ".join(f"{count} of type {kind}" for kind, count in sorted(summary.skipped.items()))
        lines.append(f"left out, because only shapes that cover an area of a single frame make a mask: {kinds}")
    if found.not_images:
        lines.append(f"{found.not_images} task(s) were left out, because they are no images but videos or point clouds")
    if found.doubles:
        lines.append(f"{found.doubles} frame(s) lie in several jobs; the shapes of the first job are used")
    if summary.unknown:
        lines += [
            f"unknown label {stranger.name!r}: {stranger.found} painted as {args.unknown}"
            for stranger in summary.unknown
        ]
    there = {label.name for labels in found.labels.values() for label in labels}
    known = {label.id for name in there if (label := schema.find(name)) is not None}
    missing = [label.name for label in schema.classes if label.id not in known and not label.background]
    if found.labels and missing:
        lines.append(
            f"the server has no label {_listed(missing)}, which the schema has: nobody can draw it there. Add it with "
            "`sscloud labels push`."
        )
    return lines


def _export(args: argparse.Namespace, server: "Server", schema: "LabelSchema") -> int:
    from tqdm import tqdm

    from sscloud.errors import ConfigError
    from tools.commands import convert

    defaults = {"state": None, "stage": None, "ground_truth": "skip", "remove": False, "server_was": None}
    ignored = [flag for flag, default in defaults.items() if getattr(args, flag) != default]
    if ignored:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in ignored)
        raise ConfigError(f"{flags} cannot be used with --export: CVAT exports every frame. Leave one of them out.")
    status = 0
    wanted = [*(("project", number) for number in args.project), *(("task", number) for number in args.task)]
    with tempfile.TemporaryDirectory(prefix="sscloud-export-") as folder:
        for kind, number in wanted:
            path = Path(folder) / f"{kind}-{number}.zip"
            with tqdm(desc=f"{args.export}, {kind} {number}", unit="B", unit_scale=True, disable=None) as bar:
                server.export(
                    path,
                    format_name=args.export,
                    on_bytes=partial(_show, bar),
                    **{f"{kind}_id": number},
                )
            origin = f"{server.url} {kind} {number}"
            status = max(status, convert.convert_and_print(path, args, schema, origin=origin))
            path.unlink()
    return status


def _show(bar: Any, count: int) -> None:
    bar.update(count)


def _listed(names: Mapping[str, int] | list[str] | tuple[str, ...]) -> str:
    return ", ".join(list(names)[:8]) + (", …" if len(names) > 8 else "")


def _parallel(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 16.")
    return int(text)
