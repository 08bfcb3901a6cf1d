"""torch keeps to one thread in a tick whose networks have threads of their own, and nothing else notices."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.prepare import prepare
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime import threads
from tiltscope.engine.runtime.exported import ExportedStep, GraphFiles
from tiltscope.engine.runtime.gate import record_self_test
from tiltscope.engine.runtime.held import HeldStep
from tiltscope.engine.runtime.memory import ChunkedStep
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.runtime.threads import num_threads, one_thread, release_threads
from tiltscope.engine.tilt.worlds import GaussianWorld


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def seen_by_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_torch_is_on_one_thread_inside_and_an_engine_opened_there_is_not(three_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
        assert num_threads() == 3
        with one_thread():
            assert num_threads() == 3
        assert torch.get_num_threads() == 1
        assert seen_by_a_new_thread() == 3
    assert torch.get_num_threads() == num_threads() == 3


def test_an_error_inside_gives_the_threads_back(three_threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == num_threads() == 3


def test_without_openmp_nothing_changes(three_threads, monkeypatch):
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    with one_thread():
        assert torch.get_num_threads() == num_threads() == 3


@pytest.mark.parametrize(("own", "expected"), [(True, 1), (False, 3)])
def test_a_tick_runs_so_where_the_step_says_its_engine_has_own_threads(three_threads, monkeypatch, own, expected):
    world, inside = GaussianWorld(s=1.3, shape=(2,)), []

    def denoise(x, sigma):
        inside.append(torch.get_num_threads())
        return 0.5 * x

    run = prepare(Prior(denoise, shape=(2,), name="asked"), world.feature, SampleConfig(num=1, lam=0.0, steps=2))
    monkeypatch.setattr(type(run.programme.step), "has_own_threads", own, raising=False)
    inside.clear()  # what prepare() tried
    run.draw_bucket(np.arange(1))
    assert inside == [expected] * 2


@pytest.mark.parametrize("own", [True, False])
def test_a_step_around_another_tells_what_that_tells(own):
    world = GaussianWorld(s=1.3, shape=(2,))
    inner = type("Inner", (TorchStep,), {"has_own_threads": own})(world.prior, world.feature)
    test = record_self_test(inner, (2,), world.feature.readout)
    assert HeldStep(inner, test, torch.float64, lambda graph, errors: None).has_own_threads == own
    assert ChunkedStep(inner, 1).has_own_threads == own


def test_files_have_threads_of_their_own_and_traced_functions_do_not(tiny_bundle):
    network = tiltscope.load(str(tiny_bundle)).prior.network
    assert ExportedStep("onnx", network, GraphFiles(Path("none"), lambda path: None)).has_own_threads
    assert not ExportedStep("compile", network, lambda graph, inputs: []).has_own_threads


@pytest.mark.parametrize(("own", "expected"), [(True, 1), (False, 3)])
def test_finished_pictures_are_measured_so_too(three_threads, monkeypatch, own, expected):
    world, inside = GaussianWorld(s=1.3, shape=(2,)), []
    run = prepare(world.prior, world.feature, SampleConfig(num=1, lam=0.0, steps=2))
    real = type(run.programme.step).measure

    def measure(self, x0, readout):
        inside.append(torch.get_num_threads())
        return real(self, x0, readout)

    monkeypatch.setattr(type(run.programme.step), "measure", measure)
    monkeypatch.setattr(type(run.programme.step), "has_own_threads", own, raising=False)
    run.draw_bucket(np.arange(1))
    assert inside == [expected]


def of_this_process() -> set[str]:
    return {thread.name for thread in Path("/proc/self/task").iterdir()}


def new_since(before: set[str], expected: int = 0) -> int:
    """Threads that were not there before. An ended one leaves /proc a moment later: this waits until they are `expected`."""
    end = time.monotonic() + 5
    while (new := len(of_this_process() - before)) != expected and time.monotonic() < end:
        time.sleep(0.01)
    return new


def multiply() -> None:
    big = torch.ones(1024, 1024)
    assert float((big @ big + big.exp().sin()).sum()) > 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_idle_threads_of_torch_end_and_come_again(three_threads):
    release_threads()
    before = of_this_process()
    multiply()
    assert new_since(before, expected=2) == 2
    release_threads()
    assert new_since(before) == 0
    assert torch.get_num_threads() == 3
    multiply()
    assert new_since(before, expected=2) == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_batcher_leaves_none_in_who_makes_it_or_asks_it(three_threads):
    world = GaussianWorld(s=1.3, shape=(2,))
    release_threads()
    before = of_this_process()
    multiply()
    engine = tiltscope.Engine(world.prior)
    assert new_since(before) == 0
    multiply()
    engine.submit(world.feature, num=1, lam=0.5, steps=2).result(timeout=60)
    engine.close()
    assert new_since(before) == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_nor_does_one_that_goes_on_with_a_checkpoint(three_threads, monkeypatch):
    def read(*args):
        multiply()
        return []

    monkeypatch.setattr("tiltscope.engine.batching.engine.read_checkpoint", read)
    release_threads()
    before = of_this_process()
    tiltscope.Engine.resume(GaussianWorld(s=1.3, shape=(2,)).prior, "a file")
    assert new_since(before) == 0
