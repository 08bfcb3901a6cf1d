"""The worlds as a user can ask for them: the truth stated is the truth, and each method errs where theory says it does."""

import json

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from tiltscope.engine.cli.main import run
from tiltscope.engine.compare_world import compare_world
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.errors import ConfigError

DENSITIES = {
    "gaussian": (lambda a: norm.pdf(a, 0, 1.7), lambda a: 0.9 * a),
    "quadratic": (lambda a: norm.pdf(a, 0, 0.5), lambda a: -((a - 0.7) ** 2) / (2 * 0.3**2)),
    "mixture": (
        lambda a: sum(w * norm.pdf(a, m, 0.2**0.5) for w, m in ((0.9, -0.5), (0.09, 0.6), (0.01, 1.6))),
        lambda a: 3 * a,
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_the_stated_answer_is_the_integral(name):
    density, log_tilt = DENSITIES[name]
    world, _ = compare_world(name, CompareConfig(lifts=("dps",), solvers=("euler",), steps=(2,)))
    z, mean, square = (
        quad(lambda a, p=power: density(a) * np.exp(log_tilt(a)) * a**p, -12, 14, limit=200)[0] for power in range(3)
    )
    assert world.log_z == pytest.approx(np.log(z), abs=1e-8)
    assert world.mean == pytest.approx(mean / z, abs=1e-8)
    assert world.sd == pytest.approx((square / z - (mean / z) ** 2) ** 0.5, abs=1e-8)


def rows_of(name, **settings):
    _, rows = compare_world(name, CompareConfig(steps=(100,), **settings))
    return {row.method.split(",")[0] + ("" if "euler" not in row.method else " ode"): row for row in rows}


def test_each_method_errs_where_it_should_on_the_quadratic_world():
    rows = rows_of("quadratic", lifts=("dps", "covariance"), solvers=("ddpm", "euler"))
    assert rows["dps ode"].error > 0.5
    assert 0.2 < rows["dps"].error < 0.4
    for right in ("covariance", "covariance ode", "SMC", "FK steering"):
        assert abs(rows[right].error) < 0.05
        assert rows[right].excess_kl < 0.02 < rows["dps"].excess_kl
    assert abs(rows["SMC"].log_z - -1.385) < 0.15
    assert rows["SMC"].nfe == 64 * 100
    assert rows["FK steering"].n_vjp == 0


def test_the_ess_says_where_importance_resampling_fails():
    rows = rows_of("mixture", lifts=("dps",), solvers=("ddpm",))
    assert abs(rows["dps"].error) > 0.2
    assert abs(rows["SMC"].error) < 0.12
    assert rows["SIR"].ess < 50 < rows["SMC"].ess


def test_on_the_command_line(capsys):
    words = [
        "compare",
        "--world",
        "gaussian",
        "--lifts",
        "dps,daps(ode_steps=1)",
        "--solvers",
        "ddpm",
        "--steps",
        "10",
        "--quiet",
    ]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact"]["mean"] == pytest.approx(2.601)
    assert [each["method"].split(",")[0] for each in told["methods"]][:2] == ["dps", "daps(ode_steps=1)"]
    assert run(words) == 0
    assert "excess KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare", "--world", "flat"), "world: got 'flat', allowed are gaussian, quadratic, mixture, kernel"),
        (("compare", "--world", "kernel"), "give FEATURE too"),
        (("compare",), "FEATURE is missing"),
        (("compare", "blocks.5:sae:1", "--lifts", "dps,dps"), "named twice"),
        (("compare", "blocks.5:sae:1", "--lam-factors", "0"), "lam_factors: got 0.0"),
        (("compare", "blocks.5:sae:1", "--target-z", "2", "--target-quantile", "0.9"), "got both"),
        (("compare", "blocks.5:sae:1", "--solvers", "magic"), "solver: got 'magic'"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert run(list(words)) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_world_in_python():
    with pytest.raises(ConfigError, match="world"):
        compare_world("flat", CompareConfig())
