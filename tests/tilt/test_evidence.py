"""Groups of particles as one estimate: hand-made groups with known answers, and invariances."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.tilt.evidence import combine

groups = st.lists(st.tuples(st.floats(-5, 5), st.floats(-3, 3), st.floats(1, 50)), min_size=2, max_size=8)


def test_two_groups_by_hand():
    found = combine([math.log(1.0), math.log(3.0)], [2.0, 4.0], [10.0, 5.0], lam=2.0)
    assert found is not None
    assert found.log_z == pytest.approx(math.log(2.0))
    assert found.log_z_se == pytest.approx(math.sqrt(2) / math.sqrt(2) / 2)
    assert found.phi_mean == pytest.approx((1 * 2 + 3 * 4) / 4)
    assert found.kl == pytest.approx(2 * 3.5 - math.log(2))
    assert found.ess == pytest.approx(16 / (1 / 10 + 9 / 5))


@given(groups, st.floats(-20, 20))
def test_a_constant_added_to_phi_moves_log_z_alone(rows, shift):
    log_z, phi, ess = (np.array(each) for each in zip(*rows, strict=True))
    lam = 0.7
    plain, moved = combine(log_z, phi, ess, lam), combine(log_z + lam * shift, phi + shift, ess, lam)
    assert plain is not None
    assert moved is not None
    assert moved.log_z == pytest.approx(plain.log_z + lam * shift, abs=1e-9)
    assert moved.kl == pytest.approx(plain.kl, abs=1e-9)
    assert moved.ess == pytest.approx(plain.ess)


def test_equal_groups_are_one_group_with_more_particles():
    found = combine([1.0] * 4, [2.0] * 4, [8.0] * 4, lam=1.5)
    assert found is not None
    assert (found.log_z, found.phi_mean, found.ess) == pytest.approx((1.0, 2.0, 32.0))
    assert found.log_z_se == pytest.approx(0.0)
    assert combine([1.0], [2.0], [8.0], lam=1.5).log_z_se is None


def test_a_group_that_failed_counts_as_no_weight_and_nothing_is_said_of_none():
    found = combine([0.0, -math.inf], [1.0, math.nan], [4.0, math.nan], lam=1.0)
    assert found is not None
    assert found.log_z == pytest.approx(math.log(0.5))
    assert (found.phi_mean, found.ess) == pytest.approx((1.0, 4.0))
    assert combine([-math.inf], [0.0], [1.0], lam=1.0) is None
    with pytest.raises(ConfigError, match="one row a group"):
        combine([0.0, 1.0], [1.0], [1.0], lam=1.0)
