"""`sscloud serve`: runs a packaged function folder without Docker."""

import argparse
from pathlib import Path

NAME = "serve"
HELP = "run a packaged function without Docker, as Nuclio would"
DESCRIPTION = """\
Runs a function folder made by `sscloud package` in a process of its own, with the two doors that CVAT uses: the
function's own port and the Nuclio dashboard's API. Point a CVAT server at it with CVAT_NUCLIO_HOST and
CVAT_NUCLIO_PORT. Settings of the function (SSCLOUD_DEVICE, …) are those of `env` in function.yaml, and of the
environment for what is not set there."""
EXAMPLES = """\
  sscloud serve function                          # this machine only
  sscloud serve function --host 0.0.0.0           # for a CVAT in Docker or on another machine
  sscloud serve function --port 8071 --function-port 32001
  sscloud serve function --models served          # what `sscloud models promote` puts there

  printf '{"image": "%s"}' "$(base64 -w0 panorama.jpg)" |
    curl -H 'Content-Type: application/json' --data-binary @- http://127.0.0.1:32001/"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="function folder made by `sscloud package`")
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="model volume to follow; made when it is missing (default: that of function.yaml, else none: the packaged "
        "bundle)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8070, help="port of the dashboard's API, 0 for any free one (default: 8070)"
    )
    parser.add_argument(
        "--function-port",
        type=_port,
        default=None,
        help="port of the function itself, 0 for any free one (default: that of function.yaml, else a free one)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from tools.nuclio import serve

    serve(args.folder, host=args.host, port=args.port, function_port=args.function_port, models=args.models)
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port. Give a number from 0 to 65535.")
    return int(text)
