"""The table: identities every row obeys, special cases, choices by name, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.choice import describe_choice, parse_choice
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.levels import alpha_bars
from tiltscope.engine.sampler.grids import GRIDS, Angle, FlowShift, Karras
from tiltscope.engine.sampler.plan import GraphKind, make_plan
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.sampler.solvers import SOLVERS, Ddim, Heun

LEVELS = np.sin(np.linspace(np.arccos(5e-5), 0.01, 1000))
EVERY_SOLVER = [*SOLVERS, "ddim(eta=0.5)", "dpmpp_2m(guided_history=True)", "edm(churn=0)"]
ONE_ROW_A_STEP = ["ddpm", "ddim(eta=0.5)", "euler", "dpmpp_2m", "dpmpp_2m_sde", "flow_euler", "renoise"]


def columns(plan):
    return {name: plan.column(name) for name in COLUMNS}


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_known_picture_and_known_noise_are_followed_exactly(solver, grid, steps):
    """With D = x0 the true path is x = alpha x0 + sigma eps: first-order rows are exact, and every plan ends at x0."""
    plan = make_plan(solver, steps=steps, grid=grid, levels=LEVELS)
    x0, rng = 0.7, np.random.default_rng(0)
    k = columns(plan)
    x, history = k["alpha"][0] * x0 + k["sigma"][0] * 1.3, 0.0
    for at in range(plan.num_rows):
        z = rng.standard_normal()
        x, history = (
            k["a"][at] * x + k["b"][at] * x0 + k["c"][at] * z + k["d"][at] * history,
            k["p"][at] * x + k["q"][at] * x0 + k["r"][at] * history,
        )
    assert x == pytest.approx(x0, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginal_variance(eta):
    """Given x0, x' has mean alpha' x0 and variance sigma'^2: a^2 sigma^2 + c^2 = sigma'^2 and a alpha + b = alpha'."""
    plan = make_plan(Ddim(eta), steps=50, grid="angle")
    k = columns(plan)
    after_sigma, after_alpha = np.sin(plan.thetas[1:]), np.cos(plan.thetas[1:])
    np.testing.assert_allclose(k["a"] ** 2 * k["sigma"] ** 2 + k["c"] ** 2, after_sigma**2, atol=1e-12)
    np.testing.assert_allclose(k["a"] * k["alpha"] + k["b"], after_alpha, atol=1e-12)


@pytest.mark.parametrize("solver", ONE_ROW_A_STEP)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("repeats", [(1, 1), (3, 1), (2, 4)])
def test_given_the_picture_every_row_ends_at_the_next_ones_noise_level(solver, grid, repeats):
    """Mean alpha' x0 and variance sigma'^2 after every row, a jump back up to the noise included."""
    recurrence, travel_length = repeats
    plan = make_plan(solver, steps=12, grid=grid, levels=LEVELS, recurrence=recurrence, travel_length=travel_length)
    assert plan.num_rows == 12 * recurrence
    k, x0 = columns(plan), 0.7
    mean, variance = k["alpha"][0] * x0, k["sigma"][0] ** 2
    for at in range(plan.num_rows):
        remembered = 0.0 if at == 0 else x0  # with D = x0 the history is D itself, and carries no noise
        mean = k["a"][at] * mean + k["b"][at] * x0 + k["d"][at] * remembered
        variance = k["a"][at] ** 2 * variance + k["c"][at] ** 2
        alpha, sigma = (
            k[name][at + 1] if at + 1 < plan.num_rows else end for name, end in (("alpha", 1), ("sigma", 0))
        )
        assert mean == pytest.approx(alpha * x0, abs=1e-12)
        assert variance == pytest.approx(sigma**2, abs=1e-12)


def test_churn_raises_the_noise_by_the_published_factor():
    """Karras et al. 2022 algorithm 2: each step but the first starts at (1 + gamma) sigma/alpha, inside [s_min, s_max]."""
    plan = make_plan("edm(churn=6, s_min=0.05, s_max=50)", steps=30, grid="karras")
    k = columns(plan)
    ratio = k["sigma"] / k["alpha"]
    grid = np.tan(plan.thetas[:-1])
    inside = (grid >= 0.05) & (grid <= 50)
    inside[0] = False
    np.testing.assert_allclose(ratio[::2], grid * np.where(inside, 1 + 6 / 30, 1), rtol=1e-12)
    np.testing.assert_allclose(ratio[1::2], grid[1:], rtol=1e-12)
    # In sigma/alpha units the noise added has variance (1 + gamma)^2 s^2 - s^2, and nothing else is noise.
    added = (k["c"][1:-1:2] / k["alpha"][2::2]) ** 2
    np.testing.assert_allclose(added, np.where(inside[1:], (1.2**2 - 1) * grid[1:] ** 2, 0.0), rtol=1e-9, atol=1e-15)
    assert not k["c"][::2].any()


def test_edm_without_churn_is_heun():
    edm, heun = (make_plan(name, steps=9, grid="karras").table for name in ("edm(churn=0)", "heun"))
    np.testing.assert_allclose(edm, heun, atol=1e-14)


def test_flow_euler_is_eulers_step_of_the_flow_in_its_own_coordinates():
    """x_t' = x_t + (t' - t) (eps - x0), with x_t = x sqrt(t^2 + (1 - t)^2) and D = x0."""
    plan = make_plan("flow_euler", steps=6, grid=FlowShift(shift=3.0))
    t = 1 / (1 + 1 / np.tan(np.append(plan.thetas[:-1], 1.0)))
    t[-1] = 0.0
    rng = np.random.default_rng(0)
    for at in range(6):
        flow, x0 = rng.standard_normal(2)
        size, after = (np.hypot(each, 1 - each) for each in t[at : at + 2])
        expected = flow + (t[at + 1] - t[at]) * (flow - x0) / t[at]
        found = plan.column("a")[at] * flow / size + plan.column("b")[at] * x0
        assert found * after == pytest.approx(expected, abs=1e-12)


def test_grids_are_what_their_papers_say():
    karras = np.tan(make_plan("euler", steps=5, grid=Karras(0.002, 80, 7)).thetas)
    by_hand = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    np.testing.assert_allclose(karras, [*by_hand, 0.0], rtol=1e-9)
    log_snr = make_plan("euler", steps=5, grid="log_snr(low=-4, high=4)").thetas[:-1]
    np.testing.assert_allclose(-np.log(np.tan(log_snr)), [-4, -2, 0, 2, 4], atol=1e-12)
    flow = make_plan("euler", steps=4, grid="flow_shift(shift=3, t_max=0.8)").thetas
    np.testing.assert_allclose(np.tan(flow) / (1 + np.tan(flow)), [12 / 13, 9 / 11, 2 / 3, 3 / 7, 0], atol=1e-12)


def test_linear_beta_is_ddpm_s_schedule_in_continuous_time():
    """Ho et al. 2020, 1000 betas from 1e-4 to .02: log alpha within a percent wherever a picture is left."""
    thetas = make_plan("ddpm", steps=1000, grid="linear_beta").thetas
    log_alpha = 0.5 * np.log(alpha_bars({"beta_schedule": "linear", "num_train_timesteps": 1000}))[::-1]
    np.testing.assert_allclose(np.log(np.cos(thetas[:-1])), log_alpha, rtol=0.01, atol=1e-4)
    assert (np.diff(thetas) < 0).all()
    assert np.median(np.sin(make_plan("ddpm", steps=10, grid="linear_beta").thetas)) > 0.95


def test_the_published_scale_is_the_same_in_every_row_and_grows_as_rows_are_left_out():
    for steps in (1000, 50):
        plan = make_plan("ddpm", steps=steps, grid="native", levels=LEVELS, guidance="constant")
        guided = plan.kind == GraphKind.GUIDED
        assert (plan.column("e")[guided] == 1000 / steps).all()
        assert not plan.column("e")[~guided].any()
        assert not plan.column("f").any()


def test_ddpm_is_the_posterior_of_the_forward_chain():
    """Against Ho et al. 2020 eq. 7 written in alpha_bar and beta."""
    plan = make_plan("ddpm", steps=20, grid="native", levels=LEVELS)
    k = columns(plan)
    bar = np.append(1 - k["sigma"] ** 2, 1.0)
    beta = 1 - bar[:-1] / bar[1:]
    np.testing.assert_allclose(k["b"], np.sqrt(bar[1:]) * beta / (1 - bar[:-1]), rtol=1e-7)
    np.testing.assert_allclose(k["a"][:-1], (np.sqrt(1 - beta) * (1 - bar[1:]) / (1 - bar[:-1]))[:-1], rtol=1e-5)
    np.testing.assert_allclose(k["c"] ** 2, beta * (1 - bar[1:]) / (1 - bar[:-1]), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_guidance_moves_x_as_if_it_moved_the_denoiser(solver):
    plan = make_plan(solver, steps=9, grid="angle")
    k = columns(plan)
    scale = k["sigma"] ** 2 / k["alpha"]
    if solver in ("dpmpp_2m", "dpmpp_2m_sde"):  # split off the history: first order, and nothing of it is remembered
        np.testing.assert_allclose(k["e"], (k["b"] + k["d"]) * scale, rtol=1e-12)
        assert not k["f"].any()
    else:
        np.testing.assert_allclose(k["e"], k["b"] * scale, rtol=1e-12)
        np.testing.assert_allclose(k["f"], k["q"] * scale, rtol=1e-12)


def test_no_row_is_guided_where_alpha_vanishes_nor_outside_the_interval():
    plan = make_plan("ddpm", steps=50, grid="native", levels=LEVELS, guidance_interval=(0.2, 0.9))
    inside = (plan.column("sigma") >= 0.2) & (plan.column("sigma") <= 0.9)
    np.testing.assert_array_equal(plan.kind == GraphKind.GUIDED, inside)
    assert not plan.column("e")[~inside].any()
    free = make_plan("ddpm", steps=50, grid="native", levels=LEVELS)
    assert free.column("alpha")[0] < 1e-4
    assert free.kind[0] == GraphKind.UNGUIDED
    assert (free.kind[1:] == GraphKind.GUIDED).all()


def test_heun_takes_two_rows_a_step_but_the_last():
    assert make_plan(Heun(), steps=10, grid=Angle()).num_rows == 19


def test_tables_are_finite_whatever_the_grid():
    for solver in EVERY_SOLVER:
        for grid in (*GRIDS, "angle(alpha_min=0.00001)"):
            assert np.isfinite(make_plan(solver, steps=1000, grid=grid, levels=LEVELS).table).all()


@given(st.floats(0, 1))
def test_a_choice_reads_back_what_it_is_described_as(eta):
    assert parse_choice(describe_choice(Ddim(eta), SOLVERS), SOLVERS, "solver") == Ddim(eta)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"solver": "dopri"}, "solver: got 'dopri', allowed are ddpm, ddpm_fixed_large"),
        ({"solver": 7}, "solver: got 7"),
        ({"solver": "ddim(eta=2)"}, "eta must lie in"),
        ({"solver": "ddim(beta=1)"}, "parameters are eta"),
        ({"solver": "ddim(0.1, 0.2)"}, "parameters are eta"),
        ({"solver": "ddim(eta=x)"}, "allowed are numbers"),
        ({"solver": "ddim(eta=nan)"}, "finite"),
        ({"solver": "ddpm(eta=0.5)"}, "parameters are none"),
        ({"solver": "dpmpp_2m(guided_history=2)"}, "got '2', allowed are true and false"),
        ({"solver": "edm(churn=-1)"}, "churn >= 0"),
        ({"grid": "cosine"}, "grid: got 'cosine', allowed are angle, native, karras, log_snr, flow_shift, linear_beta"),
        ({"grid": "linear_beta(low=3, high=2)"}, "0 <= low < high"),
        ({"grid": "karras(sigma_min=90)"}, "sigma_min < sigma_max"),
        ({"grid": "log_snr(low=3, high=1)"}, "low < high"),
        ({"grid": "flow_shift(shift=0)"}, "shift > 0"),
        ({"recurrence": 0}, "recurrence: got 0"),
        ({"travel_length": 0}, "travel_length: got 0"),
        ({"steps": 1001, "grid": "angle", "recurrence": 100}, "intervals in all"),
        ({"grid": "angle(alpha_min=0)"}, "alpha_min"),
        ({"grid": "native", "levels": None}, "no noise levels"),
        ({"grid": "native", "steps": 1001}, "the network has 1000 noise levels"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": -3}, "steps: got -3"),
        ({"steps": True}, "steps: got True"),
    ],
)
def test_what_is_refused(asked, words):
    settings = {"solver": "ddpm", "steps": 10, "grid": None, "levels": LEVELS} | asked
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make_plan(settings.pop("solver"), **settings)


def test_every_registered_name_is_described_and_parsed():
    for registry in (SOLVERS, GRIDS):
        for name, kind in registry.items():
            assert type(parse_choice(name, registry, "choice")) is kind
