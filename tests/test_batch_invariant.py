"""The replacements are what they replace, to rounding, and do not look at where in a batch a sample stands."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiltscope.engine.batch_invariant import gelu, linear, replace_modules, silu

PAIRS = {"silu": (silu, F.silu), "gelu": (gelu, F.gelu)}


def spread(num, dtype):
    return torch.linspace(-120, 120, num, dtype=dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_slopes_are_torchs_own_even_far_out(name):
    ours, theirs = PAIRS[name]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        x = spread(2001, dtype).requires_grad_()
        for scale in (1.0, 0.01):
            got, expected = ours(scale * x), theirs(scale * x)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=120 * tolerance)
            slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
            assert slopes[0].isfinite().all()
            torch.testing.assert_close(*slopes, rtol=tolerance, atol=120 * tolerance)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1, 3, 13])
def test_an_elements_place_changes_no_bit(name, dtype, piece):
    """torch's own fails this: the last elements of a piece go another way than a full vector's."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def run(values):
        values = values.detach().requires_grad_()
        y = PAIRS[name][0](values)
        return y.detach(), torch.autograd.grad(y.sum(), values)[0]

    whole = run(x)
    pieces = [run(part) for part in x.split(piece)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in pieces]))


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 7), (4, 2, 3, 7), (0, 5, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_torchs_own(shape, with_bias):
    g = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, (6, 7), (6,)))
    expected = F.linear(x, weight, bias if with_bias else None)
    torch.testing.assert_close(linear(x, weight, bias if with_bias else None), expected, rtol=1e-14, atol=1e-14)


def test_a_librarys_network_keeps_its_parameters_and_its_function():
    with torch.random.fork_rng(devices=[]):
        network = nn.Sequential(
            nn.Linear(5, 8), nn.SiLU(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU()), nn.GELU("tanh")
        )
    x = torch.linspace(-2, 2, 15).view(3, 5)
    expected, names = network(x), list(network.state_dict())
    parameters = list(network.parameters())
    replace_modules(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-6)
    assert list(network.state_dict()) == names
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert not any(type(m) in (nn.Linear, nn.SiLU) for m in network.modules())
    assert sum(type(m) is nn.GELU for m in network.modules()) == 1  # the approximate one is another function
