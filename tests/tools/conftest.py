"""The training scripts are no package (they are not installed): their folder goes on the path, as tools/train_all.sh does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
