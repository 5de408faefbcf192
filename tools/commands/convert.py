"""`sscloud convert`: an archive exported from CVAT → a dataset folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tools.rule_arguments import add_labels_argument, add_rule_arguments, schema_for
from tools.split_arguments import add_split_arguments, plan_from, split_lines

if TYPE_CHECKING:
    from sscloud.labels import LabelSchema
    from training.formats.convert import Summary

NAME = "convert"
HELP = "turn an archive from CVAT, of seven formats, into a dataset (imgs/, masks/, manifest.json)"
DESCRIPTION = """\
Turns a zip that CVAT exported into imgs/NAME.jpg, masks/NAME.png with one label id a pixel, and manifest.json, which
says of every panorama where it comes from and which split it is in. The format is recognised: CVAT for images 1.1,
Datumaro 1.0, COCO 1.0, LabelMe 3.0, Segmentation mask 1.1, CamVid 1.0, Cityscapes 1.0; the same annotations make the
same masks, as far as the format can say them (docs/formats.md). CVAT for images says most: also who drew a shape.
Label names become ids by the label schema; case, white space and aliases are taken care of. Pixels that nobody drew get
the id of the background, or 255 (void) when the schema has no background. Nothing appears before the whole archive is
known to be good. Archives can be added to one dataset one after the other."""
EXAMPLES = """\
In CVAT: Actions → Export task dataset → CVAT for images 1.1, with 'Save images'. Then

  sscloud convert street.zip -o dataset
  sscloud convert yard.zip -o dataset               # adds to it; what is there already is skipped
  sscloud convert street-corrected.zip -o dataset --overwrite

Frames without a single shape are left out, because most are not annotated yet. Where they show nothing to label:

  sscloud convert street.zip -o dataset --empty background

Labels of your own, and label names that the schema lacks (without --unknown the command lists them and stops):

  sscloud convert street.zip -o dataset --labels labels.yaml
  sscloud convert street.zip -o dataset --unknown void        # such pixels are left out of training
  sscloud convert street.zip -o dataset --unknown background  # such pixels are nothing special

Panoramas of one site never straddle training, validation and test; decided once, kept for ever:

  sscloud convert street.zip -o dataset --group-by '^(site\\d+)_'

Exit status: 0 all images converted; 1 some were left out by --skip-broken; 2 nothing was written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sscloud convert`."""
    parser.add_argument("archive", type=Path, metavar="ARCHIVE.zip", help="zip exported from CVAT, with images")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DATASET", help="dataset folder, new or already in use"
    )
    add_labels_argument(parser)
    add_rule_arguments(parser)
    parser.add_argument(
        "--skip-broken", action="store_true", help="convert the other images when some of the archive cannot be read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of DATASET whose content differs")
    add_split_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert the archive and print a summary."""
    schema = schema_for(args.labels, args.output)
    return convert_and_print(args.archive, args, schema, skip_broken=args.skip_broken, overwrite=args.overwrite)


def convert_and_print(
    archive: Path,
    args: argparse.Namespace,
    schema: "LabelSchema",
    *,
    skip_broken: bool = False,
    overwrite: bool = False,
    origin: str | None = None,
) -> int:
    """Convert one archive and print a summary; returns the exit status.

    Args:
        archive: the zip.
        args: with `output`, `unknown`, `empty` and the flags of `add_split_arguments`.
        schema: of the masks.
        skip_broken: convert the other images when some cannot be read.
        overwrite: replace items of the dataset that differ.
        origin: what the archive is an export of; None: its own name.
    """
    from training.formats.convert import convert_archive
    from training.manifest import read_manifest

    before = read_manifest(args.output)
    summary = convert_archive(
        archive,
        args.output,
        schema=schema,
        unknown=args.unknown,
        empty=args.empty,
        plan=plan_from(args, before.plan if before else None),
        skip_broken=skip_broken,
        overwrite=overwrite,
        origin=origin,
        progress=True,
    )
    _print(summary, origin or str(archive), args, schema)
    return 1 if summary.broken else 0


def _print(summary: "Summary", archive: str, args: argparse.Namespace, schema: "LabelSchema") -> None:
    print(f"{archive} ({summary.layout}) → {args.output}   snapshot {summary.manifest.snapshot}")
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
    lines, warnings = split_lines(summary.manifest.items, schema, summary.splits)
    for line in lines:
        print(f"  {line}")
    for label in summary.unknown:
        warnings.append(f"unknown label {label.name!r}: {label.found} painted as {args.unknown}")
    for warning in (*warnings, *summary.warnings, *(f"left out: {reason}" for reason in summary.broken)):
        print(f"warning: {warning}", file=sys.stderr)
