"""Calibration on the sampler: the mean that was asked for is the mean that fresh draws give, however biased the sampler is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import tiltscope
from tiltscope.engine.calibration import calibrate_on_sampler, calibration_key
from tiltscope.engine.config import ExplainConfig
from tiltscope.engine.errors import CalibrationError, ConfigError
from tiltscope.engine.explain import inquire
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.tilt.worlds import GaussianWorld


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))


def fresh_mean(world, lam, num=512, **settings):
    a = tiltscope.sample(world.prior, world.feature, num=num, lam=lam, seed=7, batch_size=512, **settings).activation
    return float(a.double().mean()), float(a.double().std()) / num**0.5


def reached(world, target, **settings):
    """How far fresh draws at the calibrated lambda are from the target, in joint standard errors, and relative to it."""
    asked = tiltscope.sample(
        world.prior, world.feature, num=1, target_activation=target, calibration="sampler", **settings
    )
    lam = asked.manifest["lam"]
    settings.pop("calibration_num", None)
    mean, se = fresh_mean(world, lam, **settings)
    error = (se**2 + asked.manifest["ascent"]["se"] ** 2) ** 0.5
    return abs(mean - target) / error, abs(mean / target - 1)


@pytest.mark.parametrize(
    "settings", [{}, {"lift": "normalized"}, {"solver": "euler"}, {"lift": "none", "solver": "ddim(eta=0.5)"}]
)
def test_fresh_draws_have_the_wanted_mean(settings):
    errors, relative = reached(GaussianWorld(s=0.6, shape=(3,)), 0.7, steps=12, **settings)
    assert errors < 3 or relative < 0.02


@pytest.mark.slow
def test_54_of_60_pairs_are_within_two_per_cent_or_two_errors():
    rng = np.random.default_rng(0)
    lifts = ("dps", "none", "normalized", "lgd_mc", "tfg")
    within = []
    for at in range(60):
        world = GaussianWorld(s=float(rng.uniform(0.4, 2.0)), shape=(3,))
        target = float(world.s * rng.uniform(0.3, 1.3))
        errors, relative = reached(world, target, steps=10, lift=lifts[at % 5])
        within.append(errors < 2 or relative < 0.02)
    assert sum(within) >= 54


def test_the_pool_alone_misses_where_the_sampler_is_biased():
    world = GaussianWorld(s=0.6, shape=(3,))
    lam = tiltscope.sample(
        world.prior, world.feature, num=1, target_activation=0.7, steps=12, lift="normalized"
    ).manifest["lam"]
    mean, se = fresh_mean(world, lam, steps=12, lift="normalized")
    assert abs(mean - 0.7) > 5 * se


def test_it_is_remembered_whatever_seed_number_and_batch_size():
    world, calls = GaussianWorld(s=1.3, shape=(2,)), []

    def counted(x0):
        calls.append(len(x0))
        return world.feature.activation(x0)

    feature = tiltscope.Feature(counted, name="counted")
    settings = {"target_activation": 1.0, "calibration": "sampler", "steps": 5, "calibration_num": 64}
    first = tiltscope.sample(world.prior, feature, num=2, **settings)
    drawn = len(calls)
    again = tiltscope.sample(world.prior, feature, num=3, seed=0, batch_size=4, **settings)
    assert len(calls) - drawn < drawn / 2
    assert (first.manifest["ascent"]["origin"], again.manifest["ascent"]["origin"]) == ("drawn", "cache")
    assert first.manifest["lam"] == again.manifest["lam"] == float(f"{first.manifest['lam']:.4g}")
    (kept,) = cache_folder("calibrations").iterdir()
    assert json.loads(kept.read_text())["lam"] == first.manifest["lam"]
    other = tiltscope.sample(world.prior, feature, num=2, **settings | {"steps": 6})
    assert other.manifest["ascent"]["origin"] == "drawn"


def test_beyond_the_pool_only_where_it_is_asked_for():
    world = GaussianWorld(s=1.0, shape=(2,))
    settings = {"num": 1, "target_activation": 6.0, "steps": 12, "calibration": "sampler"}
    with pytest.raises(CalibrationError, match="largest reachable"):
        tiltscope.sample(world.prior, world.feature, **settings)
    samples = tiltscope.sample(world.prior, world.feature, beyond_pool=True, **settings)
    mean, se = fresh_mean(world, samples.manifest["lam"], steps=12)
    assert abs(mean - 6.0) < 3 * (se**2 + samples.manifest["ascent"]["se"] ** 2) ** 0.5 + 0.02 * 6
    assert samples.kl is None
    with pytest.raises(ConfigError, match="beyond_pool"):
        tiltscope.sample(world.prior, world.feature, beyond_pool=True, **settings | {"calibration": "pool"})


def test_what_the_sampler_cannot_reach_names_the_nearest_mean():
    world = GaussianWorld(s=1.0, shape=(2,))
    bounded = tiltscope.Feature(lambda x0: world.feature.activation(x0).tanh(), name="bounded")
    settings = {"num": 1, "steps": 5, "calibration": "sampler", "beyond_pool": True}
    with pytest.raises(CalibrationError, match=r"nearest mean reached is (0\.9|1 ).*calibration=pool"):
        tiltscope.sample(world.prior, bounded, target_activation=1.5, **settings)


def test_explain_calibrates_on_the_sampler_and_says_so(tiny_bundle, monkeypatch):
    bundle = tiltscope.load(tiny_bundle)
    feature = bundle.feature("blocks.1:neuron:3")
    prior = tiltscope.sample(bundle.prior, feature, num=32, lam=0.0, steps=4).activation.double().numpy()
    # Its random prior and its pictures agree on nothing; let the pictures agree with the prior.
    natural = np.random.default_rng(0).normal(prior.mean(), prior.std(), bundle.pool.num)
    monkeypatch.setattr(type(bundle.pool), "activations", lambda self, of: natural.copy())
    settings = {"num": 2, "steps": 4, "calibration_num": 64}
    found = tiltscope.explain(bundle, feature, target_quantile=0.8, **settings)
    assert found.lam == found.manifest["ascent"]["lam"] == found.manifest["lam"]
    assert found.calibration.lam != found.lam
    assert "calibration" in found.manifest["seconds"]
    drawn = tiltscope.sample(bundle.prior, feature, num=32, lam=found.lam, steps=4).activation.double()
    se = float(drawn.std()) / 32**0.5
    assert abs(float(drawn.mean()) - found.target) < 3 * (se**2 + found.manifest["ascent"]["se"] ** 2) ** 0.5
    given = tiltscope.explain(bundle, feature, lam=found.lam, **settings)
    assert given.manifest["ascent"] is None


def test_the_bundle_brings_what_its_demo_would_have_to_draw_for():
    """The demo's own feature at the defaults of explain: a new setting or an edited preset must not lose its calibration."""
    bundle = tiltscope.load("emoji64")
    demo = re.search(r"^FEATURE \?= (\S+)", (Path(__file__).parents[1] / "Makefile").read_text(), re.MULTILINE)[1]
    inquiry = inquire(bundle, demo, ExplainConfig())
    assert calibration_key(inquiry.run, inquiry.target) in bundle.pool.calibrations
    assert calibrate_on_sampler(inquiry.run, inquiry.target).ascent.origin == "bundle"
