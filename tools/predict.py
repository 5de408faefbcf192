"""The old habit `python predict.py -m checkpoints/checkpoint_epoch48.pth -i IMAGE… -o OUT… --scale 0.1 --classes 68`.

Reads the .pth as `sscloud import-checkpoint` does and predicts exactly what milesial/Pytorch-UNet's predict.py does.
`sscloud predict` with a bundle needs none of these flags.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tools.cli import run_command
from tools.commands import predict

NAME = "predict"
HELP = "segment images with a .pth checkpoint"
DESCRIPTION = __doc__ or ""
EXAMPLES = """\
  python tools/predict.py -m checkpoints/checkpoint_epoch48.pth -i data/test/imgs/*.jpg --scale 0.1 --classes 68
  python tools/predict.py -m checkpoints/checkpoint_epoch48.pth -i 1_normals.jpg -o 1_mask.png --scale 0.1
  python tools/predict.py -m checkpoints/checkpoint_epoch48.pth -i data/test/imgs -o predicted --scale 0.1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the old script."""
    parser.add_argument(
        "-m", "--model", type=Path, default=Path("MODEL.pth"), metavar="FILE", help="the .pth checkpoint"
    )
    parser.add_argument("-i", "--input", type=Path, nargs="+", required=True, metavar="IMAGE", help="images or folders")
    parser.add_argument(
        "-o", "--output", type=Path, nargs="+", metavar="OUT",
        help="one file an image, or one folder (default: IMAGE_OUT.png beside each image)",
    )  # fmt: skip
    parser.add_argument("-s", "--scale", type=float, default=0.5, help="that it was trained with (default: 0.5)")
    parser.add_argument("-c", "--classes", type=int, help="channels; found in the file, checked when given")
    parser.add_argument("--bilinear", action="store_true", help="found in the file; accepted for habit")
    parser.add_argument("-n", "--no-save", action="store_true", help="do not write the masks")
    parser.add_argument("--labels", type=Path, help="label schema (default: Фон 0, Земля 2 … Обстановка 66)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Import the checkpoint for this call, and predict."""
    from sscloud.checkpoint import import_checkpoint
    from sscloud.errors import ConfigError
    from sscloud.inference import Predictor
    from sscloud.labels import LabelSchema
    from tools.inputs import list_images

    labels = LabelSchema.from_yaml(args.labels) if args.labels else LabelSchema.default()
    # Its own earlier masks lie beside the images by default; they are no panoramas.
    images = [image for image in list_images(args.input) if not image.stem.endswith("_OUT")]
    if not images:
        raise ConfigError("There are no images to predict, only masks named *_OUT.")
    outputs = _outputs(images, args.output)
    with tempfile.TemporaryDirectory() as folder:
        bundle = import_checkpoint(args.model, Path(folder) / "bundle", labels=labels, scale=args.scale)
        if args.classes is not None and args.classes != bundle.manifest.architecture.classes:
            raise ConfigError(
                f"{args.model} has {bundle.manifest.architecture.classes} channels, --classes says {args.classes}. "
                "Leave --classes out: the file knows."
            )
        predictor = Predictor(bundle, device=args.device, precision="fp32")
        if args.no_save:
            for image in images:
                predictor.predict_file(image)
        else:
            predict.predict_files(predictor, images, outputs, overwrite=True)
            print("\n".join(f"Mask saved to {output}" for output in outputs))
    return 0


def _outputs(images: list[Path], given: list[Path] | None) -> list[Path]:
    from sscloud.errors import ConfigError

    if given is None:
        return [image.with_name(f"{image.stem}_OUT.png") for image in images]
    if len(given) == 1 and (given[0].is_dir() or given[0].suffix == "" or len(images) > 1):
        return [given[0] / f"{image.stem}.png" for image in images]
    if len(given) != len(images):
        raise ConfigError(f"{len(images)} image(s), but {len(given)} output(s). Give one folder, or one file an image.")
    return given


def main() -> int:
    """Run the old command."""
    return run_command(sys.modules[__name__], sys.argv[1:], prog=f"python tools/{Path(__file__).name}")


if __name__ == "__main__":
    sys.exit(main())
