"""A batch of slots: what a tick (tick.py) advances. A checkpoint is the SlotState.

Samples at different rows, of different plans, lambdas, log-tilts and seeds share a batch; with particles, each sample is a
group of slots that stand together. The host mirrors the row counters, which are deterministic, so it knows which graphs a tick
needs without asking the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.step import Step
from tiltscope.engine.sampler.lifts import Dps, Lift, Slots
from tiltscope.engine.sampler.noise import STREAM_START, seed_key
from tiltscope.engine.sampler.plan import GraphKind, Plan
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.tilt.log_tilt import LogTilt
from tiltscope.kernels.dispatch import normal_of
from tiltscope.kernels.implementation import Implementation

CPU = torch.device("cpu")
EVERY = slice(None)
_SIGMA, _ALPHA = COLUMNS.index("sigma"), COLUMNS.index("alpha")
_UNGUIDED, _GUIDED = int(GraphKind.UNGUIDED), int(GraphKind.GUIDED)


@dataclass(frozen=True)
class HostRows:
    """The host's mirror of the slots: plan and row of each, and whether it is tilted at all (lam != 0).

    Tuples: of as few slots as a batch has, Python is done before numpy has begun.
    """

    plan: tuple[int, ...]
    row: tuple[int, ...]
    tilted: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """A batch of slots. Words of `key`: low and high half of the seed. `plan`, `log_tilt`: places in the Programme.

    `row` counts the rows a slot has done; it stops, with x at its last good value, where a slot became non-finite (ok False).
    Of the particle-corrected sampler (particles.py), constant without it: the particles of a sample are a `group`; `log_weight`,
    `log_twist` and `lineage` (the start it descends from) are a particle's own, `log_z` is what its group has banked.
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
    log_z: Float[Tensor, "batch"]
    lineage: Int[Tensor, "batch"]
    ok: Bool[Tensor, "batch"]
    host: HostRows

    def advanced(self, **changed: Any) -> "SlotState":
        """replace(self, **changed), in a fifth of its time: it stands in every tick."""
        after = object.__new__(SlotState)
        after.__dict__.update(self.__dict__, **changed)
        return after

    def to(self, device: torch.device) -> "SlotState":
        """The same slots there; themselves where they are there already."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, readout=None if self.readout is None else self.readout.to(self.x.dtype, device))


SLOT_TENSORS = tuple(each.name for each in fields(SlotState) if each.name not in ("readout", "host"))
"""SlotState's fields that are one tensor: what is stacked, checkpointed and held at fixed addresses"""


class Need(NamedTuple):
    """Which networks a call on one bucket of slots runs. The host knows it before the tick, so it decides what a graph captures.

    unguided: the denoiser alone. guided: the lift. reads: with particles, unguided rows of tilted slots read their feature too.
    """

    unguided: bool
    guided: bool
    reads: bool


class Observation(NamedTuple):
    """What one tick saw; activation and drive are NaN for slots on an unguided row."""

    x0_hat: Float[Tensor, "batch ..."]
    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    grad_norm_sq: Float[Tensor, "batch"]
    delta_norm_sq: Float[Tensor, "batch"]
    z_dot_delta: Float[Tensor, "batch"]


class Sight(NamedTuple):
    """What the networks and the lift (lifts.py) say of each slot before it moves: by e * strength * grad, where it is guided.

    activation, drive and log_twist are NaN where no trunk ran. grad: None, and strength NaN, where no slot is guided. v: what the
    network says of the noise (learned_noise.py), None where no plan asks.
    """

    x0_hat: Float[Tensor, "batch ..."]
    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    grad: Float[Tensor, "batch ..."] | None
    strength: Float[Tensor, "batch"]
    log_twist: Float[Tensor, "batch"]
    guided: Bool[Tensor, "batch"]
    v: Float[Tensor, "batch ..."] | None

    def of(self, slots: Int[Tensor, "some"]) -> "Sight":
        """Some of the slots, in that order."""
        chosen: list[Any] = [None if each is None else each[slots] for each in self]
        return Sight(*chosen)

    @staticmethod
    def joined(parts: Sequence["Sight"]) -> "Sight":
        """The slots of all, in order; where one part has a gradient, those without have one of zeros."""
        if any(part.grad is not None for part in parts):
            parts = [
                part if part.grad is not None else part._replace(grad=torch.zeros_like(part.x0_hat)) for part in parts
            ]
        whole: list[Any] = [None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)]
        return Sight(*whole)


@dataclass(frozen=True)
class Programme:
    """What the slots refer to: the plans, the log-tilts, the lift and the networks, in the state's dtype.

    device: where slots, tables and networks are. kernels: which implementation of the fused operations runs
    (kernels/dispatch.py). particles: slots a sample. bucket: slots that a network call takes, None for all of them at once.
    start: a picture x0 that every slot sets out from, noised to the plan's first level; None: from noise alone.
    """

    plans: tuple[Plan, ...]
    log_tilts: tuple[LogTilt, ...]
    step: Step
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = CPU
    kernels: Implementation = "reference"
    lift: Lift = field(default_factory=Dps)
    particles: int = 1
    bucket: int | None = None
    start: Float[Tensor, "..."] | None = None

    @cached_property
    def table(self) -> Float[Tensor, "plan row 11"]:
        """All plans in float64, short ones padded with their last row."""
        longest = max(plan.num_rows for plan in self.plans)
        table = np.zeros((len(self.plans), longest, len(COLUMNS)))
        for at, plan in enumerate(self.plans):
            table[at, : plan.num_rows], table[at, plan.num_rows :] = plan.table, plan.table[-1]
        return torch.from_numpy(table).to(self.device)

    @cached_property
    def coefficients(self) -> Float[Tensor, "plan row 11"]:
        """`table` cast once to the state's dtype."""
        return self.table.to(self.dtype)

    @cached_property
    def log_variance(self) -> Float64[Tensor, "plan row 2"] | None:
        """Bounds of the noise that the network sizes, NaN where a plan's row has its own; None where no plan asks for it."""
        if all(plan.log_variance is None for plan in self.plans):
            return None
        longest = max(plan.num_rows for plan in self.plans)
        bounds = np.full((len(self.plans), longest, 2), np.nan)
        for at, plan in enumerate(self.plans):
            if plan.log_variance is not None:
                bounds[at, : plan.num_rows] = plan.log_variance
        return torch.from_numpy(bounds).to(self.device)

    @cached_property
    def num_rows(self) -> Int[Tensor, "plan"]:
        return torch.tensor([plan.num_rows for plan in self.plans], device=self.device)

    @cached_property
    def levels(self) -> tuple[Float64[Tensor, "plan row"], Float64[Tensor, "plan row"]]:
        """sigma and alpha of every plan's every row; a slot that has done its plan stays at the last."""
        rows = torch.cat([self.table, self.table[:, -1:]], 1)
        return rows[..., _SIGMA].contiguous(), rows[..., _ALPHA].contiguous()

    @cached_property
    def kinds_of_rows(self) -> tuple[tuple[int, ...], ...]:
        """The graph of every plan's every row, then -1."""
        longest = max(plan.num_rows for plan in self.plans)
        return tuple((*plan.kind.tolist(), *(-1,) * (longest + 1 - plan.num_rows)) for plan in self.plans)

    @cached_property
    def guided_rows(self) -> Bool[Tensor, "plan row"]:
        """`kinds_of_rows` on the device: where a row is guided, for slots that are tilted."""
        return (torch.tensor(self.kinds_of_rows) == _GUIDED).to(self.device)

    def kinds(self, host: HostRows) -> list[int]:
        """The graph each slot's next row needs; -1 for a slot that has done its plan. An untilted slot is unguided."""
        kinds = [self.kinds_of_rows[plan][row] for plan, row in zip(host.plan, host.row, strict=True)]
        if self.lift.moves_x0:
            return kinds
        return [kind if tilted else min(kind, _UNGUIDED) for kind, tilted in zip(kinds, host.tilted, strict=True)]

    def ahead(self, host: HostRows) -> tuple[tuple[Need, ...], HostRows]:
        """What the next tick runs, one a network call, and the host's mirror after it."""
        kinds, tilted = self.kinds(host), host.tilted
        size = self.bucket or len(kinds)
        needs = tuple(self._need(kinds[at : at + size], tilted[at : at + size]) for at in range(0, len(kinds), size))
        row = tuple(row + (kind >= 0) for row, kind in zip(host.row, kinds, strict=True))
        return needs, HostRows(plan=host.plan, row=row, tilted=tilted)

    def _need(self, kinds: Sequence[int], tilted: Sequence[bool]) -> Need:
        reads = self.particles > 1 and any(at == _UNGUIDED and on for at, on in zip(kinds, tilted, strict=True))
        return Need(unguided=_UNGUIDED in kinds, guided=_GUIDED in kinds, reads=reads)


def rows_of(state: SlotState, programme: Programme) -> Float[Tensor, "batch 11"]:
    """Each slot's own row of its own plan, float64."""
    table = programme.table
    return table[state.plan, state.row.clamp(max=table.shape[1] - 1)]


def guided_of(state: SlotState, programme: Programme) -> Bool[Tensor, "batch"]:
    """Whether each slot's next row is guided, from the tables: no host value enters a tick."""
    guided = programme.guided_rows.take(_place(state, programme.guided_rows))
    return guided if programme.lift.moves_x0 else guided & (state.lam != 0)


def _place(state: SlotState, table: Shaped[Tensor, "plan row"]) -> Int[Tensor, "batch"]:
    """Where each slot's next row stands in a table of one number a row: indexing by two tensors takes four times as long."""
    return torch.add(state.row, state.plan, alpha=table.shape[1])


def slots_of(state: SlotState, programme: Programme, part: slice = EVERY) -> Slots:
    """Some of the slots as a lift sees them."""
    sigma, alpha = programme.levels
    place = _place(state, sigma)
    slots = Slots(
        x=state.x,
        sigma=sigma.take(place),
        alpha=alpha.take(place),
        readout=state.readout,
        lam=state.lam,
        log_tilt=state.log_tilt,
        log_tilts=programme.log_tilts,
        key=state.key,
        index=state.index,
        row=state.row,
        particle=state.particle,
    )
    return slots if part == EVERY else slots.of(part)


def per_slot(values: Tensor, like: Tensor) -> Tensor:
    """values [batch] as [batch, 1, ...], to broadcast over pictures like `like`."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def admit(
    programme: Programme,
    *,
    seed: int,
    indices: NDArray[np.int64],
    lam: NDArray[np.float64],
    readout: Readout | None,
    bucket: int,
) -> SlotState:
    """Fresh slots for `indices` of one seed at row 0, x ~ N(0, I) or the start noised, `programme.particles` of them each.

    bucket: slots in all; the rest is unguided padding, which repeats the first index. readout: of the one feature asked for
    (batch 1), repeated over the slots.
    """
    num, each = len(indices), programme.particles
    padding = bucket - num * each

    def placed(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(programme.device)

    index = placed(np.concatenate([np.repeat(indices, each), np.repeat(indices[:1], padding)]))
    particle = placed(np.concatenate([np.tile(np.arange(each), num), np.arange(padding)]))
    group = placed(np.concatenate([np.repeat(np.arange(num), each), np.full(padding, num)]))
    strength = placed(np.concatenate([np.repeat(lam, each), np.zeros(padding)])).to(programme.dtype)
    zeros = torch.zeros(bucket, dtype=torch.int64, device=programme.device)
    zero = torch.zeros(bucket, dtype=programme.dtype, device=programme.device)
    key = placed(np.array([seed_key(seed)], np.int64)).expand(bucket, 2)
    normal = normal_of(programme.kernels)
    x = normal(key, index, zeros, particle, stream=STREAM_START, shape=programme.shape, dtype=programme.dtype)
    if programme.start is not None:
        sigma, alpha = (float(programme.table[0, 0, at]) for at in (_SIGMA, _ALPHA))
        x = alpha * programme.start + sigma * x
    return SlotState(
        x=x,
        history=torch.zeros_like(x),
        row=zeros,
        key=key,
        index=index,
        particle=particle,
        group=group,
        plan=zeros,
        readout=None if readout is None else readout.expand(bucket),
        lam=strength,
        log_tilt=zeros,
        log_weight=zero,
        log_twist=zero,
        log_z=zero,
        lineage=particle,
        ok=torch.ones(bucket, dtype=torch.bool, device=programme.device),
        host=HostRows(
            plan=(0,) * bucket,
            row=(0,) * bucket,
            # Of what the device holds: a lambda that rounds to 0 there is 0 here.
            tilted=tuple((strength != 0).tolist()),
        ),
    )
