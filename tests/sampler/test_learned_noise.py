"""Ancestral sampling with a learned or a large variance: diffusers' own steps, its bounds, every lift, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tiltscope
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.levels import sigma_levels
from tiltscope.engine.prior.network import NetworkDenoiser
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.learned_noise import learned_log_variance
from tiltscope.engine.sampler.lifts import LIFTS
from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, seed_key
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.kernels.philox import normal

SHAPE = (3, 4, 4)
LEARNED, LARGE = "ddpm_learned_range", "ddpm_fixed_large"
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
SHORT = {"beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.6, "num_train_timesteps": 12}


class Network(nn.Module):
    """eps and v, smooth functions of x and t. v_of: what v is instead."""

    def __init__(self, v_of=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.v_of, self.calls = v_of, 0

    def forward(self, x, t, return_dict=False):
        self.calls += 1
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        v = 0.8 * torch.sin(5 * x + t) if self.v_of is None else self.v_of(x)
        return (torch.cat([torch.tanh(self.scale * x + 0.01 * t), v], 1),)


def prior_of(network, config=SHORT, **settings):
    settings = {"learned_range": True} | settings
    denoiser = NetworkDenoiser(network, levels=sigma_levels(config), prediction="epsilon", **settings)
    return Prior.from_network(denoiser, shape=SHAPE, name="short", identity="sha256:0")


FEATURE = Feature(lambda x0: (x0 * x0).flatten(1).sum(1), name="energy")


def draw(prior, solver, **settings):
    settings = {"num": 3, "steps": 12, "lam": 0.0, "dtype": "float64"} | settings
    return tiltscope.sample(prior, FEATURE, solver=solver, **settings)


def scheduler_of(config, **settings):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**config, clip_sample=False, **settings)
    # diffusers keeps its schedule in float32, where beta of neighbours is good to 1e-3: the same code on a float64 one.
    betas = np.linspace(config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("steps", [1000, 50])
def test_bounds_and_interpolation_are_diffusers_learned_range(steps):
    """At every step of a whole and of a respaced schedule, in float64."""
    scheduler = scheduler_of(LINEAR, variance_type="learned_range", timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    v = 1.2 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, apart = sigma_levels(LINEAR)[::-1], 1000 // steps
    compared = 0
    for t in scheduler.timesteps.tolist()[:: max(1, steps // 25)]:
        if t < apart:
            continue
        pair = np.array([levels[t], levels[t - apart]])
        bounds = make_plan(LEARNED, steps=2, levels=pair).log_variance[:1]
        expected = scheduler._get_variance(t, predicted_variance=v)
        found = learned_log_variance(v, torch.from_numpy(bounds))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared >= 24


@pytest.mark.parametrize(("solver", "kind"), [(LEARNED, "learned_range"), (LARGE, "fixed_large")])
def test_a_whole_draw_is_diffusers_loop_with_the_same_normals(solver, kind, monkeypatch):
    """Twelve of twelve steps, float64: the state after every one is DDPMScheduler's, which knows nothing of plans."""
    from diffusers.schedulers import scheduling_ddpm

    network = Network().double()
    scheduler = scheduler_of(SHORT, variance_type=kind)
    scheduler.set_timesteps(12)
    key = torch.tensor([seed_key(5)], dtype=torch.int64)

    def z(stream, row):
        here = torch.full((1,), row)
        none = torch.zeros(1, dtype=torch.int64)
        return normal(key, none, here, none, stream=stream, shape=SHAPE, dtype=torch.float64)

    x = z(STREAM_START, 0)
    with torch.no_grad():
        for row, t in enumerate(scheduler.timesteps.tolist()):
            noise = z(STREAM_STEP, row)
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, noise=noise, **_: noise)
            output = network(x, torch.tensor([t]))[0]
            output = output if kind == "learned_range" else output[:, :3]
            x = scheduler.step(output, t, x).prev_sample
    found = draw(prior_of(network), solver, num=1, seed=5)
    # x0 is kept in float32.
    torch.testing.assert_close(found.x0.double(), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("end", "solver"), [(-1.0, "ddpm"), (1.0, LARGE)])
def test_its_ends_are_the_two_fixed_variances(end, solver):
    prior = prior_of(Network(lambda x: torch.full_like(x, end)).double())
    one, other = (draw(prior, each, lam=0.3).x0 for each in (LEARNED, solver))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one, draw(prior, "ddpm" if end > 0 else LARGE, lam=0.3).x0, atol=1e-2)


def test_the_lower_bound_is_the_variance_of_the_posterior():
    """Of x' given x and x0, from the joint Gaussian: precision alpha_step^2/beta + 1/sigma'^2."""
    plan = make_plan(LEARNED, steps=2, levels=np.array([0.8, 0.6]))
    step = math.sqrt(1 - 0.8**2) / math.sqrt(1 - 0.6**2)
    low, high = plan.log_variance[0]
    assert math.exp(low) == pytest.approx(1 / (step**2 / (1 - step**2) + 1 / 0.6**2), rel=1e-12)
    assert math.exp(high) == pytest.approx(1 - step**2, rel=1e-12)
    assert np.isnan(plan.log_variance[-1]).all()  # the last row adds none
    assert (plan.column("c") == 0).all()


@pytest.mark.parametrize("lift", sorted(set(LIFTS) - {"daps"}))
def test_every_lift_hears_the_variance_at_no_further_evaluation(lift):
    """The network runs as often as with a fixed variance, and the variance decides the picture."""
    calls, pictures = {}, {}
    for solver in ("ddpm", LEARNED):
        network = Network().double()
        pictures[solver] = draw(prior_of(network), solver, lam=0.1, lift=lift)
        calls[solver] = network.calls
    assert calls["ddpm"] == calls[LEARNED] > 0
    assert torch.equal(pictures["ddpm"].nfe, pictures[LEARNED].nfe)
    assert not torch.allclose(pictures["ddpm"].x0, pictures[LEARNED].x0, atol=1e-2)


def test_guided_and_unguided_slots_share_a_batch_as_if_alone():
    prior = prior_of(Network().double())
    together = draw(prior, LEARNED, num=2, lam=[0.0, 0.4])
    for at, lam in enumerate((0.0, 0.4)):
        alone = draw(prior, LEARNED, num=1, indices=[at], lam=lam, batch_size=2)
        assert torch.equal(together.x0[at], alone.x0[0])


def test_one_batch_of_the_engine_holds_learned_and_fixed_noise():
    prior = prior_of(Network())
    with tiltscope.Engine(prior, max_batch=4) as engine:
        futures = {
            solver: engine.submit(FEATURE, solver=solver, steps=12, num=2, lam=0.2) for solver in (LEARNED, "ddpm")
        }
        drawn = {solver: future.result() for solver, future in futures.items()}
    for solver, found in drawn.items():
        alone = tiltscope.sample(prior, FEATURE, solver=solver, steps=12, num=2, lam=0.2, batch_size=4)
        assert torch.equal(found.x0, alone.x0)


def test_a_slot_whose_variance_is_no_number_fails_alone():
    def poisoned(x):
        return torch.where(x.flatten(1).sum(1).view(-1, 1, 1, 1) == poisoned.at, torch.nan, torch.zeros_like(x))

    network = Network(poisoned).double()
    prior = prior_of(network)
    poisoned.at = torch.nan
    fine = draw(prior, LEARNED)
    key, which = torch.tensor([seed_key(0)] * 3, dtype=torch.int64), torch.arange(3)
    none = torch.zeros(3, dtype=torch.int64)
    start = normal(key, which, none, none, stream=STREAM_START, shape=SHAPE, dtype=torch.float64)
    poisoned.at = start[1].sum()
    found = draw(prior, LEARNED)
    assert found.ok.tolist() == [True, False, True]
    assert found.nfe.tolist() == [12, 0, 12]
    torch.testing.assert_close(found.x0[1].double(), start[1], rtol=1e-6, atol=1e-6)
    for at in (0, 2):
        assert torch.equal(found.x0[at], fine.x0[at])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"particles": 4}, "particles: solver ddpm_learned_range .*use ddpm"),
        ({"vjp_chunk": 1, "batch_size": 2}, "chunks of a gradient do not hold the learned variance: give runner torch"),
        ({"recurrence": 2}, "recurrence: got 2 .*give recurrence 1"),
    ],
)
def test_what_cannot_be_with_learned_noise_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        draw(prior_of(Network().double()), LEARNED, lam=0.1, **settings)


def test_a_prior_that_has_learned_none_is_refused(tiny_bundle):
    bundle = tiltscope.load(str(tiny_bundle))
    with pytest.raises(ConfigError, match="has learned no variance; give ddpm or ddpm_fixed_large"):
        tiltscope.sample(bundle.prior, bundle.feature("blocks.1:sae:3"), num=1, lam=0.0, steps=2, solver=LEARNED)
