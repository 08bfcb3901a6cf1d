"""The readout (reference_feature.readout) and its VJP as Triton kernels.

Forward: one program a sample and row of K. It streams over the tokens, keeps what pooling needs as it goes (the maximum, the sum,
and the sum of exponentials shifted by the maximum so far, for the latent and for the pre-activation), and writes the
pre-activations, which are all that the VJP needs of the tokens. A second tiny sum over K is the wrapper's.

VJP: one program a sample, block of tokens and block of the width. It reads a row's pre-activations, a few kilobytes, forms the
pooling's slope once more and writes its block of the tokens' cotangent, once. No atomics, and no program looks at another sample:
a sample's numbers are the same in any company.
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiltscope.kernels.reference_feature import LSE_TEMPERATURE, ReadOut

TOKENS = 32  # tokens a program takes at a time
VJP_TOKENS = 16  # tokens a program of the VJP writes
WIDTH = 128  # channels at a time
NUM_WARPS = 4
_ONE_OVER_T = 1 / LSE_TEMPERATURE
POINTERS = (
    "tokens_ptr",
    "direction_ptr",
    "bias_ptr",
    "threshold_ptr",
    "pooling_ptr",
    "mask_ptr",
    "pooled_ptr",
    "pre_ptr",
)
VJP_POINTERS = (
    "activation_bar_ptr",
    "drive_bar_ptr",
    "pre_ptr",
    "direction_ptr",
    "threshold_ptr",
    "weight_ptr",
    "pooling_ptr",
    "mask_ptr",
    "tokens_bar_ptr",
)
SIZES = ("rows", "num_tokens", "width")
_LOWEST = tl.constexpr(-1e37)  # below every value, and finite when divided by T


@triton.jit
def _streamed(v, inside, top, total, power, INVERSE: tl.constexpr):
    """The running (maximum, sum, sum of exp((v - maximum) / T)) after some more values."""
    higher = tl.maximum(top, tl.max(tl.where(inside, v, _LOWEST)))
    total += tl.sum(tl.where(inside, v, 0.0))
    fresh = tl.sum(tl.exp(tl.where(inside, v - higher, _LOWEST) * INVERSE))  # exp of the lowest is 0
    return higher, total, power * tl.exp((top - higher) * INVERSE) + fresh


@triton.jit
def _pooled(pooling_ptr, row, top, total, power, count, T: tl.constexpr):
    lse = top + T * tl.log(power / count)
    first = tl.load(pooling_ptr + row * 3) * top + tl.load(pooling_ptr + row * 3 + 1) * (total / count)
    return first + tl.load(pooling_ptr + row * 3 + 2) * lse


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=(*POINTERS, *SIZES))
def _readout_kernel(
    tokens_ptr,
    direction_ptr,
    bias_ptr,
    threshold_ptr,
    pooling_ptr,
    mask_ptr,
    pooled_ptr,
    pre_ptr,
    rows,
    num_tokens,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    INVERSE: tl.constexpr,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of all samples' rows
    sample = row // rows
    bias = tl.load(bias_ptr + row)
    threshold = tl.load(threshold_ptr + row)
    top_pre = tl.full((), _LOWEST, tl.float32)
    top_latent = top_pre
    sum_pre = tl.full((), 0.0, tl.float32)
    sum_latent = sum_pre
    power_pre = sum_pre
    power_latent = sum_pre
    count = sum_pre
    tokens_at = tokens_ptr + sample * num_tokens * width
    direction_at = direction_ptr + row * width
    if ALIGNED:
        tokens_at = tl.multiple_of(tokens_at, 16)
        direction_at = tl.multiple_of(direction_at, 16)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < num_tokens
        dot = tl.zeros((TOKENS, WIDTH), tl.float32)
        for first in range(0, width, WIDTH):
            channel = first + tl.arange(0, WIDTH)
            if ALIGNED:
                # Whole blocks of 8 channels are inside or outside: the mask does not narrow an access.
                within = (tl.max_constancy(channel // 8, [8]) < width // 8) & (channel >= 0)
                at = token[:, None] * (width // 8 * 8) + channel[None, :]
            else:
                within = channel < width
                at = token[:, None] * width + channel[None, :]
            tile = tl.load(tokens_at + at, mask=there[:, None] & within[None, :], other=0.0).to(tl.float32)
            dot += tile * tl.load(direction_at + channel, mask=within, other=0.0)[None, :]
        pre = tl.sum(dot, 1) + bias
        tl.store(pre_ptr + row * num_tokens + token, pre, mask=there)
        inside = there & (tl.load(mask_ptr + row * num_tokens + token, mask=there, other=0) != 0)
        latent = tl.where(pre > threshold, pre, 0.0)
        count += tl.sum(tl.where(inside, 1.0, 0.0))
        top_pre, sum_pre, power_pre = _streamed(pre, inside, top_pre, sum_pre, power_pre, INVERSE)
        top_latent, sum_latent, power_latent = _streamed(latent, inside, top_latent, sum_latent, power_latent, INVERSE)
    count = tl.maximum(count, 1.0)
    tl.store(pooled_ptr + row * 2, _pooled(pooling_ptr, row, top_latent, sum_latent, power_latent, count, T))
    tl.store(pooled_ptr + row * 2 + 1, _pooled(pooling_ptr, row, top_pre, sum_pre, power_pre, count, T))


@triton.jit
def _slope(v, here, inside, here_inside, m0, m1, m2, count, INVERSE: tl.constexpr):
    """pool's slope at `here`, some of the values v."""
    top = tl.max(tl.where(inside, v, _LOWEST))
    ties = tl.sum(tl.where(inside & (v == top), 1.0, 0.0))
    power = tl.sum(tl.exp(tl.where(inside, v - top, _LOWEST) * INVERSE))
    highest = tl.where(here == top, m0 / ties, 0.0)
    ratio = tl.exp(tl.where(here_inside, here - top, _LOWEST) * INVERSE) / power
    return tl.where(here_inside, highest + m1 / count + m2 * ratio, 0.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=(*VJP_POINTERS, *SIZES))
def _readout_vjp_kernel(
    activation_bar_ptr,
    drive_bar_ptr,
    pre_ptr,
    direction_ptr,
    threshold_ptr,
    weight_ptr,
    pooling_ptr,
    mask_ptr,
    tokens_bar_ptr,
    rows,
    num_tokens,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL: tl.constexpr,
    INVERSE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    there = token < num_tokens
    within = (channel // 8 < width // 8) if ALIGNED else (channel < width)
    every = tl.arange(0, ALL)
    activation_bar = tl.load(activation_bar_ptr + sample)
    drive_bar = tl.load(drive_bar_ptr + sample)
    made = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in range(0, rows):
        row = sample * rows + k
        at = row * num_tokens
        v = tl.load(pre_ptr + at + every, mask=every < num_tokens, other=0.0)
        inside = (every < num_tokens) & (tl.load(mask_ptr + at + every, mask=every < num_tokens, other=0) != 0)
        here = tl.load(pre_ptr + at + token, mask=there, other=0.0)
        here_inside = there & (tl.load(mask_ptr + at + token, mask=there, other=0) != 0)
        threshold = tl.load(threshold_ptr + row)
        m0 = tl.load(pooling_ptr + row * 3)
        m1 = tl.load(pooling_ptr + row * 3 + 1)
        m2 = tl.load(pooling_ptr + row * 3 + 2)
        count = tl.maximum(tl.sum(tl.where(inside, 1.0, 0.0)), 1.0)
        latent = tl.where(v > threshold, v, 0.0)
        here_latent = tl.where(here > threshold, here, 0.0)
        through = _slope(latent, here_latent, inside, here_inside, m0, m1, m2, count, INVERSE)
        share = activation_bar * tl.where(here > threshold, through, 0.0)
        share += drive_bar * _slope(v, here, inside, here_inside, m0, m1, m2, count, INVERSE)
        direction = tl.load(direction_ptr + row * width + channel, mask=within, other=0.0)
        made += (tl.load(weight_ptr + row) * share)[:, None] * direction[None, :]
    out = tokens_bar_ptr + sample * num_tokens * width
    if ALIGNED:
        out = tl.multiple_of(out, 16)
        at = token[:, None] * (width // 8 * 8) + channel[None, :]
    else:
        at = token[:, None] * width + channel[None, :]
    tl.store(out + at, made.to(tokens_bar_ptr.dtype.element_ty), mask=there[:, None] & within[None, :])


def is_aligned(width: int, *tensors: Tensor) -> bool:
    """Whether every token starts where a 128-bit access may."""
    return width % 8 == 0 and all(each.data_ptr() % 16 == 0 for each in tensors)


def readout(
    tokens: Tensor, direction: Tensor, bias: Tensor, threshold: Tensor, weight: Tensor, pooling: Tensor, mask: Tensor
) -> ReadOut:
    """Launches the forward kernel on checked arguments (dispatch.py), all contiguous."""
    batch, num_tokens, width = tokens.shape
    rows = direction.shape[1]
    pooled, pre = direction.new_empty(batch, rows, 2), direction.new_empty(batch, rows, num_tokens)
    launch: Any = _readout_kernel
    launch[(batch * rows,)](
        tokens,
        direction,
        bias,
        threshold,
        pooling,
        mask,
        pooled,
        pre,
        rows,
        num_tokens,
        width,
        TOKENS=TOKENS,
        WIDTH=WIDTH,
        INVERSE=_ONE_OVER_T,
        T=LSE_TEMPERATURE,
        ALIGNED=is_aligned(width, tokens, direction),
        num_warps=NUM_WARPS,
    )
    activation, drive = (weight[..., None] * pooled).sum(1).unbind(1)
    return ReadOut(activation.clone(), drive.clone(), pre)


def readout_vjp(
    activation_bar: Tensor,
    drive_bar: Tensor,
    pre: Tensor,
    direction: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Launches the VJP's kernel on checked arguments, all contiguous."""
    batch, rows, num_tokens = pre.shape
    width = direction.shape[2]
    made = direction.new_empty(batch, num_tokens, width, dtype=dtype)
    launch: Any = _readout_vjp_kernel
    launch[(batch, -(-num_tokens // VJP_TOKENS), -(-width // WIDTH))](
        activation_bar,
        drive_bar,
        pre,
        direction,
        threshold,
        weight,
        pooling,
        mask,
        made,
        rows,
        num_tokens,
        width,
        TOKENS=VJP_TOKENS,
        WIDTH=WIDTH,
        ALL=triton.next_power_of_2(num_tokens),
        INVERSE=_ONE_OVER_T,
        ALIGNED=is_aligned(width, made, direction),
        num_warps=NUM_WARPS,
    )
    return made
