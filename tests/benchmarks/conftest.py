import sys
from pathlib import Path

# The benchmarks are not installed with the packages: they run from a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
