"""`python -m cvat_standin`: the stand-in by hand."""

import argparse
import contextlib
import threading

from cvat_standin.server import CvatStandin


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cvat_standin", description="A stand-in for CVAT, in memory.")
    parser.add_argument("--port", type=int, default=8080, help="port on 127.0.0.1, 0 for any free one (default: 8080)")
    parser.add_argument("--nuclio", metavar="URL", help="Nuclio dashboard whose functions are offered")
    arguments = parser.parse_args()
    with CvatStandin(port=arguments.port) as server:
        server.nuclio_url = arguments.nuclio
        print(f"{server.url}  login {server.site.username} / {server.site.password}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
