"""`sscloud report`: run + data set → one HTML page."""

import argparse
import sys
from pathlib import Path

NAME = "report"
HELP = "show a run on one HTML page: curves, scores, worst panoramas"
DESCRIPTION = """\
Measure the model of RUN on one part of DATASET, and write one self-contained HTML page: headline numbers, curves of the
training, scores by class with intervals, what is taken for what, how far the confidence can be believed, the worst
panoramas with image, truth, prediction and differences, what the data consists of, and the whole configuration. It
needs no network, follows the reader's light or dark setting, and prints on A4.

Without DATASET it is the one that the run has learned from. Where that has no frozen splits, the parts train and
validation are those of the run."""
EXAMPLES = """\
  sscloud report runs/street                                 # on its validation part → runs/street/report.html
  sscloud report runs/street --split test -o street.html     # on the frozen test part of its data set
  sscloud report runs/street scans --split all -o scans.html # on other panoramas"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "dataset", type=Path, nargs="?", metavar="DATASET", help="folder with imgs/ and masks/ (default: the run's)"
    )
    parser.add_argument("--labels", type=Path, help="label schema (default: the run's, or DATASET/labels.yaml)")
    parser.add_argument(
        "--split",
        choices=("test", "validation", "train", "all"),
        default="validation",
        help="which panoramas (default: validation)",
    )
    parser.add_argument(
        "--group-by",
        metavar="RULE",
        help="panoramas that stay together in intervals: image, task, job, or a regular expression that finds the site "
        "in the file name (default: the groups of the data set's manifest; without one, each by itself)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN/report.html, or RUN/report-SPLIT.html of another part; these are written anew)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Measure, write the page, and say where it is."""
    from sscloud.errors import ConfigError
    from training.config import read_run
    from training.dataset import open_dataset
    from training.run_report import REPORT, write_run_report

    config = read_run(args.run).config
    if args.output is not None and args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output} exists already. Name another file, or add --overwrite to replace it.")
    # The page that training made stays.
    output = args.output or args.run / (REPORT if args.split == "validation" else f"report-{args.split}.html")
    path, labels = args.dataset, args.labels
    if path is None:
        path, labels = Path(config.dataset), labels or (Path(config.labels) if config.labels else None)
        if not path.exists():
            print(f"The run's data set {path} is gone: nothing is measured. Name it after the run.", file=sys.stderr)
            path = None
    report = write_run_report(
        args.run,
        dataset=None if path is None else open_dataset(path, labels=labels),
        output=output,
        split=args.split,
        device=args.device,
        group_by=args.group_by,
    )
    print(report.headline)
    print(f"Written to {output}")
    return 0
