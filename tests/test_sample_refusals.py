"""What sample() refuses, one message each that says what was got; nothing is drawn before."""

import math

import pytest
import torch

import tiltscope
from tiltscope.engine.tilt.worlds import GaussianWorld
from tiltscope.errors import CalibrationError, ConfigError

WORLD = GaussianWorld(s=1.0, shape=(3, 4, 4))


def draw(*, denoise=None, activation=None, **settings):
    prior = WORLD.prior if denoise is None else tiltscope.Prior(denoise, shape=WORLD.shape)
    feature = WORLD.feature if activation is None else tiltscope.Feature(activation, name="bad")
    return tiltscope.sample(prior, feature, **({"num": 2, "lam": 1.0, "steps": 5} | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num": 0}, "num: got 0"),
        ({"num": 10**13}, "num: got 10000000000000"),
        ({"num": True}, "num: got True"),
        ({"num": 2.0}, "num: got 2.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"steps": -1}, "steps: got -1"),
        ({"lam": math.nan}, "lam: got nan"),
        ({"lam": math.inf}, "lam: got inf"),
        ({"lam": True}, "lam: got True"),
        ({"lam": "3"}, "lam: got '3'"),
        ({"lam": [1.0]}, "lam: got 1 values for num=2"),
        ({"lam": [1.0, math.nan]}, "lam[1]: got nan"),
        ({"lam": None}, "got neither"),
        ({"lam": 1.0, "target_activation": 1.0}, "got both"),
        ({"lam": None, "target_activation": math.inf}, "target_activation: got inf"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"indices": [0, 0]}, "indices: 0 is given twice"),
        ({"indices": [0, -1]}, "indices: got -1"),
        ({"indices": [0, 2**31]}, "indices: got 2147483648"),
        ({"indices": [0]}, "indices: got 1 of them for num=2"),
        ({"indices": [0, True]}, "indices: got True"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True"),
        ({"seed": 1.0}, "seed: got 1.0"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"solver": "rk45"}, "solver: got 'rk45'"),
        ({"grid": "cosine"}, "grid: got 'cosine'"),
        ({"grid": "native"}, "no noise levels"),
        ({"lift": "dsp"}, "lift: got 'dsp', allowed are dps, none"),
        ({"log_tilt": "bell"}, "log_tilt: got 'bell', allowed are linear, zscored, capped"),
        ({"log_tilt": "target(1)", "lam": None, "target_activation": 1.0}, "its own level"),
        ({"log_tilt": "capped"}, "cap is missing"),
        ({"preset": "best"}, "preset: got 'best', allowed are calibrated, fast, paper_exact"),
        ({"runner": "magic"}, "runner: got 'magic', allowed are torch, compile, onnx, openvino"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"particles": 0}, "particles: got 0"),
        ({"particles": 4097}, "particles: got 4097"),
        ({"particles": 4, "solver": "heun"}, "adds no noise"),
        ({"calibration_num": 3}, "calibration_num: got 3"),
        ({"guidance_interval": (0.9, 0.2)}, "guidance_interval: got (0.9, 0.2)"),
    ],
)
def test_a_value_that_is_not_allowed(settings, words):
    with pytest.raises(ConfigError) as refusal:
        draw(**settings)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("denoise", "words"),
    [
        (lambda x, sigma: x[:, :1], "must return x's shape"),
        (lambda x, sigma: x.mean(), "must return x's shape"),
        (lambda x, sigma: x.to(torch.int64), "real floating dtype"),
        (lambda x, sigma: x.to(torch.complex64), "real floating dtype"),
        (lambda x, sigma: x.numpy(), "torch tensor"),
        (lambda x, sigma: x.mul_(0.5), "writes into its arguments"),
        (lambda x, sigma: x.detach(), "not differentiable"),
    ],
)
def test_a_denoiser_that_breaks_its_contract(denoise, words):
    with pytest.raises(ConfigError, match=words):
        draw(denoise=denoise)


def linear(x0):
    return x0.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        (lambda x0: linear(x0)[:, None], "one number a sample"),
        (lambda x0: linear(x0).sum(), "one number a sample"),
        (lambda x0: linear(x0).detach(), "not differentiable"),
        (lambda x0: linear(x0) * math.nan, "NaN for every sample"),
        (lambda x0: linear(x0).to(torch.int32), "real floating dtype"),
        (lambda x0: 1.0, "torch tensor"),
        (lambda x0: linear(x0.mul_(2.0)), "writes into x0"),
    ],
)
def test_an_activation_that_breaks_its_contract(activation, words):
    with pytest.raises(ConfigError, match=words):
        draw(activation=activation)


def test_activations_that_do_not_vary_cannot_be_calibrated():
    with pytest.raises(CalibrationError, match="does not vary"):
        draw(activation=lambda x0: linear(x0) * 0.0 + 3.0, lam=None, target_activation=4.0)


def test_a_target_out_of_reach_says_what_is_within():
    with pytest.raises(CalibrationError, match=r"largest reachable target is \d"):
        draw(lam=None, target_activation=50.0)


def test_a_target_below_the_natural_mean_says_that_lambda_would_be_zero():
    with pytest.raises(CalibrationError, match="lambda would be 0"):
        draw(lam=None, target_activation=-1.0)


def test_the_callers_tensors_stay_as_they_are():
    kept = []

    def denoise(x, sigma):
        kept.append((x, x.clone()))
        return x * 0.5

    draw(denoise=denoise)
    assert all(torch.equal(x, copy) for x, copy in kept)
    assert not any(x.requires_grad and x.is_leaf for x, _ in kept[:1])
