"""Systematic resampling: against a plain loop, unbiased over u, and nobody descends from a weight of zero."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tiltscope.kernels.reference import resample

log_weights = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


def by_loop(log_weight, u):
    """Walk the running sum with one pointer."""
    weight = np.exp(np.array(log_weight) - max(log_weight))
    weight /= weight.sum()
    ancestors, at, reached = [], 0, weight[0]
    for place in range(len(weight)):
        while reached < (place + u) / len(weight) and at < len(weight) - 1:
            at += 1
            reached += weight[at]
        ancestors.append(at)
    return ancestors


@given(log_weights, st.floats(0.01, 0.99))
@example([0.0, 19.0, 19.0, 19.0], 1 / 3)  # 1e-9 from a tie: u in float32 would be on its other side
def test_ancestors_are_those_of_a_plain_loop(log_weight, u):
    weights, place = (torch.tensor([each], dtype=torch.float64) for each in (log_weight, u))
    found = resample(weights, place, threshold=2.0)
    weight = torch.softmax(torch.tensor(log_weight, dtype=torch.float64), 0)
    gaps = (weight.cumsum(0)[:, None] - (torch.arange(len(weight)) + u) / len(weight)).abs()
    if gaps.min() < 1e-9:  # a tie: both neighbours are right
        return
    expected = by_loop(log_weight, u)
    kept = [a if weight[a] > 0 else None for a in expected]
    assert [a if k is not None else None for a, k in zip(found.ancestor[0].tolist(), kept, strict=True)] == kept


@given(log_weights)
def test_every_particle_has_its_share_of_descendants_on_average_over_u(log_weight):
    num = len(log_weight)
    u = (torch.arange(2000).double() + 0.5) / 2000
    found = resample(torch.tensor([log_weight]).double().expand(2000, num), u, threshold=2.0)
    share = torch.nn.functional.one_hot(found.ancestor, num).double().mean((0, 1))
    torch.testing.assert_close(share, torch.softmax(torch.tensor(log_weight).double(), 0), atol=2e-3, rtol=0)


@given(log_weights, st.floats(0.01, 1.0))
def test_due_where_the_effective_sample_size_is_below_the_threshold(log_weight, threshold):
    found = resample(
        torch.tensor([log_weight], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), threshold
    )
    weight = np.exp(np.array(log_weight) - max(log_weight))
    ess = weight.sum() ** 2 / (weight**2).sum()
    if abs(ess - threshold * len(log_weight)) > 1e-9 * len(log_weight):
        assert bool(found.due[0]) == (ess < threshold * len(log_weight))
    if not found.due[0]:
        assert found.ancestor[0].tolist() == list(range(len(log_weight)))
    assert float(found.log_mean[0]) == pytest.approx(max(log_weight) + math.log(weight.mean()), abs=1e-9)


@pytest.mark.parametrize("u", [1e-12, 0.3, 1.0])
def test_a_weight_of_zero_has_no_descendants(u):
    log_weight = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    found = resample(log_weight, torch.tensor([u]), threshold=1.0)
    assert set(found.ancestor[0].tolist()) == {1, 3}
    assert float(found.log_mean[0]) == pytest.approx(math.log(2 / 5))


def test_a_group_in_which_everything_failed_stays_as_it_is_and_groups_do_not_meet():
    log_weight = torch.tensor([[-torch.inf] * 3, [0.0, -50.0, -50.0]])
    found = resample(log_weight, torch.tensor([0.5, 0.5]))
    assert found.due.tolist() == [False, True]
    assert found.ancestor.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert found.log_mean[0] == -torch.inf
    alone = resample(log_weight[1:], torch.tensor([0.5]))
    assert torch.equal(alone.ancestor[0], found.ancestor[1])
    assert torch.equal(alone.log_mean[0], found.log_mean[1])
