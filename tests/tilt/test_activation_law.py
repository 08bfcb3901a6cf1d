"""The lower bound on excess KL: below the truth, near it where the activation is all there is, 0 where q is the tilt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.tilt.activation_law import excess_kl_lower_bound
from tiltscope.engine.tilt.calibrate import tilt_weights

NATURAL = np.random.default_rng(0).standard_normal(20_000)


def test_draws_of_the_tilt_itself_leave_nothing():
    rng = np.random.default_rng(1)
    weight = tilt_weights(NATURAL, 1.0)
    found = [excess_kl_lower_bound(rng.choice(NATURAL, 200, p=weight), NATURAL, 1.0) for _ in range(40)]
    # What noise leaves of it: half of the estimates are 0, the rest as large as k/(2n).
    assert np.mean(found) < 0.01


@given(st.floats(-1.5, 1.5), st.integers(0, 2**32 - 1))
def test_it_never_exceeds_the_truth_by_more_than_noise(shift, seed):
    """q = N(1 + shift, 1) against the tilt N(1, 1): excess KL shift^2 / 2."""
    drawn = np.random.default_rng(seed).standard_normal(4000) + 1 + shift
    assert excess_kl_lower_bound(drawn, NATURAL, 1.0) < shift**2 / 2 + 0.02


def test_more_cells_come_nearer_to_the_truth():
    drawn = np.random.default_rng(3).standard_normal(50_000) + 2
    bounds = [excess_kl_lower_bound(drawn, NATURAL, 1.0, cells=cells) for cells in (2, 5, 20)]
    assert bounds == sorted(bounds)
    assert 0.9 * 0.5 < bounds[-1] < 0.5 + 0.02  # the pool's own noise is in it too


def test_ties_and_a_few_draws_are_no_trouble():
    natural = np.repeat([0.0, 1.0], [90, 10])
    assert excess_kl_lower_bound(np.array([0.0]), natural, 0.0) == 0.0
    assert excess_kl_lower_bound(np.ones(50), natural, 0.0) == pytest.approx(np.log(10) - 1 / 100)
