"""The ops behind a trunk, readout and sae_rows: gradients by hand against autograd, and what they refuse."""

import pytest
import torch
from feature_cases import rows_case
from readout_cases import readout_case

import tiltscope
from tiltscope.kernels import dispatch
from tiltscope.kernels import dispatch_feature as ops

CASE = readout_case(3, 17, 24, 5).to(torch.float64)


def by_hand(tokens, *rest):
    """The op, whose gradient is the definition of the VJP; `ops.readout` leaves that of the reference to autograd."""
    return torch.ops.tiltscope.readout(tokens, *rest, "reference")[:2]


def test_the_gradient_by_hand_is_autograds_and_that_of_finite_differences():
    tokens = CASE.tokens.clone().requires_grad_()
    bars = CASE[7:]
    with dispatch.count_calls() as calls:
        (mine,) = torch.autograd.grad(by_hand(tokens, *CASE[1:7]), tokens, bars)
    assert dict(calls) == {("readout", "reference"): 1, ("readout_vjp", "reference"): 1}
    (theirs,) = torch.autograd.grad(ops.readout(tokens, *CASE[1:7]), tokens, bars)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    small = readout_case(2, 4, 3, 3).to(torch.float64)
    assert torch.autograd.gradcheck(lambda t: by_hand(t, *small[1:7]), (small.tokens.requires_grad_(),))


WINDOWS = [(None, (1, 6)), ((3, 3), (3, 4)), ((5, 1), (2, 3)), ((7, 7), (2, 2))]


@pytest.mark.parametrize(("window", "grid"), WINDOWS)
def test_the_gradient_of_rows_by_hand_is_autograds_and_that_of_finite_differences(window, grid):
    case = rows_case(2, grid, 5, 3, window)
    tokens = case.tokens.double().requires_grad_()
    rest = (case.direction.double(), case.bias.double())

    def by_hand(t):
        return torch.ops.tiltscope.sae_rows(t, *rest, list(case.places), "reference")

    mine, theirs = (
        torch.autograd.grad(made, tokens, case.pre_bar.double())[0]
        for made in (by_hand(tokens), ops.sae_rows(tokens, *rest, grid=case.grid))
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(by_hand, (tokens,))


def test_windows_are_a_convolutions_rows():
    case = rows_case(2, (4, 5), 6, 3, (3, 5))
    tokens, direction = case.tokens.double(), case.direction.double()
    picture = tokens.transpose(1, 2).unflatten(2, case.grid)
    for at in range(2):
        expected = torch.nn.functional.conv2d(
            picture[at : at + 1], direction[at], case.bias[at].double(), padding=(1, 2)
        )
        found = ops.sae_rows(tokens, direction, case.bias.double(), grid=case.grid)[at]
        torch.testing.assert_close(found, expected[0].flatten(1), rtol=1e-12, atol=1e-12)


def test_a_readout_of_rows_through_unit_vectors_is_the_readout_bit_for_bit():
    pre = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = CASE[3:7]
    plain = ops.readout_of_rows(pre, *rest)
    unit, none = torch.eye(5, dtype=torch.float64).expand(3, 5, 5), torch.zeros(3, 5, dtype=torch.float64)
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(ops.readout(pre.transpose(1, 2), unit, none, *rest), plain, strict=True)
    )


def test_the_ops_are_well_formed():
    case = readout_case(2, 5, 8, 2)
    torch.library.opcheck(torch.ops.tiltscope.readout, (case.tokens.requires_grad_(), *case[1:7], "reference"))
    pre = torch.zeros(2, 2, 5)
    args = (*case[7:], pre, case.direction, *case[3:7], torch.bfloat16, "reference")
    torch.library.opcheck(torch.ops.tiltscope.readout_vjp, args)


@pytest.mark.parametrize(("window", "grid"), WINDOWS[:2])
def test_the_ops_of_rows_are_well_formed(window, grid):
    case = rows_case(2, grid, 8, 2, window)
    args = (case.tokens.requires_grad_(), case.direction, case.bias, list(case.places), "reference")
    torch.library.opcheck(torch.ops.tiltscope.sae_rows, args)
    args = (case.pre_bar, case.direction, list(case.places), torch.bfloat16, "reference")
    torch.library.opcheck(torch.ops.tiltscope.sae_rows_vjp, args)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": None}, "grid: got None, allowed is None for directions"),
        ({"grid": (3, 5)}, "grid: got \\(3, 5\\), allowed is two numbers whose product is 12"),
        ({"direction": torch.zeros(2, 2, 8, 2, 3)}, "direction: got .*both odd"),
        ({"direction": torch.zeros(2, 2, 7, 3, 3)}, "direction: got shape"),
        ({"direction": torch.zeros(2, 2, 8, 3, 3).half()}, "direction: got torch.float16"),
        ({"bias": torch.zeros(2, 3)}, "bias: got shape"),
        ({"tokens": torch.zeros(2, 12, 8).double()}, "tokens: got torch.float64"),
        ({"tokens": torch.zeros(2, 0, 8)}, "tokens: got shape"),
    ],
)
def test_a_wrong_argument_of_rows_is_a_config_error_that_names_it(change, says):
    case = rows_case(2, (3, 4), 8, 2, (3, 3))._replace(**change)
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^{says}"):
        ops.sae_rows(case.tokens, case.direction, case.bias, grid=case.grid)


def test_the_reference_is_seen_by_a_tracer_as_its_operations():
    from torch.fx.experimental.proxy_tensor import make_fx

    case = rows_case(2, (3, 4), 8, 2, (3, 3))
    traced = make_fx(lambda t: ops.sae_rows(t, case.direction, case.bias, grid=case.grid))(case.tokens)
    assert not any("tiltscope" in str(node.target) for node in traced.graph.nodes)


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
