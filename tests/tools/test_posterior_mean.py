"""Tweedie's identity of second order holds where the posterior mean is known, and shows what is not one."""

import pytest
import torch
from posterior_mean import second_order, table

import tiltscope
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=1.7, shape=(3, 4, 4))
NUM = 400
SIGMAS = (0.3, 0.8, 0.99)


@pytest.fixture(scope="module")
def x0():
    return 1.7 * torch.randn((NUM, *WORLD.shape), generator=torch.Generator().manual_seed(0))


def test_both_sides_are_the_posterior_variance_where_it_is_known(x0):
    for level in second_order(WORLD.prior, x0, sigmas=SIGMAS):
        sigma = level["sigma"]
        variance = 48 * 1.7**2 * sigma**2 / ((1 - sigma**2) * 1.7**2 + sigma**2)
        # Of a linear D the trace is the same for every picture and sign.
        assert level["trace"] == pytest.approx(variance, rel=1e-5)
        assert level["trace_se"] < 1e-4 * variance
        assert level["error"] == pytest.approx(variance, rel=4 * (2 / (48 * NUM)) ** 0.5)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_an_answer_moved_away_from_the_mean_breaks_it(x0, factor):
    sharper = tiltscope.Prior(lambda x, sigma: factor * WORLD.prior.denoise(x, sigma), shape=WORLD.shape)
    (level,) = second_order(sharper, x0, sigmas=(0.5,))
    (exact,) = second_order(WORLD.prior, x0, sigmas=(0.5,))
    assert level["trace"] == pytest.approx(factor * exact["trace"], rel=1e-5)
    assert level["error"] > 1.1 * exact["error"]


def test_the_table_shows_the_ratio():
    shown = table([{"sigma": 0.9, "error": 200.0, "trace": 70.0, "trace_se": 3.0}])
    assert shown.splitlines()[-1] == "| 0.9 | 200 | 70 ± 3 | 0.35 |"
