"""What is far beyond sense is drawn, or stopped sample by sample, with row and sigma; it never comes back as no number."""

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import CalibrationError, NonFiniteError

FEATURE, DEAD = "blocks.1:sae:3", "blocks.1:sae:23"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize(("scale", "lam"), [(1.0, 1e6), (1.0, -1e6), (1e4, 1.0), (1e4, 1e6), (1.0, 1e30)])
def test_pictures_stay_finite_or_stop_where_they_were(bundle, solver, scale, lam):
    feature = scale * bundle.feature(FEATURE)
    try:
        samples = tiltscope.sample(bundle.prior, feature, num=3, lam=lam, steps=6, solver=solver)
    except NonFiniteError as error:
        stopped = str(error)
    else:
        stopped = None
    if stopped is not None:
        assert "at row" in stopped
        assert "sigma" in stopped
        return
    assert torch.isfinite(samples.x0).all()
    failed = {each["index"]: each for each in samples.manifest["failures"]}
    assert set(failed) == set(samples.index[~samples.ok].tolist())
    assert all(each["row"] >= 0 and 0 <= each["sigma"] <= 1 for each in failed.values())


def test_a_feature_scaled_up_is_tilted_by_as_much_less(bundle):
    feature = bundle.feature(FEATURE)
    small = tiltscope.sample(bundle.prior, feature, num=2, lam=2.0, steps=8)
    large = tiltscope.sample(bundle.prior, 1e4 * feature, num=2, lam=2e-4, steps=8)
    torch.testing.assert_close(large.x0, small.x0, rtol=0, atol=1e-3)
    torch.testing.assert_close(large.activation, 1e4 * small.activation, rtol=1e-3, atol=1e-1)


def test_a_dead_feature_is_refused_in_so_many_words(bundle):
    feature = bundle.feature(DEAD)
    assert bundle.pool.activations(feature).max() == 0
    for asked in ({"target_activation": 0.1}, {"lam": 1.0}):
        with pytest.raises(
            CalibrationError, match="all 40 natural activations are 0: no tilt can move what does not vary"
        ):
            tiltscope.sample(bundle.prior, feature, num=1, steps=4, **asked)
    assert tiltscope.sample(bundle.prior, feature, num=2, lam=0.0, steps=4).ok.all()
