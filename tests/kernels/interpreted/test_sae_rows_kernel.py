"""The sae_rows kernels under the interpreter against the definition in float64. Outputs are poisoned (conftest.py)."""

import pytest
import torch
from feature_cases import check_rows, rows_case

from tiltscope.engine.feature.readout import Readout, read
from tiltscope.kernels.dispatch_feature import sae_rows


def run(case):
    tokens = case.tokens.requires_grad_()
    pre = sae_rows(tokens, case.direction, case.bias, grid=case.grid, implementation="triton")
    (bar,) = torch.autograd.grad(pre, tokens, case.pre_bar)
    return pre.detach(), bar


@pytest.mark.parametrize(
    ("num_tokens", "width", "rows"), [(1, 3, 1), (3, 24, 2), (17, 1, 5), (33, 130, 2), (69, 192, 1)]
)
def test_linear_rows_are_the_definitions(num_tokens, width, rows):
    case = rows_case(3, (1, num_tokens), width, rows)
    check_rows(*run(case), case)


@pytest.mark.parametrize(
    ("grid", "width", "rows", "window"),
    [
        ((1, 1), 3, 1, (1, 1)),
        ((4, 5), 8, 2, (3, 3)),
        ((3, 7), 13, 1, (1, 5)),
        ((2, 3), 16, 1, (7, 7)),
        ((6, 6), 130, 1, (3, 1)),
    ],
)
def test_windows_are_the_definitions_up_to_the_edge_of_the_grid(grid, width, rows, window):
    """Windows wider than the grid too: most of their taps lie beyond it."""
    case = rows_case(2, grid, width, rows, window)
    check_rows(*run(case), case)


def test_16_bit_tokens_are_widened_first_and_their_cotangent_is_rounded_once():
    case = rows_case(2, (3, 4), 16, 2, (3, 3), dtype=torch.float16)
    check_rows(*run(case), case)


@pytest.mark.parametrize("window", [None, (3, 3)])
def test_a_sample_alone_is_the_sample_in_company_bit_for_bit(window):
    case = rows_case(3, (3, 3), 8, 2, window)
    together = run(case)
    each = (case.tokens.detach(), case.direction, case.bias)
    one = case._replace(
        **dict(zip(("tokens", "direction", "bias"), (t[1:2].clone() for t in each), strict=True)),
        pre_bar=case.pre_bar[1:2].clone(),
    )
    assert all(torch.equal(mine[0], theirs[1]) for mine, theirs in zip(run(one), together, strict=True))


def test_broadcast_and_permuted_inputs_are_read_as_they_are_meant():
    case = rows_case(3, (3, 4), 8, 2, (3, 5))
    shared = case._replace(
        tokens=case.tokens.transpose(1, 2).contiguous().transpose(1, 2),
        direction=case.direction[:1].expand(3, -1, -1, -1, -1),
        bias=case.bias[:1].expand(3, -1),
    )
    check_rows(*run(shared), shared)
    last = case.direction.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # taps outside, channels in a row
    check_rows(*run(case._replace(direction=last)), case)
    sheared = case._replace(direction=case.direction.transpose(3, 4).contiguous().transpose(3, 4))
    check_rows(*run(sheared), case)


@pytest.mark.parametrize("window", [(), (3, 3)])
def test_a_readout_on_the_kernels_is_the_references(window):
    generator = torch.Generator().manual_seed(0)
    places = (4, 3) if window else (12,)
    readout = Readout(
        direction=torch.randn(2, 3, 8, *window, generator=generator),
        bias=torch.randn(2, 3, generator=generator),
        threshold=torch.tensor([[-torch.inf, 0.0, 0.5]]).expand(2, 3),
        weight=torch.randn(2, 3, generator=generator),
        pooling=torch.rand(2, 3, 3, generator=generator),
        mask=torch.rand(2, 3, *places, generator=generator) > 0.3,
    )
    tokens = torch.randn(2, 12, 8, generator=generator).requires_grad_()
    for mine, theirs in zip(read(tokens, readout, kernels="triton"), read(tokens, readout), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        got, wanted = (torch.autograd.grad(each.sum(), tokens, retain_graph=True)[0] for each in (mine, theirs))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("window", [None, (3, 3), (7, 7)])
def test_every_batch(batch, window):
    case = rows_case(batch, (5, 7), 40, 2, window)
    check_rows(*run(case), case)
