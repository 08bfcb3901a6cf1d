"""Whole bundles of real architectures in small: loaded, read, sampled, explained."""

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import BundleError, ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["energydps", "latent"])
def twin(request, build_twin, tmp_path_factory):
    return tiltscope.load(str(build_twin(tmp_path_factory.mktemp("twin") / request.param, request.param)))


def sae(bundle, index, pooling=""):
    return bundle.feature(f"{bundle.sae_hooks[0]}:sae:{index}{pooling}")


def test_the_pool_holds_what_the_bundles_own_trunk_reads(twin):
    feature = sae(twin, 2)
    natural = twin.pool.activations(feature)
    assert float(natural.std()) > 0.1
    if twin.decoder is not None:
        return  # its features read latents, the pool's pictures have none
    x0 = twin.pool.x0(range(6))
    torch.testing.assert_close(
        feature.activation(x0).double(), torch.as_tensor(natural[:6]).double(), rtol=1e-4, atol=1e-4
    )


def test_features_of_the_hook_add(twin):
    total = sae(twin, 0) * 2.0 - sae(twin, 1, "@max")
    x0 = torch.randn(2, *twin.prior.shape, generator=torch.Generator().manual_seed(0))
    expected = 2 * sae(twin, 0).activation(x0) - sae(twin, 1, "@max").activation(x0)
    torch.testing.assert_close(total.activation(x0), expected, rtol=1e-4, atol=1e-5)
    heat = sae(twin, 0).heat_map(x0)
    assert heat.shape[1:] == sae(twin, 0).trunk.grid
    if twin.name == "energydps":
        with pytest.raises(ConfigError, match="not read off one hook"):
            _ = sae(twin, 0) + twin.feature("stages.2.1:neuron:3")
        with pytest.raises(ConfigError, match="no class token"):
            twin.feature("stages.2.1:cls:3")


def test_samples_are_guided_and_shown(twin):
    asked = {"num": 2, "steps": 4, "seed": 3}
    feature = sae(twin, 0)
    plain, pushed = (tiltscope.sample(twin.prior, feature, lam=lam, **asked) for lam in (0.0, 20.0))
    assert pushed.images.shape == (2, 3, 64, 64)
    assert pushed.images.dtype == torch.uint8
    assert float((pushed.x0 - plain.x0).abs().max()) > 1e-3
    assert torch.equal(tiltscope.sample(twin.prior, feature, lam=20.0, **asked).x0, pushed.x0)


def test_explain_writes_its_page(build_twin, tmp_path):
    bundle = tiltscope.load(str(build_twin(tmp_path / "twin", "energydps")))
    result = tiltscope.explain(bundle, sae(bundle, 1), num=2, steps=6, seed=0, calibration="pool", lam=1.0)
    result.save(str(tmp_path / "out"))
    assert (tmp_path / "out/index.html").stat().st_size > 10_000
    assert result.metrics["tilt"]["activation_mean"] == result.metrics["tilt"]["activation_mean"]


def test_a_trunk_of_another_kind_than_the_bundle_says(build_twin, tmp_path):
    import json

    folder = build_twin(tmp_path / "twin", "energydps")
    path = folder / "bundle.json"
    meta = json.loads(path.read_text())
    meta["trunk"]["kind"] = "dinov3_vit"
    path.write_text(json.dumps(meta))
    with pytest.raises(BundleError, match=r"'dinov3_vit', but model_type of .* is 'dinov3_convnext'"):
        tiltscope.load(str(folder)).trunk("stages.2.1")
    meta["trunk"] = {"kind": "dinov3_convnext", "path": "trunk", "image_size": [64, 0]}
    path.write_text(json.dumps(meta))
    with pytest.raises(BundleError, match="image_size must be two positive"):
        tiltscope.load(str(folder)).trunk("stages.2.1")
