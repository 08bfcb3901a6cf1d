"""The guided step (reference.guided_step) as one Triton kernel: one launch, 4 reads and 2 writes an element, noise drawn inside.

A program owns GROUPS groups of four consecutive elements of one sample: a group is what one Philox counter yields, and 128 bits
of float32. Where samples start on a multiple of four elements (ALIGNED) every access to x, H, x', H' is 128 bits wide, and of
16-bit D and grad_a 64, which keeps all tensors in one register layout: no trip through shared memory.

How a sample is cut depends on its size alone, never on the batch. Every program writes its part of the four statistics; the one
that arrives last (a ticket a sample, counted up by an atomic that releases and acquires) adds them up in a fixed order. So a
sample's numbers are the same in any company, bit for bit, in one launch. That last program also advances the slot, and where the
sample turned out not to be finite it puts the old state back, the only case in which anything is read twice.

Channels last, elements of a group lie apart in memory: each computes its own counter, four times the arithmetic for the same
bytes and the same numbers.
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiltscope.kernels.reference import GuidedStep, StepInputs
from tiltscope.kernels.triton_philox import four_normals, one_normal

GROUPS = 256  # groups of four elements a program: 1024 elements, 8 a thread
PARTS = 128  # partial sums that the last program adds up at a time
NUM_WARPS = 4
_COLUMNS = 11
POINTERS = (
    "x_ptr",
    "x0_hat_ptr",
    "grad_a_ptr",
    "history_ptr",
    "table_ptr",
    "num_rows_ptr",
    "plan_ptr",
    "row_ptr",
    "ok_ptr",
    "drive_ptr",
    "strength_ptr",
    "guided_ptr",
    "key_ptr",
    "index_ptr",
    "particle_ptr",
    "x_out_ptr",
    "history_out_ptr",
    "row_out_ptr",
    "ok_out_ptr",
    "grad_norm_sq_ptr",
    "delta_norm_sq_ptr",
    "z_dot_delta_ptr",
    "part_ptr",
    "ticket_ptr",
)
SIZES = (
    "num_plans",
    "longest",
    "n",
    "channels",
    "blocks",
    "stride_xb",
    "stride_db",
    "stride_gb",
    "stride_hb",
    "stride_ob",
)


@triton.jit
def _is_finite(v):
    return tl.abs(v) <= 3.4028234663852886e38


@triton.jit
def _tile(ptr, offset, at, inside, ALIGNED: tl.constexpr):
    """[GROUPS, 4] elements in float32; 0 outside."""
    base = ptr + offset
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, offset, at, value, inside, ALIGNED: tl.constexpr):
    base = ptr + offset
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    tl.store(base + at, value, mask=inside)


# What is promised about alignment is ALIGNED, and nothing else: were a pointer's own alignment looked at, the layout, and with it
# the order of the sums, would depend on where a batch begins.
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=(*POINTERS, *SIZES))
def _guided_step_kernel(
    x_ptr,
    x0_hat_ptr,
    grad_a_ptr,
    history_ptr,
    table_ptr,
    num_rows_ptr,
    plan_ptr,
    row_ptr,
    ok_ptr,
    drive_ptr,
    strength_ptr,
    guided_ptr,
    key_ptr,
    index_ptr,
    particle_ptr,
    x_out_ptr,
    history_out_ptr,
    row_out_ptr,
    ok_out_ptr,
    grad_norm_sq_ptr,
    delta_norm_sq_ptr,
    z_dot_delta_ptr,
    part_ptr,
    ticket_ptr,
    num_plans,
    longest,
    n,
    channels,
    blocks,
    stride_xb,
    stride_db,
    stride_gb,
    stride_hb,
    stride_ob,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SINGLE: tl.constexpr,
):
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks

    # Who the slot is and where it stands. A plan or a row that does not exist reads the nearest that does, and moves nothing.
    plan = tl.load(plan_ptr + sample)
    row = tl.load(row_ptr + sample)
    near_plan = tl.minimum(tl.maximum(plan, 0), num_plans - 1)
    active = (row < tl.load(num_rows_ptr + near_plan)) & (row >= 0) & (plan == near_plan)
    near_row = tl.minimum(tl.maximum(row, 0), longest - 1)
    coefficients = table_ptr + (near_plan * longest + near_row) * 11
    guided = (tl.load(guided_ptr + sample) != 0) & active
    ok = tl.load(ok_ptr + sample) != 0
    sound = _is_finite(tl.load(drive_ptr + sample)) | (guided == 0)
    may = active & ok & sound
    strength = tl.load(strength_ptr + sample)
    k0 = tl.load(key_ptr + sample * 2).to(tl.uint32)
    k1 = tl.load(key_ptr + sample * 2 + 1).to(tl.uint32)
    c1 = row.to(tl.uint32)
    c2 = (1 | (tl.load(particle_ptr + sample) << 16)).to(tl.uint32)  # stream 1: a step's noise
    c3 = tl.load(index_ptr + sample).to(tl.uint32)

    wide = sample.to(tl.int64)
    x_at = wide * stride_xb
    d_at = wide * stride_db
    g_at = wide * stride_gb
    h_at = wide * stride_hb
    o_at = wide * stride_ob
    group = block * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = (group < n // 4)[:, None] & (tl.arange(0, 4) < 4)[None, :] if ALIGNED else at < n

    x = _tile(x_ptr, x_at, at, inside, ALIGNED)
    x0_hat = _tile(x0_hat_ptr, d_at, at, inside, ALIGNED)
    grad_a = _tile(grad_a_ptr, g_at, at, inside, ALIGNED)
    history = _tile(history_ptr, h_at, at, inside, ALIGNED)

    if CHANNELS_LAST:
        logical = (at % channels) * (n // channels) + at // channels
        zero = at.to(tl.uint32) * 0
        z = one_normal(logical % 4, (logical // 4).to(tl.uint32), zero + c1, zero + c2, zero + c3, zero + k0, zero + k1)
    else:
        zero = group.to(tl.uint32) * 0
        z0, z1, z2, z3 = four_normals(group.to(tl.uint32), zero + c1, zero + c2, zero + c3, zero + k0, zero + k1)
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [GROUPS, 4])

    a = tl.load(coefficients + 2)
    b = tl.load(coefficients + 3)
    c = tl.load(coefficients + 4)
    d = tl.load(coefficients + 5)
    e = tl.load(coefficients + 6)
    p = tl.load(coefficients + 7)
    q = tl.load(coefficients + 8)
    f = tl.load(coefficients + 9)
    r = tl.load(coefficients + 10)

    # Selected, never multiplied: an unguided slot cannot inherit a NaN.
    push = tl.where(guided, strength * grad_a, 0.0)
    delta = e * push
    moved = a * x + b * x0_hat + delta + c * z + d * history
    remembered = p * x + q * x0_hat + f * push + r * history
    broken = tl.where(_is_finite(moved) & _is_finite(remembered), 0.0, 1.0)
    grad_norm_sq = tl.sum(grad_a * grad_a)
    delta_norm_sq = tl.sum(delta * delta)
    z_dot_delta = tl.sum(z * delta)
    num_broken = tl.sum(broken)

    if SINGLE:
        may = may & (num_broken == 0)
    _put(x_out_ptr, o_at, at, tl.where(may, moved, x), inside, ALIGNED)
    _put(history_out_ptr, o_at, at, tl.where(may, remembered, history), inside, ALIGNED)

    if SINGLE:
        tl.store(grad_norm_sq_ptr + sample, grad_norm_sq)
        tl.store(delta_norm_sq_ptr + sample, delta_norm_sq)
        tl.store(z_dot_delta_ptr + sample, z_dot_delta)
        tl.store(row_out_ptr + sample, row + may.to(tl.int64))
        tl.store(ok_out_ptr + sample, ok & (may | (active == 0)))
    else:
        parts = part_ptr + wide * blocks * 4
        tl.store(parts + block, grad_norm_sq)
        tl.store(parts + blocks + block, delta_norm_sq)
        tl.store(parts + 2 * blocks + block, z_dot_delta)
        tl.store(parts + 3 * blocks + block, num_broken)
        tl.debug_barrier()  # all of this program's stores come before its ticket
        arrived = tl.atomic_add(ticket_ptr + sample, 1, sem="acq_rel", scope="gpu")
        if arrived == blocks - 1:
            tl.debug_barrier()
            sum_g = tl.zeros((PARTS,), tl.float32)
            sum_d = tl.zeros((PARTS,), tl.float32)
            sum_z = tl.zeros((PARTS,), tl.float32)
            sum_b = tl.zeros((PARTS,), tl.float32)
            for start in range(0, blocks, PARTS):
                part = start + tl.arange(0, PARTS)
                there = part < blocks
                # .cg: past the first-level cache, which other programs' stores do not reach.
                sum_g += tl.load(parts + part, mask=there, other=0.0, cache_modifier=".cg")
                sum_d += tl.load(parts + blocks + part, mask=there, other=0.0, cache_modifier=".cg")
                sum_z += tl.load(parts + 2 * blocks + part, mask=there, other=0.0, cache_modifier=".cg")
                sum_b += tl.load(parts + 3 * blocks + part, mask=there, other=0.0, cache_modifier=".cg")
            all_finite = tl.sum(sum_b) == 0
            tl.store(grad_norm_sq_ptr + sample, tl.sum(sum_g))
            tl.store(delta_norm_sq_ptr + sample, tl.sum(sum_d))
            tl.store(z_dot_delta_ptr + sample, tl.sum(sum_z))
            moves = may & all_finite
            tl.store(row_out_ptr + sample, row + moves.to(tl.int64))
            tl.store(ok_out_ptr + sample, ok & (moves | (active == 0)))
            tl.store(ticket_ptr + sample, 0)  # as it was found, for the next launch
            if may & (all_finite == 0):
                for start in range(0, n, PARTS):
                    back = start + tl.arange(0, PARTS)
                    here = back < n
                    tl.store(x_out_ptr + o_at + back, tl.load(x_ptr + x_at + back, mask=here), mask=here)
                    old = tl.load(history_ptr + h_at + back, mask=here)
                    tl.store(history_out_ptr + o_at + back, old, mask=here)


def blocks_of(n: int) -> int:
    """How many programs share a sample of n elements."""
    return -(-n // (4 * GROUPS))


def is_aligned(n: int, state: tuple[Tensor, ...], network: tuple[Tensor, ...]) -> bool:
    """Whether every sample of every tensor starts where 128-bit (16-bit types: 64-bit) accesses may."""
    return n % 4 == 0 and all(
        each.data_ptr() % 16 == 0 and (each.shape[0] == 1 or each.stride(0) % 4 == 0) for each in (*state, *network)
    )


def guided_step(inputs: StepInputs, ticket: Tensor | None = None) -> GuidedStep:
    """Launches the kernel on checked arguments (dispatch.py); x, x0_hat, grad_a, history all in C order or all channels last.

    ticket: int32 [batch] of zeros, which the launch leaves zero; a caller that keeps one for its stream spares the fill.
    """
    x, x0_hat, grad_a, history, *scalars = inputs
    assert grad_a is not None  # dispatch.py has seen to it
    batch, n = x.shape[0], x[0].numel()
    blocks = blocks_of(n)
    channels_last = not x[:1].is_contiguous()
    made, remembered = torch.empty_like(x), torch.empty_like(x)
    row_out, ok_out = torch.empty_like(inputs.row), torch.empty_like(inputs.ok)
    stats = [x.new_empty(batch) for _ in range(3)]
    if blocks > 1:
        parts = x.new_empty(batch, 4, blocks)
        ticket = torch.zeros(batch, dtype=torch.int32, device=x.device) if ticket is None else ticket
    else:
        parts = ticket = x  # not touched
    launch: Any = _guided_step_kernel
    launch[(batch * blocks,)](
        x,
        x0_hat,
        grad_a,
        history,
        *(each.contiguous() for each in scalars),
        made,
        remembered,
        row_out,
        ok_out,
        *stats,
        parts,
        ticket,
        *inputs.table.shape[:2],
        n,
        x.shape[1] if channels_last else 1,
        blocks,
        *(each.stride(0) for each in (x, x0_hat, grad_a, history, made)),
        GROUPS=GROUPS,
        PARTS=PARTS,
        ALIGNED=is_aligned(n, (x, history, made, remembered), (x0_hat, grad_a)),
        CHANNELS_LAST=channels_last,
        SINGLE=blocks == 1,
        num_warps=NUM_WARPS,
    )
    return GuidedStep(made, remembered, row_out, ok_out, *stats)
