"""The particle correction against worlds with known answers: Z-hat unbiased, modes in their true shares, failures contained.

The exact answers are those of the discretised prior: in the Gaussian world by the recursion of the plan's own table.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ConfigError, NonFiniteError
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.lifts import Dps
from tiltscope.engine.sampler.particles import proposal_plan
from tiltscope.engine.sampler.plan import GraphKind, make_plan
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=1.7, shape=(2,))
LAM = 0.9


def drawn(world=WORLD, **settings):
    asked = {"num": 64, "lam": LAM, "steps": 40, "particles": 32, "batch_size": 1024} | settings
    return tiltscope.sample(world.prior, world.feature, **asked)


@pytest.mark.parametrize(
    ("settings", "solver"),
    [({}, "ddpm"), ({"solver": "ddim(eta=0.6)"}, "ddim(eta=0.6)"), ({"guidance_interval": (0, 0)}, "ddpm")],
    ids=["twisted", "less noise", "FK steering, no gradients"],
)
def test_log_z_kl_and_the_mean_are_the_discretised_worlds(settings, solver):
    samples = drawn(**settings)
    variance = WORLD.discrete(make_plan(solver, steps=40, grid="angle"), 0.0).variance
    log_z = samples.manifest["log_z"]
    assert log_z["source"] == "smc"
    assert log_z["se"] < 0.12
    # Z-hat is unbiased; log Z-hat is low by se^2/2.
    assert abs(np.expm1(log_z["value"] - LAM**2 * variance / 2)) < 3 * log_z["se"]
    assert abs(samples.manifest["phi_mean"] - LAM * variance) < 0.25
    assert samples.kl == pytest.approx(LAM * samples.manifest["phi_mean"] - samples.log_z)
    if "guidance_interval" in settings:
        assert samples.n_vjp.tolist() == [0] * 64


def test_returned_samples_and_weighted_particles_follow_the_tilt():
    samples = drawn(num=400, particles=8)
    exact = WORLD.discrete(make_plan("ddpm", steps=40, grid="angle"), 0.0).variance
    assert abs(float(samples.activation.mean()) - LAM * exact) < 4 * (exact / 400) ** 0.5
    assert samples.target == "consistent"
    assert samples.particles.shape == (400, 8, 2)
    torch.testing.assert_close(samples.weights.sum(1), torch.ones(400, dtype=torch.float64))
    # Every returned sample is one of its own particles.
    assert ((samples.particles - samples.x0[:, None]).abs().amax(2) == 0).any(1).all()
    read = WORLD.feature.activation(samples.particles.flatten(0, 1)).reshape(400, 8)
    torch.testing.assert_close(samples.particle_activation, read)


def test_a_sample_is_the_same_in_any_company_and_alone():
    together = drawn(num=5, particles=3, batch_size=8, steps=12)
    alone = drawn(num=1, indices=[4], particles=3, batch_size=8, steps=12)
    assert torch.equal(together.x0[4], alone.x0[0])
    assert torch.equal(together.group_log_z[4], alone.group_log_z[0])
    many = drawn(num=2, particles=20, batch_size=8, steps=12)  # one sample in three network calls
    one = drawn(num=1, indices=[1], particles=20, batch_size=8, steps=12)
    assert torch.equal(many.particles[1], one.particles[0])


def test_lam_zero_is_the_prior_with_equal_weights_and_z_one():
    samples = drawn(num=3, lam=0.0, particles=4, batch_size=8, steps=12)
    plain = drawn(num=3, lam=0.0, particles=1, batch_size=8, steps=12)
    torch.testing.assert_close(samples.particles[:, 0], plain.x0, rtol=0, atol=0)
    assert samples.weights.tolist() == [[0.25] * 4] * 3
    assert samples.group_log_z.tolist() == [0.0] * 3
    assert samples.n_vjp.tolist() == [0] * 3


def test_costs_are_counted_for_every_particle_and_every_call():
    calls = []

    def denoise(x, sigma):
        calls.append(len(x))
        return WORLD.prior.denoise(x, sigma)

    prior = Prior(denoise, shape=(2,), name="counted")
    probes = len(calls)
    samples = tiltscope.sample(prior, WORLD.feature, num=2, lam=LAM, steps=6, particles=4, batch_size=8)
    assert samples.nfe.tolist() == [24, 24]
    assert samples.n_vjp.tolist() == [20, 20]  # the last row is unguided
    rows = [size for size in calls[probes:] if size == 8]
    assert len(rows) == 6


@dataclass
class Failing:
    """The Gaussian denoiser, but NaN for one slot of the batch on its n-th call."""

    slots: tuple[int, ...]
    call: int
    calls: int = 0

    def __call__(self, x, sigma):
        out = WORLD.prior.denoise(x, sigma)
        if x.shape[0] == 8:
            self.calls += 1
            if self.calls == self.call:
                bad = torch.zeros(8, dtype=torch.bool)
                bad[list(self.slots)] = True
                out = torch.where(bad[:, None], torch.nan, out)
        return out


def failing(slots, call):
    prior = Prior(Failing(slots, call), shape=(2,), name=f"fails {slots} {call}")
    return tiltscope.sample(prior, WORLD.feature, num=2, lam=LAM, steps=20, particles=4, batch_size=8)


@pytest.mark.parametrize("call", [1, 7, 20])
def test_a_particle_that_fails_weighs_nothing_and_its_group_goes_on(call):
    samples = failing((1,), call)
    sound = failing((), call)
    assert samples.ok.tolist() == [True, True]
    assert torch.isfinite(samples.x0).all()
    assert torch.isfinite(samples.group_log_z).all()
    assert torch.equal(samples.particles[1], sound.particles[1])
    if call == 20:
        assert samples.weights[0, 1] == 0


def test_a_group_that_fails_whole_is_not_ok_and_the_other_is_untouched():
    samples = failing((0, 1, 2, 3), 5)
    assert samples.ok.tolist() == [False, True]
    assert torch.equal(samples.particles[1], failing((), 5).particles[1])
    assert samples.manifest["failures"][0]["row"] == 4
    with pytest.raises(NonFiniteError):
        failing(tuple(range(8)), 5)


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp_2m", "ddim", "ddim(eta=0)"])
def test_a_deterministic_solver_is_refused(solver):
    with pytest.raises(ConfigError, match=r"adds no noise.*ddpm"):
        drawn(solver=solver)


def test_the_proposal_is_the_plan_with_its_last_row_unguided():
    plan = make_plan("ddpm", steps=9, grid="angle")
    ours = proposal_plan(plan, Dps())
    assert ours.kind.tolist() == [GraphKind.GUIDED] * 8 + [GraphKind.UNGUIDED]
    assert ours.column("e")[-1] == 0
    for name in "abcdpqr":
        np.testing.assert_array_equal(ours.column(name), plan.column(name))
    assert plan.kind[-1] == GraphKind.GUIDED


def test_a_large_lambda_and_a_large_activation_stay_finite_or_say_so():
    samples = drawn(num=4, lam=60.0, particles=8, batch_size=32)
    assert torch.isfinite(samples.x0).all()
    assert (samples.lineages <= 8).all()
    assert (samples.lineages >= 1).all()
