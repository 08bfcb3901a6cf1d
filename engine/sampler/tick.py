"""One tick: every slot of a batch advances by its own row. Look (the networks), weigh (particles only), move (the table).

Nothing here asks the device for a value: which graphs a tick needs is known to the host.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tiltscope.engine.sampler.particles import reweigh_after_move, weigh
from tiltscope.engine.sampler.plan import COLUMNS, GraphKind
from tiltscope.engine.sampler.state import Observation, Programme, Sight, SlotState, per_slot
from tiltscope.engine.tilt.log_tilt import LogTilt
from tiltscope.kernels.reference import guided_step

_SIGMA, _ALPHA, _NOISE = COLUMNS.index("sigma"), COLUMNS.index("alpha"), COLUMNS.index("c")


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
    row = _rows(state, programme)
    parts: list[Sight] = []
    for at in range(0, len(kinds), size):
        part = slice(at, at + size)
        kind, x, lam = kinds[part], state.x[part], state.lam[part]
        sigma, alpha = row[part, _SIGMA], row[part, _ALPHA]
        readout = None if state.readout is None else state.readout[part]
        guided = torch.from_numpy(kind == GraphKind.GUIDED)
        x0_hat = grad_a = torch.zeros_like(x)
        activation = drive = torch.full_like(lam, torch.nan)
        if (unguided := kind == GraphKind.UNGUIDED).any():
            x0_hat = programme.step.unguided(x, sigma, alpha)
            if programme.particles > 1 and (unguided & state.host.tilted[part]).any():
                activation, drive = programme.step.measure(x0_hat, readout)
        if (kind == GraphKind.GUIDED).any():
            out = programme.step.guided(x, sigma, alpha, readout)
            x0_hat = torch.where(per_slot(guided, x), out.x0_hat, x0_hat)
            activation = torch.where(guided, out.activation, activation)
            drive = torch.where(guided, out.drive, drive)
            grad_a = out.grad_a
        parts.append(Sight(x0_hat, activation, drive, grad_a, guided))
    return parts[0] if len(parts) == 1 else Sight(*(torch.cat(each) for each in zip(*parts, strict=True)))


def move(state: SlotState, sight: Sight, programme: Programme) -> tuple[SlotState, Observation]:
    """x' and H' of the table for every slot that still has a row to do."""
    row = _rows(state, programme)
    moved = guided_step(
        state.x,
        sight.x0_hat,
        sight.grad_a,
        state.history,
        row.to(state.x.dtype),
        strength(state, programme.log_tilts, sight.drive),
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
        after = reweigh_after_move(after, moved.z_dot_delta, moved.delta_norm_sq, row[:, _NOISE].to(state.x.dtype))
    return after, Observation(sight.x0_hat, sight.activation, sight.drive, *moved[2:5])


def strength(state: SlotState, log_tilts: tuple[LogTilt, ...], drive: Tensor) -> Tensor:
    """w = lambda phi'(drive), each slot by its own log-tilt."""
    slope = torch.zeros_like(drive)
    for at, log_tilt in enumerate(log_tilts):
        slope = torch.where(state.log_tilt == at, log_tilt.slope(drive), slope)
    return state.lam * slope


def _rows(state: SlotState, programme: Programme) -> Tensor:
    """Each slot's own row of its own plan, float64 [batch, 11]."""
    table = programme.table
    return table[state.plan, state.row.clamp(max=table.shape[1] - 1)]
