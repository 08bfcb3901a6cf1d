"""dtype bfloat16: the networks alone are narrowed, where the processor has it; state, readout and update stay float32."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.batch_invariant import gelu, silu
from tiltscope.engine.bench.line import asked_by
from tiltscope.engine.cli.main import run
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import ConfigError, RunnerError
from tiltscope.engine.prepare import device_and_kernels, prepare
from tiltscope.engine.runtime import cpu, openvino_step
from tiltscope.engine.runtime.gate import record_self_test, relative_errors
from tiltscope.engine.runtime.memory import row_mib
from tiltscope.engine.runtime.parity import measure
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.tilt.worlds import GaussianWorld
from tiltscope.export.onnx import openvino_exporter

ADDRESS = "blocks.1:sae:3"
SETTINGS = {"num": 4, "lam": 2.0, "steps": 4, "batch_size": 4}


@pytest.fixture
def native(monkeypatch):
    """A processor that has it, wherever this runs."""
    monkeypatch.setattr(cpu, "processor_flags", lambda: ["avx2", "avx512_bf16"])


def test_pictures_are_near_those_of_float32_and_not_the_same(tiny_bundle, native):
    bundle = tiltscope.load(str(tiny_bundle))
    wide = tiltscope.sample(bundle.prior, bundle.feature(ADDRESS), **SETTINGS)
    narrow = tiltscope.sample(bundle.prior, bundle.feature(ADDRESS), **SETTINGS, dtype="bfloat16")
    assert narrow.x0.dtype == narrow.activation.dtype == torch.float32
    apart = (narrow.x0 - wide.x0).square().mean().sqrt()
    assert 1e-4 < apart < 5e-2 * wide.x0.square().mean().sqrt()
    assert narrow.ok.all()
    assert narrow.manifest["config"]["dtype"] == "bfloat16"
    assert narrow.manifest["identity"] != wide.manifest["identity"]


def test_networks_are_narrow_and_state_readout_and_natural_activations_are_not(tiny_bundle, native):
    bundle = tiltscope.load(str(tiny_bundle))
    ready = prepare(bundle.prior, bundle.feature(ADDRESS), SampleConfig(**SETTINGS, dtype="bfloat16"))
    step = ready.programme.step
    assert (step.prior.network.dtype, step.feature.trunk.dtype) == (torch.bfloat16, torch.bfloat16)
    assert ready.programme.dtype == ready.feature.trunk.dtype == ready.feature.readout.direction.dtype == torch.float32
    x = torch.randn(2, *bundle.prior.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.1], dtype=torch.float64)
    out = step.guided(x, sigma, (1 - sigma**2).sqrt(), ready.feature.readout.expand(2))
    assert {each.dtype for each in out} == {torch.float32}


def test_the_batcher_draws_what_sample_draws(tiny_bundle, native):
    bundle = tiltscope.load(str(tiny_bundle))
    with tiltscope.Engine(bundle, max_batch=4, dtype="bfloat16") as engine:
        got = engine.submit(ADDRESS, num=4, lam=2.0, steps=4).result(timeout=120)
    alone = tiltscope.sample(bundle.prior, bundle.feature(ADDRESS), **SETTINGS, dtype="bfloat16")
    assert torch.equal(got.x0, alone.x0)


def test_a_pictures_bits_do_not_depend_on_its_place_or_its_batch_mates(tiny_bundle, native):
    bundle = tiltscope.load(str(tiny_bundle))
    ready = prepare(bundle.prior, bundle.feature(ADDRESS), SampleConfig(**SETTINGS, dtype="bfloat16"))
    here, there, others = (ready.draw_bucket(np.array(each)).x0 for each in ([0, 1, 2, 3], [2, 0, 3, 1], [7, 1, 8, 9]))
    assert torch.equal(here[[2, 0, 3, 1]], there)
    assert torch.equal(here[1], others[1])


def test_an_engine_that_could_draw_nothing_is_refused_when_it_is_made(tiny_bundle, monkeypatch):
    monkeypatch.setattr(cpu, "processor_flags", list)
    with pytest.raises(ConfigError, match="got bfloat16"):
        tiltscope.Engine(tiltscope.load(str(tiny_bundle)), dtype="bfloat16")


def test_networks_on_a_gpu_of_their_own_do_not_ask_the_processor(monkeypatch):
    monkeypatch.setattr(cpu, "processor_flags", list)
    device_and_kernels(SampleConfig(lam=1.0, dtype="bfloat16", runner="tensorrt_rtx"))
    with pytest.raises(ConfigError, match="got bfloat16"):
        device_and_kernels(SampleConfig(lam=1.0, dtype="bfloat16", runner="openvino"))


def test_openvino_that_computes_in_something_else_is_refused():
    model = SimpleNamespace(get_property=lambda name: "<Type: 'float32'>")
    with pytest.raises(RunnerError, match="asked to compute in bfloat16, it would compute in <Type: 'float32'>"):
        openvino_step._run(model, "bf16")
    assert openvino_step._run(model, "f32")


def test_the_gate_gives_narrow_networks_what_a_run_gives_them():
    world, given = GaussianWorld(s=1.3, shape=(2,)), []

    class Watched(TorchStep):
        def guided(self, x, sigma, alpha, readout):
            given.append(x.dtype)
            return super().guided(x, sigma, alpha, readout)

    step = Watched(world.prior, world.feature)
    test = record_self_test(TorchStep(world.prior, world.feature), (2,), world.feature.readout)
    relative_errors(step, test, torch.bfloat16)
    measure(step, world.prior, world.feature, dtype=torch.bfloat16, batches=(1,), levels=(0.5,))
    assert given == [torch.float32] * 2


def test_memory_of_narrow_networks_counts_a_wide_state(tiny_bundle):
    bundle = tiltscope.load(str(tiny_bundle))
    narrow, wide = (
        row_mib(bundle.prior, bundle.feature(ADDRESS), dtype, batch=4) for dtype in (torch.bfloat16, torch.float32)
    )
    assert 0.5 * wide < narrow < wide


@pytest.mark.parametrize("activate", [silu, gelu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits_are_rounded_once(activate, dtype):
    x = torch.linspace(-8, 4, 2001).to(dtype)
    exact = activate(x.double())
    torch.testing.assert_close(activate(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["avx2", "avx512f"]])
def test_a_processor_without_it_is_refused_with_what_to_give(tiny_bundle, monkeypatch, flags):
    monkeypatch.setattr(cpu, "processor_flags", lambda: flags)
    bundle = tiltscope.load(str(tiny_bundle))
    with pytest.raises(
        ConfigError, match=r"no instructions that are known \(one of avx512_bf16, amx_bf16, bf16\).*give dtype float32"
    ):
        tiltscope.sample(bundle.prior, bundle.feature(ADDRESS), **SETTINGS, dtype="bfloat16")


@pytest.mark.parametrize("flag", cpu.BFLOAT16)
def test_each_kind_of_it_is_enough(monkeypatch, flag):
    monkeypatch.setattr(cpu, "processor_flags", lambda: ["avx2", flag])
    cpu.require_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(("flags", "there"), [([], False), (["amx_bf16"], True)])
def test_doctor_tells_of_it_where_it_is(monkeypatch, capsys, flags, there):
    monkeypatch.setattr(cpu, "processor_flags", lambda: flags)
    run(["doctor", "--json", "--quiet"])
    assert ("bfloat16" in json.loads(capsys.readouterr().out)["dtypes"]) == there


def test_functions_of_ones_own_are_refused(native):
    world = GaussianWorld(s=1.3, shape=(2,))
    with pytest.raises(ConfigError, match="got bfloat16 with a prior or a feature that is a Python function"):
        tiltscope.sample(world.prior, world.feature, num=1, lam=0.5, steps=2, dtype="bfloat16")


def test_triton_takes_it_and_not_float64():
    assert SampleConfig(kernels="triton", dtype="bfloat16", lam=1.0).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="got dtype float64, allowed are float32 and bfloat16"):
        SampleConfig(kernels="triton", dtype="float64", lam=1.0)


def test_openvino_reads_float32_files_and_is_told_what_to_compute_in():
    for dtype, precision in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        assert openvino_exporter.file_dtype(dtype) == torch.float32
        for again in (False, True):
            assert openvino_exporter.opener(dtype, again=again).keywords == {"precision": precision}


def test_a_way_of_bench_names_a_runner_and_a_dtype():
    assert asked_by("onnx") == {"runner": "onnx", "dtype": "float32"}
    assert asked_by("openvino:bfloat16") == {"runner": "openvino", "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="got onnx:int8, allowed behind the colon are float32, bfloat16"):
        asked_by("onnx:int8")
