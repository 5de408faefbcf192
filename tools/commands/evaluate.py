"""`sscloud evaluate`: bundle + data set → scores."""

import argparse
import json
from pathlib import Path

NAME = "evaluate"
HELP = "measure a model on panoramas with masks"
DESCRIPTION = """\
Predict every panorama of DATASET (imgs/ and masks/) at full size and compare with its mask. All pixels of all panoramas
go into one confusion matrix; IoU, Dice, precision and recall follow from it per class. A class that neither the masks
nor the predictions hold has no score (a dash) and does not count in the means. Void pixels are left out. Where the data
set has frozen splits, only its part test is measured, unless --split names another."""
EXAMPLES = """\
  sscloud evaluate runs/street/bundle dataset            # its frozen test part
  sscloud evaluate runs/street/bundle dataset --split validation
  sscloud evaluate runs/street/bundle data/test --output scores.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a model's folder")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with imgs/ and masks/")
    parser.add_argument("--labels", type=Path, help="label schema (default: DATASET/labels.yaml)")
    parser.add_argument(
        "--split",
        choices=("test", "validation", "train", "all"),
        help="which panoramas (default: test where the data set has frozen test panoramas, else all)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the scores as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print a table."""
    from sscloud.bundle import ModelBundle
    from sscloud.files import atomic_write
    from training.dataset import open_dataset, part
    from training.evaluate import evaluate, scores_table, scores_to_dict

    bundle = ModelBundle.load(args.bundle)
    dataset, split = part(open_dataset(args.dataset, labels=args.labels), args.split)
    evaluation = evaluate(bundle, dataset, device=args.device)
    where = args.dataset if split == "all" else f"the {split} part of {args.dataset}"
    print(f"{bundle.manifest.title} on {where}: {len(evaluation.panoramas)} panoramas\n")
    print(scores_table(evaluation))
    if args.output is not None:
        text = json.dumps({"split": split, **scores_to_dict(evaluation)}, ensure_ascii=False, indent=2, allow_nan=False)
        atomic_write(args.output, text.encode() + b"\n")
        print(f"\nWritten to {args.output}")
    return 0
