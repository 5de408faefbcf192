"""`sscloud evaluate`: bundle + data set → scores."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.evaluate import Evaluation

NAME = "evaluate"
HELP = "measure a model on panoramas with masks"
DESCRIPTION = """\
Predict every panorama of DATASET (imgs/ and masks/) at full size and compare with its mask. All pixels of all panoramas
go into one confusion matrix. Void pixels are left out. A class that neither the masks nor the predictions hold has no
score (a dash) and does not count in the means. Where the data set has frozen splits, only its part test is measured,
unless --split names another.

  share              part of the masks' pixels that the class has
  IoU                pixels that mask and prediction share, of those that either covers; mIoU is the mean of the classes
  Dice               twice the shared pixels, of the sum of both areas
  boundary           IoU of those pixels only that lie near the outlines (0.5 % of the image's diagonal)
  precision, recall  part of the predicted, of the true pixels that is right
  weighted mIoU      mIoU with each pixel counted by the solid angle it covers: less near the zenith than at the horizon
  calibration error  mean distance of the model's confidence and the share of pixels that are right at this confidence
  [low–high]         where the score lies in 95 % of the draws when whole groups of panoramas are drawn at random: two
                     models whose intervals are wider than their difference may be equally good (see `sscloud compare`)

--folds K measures a recipe instead of a model: that of the run BUNDLE is trained K times on DATASET, each time without
a K-th of the groups, which are then measured. Interrupted, the same command goes on."""
EXAMPLES = """\
  sscloud evaluate runs/street/bundle dataset            # its frozen test part
  sscloud evaluate runs/street/bundle dataset --split validation
  sscloud evaluate runs/street/bundle data/test --output scores.json
  sscloud evaluate runs/street/bundle scans --group-by '^(site\\d+)_' --turns 4
  sscloud evaluate runs/street dataset --folds 5         # cross-validation of the run's recipe
  torchrun --nproc-per-node 2 -m tools.cli evaluate runs/street/bundle dataset   # two processes (GPUs)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a model's folder; with --folds, a run's")
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
        help="panoramas that stay together in intervals and folds: image, task, job, or a regular expression that "
        "finds the site in the file name (default: the groups of the data set's manifest; without one, each by itself)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        metavar="N",
        help="average over N predictions of a panorama: turned by 1/N of the circle each, every other one mirrored; 2 "
        "to 8 are sensible, each costs a prediction (default: 1)",
    )
    parser.add_argument("--folds", type=int, metavar="K", help="cross-validate the recipe of a run")
    parser.add_argument(
        "--fold-runs", type=Path, metavar="DIR", help="where the runs of the folds go (default: RUN/folds)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the scores as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print a table."""
    from sscloud.errors import ConfigError

    if args.output is not None and args.output.exists() and not args.overwrite:
        raise ConfigError(f"{args.output} exists already. Name another file, or add --overwrite to replace it.")
    return _evaluate(args) if args.folds is None else _cross_validate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from sscloud.bundle import ModelBundle
    from training.dataset import open_dataset, part
    from training.evaluate import evaluate, scores_table

    bundle = ModelBundle.load(args.bundle)
    dataset, split = part(open_dataset(args.dataset, labels=args.labels), args.split)
    # These are set by torchrun.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with _processes(world_size):
        evaluation = evaluate(
            bundle,
            dataset,
            device=_own_device(args.device) if world_size > 1 else args.device,
            turns=args.turns,
            group_by=args.group_by,
            rank=rank,
            world_size=world_size,
        )
    if rank:
        return 0
    where = args.dataset if split == "all" else f"the {split} part of {args.dataset}"
    print(
        f"{bundle.manifest.title} on {where}: {len(evaluation.panoramas)} panorama(s)"
        f"{f', mean of {args.turns} turns' if args.turns > 1 else ''}\n"
    )
    print(scores_table(evaluation))
    _write(args.output, evaluation, {"split": split, "turns": args.turns})
    return 0


def _cross_validate(args: argparse.Namespace) -> int:
    # Read by mlflow when it is imported: no reports to its makers, no remarks on a new store.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from sscloud.errors import ConfigError
    from training.evaluate import json_number, scores_table, shown_score
    from training.folds import cross_validate

    if args.split is not None:
        raise ConfigError("--folds measures every panorama but the frozen test part. Leave --split out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Cross-validation runs in one process. Start it without torchrun.")
    result = cross_validate(
        args.bundle,
        args.dataset,
        count=args.folds,
        output=args.fold_runs or args.bundle / "folds",
        labels=args.labels,
        device=args.device,
        turns=args.turns,
        group_by=args.group_by,
    )
    pooled, scores = result.pooled, [fold.scores.miou for fold in result.folds]
    print(f"The recipe of {args.bundle} on {args.folds} folds of {args.dataset}: {len(pooled.panoramas)} panorama(s)\n")
    print(scores_table(pooled))
    print(f"mIoU of each fold: {'  '.join(shown_score(miou) for miou in scores)}")
    folds = [
        {"miou": json_number(miou), "panoramas": [panorama.name for panorama in fold.panoramas]}
        for miou, fold in zip(scores, result.folds, strict=True)
    ]
    _write(args.output, pooled, {"folds": folds})
    return 0


def _write(output: Path | None, evaluation: "Evaluation", more: dict[str, Any]) -> None:
    from sscloud.files import atomic_write
    from training.evaluate import scores_to_dict

    if output is None:
        return
    text = json.dumps({**more, **scores_to_dict(evaluation)}, ensure_ascii=False, indent=2, allow_nan=False)
    atomic_write(output, text.encode() + b"\n")
    print(f"\nWritten to {output}")


@contextlib.contextmanager
def _processes(world_size: int) -> Iterator[None]:
    """Join the processes that torchrun started."""
    if world_size == 1:
        yield
        return
    import torch.distributed

    # Only counts are exchanged, from the processor's memory.
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _own_device(device: str) -> str:
    """A GPU for each process of a machine, where there are GPUs."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
