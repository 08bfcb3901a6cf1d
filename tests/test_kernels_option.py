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
from tiltscope.kernels import native

WORLD = GaussianWorld(s=1.3, shape=(3, 4, 4))
STEPS = 5
# Interpreted Triton and torch round differently in every row; normals agree to 4 ulp (tests/kernels/).
TOLERANCE = 1e-4


def draw(**settings):
    return tiltscope.sample(WORLD.prior, WORLD.feature, **({"num": 2, "lam": 1.0, "steps": STEPS} | settings))


def test_the_manifest_counts_every_tick_by_the_implementation_that_ran():
    for kernels in ("reference", "native"):
        facts = draw(kernels=kernels).manifest
        assert (facts["kernels"], facts["kernel_calls"]) == (kernels, {"guided_step": {kernels: STEPS}})
        weighed = draw(num=1, particles=4, kernels=kernels).manifest
        assert weighed["kernel_calls"] == {
            "guided_step": {kernels: STEPS},
            "resample": {"reference": STEPS + 1},  # every tick, and the end
        }


@pytest.mark.parametrize("settings", [{}, {"num": 1, "particles": 4}, {"dtype": "float64"}, {"solver": "dpmpp_2m_sde"}])
def test_a_compiler_changes_the_time_and_no_bit(settings, monkeypatch):
    """kernels auto: native where there is a compiler, else reference, and the manifest says which; one picture either way."""
    sooner = draw(**settings)

    def none():
        raise RunnerError("no compiler")

    monkeypatch.setattr(native, "require_native", none)
    plain = draw(**settings)
    assert (sooner.manifest["kernels"], plain.manifest["kernels"]) == ("native", "reference")
    assert torch.equal(sooner.x0, plain.x0)
    assert torch.equal(sooner.activation, plain.activation)
    with pytest.raises(RunnerError, match="no compiler"):
        draw(kernels="native", **settings)


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
        ({"kernels": "cuda"}, "kernels: got 'cuda', allowed are auto, reference, native, compiled, triton"),
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
import importlib, json, sys
import torch
from torch import nn
import tiltscope
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.tilt.worlds import GaussianWorld

class Patches(Trunk):
    # A token is a patch of 2x2 pixels.
    def __init__(self):
        super().__init__("patches", width=12, grid=(2, 2), num_prefix_tokens=0, image_size=(4, 4), mean=[0.4] * 3, std=[0.3] * 3)
        self.turn = nn.Parameter(torch.eye(12), requires_grad=False)
        self._set_tables(torch.float32)

    def tokens(self, pixels):
        patches = pixels.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
        return patches.flatten(3).flatten(1, 2) @ self.turn

def feature(window):
    draw = torch.Generator().manual_seed(0)
    places = (2, 2) if window else (4,)
    readout = Readout(
        torch.randn(1, 2, 12, *window, generator=draw) / 6, torch.zeros(1, 2), torch.tensor([[-torch.inf, 0.0]]),
        torch.ones(1, 2), torch.tensor([[[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]]]), torch.ones(1, 2, *places, dtype=torch.bool),
    )
    return tiltscope.Feature.from_readout(Patches(), readout, name="patches")

world = GaussianWorld(s=1.3, shape=(3, 4, 4))
features = {"custom": world.feature, "linear": feature(()), "window": feature((3, 3))}
def draw(kernels, name, **settings):
    return tiltscope.sample(
        world.prior, features[name], num=2, lam=[1.0, 0.0], steps=5, kernels=kernels, **settings
    )
found = {"errors": {}, "calls": {}, "reference": {}, "broken": {}}
for name, settings in {"custom": {"solver": "dpmpp_2m_sde"}, "linear": {}, "window": {}}.items():
    ours, theirs = draw("triton", name, **settings), draw("reference", name, **settings)
    found["errors"][name] = float((ours.x0 - theirs.x0).abs().max())
    found["calls"][name], found["reference"][name] = ours.manifest["kernel_calls"], theirs.manifest["kernel_calls"]
for op in found["calls"]["window"]:
    module = importlib.import_module("tiltscope.kernels." + op.removesuffix("_vjp"))
    kernel = getattr(module, op)
    delattr(module, op)
    try:
        draw("triton", "window")
        found["broken"][op] = "it went on"
    except ImportError as error:
        found["broken"][op] = type(error).__name__
    setattr(module, op, kernel)
json.dump(found, sys.stdout)
"""


def interpreted(*words, cwd=None):
    """A process of its own: the interpreter is chosen when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sampler_runs_on_the_triton_kernels_and_breaks_without_any_of_them():
    found = json.loads(interpreted("-c", INTERPRETED))
    guided = {"preprocess": STEPS + 1, "readout": STEPS + 1}  # every row, and the finished picture
    windowed = guided | {"sae_rows": STEPS + 1}
    for name, ops in {"custom": {}, "linear": guided, "window": windowed}.items():
        backward = {f"{op}_vjp": STEPS for op in ops}
        expected = {"guided_step": STEPS} | ops
        assert found["reference"][name] == {op: {"reference": calls} for op, calls in expected.items()}
        assert found["calls"][name] == {op: {"triton": calls} for op, calls in (expected | backward).items()}
    assert max(found["errors"].values()) < TOLERANCE
    assert found["broken"] == dict.fromkeys(found["calls"]["window"], "ImportError")
    assert len(found["broken"]) == 7


@pytest.mark.slow
def test_explain_on_the_triton_kernels_gives_the_references_pictures(tiny_bundle, tmp_path):
    words = ["-m", "tiltscope", "explain", "blocks.1:sae:3", "--bundle", str(tiny_bundle), "--num", "2", "--steps", "3"]
    words += ["--calibration", "pool", "--json", "--quiet"]
    facts = {}
    for kernels in ("reference", "triton"):
        out = str(tmp_path / kernels)
        facts[kernels] = json.loads(interpreted(*words, "--kernels", kernels, "--out", out, cwd=tmp_path))
    for kernels, backward in (("triton", ("preprocess_vjp", "readout_vjp")), ("reference", ())):
        # Three rows, the noisiest of them unguided, and the finished pictures.
        times = {"guided_step": 3, "preprocess": 3, "readout": 3} | dict.fromkeys(backward, 2)
        expected = {op: {kernels: calls} for op, calls in times.items()}
        assert facts[kernels]["kernel_calls"] == expected
    ours, theirs = (load_file(tmp_path / each / "samples.safetensors")["x0"] for each in ("triton", "reference"))
    # A guided row amplifies what the rows before it rounded: design's bound between runners.
    assert float((ours - theirs).square().mean().sqrt()) < 1e-3
    assert not torch.equal(ours[0], ours[1])
