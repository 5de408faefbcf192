"""`sscloud watch`: a service that starts `sscloud cycle` when people have finished jobs."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.server_arguments import CREDENTIALS, add_server_arguments, open_server

if TYPE_CHECKING:
    from training.cvat import Server

NAME = "watch"
HELP = "wait for finished jobs, and run a cycle for them; a service"
DESCRIPTION = f"""\
Waits until people finish jobs in CVAT, and runs `sscloud cycle` for them: when nothing was finished for --quiet
minutes, or --at-most minutes after the first job. What is finished while a cycle runs starts one more. A cycle that
fails is tried again after an hour, three times at most, and with the next finished job. SIGTERM or Ctrl-C ends the
cycle that runs and the service; nothing is lost by that. Two at once in one workspace refuse each other.

It hears of jobs by a webhook of CVAT, which --register makes, or that you make in the project's page (Actions → Setup
webhooks: the address with /webhook, event "job updated", the secret). The secret is in SSCLOUD_WEBHOOK_SECRET, 16 to 64
characters. --register also mends a webhook of the project that sends to this address, and is tried until CVAT answers.
Messages without the secret's signature, of other projects, and old or repeated ones are refused. Where CVAT cannot
reach this machine, --poll looks at the server instead. Both together are fine: --poll finds what messages missed. CVAT
sends nothing to private addresses unless its administrator allows it (SMOKESCREEN_OPTS when CVAT is started).

A cycle may find that nothing is new: after a look at what a message has told of already, or when somebody touches a job
that was completed before. It asks CVAT a few small things for each task, and leaves nothing in cycles/.

http://HOST:PORT/ shows what waits, the last cycle, the champion and the last error; /health.json the same as JSON;
/healthz is for probes. It binds to this machine only unless --host says otherwise: there is no login, and no HTTPS. For
a CVAT elsewhere, let a reverse proxy pass on /webhook and nothing else. The log, a JSON object a line, goes to the
standard error stream; what cycles print, to cycles/watch.log.

Settings of the cycles are in cycle.yaml of the workspace; what follows -- goes to `sscloud cycle`.

{CREDENTIALS}"""
EXAMPLES = """\
  export CVAT_URL=https://cvat.example.org CVAT_ACCESS_TOKEN=… SSCLOUD_WEBHOOK_SECRET=$(openssl rand -hex 32)
  sscloud watch --workspace street --project 7 --register https://loop.example.org/webhook
  sscloud watch --workspace street --project 7 --poll 10        # CVAT cannot reach this machine
  sscloud watch --project 7 --poll 10 --quiet 30 -- --min-new 10 --max-hours 6

Exit status: 0 it was asked to stop; 2 an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--workspace", type=Path, default=Path(), metavar="FOLDER", help="where everything is (default: this folder)"
    )
    parser.add_argument("--project", type=int, metavar="N", help="project in CVAT (default: that of cycle.yaml)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8090, metavar="N", help="0 for any free one (default: 8090)")
    parser.add_argument(
        "--quiet", type=_minutes, default=10.0, metavar="MINUTES", help="without a finished job (default: 10)"
    )
    parser.add_argument(
        "--at-most", type=_minutes, default=60.0, metavar="MINUTES", help="after the first one (default: 60)"
    )
    parser.add_argument(
        "--poll", type=_positive_minutes, metavar="MINUTES", help="look at the server so often (default: never)"
    )
    parser.add_argument(
        "--register", metavar="URL", help="make the webhook in CVAT: the address of this service as CVAT reaches it"
    )
    parser.add_argument("cycle", nargs="*", metavar="-- ARGUMENTS", help="of `sscloud cycle`")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from sscloud.errors import ConfigError
    from tools.watch import FinishedWork, WatchConfig, finished_work, watch
    from tools.webhooks import SECRET, check_secret, check_target, register
    from training.cvat import find_account
    from training.cycle_config import settled_project

    project = settled_project(args.project, args.workspace)
    secret = os.environ.get(SECRET) or None
    if secret is not None:
        check_secret(secret)
    elif args.register is not None or args.poll is None:
        raise ConfigError(
            f"{SECRET} is not set, so no message of CVAT can be believed. Set it (`openssl rand -hex 32` makes one), "
            "or have this service look at the server with --poll."
        )
    if args.register is not None:
        check_target(args.register)
    if args.register is not None or args.poll is not None:
        find_account(os.environ, profile=args.profile)  # without a login nothing of it will ever work

    def look() -> FinishedWork:
        with open_server(args) as server:
            return finished_work(server, project)

    def introduce() -> int:
        with open_server(args) as server:
            webhook = register(server, project=project, url=args.register, secret=secret or "")
            _ping(server, webhook, url=args.register)
            return webhook

    config = WatchConfig(
        workspace=args.workspace,
        project=project,
        host=args.host,
        port=args.port,
        quiet=60 * args.quiet,
        at_most=60 * args.at_most,
        poll=None if args.poll is None else 60 * args.poll,
        command=_command(args, project),
    )
    return watch(
        config,
        secret=secret,
        look=look if args.poll is not None else None,
        register=introduce if args.register is not None else None,
    )


def _ping(server: "Server", webhook: int, *, url: str) -> None:
    """Have CVAT send a test message, and note what came of it."""
    from sscloud.errors import ServerError
    from tools.watch import note

    try:
        status = server.ping_webhook(webhook)
    except ServerError as error:
        note("ping-failed", error=str(error))
        return
    hint = None if status == 200 else "CVAT does not reach this service there. See SMOKESCREEN_OPTS, or --poll."
    note("ping", webhook=webhook, url=url, status=status, hint=hint)


def _command(args: argparse.Namespace, project: int) -> tuple[str, ...]:
    """What runs a cycle, with the same server as this service."""
    flags = ["--workspace", str(args.workspace), "--project", str(project), "--json"]
    for name in ("profile", "organization"):
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name}={value}"]
    return (sys.executable, "-m", "tools.cli", "cycle", *flags, *args.cycle)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 60 * 24 * 7:
        raise argparse.ArgumentTypeError(f"must be minutes, a week at most, found {text}")
    return value


def _positive_minutes(text: str) -> float:
    value = _minutes(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, found {text}")
    return value
