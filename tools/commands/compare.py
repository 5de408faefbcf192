"""`sscloud compare`: two bundles + data set → which one is better."""

import argparse
import json
from pathlib import Path

NAME = "compare"
HELP = "tell which of two models is better, and show where they differ"
DESCRIPTION = """\
Predict the same panoramas with bundle A and bundle B, and compare both with the masks. For each class and overall:
IoU of A and of B, their difference, the interval in which it lies in 95 % of the resamples of groups of panoramas (the
same ones for both), and what that says of B. An interval that holds zero does not show that the models are equal, only
that these panoramas do not tell. With --output also compare.json and pictures of the panoramas where they differ most:
image, mask, A, B, and who is right where. A model must not have learned from panoramas that it is compared on: by
default only the part test of a data set with frozen splits is used."""
EXAMPLES = """\
  sscloud compare runs/old/bundle runs/new/bundle dataset
  sscloud compare runs/old/bundle runs/new/bundle dataset -o old-new
  sscloud compare champion runs/new/bundle scans --group-by '^(site\\d+)_'"""

MARKER = "compare.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `compare`."""
    parser.add_argument("a", type=Path, metavar="A", help="a model's folder")
    parser.add_argument("b", type=Path, metavar="B", help="another model's folder")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with imgs/ and masks/")
    parser.add_argument("--labels", type=Path, help="label schema (default: DATASET/labels.yaml)")
    parser.add_argument(
        "--split",
        choices=("test", "validation", "train", "all"),
        help="which panoramas (default: test where the data set has frozen test panoramas, else all)",
    )
    parser.add_argument(
        "--group-by",
        metavar="RULE",
        help="panoramas that are resampled together: image, task, job, or a regular expression that finds the site in "
        "the file name (default: the groups of the data set's manifest; without one, each panorama by itself)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        metavar="N",
        help="average over N predictions of a panorama, turned and mirrored (default: 1)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write compare.json and pictures there")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Compare, and say which one is better."""
    import contextlib

    from sscloud.bundle import ModelBundle
    from sscloud.files import atomic_folder, atomic_write
    from training.compare import compare, comparison_table, comparison_to_dict
    from training.dataset import open_dataset, part

    first, second = ModelBundle.load(args.a), ModelBundle.load(args.b)
    dataset, split = part(open_dataset(args.dataset, labels=args.labels), args.split)
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        if args.output is not None:
            folder = stack.enter_context(atomic_folder(args.output, marker=MARKER, overwrite=args.overwrite))

        def save(name: str, jpeg: bytes) -> None:
            if folder is not None:
                atomic_write(folder / f"{name}.jpg", jpeg)

        comparison = compare(
            first,
            second,
            dataset,
            device=args.device,
            turns=args.turns,
            group_by=args.group_by,
            picture=save if folder is not None else None,
        )
        if folder is not None:
            data = {"split": split, **comparison_to_dict(comparison)}
            text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False)
            atomic_write(folder / MARKER, text.encode() + b"\n")
    where = args.dataset if split == "all" else f"the {split} part of {args.dataset}"
    print(f"A: {first.manifest.title} ({args.a})\nB: {second.manifest.title} ({args.b})")
    print(f"On {where}: {len(dataset.items)} panoramas\n\n{comparison_table(comparison)}")
    if args.output is not None:
        print(f"Written to {args.output}")
    return 0
