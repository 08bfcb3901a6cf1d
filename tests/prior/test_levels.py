"""Noise levels: diffusers' schedules in float64, and the network's time as a smooth, monotone function of sigma."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.levels import alpha_bars, sigma_levels, theta_from_sigma, time_from_sigma

CONFIGS = {
    "linear": {"beta_schedule": "linear"},
    "linear, own ends": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.3, "num_train_timesteps": 50},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.1, 0.2, 0.05, 0.9], "num_train_timesteps": 4},
    "zero terminal SNR": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_schedules_are_diffusers_own(name):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**CONFIGS[name]).alphas_cumprod.numpy()
    ours = alpha_bars(CONFIGS[name])
    assert ours.dtype == np.float64
    # diffusers multiplies up to 1000 factors in float32: 1e-6 of relative error is what that leaves.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7 if "zero" not in name else 1e-6)


def test_zero_terminal_snr_ends_in_pure_noise():
    levels = sigma_levels(CONFIGS["zero terminal SNR"])
    assert levels[0] == 1.0
    assert levels[1] < 1.0


@pytest.mark.parametrize("name", CONFIGS)
def test_levels_fall_strictly_from_the_noisiest(name):
    levels = sigma_levels(CONFIGS[name])
    assert levels.dtype == np.float64
    assert np.all(np.diff(levels) < 0)
    assert levels[-1] > 0
    assert levels[0] <= 1
    np.testing.assert_allclose(1 - levels[::-1] ** 2, alpha_bars(CONFIGS[name]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "linear, scaled_linear, squaredcos_cap_v2, or trained_betas"),
        ({"trained_betas": [0.1]}, "at least 2"),
        ({"trained_betas": [0.1, 0.0]}, "strictly"),
        ({"trained_betas": [0.1, float("nan")]}, "strictly"),
        ({"trained_betas": [0.1, "x"]}, "cannot be read"),
        ({"beta_start": "small"}, "cannot be read"),
        ({"num_train_timesteps": 0}, "at least 2"),
    ],
)
def test_a_schedule_that_is_none_is_refused(config, message):
    with pytest.raises(BundleError, match=message):
        alpha_bars(config)


def thetas(name):
    return theta_from_sigma(torch.from_numpy(sigma_levels(CONFIGS[name])[::-1].copy()))


@pytest.mark.parametrize("name", CONFIGS)
def test_time_is_the_integer_itself_at_every_level(name):
    levels = torch.from_numpy(sigma_levels(CONFIGS[name]))
    time = time_from_sigma(levels.flip(0), thetas(name))
    assert time.dtype == torch.float64
    assert torch.equal(time, torch.arange(len(levels), dtype=torch.float64))


def test_time_is_linear_in_the_angle_between_levels():
    theta = thetas("squaredcos_cap_v2")
    middle = 0.25 * theta[700] + 0.75 * theta[701]
    assert time_from_sigma(torch.sin(middle)[None], theta).item() == pytest.approx(700.75, abs=1e-9)


def test_time_is_clamped_at_both_ends():
    for name in CONFIGS:
        theta = thetas(name)
        time = time_from_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), theta)
        assert time.tolist() == [0.0, len(theta) - 1.0]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_time_never_falls_with_sigma_and_no_sample_sees_another(sigmas):
    theta = thetas("squaredcos_cap_v2")
    sigma = torch.tensor(sorted(sigmas), dtype=torch.float64)
    together = time_from_sigma(sigma, theta)
    assert (together.diff() >= 0).all()
    assert torch.equal(together, torch.cat([time_from_sigma(s[None], theta) for s in sigma]))


def test_a_samples_place_in_the_batch_changes_no_bit_of_its_time():
    """An atan2 would: torch computes the last elements of a batch another way."""
    theta, sigma = thetas("squaredcos_cap_v2"), torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for piece in (1, 3, 5):
        assert torch.equal(
            torch.cat([time_from_sigma(s, theta) for s in sigma.split(piece)]), time_from_sigma(sigma, theta)
        )


def test_the_angle_keeps_alpha_near_pure_noise():
    alpha = 1e-3
    sigma = torch.tensor([math.sqrt((1 - alpha) * (1 + alpha))], dtype=torch.float64)
    assert math.cos(theta_from_sigma(sigma).item()) == pytest.approx(alpha, rel=1e-9)
