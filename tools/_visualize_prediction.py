"""Overlays of the test set: data/test/imgs with data/test/masks and data/test/predictions."""

import sys
from pathlib import Path

from tools.habit import visualize

if __name__ == "__main__":
    sys.exit(visualize(Path("data/test")))
