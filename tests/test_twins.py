"""Every system in small, the real architectures and formats: loaded, read, sampled, explained, compared. Exported in
tests/export/test_twins_exported.py."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.compare import compare
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.errors import BundleError, ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["energydps", "vitl_sit", "vitb_sd15"])
def twin(request, build_twin, tmp_path_factory):
    return tiltscope.load(str(build_twin(tmp_path_factory.mktemp("twin") / request.param, request.param)))


def sae(bundle, index, pooling=""):
    return bundle.feature(f"{bundle.sae_hooks[0]}:sae:{index}{pooling}")


def test_the_pool_holds_what_the_bundles_own_trunk_reads(twin):
    feature = sae(twin, 2)
    natural = twin.pool.activations(feature)
    assert float(natural.std()) > 0.1
    read = feature.on_pictures().activation(twin.pool.x0(range(6)))
    torch.testing.assert_close(read.double(), torch.as_tensor(natural[:6]).double(), rtol=1e-4, atol=1e-4)


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


def test_explain_answers_and_writes_its_page(twin, tmp_path):
    # A random prior reaches no activation worth the name: lambda is the pool's.
    asked = {"num": 2, "steps": 4, "calibration": "pool"}
    result = tiltscope.explain(twin, sae(twin, 1), **asked)
    assert list(result.answers) == ["tilt", "topk", "hard", "actmax"]
    natural = twin.pool.activations(sae(twin, 1))
    for name, samples in result.answers.items():
        assert samples.images.shape[1:] == (3, 64, 64)
        assert tuple(samples.x0.shape[1:]) == (twin.prior.shape if name == "tilt" else (3, 64, 64))
        metrics = result.metrics[name]
        assert metrics["activation_mean"] == pytest.approx(float(samples.activation.mean()), abs=1e-5)
        assert 1 <= metrics["selectivity_rank"] <= 8
        assert metrics["naturalness"] is not None
        assert samples.heat.shape[1:] == sae(twin, 1).trunk.grid
    np.testing.assert_allclose(result.answers["topk"].activation, np.sort(natural)[::-1][:2], rtol=1e-6)
    alone = tiltscope.sample(twin.prior, sae(twin, 1), lam=result.lam, **asked)
    assert torch.equal(alone.x0, result.answers["tilt"].x0)
    result.save(str(tmp_path / "out"))
    assert (tmp_path / "out/index.html").stat().st_size > 10_000


def test_compare_measures_a_sampler_and_the_rivals(twin, tmp_path, monkeypatch):
    """At a mean that the sampler itself reaches; the pool of a random trunk has none in common with it."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    feature = sae(twin, 1)
    reached = tiltscope.sample(twin.prior, feature, lam=1.0, num=64, steps=2, seed=0).activation.mean()
    config = CompareConfig(
        num=2,
        lifts=("dps",),
        solvers=("ddpm",),
        steps=(2,),
        lam_factors=(0.5,),
        target_activation=float(reached),
        beyond_pool=True,
        # A random prior answers a lambda by little: the target is the mean of the very draws that the ascent looks at.
        calibration_num=64,
    )
    found = compare(twin, str(feature.address), config)
    methods = {each.name: each for each in found.methods}
    assert list(methods) == ["dps, ddpm, 2 steps", "topk", "hard", "actmax", "maco"]
    sampler = found.methods[0]
    assert sampler.note is None
    for name, each in methods.items():
        assert each.samples.images.shape[1:] == (3, 64, 64)
        assert {"vendi", "naturalness", "activation_mean"} <= {k for k, v in each.metrics.items() if v is not None}, (
            name
        )
        # Bits a pixel are of pictures' densities, which a prior of latents has none of.
        assert (each.metrics["bits_per_dim"] is None) == (twin.decoder is not None)
    found.save(tmp_path / "out")
    assert (tmp_path / "out/compare.png").stat().st_size > 5_000


def test_a_latents_picture_is_read_as_the_latent_is(twin):
    """One function behind the decoder: a feature on pictures is the feature on latents, decoded."""
    feature = sae(twin, 2)
    x0 = torch.randn(3, *twin.prior.shape, generator=torch.Generator().manual_seed(8))
    on_pictures = feature.on_pictures()
    assert on_pictures is feature.on_pictures()
    assert (on_pictures is feature) == (twin.decoder is None)
    torch.testing.assert_close(
        on_pictures.activation(twin.prior.decode(x0)), feature.activation(x0), rtol=1e-4, atol=1e-4
    )
    # What no column holds is computed of pictures.
    natural = twin.pool.activations(feature)
    computed = twin.pool.activations(sae(twin, 2, "@max"))
    assert computed.shape == natural.shape
    assert (computed >= natural - 1e-4).all()


def test_a_function_of_latents_is_not_asked_about_pictures(twin):
    if twin.decoder is None:
        pytest.skip("its samples are pictures")
    mine = tiltscope.Feature(lambda x0: x0.mean(dim=(1, 2, 3)), name="mean")
    with pytest.raises(ConfigError, match="a function of the prior's latents, and the rivals are pictures"):
        tiltscope.explain(twin, mine, num=1, lam=1.0, steps=1)


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
