"""`sscloud demo`: the whole way once."""

import argparse
from pathlib import Path

NAME = "demo"
HELP = "the whole way once on sampled scenes, ending in a report to look at"
DESCRIPTION = """\
Sample panoramas of streets and yards, train a small network on them, evaluate it on scenes it never saw, package it as
a Nuclio function, serve that without Docker, ask it as CVAT does, and write OUTPUT/report.html. Under five minutes on
two cores; needs no network, no GPU, no CVAT."""
EXAMPLES = """\
  sscloud demo                       # into demo/
  sscloud demo --overwrite           # again
  sscloud demo -o big --scenes 100 --epochs 60 --width 2048 --base-width 16   # better, and much longer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `demo`."""
    suppress = argparse.SUPPRESS
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--scenes", type=int, default=suppress, metavar="N", help="scenes to learn from (default: 36)")
    parser.add_argument("--unseen", type=int, default=suppress, metavar="N", help="scenes to evaluate on (default: 9)")
    parser.add_argument("--width", type=int, default=suppress, metavar="PX", help="of the panoramas (default: 512)")
    parser.add_argument("--scale", type=float, default=suppress, metavar="F", help="of the sides (default: 1)")
    parser.add_argument("-e", "--epochs", type=int, default=suppress, metavar="N", help="default: 22")
    parser.add_argument("--base-width", type=int, default=suppress, metavar="N", help="of the network (default: 8)")
    parser.add_argument("--seed", type=int, default=suppress, metavar="N", help="of scenes and training (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="clear what an earlier demo left in DIR")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    import os

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # both are read by mlflow when it is imported
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from tools.demo import DemoConfig, demo

    demo(DemoConfig(**vars(args)))
    return 0
