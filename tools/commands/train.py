"""`sscloud train`: data set → run."""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import get_args

AUTO = "auto"

NAME = "train"
HELP = "train a model on panoramas and masks"
DESCRIPTION = """\
Train a segmentation network on DATASET: a folder with imgs/ (panoramas) and masks/ (label maps of the same names,
8-bit PNGs that hold label ids). Each panorama is decoded and scaled once, into DATASET/.cache. A data set that `fetch`
or `convert` made has frozen splits: train learns from its part train, chooses the best epoch by validation, and never
looks at test.

The run folder gets the configuration, checkpoints, metrics.csv and, at the end, bundle/: the best model with everything
that prediction needs. Metrics also go to an MLflow store, a SQLite file beside the run unless MLFLOW_TRACKING_URI names
another; `pip install mlflow` and `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` show them as a web page.

Stop it whenever you like: --resume goes on after the last whole epoch, with the same result."""
EXAMPLES = """\
  sscloud train scenes                                  # 50 epochs at scale 0.1 into runs/<date-time>
  sscloud train data --epochs 80 --scale 0.2 --amp -o runs/street
  sscloud train data -o runs/street --resume            # go on after Ctrl-C, a crash, a power cut
  sscloud train data --load runs/street/bundle --epochs 10 --learning-rate 2e-4
  torchrun --nproc-per-node 2 -m tools.cli train data -o runs/two   # two processes (GPUs)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`. Those that determine the result have no default here: `TrainConfig` knows them."""
    # Here, so that the list of all verbs needs no NumPy.
    from sscloud.architecture import Family
    from sscloud.frame import Frame
    from training.config import ClassWeights, LossName

    suppress = argparse.SUPPRESS
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder with imgs/ and masks/")
    place = parser.add_argument_group("where")
    place.add_argument("-o", "--output", type=Path, metavar="RUN", help="run folder (default: runs/<date-time>)")
    place.add_argument("--resume", action="store_true", help="go on with the run in --output, or with the latest one")
    place.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: auto)")
    place.add_argument(
        "--memory", type=float, metavar="GIB", help="that training may use (default: what the device has free)"
    )
    place.add_argument("--cache", type=Path, metavar="DIR", help="scaled panoramas (default: DATASET/.cache)")
    place.add_argument("--name", default="sscloud", help="name of the model (default: %(default)s)")
    place.add_argument("--version", type=int, default=1, help="version of the model, a whole number (default: 1)")
    place.add_argument("--wandb", action="store_true", help="also log to Weights & Biases, offline")
    place.add_argument(
        "--pth-checkpoints",
        type=Path,
        metavar="DIR",
        help="also write checkpoint_epochN.pth files as Pytorch-UNet does",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--labels", type=Path, default=suppress, help="label schema (default: DATASET/labels.yaml)")
    what.add_argument("-e", "--epochs", type=int, default=suppress, metavar="N", help="default: 50")
    what.add_argument(
        "-b",
        "--batch-size",
        type=_number_or_auto,
        default=suppress,
        metavar="N|auto",
        help="panoramas or crops at a time; auto: what fits the memory (default: 1)",
    )
    what.add_argument(
        "-s",
        "--scale",
        type=_share_or_auto,
        default=suppress,
        metavar="F|auto",
        help="of the panoramas' sides; auto: the largest that fits the memory, in crops if need be (default: 0.1)",
    )
    what.add_argument(
        "-v",
        "--validation",
        type=float,
        default=suppress,
        metavar="P",
        help="percent of the panoramas (default: 10), where the data set has no frozen splits",
    )
    what.add_argument(
        "-f",
        "--load",
        type=Path,
        default=suppress,
        metavar="MODEL",
        help="bundle or .pth to start from; its last layer is taken over by label name. A bundle's scale, network and "
        "filter count unless you give others",
    )
    what.add_argument(
        "--replay",
        type=float,
        default=suppress,
        metavar="SHARE",
        help="with --load: share of the panoramas that the bundle knows already which an epoch shows again, beside all "
        "new and corrected ones (default: 1)",
    )
    what.add_argument(
        "--resample", choices=("valid-area", "bicubic"), default=suppress, help="scaling filter (default: valid-area)"
    )
    what.add_argument("--seed", type=int, default=suppress, metavar="N", help="default: 0")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--architecture",
        dest="family",
        choices=get_args(Family),
        default=suppress,
        help="unet, or one of segmentation-models-pytorch: pip install segmentation-models-pytorch (default: unet)",
    )
    network.add_argument(
        "--encoder", default=suppress, metavar="NAME", help="of the others: resnet34, mit_b0 … (default: resnet34)"
    )
    network.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        default=suppress,
        help="do not start the encoder from what it learned from ImageNet",
    )
    network.add_argument(
        "-c",
        "--classes",
        type=int,
        default=suppress,
        metavar="N",
        help="output channels (default: labels of the schema)",
    )
    network.add_argument(
        "--base-width", type=int, default=suppress, metavar="N", help="channels of a unet's first level (default: 64)"
    )
    network.add_argument("--bilinear", action="store_true", default=suppress, help="bilinear up-sampling in a unet")
    network.add_argument(
        "--no-wrap", dest="wrap", action="store_false", default=suppress, help="do not convolve around the seam"
    )
    network.add_argument(
        "--frame",
        choices=get_args(Frame),
        default=suppress,
        help="in which the network sees normals: the scanner's, or that of each pixel's viewing direction (default: "
        "view where the azimuth convention is stated in dataset.yaml or found in the data)",
    )

    learning = parser.add_argument_group("learning")
    learning.add_argument(
        "-l",
        "--learning-rate",
        type=float,
        default=suppress,
        metavar="LR",
        help="peak (default: 1e-3 at base width 64, more for narrower networks)",
    )
    learning.add_argument("--weight-decay", type=float, default=suppress, metavar="WD", help=_of("weight_decay"))
    learning.add_argument(
        "--loss", choices=get_args(LossName), default=suppress, help=_of("loss", "ce is cross-entropy")
    )
    learning.add_argument(
        "--class-weights",
        choices=get_args(ClassWeights),
        default=suppress,
        help=_of("class_weights", "smoothed: by the square root of how rare a class is"),
    )
    learning.add_argument(
        "--label-smoothing", type=float, default=suppress, metavar="F", help=_of("label_smoothing", "0 to 1")
    )
    learning.add_argument(
        "--latitude-weights",
        action=argparse.BooleanOptionalAction,
        default=suppress,
        help=_of("latitude_weights", "weigh pixels by the part of the sphere they cover"),
    )
    learning.add_argument(
        "--ema",
        type=float,
        default=suppress,
        metavar="DECAY",
        help=_of("ema", "moving average of the weights; 0: none"),
    )
    learning.add_argument(
        "--patience", type=int, default=suppress, metavar="N", help="stop after N epochs without a better mIoU"
    )
    learning.add_argument(
        "--max-hours",
        type=float,
        default=suppress,
        metavar="H",
        help="stop with the last epoch that ends within H hours of training, interruptions not counted",
    )
    learning.add_argument(
        "--no-augment", dest="augment", action="store_false", default=suppress, help="do not turn and mirror panoramas"
    )
    learning.add_argument(
        "--tilt",
        type=float,
        default=suppress,
        metavar="DEGREES",
        help=_of("tilt", "also tilt panoramas, by at most this"),
    )

    memory = parser.add_argument_group("memory")
    memory.add_argument("--amp", action="store_true", default=suppress, help="mixed precision: faster, half the memory")
    memory.add_argument(
        "--crop",
        type=_size,
        default=suppress,
        metavar="N|HxW",
        help="learn from crops of the scaled panoramas, pixels (default: whole panoramas)",
    )
    memory.add_argument(
        "--rare-crops",
        type=float,
        default=suppress,
        metavar="SHARE",
        help=_of("rare_crops", "share of the crops that are cut around rare classes"),
    )
    memory.add_argument(
        "--accumulate", type=int, default=suppress, metavar="N", help="add up N batches before a step (default: 1)"
    )
    memory.add_argument(
        "--checkpointing",
        action="store_true",
        default=suppress,
        help="compute activations twice instead of keeping them: less memory, a third more time",
    )


def _of(name: str, text: str = "") -> str:
    """Help that names the default."""
    from training.config import TrainConfig

    default = f"default: {TrainConfig.__dataclass_fields__[name].default}"
    return f"{text} ({default})" if text else default


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, found {text}") from error


def _share_or_auto(text: str) -> float | str:
    try:
        return text if text == AUTO else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number or {AUTO}, found {text}") from error


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"expected a number of pixels or HxW, found {text}")
    return int(sides[0]), int(sides[-1])


def run(args: argparse.Namespace) -> int:
    """Train, and say where the model is."""
    from tools.tracking import quiet_mlflow

    quiet_mlflow()
    from sscloud.errors import ConfigError
    from training.config import CONFIG, Place, TrainConfig, inherited, resumed_config
    from training.train import planned, train

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    given = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in given.items()}
    given["dataset"] = str(args.dataset.resolve())
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # this and the others below are set by torchrun
    output = args.output
    if output is None and processes > 1:
        raise ConfigError("Several processes need one run folder: name it with --output.")
    if output is None:
        output = _latest(Path("runs"), CONFIG) if args.resume else Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if output is None:
        raise ConfigError("There is no run in runs/ to resume. Leave --resume out, or name the run with --output.")
    resume: bool = args.resume
    if resume and not (output / CONFIG).exists():
        raise ConfigError(
            f"There is no run in {output} to go on with: one that is stopped before its first line has none yet. Leave "
            "--resume out to start it."
        )
    if resume:
        print(f"Going on with {output}.", file=sys.stderr)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = Place(
        run=output,
        resume=resume,
        device=args.device,
        memory=args.memory,
        cache=args.cache,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
        wandb=args.wandb,
        checkpoints=args.pth_checkpoints,
        name=args.name,
        version=args.version,
        rank=int(os.environ.get("RANK", "0")),
        processes_per_node=local,
        nodes=processes // local,
    )
    if args.pth_checkpoints is not None and not resume:
        if given.get("frame") == "view":
            raise ConfigError("A .pth file cannot say that its network sees normals in the view frame. Leave one out.")
        given["frame"] = "scanner"
    if "load" in given and not resume:
        given = {**inherited(Path(given["load"])), **given}
    auto = {name for name, value in given.items() if value == AUTO}
    given = {name: value for name, value in given.items() if name not in auto}
    config = resumed_config(output, given) if resume else TrainConfig(**given)
    if auto and not resume:  # a run goes on as it was planned
        config, plan = planned(config, place, auto=auto)
        if place.rank == 0:
            print(plan.describe(), file=sys.stderr)
    try:
        bundle = train(config, place)
    except KeyboardInterrupt:
        if place.rank == 0 and (output / "checkpoints").exists():
            print(f"\nGo on with: sscloud train {args.dataset} -o {output} --resume", file=sys.stderr)
        raise
    if bundle is not None:
        metrics = bundle.manifest.metrics
        shown = shlex.quote(str(bundle.path))
        quality = (
            f", mIoU {metrics['validation_miou']:.3f} on the validation part" if "validation_miou" in metrics else ""
        )
        print(
            f"The best model is in {bundle.path} (epoch {metrics['epoch']:.0f}{quality}).\n"
            f"Next: sscloud evaluate {shown} UNSEEN_DATASET, or sscloud package {shown} -o FUNCTION"
        )
    return 0


def _latest(runs: Path, config: str) -> Path | None:
    """The run whose configuration was written last."""
    files = sorted(runs.glob(f"*/{config}"), key=lambda file: file.stat().st_mtime)
    return files[-1].parent if files else None
