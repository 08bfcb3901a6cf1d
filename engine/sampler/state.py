"""A batch of slots and the tick that advances each of them by its own row.

Samples at different rows, of different plans, lambdas, log-tilts and seeds share a batch. A checkpoint is the SlotState.
The host mirrors the row counters, which are deterministic, so it knows which graphs a tick needs without asking the device.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.step import Step
from tiltscope.engine.sampler.noise import STREAM_START, seed_key
from tiltscope.engine.sampler.plan import COLUMNS, GraphKind, Plan
from tiltscope.engine.tilt.log_tilt import LogTilt
from tiltscope.kernels.philox import normal
from tiltscope.kernels.reference import guided_step

_SIGMA, _ALPHA = COLUMNS.index("sigma"), COLUMNS.index("alpha")


@dataclass(frozen=True)
class HostRows:
    """The host's mirror of the slots: plan and row of each, and whether it is tilted at all (lam != 0)."""

    plan: NDArray[np.int64]
    row: NDArray[np.int64]
    tilted: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """A batch of slots. Words of `key`: low and high half of the seed. `plan`, `log_tilt`: places in the Programme.

    `row` counts the rows a slot has done; it stops, with x at its last good value, where a slot became non-finite (ok False).
    log_weight and log_twist belong to the particle-corrected sampler and stay 0 without it.
    """

    x: Float[Tensor, "batch ..."]
    history: Float[Tensor, "batch ..."]
    row: Int[Tensor, "batch"]
    key: Int[Tensor, "batch 2"]
    index: Int[Tensor, "batch"]
    particle: Int[Tensor, "batch"]
    group: Int[Tensor, "batch"]
    plan: Int[Tensor, "batch"]
    readout: Readout | None
    lam: Float[Tensor, "batch"]
    log_tilt: Int[Tensor, "batch"]
    log_weight: Float[Tensor, "batch"]
    log_twist: Float[Tensor, "batch"]
    ok: Bool[Tensor, "batch"]
    host: HostRows


class Observation(NamedTuple):
    """What one tick saw; activation and drive are NaN for slots on an unguided row."""

    x0_hat: Float[Tensor, "batch ..."]
    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    grad_norm_sq: Float[Tensor, "batch"]
    delta_norm_sq: Float[Tensor, "batch"]
    z_dot_delta: Float[Tensor, "batch"]


@dataclass(frozen=True)
class Programme:
    """What the slots refer to: the plans, the log-tilts and the networks, in the state's dtype."""

    plans: tuple[Plan, ...]
    log_tilts: tuple[LogTilt, ...]
    step: Step
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def table(self) -> Float[Tensor, "plan row 11"]:
        """All plans in float64, short ones padded with rows that are never reached."""
        longest = max(plan.num_rows for plan in self.plans)
        table = np.zeros((len(self.plans), longest, len(COLUMNS)))
        for at, plan in enumerate(self.plans):
            table[at, : plan.num_rows] = plan.table
        return torch.from_numpy(table)

    @cached_property
    def num_rows(self) -> Int[Tensor, "plan"]:
        return torch.tensor([plan.num_rows for plan in self.plans])

    def kinds(self, host: HostRows) -> NDArray[np.int8]:
        """The graph each slot's next row needs; -1 for a slot that has done its plan. An untilted slot is unguided."""
        kinds = np.full(len(host.row), -1, np.int8)
        for slot, (plan, row, tilted) in enumerate(zip(host.plan, host.row, host.tilted, strict=True)):
            if row < self.plans[plan].num_rows:
                kinds[slot] = self.plans[plan].kind[row] if tilted else GraphKind.UNGUIDED
        return kinds


def admit(
    programme: Programme,
    *,
    seed: int,
    indices: NDArray[np.int64],
    lam: NDArray[np.float64],
    readout: Readout | None,
    bucket: int,
) -> SlotState:
    """Fresh slots for `indices` (at most `bucket`) of one seed at row 0, x ~ N(0, I); the rest is unguided padding.

    readout: of the one feature asked for (batch 1), repeated over the slots. Padding slots repeat the first index.
    """
    padding = bucket - len(indices)
    index = torch.from_numpy(np.concatenate([indices, np.repeat(indices[:1], padding)]))
    lam = np.concatenate([lam, np.zeros(padding)])
    zeros = torch.zeros(bucket, dtype=torch.int64)
    key = torch.tensor([seed_key(seed)]).expand(bucket, 2)
    x = normal(key, index, zeros, zeros, stream=STREAM_START, shape=programme.shape, dtype=programme.dtype)
    return SlotState(
        x=x,
        history=torch.zeros_like(x),
        row=zeros,
        key=key,
        index=index,
        particle=zeros,
        group=torch.arange(bucket),
        plan=zeros,
        readout=None if readout is None else readout.expand(bucket),
        lam=torch.from_numpy(lam).to(programme.dtype),
        log_tilt=zeros,
        log_weight=torch.zeros(bucket, dtype=programme.dtype),
        log_twist=torch.zeros(bucket, dtype=programme.dtype),
        ok=torch.ones(bucket, dtype=torch.bool),
        host=HostRows(
            plan=np.zeros(bucket, np.int64),
            row=np.zeros(bucket, np.int64),
            tilted=lam != 0,
        ),
    )


def tick(state: SlotState, programme: Programme) -> tuple[SlotState, Observation]:
    """Advance every slot by its own row; slots that have done their plan, and slots that failed, stay as they are.

    Each graph kind present runs once over the whole bucket, and every slot takes the outputs of its own kind: a slot's
    numbers come from its own inputs in one fixed batch shape, whatever its batch mates are.
    """
    kinds = programme.kinds(state.host)
    table = programme.table
    row = table[state.plan, state.row.clamp(max=table.shape[1] - 1)]
    sigma, alpha = row[:, _SIGMA], row[:, _ALPHA]
    guided = torch.from_numpy(kinds == GraphKind.GUIDED)

    x0_hat = grad_a = torch.zeros_like(state.x)
    activation = drive = torch.full_like(state.lam, torch.nan)
    if (kinds == GraphKind.UNGUIDED).any():
        x0_hat = programme.step.unguided(state.x, sigma, alpha)
    if (kinds == GraphKind.GUIDED).any():
        out = programme.step.guided(state.x, sigma, alpha, state.readout)
        x0_hat = torch.where(_per_slot(guided, state.x), out.x0_hat, x0_hat)
        activation = torch.where(guided, out.activation, activation)
        drive = torch.where(guided, out.drive, drive)
        grad_a = out.grad_a

    moved = guided_step(
        state.x,
        x0_hat,
        grad_a,
        state.history,
        row.to(state.x.dtype),
        strength(state, programme.log_tilts, drive),
        guided,
        state.key,
        state.index,
        state.row,
        state.particle,
    )
    active = state.row < programme.num_rows[state.plan]
    # A drive that is not a number has a gradient of 0 or anything: it counts as a failure of its own.
    sound = moved.finite & (torch.isfinite(drive) | ~guided)
    ok = state.ok & (sound | ~active)
    advance = active & ok
    here = _per_slot(advance, state.x)
    after = replace(
        state,
        x=torch.where(here, moved.x, state.x),
        history=torch.where(here, moved.history, state.history),
        row=state.row + advance,
        ok=ok,
        host=replace(state.host, row=state.host.row + (kinds >= 0)),
    )
    return after, Observation(x0_hat, activation, drive, *moved[2:5])


def strength(state: SlotState, log_tilts: tuple[LogTilt, ...], drive: Tensor) -> Tensor:
    """w = lambda phi'(drive), each slot by its own log-tilt."""
    slope = torch.zeros_like(drive)
    for at, log_tilt in enumerate(log_tilts):
        slope = torch.where(state.log_tilt == at, log_tilt.slope(drive), slope)
    return state.lam * slope


def _per_slot(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *(1,) * (like.dim() - 1))
