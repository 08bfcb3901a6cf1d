"""What the pool's rivals are as distributions, and the identity that prices them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.tilt.calibrate import calibrate, estimates, tilt_weights, tilted_mean
from tiltscope.engine.tilt.log_tilt import Capped, Linear, LogTilt
from tiltscope.engine.tilt.pool_rivals import (
    excess_kl,
    excess_kl_of_set,
    hard_truncation,
    kl_from_pool,
    top_k,
)

POOL = np.random.default_rng(0).normal(size=300)
pool_values = st.lists(st.integers(-8, 8).map(float), min_size=12, max_size=40).map(np.array)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.9), st.sampled_from([Linear(), Capped(2.2)]))
def test_the_excess_kl_of_any_q_with_the_tilts_mean_is_what_it_pays_beyond_the_tilt(
    seed: int, target: float, log_tilt: LogTilt
) -> None:
    rng = np.random.default_rng(seed)
    phi = log_tilt.phi(POOL)
    # A random q, mixed with a point mass on the other side of the target until its mean is the target.
    q = rng.dirichlet(np.full(len(POOL), 0.3))
    end = np.zeros(len(POOL))
    end[phi.argmax() if q @ phi < target else phi.argmin()] = 1
    share = (target - q @ phi) / (end @ phi - q @ phi)
    q = (1 - share) * q + share * end
    tilt = calibrate(POOL, target, log_tilt=log_tilt)
    weights = tilt_weights(POOL, tilt.lam, log_tilt=log_tilt)
    carried = q > 0
    direct = q[carried] @ np.log(q[carried] / weights[carried])
    assert direct >= 0
    assert kl_from_pool(q) == pytest.approx(direct + kl_from_pool(weights), abs=1e-9)
    assert excess_kl(kl_from_pool(q), float(q @ phi), lam=tilt.lam, log_z=tilt.log_z) == pytest.approx(direct, abs=1e-9)


def test_excess_kl_of_a_set_is_its_kl_to_the_tilt_also_off_the_constraint() -> None:
    tilt = estimates(POOL, 1.3)
    members = top_k(POOL, 8)
    weights = tilt_weights(POOL, 1.3)
    direct = np.mean(np.log(1 / 8 / weights[members]))
    assert excess_kl_of_set(POOL, members, lam=tilt.lam, log_z=tilt.log_z) == pytest.approx(direct, abs=1e-12)
    assert excess_kl(tilt.kl, tilted_mean(POOL, 1.3), lam=1.3, log_z=tilt.log_z) == pytest.approx(0, abs=1e-12)
    assert kl_from_pool(np.full(300, 1 / 300)) == pytest.approx(0, abs=1e-12)


@given(pool_values, st.integers(1, 50))
def test_top_k_is_the_strongest_in_order_and_ties_keep_their_place(activations: NDArray[np.float64], num: int) -> None:
    chosen = top_k(activations, num)
    assert len(chosen) == min(num, len(activations))
    expected = sorted(range(len(activations)), key=lambda at: (-activations[at], at))[:num]
    assert chosen.tolist() == expected


@given(pool_values, st.floats(-8, 8), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_hard_truncation_takes_the_threshold_whose_mean_is_nearest(
    activations: NDArray[np.float64], target: float, num: int, seed: int
) -> None:
    found = hard_truncation(activations, target, num, seed=seed)
    assert sorted(found.members.tolist()) == np.flatnonzero(activations >= found.threshold).tolist()
    assert len(found.members) >= 5
    assert found.mean == pytest.approx(activations[found.members].mean())
    for threshold in activations:
        above = activations[activations >= threshold]
        if 5 <= len(above) < len(activations):  # the whole pool truncates nothing
            assert abs(found.mean - target) <= abs(above.mean() - target) + 1e-12
    assert len(found.chosen) == min(num, len(found.members))
    assert len(set(found.chosen.tolist())) == len(found.chosen)
    assert set(found.chosen.tolist()) <= set(found.members.tolist())


@given(st.integers(0, 2**64 - 1), st.integers(1, 12))
def test_fewer_asked_for_are_the_first_of_more(seed: int, num: int) -> None:
    more = hard_truncation(POOL, 1.2, 13, seed=seed).chosen
    assert hard_truncation(POOL, 1.2, num, seed=seed).chosen.tolist() == more[:num].tolist()


def test_every_member_is_drawn_equally_often() -> None:
    found = hard_truncation(POOL, 1.9, 3, seed=0)
    num = 2000
    counts = {int(member): 0 for member in found.members}
    for seed in range(num):
        for member in hard_truncation(POOL, 1.9, 3, seed=seed).chosen:
            counts[int(member)] += 1
    share = 3 / len(counts)
    error = math.sqrt(num * share * (1 - share))
    assert 5 < len(counts) < 60
    assert max(abs(count - num * share) for count in counts.values()) < 4 * error


def test_adjacent_seeds_draw_unrelated_pictures() -> None:
    first, second = (hard_truncation(POOL, 0.0, 50, seed=seed).chosen for seed in (0, 1))
    assert first.tolist() != second.tolist()
    assert len(set(first) & set(second)) < 25


def test_a_pool_too_small_to_truncate_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        hard_truncation(np.arange(4.0), 2.0, 2, seed=0)


@given(pool_values)
def test_a_set_costs_at_least_what_the_tilt_of_its_own_mean_costs(activations: NDArray[np.float64]) -> None:
    members = top_k(activations, 5)
    mean = float(activations[members].mean())
    assume(activations.mean() < mean < activations.max())
    tilt = calibrate(activations, mean)
    assert math.log(len(activations) / 5) >= tilt.kl - 1e-9


def test_a_low_target_still_truncates():
    """A feature that is silent on most pictures: the whole pool's mean may be nearer, and would constrain nothing."""
    activations = np.concatenate([np.zeros(90), np.linspace(1, 2, 10)])
    found = hard_truncation(activations, 0.4, 8, seed=0)
    assert len(found.members) == 10
    assert found.threshold == 1.0


def test_where_everything_ties_the_pool_is_all_there_is():
    assert len(hard_truncation(np.ones(20), 1.0, 8, seed=0).members) == 20
