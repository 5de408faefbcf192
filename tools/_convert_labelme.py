"""A LabelMe 3.0 archive of CVAT into the test set, data/test/imgs and data/test/masks."""

import sys
from pathlib import Path

from tools.habit import convert

if __name__ == "__main__":
    sys.exit(convert(Path("data/test")))
