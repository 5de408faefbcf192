"""What every command that talks to a CVAT server asks for: the flags, and the login."""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.cvat import Server

STATES = ("new", "in progress", "completed", "rejected")
STAGES = ("annotation", "validation", "acceptance")
"""Of jobs, as CVAT names them."""

CREDENTIALS = """\
The server and the login come from the environment: CVAT_URL with CVAT_ACCESS_TOKEN, or with CVAT_USERNAME and
CVAT_PASSWORD; CVAT_ORGANIZATION names an organisation. Without CVAT_URL the default profile of `cvat-cli profile` is
used."""
"""A paragraph for the descriptions of these commands."""


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --profile and --organization."""
    group = parser.add_argument_group("server")
    group.add_argument("--profile", metavar="NAME", help="stored profile of cvat-cli, instead of the environment")
    group.add_argument(
        "--organization", metavar="SLUG", help="organisation to work in, instead of CVAT_ORGANIZATION; '' for none"
    )


def open_server(args: argparse.Namespace) -> "Server":
    """Log in with the flags of `add_server_arguments`; use the result as a context manager.

    Raises:
        ConfigError: nothing says where to log in, or as whom.
        ServerError: the server cannot be reached, is no CVAT, or refuses.
    """
    from training.cvat import Server, find_account

    account = find_account(os.environ, profile=args.profile)
    if args.organization is not None:
        account = dataclasses.replace(account, organization=args.organization)
    return Server.connect(account)
