"""`sscloud convert`: an archive exported from CVAT → a dataset folder."""

import argparse
import sys
from pathlib import Path

NAME = "convert"
HELP = "turn a LabelMe 3.0 archive from CVAT into a dataset (imgs/, masks/, labels.yaml)"
DESCRIPTION = """\
Turns a LabelMe 3.0 archive, masks and polygons, into imgs/NAME.jpg and masks/NAME.png with one label id a pixel.
Label names become ids by the label schema; case, white space and aliases are taken care of. Pixels that nobody drew get
the id of the background, or 255 (void) when the schema has no background. Nothing is written before the whole archive
is known to be good. Archives can be added to one dataset one after the other."""
EXAMPLES = """\
In CVAT: Actions → Export task dataset → LabelMe 3.0, with 'Save images'. Then

  sscloud convert street.zip -o dataset
  sscloud convert yard.zip -o dataset               # adds to it; identical files are skipped
  sscloud convert street-corrected.zip -o dataset --overwrite

Labels of your own, and label names that the schema lacks (without --unknown the command lists them and stops):

  sscloud convert street.zip -o dataset --labels labels.yaml
  sscloud convert street.zip -o dataset --unknown void        # such pixels are left out of training
  sscloud convert street.zip -o dataset --unknown background  # such pixels are nothing special

Exit status: 0 all images converted; 1 some were left out by --skip-broken; 2 nothing was written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sscloud convert`."""
    parser.add_argument("archive", type=Path, metavar="ARCHIVE.zip", help="zip exported from CVAT as LabelMe 3.0")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DATASET", help="dataset folder, new or already in use"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="label schema (YAML); without it DATASET/labels.yaml if there is one, else the schema that is shipped",
    )
    parser.add_argument(
        "--unknown",
        choices=("error", "void", "background"),
        default="error",
        help="shapes whose label name the schema lacks: stop with a list (error, the default), paint them as void "
        "(255), or as background",
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="convert the other images when some of the archive cannot be read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of DATASET whose content differs")


def run(args: argparse.Namespace) -> int:
    """Convert the archive and print a summary."""
    from sscloud.labels import LabelSchema
    from training.formats.convert import convert_archive

    own = args.output / "labels.yaml"
    path = args.labels or (own if own.is_file() else None)
    schema = LabelSchema.default() if path is None else LabelSchema.from_yaml(path)
    summary = convert_archive(
        args.archive,
        args.output,
        schema=schema,
        unknown=args.unknown,
        skip_broken=args.skip_broken,
        overwrite=args.overwrite,
        progress=True,
    )
    print(f"{args.archive} → {args.output}")
    print(f"  images  {summary.images:>8}   ({summary.unchanged} were there already)")
    print(f"  shapes  {summary.shapes:>8}")
    print("  share of pixels")
    names = {label.id: label.name for label in schema.labels} | {
        label_id: f"void ({label_id})" for label_id in schema.void_ids if schema.by_id(label_id) is None
    }
    width = max(len(name) for name in names.values())
    for label_id, name in names.items():
        share = summary.pixel_shares.get(label_id, 0.0)
        if share or schema.by_id(label_id) is not None:
            print(f"    {name:<{width}}  {label_id:>3}  {share:8.3%}")
    for label in summary.unknown:
        print(
            f"warning: unknown label {label.name!r}: {label.found} painted as {args.unknown}",
            file=sys.stderr,
        )
    for warning in (*summary.warnings, *(f"left out: {reason}" for reason in summary.broken)):
        print(f"warning: {warning}", file=sys.stderr)
    return 1 if summary.broken else 0
