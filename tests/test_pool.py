"""The pool gives back what was stored, and computes the rest with the code that sampling uses."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


@pytest.fixture(scope="module")
def pool(bundle):
    return bundle.pool


def test_what_is_known_of_the_pictures(pool):
    assert pool.num == 40
    assert pool.names[0] == "small red disc"
    assert pool.categories[1] == "square"
    assert pool.code_points[2] == "e002"
    assert pool.keywords[3] == ("small", "red", "ring")
    assert pool.words(3) == ("small red ring", "small", "red", "ring")
    assert pool.heldout.dtype == bool
    assert pool.heldout.tolist() == [i % 4 == 3 for i in range(40)]


def test_pictures_come_in_the_order_asked_for(pool):
    images = pool.images([4, 0, 4])
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], images[2])
    assert images[1, :, 32, 32].tolist() == [214, 48, 49]  # a small red disc
    assert images[1, :, 0, 0].tolist() == [240, 240, 240]
    assert torch.equal(pool.x0([4, 0, 4]), images.float() / 127.5 - 1)
    assert pool.images(np.array([], dtype=np.int64)).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("index", [-1, 40, 10**9])
def test_a_picture_that_is_not_there_is_refused(pool, index):
    with pytest.raises(ConfigError, match="0 to 39"):
        pool.images([0, index])


def test_stored_activations_are_what_sampling_would_read(bundle, pool):
    for text in ("blocks.1:sae:3", "blocks.1:sae:7"):
        feature = bundle.feature(text)
        stored = pool.activations(feature)
        assert stored.dtype == np.float64
        np.testing.assert_allclose(stored, feature.activation(pool.x0(range(40))).numpy(), rtol=1e-5, atol=1e-5)


def test_a_column_is_used_only_for_this_bundles_own_feature(bundle, pool, tiny_bundle, monkeypatch):
    ran = []
    monkeypatch.setattr(type(pool), "_run", lambda self, feature: ran.append(feature) or np.zeros(40))
    pool.activations(bundle.feature("blocks.1:sae:5"))
    pool.activations(bundle.feature("blocks.1:sae:5").to(torch.float64))
    pool.activations(bundle.feature("blocks.1:sae:5") * 2.0 - bundle.feature("blocks.1:sae:6"))
    assert not ran
    others = [
        bundle.feature("blocks.1:sae:5@max"),
        bundle.feature("blocks.1:sae:5") + bundle.feature("blocks.1:sae:5@max"),
        tiltscope.load(tiny_bundle).feature("blocks.1:sae:5"),
        Feature(lambda x0: x0.mean((1, 2, 3)), name="blocks.1:sae:5"),
    ]
    for feature in others:
        pool.activations(feature)
    assert ran == others


def test_sums_of_columns_are_sums_of_activations(bundle, pool):
    a, b = bundle.feature("blocks.1:sae:3"), bundle.feature("blocks.1:sae:7")
    expected = 2 * pool.activations(a) - pool.activations(b)
    np.testing.assert_allclose(pool.activations(2.0 * a - b), expected, rtol=1e-12)
    np.testing.assert_allclose(
        pool.activations(2.0 * a - b), (2.0 * a - b).activation(pool.x0(range(40))).numpy(), rtol=1e-4, atol=1e-5
    )


def test_what_is_not_stored_is_computed_once(bundle, pool):
    calls = []

    def mean_red(x0):
        calls.append(len(x0))
        return x0[:, 0].mean((1, 2))

    feature = Feature(mean_red, name="red")
    found = pool.activations(feature)
    num_calls = len(calls)
    np.testing.assert_allclose(found, pool.x0(range(40))[:, 0].mean((1, 2)).numpy(), rtol=1e-6)
    found[:] = 0  # the caller's own copy
    assert pool.activations(feature).any()
    assert len(calls) == num_calls
    np.testing.assert_allclose(
        pool.activations(bundle.feature("norm:cls:2")),
        bundle.feature("norm:cls:2").activation(pool.x0(range(40))).numpy(),
        rtol=1e-5,
        atol=1e-5,
    )


def test_two_custom_features_of_one_name_are_two_features(pool):
    bright, dark = (Feature(lambda x0, s=s: s * x0.mean((1, 2, 3)), name="same") for s in (1.0, -1.0))
    np.testing.assert_allclose(pool.activations(bright), -pool.activations(dark))


def test_a_wrong_custom_feature_is_refused_before_it_runs_over_the_pool(pool):
    with pytest.raises(ConfigError, match=r"\[2, 1\]"):
        pool.activations(Feature(lambda x0: x0.mean((1, 2, 3))[:, None], name="mine"))


def test_embeddings_are_unit_vectors(pool):
    embeddings = pool.embeddings()
    assert embeddings.shape == (40, 1280)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)


def test_statistics_are_those_of_the_stored_activations(bundle, pool):
    mean, sd = pool.statistics("blocks.1")
    all_latents = np.stack([pool.activations(bundle.feature(f"blocks.1:sae:{j}")) for j in range(24)], axis=1)
    np.testing.assert_allclose(mean, all_latents.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sd, all_latents.std(0), rtol=1e-6, atol=1e-9)
    mean[:] = 7
    assert not np.array_equal(pool.statistics("blocks.1")[0], mean)
    with pytest.raises(ConfigError, match=r"blocks\.1"):
        pool.statistics("blocks.2")
