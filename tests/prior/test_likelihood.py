"""The probability-flow likelihood against densities that are known."""

import math

import numpy as np
import pytest
import torch

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.likelihood import HIGH, LOW, bits_per_dim, log_density
from tiltscope.engine.tilt.worlds import GaussianWorld, MixtureWorld


def gaussian_log_density(x, variance):
    size = x[0].numel()
    return -(x.flatten(1) ** 2).sum(1) / (2 * variance) - size / 2 * math.log(2 * math.pi * variance)


@pytest.mark.parametrize("s", [0.3, 1.0, 1.7])
def test_a_gaussian_prior_has_its_own_density(s):
    world = GaussianWorld(s=s, shape=(3, 4))
    x = s * torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3, 4)))
    variance = math.cos(LOW) ** 2 * s**2 + math.sin(LOW) ** 2
    # The start at HIGH is N(0, v) with v not quite 1, and Heun is second order: nats for 12 numbers.
    expected = gaussian_log_density(x, variance)
    torch.testing.assert_close(log_density(world.prior, x, steps=200), expected, rtol=0, atol=2e-3)


def test_the_error_falls_with_the_square_of_the_steps():
    world = GaussianWorld(s=0.4, shape=(2,))
    x = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
    found = [float(log_density(world.prior, x, steps=steps)) for steps in (40, 80, 160, 320)]
    coarse, _, fine = np.abs(np.diff(found))
    assert np.log2(coarse / fine) / 2 == pytest.approx(2, abs=0.15)


def test_a_density_that_is_no_gaussian_sums_to_one_and_ranks_as_it_should():
    world = MixtureWorld(dim=1, s=0.3)
    grid = torch.linspace(-3, 4, 1401, dtype=torch.float64)[:, None]
    found = log_density(world.prior, grid, steps=400).exp()
    assert float(found.sum() * 7 / 1400) == pytest.approx(1, abs=5e-3)
    variance = math.cos(LOW) ** 2 * 0.3**2 + math.sin(LOW) ** 2
    levels = math.cos(LOW) * torch.tensor(world.levels, dtype=torch.float64)
    density = torch.exp(-((grid - levels) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    expected = density @ torch.tensor(world.weights, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_bits_per_dim_of_white_noise_is_its_entropy():
    """N(0, s^2) blurred: the mean of -log2 p over its own draws is log2(sqrt(2 pi e) s) + log2(127.5) a number."""
    world, num = GaussianWorld(s=0.5, shape=(3, 8, 8)), 400
    x0 = 0.5 * torch.from_numpy(np.random.default_rng(1).standard_normal((num, 3, 8, 8)))
    entropy = math.log2(math.sqrt(2 * math.pi * math.e * (0.5**2 + math.tan(LOW) ** 2)) * 127.5)
    found = bits_per_dim(world.prior, x0, steps=100)
    assert abs(float(found.mean()) - entropy) < 3 * float(found.std()) / num**0.5 + 2e-3


def test_what_is_refused():
    world = GaussianWorld()
    with pytest.raises(ConfigError, match="low < high"):
        log_density(world.prior, torch.zeros(1, 2), low=HIGH, high=LOW)
