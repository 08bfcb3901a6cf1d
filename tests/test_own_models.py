"""The example of one's own denoiser and vision model, as functions: drawn, compared, exported. What a bundle does for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "examples/own_models.py"


@pytest.mark.slow
def test_the_example_samples_compares_and_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "out"), "--num", "2", "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["guided"] > found["unguided"]
    assert found["parity"]["failure"] is None
    assert max(found["parity"]["errors"].values()) < 1e-4
    assert found["apart"] < 1e-3
    sampler, *rivals = found["methods"].values()
    assert sampler == pytest.approx(found["guided"], rel=0.5)
    assert len(rivals) == 4
    for name in ("samples/samples.png", "compare/index.html", "by_onnx/manifest.json"):
        assert (tmp_path / "out" / name).is_file()


def half(x, sigma):
    return 0.5 * x


def test_a_bundle_with_another_prior_keeps_what_it_knows_of_pictures(tiny_bundle):
    bundle = tiltscope.load(tiny_bundle)
    mine = bundle.with_prior(tiltscope.Prior(half, shape=(3, 64, 64), name="half"))
    assert mine.prior.name == "half"
    assert mine.pool is bundle.pool
    assert mine.identity != bundle.identity
    assert bundle.prior.network is not None
    with pytest.raises(ConfigError, match=r"its samples are \[3, 32, 32\], the bundle's pictures \[3, 64, 64\]"):
        bundle.with_prior(tiltscope.Prior(half, shape=(3, 32, 32)))


@pytest.mark.slow
def test_explain_calibrates_functions_and_remembers_each_by_its_answers(tiny_bundle, tmp_path, monkeypatch):
    """On the bundle's pictures and on the sampler. A name says nothing of a function: another one under it has another lambda."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path))
    bundle = tiltscope.load(tiny_bundle)
    drawn = {"num": 4, "steps": 3}

    def brightness(scale):
        return tiltscope.Feature(lambda x0: scale * x0.mean(dim=(1, 2, 3)), name="brightness")

    def explained(scale, **asked):
        return tiltscope.explain(bundle, brightness(scale), **drawn, **asked)

    one, three = (explained(scale, calibration="pool", target_quantile=0.6) for scale in (1.0, 3.0))
    assert three.lam == pytest.approx(one.lam / 3, rel=1e-3)
    assert one.metrics["tilt"]["kl"] == pytest.approx(three.metrics["tilt"]["kl"], rel=1e-3)
    x0 = one.answers["tilt"].x0
    torch.testing.assert_close(one.answers["tilt"].activation, x0.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)

    reached = float(tiltscope.sample(bundle.prior, brightness(-1.0), lam=3.0, seed=4, **drawn).activation.mean())
    asked = {"target_activation": reached, "beyond_pool": True, "calibration_num": 64}
    first, again = explained(-1.0, **asked), explained(-1.0, **asked)
    assert (first.manifest["ascent"]["origin"], again.manifest["ascent"]["origin"]) == ("drawn", "cache")
    assert first.lam == again.lam
    # Another function of that name is asked anew.
    other = tiltscope.Feature(lambda x0: -x0.mean(dim=(1, 2, 3)) + 1e-3, name="brightness")
    assert tiltscope.explain(bundle, other, **drawn, **asked).manifest["ascent"]["origin"] == "drawn"
