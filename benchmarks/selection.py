"""What to label next: `sscloud select` against random choice, in a simulation with sampled scenes.

    python -m benchmarks.selection [--seeds 5] [--rounds 3] [--json] [-o FOLDER]

The pool is as scanning leaves it: some streets that were scanned again and again from one step aside, and single scans
of other places. Four panoramas of one street are labelled at first, as work begins in one place. In every round each
strategy chooses more, the truth of the scene labels them, and the network goes on learning from all that is labelled,
as in the loop, with the same recipe and the same number of steps for all, and is measured on scenes of other places by
one confusion matrix. Strategies take turns: all of them with the first seed, then with the second; with one seed they
share the pool, the first panoramas and the first network. "novelty only" takes every panorama for equally uncertain,
and "score only" does not mind copies: they tell which part of a strategy does the work. A table and a curve with the
spread over the seeds are printed, how many panoramas each needs to reach what random choice reaches at the end, and by
how much it is better with the same seed; intervals are of a bootstrap over the seeds.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import load_model, save_bundle
from sscloud.frame import Azimuth
from sscloud.image import resize_image, resize_label_map
from sscloud.inference import Predictor
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.acquisition import Jury, Measure, pick
from training.augment import mirror, to_view_frame, yaw
from training.losses import class_weights, make_loss
from training.metrics import confusion_matrix, score
from training.sample.generate import panorama_size
from training.sample.scanner import Scanner
from training.sample.scene import KINDS, build_scene

ELEVATION = (90.0, -60.0)
AZIMUTH = Azimuth(direction=1, column_0=0.0)
WIDTH, SCALE, BASE_WIDTH = 384, 0.25, 8
FIRST = 4
"""Panoramas that are labelled before the first round."""
STREETS: Sequence[tuple[str, int]] = (("street", 10), ("street", 8), ("suburb", 6))
"""Kind of a place, and how often it was scanned from nearby."""
SINGLES: Mapping[str, int] = {"street": 3, "suburb": 3, "yard": 5}
"""Places of each kind that were scanned once."""
RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How panoramas are chosen."""

    measure: Measure | None
    """Of the score; None: all have the same."""
    novelty: bool
    """Whether what is like a labelled or a chosen one counts less."""


STRATEGIES: Mapping[str, Strategy | None] = {
    RANDOM: None,
    "novelty only": Strategy(measure=None, novelty=True),
    "score only": Strategy(measure="entropy", novelty=False),
    "entropy": Strategy(measure="entropy", novelty=True),
    "information": Strategy(measure="information", novelty=True),
}
DRAWS, LEVEL = 10_000, 0.95
"""Of the bootstrap."""
COLORS = ("#777777", "#2a9d5c", "#b8860b", "#2364aa", "#d1495b")
"""In the curve, of the strategies in their order."""
_BATCH, _PEAK = 2, 3e-3

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A panorama with its truth, as scanned."""

    image: NDArray[np.uint8]
    label_map: NDArray[np.uint8]
    place: int
    """Scans of one place have the same number."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="the others follow (default: 0)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--count", type=int, default=3, metavar="K", help="panoramas a round (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=200, metavar="N", help="a round; twice as many at first (default: 200)"
    )
    parser.add_argument("--unseen", type=int, default=18, metavar="N", help="scenes to measure on (default: 18)")
    parser.add_argument("--only", default="random,entropy", metavar="NAME,NAME", help=f"of {', '.join(STRATEGIES)}")
    parser.add_argument("--json", action="store_true", help="print all results as JSON in the last line")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write the curve there, as selection.svg")
    args = parser.parse_args()
    names = args.only.split(",")
    if RANDOM not in names or set(names) - set(STRATEGIES):
        raise SystemExit(f"--only: expected random and others of {', '.join(STRATEGIES)}.")
    began = time.perf_counter()
    runs = simulate(
        names,
        seeds=range(args.first_seed, args.first_seed + args.seeds),
        rounds=args.rounds,
        count=args.count,
        steps=args.steps,
        unseen=args.unseen,
        say=lambda text: print(text, flush=True),
    )
    found = summary(runs, count=args.count)
    print("\n" + table(found))
    print("\n" + "\n".join(needed_lines(found)))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "selection.svg").write_text(curve(found), encoding="utf-8")
    if args.json:
        setting = {name: value for name, value in vars(args).items() if name not in ("json", "output")}
        seconds = round(time.perf_counter() - began)
        print(json.dumps({"setting": setting, "seconds": seconds, "runs": runs, "summary": found}, ensure_ascii=False))


# --- the simulation ---------------------------------------------------------------------------------------------------


def simulate(
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    rounds: int,
    count: int,
    steps: int,
    unseen: int,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, list[list[float]]]:
    """Strategy → a list a seed of the mIoU after every round, the first before any choice."""
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    test = [found for n in range(unseen) for found in scans(KINDS[n % len(KINDS)], (9_000_000, n), -1, 1)]
    for seed in seeds:
        pool = make_pool(seed)
        start = [index for index, each in enumerate(pool) if each.place == 0][:FIRST]
        with tempfile.TemporaryDirectory() as folder:
            first = fit([pool[i] for i in start], Path(folder) / "first", seed=seed, steps=2 * steps)
            begin = measure(first, test)
            say(f"seed {seed}  {'at first':12}  {FIRST:2} panoramas of  1 places  mIoU {begin:.3f}")
            for name in names:
                labelled, bundle, found = list(start), first, [begin]
                order = np.random.default_rng((seed, 2)).permutation(len(pool)).tolist()
                for number in range(1, rounds + 1):
                    began = time.perf_counter()
                    left = [i for i in order if i not in labelled]
                    strategy = STRATEGIES[name]
                    if strategy is None:
                        labelled += left[:count]
                    else:
                        labelled += choose(pool, left, bundle, labelled, strategy, count=count)
                    learned = [pool[i] for i in labelled]
                    bundle = fit(learned, Path(folder) / f"{name}-{number}", seed=seed, steps=steps, load=bundle)
                    found.append(measure(bundle, test))
                    places = len({pool[i].place for i in labelled})
                    say(
                        f"seed {seed}  {name:12}  {len(labelled):2} panoramas of {places:2} places  "
                        f"mIoU {found[-1]:.3f}  {time.perf_counter() - began:.0f} s"
                    )
                runs[name].append(found)
                say(f"seed {seed}  {name:12}  {json.dumps([round(miou, 5) for miou in found])}")
    return runs


def make_pool(seed: int) -> list[Scan]:
    """Scans of a town: some places many times, from one step aside and turned; others once."""
    kinds = [*STREETS, *((kind, 1) for kind, places in SINGLES.items() for _ in range(places))]
    return [
        found for place, (kind, times) in enumerate(kinds) for found in scans(kind, (seed, 77, place), place, times)
    ]


def scans(kind: str, seed: tuple[int, ...], place: int, times: int) -> list[Scan]:
    """Scans of the scene of a seed; between them the tripod moves by up to 1.4 m and turns."""
    mesh = build_scene(seed, kind=kind).mesh
    found = []
    for number in range(times):
        rng = np.random.default_rng((*seed, number, 3))
        step = np.array([*rng.uniform(-1.0, 1.0, 2), 0.0], np.float32)
        scanner = Scanner(elevation=ELEVATION, yaw=float(rng.uniform(0, 360)))
        moved = replace(mesh, triangles=mesh.triangles - step) if number else mesh
        scan = scanner.scan(moved, size_hw=panorama_size(WIDTH, ELEVATION), seed=(*seed, number))
        found.append(Scan(image=scan.image, label_map=scan.label_map, place=place))
    return found


def choose(
    pool: Sequence[Scan],
    left: Sequence[int],
    bundle: ModelBundle,
    labelled: Sequence[int],
    strategy: Strategy,
    *,
    count: int,
) -> list[int]:
    """What `training.acquisition.rank` chooses, from scans in memory; of equal ones the first ones of `left`."""
    counts = sum(np.bincount(pool[i].label_map.ravel(), minlength=256) for i in labelled)
    shares = {label_id: float(pixels) for label_id, pixels in enumerate(counts)}
    jury = Jury([bundle], shares=shares, device="cpu", measure=strategy.measure or "entropy")
    looks = [jury.look(pool[i].image) for i in left]
    scores = np.array([look.score for look in looks]) if strategy.measure is not None else np.ones(len(looks))
    if not strategy.novelty:
        return [left[index] for index in np.argsort(-scores, kind="stable")[:count]]
    picks = pick(
        scores,
        np.array([look.description for look in looks]),
        count=count,
        known=np.array([jury.look(pool[i].image).description for i in labelled]),
    )
    return [left[index] for index, _ in picks]


def fit(scans: Sequence[Scan], path: Path, *, seed: int, steps: int, load: ModelBundle | None = None) -> ModelBundle:
    """Train a network, from scratch or going on from a bundle."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 5))
    schema = LabelSchema.default()
    size_hw = int(SCALE * scans[0].image.shape[0]), int(SCALE * WIDTH)
    images = torch.from_numpy(
        np.stack([resize_image(s.image, size_hw, resample="valid-area", encoding="normals") for s in scans])
    ).permute(0, 3, 1, 2).float() / 255  # fmt: skip
    targets = torch.from_numpy(np.stack([schema.class_map(resize_label_map(s.label_map, size_hw)) for s in scans]))
    share = np.bincount(targets.numpy().ravel(), minlength=len(schema.classes))[: len(schema.classes)]
    loss = make_loss("ce+dice", weights=class_weights(share / share.sum()))
    model = UNet(Architecture(classes=len(schema.classes), base_width=BASE_WIDTH)) if load is None else load_model(load)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK, total_steps=steps)
    deck: list[int] = []
    for _ in range(steps):
        while len(deck) < _BATCH:
            deck += rng.permutation(len(scans)).tolist()
        drawn, deck = deck[:_BATCH], deck[_BATCH:]
        batch, target = _turned(images[drawn], targets[drawn], rng)
        optimizer.zero_grad()
        whole = to_view_frame(batch, torch.zeros(_BATCH, 2), size_hw, AZIMUTH)
        loss(model(whole), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    manifest = Manifest(
        name="selection",
        version=1,
        architecture=model.architecture,
        labels=schema,
        label_ids=schema.class_ids,
        scale=SCALE,
        resample="valid-area",
        encoding="normals",
        aspect=WIDTH / scans[0].image.shape[0],
        elevation=ELEVATION,
        azimuth=AZIMUTH,
        frame="view",
    )
    return save_bundle(path, model.eval(), manifest)


def _turned(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    columns = torch.from_numpy(rng.integers(0, images.shape[3], len(images)).astype(np.float32))
    images, targets = yaw(images, targets, columns, AZIMUTH)
    return mirror(images, targets, torch.from_numpy(rng.random(len(images)) < 0.5), AZIMUTH)


def measure(bundle: ModelBundle, test: Sequence[Scan]) -> float:
    """mIoU on scenes of other places, at full size."""
    schema = LabelSchema.default()
    predictor = Predictor(bundle, device="cpu", precision="fp32")
    total = np.zeros((len(schema.classes),) * 2, np.int64)
    for each in test:
        predicted = schema.class_map(predictor.predict(each.image).label_map)
        total += confusion_matrix(schema.class_map(each.label_map), predicted, len(schema.classes))
    return float(score(total, schema.class_ids).miou)


# --- what it shows ----------------------------------------------------------------------------------------------------


def summary(runs: Mapping[str, Sequence[Sequence[float]]], *, count: int) -> Result:
    """Means and spreads over the seeds, and how many panoramas reach what random choice reaches at its end."""
    curves = {name: np.array(found) for name, found in runs.items()}
    labelled = [FIRST + count * number for number in range(curves[RANDOM].shape[1])]
    target = float(curves[RANDOM][:, -1].mean())
    return {
        "labelled": labelled,
        "mean": {name: curve.mean(axis=0).tolist() for name, curve in curves.items()},
        "spread": {name: curve.std(axis=0, ddof=min(1, len(curve) - 1)).tolist() for name, curve in curves.items()},
        "better": {
            name: int((curve[:, 1:].mean(axis=1) > curves[RANDOM][:, 1:].mean(axis=1)).sum())
            for name, curve in curves.items()
            if name != RANDOM
        },
        "seeds": len(curves[RANDOM]),
        "target": target,
        "needed": {name: needed(labelled, curve.mean(axis=0).tolist(), target) for name, curve in curves.items()},
        "gain": {
            name: float((curve - curves[RANDOM])[:, 1:].mean()) for name, curve in curves.items() if name != RANDOM
        },
        "intervals": {
            name: intervals(curve, curves[RANDOM], labelled) for name, curve in curves.items() if name != RANDOM
        },
    }


def intervals(curve: NDArray[np.float64], random: NDArray[np.float64], labelled: Sequence[int]) -> Result:
    """A bootstrap over the seeds: both curves of a seed are drawn together, so what the seeds have in common cancels.

    Args:
        curve: (S, R) mIoU of every seed after every round.
        random: (S, R) the same of random choice.
        labelled: R numbers of panoramas.

    Returns:
        `needed`: bounds of the panoramas that reach what random choice reaches at its end, None where more are needed
        than there are; `gain`: bounds of the mean difference of the rounds.
    """
    drawn = np.random.default_rng(0).integers(0, len(curve), (DRAWS, len(curve)))
    means, others = curve[drawn].mean(axis=1), random[drawn].mean(axis=1)
    counts = [needed(labelled, mean, other[-1]) for mean, other in zip(means.tolist(), others, strict=True)]
    bounds = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    found = np.quantile([np.inf if n is None else n for n in counts], bounds, method="inverted_cdf")
    return {
        "needed": [float(bound) if np.isfinite(bound) else None for bound in found],
        "gain": np.quantile((means - others)[:, 1:].mean(axis=1), bounds).tolist(),
    }


def needed(labelled: Sequence[int], miou: Sequence[float], target: float) -> float | None:
    """How many panoramas first reach a mIoU, interpolated between the rounds; None where it is not reached."""
    for place, value in enumerate(miou):
        if value >= target:
            if place == 0:
                return float(labelled[0])
            share = (target - miou[place - 1]) / (value - miou[place - 1])
            return labelled[place - 1] + share * (labelled[place] - labelled[place - 1])
    return None


def needed_lines(found: Result) -> list[str]:
    """The conclusion in words."""
    last = found["labelled"][-1]
    lines = [f"- {RANDOM}: mIoU {found['target']:.3f} with {last} panoramas"]
    for name, count in found["needed"].items():
        if name != RANDOM:
            reached = "not reached" if count is None else f"reached with {count:.1f} panoramas"
            between = [f"more than {last}" if n is None else f"{n:.1f}" for n in found["intervals"][name]["needed"]]
            low, high = found["intervals"][name]["gain"]
            lines.append(
                f"- {name}: {reached} ({LEVEL:.0%} interval {between[0]} to {between[1]}); the mean of its rounds is "
                f"{found['gain'][name]:+.3f} from random's ({low:+.3f} to {high:+.3f}), above it for "
                f"{found['better'][name]} of {found['seeds']} seeds"
            )
    return lines


def table(found: Result) -> str:
    """Markdown: a column a round."""
    head = "| labelled | " + " | ".join(map(str, found["labelled"])) + " |"
    rows = [
        f"| {name} | "
        + " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, found["spread"][name], strict=True))
        + " |"
        for name, mean in found["mean"].items()
    ]
    return "\n".join([head, "|---|" + "---|" * len(found["labelled"]), *rows])


def curve(found: Result) -> str:
    """An SVG of the means, with bands of one standard deviation."""
    width, height, edge = 640, 400, 56
    labelled = found["labelled"]
    values = [m + sign * s for name in found["mean"] for m, s in zip(found["mean"][name], found["spread"][name], strict=True) for sign in (-1, 1)]  # fmt: skip  # noqa: E501
    low, high = min(values), max(values)

    def place(count: float, miou: float) -> str:
        x = edge + (count - labelled[0]) / (labelled[-1] - labelled[0]) * (width - 2 * edge)
        y = height - edge - (miou - low) / max(high - low, 1e-9) * (height - 2 * edge)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for name, color in zip(found["mean"], COLORS, strict=False):
        mean, spread = found["mean"][name], found["spread"][name]
        upper = [place(n, m + s) for n, m, s in zip(labelled, mean, spread, strict=True)]
        lower = [place(n, m - s) for n, m, s in zip(labelled, mean, spread, strict=True)]
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{color}" opacity="0.15"/>')
        line = " ".join(place(n, m) for n, m in zip(labelled, mean, strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = place(labelled[-1], mean[-1]).split(",")
        parts.append(f'<text x="{x}" y="{y}" dx="-4" dy="-6" text-anchor="end" fill="{color}">{name}</text>')
    for count in labelled:
        x, _ = place(count, low).split(",")
        parts.append(f'<text x="{x}" y="{height - edge + 20}" text-anchor="middle">{count}</text>')
    for miou in (low, (low + high) / 2, high):
        _, y = place(labelled[0], miou).split(",")
        parts.append(f'<text x="{edge - 8}" y="{y}" text-anchor="end">{miou:.2f}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">panoramas labelled; mIoU above</text>')
    style = "font-family:sans-serif;font-size:12px"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}">'
    return f"{frame}{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    main()
