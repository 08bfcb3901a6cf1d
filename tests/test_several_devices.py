"""The example of several devices, with processes of the CPU: the pictures are the same however many draw them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parent.parent / "examples/several_devices.py"


def drawn(out, workers):
    command = [sys.executable, str(EXAMPLE), str(out), "--workers", str(workers), "--num", "5", "--steps", "3"]
    done = subprocess.run([*command, "--batch-size", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out / "samples.safetensors"), json.loads((out / "manifest.json").read_text())


@pytest.mark.slow
def test_the_pictures_are_the_same_however_many_draw_them(tmp_path):
    alone, _ = drawn(tmp_path / "alone", 1)
    together, manifest = drawn(tmp_path / "together", 2)
    assert together["index"].tolist() == list(range(5))
    assert [each["config"]["indices"] for each in manifest["workers"]] == [[0, 1], [2, 3, 4]]
    assert float(alone["activation"].std()) > 0
    for name, tensor in alone.items():
        assert torch.equal(together[name], tensor), name
