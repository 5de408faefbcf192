"""`sscloud import-checkpoint`: a .pth of milesial/Pytorch-UNet → bundle."""

import argparse
from pathlib import Path

NAME = "import-checkpoint"
HELP = "turn a Pytorch-UNet .pth into a bundle"
DESCRIPTION = """\
Read a checkpoint_epochN.pth of milesial/Pytorch-UNet (a state dict with the key mask_values) and write a bundle that
predicts exactly as its predict.py does. Number of classes, width and up-sampling are found from the tensors; channel i
writes the label id mask_values[i], channels beyond them write 0. The seam is not wrapped, because the network was not
trained so. The file is loaded without running any code from it."""
EXAMPLES = """\
  sscloud import-checkpoint checkpoint_epoch48.pth --scale 0.1 --output models/street-48
  sscloud import-checkpoint best.pth --labels labels.yaml --scale 0.1 --elevation 90 -60 --output models/yard"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `import-checkpoint`."""
    parser.add_argument("checkpoint", type=Path, metavar="FILE.pth", help="the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write")
    parser.add_argument("--labels", type=Path, help="label schema (default: Фон 0, Земля 2 … Обстановка 66)")
    parser.add_argument("--scale", type=float, required=True, metavar="F", help="the --scale it was trained with")
    parser.add_argument("--encoding", choices=("normals", "rgb"), default="normals", help="default: normals")
    parser.add_argument(
        "--elevation",
        type=float,
        nargs=2,
        default=(90.0, -90.0),
        metavar=("TOP", "BOTTOM"),
        help="elevation of the panoramas' edges in degrees, which gives their aspect (default: 90 -90, that is 2:1)",
    )
    parser.add_argument("--name", help="name of the model (default: the file's)")
    parser.add_argument("--version", type=int, default=1, help="version, a whole number (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Import, and say what was found."""
    from sscloud.checkpoint import import_checkpoint
    from sscloud.labels import LabelSchema

    labels = LabelSchema.from_yaml(args.labels) if args.labels else LabelSchema.default()
    bundle = import_checkpoint(
        args.checkpoint,
        args.output,
        labels=labels,
        scale=args.scale,
        elevation=(args.elevation[0], args.elevation[1]),
        encoding=args.encoding,
        name=args.name,
        version=args.version,
        overwrite=args.overwrite,
    )
    architecture, ids = bundle.manifest.architecture, bundle.manifest.label_ids
    named = max([1, *(channel + 1 for channel, label_id in enumerate(ids) if label_id)])
    names = ", ".join(f"{i} {label.name}" for i in ids[:named] if (label := labels.by_id(i)) is not None)
    rest = f"; {len(ids) - named} more write 0" if len(ids) > named else ""
    print(
        f"{bundle.path}: {architecture.classes} channels ({names}{rest}), base width {architecture.base_width}, "
        f"{architecture.upsampling} up-sampling, scale {args.scale:g}"
    )
    return 0
