"""Rows of an encoder at every token (reference_feature.sae_rows) and their VJP as Triton kernels, one launch each.

Forward: one program a sample, row of K and block of tokens. For each tap of the window it adds direction . token over the tokens
one shift away; taps and tokens are read again by other programs, from the cache. VJP: one program a sample, block of tokens and
block of the width, which gathers from every row and tap what reached its tokens. No atomics, and no program looks at another
sample: a sample's numbers are the same in any company. A linear encoder is a window of one tap on a grid of one line.
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # tokens a program takes at a time
VJP_TOKENS = 16  # tokens a program of the VJP writes
WIDTH = 128  # channels at a time
NUM_WARPS = 4
POINTERS = ("tokens_ptr", "direction_ptr", "bias_ptr", "pre_ptr")
VJP_POINTERS = ("pre_bar_ptr", "direction_ptr", "tokens_bar_ptr")
SIZES = (
    "rows",
    "width",
    "grid_h",
    "grid_w",
    "window_h",
    "window_w",
    "stride_db",
    "stride_dk",
    "stride_dc",
    "stride_dt",
)


@triton.jit
def _within(channel, width, ALIGNED: tl.constexpr):
    """Whole blocks of 8 channels are inside or outside where tokens are aligned: the mask does not narrow an access."""
    if ALIGNED:
        return (tl.max_constancy(channel // 8, [8]) < width // 8) & (channel >= 0)
    return channel < width


@triton.jit
def _places(token, channel, width, ALIGNED: tl.constexpr):
    if ALIGNED:
        return token[:, None] * (width // 8 * 8) + channel[None, :]
    return token[:, None] * width + channel[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=(*POINTERS, *SIZES))
def _sae_rows_kernel(
    tokens_ptr,
    direction_ptr,
    bias_ptr,
    pre_ptr,
    rows,
    width,
    grid_h,
    grid_w,
    window_h,
    window_w,
    stride_db,
    stride_dk,
    stride_dc,
    stride_dt,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of all samples' rows
    sample = row // rows
    num_tokens = grid_h * grid_w
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    y = token // grid_w
    x = token % grid_w
    tokens_at = tokens_ptr + sample * num_tokens * width
    if ALIGNED:
        tokens_at = tl.multiple_of(tokens_at, 16)
    direction_at = direction_ptr + sample * stride_db + (row % rows) * stride_dk
    dot = tl.zeros((TOKENS, WIDTH), tl.float32)
    for tap in range(0, window_h * window_w):
        down = tap // window_w - window_h // 2
        right = tap % window_w - window_w // 2
        there = (y + down >= 0) & (y + down < grid_h) & (x + right >= 0) & (x + right < grid_w)
        for first in range(0, width, WIDTH):
            channel = first + tl.arange(0, WIDTH)
            within = _within(channel, width, ALIGNED)
            at = _places(token + down * grid_w + right, channel, width, ALIGNED)
            tile = tl.load(tokens_at + at, mask=there[:, None] & within[None, :], other=0.0).to(tl.float32)
            weight = tl.load(direction_at + tap * stride_dt + channel * stride_dc, mask=within, other=0.0)
            dot += tile * weight[None, :]
    pre = tl.sum(dot, 1) + tl.load(bias_ptr + row)
    tl.store(pre_ptr + row * num_tokens + token, pre, mask=token < num_tokens)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=(*VJP_POINTERS, *SIZES))
def _sae_rows_vjp_kernel(
    pre_bar_ptr,
    direction_ptr,
    tokens_bar_ptr,
    rows,
    width,
    grid_h,
    grid_w,
    window_h,
    window_w,
    stride_db,
    stride_dk,
    stride_dc,
    stride_dt,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    num_tokens = grid_h * grid_w
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    y = token // grid_w
    x = token % grid_w
    there = token < num_tokens
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    within = (channel // 8 < width // 8) if ALIGNED else (channel < width)
    made = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in range(0, rows):
        bar_at = pre_bar_ptr + (sample * rows + k) * num_tokens
        direction_at = direction_ptr + sample * stride_db + k * stride_dk
        for tap in range(0, window_h * window_w):
            # The token that read this one through the tap stands on its other side.
            down = tap // window_w - window_h // 2
            right = tap % window_w - window_w // 2
            reader = there & (y >= down) & (y - down < grid_h) & (x >= right) & (x - right < grid_w)
            bar = tl.load(bar_at + token - down * grid_w - right, mask=reader, other=0.0)
            weight = tl.load(direction_at + tap * stride_dt + channel * stride_dc, mask=within, other=0.0)
            made += bar[:, None] * weight[None, :]
    out = tokens_bar_ptr + sample * num_tokens * width
    if ALIGNED:
        out = tl.multiple_of(out, 16)
    at = _places(token, channel, width, ALIGNED)
    tl.store(out + at, made.to(tokens_bar_ptr.dtype.element_ty), mask=there[:, None] & within[None, :])


def is_aligned(width: int, *tensors: Tensor) -> bool:
    """Whether every token starts where a 128-bit access may."""
    return width % 8 == 0 and all(each.data_ptr() % 16 == 0 for each in tensors)


def _window(direction: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int, int, int]]:
    """-> (direction with one stride over its taps, (h, w), (stride a sample, row, channel, tap)). A broadcast stays one."""
    if direction.dim() == 3:
        return direction, (1, 1), (direction.stride(0), direction.stride(1), direction.stride(2), 0)
    height, width = direction.shape[3:]
    if height > 1 and direction.stride(3) != width * direction.stride(4):
        direction = direction.contiguous()
    sample, row, channel, _, tap = direction.stride()
    return direction, (height, width), (sample, row, channel, tap)


def sae_rows(tokens: Tensor, direction: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Launches the kernel on checked arguments (dispatch_feature.py); tokens and bias contiguous."""
    batch, num_tokens, width = tokens.shape
    rows = direction.shape[1]
    direction, window, strides = _window(direction)
    pre = direction.new_empty(batch, rows, num_tokens)
    launch: Any = _sae_rows_kernel
    launch[(batch * rows, triton.cdiv(num_tokens, TOKENS))](
        tokens,
        direction,
        bias,
        pre,
        rows,
        width,
        *grid,
        *window,
        *strides,
        TOKENS=TOKENS,
        WIDTH=WIDTH,
        ALIGNED=is_aligned(width, tokens),
        num_warps=NUM_WARPS,
    )
    return pre


def sae_rows_vjp(pre_bar: Tensor, direction: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Launches the VJP's kernel on checked arguments; pre_bar contiguous."""
    batch, rows, num_tokens = pre_bar.shape
    width = direction.shape[2]
    direction, window, strides = _window(direction)
    made = direction.new_empty(batch, num_tokens, width, dtype=dtype)
    launch: Any = _sae_rows_vjp_kernel
    launch[(batch, triton.cdiv(num_tokens, VJP_TOKENS), triton.cdiv(width, WIDTH))](
        pre_bar,
        direction,
        made,
        rows,
        width,
        *grid,
        *window,
        *strides,
        TOKENS=VJP_TOKENS,
        WIDTH=WIDTH,
        ALIGNED=is_aligned(width, made),
        num_warps=NUM_WARPS,
    )
    return made
