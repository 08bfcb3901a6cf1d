"""p = N(0, s^2 I) with a linear feature, through the public API: samples against the discrete sampler's exact moments.

Plug-in guidance is exact here. What remains is each solver's discretisation, which the float64 recursion over the same table
gives exactly, and the start x ~ N(0, I), which a deterministic solver never forgets.
"""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.prepare import prepare
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.engine.sampler.state import admit
from tiltscope.engine.sampler.tick import tick
from tiltscope.engine.tilt.worlds import GaussianWorld
from tiltscope.engine.unguided import unguided_draws

WORLD = GaussianWorld(s=1.7, shape=(2, 3))
LAM = 0.9
# Weight of the start in the limit: 0 for the probability-flow ODE, 1 for ancestral sampling.
ETA = {
    "ddpm": 1.0,
    "ddpm_fixed_large": 1.0,
    "ddim": 0.0,
    "ddim(eta=0.5)": 0.5,
    "euler": 0.0,
    "flow_euler": 0.0,
    "heun": 0.0,
    "edm(churn=0)": 0.0,
    "dpmpp_2m": 0.0,
    "dpmpp_2m_sde": 1.0,
}
EVERY_SOLVER = [*ETA, "edm(churn=10)"]
# Guidance split off the history is first order, so dpmpp_2m's mean is; its prior part is second order.
ORDER = {"ddpm": 1, "ddim": 1, "euler": 1, "heun": 2, "edm(churn=0)": 2, "dpmpp_2m": 1}


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_sampled_moments_are_the_discrete_samplers(solver):
    num, steps = 4000, 25
    samples = tiltscope.sample(
        WORLD.prior, WORLD.feature, num=num, lam=LAM, solver=solver, steps=steps, batch_size=1000, seed=3
    )
    exact = WORLD.discrete(make_plan(solver, steps=steps, grid="angle"), LAM)
    x = samples.x0.flatten(1).double().numpy()
    along = x @ WORLD.u
    across = x - np.outer(along, WORLD.u)
    sd = exact.variance**0.5
    assert abs(along.mean() - exact.mean) < 3 * sd / num**0.5
    assert abs(along.var() - exact.variance) < 3 * exact.variance * (2 / num) ** 0.5
    degrees = num * (x.shape[1] - 1)
    assert abs((across**2).sum() / degrees - exact.variance) < 3 * exact.variance * (2 / degrees) ** 0.5
    assert np.abs(across.mean(0)).max() < 4 * sd / num**0.5
    torch.testing.assert_close(samples.activation.double(), torch.from_numpy(along), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ORDER)
def test_the_discrete_mean_converges_to_the_limit_of_the_same_start_at_the_solvers_order(solver):
    steps = np.array([64, 128, 256, 512])
    plans = [make_plan(solver, steps=int(each), grid="angle") for each in steps]
    errors = [abs(WORLD.discrete(p, LAM).mean - WORLD.limit(p, LAM, eta=ETA[solver]).mean) for p in plans]
    if solver == "ddpm":  # the mean of ancestral sampling is better than first order: hold its variance instead
        errors = [abs(WORLD.discrete(p, LAM).variance - WORLD.limit(p, LAM, eta=1.0).variance) for p in plans]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDER[solver], abs=0.1)


@pytest.mark.parametrize(
    ("solver", "settings", "mean_order", "variance_order"),
    [
        ("ddpm_fixed_large", {}, None, 1),
        ("ddpm", {}, None, 1),  # the mean of what forgets its start has no error left to measure
        ("ddim(eta=0.5)", {}, 1, 1),
        ("dpmpp_2m", {}, 1, 2),
        ("dpmpp_2m(guided_history=True)", {}, 2, 2),
        ("dpmpp_2m_sde", {}, 1, 2),
        ("dpmpp_2m_sde(guided_history=True)", {}, None, 2),
        ("edm(churn=10)", {}, 2, 2),
        ("heun", {"recurrence": 2, "travel_length": 4}, 2, 2),
        ("euler", {"recurrence": 2}, 1, 1),
    ],
)
def test_weak_order_from_the_exact_recursion(solver, settings, mean_order, variance_order):
    """log2 of the ratio of successive differences of the discrete moments over 256, 512 and 1,024 steps."""
    moments = [
        WORLD.discrete(make_plan(solver, steps=steps, grid="karras", **settings), LAM) for steps in (256, 512, 1024)
    ]
    for order, values in (
        (mean_order, [each.mean for each in moments]),
        (variance_order, [each.variance for each in moments]),
    ):
        if order is not None:
            coarse, fine = np.abs(np.diff(values))
            assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "edm(churn=10)"])
def test_time_travel_samples_the_discrete_moments_and_forgets_the_start(solver):
    num, settings = 4000, {"recurrence": 3, "travel_length": 5}
    samples = tiltscope.sample(
        WORLD.prior, WORLD.feature, num=num, lam=LAM, solver=solver, steps=20, batch_size=1000, seed=5, **settings
    )
    exact = WORLD.discrete(make_plan(solver, steps=20, grid="angle", **settings), LAM)
    assert abs(float(samples.activation.mean()) - exact.mean) < 3 * (exact.variance / num) ** 0.5
    assert abs(float(samples.activation.var()) - exact.variance) < 3 * exact.variance * (2 / num) ** 0.5
    assert (samples.nfe == make_plan(solver, steps=20, grid="angle", **settings).num_rows).all()
    if solver == "euler":  # whose mean floor without travel is -0.17 %
        fine = WORLD.discrete(make_plan(solver, steps=500, grid="angle", **settings), LAM)
        assert fine.mean == pytest.approx(WORLD.tilted(LAM).mean, rel=1e-5)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 1000), ("ddim", 400), ("dpmpp_2m", 120), ("heun", 60)])
def test_two_per_cent_of_the_continuous_answer_at_stated_steps(solver, steps):
    exact, answer = WORLD.discrete(make_plan(solver, steps=steps, grid="angle"), LAM), WORLD.tilted(LAM)
    assert exact.mean == pytest.approx(answer.mean, rel=0.02)
    assert exact.variance == pytest.approx(answer.variance, rel=0.02)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_a_deterministic_solver_keeps_the_mean_floor_of_its_start(solver):
    coarse, fine = (WORLD.discrete(make_plan(solver, steps=steps, grid="angle"), LAM).mean for steps in (1000, 2000))
    unlimited = fine + (fine - coarse) / (2 ** ORDER[solver] - 1)  # Richardson
    assert unlimited / WORLD.tilted(LAM).mean - 1 == pytest.approx(-0.0017, abs=5e-5)


def test_calibration_on_unguided_draws_of_the_sampler():
    """20,000 draws of the discretised prior: lambda, KL and log Z within 3 standard errors of the discrete world's."""
    num, steps, target = 20_000, 40, 1.5
    plan = make_plan("ddpm", steps=steps, grid="angle")
    draws = tiltscope.sample(WORLD.prior, WORLD.feature, num=num, lam=0.0, steps=steps, batch_size=1000)
    found = tiltscope.calibrate(draws.activation.double().numpy(), target)
    variance = WORLD.discrete(plan, 0.0).variance
    lam, kl = target / variance, target**2 / variance / 2
    # d lambda = -(d mean)/variance - lam (d variance)/variance, widened by the weights' effective sample size.
    widen = (num / found.ess) ** 0.5
    lam_se = widen * (1 / (variance * num) + lam**2 * 2 / num) ** 0.5
    assert abs(found.lam - lam) < 3 * lam_se
    assert abs(found.kl - kl) < 3 * target * lam_se
    assert abs(found.log_z - kl) < 3 * widen * (np.exp(2 * kl) - 1) ** 0.5 / num**0.5


def test_a_target_without_a_pool_is_calibrated_on_unguided_draws():
    samples = tiltscope.sample(
        WORLD.prior, WORLD.feature, num=2000, target_activation=1.2, steps=60, batch_size=1000, calibration_num=2000
    )
    assert samples.manifest["kl"]["source"] == "unguided draws"
    error = samples.activation.std() * (2 / 2000) ** 0.5  # of the samples and of the draws that calibrated them
    assert abs(float(samples.activation.mean()) - 1.2) < 4 * float(error)


@pytest.mark.parametrize("lam", [-0.9, 0.9])
def test_a_negative_lambda_suppresses(lam):
    samples = tiltscope.sample(WORLD.prior, WORLD.feature, num=500, lam=lam, steps=30, batch_size=500)
    assert np.sign(float(samples.activation.mean())) == np.sign(lam)


def test_every_sample_has_its_own_lambda():
    lam = [-1.0, 0.0, 1.0] * 300
    samples = tiltscope.sample(WORLD.prior, WORLD.feature, num=900, lam=lam, steps=40, batch_size=900)
    means = samples.activation.reshape(-1, 3).mean(0)
    plan = make_plan("ddpm", steps=40, grid="angle")
    for at, each in enumerate(lam[:3]):
        exact = WORLD.discrete(plan, each)
        assert abs(float(means[at]) - exact.mean) < 4 * (exact.variance / 300) ** 0.5


def test_calibration_draws_are_apart_from_every_sample_a_user_can_ask_for():
    run = prepare(WORLD.prior, WORLD.feature, SampleConfig(num=2, lam=0.0, steps=5, batch_size=2))
    draws = unguided_draws(run.programme, seed=0, num=2, bucket=2)
    asked = tiltscope.sample(WORLD.prior, WORLD.feature, num=2, lam=0.0, steps=5, batch_size=2)
    assert not torch.isclose(draws, asked.x0).any()
    start = admit(run.programme, seed=0, indices=2**31 + np.arange(2), lam=np.zeros(2), readout=None, bucket=2)
    for _ in range(run.plan.num_rows):
        start, _ = tick(start, run.programme)
    assert torch.equal(start.x, draws)


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m_sde"])
def test_scale_and_origin_of_the_activation_are_lambdas_alone(solver):
    """(k a, lambda / k) is the same tilt, and adding a constant to a changes nothing but log Z."""
    asked = {"num": 6, "steps": 12, "solver": solver, "dtype": "float64"}
    plain = tiltscope.sample(WORLD.prior, WORLD.feature, lam=LAM, **asked)
    for k in (0.01, 7.0):
        scaled = tiltscope.Feature(lambda x0, k=k: k * WORLD.feature.activation(x0), name="scaled")
        torch.testing.assert_close(
            tiltscope.sample(WORLD.prior, scaled, lam=LAM / k, **asked).x0, plain.x0, rtol=0, atol=1e-6
        )
    moved = tiltscope.Feature(lambda x0: WORLD.feature.activation(x0) + 100.0, name="moved")
    assert torch.equal(tiltscope.sample(WORLD.prior, moved, lam=LAM, **asked).x0, plain.x0)


def test_the_mean_rises_with_lambda():
    means = [
        float(tiltscope.sample(WORLD.prior, WORLD.feature, num=64, lam=lam, steps=20, batch_size=64).activation.mean())
        for lam in (-2.0, -0.5, 0.0, 0.3, 1.0, 4.0)
    ]
    assert means == sorted(means)


@pytest.mark.parametrize(("scale", "lam"), [(1e4, 0.9), (1.0, 1e6), (1e4, 1e6)])
def test_huge_activations_and_lambdas_are_drawn_or_refused_never_half_of_each(scale, lam):
    """The linear world has an answer however large: mean lam s^2, to single precision."""
    big = tiltscope.Feature(lambda x0: scale * WORLD.feature.activation(x0), name="big")
    samples = tiltscope.sample(WORLD.prior, big, num=3, lam=lam, steps=50)
    assert samples.ok.all()
    expected = scale**2 * WORLD.discrete(make_plan("ddpm", steps=50, grid="angle"), lam).mean
    assert float(samples.activation.mean()) == pytest.approx(expected, rel=1e-3)
