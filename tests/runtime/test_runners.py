"""Runners by name: the hook builds an artefact once, and every load is held to its stored self-test."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import BundleError, ParityError, RunnerError
from tiltscope.engine.runtime import runners
from tiltscope.engine.runtime.artefact import artefact_key, prune
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
    refused = MappingProxyType({"bfloat16": "a mirror has no grain"})

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


def test_what_a_key_says_as_a_tuple_is_found_again(bundle, mirror, monkeypatch):
    """Of the description comes back what JSON makes of it, a list."""
    monkeypatch.setattr(mirror, "facts", lambda: {"targets": ("SM80", "SM86")})
    for _ in range(2):
        draw(bundle, runner="mirror")
    assert mirror.builds == 1


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


def test_a_refusal_says_where_the_error_enters_and_which_files_they_are(bundle, mirror):
    draw(bundle, runner="mirror")
    mirror.kind = Negated
    with pytest.raises(ParityError, match=rf"turn .*the error enters in the mirror \(files: .*{artefacts()[0].name}"):
        draw(bundle, runner="mirror")


class Overexposed(TorchStep):
    """A step that is right in the graph which is held at load, and wrong in another."""

    def measure(self, x0, readout):
        activation, drive = super().measure(x0, readout)
        return activation, drive * 1.01


def test_a_graph_that_a_run_meets_later_is_held_before_its_first_use(bundle, mirror):
    """The manifest then has its errors beside those of the load; a wrong one ends the run, or is stamped where allowed."""
    errors = draw(bundle, runner="mirror").manifest["parity"]["errors"]
    assert {"x0_hat", "activation", "drive", "grad_a", "turn", "measure.drive"} <= set(errors)
    assert max(errors.values()) < 1e-4
    mirror.kind = Overexposed
    with pytest.raises(ParityError, match=r"runner mirror: graph measure: relative error of drive 1.0e-02"):
        draw(bundle, runner="mirror")
    wrong = draw(bundle, runner="mirror", allow_parity_failure=True).manifest["parity"]
    assert "graph measure" in wrong["failure"]
    assert wrong["errors"]["measure.drive"] == pytest.approx(0.01, rel=1e-3)
    assert {"unguided.x0_hat", "gradient.turn", "pullback.grad_a"} <= set(wrong["errors"])


def test_an_allowed_failure_is_logged_and_stamped_in_the_manifest(bundle, mirror, caplog):
    right = draw(bundle, runner="mirror")
    assert right.manifest["parity"]["failure"] is None
    assert 0 < right.manifest["parity"]["errors"]["grad_a"] < 1e-4
    mirror.kind = Negated
    wrong = draw(bundle, runner="mirror", allow_parity_failure=True)
    assert "the error enters in the mirror" in wrong.manifest["parity"]["failure"]
    assert wrong.manifest["parity"]["errors"]["turn"] == pytest.approx(2)
    assert wrong.manifest["config"]["allow_parity_failure"] is True
    assert "parity failure allowed: runner mirror" in caplog.text
    assert wrong.manifest["identity"] != right.manifest["identity"]
    assert draw(bundle).manifest["parity"] == {"errors": None, "failure": None}


def test_weights_that_changed_under_one_identity_ask_for_another_artefact(tiny_bundle, mirror):
    """A network that was trained on, say: an identity says where weights came from, not what they are."""
    draw(tiltscope.load(str(tiny_bundle)), runner="mirror")
    for builds, change in enumerate(("prior", "trunk"), start=2):
        bundle = tiltscope.load(str(tiny_bundle))
        module = bundle.prior.network.network if change == "prior" else bundle.feature(ADDRESS).trunk
        next(module.parameters()).data += 1e-3
        draw(bundle, runner="mirror")
        assert mirror.builds == builds
        draw(bundle, runner="mirror")
        assert mirror.builds == builds


def test_an_engine_of_other_weights_is_refused(tiny_bundle, mirror):
    """As if a builder had taken a file from before the weights changed: the name fits, the numbers do not."""
    stale = tiltscope.load(str(tiny_bundle))
    bundle = tiltscope.load(str(tiny_bundle))
    next(bundle.prior.network.network.parameters()).data[0] *= 1.05
    mirror.kind = lambda prior, feature: TorchStep(stale.prior, feature)
    with pytest.raises(ParityError, match="x0_hat"):
        draw(bundle, runner="mirror")


def test_a_dtype_that_a_runner_does_not_have_is_refused_before_it_builds(bundle, mirror):
    with pytest.raises(
        RunnerError, match=r"got dtype bfloat16, allowed here: float32, float64 \(a mirror has no grain"
    ):
        runners.build_step("mirror", bundle.prior, bundle.feature(ADDRESS), torch.bfloat16)
    assert artefacts() == []


def test_pruning_removes_what_cannot_be_used_and_leaves_the_rest(bundle, mirror):
    draw(bundle, runner="mirror")
    (good,) = artefacts()
    for name, change in (("a" * 64, "truncate"), ("b" * 64, "version"), ("c" * 64, "undescribed")):
        other = Path(shutil.copytree(good, good.parent / name))
        if change == "truncate":
            (other / "model.txt").write_text("mir")
        elif change == "version":
            description = json.loads((other / "artefact.json").read_text())
            description["key"]["versions"]["torch"] = "0.0"
            (other / "artefact.json").write_text(json.dumps(description))
        else:
            (other / "artefact.json").unlink()
    (good.parent / ".building-dead").mkdir()
    removed, in_use = prune()
    assert (removed, in_use) == (4, [])
    assert artefacts() == [good]
    assert not (good.parent / ".building-dead").exists()


def test_a_damaged_artefact_is_named(bundle, mirror):
    draw(bundle, runner="mirror")
    (artefacts()[0] / "model.txt").write_text("mirrOr")
    with pytest.raises(BundleError, match=r"model\.txt"):
        draw(bundle, runner="mirror")


def test_a_truncated_artefact_and_another_versions_are_refused(bundle, mirror):
    draw(bundle, runner="mirror")
    (folder,) = artefacts()
    description, model = folder / "artefact.json", folder / "model.txt"
    model.write_text("mir")
    with pytest.raises(BundleError, match=r"model\.txt has 3 bytes instead of 6.*remove"):
        draw(bundle, runner="mirror")
    model.write_text("mirror")
    facts = json.loads(description.read_text())
    facts["key"]["versions"]["torch"] = "0.0"
    description.write_text(json.dumps(facts))
    with pytest.raises(RunnerError, match="built for something else; remove it and run again"):
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
        runners.exporter("magic")
