"""TensorRT and TensorRT-RTX: what is missing is said, engines build for GPUs that are not here, and the runner's calls."""

import ctypes
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import tiltscope
from tiltscope.engine.cli.main import run
from tiltscope.engine.errors import ExportError, RunnerError
from tiltscope.engine.runtime.exported import INPUTS, ExportedStep
from tiltscope.engine.runtime.parity import check, measure
from tiltscope.engine.runtime.runners import step_for
from tiltscope.engine.runtime.tensorrt_step import BUCKETS, EngineFiles, profile_of
from tiltscope.export.graphs import examples
from tiltscope.export.onnx import write_onnx
from tiltscope.export.tensorrt import TARGETS, build_engine
from tiltscope.export.trace import StepNetworks, trace

ADDRESS = "blocks.1:sae:3"
needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT-RTX (no GPU): pip install 'tiltscope[tensorrt-rtx]'; without it only the runner's calls are shown",
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


@pytest.mark.parametrize("runner", ["tensorrt", "tensorrt_rtx"])
def test_a_missing_module_exits_with_2_and_names_its_extra(runner, tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, runner, None)
    for command in (["explain", ADDRESS, "--out", str(tmp_path / "out"), "--num", "1"], ["export"]):
        assert run([*command, "--runner", runner, "--bundle", str(tiny_bundle), "--quiet"]) == 2
        assert f"pip install 'tiltscope[{runner.replace('_', '-')}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_gpu_exits_with_2_before_anything_is_built(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    words = ["explain", ADDRESS, "--out", str(tmp_path / "out"), "--num", "1", "--bundle", str(tiny_bundle), "--quiet"]
    assert run([*words, "--runner", "tensorrt_rtx"]) == 2
    told = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in told
    assert "tiltscope export --runner tensorrt_rtx" in told
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("*.engine"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_what_was_built_ahead_is_found_again(tiny_bundle, tmp_path, monkeypatch, capsys):
    """With a builder that has nothing to do: the command ends well, says what it could not prove, and builds once."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    asked = []
    monkeypatch.setattr("tiltscope.export.tensorrt.traced_graphs", lambda *given: asked.append(given) or iter(()))
    for _ in range(2):
        assert run(["export", "--runner", "tensorrt_rtx", "--bundle", str(tiny_bundle), "--quiet", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert "needs an NVIDIA GPU" in facts["failure"]
        assert facts["parity"] is None
        assert facts["key"]["targets"] == list(TARGETS)
    assert len(asked) == 1


# The runner's calls, with an engine that stands in for the device: it reads and writes at the addresses that it was given.


class Context:
    """y = 2 x, where x and y are whatever memory it was told of; refuses what its profile does not hold."""

    def __init__(self, log):
        self.log, self.shapes, self.addresses, self.profile = log, {}, {}, None

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        return True

    def set_input_shape(self, name, shape):
        least = BUCKETS[self.profile - 1] + 1 if self.profile else 1
        self.shapes[name] = shape
        return least <= shape[0] <= BUCKETS[self.profile]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return self.shapes["x"]

    def execute_async_v3(self, stream):
        num = torch.Size(self.shapes["x"]).numel()
        given = (ctypes.c_float * num).from_address(self.addresses["x"])
        found = (ctypes.c_float * num).from_address(self.addresses["x0_hat"])
        for at in range(num):
            found[at] = 2 * given[at]
        self.log.append((self.profile, self.shapes["x"][0], stream))
        return True


@pytest.fixture
def device(monkeypatch, tmp_path):
    """(a runner of engines without a driver, what was executed)."""
    log = []
    module = SimpleNamespace(
        Logger=type("Logger", (), {"WARNING": 0, "__init__": lambda self, level: None}),
        Runtime=lambda log_: SimpleNamespace(
            deserialize_cuda_engine=lambda data: (
                SimpleNamespace(create_execution_context=lambda: Context(log)) if data == b"engine" else None
            )
        ),
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    (tmp_path / "unguided.engine").write_bytes(b"engine")
    (tmp_path / "measure.engine").write_bytes(b"of another version")
    return EngineFiles(tmp_path, "tensorrt_rtx", lambda tensor: SimpleNamespace(cuda_stream=77), "cpu"), log


def unguided(num):
    return [torch.randn(num, 3, 4, 4), *(torch.ones(num, 8) for _ in INPUTS["unguided"][1:])]


def test_a_call_hands_over_addresses_and_enqueues_on_the_callers_stream_in_its_profile(device):
    files, log = device
    for num in (1, 2, 3, 8, 64, 3):
        inputs = unguided(num)
        inputs[0] = inputs[0].transpose(2, 3)  # not contiguous: the engine must not see it as it lies
        (found,) = files("unguided", inputs)
        assert torch.equal(found, 2 * inputs[0])
    assert log == [(0, 1, 77), (1, 2, 77), (2, 3, 77), (3, 8, 77), (6, 64, 77), (2, 3, 77)]


def test_what_lies_in_another_memory_is_brought_to_the_device_and_its_answer_back(device):
    """As the self-test's stored inputs must be; here from a memory that holds no numbers, so that the way alone is seen."""
    files, log = device
    brought = []
    files._there = lambda tensor: brought.append(tensor.device.type) or torch.ones_like(tensor, device="cpu")
    (found,) = files("unguided", [each.to("meta") for each in unguided(2)])
    assert set(brought) == {"meta"}
    assert len(log) == 1
    assert found.device.type == "meta"
    assert found.shape == (2, 3, 4, 4)


def test_a_batch_above_the_profile_is_refused_with_what_is_allowed(device, bundle):
    files, log = device
    with pytest.raises(RunnerError, match="batch of 65, the engine's profiles end at 64; give --batch-size 64"):
        files("unguided", unguided(65))
    step = ExportedStep("tensorrt_rtx", bundle.prior.network, files, torch.float32, max_batch=8)
    with pytest.raises(RunnerError, match=r"got a batch of 9, its files were built for 1 to 8; give --batch-size 8"):
        step.unguided(torch.zeros(9, 3, 64, 64), torch.full((9,), 0.5).double(), torch.full((9,), 0.8).double())
    assert not log
    assert [profile_of(batch) for batch in (1, 2, 3, 4, 5, 64)] == [0, 1, 2, 2, 3, 6]


def test_an_engine_that_the_driver_does_not_load_is_refused(device):
    files, _ = device
    with pytest.raises(RunnerError, match=r"measure\.engine cannot be loaded on this GPU; .*build again"):
        files("measure", [torch.zeros(1, 3, 4, 4)])


# Real builds.


@pytest.mark.slow
@needs_builder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_engines_build_for_four_architectures_without_a_gpu(dtype, bundle, tmp_path):
    """Trunk and gradient, any batch to 8: strongly typed, no warning of a fallback; an engine says its size."""
    feature, prior = bundle.feature(ADDRESS).to(dtype), bundle.prior.to(dtype)
    example = examples(prior, feature)["gradient"]
    graph = trace(StepNetworks(prior.network, feature.trunk), "gradient", example)
    path = tmp_path / "gradient.onnx"
    write_onnx(graph, "gradient", example, path, {}, folded=True)
    engine, told = build_engine("tensorrt_rtx", path, targets=TARGETS, buckets=(1, 8))
    assert len(engine) == told["bytes"] > 1000
    assert told["layers"] > 100
    assert told["warnings"] == []
    # The four are in it, and cost next to nothing: 32 bytes.
    one, _ = build_engine("tensorrt_rtx", path, targets=("SM89",), buckets=(1, 8))
    assert len(one) < len(engine) < len(one) + 1000


@pytest.mark.slow
@needs_builder
def test_a_layer_that_the_builder_does_not_know_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    make, number = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1)
    taken = onnx.helper.make_node("ConcatFromSequence", ["parts"], ["y"], axis=1)
    graph = onnx.helper.make_graph([node, taken], "g", [make("x", number, ["b", 4])], [make("y", number, ["b", 4])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "sequence.onnx")
    with pytest.raises(ExportError, match=r"cannot read sequence\.onnx: .*SplitToSequence"):
        build_engine("tensorrt_rtx", tmp_path / "sequence.onnx", targets=("SM89",), buckets=(8,))


@pytest.mark.slow
@pytest.mark.gpu(
    "an engine is the reference at three batch sizes", instead="tests/export/test_tensorrt.py: builds and calls"
)
@needs_builder
def test_an_engine_is_the_reference_on_the_device(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    feature = bundle.feature(ADDRESS)
    step = step_for("tensorrt_rtx", bundle.prior, feature, torch.float32).step
    rows = measure(step, bundle.prior, feature, dtype=torch.float32, batches=(1, 3, 8))
    check(rows, torch.float32, "tensorrt_rtx")
