"""`sscloud sample`: panoramas of a synthetic laser scanner → a dataset folder."""

import argparse
from pathlib import Path

NAME = "sample"
HELP = "make a dataset of synthetic laser scans of streets and yards (imgs/, masks/, labels.yaml)"
DESCRIPTION = """\
Makes a dataset for trying things out without data of one's own: scenes of streets and yards, ray-cast as a terrestrial
scanner sees them. Panoramas hold surface normals as RGB = (n * 0.5 + 0.5) * 255, black where nothing returned; masks
hold label ids. Classes are as unbalanced as in life. The same seed gives the same files."""
EXAMPLES = """\
Eight full spheres, 2048x1024:

  sscloud sample dataset --count 8

As a scanner with a blind cone below it, and the same scenes as people export them from CVAT (dataset/archives/*.zip):

  sscloud sample dataset --count 8 --elevation 90 -60 --archive

Four more of the same, to be kept for testing, and full-size ones:

  sscloud sample dataset-test --count 4 --first 9
  sscloud sample dataset-large --count 2 --width 8192"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sscloud sample`."""
    parser.add_argument("output", type=Path, metavar="OUT", help="dataset folder, new or empty")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="number of panoramas (default: 8)")
    parser.add_argument("--seed", type=int, default=1, help="other seeds give other scenes (default: 1)")
    parser.add_argument(
        "--first",
        type=int,
        default=1,
        metavar="N",
        help="number of the first panorama; panorama N of a seed is always the same scene (default: 1)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=2048,
        metavar="PIXELS",
        help="width of the panoramas, even, 64 to 8192; the height follows from the elevation (default: 2048)",
    )
    parser.add_argument(
        "--elevation",
        type=float,
        nargs=2,
        default=(90.0, -90.0),
        metavar=("TOP", "BOTTOM"),
        help="elevations of the upper and lower edge in degrees (default: 90 -90, a full sphere, black below -60)",
    )
    parser.add_argument(
        "--archive",
        action="store_true",
        help="also write OUT/archives/labelme-3-0.zip and cvat-for-images-1-1.zip of the same panoramas",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into OUT even if it is not empty")


def run(args: argparse.Namespace) -> int:
    """Make the dataset and print where it is."""
    from training.sample.generate import generate

    top, bottom = args.elevation
    generate(
        args.output,
        count=args.count,
        seed=args.seed,
        width=args.width,
        elevation=(top, bottom),
        archive=args.archive,
        first=args.first,
        overwrite=args.overwrite,
    )
    print(f"{args.output}: {args.count} panoramas")
    return 0
