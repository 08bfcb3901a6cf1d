"""The readout's kernels under the interpreter against the definition in float64. Outputs are poisoned (conftest.py)."""

import pytest
import torch
from readout_cases import check_readout, readout_case

from tiltscope.kernels import dispatch_feature as ops


def run(case, implementation="triton"):
    tokens = case.tokens.requires_grad_()
    activation, drive = ops.readout(tokens, *case[1:7], implementation=implementation)
    (bar,) = torch.autograd.grad((activation, drive), tokens, (case.activation_bar, case.drive_bar))
    return activation.detach(), drive.detach(), bar


@pytest.mark.parametrize(
    ("batch", "num_tokens", "width", "rows"), [(1, 1, 3, 1), (3, 17, 24, 5), (1, 69, 192, 1), (2, 33, 130, 2)]
)
def test_the_readout_and_its_gradient_are_the_definitions(batch, num_tokens, width, rows):
    case = readout_case(batch, num_tokens, width, rows)
    check_readout(*run(case), case)


def test_a_sample_alone_is_the_sample_in_company_bit_for_bit():
    case = readout_case(3, 9, 8, 2)
    together = run(case)
    alone = run(type(case)(*(each[1:2].clone().detach() for each in case)))
    assert all(torch.equal(mine[0], theirs[1]) for mine, theirs in zip(alone, together, strict=True))


def test_ties_of_the_maximum_share_its_gradient():
    case = readout_case(1, 6, 4, 1)._replace(pooling=torch.tensor([[[1.0, 0.0, 0.0]]]))
    case.tokens[0, 2:] = case.tokens[0, 1]
    case.mask[:] = True
    check_readout(*run(case), case)


def test_a_feature_shared_by_a_batch_is_read_through_a_broadcast_view():
    case = readout_case(3, 5, 8, 1)
    shared = type(case)(case.tokens, *(each[:1].expand(3, *each.shape[1:]) for each in case[1:7]), *case[7:])
    check_readout(*run(shared), shared)
