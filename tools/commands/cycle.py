"""`sscloud cycle`: finished corrections → a better model in CVAT, and the next frames for people."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server
from tools.simulation.arguments import add_simulation_arguments, run_simulation
from tools.tracking import quiet_mlflow

NAME = "cycle"
HELP = "turn finished corrections into a better model in CVAT, and choose what to label next"
DESCRIPTION = f"""\
Goes round the loop once: fetches what people have finished, measures what the pre-labels saved them, and, if enough is
new, trains (from the champion on), measures champion and new model on the frozen test panoramas, lets the gate decide,
puts the new model into the registry, serves it if it passed, chooses what people should label next, pre-labels that,
and writes cycles/NNNN/report.html. A model that the gate refuses changes nothing for CVAT.

Everything happens in the workspace: dataset/, runs/, served/, prelabels/ and cycles/. Each step is written down in
cycles/NNNN/journal.json. Stop it, or kill it, whenever you like, and start it again: it goes on with the step that is
not over. A step that fails leaves the champion serving; the next start tries it again, and settings of steps that are
still to come may be changed for it. Two at once refuse each other.

Settings are in cycle.yaml of the workspace; flags win:

  project: 7
  name: street
  min_new: 10                        # new or corrected panoramas to learn from that are worth a training
  max_hours: 6                       # of training
  train: {{scale: 0.1, epochs: 50, amp: true}}
  finetune: {{epochs: 15, replay: 0.3}} # on top of train, where training goes on from the champion
  gate: {{margin: 0.01, floor: 0.05, floors: {{Конструкции: 0.1}}}}
  select: {{count: 20, assignee: anna}}
  prelabel: {{via: local, threshold: 0.5}}
  function: {{name: sscloud-street, gpu: true}}

{CREDENTIALS}"""
EXAMPLES = """\
  export CVAT_URL=https://cvat.example.org CVAT_ACCESS_TOKEN=…
  sscloud cycle --project 7 --dry-run          # what would happen
  sscloud cycle --project 7 --min-new 10 --max-hours 6
  sscloud cycle --workspace street --json      # settings of street/cycle.yaml; the result as one line of JSON
  sscloud cycle --set train.epochs=80 --set gate.floor=0.1
  sscloud cycle --restart                      # give up the unfinished cycle, begin a new one
  sscloud cycle --simulate 4                   # the whole loop without people, in simulation/

Exit status: 0 done, also when the gate refused the new model or nothing was to be done; 2 a step failed."""

_FLAGS = {
    "project": "project",
    "name": "name",
    "min_new": "min_new",
    "max_hours": "max_hours",
    "start": "start",
    "device": "device",
    "margin": "gate.margin",
    "floor": "gate.floor",
    "count": "select.count",
    "assignee": "select.assignee",
    "way": "select.way",
    "via": "prelabel.via",
    "threshold": "prelabel.threshold",
}
"""Flag → key of the settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments. Settings have no default here: `CycleConfig` knows them."""
    suppress = argparse.SUPPRESS
    parser.add_argument(
        "--workspace", type=Path, default=Path(), metavar="FOLDER", help="where everything is (default: this folder)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and write nothing")
    parser.add_argument("--restart", action="store_true", help="give up the unfinished cycle and begin a new one")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    settings = parser.add_argument_group("settings, instead of those in cycle.yaml")
    settings.add_argument("--project", type=int, default=suppress, metavar="N", help="project in CVAT")
    settings.add_argument("--name", default=suppress, help="name of the model (default: sscloud)")
    settings.add_argument(
        "--min-new",
        type=int,
        default=suppress,
        metavar="N",
        help="new or corrected panoramas to learn from that are worth a training (default: 5; 0: train anyway)",
    )
    settings.add_argument(
        "--max-hours", type=float, default=suppress, metavar="H", help="of training, to the end of an epoch"
    )
    settings.add_argument(
        "--start",
        choices=("auto", "champion", "scratch"),
        default=suppress,
        help="what training starts from (default: auto: the champion, unless another network or scale is asked for)",
    )
    settings.add_argument("--device", default=suppress, help="auto, cpu, cuda, cuda:1 … (default: auto)")
    settings.add_argument(
        "--margin", type=float, default=suppress, metavar="X", help="of the gate: mIoU it may lose (default: 0.01)"
    )
    settings.add_argument(
        "--floor", type=float, default=suppress, metavar="X", help="of the gate: IoU a class may lose (default: 0.05)"
    )
    settings.add_argument(
        "--count", type=int, default=suppress, metavar="N", help="frames for people to label next (default: 20)"
    )
    settings.add_argument("--assignee", default=suppress, metavar="USER", help="who gets them, a user of CVAT")
    settings.add_argument(
        "--way", choices=("auto", "task", "jobs"), default=suppress, help="how they get them (see `sscloud select`)"
    )
    settings.add_argument(
        "--via", choices=("local", "server"), default=suppress, help="who pre-labels (default: local)"
    )
    settings.add_argument(
        "--threshold", type=float, default=suppress, metavar="P", help="of pre-labels (default: 0, all is drawn)"
    )
    settings.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; can be repeated"
    )
    add_server_arguments(parser)
    add_simulation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    quiet_mlflow()
    from tools.cycle import deployer, settings_of
    from training.cycle import run_cycle
    from training.cycle_plan import plan_cycle

    flags = {key: getattr(args, flag) for flag, key in _FLAGS.items() if hasattr(args, flag)}
    if args.simulate is not None:
        return run_simulation(args, flags)
    config = settings_of(args.workspace, flags, args.set)
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    with open_server(args) as server:
        if args.dry_run:
            plan = plan_cycle(server, args.workspace, config, tracking_uri=tracking_uri)
            print("\n".join(plan.lines()))
            _print_json(args, plan.to_dict())
            return 0
        result = run_cycle(
            server,
            args.workspace,
            config,
            deploy=deployer(args.workspace, config, _say),
            say=_say,
            tracking_uri=tracking_uri,
            restart=args.restart,
        )
    print(result.summary)
    for reason in result.reasons:
        print(f"  {reason}")
    if result.report is not None:
        print(f"Champion: {result.champion or 'none yet'}. Report: {result.report}")
    _print_json(args, result.to_dict())
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_json(args: argparse.Namespace, data: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(data, ensure_ascii=False, allow_nan=False))
