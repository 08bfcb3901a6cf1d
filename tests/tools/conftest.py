"""The scripts are no package (they are not installed): their folders go on the path, as tools/train_all.sh does."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
sys.path.append(str(ROOT / "benchmarks"))
