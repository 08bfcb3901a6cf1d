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
from tiltscope.engine.sampler.state import Need, Observation, Programme, SlotState
from tiltscope.engine.sampler.tick import advance

_READOUT = tuple(each.name for each in fields(Readout))
_TENSORS = tuple(each.name for each in fields(SlotState) if each.name not in ("readout", "host"))


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

        held: dict[str, Any] = {name: own(getattr(state, name)) for name in _TENSORS}
        if state.readout is not None:
            held["readout"] = Readout(*(own(getattr(state.readout, name)) for name in _READOUT))
        x, num = held["x"], len(held["lam"])
        seen = Observation(torch.zeros_like(x), *(x.new_zeros(num) for _ in Observation._fields[1:]))
        return StaticSlots(replace(state, **held), seen)

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by name."""
        named = {name: getattr(self.state, name) for name in _TENSORS}
        if self.state.readout is not None:
            named |= {f"readout.{name}": getattr(self.state.readout, name) for name in _READOUT}
        return named | {f"seen.{name}": each for name, each in self.seen._asdict().items()}

    def load(self, state: SlotState) -> None:
        """Take in other slots of the same shapes: the one host write, before a run of replays."""
        for name in _TENSORS:
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
        moved: dict[str, Any] = {name: getattr(self.state, name).to(device) for name in _TENSORS}
        if self.state.readout is not None:
            moved["readout"] = Readout(*(getattr(self.state.readout, name).to(device) for name in _READOUT))
        return StaticSlots(replace(self.state, **moved), Observation(*(each.to(device) for each in self.seen)))


def step_into(slots: StaticSlots, programme: Programme, needs: Sequence[Need]) -> dict[str, Tensor]:
    """One tick in place; returns the buffers written, by name. Resampling is predicated: decided by masks, never by a branch."""
    after, seen = advance(slots.state, programme, needs)
    written: dict[str, Tensor] = {}
    for name in _TENSORS:
        made, held = getattr(after, name), getattr(slots.state, name)
        if made is not held:
            written[name] = held.copy_(made)
    for name, made, held in zip(Observation._fields, seen, slots.seen, strict=True):
        written[f"seen.{name}"] = held.copy_(made)
    return written
