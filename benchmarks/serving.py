"""A request to the served function, beside what people serve instead: time, memory, size of the answer, equal pixels.

    python -m benchmarks.serving [--classes 6,68] [--width 8192] [--reference CHECKOUT] [--json]
    python -m benchmarks.serving --growth
    python -m benchmarks.serving --throughput

Both sides answer the same request (JSON with a JPEG in base64) with the same weights, from its bytes to the bytes that
Nuclio's wrapper sends, each measurement in a process of its own, in turns. Ratios are of processor time, which a busy
machine disturbs least, and of the quickest of all rounds. `benchmarks.reference` is the other side;
`benchmarks.scenes` makes picture and weights. Tables are Markdown; with --json, the last line holds everything.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scenes
from benchmarks.one_request import SMALL
from benchmarks.reference import work_tree
from sscloud.architecture import STRIDE
from sscloud.errors import BundleError
from tools.function_folder import package

ROOT = Path(__file__).resolve().parent.parent

STAGES = ("event", "parse", "decode", "resize", "forward", "upsample", "regions", "answer", "encode")

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which our function is run."""

    name: str
    """Library and precision, as in the tables."""
    environment: Mapping[str, str]
    """The function's settings."""
    calibrated: bool = False
    """Whether it is packaged with ranges for int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a ratio is to reach."""

    ratio: str
    """Its name in a case's ratios."""
    what: str
    """As in the table."""
    wanted: Mapping[int, float]
    """By number of classes."""
    at_most: bool = False
    """Whether less is better."""
    width: int = 8192
    """Of the picture it was set for."""
    forward: bool = False
    """Whether the forward pass decides, and with it what the processor multiplies quickly."""


TARGETS = (
    Target(ratio="end to end", what="end to end", wanted={6: 12, 68: 18}, forward=True),
    Target(ratio="end to end", what="end to end", wanted={6: 8, 68: 20}, width=4096, forward=True),
    Target(ratio="forward", what="forward alone", wanted={6: 3.5, 68: 3.5}, forward=True),
    Target(ratio="class map", what="upsample + argmax alone", wanted={6: 30, 68: 50}),
    Target(ratio="class map MB", what="its extra memory, MB", wanted={6: 220, 68: 220}, at_most=True),
    Target(ratio="class map equal", what="its pixels as the reference's", wanted={6: 1, 68: 1}),
    Target(ratio="answer", what="regions + answer bytes", wanted={6: 35, 68: 35}),
    Target(ratio="peak", what="peak memory of the process", wanted={6: 0.5, 68: 0.13}, at_most=True),
    Target(ratio="answer bytes", what="size of the answer", wanted={6: 1 / 3, 68: 1 / 5}, at_most=True),
    Target(ratio="crops", what="sum of crops", wanted={6: 1 / 3, 68: 1 / 5}, at_most=True),
    Target(ratio="equal", what="pixels as the reference's", wanted={6: 0.99999, 68: 0.99999}),
)
LEAN_FORWARD = 5.0
"""What the forward pass is to reach without PyTorch."""
REDUCED_EQUAL = {6: 0.9995, 68: 0.999}
"""Equal pixels wanted in less than single precision."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--classes", type=_numbers, default=(6, 68), metavar="N,N", help="numbers of classes (default: 6,68)"
    )
    parser.add_argument(
        "--width", type=int, default=8192, metavar="PIXELS", help="of the panorama; half of it follows (default: 8192)"
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="measurements of each kind (default: 1)")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="CHECKOUT",
        help="a checkout of milesial/Pytorch-UNet (bare or not), to measure the real thing beside what is written here",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep pictures and models there (default: made anew each time)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="of both sides: cpu or cuda (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object in the last line")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--growth", action="store_true", help="how cost grows with the request instead; takes longer")
    which.add_argument("--throughput", action="store_true", help="pictures a second of several workers instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        cache = args.cache or Path(folder) / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(folder) / "work"
        work.mkdir()
        bench = Bench(cache=cache, work=work, device=args.device, rounds=args.rounds)
        if args.growth:
            found = bench.growth(args.width, args.classes[0])
        elif args.throughput:
            found = bench.throughput(args.width, args.classes[0])
        else:
            found = bench.compare(args.width, args.classes, args.reference)
    if args.json:
        print(json.dumps(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the benchmark works, and how."""

    cache: Path
    """Pictures and models."""
    work: Path
    """What processes hand on."""
    device: str
    rounds: int

    def compare(self, width: int, classes: Sequence[int], checkout: Path | None) -> Result:
        """Both sides, at a width and at half of it, and what CVAT pays; prints the tables."""
        if checkout is not None:
            checkout = work_tree(checkout, self.work / "original")
        self.picture(SMALL)
        machine = self.machine(width)
        models = scenes.models(self.cache, classes, width)
        cases = []
        for size in (width, width // 2):
            for count in classes:
                cases.append(self.case(size, models[count], machine, checkout, whole=size == width))
                print_case(cases[-1])
        return {"machine": machine, "cases": cases}

    def case(self, width: int, model: scenes.Model, machine: Result, checkout: Path | None, *, whole: bool) -> Result:
        """One picture and one model: every way's ratios to the reference, and all that was measured.

        Args:
            width: of the picture.
            model: what is served.
            machine: of `machine`.
            checkout: the original's work tree, or None.
            whole: whether CVAT's part and the class map alone are measured too.
        """
        picture, small = self.picture(width), self.picture(SMALL)
        classes = len(model.names)
        functions = {}
        ways = []
        for way in self.ways(machine):
            try:
                functions[way.name] = self.function(model, way)
            except BundleError as error:  # weights that nobody trained need not bear 8 bits
                print(f"{way.name} is left out: {error}\n")
            else:
                ways.append(way)
        runs: dict[str, list[Result]] = {}
        for _ in range(self.rounds):
            for name in ("reference", *(["original"] if checkout else []), *(way.name for way in ways)):
                common: dict[str, Any] = {
                    "image": str(picture),
                    "small": str(small),
                    "save": str(self.folder(name)),
                    "device": self.device,
                }
                if name in ("reference", "original"):
                    result = run(
                        "reference",
                        **common,
                        checkpoint=str(model.checkpoint),
                        names=model.names,
                        scale=scenes.SCALE,
                        checkout=str(checkout) if name == "original" else None,
                    )
                else:
                    way = next(way for way in ways if way.name == name)
                    result = run("ours", **common, folder=str(functions[name]), environment=way.environment)
                runs.setdefault(name, []).append(result)
        sides = {name: best_of(results) for name, results in runs.items()}
        wanted = np.load(self.folder("reference") / "map.npy")
        for name, side in sides.items():
            side.update(likeness(np.load(self.folder(name) / "map.npy"), wanted))
            if whole:
                side["cvat"] = run("cvat", answer=str(self.folder(name) / "answer.json"))
        if whole:
            self.class_maps(sides, picture, model, (width // 2, width))
        return {
            "width": width,
            "classes": classes,
            "sides": sides,
            "ratios": {way.name: ratios(sides["reference"], sides[way.name]) for way in ways},
            "targets": {way.name: judged(sides, way.name, classes, machine, width) for way in ways},
            "floor": floor(machine, classes, width),
        }

    def class_maps(
        self, sides: dict[str, Result], picture: Path, model: scenes.Model, size_hw: tuple[int, int]
    ) -> None:
        """Upsampling and argmax alone, of the same logits, put to the sides as `class map`."""
        source = self.work / "logits.npy"
        run("logits", checkpoint=str(model.checkpoint), scale=scenes.SCALE, image=str(picture), save=str(source))
        found: dict[str, list[Result]] = {}
        for _ in range(self.rounds):
            for way in ("reference", "ours"):
                save = str(self.work / f"{way}-map.npy")
                found.setdefault(way, []).append(
                    run("upsample", way=way, source=str(source), size_hw=size_hw, save=save)
                )
        maps = [np.load(self.work / f"{way}-map.npy") for way in found]
        equal = float((maps[0] == maps[1]).mean())
        for name, side in sides.items():
            way = "reference" if name in ("reference", "original") else "ours"
            side["class map"] = {
                "seconds": min(result["seconds"] for result in found[way]),
                "extra": max(result["extra"] for result in found[way]),
                "equal": equal,
            }

    def growth(self, width: int, classes: int) -> Result:
        """How stages and memory grow with the picture, the classes, the scale and the noise; prints a table."""
        counts = sorted({2, classes, 20, 68, 255})
        models = scenes.models(self.cache, counts, width)
        function = self.function(models[classes], self.ways({"bf16_flops": None})[0])
        half = self.picture(width // 2)
        kinds: list[tuple[str, Path, Path, float]] = []
        for size in (width // 8, width // 4, width // 2, width, 2 * width):
            if int(scenes.SCALE * (size // 2)) < STRIDE:
                continue  # the network refuses it
            kinds.append((f"{size} wide", function, self.picture(size), 0.0))
        for count in counts:
            folder = self.function(models[count], self.ways({"bf16_flops": None})[0])
            kinds.append((f"{count} classes", folder, self.picture(width), 0.0))
        for scale in (0.1, 0.2, 0.4, 0.7, 1.0):
            scaled = scenes.at_scale(models[classes], self.work / f"scale-{scale}", scale)
            folder = self.function(scaled, self.ways({"bf16_flops": None})[0])
            kinds.append((f"scale {scale}, {width // 2} wide", folder, half, 0.0))
        for noise in (0.0, 0.001, 0.01, 0.05):
            kinds.append((f"noise {noise:.1%}", function, self.picture(width), noise))
        rows = []
        environment = {"SSCLOUD_DEVICE": self.device}
        for name, folder, image, noise in kinds:
            found = run("grown", environment=environment, folder=str(folder), image=str(image), noise=noise)
            rows.append({"what": name, **found})
        shown_stages = [stage for stage in STAGES if stage in rows[0]["stages"]]
        print_table(
            ["", *(f"{stage}, s" for stage in shown_stages), "peak, MB", "regions", "answer, MB"],
            (
                [
                    row["what"],
                    *(f"{row['stages'].get(stage, 0) / 1000:.3f}" for stage in shown_stages),
                    f"{row['peak'] / 1e6:.0f}",
                    str(row["regions"]),
                    f"{row['answer'] / 1e6:.1f}",
                ]
                for row in rows
            ),
        )
        return {"growth": rows}

    def throughput(self, width: int, classes: int) -> Result:
        """Pictures a second of one and two workers, and of `sscloud predict`; prints a table."""
        picture = self.picture(width)
        model = scenes.models(self.cache, [classes], width)[classes]
        rows = []
        for way in self.ways({"bf16_flops": None})[:2]:
            for workers in (1, 2):
                rows.append({"what": f"{way.name}, {workers} workers", **self.workers(model, way, picture, workers)})
        rows.append({"what": "sscloud predict", **self.predict(model, picture)})
        print_table(
            ["", "pictures/s", "peak of each process, MB"],
            ([row["what"], f"{row['rate']:.2f}", f"{row['peak'] / 1e6:.0f}"] for row in rows),
        )
        return {"throughput": rows}

    def workers(self, model: scenes.Model, way: Way, picture: Path, workers: int, *, count: int = 6) -> Result:
        """Several workers, each as Nuclio would start it, on the same cores at the same time."""
        arguments = {"folder": str(self.function(model, way)), "image": str(picture), "count": count}
        running = []
        for _ in range(workers):  # loading one after the other, as Nuclio does
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.one_request", "worker", json.dumps(arguments)],
                env={**os.environ, **way.environment},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            running.append(process)
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit(f"A worker of {way.name} did not start.")
        started = time.perf_counter()
        for process in running:
            if process.stdin is not None:
                process.stdin.write("\n")
                process.stdin.flush()
        results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        spent = time.perf_counter() - started
        return {"rate": workers * count / spent, "peak": max(result["peak"] for result in results)}

    def predict(self, model: scenes.Model, picture: Path) -> Result:
        """`sscloud predict` of a folder; loading it is left out by the difference of a long and a short folder."""
        spent = {}
        peak = 0
        for count in (2, 8):
            folder = self.work / f"predict-{count}"
            folder.mkdir()
            for number in range(count):
                (folder / f"{number}.jpg").symlink_to(picture.resolve())
            started = time.perf_counter()
            found = run(
                "program",
                arguments=["predict", str(model.bundle), str(folder), "-o", str(self.work / f"masks-{count}")],
            )
            spent[count] = time.perf_counter() - started
            peak = found["peak"]
        return {"rate": 6 / (spent[8] - spent[2]), "peak": peak}

    def picture(self, width: int) -> Path:
        """The panorama of a width."""
        return scenes.picture(self.cache, width)

    def folder(self, name: str) -> Path:
        """Where one side leaves what it made."""
        path = self.work / name.replace(" ", "-")
        path.mkdir(exist_ok=True)
        return path

    def function(self, model: scenes.Model, way: Way) -> Path:
        """A model's packaged function."""
        folder = self.work / f"function-{model.bundle.parent.name}{'-int8' * way.calibrated}"
        if not folder.exists():
            if way.calibrated:
                from tools import openvino_check  # openvino is optional

                # These weights were never trained: their logits lie closer together, and rounding changes more of them.
                openvino_check.LEAST_EQUAL = 0.98
                image = scenes.fitted_on(self.cache, model.width)[0]
                package(model.bundle, folder, name="benchmark", backend="openvino", calibrate=[image])
            else:
                package(model.bundle, folder, name="benchmark")
        return folder

    def ways(self, machine: Result) -> list[Way]:
        """How our function can be run here."""

        def way(library: str, precision: str, *, calibrated: bool = False) -> Way:
            settings = {"PRECISION": precision, "BACKEND": library, "DEVICE": self.device}
            environment = {f"SSCLOUD_{name}": value for name, value in settings.items()}
            return Way(name=f"{library} {precision}", environment=environment, calibrated=calibrated)

        if self.device != "cpu":
            return [way("torch", precision) for precision in ("fp32", "fp16", "bf16")]
        precisions = ["fp32", "bf16"] if machine["bf16_flops"] else ["fp32"]
        ways = [way("torch", precision) for precision in precisions]
        if installed("openvino"):
            ways += [way("openvino", precision) for precision in precisions]
            ways.append(way("openvino", "int8", calibrated=True))
        return ways

    def machine(self, width: int) -> Result:
        """What the machine is and can do; prints it."""
        found = run("machine", image=str(self.picture(width)), device=self.device)
        found |= {
            "width": width,
            "device": self.device,
            "processor": found["gpu"] or processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        found["versions"] = {
            name: installed(name)
            for name in ("torch", "openvino", "numpy", "opencv-python-headless", "Pillow", "simplejpeg", "nuclio-sdk")
        }
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
        rates = f"{found['fp32_flops'] / 1e9:.0f} GFLOP/s in fp32"
        rates += f", {found['bf16_flops'] / 1e9:.0f} in bf16" if found["bf16_flops"] else ", bf16 not in hardware"
        print(
            f"{found['processor']}, {found['cores']} cores ({', '.join(found['features'])}); Python {found['python']}, "
            f"{versions}. One core's matrix products: {rates}; copies: {found['bytes_per_s'] / 1e9:.0f} GB/s.\n"
        )
        return found


def run(task: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> Result:
    """A task of `benchmarks.one_request` in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_request", task, json.dumps(arguments)],
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{task} {arguments} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def best_of(results: Sequence[Result]) -> Result:
    """The quickest of some runs, by processor time, with the quickest of each stage and the largest peak."""
    best = dict(min(results, key=lambda result: result["seconds"]))
    best["wall"] = min(result["wall"] for result in results)
    best["peak"] = max(result["peak"] for result in results)
    best["stages"] = {
        stage: min(result["stages"][stage] for result in results) / 1000 for stage in STAGES if stage in best["stages"]
    }
    return best


def likeness(found: Any, wanted: Any) -> Result:
    """Share of equal pixels, and the worst intersection over union of a class, of two class maps."""
    pairs = np.bincount(found.ravel().astype(np.int32) * 256 + wanted.ravel(), minlength=256 * 256).reshape(256, 256)
    both = np.diag(pairs)
    union = pairs.sum(0) + pairs.sum(1) - both
    present = pairs.sum(0) > 0
    return {"equal": float(both.sum() / pairs.sum()), "worst_iou": float((both[present] / union[present]).min())}


def ratios(reference: Result, ours: Result) -> dict[str, float]:
    """How many times less processor time ours takes; of what is at most something, ours as a share."""

    def seconds(side: Result, *stages: str) -> float:
        return float(sum(side["stages"].get(stage, 0.0) for stage in stages))

    def times(*stages: str) -> float:
        return seconds(reference, *stages) / seconds(ours, *stages)

    others = [stage for stage in STAGES if stage != "forward"]
    found = {
        "end to end": reference["seconds"] / ours["seconds"],
        "end to end, wall": reference["wall"] / ours["wall"],
        "decode + resize": times("decode", "resize"),
        "forward": times("forward"),
        "upsample": times("upsample"),
        "answer": times("regions", "answer", "encode"),
        "all but forward": times(*others),
        "peak": ours["peak"] / reference["peak"],
        "answer bytes": ours["answer"] / reference["answer"],
        "equal": ours["equal"],
        "worst IoU": ours["worst_iou"],
    }
    if "cvat" in ours:
        found["crops"] = ours["cvat"]["pixels"] / reference["cvat"]["pixels"]
        found["CVAT's time"] = reference["cvat"]["seconds"] / ours["cvat"]["seconds"]
    if "class map" in ours:
        found["class map"] = reference["class map"]["seconds"] / ours["class map"]["seconds"]
        found["class map MB"] = ours["class map"]["extra"] / 1e6
        found["class map equal"] = ours["class map"]["equal"]
    return found


def judged(sides: Mapping[str, Result], way: str, classes: int, machine: Result, width: int) -> list[Result]:
    """Every target that applies to a picture of this width, with what was found."""
    found = ratios(sides["reference"], sides[way])
    rows = []
    for target in TARGETS:
        if target.width != width or classes not in target.wanted:
            continue
        wanted = target.wanted[classes]
        if target.ratio == "forward" and way.startswith("openvino"):
            wanted = LEAN_FORWARD
        if target.ratio == "equal" and not way.endswith("fp32"):
            wanted = REDUCED_EQUAL[classes]
        value = found[target.ratio]
        met = value <= wanted if target.at_most else value >= wanted
        # The targets were set on a processor that multiplies bf16 twice as fast as fp32.
        excused = target.forward and not met and not machine["bf16_flops"] and not way.endswith("int8")
        rows.append(
            {
                "target": target.ratio,
                "what": target.what,
                "wanted": wanted,
                "at_most": target.at_most,
                "found": value,
                "met": met,
                "needs_bf16": excused,
            }
        )
    return rows


def flops(classes: int, size_hw: tuple[int, int]) -> float:
    """Additions and multiplications of the network's convolutions for an input, from its architecture."""
    height, width = size_hw
    total = 0.0
    channels = [64, 128, 256, 512, 1024]
    sizes = [(height >> level, width >> level) for level in range(5)]
    for level, (count, (rows, columns)) in enumerate(zip(channels, sizes, strict=True)):
        inputs = 3 if level == 0 else channels[level - 1]
        total += 2 * 9 * (inputs * count + count * count) * rows * columns
        if level < 4:
            below = sizes[level + 1]
            total += 2 * 4 * (2 * count) * count * below[0] * below[1]  # transposed, 2x2
            total += 2 * 9 * (2 * count * count + count * count) * rows * columns
    return total + 2 * channels[0] * classes * height * width


def floor(machine: Result, classes: int, width: int) -> Result:
    """Seconds that the hardware needs at the least: the network's arithmetic and the Huffman codes.

    On a CPU they are a core's: with two cores, half as many pass on the clock.
    """
    count = flops(classes, (int(scenes.SCALE * (width // 2)), int(scenes.SCALE * width)))
    return {
        "flop": count,
        "fp32": count / machine["fp32_flops"],
        "reduced": count / (machine["bf16_flops"] or machine["fp32_flops"]),
        "huffman": machine["huffman"] * (width / machine["width"]) ** 2,
    }


def print_case(case: Result) -> None:
    """The tables of one case."""
    width, classes, sides = case["width"], case["classes"], case["sides"]
    print(f"### {width}x{width // 2}, {classes} classes\n")
    if any(case["targets"].values()):
        names = list(case["targets"])
        print_table(
            ["", "target", *names],
            (
                [rows[0]["what"], shown_target(rows[0]), *(shown_found(row) for row in rows)]
                for rows in zip(*case["targets"].values(), strict=True)
            ),
        )
    print_table(
        ["processor seconds", *sides],
        [
            *([stage, *(f"{s['stages'].get(stage, 0):.3f}" for s in sides.values())] for stage in STAGES),
            ["end to end", *(f"{s['seconds']:.2f}" for s in sides.values())],
            ["end to end, wall clock", *(f"{s['wall']:.2f}" for s in sides.values())],
            ["first picture of a size", *(f"{s['first']:.2f}" if "first" in s else "" for s in sides.values())],
            ["peak memory, MB", *(f"{s['peak'] / 1e6:.0f}" for s in sides.values())],
            ["answer, MB", *(f"{s['answer'] / 1e6:.1f}" for s in sides.values())],
            ["pixels equal", *(f"{s['equal']:.6f}" for s in sides.values())],
            ["worst class IoU", *(f"{s['worst_iou']:.4f}" for s in sides.values())],
            *(
                [
                    ["crops, Mpx", *(f"{s['cvat']['pixels'] / 1e6:.1f}" for s in sides.values())],
                    ["CVAT reads the answer, s", *(f"{s['cvat']['seconds']:.2f}" for s in sides.values())],
                    ["and takes, MB", *(f"{s['cvat']['extra'] / 1e6:.0f}" for s in sides.values())],
                    ["upsample + argmax alone", *(f"{s['class map']['seconds']:.3f}" for s in sides.values())],
                    ["its extra memory, MB", *(f"{s['class map']['extra'] / 1e6:.0f}" for s in sides.values())],
                ]
                if "cvat" in sides["reference"]
                else []
            ),
        ],
    )
    least = case["floor"]
    for name in case["ratios"]:
        inside = sides[name]["stages"]["forward"]
        elsewhere = sum(sides[name]["stages"].values()) - inside
        arithmetic = least["fp32"] if name.endswith("fp32") else least["reduced"]
        print(
            f"- {name}: {least['flop'] / 1e9:.0f} GFLOP at the rate of matrix products take {arithmetic:.2f} s, "
            f"Huffman codes {least['huffman']:.2f} s. Beyond that are {inside - arithmetic:.2f} s in the forward pass "
            f"and {elsewhere - least['huffman']:.2f} s elsewhere, of {inside + elsewhere:.2f} s."
        )
    print(flush=True)


def shown_target(row: Result) -> str:
    """What was wanted, for people."""
    wanted = row["wanted"]
    return f"{'at most' if row['at_most'] else 'at least'} {shown(row['target'], wanted)}"


def shown_found(row: Result) -> str:
    """What was found, for people."""
    verdict = "yes" if row["met"] else "no (needs bf16 in hardware)" if row["needs_bf16"] else "no"
    return f"{shown(row['target'], row['found'])}: {verdict}"


def shown(ratio: str, value: float) -> str:
    """A value of a ratio, for people."""
    if ratio.endswith("MB"):
        return f"{value:.0f}"
    if ratio.endswith("equal"):
        return f"{100 * value:.4f} %"
    if ratio in ("peak", "answer bytes", "crops"):
        return f"{value:.2f}x"
    return f"{value:.1f}x"


def print_table(head: Sequence[str], rows: Any) -> None:
    """A Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def installed(name: str) -> str | None:
    """A package's version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
