"""Prior: any denoiser under one contract; one trial call finds what breaks it, and the caller's tensors stay as they are."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.prior import Prior, check_denoise

SHAPE = (3, 4, 5)


def shrink(x, sigma):
    return x * (1 - sigma).view(-1, 1, 1, 1).to(x.dtype)


def prior(denoise=shrink, **settings):
    return Prior(denoise, **({"shape": SHAPE, "name": "mine"} | settings))


def batch(num=2, dtype=torch.float32):
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_custom_prior_says_what_it_is():
    p = prior()
    assert (p.name, p.shape, p.identity, p.levels, p.pool, p.network) == (
        "mine",
        SHAPE,
        "custom:mine",
        None,
        None,
        None,
    )
    assert p.pictures
    assert not prior(shape=[4]).pictures
    assert Prior(shrink, shape=SHAPE).name == "custom"
    assert p.to(torch.float64) is p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("answer", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_real_floating_answer_comes_back_in_the_callers_dtype(dtype, answer):
    p = prior(lambda x, sigma: shrink(x, sigma).to(answer))
    check_denoise(p, dtype, guided=True)
    assert p.denoise(batch(dtype=dtype), levels(0.5, 0.2)).dtype == dtype


def test_sigma_reaches_a_custom_denoiser_in_float64():
    seen = []

    def spy(x, sigma):
        seen.append(sigma)
        return x

    sigma = levels(1 - 1e-12, 0.25)
    prior(spy).denoise(batch(), sigma)
    assert seen[0].dtype == torch.float64
    assert torch.equal(seen[0], sigma)


def writes_x(x, sigma):
    x.mul_(0.5)
    return x


def writes_sigma(x, sigma):
    sigma.zero_()
    return x


WRONG = {
    "one sample short": (lambda x, s: x[:1], "shape"),
    "without a batch": (lambda x, s: x.sum(0), "shape"),
    "broadcastable": (lambda x, s: x[:, :1], "shape"),
    "integers": (lambda x, s: x.long(), "torch.int64"),
    "booleans": (lambda x, s: x > 0, "torch.bool"),
    "complex": (lambda x, s: x.to(torch.complex64), "torch.complex64"),
    "numpy": (lambda x, s: x.numpy(), "got ndarray"),
    "a tuple": (lambda x, s: (x,), "got tuple"),
    "nothing": (lambda x, s: None, "got NoneType"),
    "writes into x": (writes_x, "writes into its arguments"),
    "writes into sigma": (writes_sigma, "writes into its arguments"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_denoiser_is_refused_by_one_trial_call(case, dtype):
    denoise, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        check_denoise(prior(denoise), dtype)


def test_guidance_needs_a_gradient():
    detached = prior(lambda x, sigma: shrink(x, sigma).detach())
    check_denoise(detached, torch.float32)
    with pytest.raises(ConfigError, match="not differentiable"):
        check_denoise(detached, torch.float32, guided=True)


def test_a_trial_call_touches_no_global_generator():
    before = torch.random.get_rng_state()
    check_denoise(prior(), torch.float32, guided=True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_denoiser_that_writes_at_some_levels_only_cannot_reach_the_caller():
    def sometimes(x, sigma):
        return x.mul_(0.5) if sigma.max() < 0.1 else 0.5 * x

    p = prior(sometimes)
    check_denoise(p, torch.float32)
    x, sigma = batch(), levels(0.05, 0.05)
    before = x.clone()
    assert torch.equal(p.denoise(x, sigma), 0.5 * before)
    assert torch.equal(x, before)


def test_a_late_change_of_shape_is_refused_too():
    p = prior(lambda x, sigma: x if len(x) == 2 else x[:1])
    check_denoise(p, torch.float32)
    with pytest.raises(ConfigError, match="shape"):
        p.denoise(batch(3), levels(0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        (torch.zeros(2, 3, 4), levels(0.1, 0.2)),
        (batch(), levels(0.1)),
        (batch(), torch.tensor(0.1, dtype=torch.float64)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(x, sigma):
    with pytest.raises(ConfigError, match=r"\[batch, 3, 4, 5\]"):
        prior().denoise(x, sigma)


@pytest.mark.parametrize("shape", [(), (0, 4), (-1,), (3.0, 4), (True, 4), 3, "344", None, [[3]]])
def test_a_shape_is_positive_whole_numbers(shape):
    with pytest.raises(ConfigError, match="shape"):
        prior(shape=shape)


@pytest.mark.parametrize(("denoise", "name"), [(None, "mine"), ("ddpm", "mine"), (shrink, ""), (shrink, 3)])
def test_a_prior_is_a_function_with_a_name(denoise, name):
    with pytest.raises(ConfigError):
        Prior(denoise, shape=SHAPE, name=name)


def test_pictures_are_rounded_and_clamped():
    x0 = (
        torch.tensor([-1.0, -2.0, 1.0, 3.0, 0.0, 254.4 / 127.5 - 1, float("nan"), float("inf")])
        .repeat(3)
        .view(1, 3, 2, 4)
    )
    images = prior(shape=(3, 2, 4)).to_images(x0)
    assert images.dtype == torch.uint8
    assert images[0, 0].flatten().tolist() == [0, 0, 255, 255, 128, 254, 0, 255]
    assert prior(shape=(4,)).to_images(torch.zeros(2, 4)) is None


def test_every_picture_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    x0 = pixels.float() / 127.5 - 1
    assert torch.equal(prior(shape=(3, 16, 16)).to_images(x0), pixels)


@pytest.fixture(scope="module")
def bundled(tiny_bundle):
    return tiltscope.load(tiny_bundle).prior


def test_a_bundles_prior_in_another_dtype_is_one_sibling(bundled):
    exact = bundled.to(torch.float64)
    assert exact is bundled.to(torch.float64)
    assert exact.to(torch.float32) is bundled
    assert bundled.to(torch.float32) is bundled
    assert (exact.identity, exact.name, exact.shape) == (bundled.identity, bundled.name, bundled.shape)
    assert exact.pool is bundled.pool
    assert np.array_equal(exact.levels, bundled.levels)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    narrow, wide = bundled.denoise(x, levels(0.9, 0.3)), exact.denoise(x.double(), levels(0.9, 0.3))
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


def test_other_precisions_come_from_the_weights_as_loaded(bundled):
    by_way_of_half = bundled.to(torch.bfloat16).to(torch.float64)
    assert by_way_of_half is bundled.to(torch.float64)


def test_a_bundles_prior_says_what_it_is(bundled, tiny_bundle):
    import hashlib

    weights = (tiny_bundle / "prior/diffusion_pytorch_model.safetensors").read_bytes()
    assert bundled.identity == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert bundled.shape == (3, 64, 64)
    assert bundled.pictures
    assert bundled.levels.shape == (1000,)
    assert bundled.levels[0] > bundled.levels[-1] > 0
    check_denoise(bundled, torch.float32, guided=True)
