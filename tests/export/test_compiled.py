"""The runner compile: one program for every batch, and nothing is ever compiled where it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tiltscope
from tiltscope.engine.errors import RunnerError
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.runtime.compiled_step import open_graph
from tiltscope.engine.runtime.parity import check, measure
from tiltscope.engine.runtime.runners import build_step, step_for
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.export.compiled import compile_graph

ADDRESS = "blocks.1:sae:3"


class Toy(nn.Module):
    """y = tanh(x w), and d sum(y) / dx."""

    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Buffer(torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))

    def forward(self, x):
        y = torch.tanh(x @ self.w)
        return y, (1 - y * y) @ self.w.T


# Loads and runs at batches that were not traced, where there is no compiler; prints what it got, or what was compiled.
ELSEWHERE = """
import os, sys, torch
from torch._dynamo.utils import counters
from tiltscope.engine.runtime.compiled_step import open_graph
graph = open_graph(sys.argv[1])
inputs = torch.load(sys.argv[2])
torch.save([graph(x) for x in inputs], sys.argv[3])
compiled = {name: dict(counters[name]) for name in ("frames", "stats", "inductor", "aot_autograd") if counters[name]}
assert not compiled, compiled
assert not any(os.scandir(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
"""


@pytest.mark.slow
def test_a_program_is_for_any_batch_and_is_never_compiled_again(tmp_path):
    """float32 at batches 1, 2, 3, 8, 64 in a process whose compiler is one that fails, whose cache of kernels stays empty."""
    toy = Toy(torch.float32)
    path = tmp_path / "toy.pt2"
    compile_graph(toy, [torch.zeros(2, 5)], path)
    inputs = [torch.randn(num, 5, generator=torch.Generator().manual_seed(num)) for num in (1, 2, 3, 8, 64)]
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "kernels").mkdir()
    nowhere = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    words = [str(path), str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *words], check=True, env=os.environ | nowhere)
    for x, found in zip(inputs, torch.load(tmp_path / "found.pt"), strict=True):
        for one, other in zip(found, toy(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_machine_without_a_compiler_is_told_so(tmp_path):
    # Not by monkeypatch: undoing that takes the setting away, and the next test's compiler with it.
    import torch._inductor.config

    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with nowhere, pytest.raises(RunnerError, match=r"needs a C\+\+ compiler.*set CXX"):
        compile_graph(Toy(torch.float32), [torch.zeros(2, 5)], tmp_path / "toy.pt2")


def test_a_file_that_is_no_program_is_a_refusal(tmp_path):
    (tmp_path / "guided.pt2").write_bytes(b"no program")
    with pytest.raises(RunnerError, match=r"guided\.pt2 cannot be loaded here"):
        open_graph(tmp_path / "guided.pt2")


@pytest.mark.slow
def test_the_compiled_step_is_the_reference_and_draws_its_pictures(tiny_bundle, tmp_path, monkeypatch):
    """All five graphs, the whole gate, three features and a signed sum, and the pictures of --runner torch."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    bundle = tiltscope.load(str(tiny_bundle))
    feature, other = bundle.feature(ADDRESS), bundle.feature("blocks.1:neuron:2@mean")
    artefact = build_step("compile", bundle.prior, feature, torch.float32)
    assert {path.name for path in artefact.folder.glob("*.pt2")} == {
        f"{name}.pt2" for name in ("unguided", "guided", "measure", "gradient", "pullback")
    }
    from torch._dynamo.utils import counters

    counters.clear()
    step = step_for("compile", bundle.prior, feature, torch.float32).step
    rows = measure(step, bundle.prior, feature, dtype=torch.float32, batches=(1, 3, 8))
    check(rows, torch.float32, "compile")
    assert max(row.grad_a for row in rows) < 1e-5
    readout = Readout.stack([feature.readout, other.readout, (feature * 2.0 - other).readout])
    x, sigma = (
        torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.1, 0.5, 0.9]).double(),
    )
    reference = TorchStep(bundle.prior, feature)
    for name, given in (
        ("guided", (x, sigma, (1 - sigma**2).sqrt(), readout)),
        ("measure", (x, readout)),
        ("gradient", (x, readout)),
    ):
        for one, wanted in zip(getattr(step, name)(*given), getattr(reference, name)(*given), strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    (mean, pull), (wanted_mean, wanted_pull) = step.linearise(x, sigma), reference.linearise(x, sigma)
    torch.testing.assert_close(mean, wanted_mean, rtol=0, atol=1e-5)
    wanted = wanted_pull(x)  # once: the reference frees what it kept
    torch.testing.assert_close(pull(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    asked = {"num": 3, "lam": 2.0, "steps": 6}
    plain = tiltscope.sample(bundle.prior, feature, **asked)
    found = tiltscope.sample(bundle.prior, feature, runner="compile", **asked)
    assert found.manifest["runner"] == "compile"
    assert float((found.x0 - plain.x0).pow(2).mean().sqrt()) < 1e-4
    assert not counters["inductor"]
    assert not counters["frames"]
    assert len(list(cache_folder().glob("[!.]*"))) == 1
    assert Path(artefact.folder).is_dir()
