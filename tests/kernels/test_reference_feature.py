"""The definition of the readout op: the engine's own readout, its gradient by hand, and what the op refuses."""

import pytest
import torch
from readout_cases import readout_case

import tiltscope
from tiltscope.engine.feature import readout as engine
from tiltscope.kernels import dispatch, reference_feature
from tiltscope.kernels import dispatch_feature as ops

CASE = readout_case(3, 17, 24, 5).to(torch.float64)


def engines(tokens):
    return engine.read(tokens, engine.Readout(*CASE[1:7]))


def test_the_op_reads_what_the_engine_reads():
    assert engine.LSE_TEMPERATURE == reference_feature.LSE_TEMPERATURE
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(ops.readout(*CASE[:7]), engines(CASE.tokens), strict=True)
    )


def test_its_gradient_is_that_of_the_engine_and_of_finite_differences():
    tokens = CASE.tokens.clone().requires_grad_()
    bars = CASE[7:]
    with dispatch.count_calls() as calls:
        (mine,) = torch.autograd.grad(ops.readout(tokens, *CASE[1:7]), tokens, bars)
    (theirs,) = torch.autograd.grad(engines(tokens), tokens, bars)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert dict(calls) == {("readout", "reference"): 1, ("readout_vjp", "reference"): 1}
    small = readout_case(2, 4, 3, 3).to(torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.readout(t, *small[1:7]), (small.tokens.requires_grad_(),))


def test_the_ops_are_well_formed():
    case = readout_case(2, 5, 8, 2)
    torch.library.opcheck(torch.ops.tiltscope.readout, (case.tokens.requires_grad_(), *case[1:7], "reference"))
    pre = torch.zeros(2, 2, 5)
    args = (*case[7:], pre, case.direction, *case[3:7], torch.bfloat16, "reference")
    torch.library.opcheck(torch.ops.tiltscope.readout_vjp, args)


@pytest.mark.parametrize(
    ("place", "name", "change"),
    [
        (0, "tokens", lambda t: t[0]),
        (0, "tokens", lambda t: t.float()),
        (1, "direction", lambda t: t[..., :3]),
        (1, "direction", lambda t: t.half()),
        (2, "bias", lambda t: t[:1]),
        (3, "threshold", lambda t: t.float()),
        (4, "weight", lambda t: t.to("meta")),
        (5, "pooling", lambda t: t[..., :2]),
        (6, "mask", lambda t: t.double()),
    ],
)
def test_a_wrong_argument_is_a_config_error_that_names_it(place, name, change):
    given = list(CASE[:7])
    given[place] = change(given[place])
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^{name}: got "):
        ops.readout(*given)
