"""Decompositions of our own, where a stock one leaves an operator that an engine refuses, computes wrongly or takes long for.

    convolution_backward, input part     Conv of the padded, zero-inserted gradient with the flipped kernel, never ConvTranspose
                                         (whose bf16 form does not build in TensorRT-RTX); a patch embedding is one product
    layer norm, in a coarse graph        itself, in float32 at least; stock: nine operators, which no engine fuses where the
                                         gradient reads what is between them. TensorRT has none that tells mean and deviation
    layer norm, backward                 nine passes over the tensor; stock: twelve
    average pool, backward               that of a depthwise convolution with equal weights
    slice and select, backward           zeros around the gradient; stock: a scatter into zeros
    group norm and its backward          over [batch, group, rest], a layer norm; stock, traced on a CPU: as_strided with a batch
                                         in its sizes
    gelu, in a coarse graph              in the operators of its gradient; stock: itself, another erf
    silu and gelu, backward              in as few operators as they can share with their values
    roll                                 two slices; stock: a gather
    softmax                              itself; stock, in attention: a search for rows that a mask hides whole, which none does
    softmax, backward                    its sum over a row as a product; stock: ReduceSum, which in ONNX Runtime adds up a row
                                         in an order that depends on where in memory it begins, so on a sample's batch mates

Each is held to autograd in float64 by tests/export/test_decompositions.py. Knows ATen; knows no network.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from tiltscope.engine.batch_invariant import ROOT_HALF, linear

aten = torch.ops.aten
_HALF_LOG_PI = math.log(math.pi) / 2
_stock_roll = get_decompositions([aten.roll])[aten.roll.default]
_stock_gelu_gradient = get_decompositions([aten.gelu_backward])[aten.gelu_backward.default]
# Stock decompositions that core ATen keeps whole and engines lack.
_OPENED = (
    aten.native_layer_norm,
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
            aten.native_layer_norm_backward.default: layer_norm_gradient,
            aten.native_group_norm.default: group_norm,
            aten.native_group_norm_backward.default: group_norm_gradient,
            aten.silu_backward.default: silu_gradient,
            aten.gelu_backward.default: gelu_gradient,
            aten._safe_softmax.default: softmax,
            aten._softmax_backward_data.default: softmax_gradient,
            aten.roll.default: roll,
            aten.slice_backward.default: slice_gradient,
            aten.select_backward.default: select_gradient,
        }
    )
    whole = {aten.native_layer_norm.default: layer_norm, aten.gelu.default: gelu}
    return found | whole if coarse else found


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
    (left, right), (above, below) = edges[:2], edges[2:]
    if left == right >= 0 and above == below >= 0:
        return F.conv2d(spread, flipped, None, 1, [above, left], list(dilation), groups), None, None
    return F.conv2d(F.pad(spread, edges), flipped, None, 1, 0, list(dilation), groups), None, None


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

    As of a layer norm, over a group. Raises NotImplementedError where a gradient of its parameters is wanted.
    """
    if mask[1] or mask[2]:
        raise NotImplementedError("gradient of a group norm's parameters: the step graph has none")
    if not mask[0]:
        return None, None, None
    grouped, each = (n, groups, channels // groups * places), (n, groups, 1)
    u = grad.to(_wide(x)) if weight is None else grad.to(_wide(x)) * _per_channel(weight, x)
    found = _norm_gradient(
        u.reshape(grouped), x.to(_wide(x)).reshape(grouped), mean.reshape(each), rstd.reshape(each), [2]
    )
    return found.reshape(x.shape).to(x.dtype), None, None


def layer_norm_gradient(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """d loss / d x of a layer norm; its parameters have no gradient here. mean, rstd: with the last dimensions kept, as 1.

        u = weight grad,   c = x - mean,   grad_x = rstd (u - mean(u)) - c rstd^3 mean(u c)

    Raises NotImplementedError where a gradient of its parameters is wanted.
    """
    del bias
    if mask[1] or mask[2]:
        raise NotImplementedError("gradient of a layer norm's parameters: the step graph has none")
    if not mask[0]:
        return None, None, None
    u = grad.to(_wide(x)) if weight is None else grad.to(_wide(x)) * weight.to(_wide(x))
    found = _norm_gradient(u, x.to(_wide(x)), mean.to(_wide(x)), rstd.to(_wide(x)), list(range(-len(shape), 0)))
    return found.to(x.dtype), None, None


def _norm_gradient(u: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    centred = x - mean
    slope = rstd**3 * (u * centred).mean(dims, keepdim=True)
    return rstd * (u - u.mean(dims, keepdim=True)) - slope * centred


def silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad (s + y (1 - s)), s = sigmoid(x), y = x s: what is also in x s is one operator with it. float32 at least inside."""
    wide = x.to(_wide(x))
    share = torch.sigmoid(wide)
    return (grad.to(wide.dtype) * (share + wide * share * (1 - share))).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x P(x), P(x) = 1/2 + erf(x/sqrt 2)/2, float32 at least inside; the tanh form is left as it is."""
    if approximate != "none":
        return NotImplemented
    wide = x.to(_wide(x))
    return (wide * _normal_distribution(wide * ROOT_HALF)).to(x.dtype)


def gelu_gradient(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """grad (P(x) + x exp(-x^2/2)/sqrt(2 pi)), with t = x/sqrt 2: grad (P + t exp(-t^2 - ln(pi)/2)), float32 at least inside; the
    tanh form: stock."""
    if approximate != "none":
        return _stock_gelu_gradient(grad, x, approximate=approximate)
    t = x.to(_wide(x)) * ROOT_HALF
    return (grad.to(t.dtype) * (_normal_distribution(t) + t * torch.exp(-_HALF_LOG_PI - t * t))).to(x.dtype)


def _normal_distribution(t: Tensor) -> Tensor:
    return torch.erf(t) * 0.5 + 0.5


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


def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """Two slices, exchanged; along more than one dimension: stock."""
    if len(shifts) != 1 or len(dims) != 1:
        return _stock_roll(x, shifts, dims)
    size = x.shape[dims[0]]
    moved = shifts[0] % size
    return torch.cat((x.narrow(dims[0], size - moved, moved), x.narrow(dims[0], 0, size - moved)), dims[0])


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
    each = linear(grad.permute(0, 2, 3, 1), weight.reshape(outputs, channels * kh * kw).T, None)
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
