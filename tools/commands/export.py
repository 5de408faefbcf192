"""`sscloud export`: run → bundle."""

import argparse
from pathlib import Path

NAME = "export"
HELP = "write a run's best model as a bundle under a name and version"
DESCRIPTION = """\
Copy the best model of a run into a bundle with the name and version it shall have in CVAT. Training writes RUN/bundle
by itself; this gives it another name or version, also while the run goes on."""
EXAMPLES = """\
  sscloud export runs/street -o models/street-2 --name street --version 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--name", default="sscloud", help="name of the model (default: %(default)s)")
    parser.add_argument("--version", type=int, default=1, help="version, a whole number (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Export, and say what it is."""
    from training.export import export_bundle

    bundle = export_bundle(args.run, args.output, name=args.name, version=args.version, overwrite=args.overwrite)
    print(f"{bundle.manifest.title} in {bundle.path} (epoch {bundle.manifest.metrics['epoch']:.0f} of {args.run})")
    return 0
