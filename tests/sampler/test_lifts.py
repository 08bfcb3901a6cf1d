"""Lifts against their own formulas by autograd in float64, their costs by counting calls, and where theory says they agree."""

import pytest
import torch

import tiltscope
from tiltscope.engine.choice import parse_choice
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.sampler.lifts import LIFTS, Slots
from tiltscope.engine.sampler.noise import STREAM_LIFT, normal
from tiltscope.engine.tilt.log_tilt import parse_log_tilt
from tiltscope.engine.tilt.worlds import GaussianWorld

SHAPE = (5,)
SIGMA = torch.tensor([0.3, 0.8, 0.95], dtype=torch.float64)
ALPHA = torch.sqrt(1 - SIGMA**2)
LAM = torch.tensor([0.7, -1.1, 2.0], dtype=torch.float64)
MIX = torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)
LIGHT = ("dps", "none", "normalized", "lgd_mc(draws=3)", "covariance", "tfg")
EVERY = (*LIGHT, "daps")


def denoise(x, sigma):
    """Smooth, curved, and with a Jacobian that is no multiple of the identity."""
    return torch.tanh(x @ MIX) * torch.cos(sigma)[:, None] + 0.3 * x


def activation(x0):
    return (x0**2).sum(1) + torch.sin(x0).sum(1)


CURVED_PRIOR = Prior(denoise, shape=SHAPE, name="curved")
CURVED = Feature(activation, name="curved")


def slots(log_tilt="linear", lam=LAM, **changes):
    num = len(SIGMA)
    x = torch.stack([torch.from_numpy(normal(9, at, 0, 0, shape=SHAPE)) for at in range(num)])
    values = {
        "x": x,
        "sigma": SIGMA,
        "alpha": ALPHA,
        "readout": None,
        "lam": lam,
        "log_tilt": torch.zeros(num, dtype=torch.int64),
        "log_tilts": (parse_log_tilt(log_tilt),),
        "key": torch.tensor([[3, 0]]).expand(num, 2),
        "index": torch.arange(num),
        "row": torch.full((num,), 4),
        "particle": torch.zeros(num, dtype=torch.int64),
    }
    return Slots(**values | changes)


def push(lift, at, prior=CURVED_PRIOR, feature=CURVED):
    return parse_choice(lift, LIFTS, "lift").push(TorchStep(prior, feature), at)


def moved_by(found):
    return found.grad * found.strength[:, None]


def gradient_of(h, x):
    """(h, dh/dx) by autograd, every sample by itself."""
    x = x.clone().requires_grad_()
    value = h(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def draws(draw):
    return torch.stack([torch.from_numpy(normal(3, at, 4, STREAM_LIFT + draw, shape=SHAPE)) for at in range(3)])


@pytest.mark.parametrize("log_tilt", ["linear", "capped(cap=2.5)"])
def test_dps_is_the_gradient_of_the_tilt_at_the_posterior_mean(log_tilt):
    at, phi = slots(log_tilt), parse_log_tilt(log_tilt)
    h, grad = gradient_of(lambda x: LAM * phi.value(activation(denoise(x, SIGMA))), at.x)
    found = push("dps", at)
    torch.testing.assert_close(moved_by(found), grad)
    torch.testing.assert_close(found.log_twist, h)


def test_lgd_mc_is_the_gradient_of_the_log_mean_of_its_draws():
    at = slots()
    noise = [draws(i) for i in range(3)]

    def h(x):
        x0_hat = denoise(x, SIGMA)
        near = torch.stack([LAM * activation(x0_hat + SIGMA[:, None] * each) for each in noise])
        return torch.log(torch.exp(near).mean(0))

    value, grad = gradient_of(h, at.x)
    found = push("lgd_mc(draws=3)", at)
    torch.testing.assert_close(moved_by(found), grad)
    torch.testing.assert_close(found.log_twist, value)


def test_none_is_the_gradient_at_the_mean_times_a_unit_gaussians_jacobian():
    at = slots()
    x0_hat = denoise(at.x, SIGMA)
    _, grad = gradient_of(lambda x0: LAM * activation(x0), x0_hat)
    torch.testing.assert_close(moved_by(push("none", at)), ALPHA[:, None] * grad)


def test_normalized_has_the_direction_of_dps_and_the_length_of_lam():
    at = slots()
    plain, unit = moved_by(push("dps", at)), moved_by(push("normalized", at))
    torch.testing.assert_close(unit.norm(dim=1), LAM.abs())
    torch.testing.assert_close(torch.cosine_similarity(plain, unit, dim=1), torch.ones(3, dtype=torch.float64))
    silent = Feature(lambda x0: (x0 * 0).sum(1), name="silent")
    assert torch.equal(moved_by(push("normalized", at, feature=silent)), torch.zeros(3, 5, dtype=torch.float64))


def test_tfg_at_its_corners_is_dps_and_none():
    at = slots()
    for corner, plain in (
        ("tfg(rho=1, mu=0, n_iter=1, gamma=0)", "dps"),
        ("tfg(rho=0, mu=1, n_iter=1, gamma=0)", "none"),
    ):
        torch.testing.assert_close(moved_by(push(corner, at)), moved_by(push(plain, at)))
    assert not torch.allclose(moved_by(push("tfg(rho=0, mu=1, n_iter=4, gamma=0)", at)), moved_by(push("none", at)))


@pytest.mark.parametrize("lift", ["lgd_mc", "tfg(gamma=0)", "covariance"])
def test_for_a_linear_feature_and_tilt_every_consistent_lift_is_dps(lift):
    world = GaussianWorld(s=1.0, shape=SHAPE)
    at = slots()
    torch.testing.assert_close(
        moved_by(push(lift, at, world.prior, world.feature)), moved_by(push("dps", at, world.prior, world.feature))
    )


def test_where_lam_is_zero_nothing_pushes_and_the_twist_is_flat():
    wild = Feature(lambda x0: 1e30 * (x0**2).sum(1), name="wild")
    for lift in EVERY:
        found = push(lift, slots(lam=torch.zeros(3, dtype=torch.float64)), feature=wild)
        assert torch.equal(moved_by(found), torch.zeros(3, 5, dtype=torch.float64)), lift
        assert torch.equal(found.log_twist, torch.zeros(3, dtype=torch.float64)), lift


@pytest.mark.parametrize("lift", EVERY)
def test_costs_are_what_was_called(lift):
    seen = {"denoise": 0, "backward": 0}

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, grad):
            seen["backward"] += 1
            return grad

    def counted(x, sigma):
        seen["denoise"] += 1
        return denoise(x, sigma)

    prior = Prior(counted, shape=SHAPE, name="counted")
    feature = Feature(lambda x0: Backward.apply(activation(x0)), name="counted")
    chosen = parse_choice(lift, LIFTS, "lift")
    chosen.push(TorchStep(prior, feature), slots())
    assert (seen["denoise"], seen["backward"]) == (chosen.nfe, chosen.n_vjp)


@pytest.mark.parametrize("lift", LIGHT)
def test_nfe_and_vjp_of_a_run_and_lam_zero_is_the_prior(lift):
    world = GaussianWorld(s=1.3, shape=(3,))
    chosen = parse_choice(lift, LIFTS, "lift")
    samples = tiltscope.sample(world.prior, world.feature, num=2, lam=[0.5, 0.0], lift=lift, steps=7)
    assert samples.nfe.tolist() == [7 * chosen.nfe, 7]
    assert samples.n_vjp.tolist() == [7 * chosen.n_vjp, 0]
    plain = tiltscope.sample(world.prior, world.feature, num=2, lam=0.0, steps=7)
    assert torch.equal(samples.x0[1], plain.x0[1])
    assert not torch.equal(samples.x0[0], plain.x0[0])


@pytest.mark.parametrize("lift", LIGHT)
def test_a_sample_is_the_same_in_any_company_and_with_particles(lift):
    world = GaussianWorld(s=1.3, shape=(3,))
    settings = {"lam": 0.5, "lift": lift, "steps": 7, "batch_size": 8}
    together = tiltscope.sample(world.prior, world.feature, num=6, **settings)
    alone = tiltscope.sample(world.prior, world.feature, num=1, indices=[4], **settings)
    assert torch.equal(together.x0[4], alone.x0[0])
    weighed = tiltscope.sample(world.prior, world.feature, num=2, particles=4, **settings)
    assert torch.isfinite(weighed.group_log_z).all()


def test_daps_is_exact_for_a_unit_gaussian_and_a_linear_tilt():
    world = GaussianWorld(s=1.0, shape=(2,))
    settings = {"num": 4096, "steps": 20, "lift": "daps(ode_steps=1, langevin=2, pace=0.5)", "batch_size": 1024}
    samples = tiltscope.sample(world.prior, world.feature, lam=0.8, **settings)
    assert samples.manifest["config"]["solver"] == "renoise"
    assert float(samples.activation.mean()) == pytest.approx(0.8, abs=4 / 64)
    assert float(samples.activation.var()) == pytest.approx(1.0, abs=0.09)
    assert samples.n_vjp[0] == 2 * int(samples.nfe[0])
    prior = tiltscope.sample(world.prior, world.feature, lam=0.0, **settings)
    other = tiltscope.sample(world.prior, Feature(lambda x0: (x0**3).sum(1), name="another"), lam=0.0, **settings)
    assert torch.equal(prior.x0, other.x0)


@pytest.mark.parametrize(
    "settings",
    [{"lift": "daps", "solver": "ddpm"}, {"lift": "dps", "solver": "renoise"}, {"lift": "daps", "particles": 4}],
)
def test_daps_and_its_solver_need_each_other_and_no_particles(settings):
    world = GaussianWorld(s=1.0, shape=(2,))
    with pytest.raises(ConfigError, match="daps"):
        tiltscope.sample(world.prior, world.feature, num=1, lam=1.0, steps=3, **settings)


@pytest.mark.parametrize(
    ("lift", "words"),
    [
        ("dsp", "lift: got 'dsp', allowed are dps, none, normalized"),
        ("lgd_mc(draws=0)", "draws must be a whole number from 1 to 64"),
        ("lgd_mc(draws=2.5)", "draws must be a whole number"),
        ("tfg(rho=-1)", "rho must be at least 0"),
        ("daps(pace=0)", "pace must lie in"),
        ("daps(ode_steps=0)", "ode_steps must be a whole number"),
    ],
)
def test_refusals(lift, words):
    world = GaussianWorld(s=1.3, shape=(3,))
    with pytest.raises(ConfigError) as refusal:
        tiltscope.sample(world.prior, world.feature, num=1, lam=1.0, lift=lift, steps=3)
    assert words in str(refusal.value)


def test_diversity_is_the_gradient_of_the_mean_distance_between_the_batchs_posterior_means():
    """Of lam a(D_i) + g mean_j |D_i - D_j| with the others held; an untilted slot neither pushes nor is pushed."""
    lam = torch.tensor([0.7, 0.0, 2.0], dtype=torch.float64)
    found = moved_by(push("dps(diversity=0.7)", slots(lam=lam)))
    mean = denoise(slots().x, SIGMA)

    def h(x):
        here = denoise(x, SIGMA)
        apart = (here - mean[[2, 1, 0]]).norm(dim=1)
        return torch.where(lam == 0, 0.0, lam * activation(here) + 0.7 * apart)

    torch.testing.assert_close(found, gradient_of(h, slots().x)[1], rtol=1e-9, atol=1e-12)
    assert not found[1].any()


def test_what_couples_a_batch_says_so():
    world = GaussianWorld(s=1.0, shape=(3, 4))
    asked = {"num": 4, "lam": 1.0, "steps": 10, "dtype": "float64"}
    apart = tiltscope.sample(world.prior, world.feature, lift="dps(diversity=3)", **asked)
    plain = tiltscope.sample(world.prior, world.feature, **asked)
    assert (apart.target, plain.target) == ("coupled", "approximate")
    assert float(torch.pdist(apart.x0.flatten(1)).mean()) > 1.2 * float(torch.pdist(plain.x0.flatten(1)).mean())
    assert apart.n_vjp.tolist() == plain.n_vjp.tolist()
    with pytest.raises(ConfigError, match="diversity must be at least 0"):
        parse_choice("dps(diversity=-1)", LIFTS, "lift")
