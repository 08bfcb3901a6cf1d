"""The Gaussian world: its closed forms, and the exact moments of what a plan samples in it."""

import numpy as np
import pytest
import torch

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.plan import GraphKind, Plan, make_plan
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.tilt.worlds import GaussianWorld, Moments, discrete_moments

WORLD = GaussianWorld(s=1.7)
LAM = 0.9


def relative(found: Moments, expected: Moments) -> tuple[float, float]:
    """Errors in percent, of mean and variance."""
    return 100 * (found.mean / expected.mean - 1), 100 * (found.variance / expected.variance - 1)


@pytest.mark.parametrize(
    ("solver", "steps", "mean", "variance"),
    # method section 6: measured for another implementation of the same table.
    [
        ("ddpm", 1000, 0.0, -0.4),
        ("ddim", 400, -0.2, -0.7),
        ("dpmpp_2m", 60, 2.4, -0.5),
        ("dpmpp_2m", 120, 1.1, -0.1),
        ("heun", 60, -0.17, -0.06),
    ],
)
def test_discrete_moments_are_those_measured_before(solver: str, steps: int, mean: float, variance: float) -> None:
    found = relative(WORLD.discrete(make_plan(solver, steps=steps, grid="angle"), LAM), WORLD.tilted(LAM))
    assert found == pytest.approx((mean, variance), abs=0.05)


@pytest.mark.parametrize(
    ("solver", "eta", "steps", "order"),
    # Guidance split off its history makes dpmpp_2m first order.
    [
        ("euler", 0.0, 400, 1.0),
        ("heun", 0.0, 60, 2.0),
        ("dpmpp_2m", 0.0, 400, 1.0),
        ("ddpm", 1.0, 400, 1.0),
        ("ddim(eta=0.5)", 0.5, 400, 1.0),
    ],
)
def test_discrete_moments_converge_to_the_limit_of_the_same_start(
    solver: str, eta: float, steps: int, order: float
) -> None:
    def error(num: int) -> float:
        plan = make_plan(solver, steps=num, grid="angle")
        found, limit = WORLD.discrete(plan, LAM), WORLD.limit(plan, LAM, eta=eta)
        return abs(found.variance - limit.variance) + abs(found.mean - limit.mean)

    assert np.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.1)


def test_the_flow_never_forgets_its_start_and_ancestral_sampling_does() -> None:
    plan = make_plan("heun", steps=10, grid="angle")
    assert relative(WORLD.limit(plan, LAM, eta=0), WORLD.tilted(LAM))[0] == pytest.approx(-0.17, abs=1e-3)
    assert relative(WORLD.limit(plan, LAM, eta=1), WORLD.tilted(LAM))[0] == pytest.approx(0.0, abs=1e-3)


def test_the_recursion_is_what_rows_do_to_samples() -> None:
    # Every coefficient at work, in each graph kind. A sample is a sum over the independent noises it has met: follow the
    # coefficients of (1, x_T, z_0, z_1, ...) through the rows as a sampler would run them.
    rng = np.random.default_rng(0)
    num = 6
    thetas = np.linspace(1.4, 0.1, num)
    table = rng.uniform(-1, 1, (num, len(COLUMNS)))
    table[:, 0], table[:, 1] = np.sin(thetas), np.cos(thetas)
    kind = np.array([1, 0, 2, 1, 0, 1], np.int8)
    table[kind == GraphKind.UNGUIDED, 6] = table[kind == GraphKind.UNGUIDED, 9] = 0
    one, start, *noises = np.eye(2 + num)
    x, history = start, np.zeros(2 + num)
    for (sigma, alpha, a, b, c, d, e, p, q, f, r), graph, z in zip(table, kind, noises, strict=True):
        posterior = 1 / (1 / WORLD.s**2 + (alpha / sigma) ** 2)  # variance of x0 given x
        x0_hat = posterior * alpha / sigma**2 * x
        grad_a = 1.0 if graph == GraphKind.TRUNK_ONLY else posterior * alpha / sigma**2
        x, history = (
            a * x + b * x0_hat + e * LAM * grad_a * one + c * z + d * history,
            p * x + q * x0_hat + f * LAM * grad_a * one + r * history,
        )
    plan = Plan(table=table, kind=kind, thetas=np.append(thetas, 0.0))
    exact = discrete_moments(plan, LAM, WORLD.s)
    assert exact.mean == pytest.approx(x @ one, rel=1e-12)
    assert exact.variance == pytest.approx(x @ x - (x @ one) ** 2, rel=1e-12)


def test_the_denoiser_is_the_posterior_mean() -> None:
    world = GaussianWorld(s=0.8, shape=(3, 2, 2))
    rng = np.random.default_rng(1)
    x0, eps = world.s * rng.normal(size=100_000), rng.normal(size=100_000)
    for sigma in (0.1, 0.6, 0.95):
        x = np.sqrt(1 - sigma**2) * x0 + sigma * eps
        slope = (x @ x0) / (x @ x)  # the regression of x0 on x is E[x0 | x]
        ones = torch.ones(2, 3, 2, 2, dtype=torch.float64)
        answer = world.prior.denoise(ones, torch.full((2,), sigma, dtype=torch.float64))
        assert answer.flatten()[0] == pytest.approx(slope, abs=0.02)
    assert world.prior.denoise(ones.float(), torch.tensor([1.0, 0.0], dtype=torch.float64)).dtype == torch.float32


def test_closed_forms_agree_with_quadrature() -> None:
    grid = np.linspace(-20, 20, 200_001)
    density = np.exp(-(grid**2) / 2 / WORLD.s**2) / np.sqrt(2 * np.pi) / WORLD.s
    tilted = density * np.exp(LAM * grid)
    z = np.trapezoid(tilted, grid)
    q = tilted / z
    mean = np.trapezoid(q * grid, grid)
    assert WORLD.log_z(LAM) == pytest.approx(np.log(z))
    assert WORLD.tilted(LAM).mean == pytest.approx(mean)
    assert WORLD.tilted(LAM).variance == pytest.approx(np.trapezoid(q * (grid - mean) ** 2, grid))
    assert WORLD.kl(LAM) == pytest.approx(LAM * mean - np.log(z))
    assert WORLD.lam(mean) == pytest.approx(LAM)


def test_the_feature_is_linear_along_a_unit_vector() -> None:
    world = GaussianWorld(shape=(1, 2, 2))
    assert np.linalg.norm(world.u) == pytest.approx(1)
    x0 = torch.eye(4).reshape(4, 1, 2, 2)
    assert world.feature.activation(x0).tolist() == pytest.approx(world.u.tolist())
    assert GaussianWorld(direction=(0, 2)).u.tolist() == [0, 1]


def test_wrong_worlds_are_refused() -> None:
    with pytest.raises(ConfigError, match="s got"):
        GaussianWorld(s=0.0)
    with pytest.raises(ConfigError, match="allowed: 2"):
        GaussianWorld(direction=(1, 2, 3))
