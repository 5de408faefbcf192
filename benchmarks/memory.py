"""Memory of a training step as it is counted beforehand, beside the peak that a process of its own has in such a step.

    python -m benchmarks.memory [--device cuda] [--json]
    python -m benchmarks.memory --eight-gigabytes [--json]

The first compares small and middle-sized steps of all kinds, in a few minutes on two cores. The second plans training
on panoramas of 8192x4096 at scale 0.2, 0.5 and 1.0 within 8 GB as `sscloud train` would, and takes the planned steps:
minutes each on a processor. Counted must not be below measured, and not far above. Tables are Markdown; with --json,
the last line holds everything.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.one_request import extra_peak
from sscloud.architecture import Architecture
from sscloud.unet import UNet
from training.losses import make_loss
from training.memory import plan, step_bytes

ROOT = Path(__file__).resolve().parent.parent

Result = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A training step."""

    size_hw: tuple[int, int]
    """Of the images that enter the network."""
    batch_size: int = 1
    base_width: int = 32
    classes: int = 6
    has_seam: bool = True
    """Whether the images show all columns, so that the network wraps."""
    checkpointing: bool = False
    amp: bool = False

    @property
    def architecture(self) -> Architecture:
        """Of the network."""
        return Architecture(classes=self.classes, base_width=self.base_width)


CASES = (
    Case(size_hw=(409, 819)),
    Case(size_hw=(409, 819), base_width=64),
    Case(size_hw=(409, 819), checkpointing=True),
    Case(size_hw=(409, 819), base_width=64, checkpointing=True),
    Case(size_hw=(409, 819), classes=68),
    Case(size_hw=(409, 819), classes=68, checkpointing=True),
    Case(size_hw=(512, 1024), has_seam=False),
    Case(size_hw=(512, 1024), batch_size=2, has_seam=False, checkpointing=True),
    Case(size_hw=(819, 1638), base_width=16),
    Case(size_hw=(819, 1638), base_width=16, checkpointing=True),
    Case(size_hw=(409, 819), base_width=16, amp=True),
    Case(size_hw=(409, 819), base_width=16, amp=True, checkpointing=True),
)

FULL_HW = (4096, 8192)
EIGHT_GIGABYTES = 8_000_000_000
SCALES = (0.2, 0.5, 1.0)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--eight-gigabytes", action="store_true", help="the steps planned for 8192x4096 within 8 GB instead"
    )
    parser.add_argument(
        "--base-width", type=int, default=64, metavar="CHANNELS", help="of the planned steps (default: 64)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object in the last line")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measured(Case(**json.loads(args.measure)), args.device))
        return
    cases = planned(args.base_width) if args.eight_gigabytes else CASES
    rows = compare(cases, args.device)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "device": args.device, "cases": rows}))


def planned(base_width: int) -> list[Case]:
    """The steps that are planned for 8192x4096 within 8 GB; prints the plans."""
    cases = []
    for scale in SCALES:
        architecture = Case(size_hw=FULL_HW, base_width=base_width).architecture
        found = plan(architecture, full_hw=FULL_HW, available=EIGHT_GIGABYTES, amp=False, scale=scale)
        print(f"{found.describe()}\n")
        case = Case(
            size_hw=found.size_hw,
            batch_size=found.batch_size,
            base_width=base_width,
            has_seam=found.has_seam,
            checkpointing=found.checkpointing,
        )
        cases.append(case)
    return list(dict.fromkeys(cases))  # two scales may need the same step


def compare(cases: Sequence[Case], device: str) -> list[Result]:
    """Counted and measured bytes of every case; prints a table."""
    print("| width | classes | size | batch | seam | checkpointing | amp | counted, MB | measured, MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases:
        counted, peak = counted_bytes(case), run(case, device)
        rows.append({**asdict(case), "counted": counted, "measured": peak, "ratio": counted / peak})
        height, width = case.size_hw
        flags = (case.has_seam, case.checkpointing, case.amp)
        print(
            f"| {case.base_width} | {case.classes} | {width}x{height} | {case.batch_size} | "
            f"{' | '.join('yes' if flag else 'no' for flag in flags)} | {counted / 1e6:.0f} | {peak / 1e6:.0f} | "
            f"{counted / peak:.2f} |",
            flush=True,
        )
    return rows


def counted_bytes(case: Case) -> int:
    """What training would reckon with."""
    return step_bytes(
        case.architecture,
        case.batch_size,
        case.size_hw,
        amp=case.amp,
        checkpointing=case.checkpointing,
        has_seam=case.has_seam,
    )


def run(case: Case, device: str) -> int:
    """Bytes that a process of its own measures."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps(asdict(case)), "--device", device]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def measured(case: Case, device: str) -> int:
    """The peak of the steps beyond what the process had before; on a GPU, of what PyTorch allocates there."""
    _steps(Case(size_hw=(32, 64), base_width=4), device)  # loads what is loaded when it is needed
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _steps(case, device)
        return torch.cuda.max_memory_allocated() - before
    return extra_peak(lambda: _steps(case, device))[1]


def _steps(case: Case, device: str) -> None:
    torch.manual_seed(0)
    model = UNet(case.architecture).to(device)
    model.checkpointing = case.checkpointing
    loss = make_loss("ce+dice", weights=torch.ones(case.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for height, width in ((32, 64), case.size_hw):  # a small step first: the moments of AdamW are there from then on
        images = torch.randint(256, (case.batch_size, 3, height, width), dtype=torch.uint8, device=device)
        class_maps = torch.randint(case.classes, (case.batch_size, height, width), dtype=torch.uint8, device=device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=case.amp):
            inputs = (images.float() / 255).to(memory_format=torch.channels_last)
            value = loss(model(inputs, wrap=case.has_seam), class_maps)
        value.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
