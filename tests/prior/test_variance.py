"""The learned-range variance against diffusers' own, and its bounds against the posterior they are of."""

import numpy as np
import pytest
import torch

from tiltscope.engine.prior.levels import sigma_levels
from tiltscope.engine.prior.variance import learned_log_variance, learned_noise_scale, variance_bounds

CONFIG = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.mark.parametrize("steps", [1000, 50])
def test_it_is_diffusers_learned_range(steps):
    """At every step of a whole and of a respaced schedule, in float64."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**CONFIG, variance_type="learned_range", timestep_spacing="leading")
    # diffusers keeps its schedule in float32, where beta of neighbours is good to 1e-3: the same code on a float64 one.
    betas = np.linspace(1e-4, 0.02, 1000)
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    v = 1.2 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.from_numpy(sigma_levels(CONFIG)[::-1].copy())
    for t in scheduler.timesteps.tolist()[:: max(1, steps // 25)]:
        if (before := t - 1000 // steps) < 0:
            continue
        expected = scheduler._get_variance(t, predicted_variance=v)
        found = learned_log_variance(v, *variance_bounds(levels[[t]], levels[[before]]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_its_ends_are_the_bounds():
    sigma, after = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.7, 0.45, 0.0]).double()
    low, high = variance_bounds(sigma, after)
    v = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    for sign, bound in ((-1, low), (1, high)):
        found = learned_log_variance(sign * v, low, high)
        torch.testing.assert_close(found, bound.view(3, 1, 1, 1).expand_as(v), rtol=1e-12, atol=0)
    assert bool((low < high).all())
    assert low[-1] == pytest.approx(np.log(1e-20))


def test_the_lower_bound_is_the_variance_of_the_posterior():
    """Of x' given x and x0, from the joint Gaussian: precision alpha_step^2/beta + 1/sigma'^2."""
    sigma, after = torch.tensor([0.8]).double(), torch.tensor([0.6]).double()
    step = torch.sqrt(1 - sigma**2) / torch.sqrt(1 - after**2)
    expected = 1 / (step**2 / (1 - step**2) + 1 / after**2)
    torch.testing.assert_close(variance_bounds(sigma, after)[0].exp(), expected, rtol=1e-12, atol=0)
    scale = learned_noise_scale(torch.full((1, 3, 2, 2), -1.0).double(), sigma, after)
    torch.testing.assert_close(scale.square().amax().view(1), expected, rtol=1e-12, atol=0)
