"""Resampling by the kernel, interpreted, against its definition. Outputs are poisoned (conftest.py)."""

import pytest
import torch

from tiltscope.engine.errors import ConfigError
from tiltscope.kernels import dispatch


def both(log_weight, u, threshold=0.5):
    made = [dispatch.resample(log_weight, u, threshold, implementation=each) for each in ("triton", "reference")]
    return made


@pytest.mark.parametrize("num", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ancestors_means_and_verdicts_are_the_definitions(num, dtype):
    generator = torch.Generator().manual_seed(num)
    log_weight = 3 * torch.randn(6, num, generator=generator, dtype=dtype)
    log_weight[0] = 0.0  # even weights: never due
    log_weight[1] = -torch.inf  # everything failed: left alone
    log_weight[2, ::2] = -torch.inf
    log_weight[3] += 500.0
    u = torch.rand(6, generator=generator, dtype=dtype)
    u[4] = 1.0
    mine, theirs = both(log_weight, u)
    assert torch.equal(mine.due, theirs.due)
    assert torch.equal(mine.ancestor, theirs.ancestor)
    torch.testing.assert_close(
        mine.log_mean, theirs.log_mean, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-12
    )
    assert num < 17 or set(mine.due.tolist()) == {True, False}


def test_a_group_is_alone_what_it_is_in_company_and_one_nan_leaves_it_alone():
    log_weight = torch.tensor([[0.0, -9.0, -9.0], [-9.0, 0.0, -9.0], [0.0, torch.nan, 0.0]])
    u = torch.tensor([0.2, 0.5, 0.7])
    together, _ = both(log_weight, u, threshold=0.9)
    assert together.due.tolist() == [True, True, False]
    assert together.ancestor.tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 2]]
    alone, _ = both(log_weight[1:2], u[1:2], threshold=0.9)
    assert torch.equal(alone.log_mean[0], together.log_mean[1])


def test_more_particles_than_a_program_holds_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"^log_weight: got .*at most 4096 particles"):
        dispatch.resample(torch.zeros(1, 4097), torch.zeros(1), implementation="triton")
