"""Slots side by side and apart: the two operations by which samples join a batch and leave it."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import chain

import torch

from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.sampler.state import SLOT_TENSORS, HostRows, SlotState

_HOST = tuple(each.name for each in fields(HostRows))


def take(state: SlotState, slots: slice) -> SlotState:
    """Some of the slots, as views."""
    return SlotState(
        **{name: getattr(state, name)[slots] for name in SLOT_TENSORS},
        readout=None if state.readout is None else state.readout[slots],
        host=HostRows(**{name: getattr(state.host, name)[slots] for name in _HOST}),
    )


def stack(states: Sequence[SlotState]) -> SlotState:
    """The slots of all, in order. Readouts must sum equally many rows: padding a sum could change its bits."""
    if len(states) == 1:
        return states[0]
    readouts = [state.readout for state in states if state.readout is not None]
    return SlotState(
        **{name: torch.cat([getattr(state, name) for state in states]) for name in SLOT_TENSORS},
        readout=Readout.stack(readouts) if readouts else None,
        host=HostRows(
            **{name: tuple(chain.from_iterable(getattr(state.host, name) for state in states)) for name in _HOST}
        ),
    )


def padded(states: Sequence[SlotState], bucket: int) -> SlotState:
    """The states, of one number of slots each, side by side, and the first again until whole buckets are full.

    Padding of another kind would ask for a graph of its own: these slots need the same one, and nobody looks at them.
    """
    each = len(states[0].row)
    missing = -len(states) * each % bucket
    repeats = [states[0]] * (missing // each)
    rest = [take(states[0], slice(missing % each))] if missing % each else []
    return stack([*states, *repeats, *rest])
