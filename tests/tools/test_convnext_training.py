"""The small ConvNeXt's training: an interrupted one continues exactly, and what it writes is a trunk like any other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiltscope.engine.feature.trunk import load_trunk

TOOLS = Path(__file__).parents[2] / "tools"


def train(data: Path, out: Path, steps: int) -> None:
    words = [
        "--data",
        data,
        "--out",
        out,
        "--batch",
        "4",
        "--num-local",
        "1",
        "--max-steps",
        steps,
        "--minutes",
        "1000000",
    ]
    environment = os.environ | {"PYTHONPATH": str(TOOLS), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TOOLS / "train_convnext.py"), *map(str, words)]
    subprocess.run(command, env=environment, check=True, capture_output=True)


@pytest.mark.slow
def test_an_interrupted_training_gives_the_same_trunk_which_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num = 8
    things = np.array([f"1f{at:03x}" for at in range(num)])
    np.savez(
        tmp_path / "data.npz",
        fluent_images=rng.integers(0, 256, (num, 64, 64, 3), dtype=np.uint8),
        fluent_heldout=np.zeros(num, bool),
        fluent_skin=np.zeros(num, bool),
        fluent_bare=things,
        fluent_category=np.array(["Objects"] * (num - 1) + ["Flags"]),
        other_images=rng.integers(0, 256, (num, 64, 64, 3), dtype=np.uint8),
        other_heldout=np.zeros(num, bool),
        other_bare=things,
    )
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    train(tmp_path / "data.npz", straight, 2)
    train(tmp_path / "data.npz", parted, 1)
    train(tmp_path / "data.npz", parted, 2)
    trunks = [load_trunk(folder / "model", "stages.1.3") for folder in (straight, parted)]
    assert (trunks[0].grid, trunks[0].width) == ((8, 8), 128)
    x0 = torch.from_numpy(rng.uniform(-1, 1, (2, 3, 64, 64))).float()
    one, other = (trunk(x0) for trunk in trunks)
    # The rate is a clock's, and a second of a million minutes is nothing.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float(one.std()) > 0.1
