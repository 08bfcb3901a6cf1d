"""A step's graphs, traced, and the guided one in ONNX Runtime and OpenVINO, against eager autograd; and what must be caught.

Of the smallest networks that have every part (a residual U-Net; a DINOv3 ViT with registers, attention and its own patches), so
that it is a matter of seconds: a whole bundle is in test_exported_bundle.py, every architecture in test_architectures.py.
"""

import sys
from dataclasses import fields, replace

import pytest
import torch
from tiny_models import write_unet, write_vit
from torch import nn

import tiltscope
from tiltscope.engine.cli.main import run
from tiltscope.engine.errors import ExportError, ParityError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.feature.sae import SparseAutoencoder
from tiltscope.engine.feature.trunk import load_trunk
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime import onnx_step, openvino_step
from tiltscope.engine.runtime.exported import INPUTS, OUTPUTS, ExportedStep, GraphFiles
from tiltscope.engine.runtime.gate import LEVELS, check_errors, graph_errors, record_self_test
from tiltscope.engine.runtime.held import GRAPHS
from tiltscope.engine.runtime.parity import check, measure
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.export.graphs import examples
from tiltscope.export.onnx import write_onnx
from tiltscope.export.trace import StepNetworks, trace

SHAPE, HOOK = (3, 16, 16), "blocks.0"
# Of an output's largest value. float32 through a few dozen layers and back; a wrong graph is off by 1e-2 and more.
WITHIN = 1e-5


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_prior(folder, **changes):
    from diffusers import DDPMScheduler

    one_level = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    write_unet(folder, scheduler, **one_level, out_channels=3, resnet_time_scale_shift="default", **changes)
    denoiser = load_denoiser(folder, kind="diffusers_unet2d", shape=SHAPE)
    return Prior.from_network(denoiser, shape=SHAPE, name="small", identity="sha256:0")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return small_prior(tmp_path_factory.mktemp("prior"), add_attention=False)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Three of one hook, each read by a pooling of its own."""
    folder = tmp_path_factory.mktemp("trunk")
    write_vit(folder, image_size=16, patch_size=8, num_hidden_layers=1)
    trunk = load_trunk(folder, HOOK, image_size=SHAPE[1:])
    sae = SparseAutoencoder(
        numbers(3, trunk.width) / trunk.width**0.5, 0.1 * numbers(3, seed=1), 0.1 * numbers(3, seed=2).abs()
    )
    poolings = ("centre", "max", "lse")
    return [
        Feature.from_readout(trunk, sae.readout(slice(k, k + 1), trunk, pooling=poolings[k]), name=f"latent {k}")
        for k in range(3)
    ]


@pytest.fixture(scope="module")
def feature(features):
    return features[0]


@pytest.fixture(scope="module")
def recorded(prior, feature):
    reference = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
    return record_self_test(reference, prior.shape, feature.readout)


@pytest.fixture(scope="module")
def networks(prior, feature):
    return StepNetworks(prior.network, feature.trunk)


@pytest.fixture(scope="module")
def guided(prior, feature, networks):
    return trace(networks, "guided", examples(prior, feature)["guided"])


@pytest.fixture(scope="module")
def folder(prior, feature, guided, tmp_path_factory):
    """guided.onnx, the one graph that holds both networks and the gradient."""
    folder = tmp_path_factory.mktemp("files")
    write_onnx(guided, "guided", examples(prior, feature)["guided"], folder / "guided.onnx", {"tiltscope.hook": HOOK})
    return folder


@pytest.fixture(scope="module", params=[onnx_step, openvino_step], ids=["onnxruntime", "openvino"])
def step(request, prior, folder):
    """Of which `guided` alone can be called."""
    return ExportedStep("file", prior.network, GraphFiles(folder, request.param.open_graph))


def step_of(prior, **graphs):
    return ExportedStep("traced", prior.network, lambda name, given: list(graphs[name](*given)))


def inputs(num, seed=0):
    sigma = torch.linspace(0.05, 0.995, num, dtype=torch.float64) if num > 1 else torch.tensor([0.6]).double()
    return numbers(num, *SHAPE, seed=seed), sigma, torch.sqrt(1 - sigma**2)


def readouts(features, num):
    """Another feature for each sample, a signed sum for the last: none of them was traced with."""
    total = features[0] * 2.0 - features[2]
    return Readout.stack([features[at % 3].readout for at in range(num - 1)] + [total.readout])


def close(found, expected, terms=0.0):
    """terms: the largest of what a number is the signed sum of; it may be next to nothing beside them."""
    for each, wanted in zip(found, expected, strict=True):
        assert type(wanted) is torch.Tensor  # nothing of a trace leaked into the reference
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(each, wanted, rtol=0, atol=WITHIN * max(float(wanted.abs().max()), terms))


def close_step(found, expected, measure, x0, readout):
    """(..., activation, drive, ...) of a step. measure: of the reference, which gives the terms of its signed sums."""
    signless = measure(x0, replace(readout, weight=readout.weight.abs()))
    for one, other in zip(found, expected, strict=True):
        close([one], [other], 0.0 if one.ndim > 1 else max(float(each.abs().max()) for each in signless))


@pytest.mark.parametrize("num", [1, 3, 8])
def test_the_file_is_eager_autograd_at_other_batches_levels_and_readouts(step, prior, features, num):
    x, sigma, alpha = inputs(num, seed=num)
    readout, eager = readouts(features, num), TorchStep(prior, features[0])
    expected = eager.guided(x, sigma, alpha, readout)
    close_step(step.guided(x, sigma, alpha, readout), expected, eager.measure, expected.x0_hat, readout)


def test_every_traced_graph_is_eager_autograd_and_passes_its_self_test(prior, features, networks, guided, recorded):
    given = examples(prior, features[0])
    graphs = {name: guided if name == "guided" else trace(networks, name, given[name]) for name in GRAPHS}
    step, eager = step_of(prior, **graphs), TorchStep(prior, features[0])
    for name in GRAPHS:
        check_errors(graph_errors(step, name, recorded, torch.float32), torch.float32, "traced", name)
    for num in (1, 3, 8):
        x, sigma, alpha = inputs(num, seed=num)
        readout = readouts(features, num)
        expected = eager.guided(x, sigma, alpha, readout)
        close_step(step.guided(x, sigma, alpha, readout), expected, eager.measure, expected.x0_hat, readout)
        close([step.unguided(x, sigma, alpha)], [eager.unguided(x, sigma, alpha)])
        close_step(step.measure(x, readout), eager.measure(x, readout), eager.measure, x, readout)
        close_step(step.gradient(x, readout), eager.gradient(x, readout), eager.measure, x, readout)
        (mean, pull), (expected_mean, expected_pull) = (each.linearise(x, sigma) for each in (step, eager))
        close([mean, pull(x.flip(0))], [expected_mean, expected_pull(x.flip(0))])


def test_batch_mates_change_no_bit(step, feature):
    """In one batch shape, as the engine runs it."""
    x, sigma, alpha = inputs(4)
    other = x.clone()
    other[[0, 2, 3]] = numbers(3, *SHAPE, seed=7)
    readout = feature.readout.expand(4)
    for one, two in zip(step.guided(x, sigma, alpha, readout), step.guided(other, sigma, alpha, readout), strict=True):
        assert torch.equal(one[1], two[1])


def test_the_file_names_its_inputs_takes_any_batch_and_holds_no_operator_that_engines_refuse(folder):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "guided.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.name for each in model.graph.input] == list(INPUTS["guided"])
    assert [each.name for each in model.graph.output] == list(OUTPUTS["guided"])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert {each.key: each.value for each in model.metadata_props}["tiltscope.hook"] == HOOK
    assert not {node.op_type for node in model.graph.node} & {"ConvTranspose", "ScatterND", "ScatterElements", "Resize"}


def test_the_whole_gate_passes_level_by_level(step, prior, feature):
    rows = measure(step, prior, feature, dtype=torch.float32, batches=(1, 5))
    assert {(row.sigma, row.batch, row.readout) for row in rows} == {
        (sigma, batch, readout) for sigma in LEVELS for batch in (1, 5) for readout in (0, 1)
    }
    check(rows, torch.float32, "file")
    assert max(row.grad_a for row in rows) < WITHIN


# What must be caught.


class Cached(nn.Module):
    """A network that keeps a tensor of its first input: transformers' patch coordinates do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.time_proj, self.kept = inner, inner.time_proj, None

    def forward(self, x, t, return_dict=False):
        self.inner.time_proj = self.time_proj
        if self.kept is None:
            self.kept = torch.zeros(1, *x.shape[1:])
        return (self.inner(x + self.kept, t, return_dict=False)[0],)


def test_a_constant_of_the_example_is_refused(prior, feature):
    networks = StepNetworks(prior.network, feature.trunk)
    networks.network = Cached(networks.network)
    networks.network.kept = torch.zeros(1, *SHAPE)  # made before the trace, so it is nobody's weight
    with pytest.raises(ExportError, match="constants were taken from the example"):
        trace(networks, "unguided", examples(prior, feature)["unguided"])


def test_attention_traced_as_a_fused_kernel_is_refused(feature, tmp_path, monkeypatch):
    """A U-Net's, left to torch, neither in plain operators nor told to be: its backward does not decompose."""
    from contextlib import nullcontext

    import tiltscope.export.trace as module

    monkeypatch.setattr(module, "sdpa_kernel", lambda backend: nullcontext())
    monkeypatch.setattr(module, "plain_functions", nullcontext)
    prior = small_prior(tmp_path, add_attention=True)
    with pytest.raises(ExportError, match=r"flash_attention.*backward.* has no decomposition"):
        trace(StepNetworks(prior.network, feature.trunk), "pullback", examples(prior, feature)["pullback"])


def test_a_swapped_axis_in_a_decomposition_fails_the_gate(prior, feature, networks, recorded, monkeypatch):
    from tiltscope.export import decompositions

    right = decompositions._patch_gradient
    monkeypatch.setattr(decompositions, "_patch_gradient", lambda *given: right(*given).transpose(2, 3))
    wrong = step_of(prior, gradient=trace(networks, "gradient", examples(prior, feature)["gradient"]))
    errors = graph_errors(wrong, "gradient", recorded, torch.float32)
    assert errors["drive"] < WITHIN  # forward all is right
    with pytest.raises(ParityError, match=r"graph gradient: relative error of grad_a"):
        check_errors(errors, torch.float32, "wrong", "gradient")


def test_the_whole_gate_names_the_place_where_a_step_is_wrong(prior, feature):
    class Wrong(TorchStep):
        """Right but for the gradient of large batches at high noise."""

        def guided(self, x, sigma, alpha, readout):
            out = super().guided(x, sigma, alpha, readout)
            wrong = len(x) > 2 and float(sigma[0]) > 0.9
            return out._replace(grad_a=out.grad_a.flip(-1)) if wrong else out

    rows = measure(Wrong(prior, feature), prior, feature, dtype=torch.float32, batches=(1, 3))
    with pytest.raises(ParityError, match=r"grad_a is off .* batch 3 .*use --runner torch"):
        check(rows, torch.float32, "wrong")


def test_another_provider_than_the_one_asked_for_is_an_error(folder, monkeypatch):
    import tiltscope.engine.runtime.onnx_step as module

    monkeypatch.setattr(module, "PROVIDER", "CUDAExecutionProvider")
    with pytest.raises(RunnerError, match="asked for CUDAExecutionProvider, got CPUExecutionProvider"):
        module.open_graph(folder / "guided.onnx")


def test_readouts_are_inputs_in_the_order_of_the_record():
    assert INPUTS["guided"][-6:] == tuple(f"readout_{each.name}" for each in fields(Readout))


# As a user meets it.


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("runner", "dtype", "why"),
    [
        ("onnx", "bfloat16", "ONNX Runtime has no bfloat16 convolution for a CPU"),
        ("openvino", "float16", "on a CPU it computes in float32 or bfloat16"),
        ("tensorrt_rtx", "float64", "no TensorRT convolves in float64"),
    ],
)
def test_a_dtype_that_export_refuses_has_its_reason(runner, dtype, why, tiny_bundle, empty_home, capsys):
    assert run(["export", "--bundle", str(tiny_bundle), "--runner", runner, "--dtype", dtype, "--quiet"]) == 2
    told = capsys.readouterr().err
    assert f"got dtype {dtype}, allowed here: float" in told
    assert why in told
    assert not list(empty_home.rglob("*.onnx"))


def test_what_cannot_be_exported_says_so(tiny_bundle, empty_home):
    bundle = tiltscope.load(str(tiny_bundle))
    with pytest.raises(RunnerError, match="got dtype float64, allowed here: float32, float16"):
        tiltscope.sample(
            bundle.prior, bundle.feature("blocks.1:sae:3"), num=1, lam=1.0, steps=2, runner="onnx", dtype="float64"
        )


def test_a_missing_extra_is_named_and_exits_with_2(tiny_bundle, empty_home, tmp_path, monkeypatch, capsys):
    for name in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["sample", "blocks.1:sae:3", "--lam", "1", "--num", "1", "--steps", "2", "--runner", "onnx"]
    assert run([*words, "--bundle", str(tiny_bundle), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "pip install 'tiltscope[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runner", "torch"), "torch is the reference"),
        (("--runner", "magic"), "runner: got 'magic'"),
        (("--batch", "0"), "batch: got [0], allowed are whole numbers from 1"),
        (("--dtype", "int8"), "dtype: got 'int8'"),
        (("--hook", "blocks.99"), "hook"),
    ],
)
def test_what_export_refuses(words, message, tiny_bundle, empty_home, capsys):
    assert run(["export", "--bundle", str(tiny_bundle), "--quiet", *words]) == 2
    assert message in capsys.readouterr().err
