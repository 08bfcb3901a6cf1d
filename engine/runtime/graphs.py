"""CUDA graphs of a step: captured a bucket and a kind at a time, replayed without the host, kept where they are faster.

    buckets   batch sizes, captured largest first, so that the smaller ones fit into the memory pool that the largest has filled
    kind      which networks the step runs (guided, unguided, trunk-only, ...): one graph each, all on a bucket's same buffers
    replay    counters advance on the device; between two replays the host writes nothing
    kept      a graph stays only where it measured faster than the eager step here; `report` says which ran

`GraphRunner` takes what captures and times as an argument: `CudaGraphs` on a GPU, `StandInGraphs` on a CPU, which re-runs the
recorded closure on the same buffers and refuses what a graph could not see. A step is a callable that gets the stream's handle,
so that TensorRT's enqueueV3 is captured like any other (`enqueue`). Knows tensors and callables; nothing of slots or plans.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltscope.engine.errors import ConfigError, RunnerError
from tiltscope.engine.runtime.capture_safety import Recorder
from tiltscope.kernels.implementation import Calls, count_calls

# Runs before a capture, on the capture's own stream: libraries allocate their workspaces and choose their kernels in them.
WARM_UPS = 3
# Replays and eager steps that decide, in turn, so that a drifting clock moves both.
TRIALS = 11

StepOn = Callable[[int], None]
Replay = Callable[[], None]


@runtime_checkable
class Graphs(Protocol):
    """What captures a step on static buffers, and times."""

    @property
    def name(self) -> str: ...

    def capture(self, step: StepOn, buffers: Mapping[str, Tensor]) -> Replay: ...

    def run(self, step: StepOn) -> None: ...

    def milliseconds(self, work: Callable[[], None]) -> float: ...

    def writing(self, buffers: Mapping[str, Tensor]) -> Any: ...


class CudaGraphs:
    """torch.cuda.CUDAGraph in one memory pool, on one stream of its own, which warm-ups and eager steps use too."""

    name = "cuda graphs"

    def __init__(self) -> None:
        """Raises RunnerError without a CUDA device."""
        if not torch.cuda.is_available():
            raise RunnerError(
                f"graphs: CUDA graphs need a CUDA device, torch {torch.__version__} sees none; use graphs=off"
            )
        self._stream: Any = torch.cuda.Stream()
        self._pool: Any = torch.cuda.graph_pool_handle()

    def run(self, step: StepOn) -> None:
        """The step eagerly, on the capture's stream, in order with the current one."""
        current: Any = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step(self._stream.cuda_stream)
        current.wait_stream(self._stream)

    def capture(self, step: StepOn, buffers: Mapping[str, Tensor]) -> Replay:
        """A replay of `step`. The buffers are left as they were: warm-ups advance them, so they are put back."""
        before = {name: each.clone() for name, each in buffers.items()}
        for _ in range(WARM_UPS):
            self.run(step)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step(self._stream.cuda_stream)
        for name, each in buffers.items():
            each.copy_(before[name])
        return graph.replay

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Between two events around `work`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    @contextmanager
    def writing(self, buffers: Mapping[str, Tensor]) -> Generator[None]:
        yield


class StandInGraphs:
    """On a CPU, in a graph's place: the recorded closure, run again on the same buffers, and held to what a graph would do.

    A replay raises RunnerError where a buffer was written since the last replay outside `writing`, or has moved, or where the
    closure dispatches another operator, shape or scalar than it did at capture.
    """

    name = "stand-in graphs"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._known: dict[int, tuple[Tensor, Tensor, int]] = {}

    def run(self, step: StepOn) -> None:
        step(0)

    def capture(self, step: StepOn, buffers: Mapping[str, Tensor]) -> Replay:
        before = {name: each.clone() for name, each in buffers.items()}
        for _ in range(WARM_UPS):
            step(0)
        with Recorder() as at_capture:
            step(0)
        if at_capture.problems:
            raise RunnerError(f"graphs: the step cannot be captured: {'; '.join(sorted(set(at_capture.problems)))}")
        with self.writing(buffers):
            for name, each in buffers.items():
                each.copy_(before[name])

        def replay() -> None:
            self._refuse_writes(buffers)
            with Recorder() as again:
                Context().run(step, 0)  # a graph runs no Python, so nobody's counters may see this one
            if again.operators != at_capture.operators or again.reads != at_capture.reads:
                raise RunnerError("graphs: the step did something else in a replay than at its capture")
            self._remember(buffers)

        return replay

    def milliseconds(self, work: Callable[[], None]) -> float:
        """By the clock. Of a replay it says nothing: here that is the step and the checks around it."""
        start = self._clock()
        work()
        return 1e3 * (self._clock() - start)

    @contextmanager
    def writing(self, buffers: Mapping[str, Tensor]) -> Generator[None]:
        """The host may write in here."""
        yield
        self._remember(buffers)

    def _remember(self, buffers: Mapping[str, Tensor]) -> None:
        self._known |= {id(each): (each, each.clone(), each.data_ptr()) for each in buffers.values()}

    def _refuse_writes(self, buffers: Mapping[str, Tensor]) -> None:
        for name, each in buffers.items():
            _, content, address = self._known[id(each)]
            if each.data_ptr() != address:
                raise RunnerError(f"graphs: the buffer {name} has moved since it was captured")
            if not torch.equal(torch.nan_to_num(each), torch.nan_to_num(content)):
                raise RunnerError(f"graphs: the host wrote into {name} between two replays")


def enqueue(context: Any, tensors: Mapping[str, Tensor]) -> StepOn:
    """TensorRT's enqueueV3 of an execution context on static tensors, as a step: addresses are bound once, here.

    Raises RunnerError where the context refuses an address or, in a run, the launch.
    """
    for name, tensor in tensors.items():
        if not context.set_tensor_address(name, tensor.data_ptr()):
            raise RunnerError(f"runner tensorrt: the engine has no tensor {name!r} of the shape {list(tensor.shape)}")

    def step(stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise RunnerError("runner tensorrt: enqueueV3 failed")

    return step


@dataclass
class _Kept:
    step: StepOn
    replay: Replay | None
    calls: Calls
    facts: dict[str, Any]


@dataclass
class GraphRunner:
    """Graphs of steps over buckets of static buffers.

    make_buffers(bucket) -> named tensors that never move; made once a bucket. Raises ConfigError for buckets that are not
    distinct positive whole numbers.
    """

    graphs: Graphs
    buckets: Sequence[int]
    make_buffers: Callable[[int], Mapping[str, Tensor]]
    always: bool = False
    """keep every graph unmeasured: for tests of replay, and for who measures on their own"""
    _buffers: dict[int, Mapping[str, Tensor]] = field(default_factory=dict[int, Mapping[str, Tensor]])
    _kept: dict[tuple[int, str], _Kept] = field(default_factory=dict[tuple[int, str], _Kept])

    def __post_init__(self) -> None:
        sizes = list(self.buckets)
        if not sizes or len(set(sizes)) != len(sizes) or not all(type(each) is int and each > 0 for each in sizes):
            raise ConfigError(f"buckets: got {sizes}, allowed are distinct whole numbers from 1, at least one")
        self.buckets = tuple(sorted(sizes, reverse=True))

    def bucket_for(self, num: int) -> int:
        """The smallest bucket that holds `num` slots; the rest of it is padding. Raises ConfigError beyond the largest."""
        fitting = [each for each in self.buckets if each >= num]
        if not fitting or num < 1:
            raise ConfigError(f"slots: got {num}, allowed are 1 to {self.buckets[0]}, the largest bucket")
        return fitting[-1]

    def buffers(self, bucket: int) -> Mapping[str, Tensor]:
        """The bucket's tensors, at addresses that stay."""
        if bucket not in self._buffers:
            self._buffers[bucket] = self.make_buffers(bucket)
        return self._buffers[bucket]

    def capture(self, kind: str, step_of: Callable[[int], StepOn]) -> None:
        """One graph a bucket, the largest first. step_of(bucket): the step on that bucket's buffers."""
        for bucket in self.buckets:
            self.capture_one(bucket, kind, step_of(bucket))

    def capture_one(self, bucket: int, kind: str, step: StepOn) -> None:
        """Capture, measure against the eager step, and keep what is faster; the buffers are left as they were."""
        # In a context of its own, so that whoever counts what draws pictures does not count warm-ups and trials.
        Context().run(self._capture, bucket, kind, step)

    def _capture(self, bucket: int, kind: str, step: StepOn) -> None:
        buffers = self.buffers(bucket)
        replay = self.graphs.capture(step, buffers)
        with (
            count_calls() as calls
        ):  # a replay runs no Python: what one holds is counted once, here, and added for each
            self._preserving(buffers, lambda: self.graphs.run(step))
        facts: dict[str, Any] = {"graph_ms": None, "eager_ms": None}
        if not self.always:
            facts = self._preserving(buffers, lambda: self._measure(step, replay, buffers))
        faster = self.always or facts["graph_ms"] < facts["eager_ms"]
        facts |= {"bucket": bucket, "kind": kind, "ran": "graph" if faster else "eager", "replays": 0}
        self._kept[bucket, kind] = _Kept(step, replay if faster else None, calls, facts)

    def captured(self, bucket: int, kind: str) -> bool:
        return (bucket, kind) in self._kept

    @contextmanager
    def loading(self, bucket: int) -> Generator[Mapping[str, Tensor]]:
        """The bucket's buffers, to be written into: before a run of replays, never between two."""
        with self.graphs.writing(self.buffers(bucket)):
            yield self.buffers(bucket)

    def replay(self, bucket: int, kind: str, calls: Calls | None = None) -> None:
        """One step of this kind, by the graph or eagerly, whichever was kept; `calls` takes in the ops that a replay holds."""
        kept = self._kept[bucket, kind]
        if kept.replay is None:
            with self.graphs.writing(self.buffers(bucket)):
                self.graphs.run(kept.step)
        else:
            kept.replay()
            kept.facts["replays"] += 1
            if calls is not None:
                calls.update(kept.calls)

    def report(self) -> list[dict[str, Any]]:
        """For a manifest: of every bucket and kind, what ran, how often it was replayed, and the times that decided."""
        return [{"graphs": self.graphs.name} | kept.facts for kept in self._kept.values()]

    def _measure(self, step: StepOn, replay: Replay, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
        times: dict[str, list[float]] = {"graph_ms": [], "eager_ms": []}
        for _ in range(TRIALS):
            times["graph_ms"].append(self.graphs.milliseconds(replay))
            with self.graphs.writing(buffers):
                times["eager_ms"].append(self.graphs.milliseconds(lambda: self.graphs.run(step)))
        return {name: sorted(taken)[TRIALS // 2] for name, taken in times.items()}

    def _preserving(self, buffers: Mapping[str, Tensor], work: Callable[[], Any]) -> Any:
        before = {name: each.clone() for name, each in buffers.items()}
        with self.graphs.writing(buffers):
            pass  # as they are now is how a replay finds them
        made = work()
        with self.graphs.writing(buffers):
            for name, each in buffers.items():
                each.copy_(before[name])
        return made
