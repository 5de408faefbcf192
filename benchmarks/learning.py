"""Learning from few panoramas: SSCloud's defaults against the plain recipe and against themselves, one axis at a time.

    python -m benchmarks.learning [--seeds 3] [--budget SECONDS] [--only NAME,…] [--json]
    python -m benchmarks.learning --speed

Every training gets the same scenes, the same network, the same wall-clock budget (decoding, caching, validation and
all) on the same device, and is measured on scenes that none of them saw, at full size, by one confusion matrix. Recipes
take turns: all of them with the first seed, then with the second. `benchmarks.plain` is the other side. SSCloud's
number of epochs is what fits into the budget by a probe of three epochs, which does not count. With --speed: images a
second while training on 8192x4096 sources at scale 0.1. Tables are Markdown; with --json, the last line holds
everything.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain import train_plain
from sscloud.bundle import ModelBundle
from sscloud.forward import find_device
from sscloud.image import read_label_map
from sscloud.inference import Predictor
from training.config import Place, TrainConfig
from training.dataset import DatasetFolder, learning_parts, open_dataset
from training.metrics import Scores, confusion_matrix, score
from training.sample.generate import generate
from training.train import train

ELEVATION = (90.0, -60.0)
"""As a scanner with a blind cone."""

PLAIN, DEFAULTS = "plain recipe", "SSCloud's defaults"

AXES: Mapping[str, Mapping[str, Any]] = {
    DEFAULTS: {},
    "no yaw and mirror": {"augment": False},
    "scanner's frame": {"frame": "scanner"},
    "scanner's frame without yaw and mirror": {"frame": "scanner", "augment": False},
    "no wrap": {"wrap": False, "frame": "view"},
    "tilt up to 5°": {"tilt": 5.0},
    "no class weights": {"class_weights": "none"},
    "cross-entropy alone": {"loss": "ce"},
    "focal + Dice": {"loss": "focal+dice"},
    "cross-entropy + Tversky": {"loss": "ce+tversky"},
    "cross-entropy + Lovász": {"loss": "ce+lovasz"},
    "label smoothing 0.05": {"label_smoothing": 0.05},
    "latitude weights": {"latitude_weights": True},
    "weight average 0.99": {"ema": 0.99},
    "no weight average": {"ema": 0.0},
    "crops half for rare classes": {"crop": (64, 128), "rare_crops": 0.5, "batch_size": 2},
    "uniform crops": {"crop": (64, 128), "rare_crops": 0.0, "batch_size": 2},
    "batches of two": {"batch_size": 2},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "weight decay 1e-2": {"weight_decay": 1e-2},
}
"""What differs from the defaults."""

SHOWN = (
    PLAIN,
    DEFAULTS,
    "scanner's frame without yaw and mirror",
    "no yaw and mirror",
    "no wrap",
    "no class weights",
    "cross-entropy alone",
    "focal + Dice",
)
"""What a run compares unless it is told otherwise."""

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all recipes share."""

    learned: DatasetFolder
    """To train on; every fourth item is for choosing the epoch."""
    unseen: DatasetFolder
    scale: float
    base_width: int
    device: str
    budget: float
    """Seconds."""
    epochs: int | None
    """Instead of a budget: the same number for all."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each recipe (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the others follow (default: 0)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="of a training (default: 60)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of SSCloud's recipes, instead of the budget")
    parser.add_argument(
        "--only", metavar="NAME,NAME", help=f"recipes: all, or of {PLAIN!r}, {', '.join(map(repr, AXES))}"
    )
    parser.add_argument("--scenes", type=int, default=16, metavar="N", help="to learn from (default: 16)")
    parser.add_argument("--unseen", type=int, default=48, metavar="N", help="to measure on (default: 48)")
    parser.add_argument("--width", type=int, default=2048, metavar="PIXELS", help="of the scenes (default: 2048)")
    parser.add_argument("--scale", type=float, default=0.125, metavar="F", help="default: 0.125")
    parser.add_argument("--base-width", type=int, default=16, metavar="N", help="of the network (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep scenes there (default: made anew each time)")
    parser.add_argument("--speed", action="store_true", help="measure images a second instead")
    parser.add_argument("--json", action="store_true", help="print all results as JSON in the last line")
    args = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cache = args.cache or work
        if args.speed:
            result = speed(cache, work, args)
        else:
            result = compare(cache, work, args)
    if args.json:
        print(json.dumps({**machine(), **result}, ensure_ascii=False))


# --- learning ---------------------------------------------------------------------------------------------------------


def compare(cache: Path, work: Path, args: argparse.Namespace) -> Result:
    """Train every recipe with every seed, and print what came of it."""
    names = SHOWN if args.only is None else (PLAIN, *AXES) if args.only == "all" else tuple(args.only.split(","))
    if unknown := set(names) - {PLAIN, *AXES}:
        raise SystemExit(f"--only: there are no recipes {sorted(unknown)}. --help lists them.")
    setting = Setting(
        learned=dealt(scenes(cache, args.scenes, seed=11, width=args.width)),
        unseen=open_dataset(scenes(cache, args.unseen, seed=1_000_011, width=args.width)),
        scale=args.scale,
        base_width=args.base_width,
        device=args.device,
        budget=args.budget,
        epochs=args.epochs,
    )
    runs: dict[str, list[Result]] = {name: [] for name in names}
    epochs = {name: setting.epochs or _within(setting, work, AXES[name]) for name in names if name != PLAIN}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in names:
            if name == PLAIN:
                run = plain(setting, work, seed)
            else:
                run = ours(setting, work, seed, AXES[name], epochs=epochs[name])
            runs[name].append(run)
            print(
                f"seed {seed}  {name:36}  mIoU {run['miou']:.3f}  {run['epochs']} epochs  {run['seconds']:.0f} s",
                flush=True,
            )
            shutil.rmtree(work / "run", ignore_errors=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("cache", "speed", "json", "only")}
    result: Result = {"setting": settings, "runs": runs}
    labels = setting.unseen.schema.classes
    result["rarest"] = [labels[i].name for i in np.argsort(runs[names[0]][0]["share"])[:2]]
    result["summary"] = {name: summary(found, [label.name for label in labels]) for name, found in runs.items()}
    print_summary(result["summary"])
    if PLAIN in runs and DEFAULTS in runs:
        result["goals"] = goals(result["summary"], result["rarest"])
        print("\n" + "\n".join(f"- {goal}" for goal in result["goals"]))
    return result


def scenes(cache: Path, count: int, *, seed: int, width: int) -> Path:
    """A data set of sampled scenes."""
    folder = cache / f"scenes-{seed}-{count}-{width}"
    if not (folder / "done").exists():
        generate(folder, count=count, seed=seed, width=width, elevation=ELEVATION, overwrite=True)
        (folder / "done").touch()
    return folder


def dealt(folder: Path) -> DatasetFolder:
    """The data set with splits: every fourth panorama is for validation."""
    found = open_dataset(folder)
    items = (replace(item, split="validation" if place % 4 == 3 else "train") for place, item in enumerate(found.items))
    return replace(found, items=tuple(items))


def plain(setting: Setting, work: Path, seed: int) -> Result:
    """The other side."""
    folder = setting.learned
    training, validation = learning_parts(folder)
    run = train_plain(
        training,
        validation,
        folder.schema,
        output=work / "plain",
        scale=setting.scale,
        base_width=setting.base_width,
        aspect=folder.aspect,
        elevation=ELEVATION,
        seed=seed,
        budget=setting.budget,
        device=find_device(setting.device),
    )
    return {"seconds": run.seconds, "epochs": run.epochs, "images": run.images, **measure(run.bundle, setting)}


def ours(setting: Setting, work: Path, seed: int, changes: Mapping[str, Any], *, epochs: int) -> Result:
    """One of SSCloud's recipes."""
    started = time.perf_counter()
    bundle = fit(setting, work / "run", seed=seed, epochs=epochs, changes=changes)
    seconds = time.perf_counter() - started
    rows = metrics(work / "run")
    images = sum(row["seconds"] * row["images_per_second"] for row in rows)
    return {"seconds": seconds, "epochs": epochs, "images": round(images), **measure(bundle, setting)}


def fit(setting: Setting, run: Path, *, seed: int, epochs: int, changes: Mapping[str, Any]) -> ModelBundle:
    """Train with an empty cache."""
    values: dict[str, Any] = {
        "dataset": str(setting.learned.path),
        "scale": setting.scale,
        "base_width": setting.base_width,
        "epochs": epochs,
        "seed": seed,
        **changes,
    }
    place = Place(run=run, device=setting.device, cache=run.with_name("cache"))
    with contextlib.redirect_stderr(io.StringIO()):  # its line an epoch
        bundle = train(TrainConfig(**values), place, folder=setting.learned)
    shutil.rmtree(run.with_name("cache"))
    if bundle is None:
        raise SystemExit("Start this without torchrun.")
    return bundle


_FORESEEN = 0.9
"""Of the budget that is planned: an epoch later in the training may take longer than the probe's."""


def _within(setting: Setting, work: Path, changes: Mapping[str, Any]) -> int:
    """Epochs that fit into the budget."""
    started = time.perf_counter()
    fit(setting, work / "probe", seed=0, epochs=3, changes=changes)
    whole = time.perf_counter() - started
    seconds = [row["seconds"] for row in metrics(work / "probe")]
    shutil.rmtree(work / "probe")
    epoch = max(seconds[1:])
    return max(1, int((_FORESEEN * setting.budget - (whole - sum(seconds))) / epoch))


def measure(bundle: ModelBundle, setting: Setting) -> Result:
    """Scores on the unseen scenes at full size."""
    schema = setting.unseen.schema
    predictor = Predictor(bundle, device=setting.device, precision="fp32")
    total = np.zeros((len(schema.classes),) * 2, np.int64)
    for item in setting.unseen.items:
        predicted = schema.class_map(predictor.predict_file(item.image).label_map)
        total += confusion_matrix(schema.class_map(read_label_map(item.mask)), predicted, len(schema.classes))
    scores: Scores = score(total, schema.class_ids)
    return {"miou": scores.miou, "iou": scores.iou.tolist(), "share": scores.share.tolist()}


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def summary(runs: Sequence[Result], names: Sequence[str]) -> Result:
    """Mean and spread over the seeds."""
    miou, iou = np.array([run["miou"] for run in runs]), np.array([run["iou"] for run in runs])
    return {
        "miou": float(miou.mean()),
        "spread": float(miou.std(ddof=1)) if len(miou) > 1 else None,
        "iou": dict(zip(names, iou.mean(0).tolist(), strict=True)),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
        "epochs": float(np.mean([run["epochs"] for run in runs])),
    }


def print_summary(summaries: Mapping[str, Result]) -> None:
    """As a Markdown table."""
    names = list(next(iter(summaries.values()))["iou"])
    print("\n| recipe | mIoU | ± | " + " | ".join(names) + " | epochs | s |")
    print("|---|" + "---|" * (len(names) + 4))
    for name, found in summaries.items():
        spread = "—" if found["spread"] is None else f"{found['spread']:.3f}"
        cells = [f"{found['miou']:.3f}", spread, *(f"{value:.3f}" for value in found["iou"].values())]
        print(f"| {name} | {' | '.join(cells)} | {found['epochs']:.0f} | {found['seconds']:.0f} |")


def goals(summaries: Mapping[str, Result], rarest: Sequence[str]) -> list[str]:
    """What the comparison is to show, and whether it did."""
    theirs, found = summaries[PLAIN], summaries[DEFAULTS]
    gained = found["miou"] - theirs["miou"]
    lines = [f"mIoU {gained:+.3f} (goal +0.10): {'yes' if gained >= 0.1 else 'no'}"]
    for name in rarest:
        before, after = theirs["iou"][name], found["iou"][name]
        twice = after >= 2 * before and after > 0
        lines.append(f"{name}: IoU {before:.3f} → {after:.3f} (goal twice): {'yes' if twice else 'no'}")
    if theirs["spread"] is not None:
        smaller = found["spread"] < theirs["spread"]
        lines.append(
            f"spread {theirs['spread']:.3f} → {found['spread']:.3f} (goal smaller): {'yes' if smaller else 'no'}"
        )
    return lines


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(cache: Path, work: Path, args: argparse.Namespace) -> Result:
    """Images a second while training on full-size sources, both sides in turns; the best round of each."""
    setting = Setting(
        learned=dealt(scenes(cache, _SOURCES, seed=21, width=8192)),
        unseen=open_dataset(scenes(cache, 1, seed=22, width=256)),
        scale=0.1,
        base_width=args.base_width,
        device=args.device,
        budget=float("inf"),
        epochs=None,
    )
    folder = setting.learned
    training, validation = learning_parts(folder)
    theirs, rows = [], []
    for _ in range(args.seeds):
        run = train_plain(
            training,
            validation,
            folder.schema,
            output=work / "plain",
            scale=setting.scale,
            base_width=setting.base_width,
            aspect=folder.aspect,
            elevation=ELEVATION,
            seed=0,
            budget=setting.budget,
            epochs=_SPEED_EPOCHS,
            device=find_device(setting.device),
        )
        theirs.append(run.images / run.seconds)
        fit(setting, work / "run", seed=0, epochs=_SPEED_EPOCHS, changes={})
        rows += metrics(work / "run")[1:]
        shutil.rmtree(work / "run")
    ours_whole = max(len(training) / row["seconds"] for row in rows)
    result = {
        "plain": max(theirs),
        "ours": ours_whole,
        "ratio": ours_whole / max(theirs),
        **{name: max(row[name] for row in rows) for name in _RATES},
    }
    print(
        f"Images a second, sources 8192 wide at scale 0.1, base width {setting.base_width}, validation included: "
        f"plain recipe {result['plain']:.2f}, SSCloud {result['ours']:.2f}: {result['ratio']:.1f} times.\n"
        f"SSCloud without validation {result['images_per_second']:.2f}; its loader alone "
        f"{result['loader_images_per_second']:.0f}, its step alone {result['step_images_per_second']:.2f}."
    )
    return {"speed": result}


_SOURCES, _SPEED_EPOCHS = 4, 3
_RATES = ("images_per_second", "loader_images_per_second", "step_images_per_second")


def machine() -> Result:
    """What it ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(), "gpu": gpu}


if __name__ == "__main__":
    main()
