"""`sscloud deploy`: a bundle or a function folder → a running Nuclio function."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "deploy"
HELP = "build and start a function in Nuclio, and see that it answers"
DESCRIPTION = """\
Builds a function with nuctl, starts it in Nuclio's project 'cvat' on CVAT's network with a fixed port, waits until it
is ready, sends it one small panorama and checks the answer. If any of that fails, the function that ran before is
started again. Run it on the machine where CVAT and Nuclio run."""
EXAMPLES = """\
  sscloud deploy runs/street/bundle --gpu          packages the bundle and deploys it
  sscloud deploy function                          a folder of `sscloud package`, on the CPU
  sscloud deploy function --gpu --port 32005
  sscloud deploy runs/street/bundle --models served   serves what `sscloud models promote` puts there
  sscloud deploy function --gpu --platform kube --namespace cvat --registry registry.example.org/cvat"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("source", type=Path, metavar="FOLDER|BUNDLE", help="function folder, or bundle to package")
    parser.add_argument("--gpu", action="store_true", help="deploy function-gpu.yaml (NVIDIA GPU)")
    parser.add_argument("--name", help="the function's name in Nuclio, when a BUNDLE is given")
    parser.add_argument(
        "--platform", choices=("local", "kube"), default="local", help="Docker or Kubernetes (default: local)"
    )
    parser.add_argument(
        "--port",
        type=_port,
        help="fixed port, 1024 to 65535 (default: the one it has, else the first free one from 32001; on Kubernetes a "
        "node port, and none by default)",
    )
    parser.add_argument("--network", default="cvat_cvat", help="CVAT's Docker network (default: cvat_cvat)")
    parser.add_argument("--namespace", default="nuclio", help="Nuclio's namespace (default: nuclio)")
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="model volume that the function follows; made when it is missing. On Kubernetes the folder has to be the "
        "same on every node (default: what the yaml says, else none)",
    )
    parser.add_argument("--registry", metavar="URL", help="registry to push the image to (Kubernetes needs one)")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from sscloud.errors import ConfigError

    if args.platform == "kube" and args.registry is None:
        raise ConfigError(
            "Kubernetes pulls the function's image from a registry. Name one with --registry, for example --registry "
            "registry.example.org/cvat; `docker login` to it first."
        )
    from tools.deploy import DeployConfig, deploy

    with _folder(args.source, name=args.name) as folder:
        deployed = deploy(
            DeployConfig(
                folder=folder,
                gpu=args.gpu,
                platform=args.platform,
                port=args.port,
                namespace=args.namespace,
                network=args.network,
                registry=args.registry,
                models=args.models,
            ),
            say=_say,
        )
    where = f" on port {deployed.port}" if deployed.port else ""
    print(f"{deployed.name} runs{where}, image {deployed.image}.")
    if deployed.regions is None:
        print(
            "note: no test panorama was sent, because the cluster gives it no address outside. It is in CVAT's list of "
            "models now: try one frame there, or deploy with --port to give it a node port.",
            file=sys.stderr,
        )
        return 0
    print(f"It answered a test panorama with {deployed.regions} regions. It is in CVAT's list of models now.")
    return 0


@contextlib.contextmanager
def _folder(source: Path, *, name: str | None) -> Iterator[Path]:
    """The function folder: `source` itself, or one packaged of it for as long as it is needed."""
    from sscloud.bundle import MANIFEST
    from sscloud.errors import ConfigError
    from tools.function_folder import package

    if not (source / MANIFEST).is_file():
        if name is not None:
            raise ConfigError("--name goes with a bundle; a function folder has its name. Leave --name out.")
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="sscloud-function-") as temporary:
        folder = Path(temporary) / "function"
        package(source, folder, name=name)
        yield folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1024 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 1024 to 65535")
    return port
