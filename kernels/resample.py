"""Systematic resampling (reference.resample) as one Triton kernel: a program a group of particles, everything in float64.

A place's ancestor is the number of running sums below it, counted: groups are small (dispatch.MAX_PARTICLES), and counting
branches nowhere. Latency-bound: 8 P bytes read and 8 P written a group.
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiltscope.kernels.reference import Resampled

TILE = 1024  # comparisons at a time
NUM_WARPS = 4
POINTERS = ("log_weight_ptr", "u_ptr", "ancestor_ptr", "log_mean_ptr", "due_ptr")


@triton.jit(do_not_specialize=("num",), do_not_specialize_on_alignment=("num", *POINTERS))
def _resample_kernel(
    log_weight_ptr,
    u_ptr,
    ancestor_ptr,
    log_mean_ptr,
    due_ptr,
    num,
    ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, ALL)
    there = own < num
    log_weight = tl.load(log_weight_ptr + group * num + own, mask=there, other=float("-inf")).to(tl.float64)
    # The maximum passes over a NaN: one NaN, or nothing but -inf, and the group is left alone.
    top = tl.max(log_weight)
    alive = (tl.abs(top) < float("inf")) & (tl.sum((log_weight != log_weight).to(tl.int32)) == 0)
    ratio = tl.where(there, tl.exp(log_weight - tl.where(alive, top, 0.0)), 0.0)
    total = tl.sum(ratio)
    weight = ratio / tl.where(alive, total, 1.0)
    effective = 1.0 / tl.where(alive, tl.sum(weight * weight), 1.0)
    due = alive & (effective < THRESHOLD * num)
    log_mean = tl.where(alive, top + tl.log(tl.where(alive, total, 1.0) / num), float("-inf"))
    tl.store(log_mean_ptr + group, log_mean.to(log_mean_ptr.dtype.element_ty))
    tl.store(due_ptr + group, due)
    reached = tl.cumsum(weight, 0)
    # The end of the running sum is 1 but for rounding: a place beyond it belongs to the last particle that weighs anything.
    last = tl.max(tl.where(weight > 0, own, 0))
    u = tl.load(u_ptr + group).to(tl.float64)
    for start in range(0, num, CHUNK):
        particle = start + tl.arange(0, CHUNK)
        place = (particle + u) / num
        found = tl.sum((reached[None, :] < place[:, None]).to(tl.int32), 1)
        ancestor = tl.where(due, tl.minimum(found, last), particle)
        tl.store(ancestor_ptr + group * num + particle, ancestor.to(tl.int64), mask=particle < num)


def resample(log_weight: Tensor, u: Tensor, threshold: float = 0.5) -> Resampled:
    """Launches the kernel on checked arguments (dispatch.py)."""
    groups, num = log_weight.shape
    every = triton.next_power_of_2(num)
    ancestor = log_weight.new_empty(groups, num, dtype=torch.int64)
    log_mean, due = log_weight.new_empty(groups), log_weight.new_empty(groups, dtype=torch.bool)
    launch: Any = _resample_kernel
    launch[(groups,)](
        log_weight.contiguous(),
        u.contiguous(),
        ancestor,
        log_mean,
        due,
        num,
        ALL=every,
        CHUNK=min(every, max(1, TILE // every)),
        THRESHOLD=threshold,
        num_warps=NUM_WARPS,
    )
    return Resampled(ancestor, log_mean, due)
