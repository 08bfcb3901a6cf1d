"""A whole bundle exported, as a user meets it: every graph in every engine, the cache, the command line, an embedding.

Slow: the five graphs take four minutes of one core to write. What of it needs no bundle is in test_exported_step.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiltscope
from tiltscope.engine.cli.main import run
from tiltscope.engine.errors import BundleError, RunnerError
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime import onnx_step, openvino_step
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.runtime.cpu import has_bfloat16
from tiltscope.engine.runtime.exported import INPUTS, OUTPUTS, ExportedStep, GraphFiles
from tiltscope.engine.runtime.gate import LEVELS
from tiltscope.engine.runtime.parity import check, measure
from tiltscope.engine.runtime.runners import build_step
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.export.graphs import examples
from tiltscope.export.trace import StepNetworks, trace

pytestmark = pytest.mark.slow
FEATURES = ("blocks.1:sae:3", "blocks.1:sae:5@max", "blocks.1:neuron:2@mean")
# Of an output's largest value. float32 through a few dozen layers and back; a wrong graph is off by 1e-2 and more.
WITHIN = 1e-5


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


@pytest.fixture(scope="module")
def feature(bundle):
    return bundle.feature(FEATURES[0])


@pytest.fixture(scope="module")
def built(bundle, feature, tmp_path_factory):
    """A cache that holds the one artefact, built as a user's first run would."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILTSCOPE_HOME", str(home))
        build_step("onnx", bundle.prior, feature, torch.float32)
    return home


@pytest.fixture(scope="module")
def folder(built):
    (found,) = (built / "artefacts").glob("[!.]*")
    return found


@pytest.fixture(scope="module")
def traced(bundle, feature):
    networks = StepNetworks(bundle.prior.network, feature.trunk)
    graphs = {name: trace(networks, name, example) for name, example in examples(bundle.prior, feature).items()}

    def call(graph, inputs):
        return list(graphs[graph](*inputs))

    return call


@pytest.fixture(params=["traced graph", "onnxruntime", "openvino"])
def step(request, bundle, folder):
    if request.param == "traced graph":
        return ExportedStep("traced", bundle.prior.network, request.getfixturevalue("traced"))
    engine = onnx_step if request.param == "onnxruntime" else openvino_step
    return ExportedStep(request.param, bundle.prior.network, GraphFiles(folder, engine.open_graph))


def inputs(num, seed=0):
    x = torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    sigma = torch.linspace(0.05, 0.995, num, dtype=torch.float64) if num > 1 else torch.tensor([0.6]).double()
    return x, sigma, torch.sqrt(1 - sigma**2)


def close(found, expected):
    for each, wanted in zip(found, expected, strict=True):
        assert type(wanted) is torch.Tensor  # nothing of a trace leaked into the reference
        torch.testing.assert_close(each, wanted, rtol=0, atol=WITHIN * float(wanted.abs().max()) + 1e-7)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_every_graph_is_the_reference_at_other_batches_levels_and_readouts(step, bundle, num):
    x, sigma, alpha = inputs(num)
    readout = Readout.stack(
        [bundle.feature(FEATURES[at % 3]).readout for at in range(num - 1)]
        + [(bundle.feature(FEATURES[0]) * 2.0 - bundle.feature(FEATURES[2])).readout]
    )
    reference = TorchStep(bundle.prior, bundle.feature(FEATURES[0]))
    close(step.guided(x, sigma, alpha, readout), reference.guided(x, sigma, alpha, readout))
    close([step.unguided(x, sigma, alpha)], [reference.unguided(x, sigma, alpha)])
    close(step.measure(x, readout), reference.measure(x, readout))
    close(step.gradient(x, readout), reference.gradient(x, readout))
    (mean, pull), (expected_mean, expected_pull) = (each.linearise(x, sigma) for each in (step, reference))
    close([mean, pull(x.flip(0))], [expected_mean, expected_pull(x.flip(0))])


@pytest.mark.parametrize("num", [2, 5, 8])
def test_a_sample_has_the_same_bits_in_any_place_and_beside_any_others(step, bundle, num):
    """What a picture's address promises, here of an engine's own kernels: none may go by where in a batch a sample stands, or by
    where in memory its rows begin.
    """
    own, others = inputs(1)[0], inputs(num, seed=1)[0]
    sigma = torch.full((num,), 0.6, dtype=torch.float64)
    readout = bundle.feature(FEATURES[0]).readout.expand(num)
    found: list[list[torch.Tensor]] = []
    for place in range(num):
        x = torch.cat([others[:place], own, others[place + 1 :]])
        outputs = [*step.guided(x, sigma, torch.sqrt(1 - sigma**2), readout), *step.measure(x, readout)]
        mean, pull = step.linearise(x, sigma)
        outputs += [*step.gradient(x, readout), mean, pull(x)]
        found.append([each[place] for each in outputs])
    for place, each in enumerate(found[1:], start=1):
        assert [torch.equal(one, other) for one, other in zip(found[0], each, strict=True)] == [True] * 11, place


def test_a_file_names_its_inputs_and_says_what_it_is_of(folder, feature):
    onnx = pytest.importorskip("onnx")
    for name in INPUTS:
        model = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [each.name for each in model.graph.input] == list(INPUTS[name])
        assert [each.name for each in model.graph.output] == list(OUTPUTS[name])
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # any batch
        facts = {each.key: each.value for each in model.metadata_props}
        assert facts["tiltscope.hook"] == feature.trunk.hook
        assert not [node.op_type for node in model.graph.node if node.op_type == "ConvTranspose"]


# As a user meets it.


@pytest.fixture
def home(built, tmp_path, monkeypatch):
    """A copy of that cache, to be changed."""
    shutil.copytree(built, tmp_path / "home")
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
def test_the_pictures_are_torchs_and_the_manifest_says_which_runner_ran(bundle, runner, home):
    asked = {"num": 3, "lam": 2.0, "steps": 6}
    plain = tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)
    found = tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), runner=runner, **asked)
    assert found.manifest["runner"] == runner
    assert float((found.x0 - plain.x0).pow(2).mean().sqrt()) < 1e-4
    # Another feature of the hook, and a sum of two: the same files.
    kept = [path.stat().st_mtime_ns for path in cache_folder().glob("*/guided.onnx")]
    for other in (bundle.feature(FEATURES[1]), bundle.feature(FEATURES[0]) - bundle.feature(FEATURES[1])):
        tiltscope.sample(bundle.prior, other, runner=runner, num=1, lam=1.0, steps=2)
    assert [path.stat().st_mtime_ns for path in cache_folder().glob("*/guided.onnx")] == kept
    assert len(kept) == 1


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
def test_an_explanation_has_torchs_pictures_and_says_which_runner_drew_them(bundle, runner, home):
    """The tilt is the runner's, calibrated with the runner; within 1e-3 (RMS), of pictures whose range is 2."""
    asked = {"num": 2, "steps": 5, "seed": 0, "calibration": "pool"}
    plain = tiltscope.explain(bundle, FEATURES[0], **asked)
    found = tiltscope.explain(bundle, FEATURES[0], runner=runner, **asked)
    assert (plain.manifest["runner"], found.manifest["runner"]) == ("torch", runner)
    assert found.manifest["parity"]["failure"] is None
    assert {"grad_a", "measure.drive"} <= set(found.manifest["parity"]["errors"])
    for name in ("tilt", "hard", "topk"):
        one, other = found.answers[name].x0, plain.answers[name].x0
        assert float((one - other).pow(2).mean().sqrt()) < 1e-3


def test_a_truncated_file_and_a_stale_one_are_refused(bundle, home):
    asked = {"num": 1, "lam": 1.0, "steps": 2, "runner": "onnx"}
    tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)
    (path,) = cache_folder().glob("*/guided.onnx")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"guided\.onnx"):
        tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)
    path.write_bytes(whole)
    # Another version's: its description does not have this version's key.
    description = path.parent / "artefact.json"
    facts = json.loads(description.read_text())
    facts["key"]["versions"]["torch"] = "0.0"
    description.write_text(json.dumps(facts))
    with pytest.raises(RunnerError, match="built for something else"):
        tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)


@pytest.mark.parametrize(("runner", "module"), [("onnx", onnx_step), ("openvino", openvino_step)])
def test_what_an_engine_made_of_a_file_is_opened_by_the_next_process(
    bundle, feature, runner, module, home, monkeypatch
):
    """The same numbers, bit for bit, without the seconds of optimising; of another file or another version, made anew."""
    given = [each.numpy() for each in examples(bundle.prior, feature)["measure"]]
    named = dict(zip(INPUTS["measure"], given, strict=True))
    (path,) = cache_folder().glob("*/measure.onnx")
    plain = module.open_graph(path)(named)
    made = []
    real = module.opened_before

    def counted(path, engine, settings, make):
        return real(path, engine, settings, lambda place: (made.append(path), make(place)))

    monkeypatch.setattr(module, "opened_before", counted)
    for _ in range(2):
        for one, other in zip(module.open_again(path)(named), plain, strict=True):
            assert (one == other).all()
    assert made == [path]
    monkeypatch.setattr("tiltscope.engine.runtime.opened.version", lambda name: "0.0")
    module.open_again(path)
    assert made == [path, path]
    description = path.parent / "artefact.json"
    facts = json.loads(description.read_text())
    facts["files"]["measure.onnx"]["sha256"] = "0" * 64
    description.write_text(json.dumps(facts))
    module.open_again(path)
    assert made == [path, path, path]


def test_what_an_engine_made_of_a_file_is_checked_before_it_is_opened(bundle, home):
    asked = {"num": 1, "lam": 1.0, "steps": 2, "runner": "onnx"}
    tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)
    path = next(cache_folder().glob("*/optimised.onnx"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"optimised\.onnx has .* bytes instead of .* remove"):
        tiltscope.sample(bundle.prior, bundle.feature(FEATURES[0]), **asked)


def test_a_float16_export_passes_the_limits_of_float16(tiny_bundle, empty_home, capsys):
    """And is float16: it is off by more than any float32 is."""
    words = ["export", "--bundle", str(tiny_bundle), "--dtype", "float16", "--batch", "1,3", "--quiet", "--json"]
    assert run(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["failure"] is None
    assert facts["key"]["dtype"] == "float16"
    assert len(facts["parity"]) == len(LEVELS) * 2 * 2
    assert 1e-4 < max(row["grad_a"] for row in facts["parity"]) < 4e-2
    onnx = pytest.importorskip("onnx")
    (path,) = cache_folder().glob("*/guided.onnx")
    held = {each.data_type for each in onnx.load(path).graph.initializer if len(each.dims) == 4}
    assert held == {onnx.TensorProto.FLOAT16}


def test_a_bfloat16_export_of_openvino_holds_float32_and_computes_in_bfloat16_or_is_refused(
    tiny_bundle, empty_home, capsys
):
    words = ["export", "--bundle", str(tiny_bundle), "--runner", "openvino", "--dtype", "bfloat16"]
    if run([*words, "--batch", "1,3", "--quiet", "--json"]) == 2:
        assert "asked to compute in bfloat16, it would compute in" in capsys.readouterr().err
        assert not has_bfloat16()
        return
    facts = json.loads(capsys.readouterr().out)
    assert facts["failure"] is None
    assert facts["key"]["dtype"] == "bfloat16"
    onnx = pytest.importorskip("onnx")
    (path,) = (each for each in cache_folder().glob("*/guided.onnx") if (each.parent / "measure.onnx").exists())
    held = {each.data_type for each in onnx.load(path).graph.initializer if len(each.dims) == 4}
    assert held == {onnx.TensorProto.FLOAT}
    worst = max(row["grad_a"] for row in facts["parity"])
    assert worst < 2e-1
    assert worst > 1e-4 or not has_bfloat16()


def test_an_allowed_parity_failure_is_told_and_stamped_in_the_manifest(
    tiny_bundle, home, tmp_path, monkeypatch, capsys, caplog
):
    """Of an engine whose gradient has another sign: refused, and with the flag drawn from, with the refusal in the manifest."""
    real = onnx_step.open_again

    def negated(path):
        engine = real(path)
        return (lambda given: [*engine(given)[:3], -engine(given)[3]]) if path.stem == "guided" else engine

    monkeypatch.setattr("tiltscope.export.onnx.onnx_exporter._open_again", negated)
    # Which module it is takes a trace of its own (test_locate.py).
    monkeypatch.setattr("tiltscope.export.onnx.OnnxExporter.locate", lambda *given: "the error enters in this test")
    words = ["sample", FEATURES[0], "--lam", "1", "--num", "1", "--steps", "2", "--runner", "onnx", "--quiet"]
    words += ["--bundle", str(tiny_bundle), "--out", str(tmp_path / "out")]
    assert run(words) != 0
    assert "grad_a" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run([*words, "--allow-parity-failure"]) == 0
    assert "parity failure allowed: runner onnx" in caplog.text
    parity = json.loads((tmp_path / "out" / "manifest.json").read_text())["parity"]
    assert parity["errors"]["turn"] == pytest.approx(2)
    assert "grad_a" in parity["failure"]
    assert "the error enters in this test" in parity["failure"]


def test_the_whole_gate_passes_level_by_level(bundle, feature, folder):
    step = ExportedStep("onnx", bundle.prior.network, GraphFiles(folder, onnx_step.open_graph))
    rows = measure(step, bundle.prior, feature, dtype=torch.float32, batches=(1, 5))
    assert {(row.sigma, row.batch, row.readout) for row in rows} == {
        (sigma, batch, readout) for sigma in LEVELS for batch in (1, 5) for readout in (0, 1)
    }
    check(rows, torch.float32, "onnx")
    assert max(row.grad_a for row in rows) < WITHIN


def test_export_on_the_command_line(tiny_bundle, home, capsys):
    asked = ["export", "--bundle", str(tiny_bundle), "--batch", "1,2", "--quiet"]
    assert run(asked) == 0
    told = capsys.readouterr().out
    assert "1 - cosine" in told
    assert "onnx serves every feature of blocks.1" in told
    assert run([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["parity"]) == len(LEVELS) * 2 * 2
    # Another version's artefact is listed, and pruned.
    (folder,) = (path.parent for path in cache_folder().glob("*/guided.onnx"))
    kept = {each.name for each in cache_folder().glob("[!.]*")}
    assert len(kept) == 1 + len(INPUTS)  # and what ONNX Runtime made of every graph: all were held
    other = shutil.copytree(folder, folder.parent / ("f" * 64))
    description = json.loads((other / "artefact.json").read_text())
    description["key"]["versions"]["tiltscope"] = "0.0"
    (other / "artefact.json").write_text(json.dumps(description))
    assert run(["export", "--list", "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["artefacts"]) == len(kept) + 1
    assert run(["export", "--prune", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert f"{len(kept)} artefacts, " in told
    assert "1 removed" in told
    assert "onnxruntime guided" in told
    assert {each.name for each in cache_folder().glob("[!.]*")} == kept


def test_an_embedding_without_torch_draws_the_same_picture(tiny_bundle, home, tmp_path):
    """numpy, onnxruntime, the plan and the generator: the activation within 1e-4, in a process where torch cannot be imported."""
    example = Path(__file__).parents[2] / "examples/embed_without_torch.py"
    packed = tmp_path / "packed"
    words = ["pack", FEATURES[0], str(packed), "--bundle", str(tiny_bundle), "--steps", "12", "--lam", "3"]
    subprocess.run([sys.executable, str(example), *words], check=True)
    blocked = (
        "import runpy, sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'scipy', 'safetensors'): sys.modules[name] = None\n"
        f"sys.argv = ['embed', 'run', {str(packed)!r}]\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')\n"
    )
    told = subprocess.run([sys.executable, "-c", blocked], check=True, capture_output=True, text=True).stdout
    found, expected, away = (float(each) for each in re.findall(r"-?\d+\.\d+(?:e-\d+)?", told))
    assert abs(found - expected) < 1e-4
    assert away < 1e-3
    assert len(list(packed.glob("*.onnx"))) == 5
