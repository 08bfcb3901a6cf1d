"""The ops behind a trunk, readout and sae_rows: gradients by hand against autograd, and what they refuse."""

import pytest
import torch
from feature_cases import ROUNDING, rows_case
from readout_cases import readout_case

import tiltscope
from tiltscope.kernels import dispatch
from tiltscope.kernels import dispatch_feature as ops
from tiltscope.kernels.implementation import IMPLEMENTATIONS, INLINE

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
        ({"direction": torch.zeros(2, 2, 8, 3, 3).int()}, "direction: got torch.int32"),
        ({"direction": torch.zeros(2, 2, 8, 3, 3).half()}, "tokens: got torch.float32, allowed is torch.float16$"),
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
        (1, "tokens", lambda t: t.half()),
        (1, "direction", lambda t: t.long()),
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


# In units of half a unit in the last place (2^-11 and 2^-8, ROUNDING), seen over 20 seeds. Values, as a share of the sum of their
# terms' largest: .72 and .69. Pre-activations and their gradient, of their largest: 2.0 and 2.3. A readout's gradient, of its
# largest: 10.8 and 5.6, because a share of exp(v / T) has 1 / T = 5 times the rounding of v.
VALUE, ROWS, SLOPE = 2, 4, 20
HALVES = (torch.float16, torch.bfloat16)
inline = pytest.mark.parametrize("implementation", INLINE)


@inline
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_readout_in_half_precision_is_float64_of_the_same_numbers_to_its_rounding(dtype, implementation):
    """What a half-precision export traces. Read without a maximum: where two places tie, rounding decides which it takes."""
    case = readout_case(3, 17, 24, 5).to(dtype)
    pooling = torch.stack(
        [torch.zeros_like(case.pooling[..., 0]), case.pooling[..., :2].sum(-1), case.pooling[..., 2]], -1
    )
    case = case._replace(pooling=pooling)
    wide = case.to(torch.float64)

    def read(given, chosen):
        tokens = given.tokens.clone().requires_grad_()
        made = ops.readout(tokens, *given[1:7], implementation=chosen)
        return *(each.detach() for each in made), torch.autograd.grad(made, tokens, given[7:])[0]

    found, exact = read(case, implementation), read(wide, "reference")
    pre = ops.sae_rows(wide.tokens, wide.direction, wide.bias)
    terms = wide.weight.abs().sum(1) * pre.abs().amax((1, 2))
    scales = (terms, terms, exact[2].abs().amax((1, 2), keepdim=True))
    for each, wanted, scale, allowed in zip(found, exact, scales, (VALUE, VALUE, SLOPE), strict=True):
        assert each.dtype == dtype
        assert bool(scale.gt(0).all())
        assert float(((each.double() - wanted).abs() / scale).max()) <= allowed * ROUNDING[dtype]
    rows = ops.readout_of_rows(pre.to(dtype), *case[3:7], implementation=implementation)
    expected = ops.readout_of_rows(pre.to(dtype).double(), *wide[3:7])
    for each, wanted in zip(rows, expected, strict=True):
        assert float(((each.double() - wanted).abs() / terms).max()) <= VALUE * ROUNDING[dtype]


@inline
@pytest.mark.parametrize(("window", "grid"), WINDOWS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_in_half_precision_are_float64_of_the_same_numbers_to_their_rounding(dtype, window, grid, implementation):
    case = rows_case(2, grid, 5, 3, window)
    narrow = [each.to(dtype) for each in (case.tokens, case.direction, case.bias, case.pre_bar)]

    def rows(tokens, direction, bias, bar, chosen):
        tokens = tokens.clone().requires_grad_()
        made = ops.sae_rows(tokens, direction, bias, grid=case.grid, implementation=chosen)
        return made.detach(), torch.autograd.grad(made, tokens, bar)[0]

    exact = rows(*(each.double() for each in narrow), "reference")
    for found, wanted in zip(rows(*narrow, implementation), exact, strict=True):
        assert found.dtype == dtype
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) <= ROWS * ROUNDING[dtype]


@pytest.mark.parametrize("implementation", [each for each in IMPLEMENTATIONS if each not in INLINE])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_of_their_own_refuse_a_readout_in_half_precision(dtype, implementation, monkeypatch):
    """They keep a readout in float32, whatever the tokens are in. Not asked here whether they can run: that is said first."""
    monkeypatch.setattr(ops, "require_implementation", lambda *given: None)
    case = readout_case(3, 17, 24, 5).to(dtype)
    rows = rows_case(2, (3, 4), 8, 2, (3, 3))
    says = rf"got {dtype}, allowed is torch.float32.* with kernels '{implementation}'; kernels 'reference' take 16-bit"
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^direction: {says}"):
        ops.readout(*case[:7], implementation=implementation)
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^direction: {says}"):
        ops.sae_rows(*(each.to(dtype) for each in rows[:3]), grid=rows.grid, implementation=implementation)
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^pre: {says}"):
        ops.readout_of_rows(case.mask.to(dtype), *case[3:7], implementation=implementation)
