"""Slots at fixed addresses: the form of a tick that can be captured once and replayed.

`StaticSlots` owns one tensor a field of the state; `step_into` reads a tick's inputs there and writes its results back there, and
touches nothing of the host. What captures and replays it is engine/runtime/graphs.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.graphs import GraphRunner, Graphs, StepOn
from tiltscope.engine.sampler.lifts import Lift
from tiltscope.engine.sampler.state import SLOT_TENSORS, Need, Observation, Programme, SlotState
from tiltscope.engine.sampler.tick import advance
from tiltscope.kernels.implementation import Calls

_READOUT = tuple(each.name for each in fields(Readout))


@dataclass(frozen=True)
class StaticSlots:
    """A batch of slots whose tensors never move. state: its `host` is the one it was made with. seen: what the last tick saw."""

    state: SlotState
    seen: Observation

    @staticmethod
    def like(state: SlotState) -> "StaticSlots":
        """Buffers of the shapes of `state`, holding it: dense ones, whatever views `state` was made of."""

        def own(values: Tensor) -> Tensor:
            return values.clone(memory_format=torch.contiguous_format)

        held: dict[str, Any] = {name: own(getattr(state, name)) for name in SLOT_TENSORS}
        if state.readout is not None:
            held["readout"] = Readout(*(own(getattr(state.readout, name)) for name in _READOUT))
        x, num = held["x"], len(held["lam"])
        seen = Observation(torch.zeros_like(x), *(x.new_zeros(num) for _ in Observation._fields[1:]))
        return StaticSlots(replace(state, **held), seen)

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name."""
        named = {name: getattr(self.state, name) for name in SLOT_TENSORS}
        if self.state.readout is not None:
            named |= {f"readout.{name}": getattr(self.state.readout, name) for name in _READOUT}
        return named | {f"seen.{name}": each for name, each in self.seen._asdict().items()}

    def load(self, state: SlotState) -> None:
        """Take in other slots of the same shapes: the one host write, before a run of replays."""
        for name in SLOT_TENSORS:
            getattr(self.state, name).copy_(getattr(state, name))
        if self.state.readout is not None and state.readout is not None:
            for name in _READOUT:
                getattr(self.state.readout, name).copy_(getattr(state.readout, name))

    def copy(self) -> SlotState:
        """The slots as they are now, in memory of their own: what the next replay does not overwrite."""
        return StaticSlots.like(self.state).state

    def observation(self) -> Observation:
        """What the last tick saw, in memory of its own."""
        return Observation(*(each.clone() for each in self.seen))

    def to(self, device: torch.device) -> "StaticSlots":
        """Buffers of the same shapes elsewhere."""
        moved: dict[str, Any] = {name: getattr(self.state, name).to(device) for name in SLOT_TENSORS}
        if self.state.readout is not None:
            moved["readout"] = Readout(*(getattr(self.state.readout, name).to(device) for name in _READOUT))
        return StaticSlots(replace(self.state, **moved), Observation(*(each.to(device) for each in self.seen)))


def step_into(slots: StaticSlots, programme: Programme, needs: Sequence[Need]) -> dict[str, Tensor]:
    """One tick in place; returns the buffers written, by name. Resampling is predicated: decided by masks, never by a branch."""
    after, seen = advance(slots.state, programme, needs)
    written: dict[str, Tensor] = {}
    for name in SLOT_TENSORS:
        made, held = getattr(after, name), getattr(slots.state, name)
        if made is not held:
            written[name] = held.copy_(made)
    for name, made, held in zip(Observation._fields, seen, slots.seen, strict=True):
        written[f"seen.{name}"] = held.copy_(made)
    return written


def kind_of(needs: Sequence[Need], lift: Lift) -> str:
    """What a graph is called: the networks it runs, for every bucket of slots in turn."""
    guided = "trunk-only" if lift.skips_denoiser else "guided"

    def one(need: Need) -> str:
        ran = (("unguided", need.unguided), ("reading", need.reads), (guided, need.guided))
        return "+".join(name for name, on in ran if on) or "idle"

    return ",".join(map(one, needs))


class Replaying:
    """Slots that advance by replays: load, tick, tick, ..., and `state` when they are done."""

    def __init__(self, programme: Programme, runner: GraphRunner, slots: StaticSlots) -> None:
        self.programme, self._runner, self._slots = programme, runner, slots
        self._size = len(slots.state.lam)
        self._host = slots.state.host

    def load(self, state: SlotState) -> None:
        """Take these slots in: all that the host writes."""
        with self._runner.loading(self._size):
            self._slots.load(state)
        self._host = state.host

    def tick(self, calls: Calls | None = None) -> None:
        """Every slot by its own row. A kind that was not met before is captured first."""
        needs, after = self.programme.ahead(self._host)
        kind = kind_of(needs, self.programme.lift)
        if not self._runner.captured(self._size, kind):
            self._runner.capture_one(self._size, kind, self._step(needs))
        self._runner.replay(self._size, kind, calls)
        self._host = after

    @property
    def state(self) -> SlotState:
        """The slots as they are now, in memory of their own."""
        return replace(self._slots.copy(), host=self._host)

    def observation(self) -> Observation:
        """What the last tick saw, in memory of its own: the next replay overwrites the buffers, not this."""
        return self._slots.observation()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers, at the addresses that every replay reads and writes."""
        return self._slots.tensors()

    def report(self) -> list[dict[str, Any]]:
        return self._runner.report()

    def _step(self, needs: Sequence[Need]) -> StepOn:
        def step(stream: int) -> None:
            del stream  # torch works on the current stream, which is the capture's
            step_into(self._slots, self.programme, needs)

        return step


class GraphedTicks:
    """The graphs of a run, for every number of slots that it advances together."""

    def __init__(self, graphs: Graphs, *, always: bool = False) -> None:
        self._graphs, self._always = graphs, always
        self._started: dict[tuple[Any, ...], Replaying] = {}

    def start(self, state: SlotState, programme: Programme) -> Replaying:
        """These slots, loaded into the buffers of their number."""
        key = (len(state.lam), programme.bucket, programme.particles)
        if key not in self._started:
            slots = StaticSlots.like(state)
            runner = GraphRunner(self._graphs, (len(state.lam),), lambda _: slots.tensors(), always=self._always)
            self._started[key] = Replaying(programme, runner, slots)
        started = self._started[key]
        started.load(state)
        return started

    def report(self) -> list[dict[str, Any]]:
        """What ran, for a manifest (GraphRunner.report)."""
        return [facts for each in self._started.values() for facts in each.report()]
