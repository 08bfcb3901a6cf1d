"""The table: identities every row obeys, special cases, choices by name, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.choice import describe_choice, parse_choice
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.plan import COLUMNS, GRIDS, SOLVERS, Angle, Ddim, GraphKind, Heun, make_plan

LEVELS = np.sin(np.linspace(np.arccos(5e-5), 0.01, 1000))
EVERY_SOLVER = [*SOLVERS, "ddim(eta=0.5)"]


def columns(plan):
    return {name: plan.column(name) for name in COLUMNS}


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("grid", ["angle", "native"])
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
    if solver == "dpmpp_2m":  # split off the history: first order, and nothing of it is remembered
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
        for grid in ("angle", "angle(alpha_min=0.00001)", "native"):
            assert np.isfinite(make_plan(solver, steps=1000, grid=grid, levels=LEVELS).table).all()


@given(st.floats(0, 1))
def test_a_choice_reads_back_what_it_is_described_as(eta):
    assert parse_choice(describe_choice(Ddim(eta), SOLVERS), SOLVERS, "solver") == Ddim(eta)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"solver": "dopri"}, "solver: got 'dopri', allowed are ddpm, ddim"),
        ({"solver": 7}, "solver: got 7"),
        ({"solver": "ddim(eta=2)"}, "eta must lie in"),
        ({"solver": "ddim(beta=1)"}, "parameters are eta"),
        ({"solver": "ddim(0.1, 0.2)"}, "parameters are eta"),
        ({"solver": "ddim(eta=x)"}, "allowed are numbers"),
        ({"solver": "ddim(eta=nan)"}, "finite"),
        ({"solver": "ddpm(eta=0.5)"}, "parameters are none"),
        ({"grid": "cosine"}, "grid: got 'cosine', allowed are angle, native"),
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
