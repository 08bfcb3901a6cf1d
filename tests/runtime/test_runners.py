"""Runners by name: the hook builds an artefact once, and every load is held to its stored self-test."""

from dataclasses import replace

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import BundleError, ParityError, RunnerError
from tiltscope.engine.runtime import runners
from tiltscope.engine.runtime.artefact import artefact_key
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.runtime.step import TorchStep

ADDRESS = "blocks.1:sae:3"
SETTINGS = {"num": 2, "lam": 2.0, "steps": 3}


class Negated(TorchStep):
    """A step whose gradient points the wrong way."""

    def guided(self, x, sigma, alpha, readout):
        out = super().guided(x, sigma, alpha, readout)
        return out._replace(grad_a=-out.grad_a)


class Mirror:
    """An exporter whose model file is a word; it counts its builds."""

    name = artefact = "mirror"
    dtypes, max_batch = ("float32", "float64"), 8

    def __init__(self):
        self.builds = 0
        self.kind = TorchStep

    def build(self, prior, feature, dtype, folder):
        self.builds += 1
        (folder / "model.txt").write_text("mirror")

    def facts(self):
        return {}

    def cannot_run(self):
        return None

    def locate(self, prior, feature, dtype):
        return "the error enters in the mirror"

    def load(self, folder, prior, feature, dtype):
        assert (folder / "model.txt").read_text() == "mirror"
        return replace(self.kind(prior, feature), name=self.name)


class Entry:
    """What importlib.metadata gives for a registered runner."""

    name = "mirror"

    def __init__(self, exporter):
        self.load = lambda: exporter


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    exporter = Mirror()
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(runners, "entry_points", lambda group: [Entry(exporter)] if group == runners.GROUP else [])
    runners.registered.cache_clear()
    yield exporter
    runners.registered.cache_clear()


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


def draw(bundle, address=ADDRESS, **settings):
    return tiltscope.sample(bundle.prior, bundle.feature(address), **(SETTINGS | settings))


def artefacts():
    return [path for path in cache_folder().iterdir() if not path.name.startswith(".")]


def test_a_registered_runner_is_built_gated_and_used(bundle, mirror):
    samples = draw(bundle, runner="mirror")
    assert samples.manifest["runner"] == "mirror"
    assert torch.equal(samples.x0, draw(bundle).x0)
    assert len(artefacts()) == 1


def test_an_artefact_is_built_once_and_serves_every_feature_of_its_hook(bundle, mirror):
    for address in (ADDRESS, ADDRESS, "blocks.1:sae:5"):
        draw(bundle, address, runner="mirror")
    assert mirror.builds == 1
    draw(bundle, runner="mirror", dtype="float64")
    assert mirror.builds == 2


def test_a_step_that_went_wrong_is_refused_at_the_next_load(bundle, mirror):
    draw(bundle, runner="mirror")
    mirror.kind = Negated
    with pytest.raises(ParityError, match="grad_a"):
        draw(bundle, runner="mirror")
    assert mirror.builds == 1


def test_a_damaged_artefact_is_named(bundle, mirror):
    draw(bundle, runner="mirror")
    (artefacts()[0] / "model.txt").write_text("mirrOr")
    with pytest.raises(BundleError, match=r"model\.txt"):
        draw(bundle, runner="mirror")


def test_a_failed_build_leaves_nothing(bundle, mirror, monkeypatch):
    def fail(prior, feature, dtype, folder):
        (folder / "half.bin").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(mirror, "build", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(bundle, runner="mirror")
    assert artefacts() == []


def test_a_cache_that_others_may_write_into_is_refused(bundle, mirror):
    cache_folder().chmod(0o777)
    with pytest.raises(RunnerError, match="engines are code"):
        draw(bundle, runner="mirror")


def test_the_key_changes_with_what_an_artefact_depends_on(bundle):
    feature = bundle.feature(ADDRESS)
    key = artefact_key("mirror", bundle.prior, feature, torch.float32)
    assert key == artefact_key("mirror", bundle.prior, bundle.feature("blocks.1:sae:5"), torch.float32)
    assert key != artefact_key("other", bundle.prior, feature, torch.float32)
    assert key != artefact_key("mirror", bundle.prior, feature, torch.float64)
    assert key != artefact_key("mirror", bundle.prior, bundle.feature("blocks.2:neuron:0"), torch.float32)


def test_a_runner_nobody_registered():
    with pytest.raises(RunnerError, match="available here: torch"):
        runners.exporter("tensorrt")
