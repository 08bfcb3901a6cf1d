"""Memory is foreseen by counting what is alive, and a gradient in chunks is the gradient."""

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime import memory
from tiltscope.engine.runtime.memory import ChunkedStep, LiveBytes, plan_memory, row_mib
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.tilt.worlds import GaussianWorld

ADDRESS = "blocks.1:sae:3"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch, tmp_path):
    """Neither to this process nor on disk."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(memory, "_seen", type(memory._seen)())


def inputs(prior, batch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *prior.shape, generator=generator, dtype=dtype)
    sigma = torch.linspace(0.2, 0.95, batch, dtype=torch.float64)
    return x, sigma, (1 - sigma * sigma).sqrt()


def test_what_is_alive_at_once_is_counted_and_what_was_freed_is_not():
    kib = torch.empty(256)  # 1 KiB
    with LiveBytes() as live:
        a = kib + 1
        b = a * 2
        del a
        c = b.view(16, 16) + b.view(16, 16)  # views are nobody's own
        c += 1  # in place
    assert live.now == 2 * 1024  # b, c
    assert live.peak == 2 * 1024


def test_what_autograd_keeps_counts():
    x = torch.empty(256, requires_grad=True)
    with LiveBytes() as live:
        y = (x.exp().exp().exp()).sum()
    assert live.now == 3 * 1024 + 4
    del y


def test_foreseen_memory_grows_with_the_batch_and_with_the_dtype(bundle):
    feature = bundle.feature(ADDRESS)
    one, two, four = (row_mib(bundle.prior, feature, torch.float32, batch=batch) for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)  # a straight line
    assert one / 2 < two - one <= one
    assert row_mib(bundle.prior, feature, torch.float64, batch=2) == pytest.approx(2 * two, rel=0.05)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunked_gradient_is_the_gradient(bundle, chunk, dtype):
    prior, feature = bundle.prior.to(dtype), bundle.feature(ADDRESS).to(dtype)
    whole = TorchStep(prior, feature)
    chunked = ChunkedStep(whole, chunk)
    x, sigma, alpha = inputs(prior, 5, dtype)
    readout, v = (
        feature.readout.expand(5),
        torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=dtype),
    )

    def every(step):
        x0_hat, pullback = step.linearise(x, sigma)
        return *step.guided(x, sigma, alpha, readout), x0_hat, pullback(v), *step.gradient(x, readout)

    # In float32 a single sample's small convolutions go through another kernel (5e-6 on emoji64), and a thresholded activation
    # near 0 is a difference of numbers that are not.
    allowed, floor = (1e-6, 0.0) if dtype == torch.float64 else (1e-5 if chunk == 1 else 1e-6, 1.0)
    for got, wanted in zip(every(chunked), every(whole), strict=True):
        assert float((got - wanted).norm()) <= allowed * max(float(wanted.norm()), floor if wanted.ndim == 1 else 0.0)


def test_a_chunk_takes_the_memory_of_its_own_size(bundle):
    plan = plan_memory(bundle.prior, bundle.feature(ADDRESS), torch.float32, bucket=8, chunk=2, available=None)
    assert plan.chunk == 2
    assert plan.row_mib == row_mib(bundle.prior, bundle.feature(ADDRESS), torch.float32, batch=2)


def test_a_bucket_that_does_not_fit_is_refused_with_numbers_and_what_does(bundle):
    feature = bundle.feature(ADDRESS)
    eight, two = (row_mib(bundle.prior, feature, torch.float32, batch=batch) for batch in (8, 2))
    free = two / memory.SHARE + 1e-3
    with pytest.raises(RunnerError, match=rf"8 samples takes about {eight:.0f} MiB.*vjp_chunk 2, or batch_size 2"):
        plan_memory(bundle.prior, feature, torch.float32, bucket=8, chunk=None, available=free)
    assert plan_memory(bundle.prior, feature, torch.float32, bucket=8, chunk=2, available=free).bucket == 8
    with pytest.raises(RunnerError, match="not even one sample fits"):
        plan_memory(bundle.prior, feature, torch.float32, bucket=8, chunk=None, available=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_question_is_answered_once(bundle, monkeypatch, processes):
    """For every feature of a hook; another batch, type or number of rows is another question. The next process knows."""
    asked = []
    real = memory._alive_mib
    monkeypatch.setattr(memory, "_alive_mib", lambda *given, **more: asked.append(more) or real(*given, **more))
    prior, feature = bundle.prior, bundle.feature(ADDRESS)
    first = row_mib(prior, feature, torch.float32, batch=2)
    if processes == 2:
        monkeypatch.setattr(memory, "_seen", type(memory._seen)())
    assert row_mib(prior, bundle.feature("blocks.1:sae:4"), torch.float32, batch=2) == first
    assert len(asked) == 1
    assert row_mib(prior, feature, torch.float32, batch=3) > first
    assert row_mib(prior, feature, torch.float64, batch=2) > first
    assert row_mib(prior, feature + bundle.feature("blocks.1:sae:4"), torch.float32, batch=2) >= first
    assert len(asked) == 4


@pytest.mark.parametrize("change", ["a wider tensor", "a module's number", "what is counted"])
def test_what_is_kept_is_not_taken_for_other_networks(bundle, monkeypatch, change):
    prior, feature = bundle.prior, bundle.feature(ADDRESS)
    first = row_mib(prior, feature, torch.float32, batch=1)
    monkeypatch.setattr(memory, "_seen", type(memory._seen)())
    monkeypatch.setattr(memory, "_alive_mib", lambda *given, **more: 7.0)
    assert row_mib(prior, feature, torch.float32, batch=1) == first
    monkeypatch.setattr(memory, "_seen", type(memory._seen)())
    if change == "a wider tensor":
        monkeypatch.setattr(prior.network.network, "_buffers", {"extra": torch.zeros(3)})
    elif change == "a module's number":
        monkeypatch.setattr(feature.trunk, "some_heads", 3, raising=False)
    else:
        monkeypatch.setattr(memory, "_FORM", 0)
    assert row_mib(prior, feature, torch.float32, batch=1) == memory.WORKSPACE * 7.0


def test_python_functions_cannot_be_foreseen():
    world = GaussianWorld(s=1.3, shape=(3, 4, 4))
    prior = tiltscope.Prior(lambda x, sigma: x, shape=world.shape, name="identity")
    with pytest.raises(RunnerError, match="Python function"):
        row_mib(prior, world.feature, torch.float32, batch=1)


def test_a_request_refuses_instead_of_dying_and_a_chunk_is_another_run(bundle, monkeypatch):
    feature, settings = bundle.feature(ADDRESS), {"num": 4, "lam": 2.0, "steps": 3}
    whole = tiltscope.sample(bundle.prior, feature, **settings)
    chunked = tiltscope.sample(bundle.prior, feature, vjp_chunk=1, **settings)
    assert (whole.x0 - chunked.x0).square().mean().sqrt() < 1e-3
    assert whole.manifest["memory"]["chunk"] == 4
    assert chunked.manifest["memory"]["chunk"] == 1
    assert chunked.manifest["memory"]["row_mib"] < whole.manifest["memory"]["row_mib"]
    assert chunked.manifest["identity"] != whole.manifest["identity"]
    monkeypatch.setattr("tiltscope.engine.prepare.available_mib", lambda: 0.5)
    with pytest.raises(RunnerError, match="MiB are free here"):
        tiltscope.sample(bundle.prior, feature, **settings)
    assert tiltscope.sample(bundle.prior, feature, **(settings | {"lam": 0.0})).ok.all()  # takes no gradient
