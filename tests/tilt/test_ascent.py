"""Dual ascent on samplers whose law is known: the mean it promises is the mean they then give."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from tiltscope.engine.errors import CalibrationError, ConfigError
from tiltscope.engine.tilt.ascent import Round, ascend, integrate


def gaussian(bias=1.0, sd=1.0, mean=0.0, each=16, seed=0):
    """phi of a sampler that tilts N(mean, sd^2) by bias * lam instead of lam."""

    def draw(lam, number):
        return np.random.default_rng([seed, number]).normal(mean + bias * lam * sd**2, sd, each)

    return draw


def softplus_sampler(seed=0, each=16):
    """A latent that is silent until lambda is large: the mean is convex, then linear."""

    def draw(lam, number):
        z = np.random.default_rng([seed, number]).normal(lam - 3, 1, each)
        return np.maximum(z, 0)

    return draw, lambda lam: (lam - 3) * norm.cdf(lam - 3) + norm.pdf(lam - 3)


@pytest.mark.parametrize("bias", [0.4, 1.0, 2.5])
def test_the_promised_mean_is_within_its_own_error(bias):
    errors = []
    for seed in range(60):
        found = ascend(gaussian(bias, seed=seed), 2.0, start=2.0, natural_mean=0.0, num=128)
        errors.append((bias * found.lam - 2.0) / found.se)
        assert sum(each.num for each in found.rounds) <= 128
    assert np.mean(np.abs(errors) < 2) >= 0.85
    assert abs(np.mean(errors)) < 0.5
    assert 0.7 < np.sqrt(np.mean(np.square(errors))) < 1.4


@pytest.mark.parametrize("target", [0.5, 3.0])
def test_a_silent_feature_is_woken(target):
    for seed in range(10):
        draw, mean = softplus_sampler(seed)
        found = ascend(draw, target, start=0.5, natural_mean=0.0, num=512)
        assert mean(found.lam) == pytest.approx(target, abs=4 * found.se + 0.02 * target)


def test_suppression_goes_the_other_way():
    found = ascend(gaussian(0.5), -1.5, start=-1.0, natural_mean=0.0, num=256)
    assert 0.5 * found.lam == pytest.approx(-1.5, abs=4 * found.se)


def test_it_stops_early_where_the_error_is_small_enough():
    found = ascend(gaussian(sd=0.05), 0.1, start=40.0, natural_mean=0.0, num=10_000)
    assert sum(each.num for each in found.rounds) < 2_000
    assert found.se < 0.02 * 0.1


def test_more_draws_come_nearer():
    def rms(num):
        lams = [ascend(gaussian(seed=s), 2.0, start=1.0, natural_mean=0.0, num=num).lam for s in range(40)]
        return math.sqrt(np.mean((np.array(lams) - 2) ** 2))

    assert rms(512) < 0.7 * rms(64)


def test_the_same_draws_give_the_same_four_digits():
    first, second = (ascend(gaussian(), 2.0, start=1.3, natural_mean=0.0, num=64) for _ in range(2))
    assert first == second
    assert float(f"{first.lam:.4g}") == first.lam


def test_out_of_reach_is_said_with_the_largest_mean():
    def saturating(lam, number):
        return np.random.default_rng([1, number]).normal(math.tanh(lam), 0.05, 16)

    with pytest.raises(CalibrationError, match=r"out of this sampler's reach.*nearest mean reached is 1\.0"):
        ascend(saturating, 2.0, start=0.5, natural_mean=0.0, num=10_000)


def test_nothing_finite_is_said():
    with pytest.raises(CalibrationError, match="fewer than two finite pictures"):
        ascend(lambda lam, number: np.full(8, np.nan), 1.0, start=1.0, natural_mean=0.0, num=64)


def test_too_few_draws_are_said():
    with pytest.raises(CalibrationError, match="not reached in 16 draws"):
        ascend(gaussian(), 30.0, start=1.0, natural_mean=0.0, num=16)


@pytest.mark.parametrize("start", [0.0, math.nan, math.inf])
def test_a_start_that_points_nowhere(start):
    with pytest.raises(ConfigError, match="first lambda"):
        ascend(gaussian(), 1.0, start=start, natural_mean=0.0, num=64)


def test_thermodynamic_integration_of_a_gaussian():
    lams = np.linspace(0, 2, 9)
    exact = [Round(float(lam), float(lam), 1.0, 100) for lam in lams]
    found = integrate(exact, 2.0)
    assert found.log_z == pytest.approx(2.0, rel=1e-9)
    assert found.kl == pytest.approx(2.0, rel=1e-9)
    assert 0.02 < found.se < 0.2
    with pytest.raises(ConfigError, match="rounds at 0"):
        integrate(exact[1:], 2.0)


def test_thermodynamic_integration_errors_cover():
    lams, errors = np.linspace(0, 1.5, 6), []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        drawn = [rng.normal(lam, 1.0, 64) for lam in lams]
        rounds = [Round(float(lam), d.mean(), d.std(ddof=1), 64) for lam, d in zip(lams, drawn, strict=True)]
        found = integrate(rounds, 1.5)
        errors.append((found.log_z - 1.5**2 / 2) / found.se)
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) < 1.25
