"""What a trunk sees of a picture (reference_preprocess.py) and its VJP as Triton kernels, one launch each.

A program owns a run of consecutive elements of one plane (a sample's channel) of what is written. Where sizes differ it gathers,
for each of them, the few places under the triangle filter: a row of the resize matrix is not zero for at most 2 max(s, 1) places,
which begin where whole-number arithmetic says, so nothing is rounded and no zero is read. The VJP gathers likewise, by columns of
the matrix: no atomics, and a sample's numbers are the same in any company. Neighbours read the same places, from the cache.
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiltscope.kernels.reference_preprocess import Preprocessed

BLOCK = 1024  # elements a program: 8 a thread
NUM_WARPS = 4
POINTERS = ("x0_ptr", "mean_ptr", "std_ptr", "rows_ptr", "columns_ptr", "pixels_ptr", "inside_ptr")
VJP_POINTERS = ("pixels_bar_ptr", "inside_ptr", "std_ptr", "rows_ptr", "columns_ptr", "x0_bar_ptr")
SIZES = ("channels", "height", "width", "new_height", "new_width", "taps_h", "taps_w")


@triton.jit
def _first(i, inputs, outputs, taps):
    """The first p with |(2 p + 1) outputs - (2 i + 1) inputs| < 2 max(inputs, outputs): where row i of the matrix begins.

    Division in Triton cuts towards zero: `taps + 2` steps, more than 3 max(inputs, outputs), keep it above zero.
    """
    step = 2 * outputs
    low = (2 * i + 1) * inputs - 2 * tl.maximum(inputs, outputs) - outputs
    return (low + step * (taps + 2)) // step - (taps + 1)


@triton.jit
def _taken(at, n, ALIGNED: tl.constexpr):
    """Which elements are there; where planes are whole blocks of 8 the mask does not narrow an access."""
    if ALIGNED:
        return (tl.max_constancy(at // 8, [8]) < n // 8) & (at >= 0)
    return at < n


@triton.jit
def _place(ptr, plane, n, ALIGNED: tl.constexpr):
    base = ptr + plane * n
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=(*POINTERS, *SIZES),
)
def _preprocess_kernel(
    x0_ptr,
    mean_ptr,
    std_ptr,
    rows_ptr,
    columns_ptr,
    pixels_ptr,
    inside_ptr,
    channels,
    height,
    width,
    new_height,
    new_width,
    taps_h,
    taps_w,
    BLOCK: tl.constexpr,
    RESIZED: tl.constexpr,
    CLAMP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = new_height * new_width
    here = _taken(at, n, ALIGNED)
    if RESIZED:
        i = at // new_width
        j = at % new_width
        source = x0_ptr + plane * height * width
        p0 = _first(i, height, new_height, taps_h)
        q0 = _first(j, width, new_width, taps_w)
        picture = tl.zeros((BLOCK,), tl.float32)
        for a in range(0, taps_h):
            p = p0 + a
            row = here & (p >= 0) & (p < height)
            line = tl.zeros((BLOCK,), tl.float32)
            for b in range(0, taps_w):
                q = q0 + b
                place = row & (q >= 0) & (q < width)
                weight = tl.load(columns_ptr + j * width + q, mask=place, other=0.0).to(tl.float32)
                line += weight * tl.load(source + p * width + q, mask=place, other=0.0).to(tl.float32)
            picture += tl.load(rows_ptr + i * height + p, mask=row, other=0.0).to(tl.float32) * line
    else:
        picture = tl.load(_place(x0_ptr, plane, n, ALIGNED) + at, mask=here, other=0.0).to(tl.float32)
    channel = plane % channels
    unit = (picture + 1.0) * 0.5
    if CLAMP:
        tl.store(_place(inside_ptr, plane, n, ALIGNED) + at, (unit >= 0.0) & (unit <= 1.0), mask=here)
        unit = tl.where(unit < 0.0, 0.0, tl.where(unit > 1.0, 1.0, unit))  # a NaN stays one
    mean = tl.load(mean_ptr + channel).to(tl.float32)
    pixels = (unit - mean) / tl.load(std_ptr + channel).to(tl.float32)
    tl.store(_place(pixels_ptr, plane, n, ALIGNED) + at, pixels.to(pixels_ptr.dtype.element_ty), mask=here)


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=(*VJP_POINTERS, *SIZES),
)
def _preprocess_vjp_kernel(
    pixels_bar_ptr,
    inside_ptr,
    std_ptr,
    rows_ptr,
    columns_ptr,
    x0_bar_ptr,
    channels,
    height,
    width,
    new_height,
    new_width,
    taps_h,
    taps_w,
    BLOCK: tl.constexpr,
    RESIZED: tl.constexpr,
    CLAMP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = height * width
    here = _taken(at, n, ALIGNED)
    if RESIZED:
        p = at // width
        q = at % width
        given = pixels_bar_ptr + plane * new_height * new_width
        kept = inside_ptr + plane * new_height * new_width
        # Of the matrix's transpose: the outputs that an input reached.
        i0 = _first(p, new_height, height, taps_h)
        j0 = _first(q, new_width, width, taps_w)
        bar = tl.zeros((BLOCK,), tl.float32)
        for a in range(0, taps_h):
            i = i0 + a
            row = here & (i >= 0) & (i < new_height)
            line = tl.zeros((BLOCK,), tl.float32)
            for b in range(0, taps_w):
                j = j0 + b
                place = row & (j >= 0) & (j < new_width)
                from_here = place
                if CLAMP:
                    from_here = place & (tl.load(kept + i * new_width + j, mask=place, other=0) != 0)
                weight = tl.load(columns_ptr + j * width + q, mask=place, other=0.0).to(tl.float32)
                line += weight * tl.load(given + i * new_width + j, mask=from_here, other=0.0).to(tl.float32)
            bar += tl.load(rows_ptr + i * height + p, mask=row, other=0.0).to(tl.float32) * line
    else:
        bar = tl.load(_place(pixels_bar_ptr, plane, n, ALIGNED) + at, mask=here, other=0.0).to(tl.float32)
        if CLAMP:
            free = tl.load(_place(inside_ptr, plane, n, ALIGNED) + at, mask=here, other=0) != 0
            bar = tl.where(free, bar, 0.0)
    bar = bar / tl.load(std_ptr + plane % channels).to(tl.float32) * 0.5
    tl.store(_place(x0_bar_ptr, plane, n, ALIGNED) + at, bar.to(x0_bar_ptr.dtype.element_ty), mask=here)


def taps_of(inputs: int, outputs: int) -> int:
    """How many places a row of the resize matrix can hold: as many whole numbers as an open interval 2 max(s, 1) long can."""
    return -(-2 * max(inputs, outputs) // outputs)


def is_aligned(n: int, *tensors: Tensor) -> bool:
    """Whether every plane of n elements starts where a 128-bit access may."""
    return n % 8 == 0 and all(each.data_ptr() % 16 == 0 for each in tensors)


def preprocess(
    x0: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    clamp: bool,
    dtype: torch.dtype,
) -> Preprocessed:
    """Launches the kernel on checked arguments (dispatch_preprocess.py), all contiguous."""
    batch, channels, height, width = x0.shape
    size, resized = (height, width), False
    if rows is not None and columns is not None:
        size, resized = (rows.shape[0], columns.shape[0]), True
    pixels = x0.new_empty(batch, channels, *size, dtype=dtype)
    inside = x0.new_empty(pixels.shape if clamp else 0, dtype=torch.bool)
    n = size[0] * size[1]
    touched = [pixels, *([] if resized else [x0]), *([inside] if clamp else [])]
    launch: Any = _preprocess_kernel
    launch[(batch * channels, triton.cdiv(n, BLOCK))](
        x0,
        mean,
        std,
        x0 if rows is None else rows,
        x0 if columns is None else columns,
        pixels,
        inside if clamp else pixels,
        channels,
        height,
        width,
        *size,
        taps_of(height, size[0]),
        taps_of(width, size[1]),
        BLOCK=BLOCK,
        RESIZED=resized,
        CLAMP=clamp,
        ALIGNED=is_aligned(n, *touched),
        num_warps=NUM_WARPS,
    )
    return Preprocessed(pixels, inside)


def preprocess_vjp(
    pixels_bar: Tensor,
    inside: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Launches the VJP's kernel on checked arguments, all contiguous."""
    batch, channels, *size = pixels_bar.shape
    (height, width), resized, clamp = size, False, inside.numel() > 0
    if rows is not None and columns is not None:
        height, width, resized = rows.shape[1], columns.shape[1], True
    made = pixels_bar.new_empty(batch, channels, height, width, dtype=dtype)
    n = height * width
    touched = [made, *([] if resized else [pixels_bar, *([inside] if clamp else [])])]
    launch: Any = _preprocess_vjp_kernel
    launch[(batch * channels, triton.cdiv(n, BLOCK))](
        pixels_bar,
        inside if clamp else pixels_bar,
        std,
        pixels_bar if rows is None else rows,
        pixels_bar if columns is None else columns,
        made,
        channels,
        height,
        width,
        *size,
        taps_of(size[0], height),
        taps_of(size[1], width),
        BLOCK=BLOCK,
        RESIZED=resized,
        CLAMP=clamp,
        ALIGNED=is_aligned(n, *touched),
        num_warps=NUM_WARPS,
    )
    return made
