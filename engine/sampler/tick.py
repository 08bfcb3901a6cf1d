"""One tick: every slot of a batch advances by its own row. Look (networks and lift), weigh (particles only), move (the table).

Nothing here asks the device for a value: which graphs a tick needs is known to the host.
"""

from dataclasses import replace

import torch

from tiltscope.engine.sampler.particles import reweigh_after_move, weigh
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.sampler.state import (
    Observation,
    Programme,
    Sight,
    SlotState,
    per_slot,
    rows_of,
    slots_of,
)
from tiltscope.kernels.reference import guided_update

_NOISE = COLUMNS.index("c")


def tick(state: SlotState, programme: Programme) -> tuple[SlotState, Observation]:
    """Advance every slot by its own row; slots that have done their plan, and slots that failed, stay as they are."""
    sight = look(state, programme)
    if programme.particles > 1:
        state, sight = weigh(state, sight, programme)
    return move(state, sight, programme)


def look(state: SlotState, programme: Programme) -> Sight:
    """The networks on every slot, `programme.bucket` of them a call.

    Each graph kind present runs once over a whole bucket, and every slot takes the outputs of its own kind: a slot's numbers
    come from its own inputs in one fixed batch shape, whatever its batch mates are. With particles an unguided row of a tilted
    slot still reads its feature, for the twist.
    """
    kinds = programme.kinds(state.host)
    size = programme.bucket or len(kinds)
    parts: list[Sight] = []
    for at in range(0, len(kinds), size):
        part = slice(at, at + size)
        kind, slots = kinds[part], slots_of(state, programme, part)
        guided = torch.from_numpy(kind == GraphKind.GUIDED)
        x0_hat = grad = torch.zeros_like(slots.x)
        activation = drive = log_twist = torch.full_like(slots.lam, torch.nan)
        strength = torch.zeros_like(slots.lam)
        if (unguided := kind == GraphKind.UNGUIDED).any():
            x0_hat = programme.step.unguided(slots.x, slots.sigma, slots.alpha)
            if programme.particles > 1 and (unguided & state.host.tilted[part]).any():
                activation, drive = programme.step.measure(x0_hat, slots.readout)
                log_twist = slots.energy(drive)
        if (kind == GraphKind.GUIDED).any():
            push = programme.lift.push(programme.step, slots)
            x0_hat = torch.where(per_slot(guided, slots.x), push.x0_hat, x0_hat)
            activation = torch.where(guided, push.activation, activation)
            drive = torch.where(guided, push.drive, drive)
            log_twist = torch.where(guided, push.log_twist, log_twist)
            grad, strength = push.grad, push.strength
        log_twist = torch.where(slots.lam == 0, 0.0, log_twist)
        parts.append(Sight(x0_hat, activation, drive, grad, strength, log_twist, guided))
    return parts[0] if len(parts) == 1 else Sight(*(torch.cat(each) for each in zip(*parts, strict=True)))


def move(state: SlotState, sight: Sight, programme: Programme) -> tuple[SlotState, Observation]:
    """x' and H' of the table for every slot that still has a row to do."""
    row = rows_of(state, programme).to(state.x.dtype)
    moved = guided_update(
        state.x,
        sight.x0_hat,
        sight.grad,
        state.history,
        row,
        sight.strength,
        sight.guided,
        state.key,
        state.index,
        state.row,
        state.particle,
    )
    kinds = programme.kinds(state.host)
    active = state.row < programme.num_rows[state.plan]
    # A drive that is not a number has a gradient of 0 or anything: it counts as a failure of its own.
    sound = moved.finite & (torch.isfinite(sight.drive) | ~sight.guided)
    ok = state.ok & (sound | ~active)
    advance = active & ok
    here = per_slot(advance, state.x)
    after = replace(
        state,
        x=torch.where(here, moved.x, state.x),
        history=torch.where(here, moved.history, state.history),
        row=state.row + advance,
        ok=ok,
        host=replace(state.host, row=state.host.row + (kinds >= 0)),
    )
    if programme.particles > 1:
        after = reweigh_after_move(after, moved.z_dot_delta, moved.delta_norm_sq, row[:, _NOISE])
    return after, Observation(sight.x0_hat, sight.activation, sight.drive, *moved[2:5])
