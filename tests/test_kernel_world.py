"""The kernel world: its closed form, and, on 200 real pictures with a real feature, samplers against the exact sum over them."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.tilt.calibrate import estimates, tilt_weights
from tiltscope.engine.tilt.worlds import KernelWorld

GRID = "log_snr(low=-8, high=-1)"


@pytest.fixture(scope="module")
def few():
    return KernelWorld(pictures=torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), s=0.3)


@pytest.mark.parametrize("sigma", [0.05, 0.6, 0.97])
def test_the_denoiser_is_tweedies_formula_of_the_noised_mixture(few, sigma):
    """D = (x + sigma^2 grad log p_sigma(x)) / alpha, with p_sigma written out and differentiated by autograd."""
    alpha = (1 - sigma**2) ** 0.5
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    away = (x[:, None] - alpha * few.pictures.double()).flatten(2)
    log_p = torch.logsumexp(-(away**2).sum(2) / (2 * (alpha**2 * few.s**2 + sigma**2)), 1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    found = few.prior.denoise(x.detach(), torch.full((7,), sigma, dtype=torch.float64))
    torch.testing.assert_close(found, ((x + sigma**2 * score) / alpha).detach(), rtol=1e-9, atol=1e-9)


def test_unguided_draws_are_the_pictures_in_equal_shares(few):
    draws = tiltscope.sample(
        few.prior, tiltscope.Feature(lambda x0: x0.mean((1, 2, 3)), name="mean"), num=2000, lam=0.0, steps=60,
        grid="log_snr(low=-6, high=4)", batch_size=500,
    ).x0  # fmt: skip
    which = few.nearest(draws)
    share = np.bincount(which.numpy(), minlength=5) / 2000
    assert np.abs(share - 0.2).max() < 4 * (0.2 * 0.8 / 2000) ** 0.5
    spread = (draws - few.pictures[which]).flatten(1).std()
    assert float(spread) == pytest.approx(0.3, rel=0.1)


@pytest.fixture(scope="module")
def real():
    bundle = tiltscope.load("emoji64")
    feature = bundle.feature("blocks.5:neuron:7@mean")
    pick = np.sort(np.random.default_rng(0).choice(bundle.pool.num, 200, replace=False))
    return KernelWorld(pictures=bundle.pool.x0(pick)), feature, bundle.pool.activations(feature)[pick]


@pytest.mark.slow
def test_particles_give_the_exact_sum_over_real_pictures(real):
    """4 groups of 128 particles without gradients, 40 ancestral rows; lambda .6 per standard deviation."""
    world, feature, a = real
    lam = 0.6 / a.std()
    exact, log_z = float(tilt_weights(a, lam) @ a), estimates(a, lam).log_z
    asked = {"lam": lam, "solver": "ddpm", "steps": 40, "grid": GRID, "seed": 3}
    found = tiltscope.sample(
        world.prior, feature, num=4, particles=128, batch_size=128, guidance_interval=(0.0, 0.0), **asked
    )
    evidence = found.manifest["log_z"]
    assert abs(evidence["value"] - log_z) < 3 * evidence["se"] + 0.02
    groups = found.group_phi.numpy()
    assert abs(found.manifest["phi_mean"] - exact) < 3 * groups.std(ddof=1) / 4**0.5
    assert found.ess > 100
    plain = tiltscope.sample(world.prior, feature, num=64, batch_size=64, **asked).activation
    print(
        f"exact {exact:.3f}; FK steering, 4 x 128 particles, {found.manifest['phi_mean']:.3f}; "
        f"dps {float(plain.mean()):.3f} +- {float(plain.std()) / 8:.3f}"
    )


@pytest.mark.slow
def test_too_few_particles_for_a_strong_tilt_are_flagged_by_their_ess(real):
    """Two groups of 16 at 4 per standard deviation: whatever they answer, a start or two carries it, and the ESS says so."""
    world, feature, a = real
    found = tiltscope.sample(
        world.prior, feature, num=2, particles=16, batch_size=32, guidance_interval=(0.0, 0.0), lam=4.0 / a.std(),
        solver="ddpm", steps=24, grid=GRID,
    )  # fmt: skip
    assert found.ess < 8
    assert int(found.lineages.max()) < 8
