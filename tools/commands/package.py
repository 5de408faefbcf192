"""`sscloud package`: a bundle → a self-contained Nuclio function folder."""

import argparse
import shlex
from pathlib import Path

NAME = "package"
HELP = "make a function folder for Nuclio of a bundle"
DESCRIPTION = """\
Writes a folder that holds everything Nuclio needs to build and run the function: function.yaml (CPU) and
function-gpu.yaml with the labels, version and description of the bundle, the code, and the bundle itself.
With --backend openvino the CPU function needs no PyTorch: its packages take a third of the space, and it is faster;
its results are compared with PyTorch's first. With --calibrate it also computes in 8-bit integers, on CPUs with VNNI
some three times faster still; give a handful of panoramas such as it will see. It says how many of their pixels get
another label then, a few in a thousand, and refuses when it is more than five.
Deploy it with `sscloud deploy` (or with nuctl), or try it without Docker with `sscloud serve`."""
EXAMPLES = """\
  sscloud package runs/street/bundle -o function
  sscloud deploy function --gpu

  sscloud package runs/street/bundle -o function --backend openvino
  sscloud package runs/street/bundle -o function --backend openvino --calibrate data/imgs/1.jpg data/imgs/2.jpg

  sscloud package runs/street/bundle -o function --models served
  sscloud package runs/street/bundle -o function --name sscloud-street --overwrite
  sscloud serve function"""


_NETWORK = """--platform-config '{"attributes": {"network": "cvat_cvat"}}'"""
"""Puts the function on the network that CVAT's docker compose makes, where CVAT's containers reach it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="function folder to write")
    parser.add_argument("--name", help="the function's name in Nuclio (default: sscloud-<the bundle's name>)")
    parser.add_argument(
        "--backend",
        choices=("torch", "openvino"),
        default="torch",
        help="what the CPU function computes with (default: torch)",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or folders of them, to fit OpenVINO's int8 to (default: no int8)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="model volume that the function follows, at the same path on the machine that runs it: it serves what "
        "`sscloud models promote` puts there, without being built again (default: the bundle, for good)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER when it exists")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    from tools.function_folder import package
    from tools.inputs import list_images

    name = package(
        args.bundle,
        args.output,
        name=args.name,
        backend=args.backend,
        calibrate=list_images(args.calibrate),
        models=args.models,
        overwrite=args.overwrite,
        tell=print,
    )
    if args.models is None:
        print(f"{args.output}: function {name}, self-contained.")
    else:
        print(
            f"{args.output}: function {name}, which takes its models from {args.models.resolve()}: that folder must "
            "exist at this very path on the machine that runs the function."
        )
    folder = shlex.quote(str(args.output))
    lean = args.backend == "openvino"
    deploy = f"sscloud deploy {folder}" if lean else f"sscloud deploy {folder} --gpu     # or without --gpu"
    print(f"Deploy it on the machine where CVAT and Nuclio run:\n  {deploy}")
    print("or, without a fixed port and a way back, with nuctl alone:")
    for file, what in (("function-gpu.yaml", "with an NVIDIA GPU"), ("function.yaml", "CPU only")):
        path = args.output / file
        print(f"  # {what}")
        file_path = shlex.quote(str(path))
        print(f"  nuctl deploy --project-name cvat --path {folder} --file {file_path} --platform local {_NETWORK}")
    print(f"Or run it without Docker:\n  sscloud serve {folder}")
    return 0
