"""The sampler runs through the dispatched ops: the manifest's counters say which implementation ran, and none is substituted."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiltscope
from tiltscope.engine.errors import ConfigError, RunnerError
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=1.3, shape=(3, 4, 4))
STEPS = 5
# Interpreted Triton and torch round differently in every row; normals agree to 4 ulp (tests/kernels/).
TOLERANCE = 1e-4


def draw(**settings):
    return tiltscope.sample(WORLD.prior, WORLD.feature, **({"num": 2, "lam": 1.0, "steps": STEPS} | settings))


def test_the_manifest_counts_every_tick_by_the_implementation_that_ran():
    facts = draw().manifest
    assert (facts["kernels"], facts["kernel_calls"]) == ("reference", {"guided_step": {"reference": STEPS}})
    weighed = draw(num=1, particles=4).manifest
    assert weighed["kernel_calls"] == {
        "guided_step": {"reference": STEPS},
        "resample": {"reference": STEPS + 1},  # every tick, and the end
    }


def test_triton_without_a_device_is_refused_and_the_message_says_what_to_do(monkeypatch):
    if torch.cuda.is_available():
        return
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RunnerError, match=r"kernels 'triton' run on a CUDA device.*reference.*TRITON_INTERPRET=1"):
        draw(kernels="triton")
    with pytest.raises(RunnerError, match=r"device: got cuda.*use device cpu"):
        draw(device="cuda")


def test_triton_that_is_not_installed_is_refused_naming_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(RunnerError, match=r"pip install 'tiltscope\[triton\]'"):
        draw(kernels="triton")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernels": "cuda"}, "kernels: got 'cuda', allowed are reference, compiled, triton"),
        ({"device": "tpu"}, "device: got 'tpu', allowed are cpu, cuda"),
        ({"graphs": "on"}, "graphs: got 'on', allowed are auto, off"),
        ({"kernels": "triton", "dtype": "float64"}, "kernels triton: got dtype float64"),
        ({"device": "cuda", "runner": "onnx"}, "device: got cuda with runner onnx"),
    ],
)
def test_bad_values_are_refused(settings, words):
    with pytest.raises(ConfigError) as refusal:
        draw(**settings)
    assert words in str(refusal.value)


INTERPRETED = """
import json, sys
import torch
import tiltscope
from tiltscope.engine.tilt.worlds import GaussianWorld
world = GaussianWorld(s=1.3, shape=(3, 4, 4))
def draw(kernels, **settings):
    return tiltscope.sample(world.prior, world.feature, num=2, lam=[1.0, 0.0], steps=5, kernels=kernels, **settings)
errors = {}
for name, settings in {"ddpm": {}, "dpmpp_2m_sde": {"solver": "dpmpp_2m_sde"}}.items():
    ours, theirs = draw("triton", **settings), draw("reference", **settings)
    errors[name] = float((ours.x0 - theirs.x0).abs().max())
calls = ours.manifest["kernel_calls"]
from tiltscope.kernels import guided_step
del guided_step.guided_step
try:
    draw("triton")
    broken = "it went on"
except ImportError as error:
    broken = type(error).__name__
json.dump({"errors": errors, "calls": calls, "broken": broken}, sys.stdout)
"""


def interpreted(*words, cwd=None):
    """A process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sampler_runs_on_the_triton_kernel_and_breaks_without_it():
    found = json.loads(interpreted("-c", INTERPRETED))
    assert found["calls"] == {"guided_step": {"triton": STEPS}}
    assert max(found["errors"].values()) < TOLERANCE
    assert found["broken"] == "ImportError"


@pytest.mark.slow
def test_explain_on_the_triton_kernels_gives_the_references_pictures(tiny_bundle, tmp_path):
    words = ["-m", "tiltscope", "explain", "blocks.1:sae:3", "--bundle", str(tiny_bundle), "--num", "2", "--steps", "3"]
    words += ["--calibration", "pool", "--json", "--quiet"]
    facts = {}
    for kernels in ("reference", "triton"):
        out = str(tmp_path / kernels)
        facts[kernels] = json.loads(interpreted(*words, "--kernels", kernels, "--out", out, cwd=tmp_path))
    assert facts["triton"]["kernel_calls"] == {"guided_step": {"triton": 3}}
    assert facts["reference"]["kernel_calls"] == {"guided_step": {"reference": 3}}
    ours, theirs = (load_file(tmp_path / each / "samples.safetensors")["x0"] for each in ("triton", "reference"))
    # A guided row amplifies what the rows before it rounded: design's bound between runners.
    assert float((ours - theirs).square().mean().sqrt()) < 1e-3
    assert not torch.equal(ours[0], ours[1])
