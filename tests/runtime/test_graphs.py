"""The graph runner: buckets, padding, replay, what is kept, on a CPU stand-in that holds the step to what a graph could do.

On a GPU the same ticks are captured and replayed for real: the tests marked gpu.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import ConfigError, RunnerError
from tiltscope.engine.prepare import prepare
from tiltscope.engine.runtime.graphs import TRIALS, CudaGraphs, GraphRunner, StandInGraphs, enqueue
from tiltscope.engine.sampler.replay import GraphedTicks, StaticSlots
from tiltscope.engine.sampler.state import admit
from tiltscope.engine.sampler.tick import tick
from tiltscope.kernels.implementation import Calls, count_calls

PRIOR = tiltscope.Prior(lambda x, sigma: 0.3 * x + torch.tanh(x), shape=(3, 4, 4), name="small")
SMALL = tiltscope.Feature(lambda x0: (x0 * x0).flatten(1).mean(1), name="small")


def buffers(bucket):
    return {"x": torch.zeros(bucket), "y": torch.zeros(bucket)}


def doubling(held):
    def step(stream):
        held["y"].copy_(held["x"] * 2)
        held["x"].add_(1)

    return step


def runner(buckets=(2, 8, 4), graphs=None, **settings):
    return GraphRunner(graphs or StandInGraphs(), buckets, buffers, **settings)


@pytest.mark.parametrize(("num", "bucket"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_the_smallest_bucket_that_holds_the_slots(num, bucket):
    assert runner().bucket_for(num) == bucket


@pytest.mark.parametrize("num", [0, 9])
def test_slots_that_no_bucket_holds_are_refused(num):
    with pytest.raises(ConfigError, match="1 to 8, the largest bucket"):
        runner().bucket_for(num)


@pytest.mark.parametrize("buckets", [(), (2, 2), (0, 1)])
def test_buckets_are_distinct_whole_numbers(buckets):
    with pytest.raises(ConfigError, match="buckets: got"):
        runner(buckets)


def test_graphs_are_captured_largest_first_each_on_its_own_buffers():
    sizes = []

    class Watched(StandInGraphs):
        def capture(self, step, buffers):
            sizes.append(len(buffers["x"]))
            return super().capture(step, buffers)

    made = runner(graphs=Watched())
    made.capture("doubling", lambda bucket: doubling(made.buffers(bucket)))
    assert sizes == [8, 4, 2]
    assert len({made.buffers(bucket)["x"].data_ptr() for bucket in made.buckets}) == 3


def test_replays_advance_the_buffers_and_capture_leaves_them_as_they_were():
    made = runner(always=True)
    made.capture("doubling", lambda bucket: doubling(made.buffers(bucket)))
    assert made.buffers(4)["x"].tolist() == [0.0] * 4
    with made.loading(4) as held:
        held["x"].copy_(torch.tensor([1.0, 2.0, 3.0, 0.0]))
    for _ in range(3):
        made.replay(4, "doubling")
    assert made.buffers(4)["x"].tolist() == [4.0, 5.0, 6.0, 3.0]
    assert made.buffers(4)["y"].tolist() == [6.0, 8.0, 10.0, 4.0]
    assert [facts["replays"] for facts in made.report()] == [0, 3, 0]


def test_a_write_of_the_host_between_two_replays_is_refused():
    made = runner((2,), always=True)
    made.capture("doubling", lambda bucket: doubling(made.buffers(bucket)))
    made.replay(2, "doubling")
    made.buffers(2)["x"].numpy()[0] = 7.0  # by a way that no operator shows
    with pytest.raises(RunnerError, match="wrote into x between two replays"):
        made.replay(2, "doubling")


def test_a_step_that_does_something_else_in_a_replay_is_refused():
    made, turn = runner((2,), always=True), [1.0]

    def step(stream):
        made.buffers(2)["x"].mul_(turn[0])

    made.capture("scaled", lambda _: step)
    made.replay(2, "scaled")
    turn[0] = 3.0
    with pytest.raises(RunnerError, match="something else in a replay"):
        made.replay(2, "scaled")


def test_a_step_that_asks_for_a_value_is_not_captured():
    made = runner((2,))

    def step(stream):
        made.buffers(2)["x"].add_(made.buffers(2)["y"].max().item())

    with pytest.raises(RunnerError, match="_local_scalar_dense"):
        made.capture("asking", lambda _: step)


@pytest.mark.parametrize(
    ("graph_ms", "eager_ms", "ran"), [(1.0, 2.0, "graph"), (2.0, 1.0, "eager"), (1.0, 1.0, "eager")]
)
def test_a_graph_is_kept_only_where_it_measured_faster(graph_ms, eager_ms, ran):
    # Replay and eager step are timed in turn: start, end, start, end.
    ticks = iter([each for _ in range(TRIALS) for each in (0.0, graph_ms / 1e3, 0.0, eager_ms / 1e3)])
    made = runner((2,), graphs=StandInGraphs(clock=lambda: next(ticks)))
    made.capture("doubling", lambda bucket: doubling(made.buffers(bucket)))
    made.replay(2, "doubling")
    (facts,) = made.report()
    assert (facts["ran"], facts["replays"]) == (ran, int(ran == "graph"))
    assert (facts["graph_ms"], facts["eager_ms"]) == (graph_ms, eager_ms)
    assert made.buffers(2)["x"].tolist() == [1.0, 1.0]


class Context:
    """What TensorRT's execution context is to us: addresses, and a launch on a stream. Doubles x into y."""

    def __init__(self, held):
        self.at = {each.data_ptr(): each for each in held.values()}
        self.bound, self.launches, self.sound = {}, [], True

    def set_tensor_address(self, name, address):
        self.bound[name] = self.at.get(address)
        return self.bound[name] is not None and name in ("x", "y")

    def execute_async_v3(self, stream):
        self.launches.append(stream)
        self.bound["y"].copy_(self.bound["x"] * 2)
        return self.sound


def test_tensorrts_enqueue_is_captured_on_addresses_bound_once():
    made = runner((2,), always=True)
    context = Context(made.buffers(2))
    made.capture("engine", lambda bucket: enqueue(context, made.buffers(bucket)))
    with made.loading(2) as held:
        held["x"].copy_(torch.tensor([1.0, 2.0]))
    before = len(context.launches)
    made.replay(2, "engine")
    assert made.buffers(2)["y"].tolist() == [2.0, 4.0]
    assert len(context.launches) == before + 1
    with pytest.raises(RunnerError, match="no tensor 'z'"):
        enqueue(context, {"z": made.buffers(2)["x"]})
    context.sound = False
    with pytest.raises(RunnerError, match="enqueueV3 failed"):
        enqueue(context, made.buffers(2))(0)


def prepared(**settings):
    asked = {"num": 3, "lam": (0.7, 0.0, -1.0), "steps": 4, "batch_size": 4, "solver": "dpmpp_2m_sde"} | settings
    return prepare(PRIOR, SMALL, SampleConfig(**asked))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lam": 0.8},
        {"lam": 0.8, "guidance_interval": (0.3, 0.9)},
        {"lift": "none"},
        {"lam": 0.8, "particles": 3, "solver": "ddpm"},
    ],
    ids=["mixed", "guided", "interval", "trunk-only", "particles"],
)
def test_replayed_pictures_are_the_eager_ones_bit_for_bit(settings):
    run = prepared(**settings)
    graphed = replace(run, graphed=GraphedTicks(StandInGraphs(), always=True), calls=Calls())
    for indices in (np.arange(3), np.array([7, 5, 6]), np.array([9])):
        lam = {int(at): 0.4 for at in indices}
        eager, replayed = (replace(each, lam=lam).draw_bucket(indices) for each in (run, graphed))
        for name in ("x0", "activation", "ok", "nfe"):
            assert torch.equal(getattr(eager, name), getattr(replayed, name)), name
    # What a replay holds is counted as if it had been called, warm-ups and trials are not.
    assert graphed.calls == run.calls
    assert sum(facts["replays"] for facts in graphed.what_ran()["graphs"]) == 12


def test_one_graph_a_kind_and_the_manifest_says_which_ran():
    run = prepared(lam=0.8, guidance_interval=(0.3, 0.9), lift="none")
    graphed = replace(run, graphed=GraphedTicks(StandInGraphs(), always=True))
    graphed.draw_bucket(np.arange(3))
    facts = graphed.describe()["graphs"]
    assert {each["kind"] for each in facts} == {"unguided", "unguided+trunk-only"}
    assert {(each["ran"], each["bucket"], each["graphs"]) for each in facts} == {("graph", 4, "stand-in graphs")}
    assert run.describe()["graphs"] is None


def test_two_results_are_held_at_once():
    """What was seen in one tick is not overwritten by the next replay."""
    run, seen = prepared(), []
    graphed = replace(run, graphed=GraphedTicks(StandInGraphs(), always=True))
    eager = []
    run.draw_bucket(np.arange(3), lambda told: eager.append(told.preview) and None)
    graphed.draw_bucket(np.arange(3), lambda told: seen.append(told.preview) and None)
    assert len(seen) == 4
    assert all(torch.equal(one, other) for one, other in zip(seen, eager, strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_cuda_graphs_without_a_device_are_refused():
    if torch.cuda.is_available():
        return
    with pytest.raises(RunnerError, match="sees none; use graphs=off"):
        CudaGraphs()


@pytest.mark.gpu("100 replays equal 100 eager ticks", instead="tests/runtime/test_graphs.py, on the stand-in")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_replay_equals_eager_on_the_device(tiny_bundle, kernels):
    bundle = tiltscope.load(str(tiny_bundle))
    config = SampleConfig(num=4, lam=2.0, steps=100, device="cuda", kernels=kernels, graphs="off")
    run = prepare(bundle.prior, bundle.feature("blocks.1:sae:3"), config)
    state = admit(
        run.programme, seed=0, indices=np.arange(4), lam=np.full(4, 2.0), readout=run.feature.readout, bucket=4
    )
    slots = StaticSlots.like(state)
    ticks = GraphedTicks(CudaGraphs(), always=True)
    replaying = ticks.start(slots.state, run.programme)
    addresses = {name: each.data_ptr() for name, each in replaying.tensors.items()}
    with count_calls() as eager_calls:
        for _ in range(100):
            state, _ = tick(state, run.programme)
    calls = Calls()
    replaying.tick(calls)
    torch.cuda.synchronize()
    at_rest = torch.cuda.memory_allocated()
    for _ in range(99):
        replaying.tick(calls)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == at_rest
    assert calls == eager_calls
    assert {name: each.data_ptr() for name, each in replaying.tensors.items()} == addresses
    error = (replaying.state.x - state.x).square().mean().sqrt()
    assert float(error) < 1e-5
    assert torch.equal(replaying.state.row, state.row)
