"""The gate: a step that reproduces the stored outputs passes, every way of being wrong is refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ParityError
from tiltscope.engine.runtime.gate import SelfTest, check_step, record_self_test, relative_errors
from tiltscope.engine.runtime.step import TorchStep


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


def step_of(bundle, dtype, address="blocks.1:sae:3"):
    return TorchStep(bundle.prior.to(dtype), bundle.feature(address).to(dtype))


@pytest.fixture(scope="module")
def recorded(bundle):
    step = step_of(bundle, torch.float64)
    return record_self_test(step, bundle.shape, step.feature.readout)


@dataclass(frozen=True)
class Wrong(TorchStep):
    """A step whose one output is changed."""

    output: str = "grad_a"
    change: Callable[[torch.Tensor], torch.Tensor] = torch.neg

    def guided(self, x, sigma, alpha, readout):
        out = super().guided(x, sigma, alpha, readout)
        return out._replace(**{self.output: self.change(getattr(out, self.output))})


def test_the_step_reproduces_its_float64_reference_in_float32(bundle, recorded):
    errors = check_step(step_of(bundle, torch.float32), recorded, torch.float32)
    assert set(errors) == {"x0_hat", "activation", "drive", "grad_a", "turn"}
    assert max(errors.values()) > 0


def test_the_reference_reproduces_itself(bundle, recorded):
    assert max(relative_errors(step_of(bundle, torch.float64), recorded, torch.float64).values()) < 1e-12


@pytest.mark.parametrize(
    ("output", "change"),
    [
        ("grad_a", lambda g: g * 1.001),
        ("grad_a", lambda g: g.transpose(-1, -2)),
        ("grad_a", torch.zeros_like),
        ("grad_a", lambda g: g * torch.nan),
        ("x0_hat", lambda d: d + 0.001),
        ("drive", lambda v: v.flip(0)),
        ("activation", torch.zeros_like),
        ("activation", lambda v: v * 1.001),
    ],
)
def test_a_wrong_output_is_refused_by_name(bundle, recorded, output, change):
    step = step_of(bundle, torch.float32)
    with pytest.raises(ParityError, match=output):
        check_step(Wrong(step.prior, step.feature, "wrong", output=output, change=change), recorded, torch.float32)


def test_a_silent_feature_is_woken_for_its_self_test_and_an_awake_one_is_left_alone(bundle, recorded):
    silent, spoken = bundle.feature("blocks.1:sae:3").readout, bundle.feature("blocks.1:neuron:2@mean").readout
    step = step_of(bundle, torch.float64)
    alpha = torch.sqrt(1 - recorded.sigma**2)
    assert not step.guided(recorded.x, recorded.sigma, alpha, silent.expand(5).to(torch.float64)).activation.any()
    assert (recorded.expected.activation > 0).any()
    assert (recorded.expected.activation - recorded.expected.drive).abs().max() > 1e-3  # the threshold counts
    other = record_self_test(step_of(bundle, torch.float64, "blocks.1:neuron:2@mean"), bundle.shape, spoken)
    assert torch.equal(other.readout.bias, spoken.expand(5).bias.double())
    assert torch.equal(other.expected.activation, other.expected.drive)


def test_another_features_readout_is_seen(bundle, recorded):
    step = step_of(bundle, torch.float32)
    other = bundle.feature("blocks.1:sae:5").readout.expand(len(recorded.sigma)).to(torch.float64)
    with pytest.raises(ParityError, match="drive"):
        check_step(step, replace(recorded, readout=other), torch.float32)


def test_a_self_test_is_stored_and_read_back(recorded, tmp_path):
    recorded.save(tmp_path / "selftest.safetensors")
    again = SelfTest.load(tmp_path / "selftest.safetensors")
    assert torch.equal(again.x, recorded.x)
    assert torch.equal(again.readout.mask, recorded.readout.mask)
    assert all(torch.equal(a, b) for a, b in zip(again.expected, recorded.expected, strict=True))
