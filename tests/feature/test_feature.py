"""Feature: any differentiable function, or a readout of a trunk; a vector space; wrong ones are refused by a trial call."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature, check_activation

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


@pytest.fixture(scope="module")
def x0(bundle):
    return bundle.pool.x0(range(6))


def mean_red(x):
    return x[:, 0].mean((1, 2))


def test_a_custom_feature_reads_and_drives_alike():
    feature = Feature(mean_red, name="red")
    x = torch.rand(4, *SHAPE)
    activation, drive = feature.activation_and_drive(x)
    assert torch.equal(activation, mean_red(x))
    assert torch.equal(drive, activation)
    assert torch.equal(feature.activation(x), activation)
    assert (feature.readout, feature.trunk, feature.pool, feature.pool_key, feature.address) == (None,) * 5
    assert feature.identity == "custom:red"
    assert feature.heat_map(x) is None
    assert feature.to(torch.float64) is feature


def test_sums_of_features_are_sums_of_activations(bundle, x0):
    a, b, c = (bundle.feature(t) for t in ("blocks.1:sae:3", "blocks.1:neuron:5@max", "blocks.1:cls:2"))
    combined = 2.0 * a - b + c * 0.25
    for i in range(2):
        apart = 2 * a.activation_and_drive(x0)[i] - b.activation_and_drive(x0)[i] + 0.25 * c.activation_and_drive(x0)[i]
        torch.testing.assert_close(combined.activation_and_drive(x0)[i], apart, rtol=1e-6, atol=1e-6)
    assert torch.equal((-a).activation(x0), -a.activation(x0))
    assert combined.trunk is a.trunk
    assert combined.pool is bundle.pool
    assert combined.pool_key is None


def test_sums_in_float64_are_exact(bundle, x0):
    a, b = (bundle.feature(t).to(torch.float64) for t in ("blocks.1:sae:3", "blocks.1:sae:7"))
    apart = 3 * a.activation(x0.double()) - b.activation(x0.double())
    torch.testing.assert_close((3 * a - b).activation(x0.double()), apart, rtol=1e-13, atol=1e-13)


def test_identities_tell_features_apart(bundle):
    a, b = bundle.feature("blocks.1:sae:3"), bundle.feature("blocks.1:sae:7")
    features = [a, b, a * 2.0, a * -2.0, a + b, b + a, a - b, (a + b) * 2.0, a * 2.0 + b]
    assert len({f.identity for f in features}) == len(features)
    assert a.identity == "blocks.1:sae:3"


@pytest.mark.parametrize("scalar", [2, 2.0, np.float64(2), np.float32(2), np.int64(2)])
def test_numpys_numbers_scale_from_either_side(bundle, x0, scalar):
    a = bundle.feature("blocks.1:sae:3")
    for feature in (a * scalar, scalar * a):
        assert isinstance(feature, Feature)
        assert torch.equal(feature.activation(x0), 2 * a.activation(x0))


@pytest.mark.parametrize("scalar", ["2", None, True, [1.0], 1j, np.ones(2)])
def test_other_things_do_not_scale(bundle, scalar):
    with pytest.raises(TypeError):
        bundle.feature("blocks.1:sae:3") * scalar
    with pytest.raises(TypeError):
        scalar * bundle.feature("blocks.1:sae:3")


@pytest.mark.parametrize("scalar", [float("nan"), float("inf")])
def test_a_scale_is_finite(bundle, scalar):
    with pytest.raises(ConfigError, match="finite"):
        bundle.feature("blocks.1:sae:3") * scalar


def test_only_features_of_one_hook_add(bundle, tiny_bundle):
    a = bundle.feature("blocks.1:sae:3")
    others = [
        bundle.feature("norm:neuron:3"),
        tiltscope.load(tiny_bundle).feature("blocks.1:sae:3"),
        a.to(torch.float64),
        Feature(mean_red, name="red"),
    ]
    for other in others:
        for attempt in (lambda o: a + o, lambda o: o - a):
            with pytest.raises(ConfigError, match="cannot be added"):
                attempt(other)
    with pytest.raises(TypeError):
        a + 1.0


def test_one_trunk_serves_every_feature_of_a_hook_and_dtype(bundle):
    a, b = bundle.feature("blocks.1:sae:3"), bundle.feature("blocks.1:neuron:0")
    assert a.trunk is b.trunk
    assert a.to(torch.float64).trunk is b.to(torch.float64).trunk
    assert a.to(torch.float64) is a.to(torch.float64)
    assert a.to(torch.float64).to(torch.float32) is a
    assert a.to(torch.float32) is a
    assert a.to(torch.float64).readout.bias.dtype == torch.float64
    assert a.to(torch.float64).address == a.address


def test_float64_agrees_with_float32(bundle, x0):
    for text in ("blocks.1:sae:3", "norm:neuron:3@lse", "norm:cls:1", "blocks.2:neuron:9@0,7"):
        a = bundle.feature(text)
        narrow, wide = a.activation(x0), a.to(torch.float64).activation(x0.double())
        assert wide.dtype == torch.float64
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


def test_heat_map_shows_what_is_pooled(bundle, x0):
    centre = slice(2, 6)
    for text, pooled in (
        ("blocks.1:sae:3@max", lambda h: h.amax((1, 2))),
        ("blocks.1:neuron:4@mean", lambda h: h.mean((1, 2))),
        ("blocks.1:neuron:4@2,7", lambda h: h[:, 2, 7]),
        ("blocks.1:sae:3", lambda h: 0.7 * h[:, centre, centre].amax((1, 2)) + 0.3 * h[:, centre, centre].mean((1, 2))),
    ):
        feature = bundle.feature(text)
        heat = feature.heat_map(x0)
        assert heat.shape == (6, 8, 8)
        torch.testing.assert_close(pooled(heat), feature.activation(x0), rtol=1e-5, atol=1e-6)
    assert bundle.feature("blocks.1:cls:3").heat_map(x0) is None
    assert (bundle.feature("blocks.1:cls:3") + bundle.feature("blocks.1:sae:3")).heat_map(x0) is None


def test_a_mask_pools_over_its_places_alone(bundle, x0):
    feature = bundle.feature("blocks.1:sae:3")
    grid = feature.trunk.grid
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    places = [bundle.feature(f"blocks.1:sae:3@{y},{x}").activation(x0) for y, x in ((1, 2), (3, 0))]
    expected = 0.7 * torch.maximum(*places) + 0.3 * (places[0] + places[1]) / 2
    torch.testing.assert_close(feature.masked(mask).activation(x0), expected)
    whole = bundle.feature("blocks.1:sae:3@max").masked(torch.ones(grid, dtype=torch.bool))
    torch.testing.assert_close(whole.activation(x0), bundle.feature("blocks.1:sae:3@max").activation(x0))


def test_a_masked_feature_is_another_feature_whose_natural_activations_are_its_own(bundle):
    feature = bundle.feature("blocks.1:sae:3")
    mask = torch.zeros(feature.trunk.grid, dtype=torch.bool)
    mask[0, 0] = True
    corner = feature.masked(mask)
    assert corner.identity != feature.identity != feature.masked(~mask).identity
    at_corner = bundle.pool.activations(bundle.feature("blocks.1:sae:3@0,0"))
    np.testing.assert_allclose(bundle.pool.activations(corner), at_corner, atol=1e-5)
    assert tiltscope.sample(bundle.prior, corner - feature, num=1, lam=0.5, steps=2).ok.all()


@pytest.mark.parametrize(
    ("address", "mask", "said"),
    [
        ("blocks.1:sae:3", torch.ones(2, 2, dtype=torch.bool), "allowed is bool"),
        ("blocks.1:sae:3", torch.ones(8, 8), "got torch.float32"),
        ("blocks.1:sae:3", torch.zeros(8, 8, dtype=torch.bool), "with 0 places"),
        ("norm:cls:2", torch.ones(8, 8, dtype=torch.bool), "no places to be masked"),
    ],
)
def test_a_wrong_mask_is_refused(bundle, address, mask, said):
    with pytest.raises(ConfigError, match=said):
        bundle.feature(address).masked(mask)


def test_cls_reads_the_class_token_and_neuron_a_patch(bundle, x0):
    tokens = bundle.trunk("blocks.1")(x0)
    torch.testing.assert_close(bundle.feature("blocks.1:cls:5").activation(x0), tokens[:, 0, 5], rtol=0, atol=1e-6)
    at = bundle.trunk("blocks.1").num_prefix_tokens + 3 * 8 + 6
    torch.testing.assert_close(
        bundle.feature("blocks.1:neuron:5@3,6").activation(x0), tokens[:, at, 5], rtol=0, atol=1e-6
    )


def test_activation_writes_into_nothing(bundle, x0):
    before = x0.clone()
    feature = bundle.feature("blocks.1:sae:3")
    feature.activation_and_drive(x0)
    feature.heat_map(x0)
    assert torch.equal(x0, before)


def always_nan(x):
    return mean_red(x) * float("nan")


def one_column(x):
    return x.mean((1, 2, 3), keepdim=True)[:, :, 0, 0]


def writes(x):
    x[:, 0] = 0
    return x.sum((1, 2, 3))


WRONG = {
    "one column": (one_column, r"\[2\].*\[2, 1\]"),
    "a scalar": (lambda x: x.sum(), r"\[2\].*\[\]"),
    "detached": (lambda x: mean_red(x).detach(), "differentiable"),
    "a constant": (lambda x: torch.ones(len(x), requires_grad=True), "does not depend on x0"),
    "without a graph": (lambda x: torch.ones(len(x)), "differentiable"),
    "NaN for every sample": (always_nan, "NaN for every sample"),
    "a float": (lambda x: 1.0, "torch tensor, got float"),
    "numpy": (lambda x: mean_red(x).detach().numpy(), "torch tensor, got ndarray"),
    "integers": (lambda x: mean_red(x).long(), "floating dtype, got torch.int64"),
    "complex": (lambda x: mean_red(x).to(torch.complex64), "floating dtype, got torch.complex64"),
    "writes into x0": (writes, "writes into x0"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_activation_is_refused_by_one_trial_call(case, dtype):
    activation, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        check_activation(Feature(activation, name="mine"), SHAPE, dtype)


@pytest.mark.parametrize("activation", [mean_red, lambda x: x.square().sum((1, 2, 3)).double()])
def test_a_right_activation_passes_without_touching_the_global_generator(activation):
    before = torch.random.get_rng_state()
    check_activation(Feature(activation, name="mine"), SHAPE, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nan_for_one_sample_is_that_samples_own_matter():
    def sometimes(x):
        value = mean_red(x)
        return torch.where(value == value.max(), value * float("nan"), value)

    check_activation(Feature(sometimes, name="mine"), SHAPE, torch.float32)


def test_a_trunks_feature_needs_its_own_picture_size(bundle):
    check_activation(bundle.feature("blocks.1:sae:3"), (3, 64, 64), torch.float32)
    with pytest.raises(ConfigError, match=r"\(3, 64, 64\).*\(3, 32, 32\)"):
        check_activation(bundle.feature("blocks.1:sae:3"), (3, 32, 32), torch.float32)


def test_a_late_change_of_shape_is_refused_too():
    feature = Feature(lambda x: mean_red(x) if len(x) == 2 else mean_red(x)[:, None], name="mine")
    check_activation(feature, SHAPE, torch.float32)
    with pytest.raises(ConfigError, match=r"\[5\].*\[5, 1\]"):
        feature.activation(torch.rand(5, *SHAPE))


@pytest.mark.parametrize(("activation", "name"), [(3, "mine"), (mean_red, ""), (mean_red, None), (None, "mine")])
def test_a_feature_is_a_function_with_a_name(activation, name):
    with pytest.raises(ConfigError):
        Feature(activation, name=name)
