"""The old habit `python train.py --epochs 50 --batch-size 1 --scale 0.1 --amp --classes 68`.

Trains on data/imgs and data/masks and writes checkpoints/checkpoint_epochN.pth, with the conventions of
milesial/Pytorch-UNet (bicubic scaling, no wrapping, no augmentation), so that those files mean the same to its
predict.py and to ours. Every flag of `sscloud train` works; `sscloud train data` itself trains better models.
"""

import sys
from pathlib import Path

from tools.cli import load, run_command


def main() -> int:
    """Run `sscloud train data` with the old conventions."""
    defaults = ["data", "--no-wrap", "--no-augment", "--resample", "bicubic", "--pth-checkpoints", "checkpoints"]
    return run_command(load("train"), [*defaults, *sys.argv[1:]], prog=f"python tools/{Path(__file__).name}")


if __name__ == "__main__":
    sys.exit(main())
