"""--runner auto: the fastest that passes its gate, once found always the same, and named in everything that is written."""

import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest
import torch

import tiltscope
from tiltscope.engine.batching.engine import Engine
from tiltscope.engine.bench.timing import interleave
from tiltscope.engine.runtime import auto, cpu, exported, runners
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.tilt.worlds import GaussianWorld

ADDRESS = "blocks.1:sae:3"
SETTINGS = {"num": 2, "lam": 2.0, "steps": 2, "runner": "auto"}


class Slow(TorchStep):
    def guided(self, x, sigma, alpha, readout):
        time.sleep(0.2)
        return super().guided(x, sigma, alpha, readout)


class Negated(TorchStep):
    def guided(self, x, sigma, alpha, readout):
        out = super().guided(x, sigma, alpha, readout)
        return out._replace(grad_a=-out.grad_a)


class Torch(TorchStep):
    """As fast as the reference."""


class Threaded(TorchStep):
    """One whose engine computes on threads of its own; `seen` holds how many torch had, a row."""

    has_own_threads = True
    seen: ClassVar[list[int]] = []

    def guided(self, x, sigma, alpha, readout):
        self.seen.append(torch.get_num_threads())
        return super().guided(x, sigma, alpha, readout)


class Double:
    """An exporter with a step of a chosen kind."""

    dtypes, max_batch = ("float32",), 8
    refused = MappingProxyType({})

    def __init__(self, name, kind, artefact="onnx"):
        self.name, self.kind, self.artefact = name, kind, artefact

    def facts(self):
        return {}

    def build(self, prior, feature, dtype, folder):
        (folder / "model.txt").write_text(self.name)

    def cannot_run(self):
        return None

    def locate(self, prior, feature, dtype):
        return "somewhere"

    def load(self, folder, prior, feature, dtype):
        return replace(self.kind(prior, feature), name=self.name)


class Entry:
    def __init__(self, exporter):
        self.name, self.load = exporter.name, lambda: exporter


@pytest.fixture
def register(monkeypatch, tmp_path):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(auto, "SECONDS", 0.0)

    def with_these(*exporters):
        monkeypatch.setattr(runners, "entry_points", lambda group: [Entry(each) for each in exporters])
        runners.registered.cache_clear()

    yield with_these
    runners.registered.cache_clear()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path):
    return tiltscope.load(tiny_bundle)


def draw(bundle, **settings):
    return tiltscope.sample(bundle.prior, bundle.feature(ADDRESS), **(SETTINGS | settings))


def test_a_slower_runner_is_not_taken_and_the_manifest_says_by_how_much(bundle, register):
    register(Double("slow", Slow))
    manifest = draw(bundle).manifest
    choice = manifest["runner_choice"]
    assert manifest["runner"] == choice["runner"] == manifest["config"]["runner"] == "torch"
    assert choice["ms"]["slow"] > choice["ms"]["torch"]
    assert choice["ms"]["slow"] > 200
    assert choice["why"] == (
        f"runner torch: {choice['ms']['torch']:.1f} ms a guided row of 2, slow {choice['ms']['slow']:.1f}"
    )


def test_the_fastest_is_taken_its_pictures_are_its_own_runs(bundle, register, monkeypatch):
    monkeypatch.setattr(runners, "TorchStep", Slow, raising=False)
    monkeypatch.setattr("tiltscope.engine.runtime.step.TorchStep", Slow)
    register(Double("quick", Torch))
    samples = draw(bundle)
    assert samples.manifest["runner"] == samples.manifest["config"]["runner"] == "quick"
    named = draw(bundle, runner="quick")
    assert named.manifest["identity"] == samples.manifest["identity"]
    assert named.manifest["runner_choice"] is None
    assert torch.equal(named.x0, samples.x0)


def test_what_the_gate_refuses_is_not_timed(bundle, register):
    register(Double("wrong", Negated))
    choice = draw(bundle).manifest["runner_choice"]
    assert list(choice["ms"]) == ["torch"]
    assert "grad_a" in choice["refused"]["wrong"]


def test_of_bfloat16_those_are_tried_that_compute_in_it(bundle, register, monkeypatch):
    monkeypatch.setattr(cpu, "processor_flags", lambda: ["avx512_bf16"])
    narrow = Double("narrow", Torch)
    monkeypatch.setattr(narrow, "dtypes", ("float32", "bfloat16"), raising=False)
    register(Double("wide", Torch), narrow)
    choice = draw(bundle, dtype="bfloat16").manifest["runner_choice"]
    assert sorted(choice["ms"]) == ["narrow", "torch"]
    assert choice["refused"] == {"wide": "has no bfloat16"}


def test_a_runner_without_its_library_is_named_with_what_to_install(bundle, register, monkeypatch):
    lacking = Double("lacking", Torch)
    monkeypatch.setattr(lacking, "cannot_run", lambda: exported.needed("no_such_module", "lacking"), raising=False)
    register(lacking)
    choice = draw(bundle).manifest["runner_choice"]
    assert choice["runner"] == "torch"
    assert "pip install 'tiltscope[lacking]'" in choice["refused"]["lacking"]


def test_what_takes_long_to_build_is_tried_only_where_it_is_built(bundle, register):
    register(Double("dear", Torch, artefact="dear"))
    assert "not built" in draw(bundle).manifest["runner_choice"]["refused"]["dear"]
    draw(bundle, runner="dear")
    assert set(draw(bundle).manifest["runner_choice"]["ms"]) == {"torch", "dear"}


def test_a_choice_is_kept_and_not_made_again(bundle, register, monkeypatch):
    register(Double("slow", Slow))
    first = draw(bundle).manifest["runner_choice"]
    monkeypatch.setattr(auto, "interleave", lambda *a, **k: pytest.fail("timed twice"))
    assert draw(bundle).manifest["runner_choice"] == first
    with pytest.raises(pytest.fail.Exception, match="timed twice"):
        draw(bundle, batch_size=4)  # another bucket is another trial


def test_an_engine_with_threads_of_its_own_has_the_processors_in_its_trial_and_in_its_rows(
    bundle, register, monkeypatch
):
    register(Double("threaded", Threaded))
    trials = []

    def trial(ways, **settings):
        Threaded.seen.clear()
        timings = interleave(ways, **settings)
        trials.extend(Threaded.seen)
        return timings

    monkeypatch.setattr(auto, "interleave", trial)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        draw(bundle)
        Threaded.seen.clear()
        draw(bundle, runner="threaded", steps=4)
    finally:
        torch.set_num_threads(before)
    assert trials == [1] * 11  # once, then five turns of an untimed row and a timed one
    assert Threaded.seen[-2:] == [1, 1]


def test_python_functions_run_in_torch(register):
    world = GaussianWorld(s=1.3, shape=(3, 4, 4))
    register(Double("slow", Slow))
    prior = tiltscope.Prior(lambda x, sigma: x * 0.5, shape=world.shape, name="half")
    choice = tiltscope.sample(prior, world.feature, **SETTINGS).manifest["runner_choice"]
    assert choice["runner"] == "torch"
    assert "Python function" in choice["why"]


def test_an_engine_chooses_once_and_draws_the_chosen_runners_pictures(bundle, register):
    register(Double("slow", Slow))
    with Engine(bundle, max_batch=4, runner="auto") as engine:
        one, two = (engine.submit(ADDRESS, num=2, lam=2.0, steps=2, seed=seed).result() for seed in (0, 1))
    assert {one.manifest["config"]["runner"], two.manifest["config"]["runner"]} == {"torch"}
    assert torch.equal(two.x0, draw(bundle, runner="torch", seed=1, batch_size=4).x0)
