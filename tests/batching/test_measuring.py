"""Finished pictures share the call that measures them while batches are full, and wait for nobody where there is room."""

import pytest
import torch

import tiltscope
from tiltscope.engine.batching.checkpoint import read_checkpoint, write_checkpoint
from tiltscope.engine.batching.lane import PATIENCE
from tiltscope.engine.batching.request import Request
from tiltscope.engine.batching.scheduler import Scheduler
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.prepare import prepare
from tiltscope.engine.runtime.step import TorchStep

CAPACITY = 4
OWN = {"batch_size": CAPACITY, "runner": "torch", "dtype": "float32"}


@pytest.fixture
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


@pytest.fixture
def feature(bundle):
    return bundle.feature("blocks.1:sae:3")


def requests(bundle, feature, lengths):
    """One picture each, of so many rows."""
    runs = [
        prepare(bundle.prior, feature, SampleConfig(num=1, lam=0.7, seed=seed, steps=steps, batch_size=CAPACITY))
        for seed, steps in enumerate(lengths)
    ]
    return [Request(run, name=f"request {seed}") for seed, run in enumerate(runs)]


def scheduler_of(waiting):
    scheduler = Scheduler()
    for request in waiting:
        scheduler.add(request)
    return scheduler


def drain(scheduler):
    while scheduler.step():
        pass


@pytest.fixture
def calls(monkeypatch):
    """One entry for every call that measures."""
    seen, real = [], TorchStep.measure

    def counted(self, x0, readout):
        seen.append(len(x0))
        return real(self, x0, readout)

    monkeypatch.setattr(TorchStep, "measure", counted)
    return seen


def test_a_stream_measures_several_pictures_in_a_call_and_each_as_if_alone(bundle, feature, calls):
    lengths = [3 + at % 5 for at in range(24)]
    stream = requests(bundle, feature, lengths)
    calls.clear()  # what prepare() tried
    drain(scheduler_of(stream))
    assert set(calls) == {CAPACITY}
    assert len(calls) <= len(lengths) / 2
    for request in stream[:5]:
        answer = request.ticket.result(timeout=0)
        alone = tiltscope.sample(
            bundle.prior, feature, num=1, lam=0.7, seed=answer.seed, steps=lengths[answer.seed], batch_size=CAPACITY
        )
        assert torch.equal(answer.activation, alone.activation)
        assert torch.equal(answer.drive, alone.drive)


def test_where_batches_have_room_a_picture_is_measured_in_the_tick_that_ends_it(bundle, feature):
    stream = requests(bundle, feature, [2, 9])
    scheduler = scheduler_of(stream)
    scheduler.step()
    assert not stream[0].ended
    scheduler.step()
    assert stream[0].ended
    assert not stream[1].ended


def test_no_picture_waits_for_others_longer_than_patience(bundle, feature):
    stream = requests(bundle, feature, [2, *[40] * (2 * CAPACITY)])
    scheduler, short = scheduler_of(stream), stream[0]
    drawn_at = ended_at = None
    for ticks in range(1, 40):
        scheduler.step()
        if drawn_at is None and all(sample.done for sample in short.live.values()):
            drawn_at = ticks
        if short.ended:
            ended_at = ticks
            break
    assert drawn_at is not None
    assert ended_at is not None
    assert ended_at - drawn_at == PATIENCE


def test_a_checkpoint_keeps_pictures_that_are_drawn_and_not_measured(bundle, feature, tmp_path):
    stream = requests(bundle, feature, [2, *[12] * (2 * CAPACITY)])
    scheduler, short = scheduler_of(stream), stream[0]
    while not all(sample.done for sample in short.live.values()) or not short.live:
        scheduler.step()
    assert not short.ended
    scheduler.settle()
    write_checkpoint(tmp_path / "kept.safetensors", scheduler.requests)
    again = read_checkpoint(tmp_path / "kept.safetensors", bundle.prior, bundle.feature, OWN)
    assert {request.name for request in again} == {request.name for request in stream}
    drain(scheduler)
    drain(scheduler_of(again))
    for request in again:
        before = next(each for each in stream if each.name == request.name).ticket.result(timeout=0)
        after = request.ticket.result(timeout=0)
        assert torch.equal(after.x0, before.x0)
        assert torch.equal(after.activation, before.activation)


def test_a_failing_measurement_is_told_to_who_waits(bundle, feature, monkeypatch):
    stream = requests(bundle, feature, [2, 2])

    def fail(self, x0, readout):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(TorchStep, "measure", fail)
    scheduler = scheduler_of(stream)
    drain(scheduler)
    assert scheduler.idle
    for request in stream:
        with pytest.raises(RuntimeError, match="no memory left"):
            request.ticket.result(timeout=0)
