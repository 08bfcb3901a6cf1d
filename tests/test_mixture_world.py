"""A sharp mixture, where plug-in guidance gives modes wrong shares and particles do not: the reason for the correction."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.engine.tilt.worlds import MixtureWorld

LAM = 3.0


def weighted_shares(world, samples):
    """Mode shares of all weighted particles, groups weighed by their Z-hat."""
    z = np.exp(samples.group_log_z.numpy() - samples.group_log_z.max().item())
    weight = (z[:, None] * samples.weights.numpy()).ravel() / z.sum()
    return world.shares_of(samples.particle_activation.double().numpy().ravel(), LAM, weight)


def test_the_denoiser_is_tweedies():
    """E[x0 | x] = (x + sigma^2 grad log p(x)) / alpha, p by hand in two dimensions."""
    world = MixtureWorld()
    u = torch.tensor([1.0, 2.0], dtype=torch.float64) / 5**0.5
    x = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.2, 0.6, 0.97], dtype=torch.float64)
    alpha = torch.sqrt(1 - sigma**2)
    v = (alpha**2 * world.s**2 + sigma**2)[:, None]
    away = x[:, None] - alpha[:, None, None] * torch.tensor(world.levels, dtype=torch.float64)[None, :, None] * u
    log_p = torch.logsumexp(torch.tensor(world.weights).double().log() - (away**2).sum(2) / (2 * v), 1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    expected = (x.detach() + (sigma**2)[:, None] * score) / alpha[:, None]
    torch.testing.assert_close(world.prior.denoise(x.detach(), sigma), expected)


def test_exact_shares_log_z_and_the_discrete_limit():
    world = MixtureWorld()
    np.testing.assert_allclose(world.shares(LAM), (0.10, 0.28, 0.62), atol=0.01)
    step = 1e-5
    slope = (world.log_z(LAM + step) - world.log_z(LAM - step)) / (2 * step)
    assert slope == pytest.approx(world.mean(LAM), rel=1e-6)
    coarse, fine = (world.discrete(make_plan("ddpm", steps=rows, grid="angle"), LAM)[0] for rows in (50, 800))
    assert abs(fine - world.log_z(LAM)) < 0.03 < abs(coarse - world.log_z(LAM))


def test_shares_are_found_in_exact_draws():
    world, rng = MixtureWorld(), np.random.default_rng(0)
    shares = np.array([0.5, 0.2, 0.3])
    drawn = rng.normal(np.array(world.levels)[rng.choice(3, 20_000, p=shares)] + LAM * world.s**2, world.s)
    np.testing.assert_allclose(world.shares_of(drawn, LAM), shares, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 16, 64])
def test_dps_fails_where_particles_do_not(dim):
    world = MixtureWorld(dim=dim)
    settings = {"lam": LAM, "steps": 400, "batch_size": 1024}
    plain = tiltscope.sample(world.prior, world.feature, num=1024, **settings)
    shares = world.shares_of(plain.activation.double().numpy(), LAM)
    assert np.abs(shares - world.shares(LAM)).max() > 0.2
    particles = tiltscope.sample(world.prior, world.feature, num=32, particles=256, **settings)
    assert np.abs(weighted_shares(world, particles) - world.shares(LAM)).max() < 0.05


@pytest.mark.slow
def test_the_error_falls_as_the_root_of_the_particles_and_z_is_unbiased():
    world, rows = MixtureWorld(), 60
    log_z, mean = world.discrete(make_plan("ddpm", steps=rows, grid="angle"), LAM)
    counts, errors = (16, 64, 256, 1024), []
    for each in counts:
        samples = tiltscope.sample(
            world.prior, world.feature, num=96, lam=LAM, steps=rows, particles=each, batch_size=1024, seed=each
        )
        estimate = (samples.weights.numpy() * samples.particle_activation.double().numpy()).sum(1)
        errors.append(float(np.sqrt(np.mean((estimate - mean) ** 2))))
        z = np.exp(samples.group_log_z.numpy() - log_z)
        assert abs(z.mean() - 1) < 3 * z.std(ddof=1) / len(z) ** 0.5
    slope = float(np.polyfit(np.log(counts), np.log(errors), 1)[0])
    assert slope == pytest.approx(-0.5, abs=0.1)
