"""explain() on a tiny bundle with random weights: four answers at one activation, and numbers that are about them."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import ExplainConfig
from tiltscope.engine.explain import PARTS, answer, inquire
from tiltscope.engine.report.metrics import METRICS
from tiltscope.errors import CalibrationError, ConfigError

FEATURE = "blocks.1:sae:3"
# Its random prior reaches no activation worth the name: lambda is the pool's.
SETTINGS = {"num": 4, "steps": 5, "calibration": "pool"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


@pytest.fixture(scope="module")
def explanation(bundle):
    return tiltscope.explain(bundle, FEATURE, **SETTINGS)


def test_four_answers_with_every_metric(explanation):
    assert list(explanation.answers) == ["tilt", "topk", "hard", "actmax"]
    for name, samples in explanation.answers.items():
        assert set(explanation.metrics[name]) == set(METRICS)
        assert samples.images is not None
        assert len(samples.images) == len(samples.activation) == len(samples.index)
        mean = explanation.metrics[name]["activation_mean"]
        assert mean == pytest.approx(float(samples.activation.mean()), abs=1e-5)


def test_the_tilt_is_what_sample_draws_at_its_lambda(bundle, explanation):
    alone = tiltscope.sample(bundle.prior, bundle.feature(FEATURE), lam=explanation.lam, **SETTINGS)
    assert torch.equal(alone.x0, explanation.answers["tilt"].x0)


def test_with_particles_the_tilts_numbers_are_what_they_say_of_the_prior(bundle):
    found = tiltscope.explain(bundle, FEATURE, num=2, steps=5, particles=4, calibration="pool")
    tilt, numbers = found.answers["tilt"], found.metrics["tilt"]
    assert tilt.target == "consistent"
    assert found.manifest["log_z"]["source"] == "smc"
    for name in ("log_z", "kl", "ess"):
        assert numbers[name] == getattr(tilt, name) == found.manifest[name]["value"]
    assert numbers["log_z"] != found.calibration.log_z
    # Of five rows the first holds too little of a picture to be guided, and the correction leaves the last alone.
    assert (numbers["nfe"], numbers["n_vjp"]) == (20, 12)


def test_activations_are_the_features_own(bundle, explanation):
    feature = bundle.feature(FEATURE)
    for samples in explanation.answers.values():
        torch.testing.assert_close(feature.activation(samples.x0).detach(), samples.activation, atol=2e-5, rtol=1e-4)


def test_topk_is_the_pools_strongest(bundle, explanation):
    natural = bundle.pool.activations(bundle.feature(FEATURE))
    assert sorted(explanation.answers["topk"].index.tolist()) == sorted(
        np.argsort(-natural, kind="stable")[:4].tolist()
    )
    assert explanation.answers["topk"].sources == tuple(
        bundle.pool.names[at] for at in explanation.answers["topk"].index
    )


def test_the_default_target_is_the_furthest_that_ten_pictures_carry(bundle, explanation):
    natural = bundle.pool.activations(bundle.feature(FEATURE))
    found = tiltscope.calibrate(natural, explanation.target)
    assert found.feasible
    assert found.lam == pytest.approx(explanation.lam, rel=1e-6)
    assert found.ess >= 10 - 1e-6
    assert found.max_weight <= 0.2 + 1e-6
    further = tiltscope.calibrate(natural, explanation.target + 0.02 * float(np.ptp(natural)))
    assert not further.feasible or further.max_weight > 0.2


def test_the_target_can_be_a_quantile(bundle):
    natural = bundle.pool.activations(bundle.feature(FEATURE))
    asked = tiltscope.explain(bundle, FEATURE, target_quantile=0.8, **SETTINGS)
    assert asked.target == pytest.approx(float(np.quantile(natural, 0.8)))
    assert asked.target_quantile == pytest.approx(0.8, abs=0.02)


def test_heat_maps_lie_on_the_patch_grid(bundle, explanation):
    grid = bundle.feature(FEATURE).trunk.grid
    assert explanation.answers["tilt"].heat.shape == (4, *grid)


def test_more_pictures_than_the_pool_are_fewer_and_said(bundle):
    asked = tiltscope.explain(bundle, FEATURE, num=12, steps=2, target_quantile=0.8, calibration="pool")
    assert len(asked.answers["hard"]) <= 12
    if len(asked.answers["hard"]) < 12:
        assert "threshold" in asked.notes["hard"]


def test_the_manifest_names_what_the_run_was(bundle, explanation):
    manifest = explanation.manifest
    assert manifest["command"] == "explain"
    assert manifest["bundle"]["identity"] == bundle.identity
    assert manifest["metrics"]["tilt"]["ess"] == pytest.approx(explanation.calibration.ess)
    assert manifest["kl"] == {"value": pytest.approx(explanation.calibration.kl), "source": "pool"}
    assert len(manifest["identity"]) == 64
    assert manifest["runner"] == "torch"


def test_identity_holds_what_decides_the_pictures_and_nothing_else(bundle, explanation):
    identity = explanation.manifest["identity"]
    same = tiltscope.explain(bundle, FEATURE, num=2, steps=5, batch_size=2, calibration="pool").manifest["identity"]
    other = tiltscope.explain(bundle, FEATURE, num=2, steps=4, calibration="pool").manifest["identity"]
    assert identity == same != other


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_quantile": 1.0}, ConfigError, "strictly between 0 and 1"),
        ({"target_quantile": 0.9, "lam": 1.0}, ConfigError, "target_quantile and lam"),
        ({"target_activation": 1e6}, CalibrationError, "largest reachable target"),
        ({"target_activation": -1e6}, CalibrationError, "lambda would be 0"),
        ({"lam": float("inf")}, ConfigError, "lam: got inf"),
        ({"grid": "native", "steps": 1001}, ConfigError, "noise levels"),
    ],
)
def test_what_is_refused(bundle, settings, error, words):
    with pytest.raises(error, match=words):
        tiltscope.explain(bundle, FEATURE, **(SETTINGS | settings))


@pytest.mark.parametrize("text", ["blocks.1:sae:24", "blocks.1:sae:-1", "blocks.9:sae:0", "blocks.1:lda:0", "clock"])
def test_features_that_do_not_exist(bundle, text):
    with pytest.raises(ConfigError, match=r"allowed|0 or above|for example blocks"):
        tiltscope.explain(bundle, text, **SETTINGS)


def test_a_negative_lambda_is_answered_with_the_weakest_pictures(bundle):
    natural = bundle.pool.activations(bundle.feature(FEATURE))
    asked = tiltscope.explain(bundle, FEATURE, lam=-2.0, **SETTINGS)
    assert asked.target < natural.mean()
    assert sorted(asked.answers["topk"].activation.tolist()) == pytest.approx(sorted(natural)[:4], abs=1e-6)


def test_the_parts_are_announced_in_words(bundle):
    parts = []
    answer(inquire(bundle, FEATURE, ExplainConfig(num=2, steps=2, calibration="pool")), on_part=parts.append)
    assert parts == list(PARTS.values())[1:]
