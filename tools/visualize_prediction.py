"""Overlays of data/imgs with data/masks and data/predictions, into data/overlays."""

import sys
from pathlib import Path

from tools.habit import visualize

if __name__ == "__main__":
    sys.exit(visualize(Path("data")))
