"""Calibration: laws that hold for every pool, the Gaussian answer, and refusals that say what can be reached."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiltscope.engine.errors import CalibrationError, ConfigError
from tiltscope.engine.tilt.calibrate import (
    calibrate,
    default_target,
    estimates,
    largest_reachable,
    quantile_of,
    target_at_quantile,
    tilt_weights,
    tilted_mean,
)
from tiltscope.engine.tilt.log_tilt import Capped


@st.composite
def pools(draw: st.DrawFn) -> NDArray[np.float64]:
    values = np.array(draw(st.lists(st.floats(-5, 5), min_size=20, max_size=60)))
    # Spread over all, so that a target between the mean and the largest reachable exists with room for rounding.
    values = values + np.linspace(0, 1, len(values))
    assume(values.std() > 0.1)
    return values


fractions = st.floats(0.05, 0.95)


def reachable(pool: NDArray[np.float64], fraction: float) -> float:
    return float(pool.mean() + fraction * (largest_reachable(pool) - pool.mean()))


@given(pools(), fractions)
def test_the_target_is_met(pool: NDArray[np.float64], fraction: float) -> None:
    target = reachable(pool, fraction)
    found = calibrate(pool, target)
    weights = tilt_weights(pool, found.lam)
    assert found.feasible
    assert weights @ pool == pytest.approx(target, abs=1e-11)
    assert found.kl == pytest.approx(weights @ np.log(len(pool) * weights), abs=1e-11)
    assert found.kl == pytest.approx(found.lam * target - found.log_z, abs=1e-10)
    assert found.ess == pytest.approx(1 / (weights**2).sum())
    assert found.max_weight == pytest.approx(weights.max())


@given(pools(), fractions, st.floats(-100, 100))
def test_adding_a_constant_changes_nothing_but_log_z(
    pool: NDArray[np.float64], fraction: float, constant: float
) -> None:
    target = reachable(pool, fraction)
    plain, moved = calibrate(pool, target), calibrate(pool + constant, target + constant)
    assert moved.lam == pytest.approx(plain.lam, rel=1e-8, abs=1e-8)
    assert moved.kl == pytest.approx(plain.kl, rel=1e-8, abs=1e-10)
    assert moved.ess == pytest.approx(plain.ess, rel=1e-8)
    assert moved.log_z - plain.log_z == pytest.approx(plain.lam * constant, rel=1e-7, abs=1e-6)


@given(pools(), fractions, st.floats(1e-3, 1e3))
def test_scaling_the_activation_scales_lambda_back(pool: NDArray[np.float64], fraction: float, k: float) -> None:
    target = reachable(pool, fraction)
    plain, scaled = calibrate(pool, target), calibrate(k * pool, k * target)
    assert scaled.lam * k == pytest.approx(plain.lam, rel=1e-8, abs=1e-8)
    for name in ("kl", "log_z", "ess", "max_weight"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-7, abs=1e-9)


@given(pools(), st.floats(-20, 20), st.floats(0.01, 5))
def test_the_tilted_mean_rises_with_lambda_and_ess_falls_away_from_zero(
    pool: NDArray[np.float64], lam: float, step: float
) -> None:
    assert tilted_mean(pool, lam + step) >= tilted_mean(pool, lam)
    near, far = sorted((lam, lam + math.copysign(step, lam)), key=abs)
    assert estimates(pool, far).ess <= estimates(pool, near).ess * (1 + 1e-9)


@given(pools())
def test_the_default_target_is_the_largest_that_ess_and_weight_allow(pool: NDArray[np.float64]) -> None:
    chosen = default_target(pool)
    here, beyond = estimates(pool, chosen.lam), estimates(pool, chosen.lam * 1.001 + 1e-9)
    assert here.ess >= 10 - 1e-6
    assert here.max_weight <= 0.2
    near_top = chosen.target >= pool.mean() + 0.989 * (pool.max() - pool.mean())
    assert near_top or beyond.ess < 10 or beyond.max_weight > 0.2
    assert calibrate(pool, chosen.target).lam == pytest.approx(chosen.lam, rel=1e-6, abs=1e-6)
    assert target_at_quantile(pool, chosen.quantile) == pytest.approx(chosen.target, abs=1e-9)


@given(pools())
def test_a_refusal_names_the_largest_target_that_can_be_asked_for(pool: NDArray[np.float64]) -> None:
    refused = calibrate(pool, float(pool.max()) + 1)
    assert not refused.feasible
    assert refused.lam == math.inf
    named = re.search(r"the largest reachable target is (\S+)$", refused.reason)
    assert named is not None
    assert calibrate(pool, float(named[1])).feasible
    again = calibrate(pool, (pool.max() + largest_reachable(pool)) / 2)
    # Ten or more activations at the top carry any target below it.
    assert again.feasible or named[0] in again.reason


@pytest.mark.parametrize("seed", range(5))
def test_gaussian_draws_give_lambda_kl_and_log_z_within_three_standard_errors(seed: int) -> None:
    s, lam, num = 1.7, 0.9, 20_000
    target, half = lam * s**2, lam**2 * s**2 / 2
    found = calibrate(np.random.default_rng(seed).normal(0, s, num), target)
    # r = exp(lam a)/Z has E[r^2] = exp(lam^2 s^2), and r^2 p is Gaussian around 2 lam s^2: the delta method in closed form.
    se_kl = math.sqrt((math.exp(2 * half) - 1) / num)
    se_lam = math.sqrt(math.exp(2 * half) * (s**2 + target**2) / num) / s**2
    # log Z moves with lambda and with Z:  d log Z = target d lam + d Z / Z,  whose covariance is E[r^2 (target - a)] / s^2.
    covariance = -target * math.exp(2 * half) / s**2 / num
    se_log_z = math.sqrt(target**2 * se_lam**2 + se_kl**2 + 2 * target * covariance)
    assert abs(found.lam - lam) < 3 * se_lam
    assert abs(found.kl - half) < 3 * se_kl
    assert abs(found.log_z - half) < 3 * se_log_z


def test_huge_activations_and_lambdas_neither_overflow_nor_cancel() -> None:
    pool = 1e4 * np.random.default_rng(0).normal(size=200)
    for lam in (1e6, -1e6):
        found, end = estimates(pool, lam), pool.max() if lam > 0 else pool.min()
        assert found.kl == pytest.approx(math.log(200))
        assert found.log_z == pytest.approx(lam * end - math.log(200))
        assert tilt_weights(pool, lam).sum() == 1
    # KL ~ lam^2 variance / 2: twelve digits below the terms it is the difference of.
    assert estimates(pool + 1e6, 1e-9).kl == pytest.approx(1e-18 * pool.var() / 2, rel=1e-4)
    nearly = calibrate(pool, float(np.sort(pool)[-1] - 1e-8))
    assert nearly.ess == pytest.approx(1)
    assert not nearly.feasible


def test_the_natural_mean_needs_no_tilt_and_less_than_it_is_refused() -> None:
    pool = np.random.default_rng(1).normal(2.0, 1.0, 500)
    assert calibrate(pool, pool.mean()).lam == pytest.approx(0, abs=1e-12)
    assert calibrate(pool, pool.mean()).feasible
    below = calibrate(pool, 1.5)
    assert (below.lam, below.kl, below.feasible) == (0.0, 0.0, False)
    assert "lambda would be 0" in below.reason
    asked = [float(number) for number in re.findall(r"from (\S+) to (\S+),", below.reason)[0]]
    assert all(calibrate(pool, target).feasible for target in asked)


def test_a_cap_calibrates_phi_and_its_own_height_is_the_hard_constraint() -> None:
    pool = np.random.default_rng(2).normal(size=2000)
    capped = Capped(1.5)
    found = calibrate(pool, 1.0, log_tilt=capped)
    assert tilt_weights(pool, found.lam, log_tilt=capped) @ np.minimum(pool, 1.5) == pytest.approx(1.0)
    hard = calibrate(pool, 1.5, log_tilt="capped(1.5)")
    assert not hard.feasible
    assert hard.kl == pytest.approx(-math.log((pool >= 1.5).mean()))
    almost = calibrate(pool, 1.4999, log_tilt=capped)
    assert almost.feasible
    assert almost.kl == pytest.approx(hard.kl, rel=1e-2)
    assert default_target(pool, log_tilt=capped).target < 1.5
    assert math.isfinite(default_target(pool, log_tilt=capped).lam)


def test_one_dominating_picture_is_named() -> None:
    pool = np.append(np.random.default_rng(3).normal(size=1000), [4.5])
    target = tilted_mean(pool, 3.4)
    found = calibrate(pool, target)
    assert found.max_weight > 0.2
    assert found.ess < 10 or f"{found.max_weight:.0%}" in found.reason
    assert default_target(pool).target < target


def test_tensors_and_lists_are_activations_too() -> None:
    pool = np.random.default_rng(4).normal(size=64)
    expected = calibrate(pool, 0.5)
    assert calibrate(torch.from_numpy(pool).requires_grad_(), 0.5) == calibrate(pool.tolist(), 0.5) == expected


def test_the_pool_is_not_written_into() -> None:
    pool = np.random.default_rng(5).normal(size=64)
    before = pool.copy()
    calibrate(pool, 0.5, log_tilt="capped(1.0)")
    assert (pool == before).all()


@settings(max_examples=20)
@given(st.floats(-1e4, 1e4), st.integers(10, 50))
def test_what_does_not_vary_cannot_be_tilted(value: float, num: int) -> None:
    for act in (lambda p: calibrate(p, value), lambda p: tilt_weights(p, 1.0), default_target, largest_reachable):
        with pytest.raises(CalibrationError, match="no tilt can move"):
            act(np.full(num, value))
    with pytest.raises(CalibrationError, match="higher cap"):
        calibrate(np.linspace(value + 1, value + 2, num), value, log_tilt=Capped(value))


@pytest.mark.parametrize(
    "activations", [[[1.0, 2.0]], [1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], ["a", "b"], 3.0, None]
)
def test_wrong_activations_are_refused(activations: object) -> None:
    with pytest.raises(ConfigError, match=r"^activations got"):
        calibrate(activations, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [math.nan, math.inf, True, "1", None])
def test_wrong_targets_and_lambdas_are_refused(number: object) -> None:
    pool = np.linspace(0, 1, 20)
    with pytest.raises(ConfigError, match="target got"):
        calibrate(pool, number)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lam got"):
        tilt_weights(pool, number)  # type: ignore[arg-type]


def test_too_few_activations() -> None:
    few = calibrate(np.arange(9.0), 5.0)
    assert not few.feasible
    assert "at least 10" in few.reason
    with pytest.raises(CalibrationError, match="at least 10"):
        default_target(np.arange(9.0))


def test_quantiles_are_inverse_and_bounded() -> None:
    pool = np.random.default_rng(6).normal(size=101)
    assert target_at_quantile(pool, quantile_of(pool, 0.3)) == pytest.approx(0.3)
    assert quantile_of(pool, pool.max() + 1) == 1.0
    with pytest.raises(ConfigError, match="0 to 1"):
        target_at_quantile(pool, 1.5)
