"""`sscloud cycle --simulate`: its flags, and what they start."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.cvat import Account

FOLDER = Path("simulation")
"""The workspace of a simulation that names none."""

_REFUSED = {"dry_run": "--dry-run", "restart": "--restart", "project": "--project"}


def add_simulation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --simulate and the flags that only it has. Those without a default here have it in the configuration."""
    suppress = argparse.SUPPRESS
    group = parser.add_argument_group(
        "simulation",
        "The loop with sampled scenes, and a program that knows the truth in place of people; against the server in "
        "CVAT_URL or --profile (a project of its own there), else against a stand-in for CVAT in this process.",
    )
    group.add_argument("--simulate", type=int, metavar="ROUNDS", help="simulate so many rounds")
    group.add_argument("--scenes", type=int, default=suppress, metavar="N", help="to choose from (default: 45)")
    group.add_argument("--width", type=int, default=suppress, metavar="PIXELS", help="of the scenes (default: 512)")
    group.add_argument("--epochs", type=int, default=suppress, metavar="N", help="of the first training (default: 60)")
    group.add_argument("--seed", type=int, default=suppress, metavar="N", help="of scenes and training (default: 1)")
    group.add_argument("--keep", action="store_true", help="leave the project on the server")
    group.add_argument("--overwrite", action="store_true", help="in place of an older simulation")


def run_simulation(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Simulate.

    Args:
        args: of `sscloud cycle`, with `simulate`.
        settings: dotted key → value of the settings that flags gave.

    Raises:
        SSCloudError: a flag that means nothing here, or a step of the loop failed.
    """
    from sscloud.errors import ConfigError
    from tools.simulation.results import SimulationConfig
    from tools.simulation.rounds import simulate
    from tools.simulation.scenes import ScenePlan

    for name, flag in _REFUSED.items():
        if getattr(args, name, False):
            raise ConfigError(f"{flag} means nothing with --simulate, which has a project of its own. Leave it out.")
    given = {name: getattr(args, name) for name in ("seed", "width") if hasattr(args, name)}
    if hasattr(args, "scenes"):
        given["pool"] = args.scenes
    sizes = {name: getattr(args, name) for name in ("count", "epochs") if hasattr(args, name)}
    config = SimulationConfig(
        workspace=FOLDER if args.workspace == Path() else args.workspace,
        rounds=args.simulate,
        scenes=ScenePlan(**given),
        **sizes,
        flags={key: value for key, value in settings.items() if key != "select.count"},
        settings=tuple(args.set),
        keep=args.keep,
        overwrite=args.overwrite,
    )
    table = sys.stderr if args.json else sys.stdout
    simulation = simulate(
        config,
        account=_live_account(args),
        say=lambda line: print(line, file=table, flush=True),
        note=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps(simulation.to_dict(), ensure_ascii=False, allow_nan=False))
    return 0


def _live_account(args: argparse.Namespace) -> "Account | None":
    """The server that the environment or --profile names; a default profile is not meant."""
    from training.cvat import find_account

    if not os.environ.get("CVAT_URL") and args.profile is None:
        return None
    account = find_account(os.environ, profile=args.profile)
    return account if args.organization is None else dataclasses.replace(account, organization=args.organization)
