"""Decompositions of our own, where a stock one leaves an operator that an engine refuses, computes wrongly or takes long for.

    convolution_backward, input part     Conv of the padded, zero-inserted gradient with the flipped kernel, never ConvTranspose
                                         (whose bf16 form does not build in TensorRT-RTX); a patch embedding is one product
    layer norm, in a coarse graph        itself, in float32 at least; stock: nine operators, which no engine fuses where the
                                         gradient reads what is between them. TensorRT has none that tells mean and deviation
    average pool, backward               that of a depthwise convolution with equal weights
    nearest upsampling                   expand and reshape, whose derivative is a plain sum; stock: index_put with "add"
    slice and select, backward           zeros around the gradient; stock: a scatter into zeros
    group norm and its backward          over [batch, group, rest], a layer norm; stock, traced on a CPU: as_strided with a batch
                                         in its sizes
    softmax                              itself; stock, in attention: a search for rows that a mask hides whole, which none does
    softmax, backward                    its sum over a row as a product; stock: ReduceSum, which in ONNX Runtime adds up a row
                                         in an order that depends on where in memory it begins, so on a sample's batch mates

Each is held to autograd in float64 by tests/export/test_decompositions.py. Knows ATen; knows no network.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten
# Stock decompositions that core ATen keeps whole and engines lack.
_OPENED = (
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.gelu_backward,
    aten.silu_backward,
    aten.tanh_backward,
    aten.sigmoid_backward,
    aten.threshold_backward,
    aten.embedding_dense_backward,
)


def table(*, coarse: bool = False) -> dict[Any, Callable[..., Any]]:
    """The decomposition table of a trace (trace.py says what is coarse): core ATen's, `_OPENED`, and ours."""
    found = (
        dict(core_aten_decompositions())
        | dict(get_decompositions(_OPENED))
        | {
            aten.convolution_backward.default: convolution_input_gradient,
            aten.avg_pool2d_backward.default: average_pool_gradient,
            aten.native_group_norm.default: group_norm,
            aten.native_group_norm_backward.default: group_norm_gradient,
            aten._safe_softmax.default: softmax,
            aten._softmax_backward_data.default: softmax_gradient,
            aten.slice_backward.default: slice_gradient,
            aten.select_backward.default: select_gradient,
        }
    )
    return found | {aten.native_layer_norm.default: layer_norm} if coarse else found


def convolution_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """d loss / d x of a 2-d convolution, any stride, padding, dilation and groups; parameters have no gradient here.

        grad_x = Conv(pad(dilate(grad, stride)), flip(weight) with inputs and outputs exchanged inside each group)

    Raises NotImplementedError for a transposed convolution, or one that is not two-dimensional.
    """
    del bias_sizes, output_padding
    if transposed or weight.ndim != 4:
        raise NotImplementedError(
            f"gradient of a {'transposed ' if transposed else ''}convolution with a weight of {weight.ndim} dimensions"
        )
    if mask[1] or mask[2]:
        raise NotImplementedError("gradient of a convolution's parameters: the step graph has none")
    if not mask[0]:
        return None, None, None
    n, channels, height, width = x.shape
    outputs, _, kh, kw = weight.shape
    in_patches = list(stride) == [kh, kw] and list(padding) == [0, 0] and groups == 1 and list(dilation) == [1, 1]
    if in_patches and kh * kw > 1:
        return _patch_gradient(grad, weight, (n, channels, height, width)), None, None
    flipped = weight.reshape(groups, outputs // groups, channels // groups, kh, kw).transpose(1, 2)
    flipped = flipped.reshape(channels, outputs // groups, kh, kw).flip([2, 3])
    spread = _insert_zeros(grad, stride)
    edges: list[int] = []
    for side, size, kernel in ((3, width, kw), (2, height, kh)):
        reach = dilation[side - 2] * (kernel - 1)
        before = reach - padding[side - 2]
        # What a stride that does not divide leaves unread at the far end.
        after = size - (spread.shape[side] + before - reach)
        edges += [before, after]
    padded = F.pad(spread, edges) if any(edges) else spread
    return F.conv2d(padded, flipped, None, 1, 0, list(dilation), groups), None, None


def average_pool_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """d loss / d x of an average pool: that of a depthwise convolution with equal weights. Raises NotImplementedError."""
    if ceil_mode or (not count_include_pad and any(padding)):
        raise NotImplementedError("gradient of an average pool whose windows at the edge are smaller")
    channels = x.shape[1]
    weight = torch.full((channels, 1, *kernel), 1 / (divisor or kernel[0] * kernel[1]), dtype=x.dtype, device=x.device)
    found, _, _ = convolution_input_gradient(
        grad, x, weight, None, stride or kernel, padding, [1, 1], False, [0, 0], channels, [True, False, False]
    )
    if found is None:
        raise NotImplementedError("an average pool without an input gradient")
    return found


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight (x - mean) rstd + bias, mean, rstd) over the last dimensions, of lengths `shape`; float32 at least inside."""
    wide = _wide(x)
    if x.dtype == wide:
        return NotImplemented  # a trace then keeps the operator
    weight, bias = (None if each is None else each.to(wide) for each in (weight, bias))
    out, mean, rstd = torch.native_layer_norm(x.to(wide), list(shape), weight, bias, eps)
    return out.to(x.dtype), mean, rstd


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, places: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight (x - mean) rstd + bias, mean [n, groups], rstd [n, groups]), means over a group; float32 at least inside."""
    rest = channels // groups * places
    out, mean, rstd = torch.native_layer_norm(x.to(_wide(x)).reshape(n, groups, rest), [rest], None, None, eps)
    out = out.reshape(x.shape)
    if weight is not None:
        out = out * _per_channel(weight, x)
    if bias is not None:
        out = out + _per_channel(bias, x)
    return out.to(x.dtype), mean.reshape(n, groups), rstd.reshape(n, groups)


def group_norm_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    places: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """d loss / d x of a group norm; its parameters have no gradient here.

        u = weight grad,   x^ = (x - mean) rstd,   grad_x = rstd (u - mean(u) - x^ mean(u x^)),   means over a group

    Raises NotImplementedError where a gradient of its parameters is wanted.
    """
    if mask[1] or mask[2]:
        raise NotImplementedError("gradient of a group norm's parameters: the step graph has none")
    if not mask[0]:
        return None, None, None
    grouped = (n, groups, channels // groups * places)
    u = grad.to(_wide(x)) if weight is None else grad.to(_wide(x)) * _per_channel(weight, x)
    u, rstd = u.reshape(grouped), rstd.reshape(n, groups, 1)
    normal = (x.to(_wide(x)).reshape(grouped) - mean.reshape(n, groups, 1)) * rstd
    found = rstd * (u - u.mean(dim=2, keepdim=True) - normal * (u * normal).mean(dim=2, keepdim=True))
    return found.reshape(x.shape).to(x.dtype), None, None


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) / sum exp(x) along dim. A row of nothing but -inf becomes not a number, where attention's own gives zeros."""
    return torch.softmax(x, dim, dtype)


def softmax_gradient(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """d loss / d x = grad y - y sum(grad y) for y = softmax(x), the sum along dim; float32 at least inside."""
    y = y.to(_wide(y))
    u = (grad.to(y.dtype) * y).transpose(dim, -1)
    # One product for each of the leading dimensions: of one over all, some libraries compute the last rows in another way.
    ones = torch.ones(u.shape[-1], 1, dtype=u.dtype, device=u.device).expand(*u.shape[:-2], -1, -1)
    return (u - y.transpose(dim, -1) * (u @ ones)).transpose(dim, -1).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(_wide(x)).reshape(1, -1, *(1,) * (x.ndim - 2))


def slice_gradient(grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    """d loss / d x of x[start:end] along dim: zeros before and after. Raises NotImplementedError for a step other than 1."""
    del end
    if step != 1:
        raise NotImplementedError(f"gradient of a slice with step {step}")
    size = sizes[dim]
    before = min(max(start + size if start < 0 else start, 0), size)
    return _zeros_around(grad, dim, before, size - before - grad.shape[dim])


def select_gradient(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """d loss / d x of x[index] along dim: zeros before and after."""
    dim = dim % len(sizes)
    before = index % sizes[dim]
    return _zeros_around(grad.unsqueeze(dim), dim, before, sizes[dim] - before - 1)


def _zeros_around(grad: Tensor, dim: int, before: int, after: int) -> Tensor:
    return F.pad(grad, [0, 0] * (grad.ndim - 1 - dim % grad.ndim) + [before, after])


def _patch_gradient(grad: Tensor, weight: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Of a convolution whose patches do not overlap: one product, then the patches in their places."""
    n, channels, height, width = shape
    outputs, _, kh, kw = weight.shape
    rows, columns = grad.shape[2:]
    each = grad.permute(0, 2, 3, 1).reshape(n, rows * columns, outputs) @ weight.reshape(outputs, channels * kh * kw)
    placed = each.reshape(n, rows, columns, channels, kh, kw).permute(0, 3, 1, 4, 2, 5)
    placed = placed.reshape(n, channels, rows * kh, columns * kw)
    return F.pad(placed, [0, width - columns * kw, 0, height - rows * kh])


def _insert_zeros(grad: Tensor, stride: Sequence[int]) -> Tensor:
    """stride - 1 zeros after every row and column but, in effect, the last: the padding's arithmetic takes them into account."""
    n, outputs, rows, columns = grad.shape
    if list(stride) == [1, 1]:
        return grad
    spread = F.pad(grad[:, :, :, None, :, None], [0, stride[1] - 1, 0, 0, 0, stride[0] - 1])
    return spread.reshape(n, outputs, rows * stride[0], columns * stride[1])


@contextmanager
def plain_upsampling() -> Generator[None]:
    """While it lasts F.interpolate by a whole factor, nearest, is expand and reshape; all else is torch's own."""
    stock = F.interpolate

    def interpolate(
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        **rest: Any,
    ) -> Tensor:
        factor = scale_factor if isinstance(scale_factor, int | float) else None
        if mode != "nearest" or size is not None or factor is None or factor != int(factor) or input.ndim != 4:
            return stock(input, size, scale_factor, mode, align_corners, **rest)
        n, channels, height, width = input.shape
        f = int(factor)
        wide = input[:, :, :, None, :, None].expand(n, channels, height, f, width, f)
        return wide.reshape(n, channels, height * f, width * f)

    F.interpolate = interpolate
    try:
        yield
    finally:
        F.interpolate = stock
