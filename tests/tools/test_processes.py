"""Several processes train one model: gradients are means, an interrupted training continues exactly. Real processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training import seed_step

TOOLS = Path(__file__).parents[2] / "tools"
MEAN_OF_TWO = """
import sys
from dataclasses import dataclass
from pathlib import Path
import torch
from training import average_gradients, run_processes

@dataclass
class Config:
    batch: int

def train(rank, config, precision):
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, 2.0]]) * (1 + rank)
    model.bias.grad = torch.tensor([10.0 * rank])
    extra = average_gradients(model, [float(rank)])
    Path(sys.argv[1], str(rank)).write_text(repr((model.weight.grad.tolist(), model.bias.grad.tolist(), extra, precision)))

if __name__ == "__main__":
    run_processes(train, Config(batch=int(sys.argv[2])), processes=2, precision="float32")
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(TOOLS), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_process_gets_the_mean(tmp_path: Path) -> None:
    script = tmp_path / "mean_of_two.py"
    script.write_text(MEAN_OF_TWO)
    assert run(script, tmp_path, 4).returncode == 0
    assert {(tmp_path / rank).read_text() for rank in "01"} == {repr(([[1.5, 3.0]], [5.0], [0.5], "float32"))}
    uneven = run(script, tmp_path, 3)
    assert uneven.returncode == 1
    assert "a batch of 3 cannot be shared among 2 processes" in uneven.stderr


@pytest.mark.slow
def test_a_shared_training_continues_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num = 12
    np.savez(
        tmp_path / "data.npz",
        fluent_images=rng.integers(0, 256, (num, 64, 64, 3), dtype=np.uint8),
        fluent_heldout=np.zeros(num, bool),
        fluent_category=np.array(["Flags", "Objects", "Objects"] * 4),
        fluent_skin=np.arange(num) % 3 == 2,
    )

    def train(out: str, steps: int) -> dict[str, torch.Tensor]:
        words = ("--data", tmp_path / "data.npz", "--out", tmp_path / out, "--processes", 2, "--batch", 4)
        done = run(TOOLS / "train_prior.py", *words, "--precision", "float32", "--minutes", 600, "--max-steps", steps)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["modules"]["unet"]

    through = train("through", 3)
    train("halted", 1)
    continued = train("halted", 3)
    assert all(torch.equal(through[name], continued[name]) for name in through)
    assert (tmp_path / "halted/model/diffusion_pytorch_model.safetensors").is_file()


def test_no_two_steps_and_no_two_processes_draw_the_same() -> None:
    def first(step: int, rank: int) -> float:
        generator = torch.Generator()
        seed_step(generator, seed=0, step=step, rank=rank)
        return float(torch.rand(1, generator=generator))

    drawn = [first(step, rank) for step in range(5) for rank in range(2)]
    assert len(set(drawn)) == len(drawn)
    assert first(3, 1) == first(3, 1)
