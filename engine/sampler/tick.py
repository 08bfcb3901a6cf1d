"""One tick: every slot of a batch advances by its own row. Look (networks and lift), weigh (particles only), move (the table).

Nothing here asks the device for a value, and no value of the host enters `advance`: which networks a tick runs is known
beforehand, all else follows from what is on the device. So a tick can be captured once and replayed (replay.py;
tests/runtime/test_capture_safety.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltscope.engine.runtime.step import ListeningStep, TorchStep, heard
from tiltscope.engine.runtime.threads import one_thread
from tiltscope.engine.sampler.learned_noise import add_learned_noise
from tiltscope.engine.sampler.lifts import Dps, Slots
from tiltscope.engine.sampler.particles import reweigh_after_move, weigh
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.sampler.state import (
    Need,
    Observation,
    Programme,
    Sight,
    SlotState,
    guided_of,
    per_slot,
    rows_of,
    slots_of,
)
from tiltscope.kernels.dispatch import guided_step
from tiltscope.kernels.reference import StepInputs

_NOISE = COLUMNS.index("c")


def tick(state: SlotState, programme: Programme) -> tuple[SlotState, Observation]:
    """Advance every slot by its own row; slots that have done their plan, and slots that failed, stay as they are."""
    needs, host = programme.ahead(state.host)
    with one_thread(when=programme.step.has_own_threads):
        after, seen = advance(state, programme, needs)
    return after.advanced(host=host), seen


def advance(state: SlotState, programme: Programme, needs: Sequence[Need]) -> tuple[SlotState, Observation]:
    """The device's part of a tick; `host` is not looked at. needs: one a bucket of slots."""
    sight = look(state, programme, needs)
    if programme.particles > 1:
        state, sight = weigh(state, sight, programme)
    return move(state, sight, programme)


def look(state: SlotState, programme: Programme, needs: Sequence[Need]) -> Sight:
    """The networks on every slot, `programme.bucket` of them a call.

    Each graph kind needed runs once over a whole bucket, and every slot takes the outputs of its own kind, or the same bits from
    the other (`one_graph_serves_both`): a slot's numbers come from its own inputs in one fixed batch shape, whatever its batch
    mates are. With particles an unguided row of a tilted slot still reads its feature, for the twist.
    """
    every = guided_of(state, programme) if any(need.guided for need in needs) else torch.zeros_like(state.ok)
    if len(needs) == 1:
        return _look(slots_of(state, programme), every, programme, needs[0])
    size = programme.bucket or len(every)
    places = [slice(at * size, (at + 1) * size) for at in range(len(needs))]
    return Sight.joined(
        [
            _look(slots_of(state, programme, part), every[part], programme, need)
            for part, need in zip(places, needs, strict=True)
        ]
    )


def _look(slots: Slots, guided: Tensor, programme: Programme, need: Need) -> Sight:
    """`look` at the slots of one call."""
    step, grad, v = programme.step, None, None
    activation = drive = log_twist = strength = torch.full_like(slots.lam, torch.nan)
    if programme.log_variance is not None:
        step, v = ListeningStep.to(step), torch.zeros_like(slots.x)
    together = need.guided and need.unguided and one_graph_serves_both(programme)
    if need.unguided and not together:
        x0_hat = step.unguided(slots.x, slots.sigma, slots.alpha)
        v = heard(step, v)
        if need.reads:
            activation, drive = step.measure(x0_hat, slots.readout)
            log_twist = slots.energy(drive)
    else:
        x0_hat = torch.zeros_like(slots.x)
    if need.guided:
        push = programme.lift.push(step, slots)
        if together:
            x0_hat, v = push.x0_hat, heard(step, v)
        else:
            if v is not None and (said := heard(step, v)) is not None:
                v = torch.where(per_slot(guided, v), said, v)
            x0_hat = torch.where(per_slot(guided, slots.x), push.x0_hat, x0_hat)
        activation = torch.where(guided, push.activation, activation)
        drive = torch.where(guided, push.drive, drive)
        log_twist = torch.where(guided, push.log_twist, log_twist)
        grad, strength = push.grad, push.strength
    if programme.particles > 1:
        log_twist = torch.where(slots.lam == 0, 0.0, log_twist)
    return Sight(x0_hat, activation, drive, grad, strength, log_twist, guided, v)


def one_graph_serves_both(programme: Programme) -> bool:
    """Whether unguided slots may take D from the guided graph where that runs for their batch mates: it is theirs bit for bit."""
    step, lift = programme.step, programme.lift
    told = isinstance(step, TorchStep) and step.guided_tells_unguided
    return told and isinstance(lift, Dps) and lift.is_one_step and programme.particles == 1


def move(state: SlotState, sight: Sight, programme: Programme) -> tuple[SlotState, Observation]:
    """x' and H' of the table for every slot that still has a row to do."""
    dtype, asked = state.x.dtype, programme.kernels
    x0_hat, grad = sight.x0_hat, sight.grad
    if asked == "triton":  # each sample in C order, as x is: an expanded or permuted gradient becomes one in memory
        x0_hat, grad = x0_hat.contiguous(), None if grad is None else grad.contiguous()
    inputs = StepInputs(
        x=state.x,
        x0_hat=x0_hat,
        grad_a=grad,
        history=state.history,
        table=programme.coefficients,
        num_rows=programme.num_rows,
        plan=state.plan,
        row=state.row,
        ok=state.ok,
        # A drive that is not a number has a gradient of 0 or anything: it counts as a failure of its own.
        drive=sight.drive.to(dtype),
        strength=sight.strength.to(dtype),
        guided=sight.guided,
        key=state.key,
        index=state.index,
        particle=state.particle,
    )
    moved = guided_step(inputs, implementation=asked)
    moved = add_learned_noise(state, moved, sight.v, programme)
    after = state.advanced(x=moved.x, history=moved.history, row=moved.row, ok=moved.ok)
    if programme.particles > 1:
        noise = rows_of(state, programme)[:, _NOISE].to(dtype)
        after = reweigh_after_move(after, moved.z_dot_delta, moved.delta_norm_sq, noise)
    return after, Observation(sight.x0_hat, sight.activation, sight.drive, *moved[4:])
