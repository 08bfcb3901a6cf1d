"""The definition of every fused operation in plain torch: the specification of the kernels, and what runs on a CPU."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltscope.kernels.errors import ConfigError
from tiltscope.kernels.philox import normal

# Columns of a plan's row, in the order in which engine/sampler/plan.py writes them.
SIGMA, ALPHA, A, B, C, D, E, P, Q, F, R = range(11)
_STREAM_STEP = 1


class StepInputs(NamedTuple):
    """What a guided step reads: the pictures of every slot, every plan, and each slot's own scalars.

    table: every plan, cast once to the state's dtype, short ones padded with any row. drive: what guidance differentiated; NaN
    where no trunk ran. grad_a: None where no slot is guided, whatever `guided` says.
    """

    x: Float[Tensor, "batch ..."]
    x0_hat: Float[Tensor, "batch ..."]
    grad_a: Float[Tensor, "batch ..."] | None
    history: Float[Tensor, "batch ..."]
    table: Float[Tensor, "plan row 11"]
    num_rows: Int[Tensor, "plan"]
    plan: Int[Tensor, "batch"]
    row: Int[Tensor, "batch"]
    ok: Bool[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    strength: Float[Tensor, "batch"]
    guided: Bool[Tensor, "batch"]
    key: Int[Tensor, "batch 2"]
    index: Int[Tensor, "batch"]  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody looks a tensor up in it
    particle: Int[Tensor, "batch"]


def require_rows(inputs: StepInputs) -> None:
    """Raises ConfigError unless every slot's plan and row are there. For the CPU, where looking costs nothing."""
    num_plans, longest = inputs.table.shape[:2]
    lengths, plans, rows = inputs.num_rows.tolist(), inputs.plan.tolist(), inputs.row.tolist()
    if not all(1 <= length <= longest for length in lengths):
        raise ConfigError(f"num_rows: got {lengths}, allowed are 1 to {longest}, the rows of table")
    if not all(0 <= each < num_plans for each in plans):
        raise ConfigError(f"plan: got {plans}, allowed are 0 to {num_plans - 1}, the plans of table")
    ends = [lengths[each] for each in plans]
    if not all(0 <= each <= end for each, end in zip(rows, ends, strict=True)):
        raise ConfigError(f"row: got {rows}, allowed are 0 to {ends}, which is a slot that has done its plan")


class GuidedUpdate(NamedTuple):
    """What one row of the table makes of every slot; the statistics are per slot."""

    x: Float[Tensor, "batch ..."]
    history: Float[Tensor, "batch ..."]
    grad_norm_sq: Float[Tensor, "batch"]
    delta_norm_sq: Float[Tensor, "batch"]
    z_dot_delta: Float[Tensor, "batch"]
    finite: Bool[Tensor, "batch"]


class GuidedStep(NamedTuple):
    """What one guided step returns: the slots, advanced where they could, and their statistics."""

    x: Float[Tensor, "batch ..."]
    history: Float[Tensor, "batch ..."]
    row: Int[Tensor, "batch"]
    ok: Bool[Tensor, "batch"]
    grad_norm_sq: Float[Tensor, "batch"]
    delta_norm_sq: Float[Tensor, "batch"]
    z_dot_delta: Float[Tensor, "batch"]


def guided_update(
    x: Float[Tensor, "batch ..."],
    x0_hat: Float[Tensor, "batch ..."],
    grad_a: Float[Tensor, "batch ..."] | None,
    history: Float[Tensor, "batch ..."],
    coefficients: Float[Tensor, "batch 11"],
    strength: Float[Tensor, "batch"],
    guided: Bool[Tensor, "batch"],
    key: Int[Tensor, "batch 2"],
    index: Int[Tensor, "batch"],
    row: Int[Tensor, "batch"],
    particle: Int[Tensor, "batch"],
) -> GuidedUpdate:
    """One row of a plan for every slot (design: engine/sampler/plan.py).

        delta = e w grad_a;   x' = a x + b D + delta + c z + d H;   H' = p x + q D + f w grad_a + r H

    `coefficients` holds each slot's own row, cast once to the state's dtype; `strength` is w. Where `guided` is False delta
    is exactly 0, whatever grad_a holds: selected, never multiplied, so an unguided slot cannot inherit a NaN.
    Without grad_a no slot is guided, and the statistics are 0.
    In the mixed form D and grad_a are of a lower precision (bfloat16, float16) than x: they are widened first.
    """
    x0_hat = x0_hat.to(x.dtype)
    shape = tuple(x.shape[1:])

    def per_slot(v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * len(shape))

    def column(at: int) -> Tensor:
        return per_slot(coefficients[:, at])

    z = normal(key, index, row, particle, stream=_STREAM_STEP, shape=shape, dtype=x.dtype)
    push = nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    if grad_a is not None:
        grad_a = grad_a.to(x.dtype)
        push = torch.where(per_slot(guided), per_slot(strength) * grad_a, nothing)
    delta = column(E) * push
    moved = column(A) * x + column(B) * x0_hat + delta + column(C) * z + column(D) * history
    remembered = column(P) * x + column(Q) * x0_hat + column(F) * push + column(R) * history
    finite = torch.isfinite(moved).flatten(1).all(dim=1) & torch.isfinite(remembered).flatten(1).all(dim=1)
    over = tuple(range(1, x.dim()))
    summed = ((grad_a, grad_a), (delta, delta), (z, delta)) if grad_a is not None else ()
    statistics = [(each * other).sum(over) for each, other in summed] or [x.new_zeros(len(x)) for _ in range(3)]
    return GuidedUpdate(moved, remembered, *statistics, finite=finite)


def guided_step(inputs: StepInputs) -> GuidedStep:
    """Every slot advances by its own row of its own plan; the row counters advance with it, on the device.

        x+, H+, statistics = guided_update at table[plan, row]     guided where the slot is active and `guided`
        active = row < num_rows[plan]
        sound  = x+ and H+ are finite, and drive is where the slot is guided
        moves  = active and ok and sound
        x', H' = x+, H+ where it moves, else x, H        row' = row + moves        ok' = ok and (sound or not active)

    A slot that has done its plan (row = num_rows) or failed (not ok) keeps its state bit for bit, and so does one that fails
    now: x stays at its last good value. Reads x, D, grad_a, H once and writes x', H' once: 24 bytes an element in float32, 20
    with D and grad_a in 16 bits; bound by memory bandwidth. Without grad_a no slot is guided: a row of the denoiser alone.
    """
    x, x0_hat, grad_a, history, table, num_rows, plan, row, ok, drive, strength, guided, key, index, particle = inputs
    active = row < num_rows[plan]
    here = table[plan, row.clamp(max=table.shape[1] - 1)]
    guided = guided & active if grad_a is not None else torch.zeros_like(ok)
    moved = guided_update(x, x0_hat, grad_a, history, here, strength, guided, key, index, row, particle)
    sound = moved.finite & (torch.isfinite(drive) | ~guided)
    moves = active & ok & sound
    keep = ~moves.reshape(-1, *(1,) * (x.dim() - 1))
    return GuidedStep(
        x=torch.where(keep, x, moved.x),
        history=torch.where(keep, history, moved.history),
        row=row + moves,
        ok=ok & (sound | ~active),
        grad_norm_sq=moved.grad_norm_sq,
        delta_norm_sq=moved.delta_norm_sq,
        z_dot_delta=moved.z_dot_delta,
    )


class Resampled(NamedTuple):
    """What resampling decides, for every group of particles."""

    ancestor: Int[Tensor, "group particle"]
    log_mean: Float[Tensor, "group"]
    due: Bool[Tensor, "group"]


def resample(
    log_weight: Float[Tensor, "group particle"], u: Float[Tensor, "group"], threshold: float = 0.5
) -> Resampled:
    """Systematic resampling where a group's effective sample size is low; else every particle is its own ancestor.

        W = softmax(log_weight)      due: 1 / sum W^2 < threshold * P      log_mean = log (1/P) sum exp(log_weight)
        ancestor_i = smallest j with W_0 + ... + W_j >= (i + u) / P

    u in (0, 1], one a group. A weight of exactly 0 (log-weight -inf) is nobody's ancestor; a group of nothing else is never due,
    and its log_mean is -inf. Selected by masks, never branched on. Source: Kitagawa 1996; Douc, Cappe, Moulines 2005.
    Reads 8 P bytes and writes 8 P a group: latency-bound.
    """
    num = log_weight.shape[1]
    top = log_weight.amax(1, keepdim=True)
    alive = torch.isfinite(top)
    ratio = torch.exp(
        (log_weight - torch.where(alive, top, 0.0)).double()
    )  # float64: a running sum of up to 2^16 weights
    total = ratio.sum(1, keepdim=True)
    weight = ratio / torch.where(alive, total, 1.0)
    log_mean = torch.where(alive, top + torch.log(total / num), -torch.inf)[:, 0].to(log_weight.dtype)
    due = alive[:, 0] & (1 / (weight * weight).sum(1) < threshold * num)
    own = torch.arange(num, device=log_weight.device)
    # The end of the running sum is 1 but for rounding: a place beyond it belongs to the last particle that weighs anything.
    last = torch.where(weight > 0, own, 0).amax(1, keepdim=True)
    places = (own + u.double()[:, None]) / num
    found = torch.searchsorted(weight.cumsum(1), places).minimum(last)
    return Resampled(torch.where(due[:, None], found, own.expand_as(found)), log_mean, due)
