"""A LabelMe 3.0 archive of CVAT into data/imgs and data/masks."""

import sys
from pathlib import Path

from tools.habit import convert

if __name__ == "__main__":
    sys.exit(convert(Path("data")))
