"""`sscloud predict`: bundle + panoramas → label maps."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sscloud.inference import Predictor

NAME = "predict"
HELP = "segment panoramas into label-id PNGs"
DESCRIPTION = """\
Segment images and write one label map each: an 8-bit PNG of the image's size whose values are label ids. Scale,
resampling, labels and the seam are the bundle's; nothing is asked for twice."""
EXAMPLES = """\
  sscloud predict runs/street/bundle scans/1_normals.jpg -o predicted
  sscloud predict runs/street/bundle scans/ -o predicted      # every image of a folder
  sscloud visualize scans/ --prediction predicted -o pictures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a model's folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images, or folders of images")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the label maps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace label maps that exist")


def run(args: argparse.Namespace) -> int:
    """Predict, and say what was written."""
    from sscloud.bundle import ModelBundle
    from sscloud.inference import Predictor
    from tools.inputs import list_images

    images = list_images(args.images)
    outputs = [args.output / f"{image.stem}.png" for image in images]
    predict_files(
        Predictor(ModelBundle.load(args.bundle), device=args.device), images, outputs, overwrite=args.overwrite
    )
    print(f"{len(outputs)} label map(s) in {args.output}")
    return 0


def predict_files(predictor: "Predictor", images: Sequence[Path], outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Write the label map of every image; refuses before the first when an output exists or is an image itself.

    Raises:
        ImageError: images that cannot be used; the others are written.
        ConfigError: outputs that would replace something.
    """
    from tqdm import tqdm

    from sscloud.ahead import Ahead
    from sscloud.errors import ConfigError, ImageError
    from sscloud.image import read_image, write_label_map

    if len(set(outputs)) < len(outputs):
        twice = sorted({path.name for path in outputs if outputs.count(path) > 1})
        raise ConfigError(f"Several images would be written to the same file: {', '.join(twice)}. Predict them apart.")
    if lost := {path.resolve() for path in outputs} & {path.resolve() for path in images}:
        raise ConfigError(f"The label map of {min(lost)} would replace the image itself. Name another output.")
    existing = [path for path in outputs if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{existing[0]} exists already ({len(existing)} such file(s)). Add --overwrite to replace.")
    work = list(zip(images, outputs, [*images[1:], None], strict=True))
    wrong: list[str] = []
    with Ahead(read_image) as pictures:
        for image, output, following in tqdm(work, "Predicting", unit="img", leave=False, disable=None):
            try:
                pixels = pictures.take(image, following=following)
            except ImageError as error:
                wrong.append(str(error))  # it names the file
                continue
            try:
                segmentation = predictor.predict(pixels)
            except ImageError as error:
                wrong.append(f"{image}: {error}")
                continue
            write_label_map(output, segmentation.label_map)
            del pixels, segmentation  # before the next one is waited for
    if wrong:
        done = len(work) - len(wrong)
        others = f"\n{done} label map(s) of the other images are in {outputs[0].parent}." if done else ""
        raise ImageError("\n".join(wrong) + others)
