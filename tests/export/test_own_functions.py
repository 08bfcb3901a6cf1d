"""A user's own functions, exported: what they close over is in the file, another function under the same name is another file."""

import pytest
import torch
from torch import nn

import tiltscope
from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime import onnx_step
from tiltscope.engine.runtime.artefact import artefact_key
from tiltscope.engine.runtime.exported import ExportedStep, GraphFiles, network_parts
from tiltscope.engine.runtime.function_parts import FunctionDenoiser
from tiltscope.engine.runtime.gate import LIMITS
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.export.graphs import examples
from tiltscope.export.onnx import write_onnx
from tiltscope.export.trace import StepNetworks, trace

SHAPE = (3, 8, 8)


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own_prior(scale=1.0):
    """E[x0 | x] of a mixture around four near pictures that the function closes over: none of them is certain at any level."""
    centres = 0.1 * scale * drawn(4, 192, seed=1)

    def denoise(x, sigma):
        alpha = torch.sqrt((1 - sigma) * (1 + sigma)).to(x.dtype)[:, None]
        v = (sigma**2).to(x.dtype)[:, None] + 0.3
        p = centres.to(x.dtype)
        score = (alpha * (x.flatten(1) @ p.T) - alpha**2 * (p * p).sum(1) / 2) / v
        return (torch.softmax(score, dim=1) @ p).view_as(x)

    return tiltscope.Prior(denoise, shape=SHAPE, name="mine")


def own_feature(seed=2):
    """A network that is nobody's parameter: the function closes over it."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU())
    with torch.no_grad():
        for at, p in enumerate(network.parameters()):
            p.copy_(drawn(*p.shape, seed=seed + at) / 3)
    network.requires_grad_(False)
    return tiltscope.Feature(lambda x0: network(x0.float())[:, 1].mean(dim=(1, 2)), name="mine")


def guided(prior, feature):
    """(the guided graph of a step of functions, its example)"""
    denoiser, trunk, _ = network_parts(prior, feature, "onnx")
    example = examples(prior, feature)["guided"]
    return trace(StepNetworks(denoiser, trunk), "guided", example), example


def rows(num):
    sigma = torch.linspace(0.05, 0.999999, num, dtype=torch.float64)
    return drawn(num, *SHAPE, seed=num), sigma, torch.sqrt(1 - sigma**2)


def assert_is_the_function(step, prior, feature, num):
    """Within the gate's own limit. Seen: 6e-7 in D; in a gradient of 1e-29, where the function is flat, 3e-5 (eager: 7e-7)."""
    x, sigma, alpha = rows(num)
    exact = TorchStep(prior, feature).guided(x.double(), sigma, alpha, None)
    for got, wanted in zip(step.guided(x, sigma, alpha, None), exact, strict=True):
        assert float((got.double() - wanted).abs().max()) <= LIMITS[torch.float32].error * float(wanted.abs().max())


@pytest.mark.parametrize(
    "which", ["both", *(pytest.param(part, marks=pytest.mark.slow) for part in ("prior", "feature"))]
)
def test_the_traced_step_is_the_functions_own(which, tiny_bundle):
    """Beside a bundle's networks too; at other batches and levels than were traced."""
    bundle = tiltscope.load(tiny_bundle)
    prior, feature = own_prior(), own_feature()
    if which != "both":
        large = tiltscope.Prior(lambda x, sigma: 0.5 * x + x.mean(dim=1, keepdim=True), shape=(3, 64, 64), name="large")
        prior = bundle.prior if which == "feature" else large
        feature = bundle.feature("blocks.1:sae:3") if which == "prior" else feature
    graph, _ = guided(prior, feature)
    step = ExportedStep("traced", network_parts(prior, feature, "onnx")[0], lambda name, given: list(graph(*given)))
    eager = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
    for num in (1, 3):
        sigma = torch.linspace(0.1, 0.9, num, dtype=torch.float64)
        x, alpha = drawn(num, *prior.shape, seed=num), torch.sqrt(1 - sigma**2)
        readout = None if feature.readout is None else feature.readout.expand(num)
        wide = None if readout is None else readout.to(torch.float64)
        exact = eager.guided(x.double(), sigma, alpha, wide)
        for got, wanted in zip(step.guided(x, sigma, alpha, readout), exact, strict=True):
            assert float((got.double() - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.slow
def test_onnx_runtime_computes_the_function_up_to_pure_noise(tmp_path):
    """sigma comes in two words: in one of float32, alpha at .999999 would be off by a per cent."""
    prior, feature = own_prior(), own_feature()
    graph, example = guided(prior, feature)
    write_onnx(graph, "guided", example, tmp_path / "guided.onnx", {})
    denoiser = network_parts(prior, feature, "onnx")[0]
    step = ExportedStep("onnx", denoiser, GraphFiles(tmp_path, onnx_step.open_graph), torch.float32)
    for num in (1, 5):
        assert_is_the_function(step, prior, feature, num)


def test_sigma_comes_through_exactly():
    seen = []

    def denoise(x, sigma):
        seen.append(sigma)
        return x

    prior = tiltscope.Prior(denoise, shape=SHAPE)
    denoiser = FunctionDenoiser(prior, denoise)
    sigma = torch.tensor([0.1, 1 - 1e-9, 1 / 3], dtype=torch.float64)
    words = denoiser.network.time_proj(denoiser.coefficients(sigma).time).to(torch.float32)

    class Given(nn.Module):
        def forward(self, t):
            return words

    denoiser.network.time_proj = Given()
    denoiser.network(torch.zeros(3, *SHAPE), sigma)
    torch.testing.assert_close(seen[0], sigma, rtol=1e-14, atol=0)


def test_another_function_under_the_same_name_is_another_file():
    def key(prior, feature):
        return artefact_key("onnx", prior, feature, torch.float32)

    assert key(own_prior(), own_feature()) == key(own_prior(), own_feature())
    assert key(own_prior(1.1), own_feature()) != key(own_prior(), own_feature())
    assert key(own_prior(), own_feature(9)) != key(own_prior(), own_feature())


def test_samples_that_are_no_pictures_are_refused():
    prior = tiltscope.Prior(lambda x, sigma: 0.5 * x, shape=(6,))
    feature = tiltscope.Feature(lambda x0: x0.sum(1), name="sum")
    with pytest.raises(RunnerError, match=r"exported for samples \[channel, height, width\]; use --runner torch"):
        tiltscope.sample(prior, feature, num=1, lam=1.0, steps=1, runner="onnx")
