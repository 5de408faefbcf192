"""`sscloud effort`: what the pre-labels have saved."""

import argparse
import json
from pathlib import Path

NAME = "effort"
HELP = "say what pre-labels have saved: what people had to change in them"
DESCRIPTION = """\
Lays every pre-label beside what people made of it, and says by version of the model, by label and by fetch how much of
it they accepted, added, removed and re-labelled, how many shapes they touched, and how long they had it open where
CVAT's analytics know and all frames of a job are one version's; then whether the newest version leaves people less to
do than the one before.

The effort is the share of changed pixels among those that the model or people have drawn: 0 % where a pre-label was
taken as it was, 100 % where nothing of it was of use. `sscloud fetch` and `sscloud cycle` measure it, of the frames of
completed jobs, and keep it in DATASET/effort.jsonl; this command reads it. Of a frame that was corrected again the last
measurement counts.

The worst pre-labels may be missing, so it may have been more: frames in which all shapes were deleted count as not
known; and pre-labels of the button are not seen at all if all their shapes were deleted, or deleted and drawn anew."""
EXAMPLES = """\
  sscloud effort                                # of the data set in ./dataset
  sscloud effort --dataset data -o effort.html  # also as a page with curves
  sscloud effort --by class
  sscloud effort --by cycle                     # fetch by fetch
  sscloud effort --json                         # everything, for programs

Exit status: 0 measured; 1 nothing was measured yet; 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--dataset", type=Path, default=Path("dataset"), metavar="DATASET", help="dataset folder (default: dataset)"
    )
    parser.add_argument(
        "--by",
        choices=("class", "model", "cycle"),
        help="one table only: by label and version, by version, or by fetch (default: by version, and by label)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write a page (HTML)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print it, and write the page."""
    from sscloud.errors import DatasetError
    from training.effort_records import read_effort
    from training.effort_summary import class_table, effort_table, label_table, summarise_effort

    if not args.dataset.is_dir():
        raise DatasetError(f"{args.dataset} is no data set. Name it with --dataset, or make it with `sscloud fetch`.")
    summary = summarise_effort(read_effort(args.dataset))
    if args.output is not None:
        from training.effort import write_effort_page
        from training.manifest import read_manifest

        manifest = read_manifest(args.dataset)
        write_effort_page(args.output, summary, schema=manifest.schema if manifest is not None else None)
    if args.json:
        print(json.dumps(summary.to_dict(), ensure_ascii=False, allow_nan=False))
        return 0 if summary.models else 1
    if summary.models:
        newest = summary.change.after if summary.change is not None else summary.models[-1]
        tables = {
            "model": effort_table(summary.models, title="By version"),
            "class": "\n\n".join([class_table(summary), label_table(newest)]),
            "cycle": effort_table(summary.cycles, title="By fetch"),
        }
        for by in (args.by,) if args.by else ("model", "class"):
            print(f"{tables[by]}\n")
    for reason, count in summary.unknown.items():
        print(f"not known of {count} frame{'s' * (count != 1)} with a pre-label: {reason}")
    print(summary.verdict)
    if args.output is not None:
        print(f"Written to {args.output}")
    return 0 if summary.models else 1
