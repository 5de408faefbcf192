"""`sscloud labels`: make a CVAT project's labels meet a schema."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server

if TYPE_CHECKING:
    from training.project_labels import LabelPlan

NAME = "labels"
HELP = "show a CVAT project's labels, or create and complete them from a schema"
DESCRIPTION = f"""\
`push` creates the labels of a schema that a CVAT project lacks, and gives those that it has (by name or alias) their
colour and the text attributes `model` and `confidence`, in which pre-labels say where they come from. Nothing is
renamed or deleted, no label gets another type, and labels that the schema does not know are left alone.
`show` says what `push` would do.

{CREDENTIALS}"""
EXAMPLES = """\
  sscloud labels show --project 7
  sscloud labels push --project 7                          # the schema that is shipped
  sscloud labels push --project 7 --labels labels.yaml
  sscloud labels push --project 7 --dry-run                # the same as show"""

_WORDS = {"create": "create", "change": "change", "same": "as it is", "other": "left alone"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{show,push}", help="what to do")
    for name, text in (("show", "say what push would do"), ("push", "create labels and complete them")):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--project", type=int, required=True, metavar="N", help="the project")
        action.add_argument(
            "--labels", type=Path, metavar="FILE", help="label schema (YAML; default: the schema that is shipped)"
        )
        if name == "push":
            action.add_argument("--dry-run", action="store_true", help="change nothing")
        add_server_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from sscloud.errors import ServerError
    from sscloud.labels import LabelSchema
    from training.project_labels import plan_labels

    schema = LabelSchema.default() if args.labels is None else LabelSchema.from_yaml(args.labels)
    push = args.action == "push" and not args.dry_run
    with open_server(args) as server:
        project = server.project(args.project)
        plans = plan_labels(schema, server.labels(project_id=project.id))
        print(f"{server.url}, project {project.id} ({project.name}):")
        print("\n".join(_table(plans)))
        requests = [plan.request for plan in plans if plan.request is not None]
        if push and requests:
            server.patch_labels(project.id, requests)
            left = plan_labels(schema, server.labels(project_id=project.id))
            if unchanged := [plan.name for plan in left if plan.request is not None]:
                raise ServerError(
                    f"CVAT has not taken everything over: {', '.join(unchanged)}. Look at the labels in CVAT."
                )
    print(_summary(plans, done=push))
    return 0


def _table(plans: Sequence["LabelPlan"]) -> list[str]:
    width = max((len(plan.name) for plan in plans), default=0)
    return [f"  {plan.name:{width}}  {_WORDS[plan.action]:10}  {'; '.join(plan.details)}".rstrip() for plan in plans]


def _summary(plans: Sequence["LabelPlan"], *, done: bool) -> str:
    counts = Counter(plan.action for plan in plans)
    if not counts["create"] and not counts["change"]:
        return "Nothing to change."
    verb = "" if done else " to be"
    return f"{counts['create']}{verb} created, {counts['change']}{verb} changed."
