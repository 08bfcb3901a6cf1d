"""Operations in which a sample's result does not depend, by a single bit, on its batch mates or its place in the batch.

A picture is addressed by (bundle, config, seed, index): its bits may not change with the company it is drawn in. Two kinds of CPU
kernels break that, both measured (torch 2.13, AVX2; tests/prior/test_network.py, tests/feature/test_trunk.py hold the result):

* silu, sigmoid, gelu, softplus, pow and atan2 compute what is left over after the last full vector by another formula. Left-overs
  stand at the end of each thread's share, so with 3 threads a batch of 8 is touched in the middle. exp, log, sin, asin, sqrt, erf
  and tanh do not; silu and gelu are written with those here.
* one matrix product over all rows of a batch treats its last rows by another kernel (float64, or 5 samples in float32). A
  batched product gives every sample a product of its own, of one shape.

An engine in which neither is so is spared the parts, and the copies of the weights (`whole_operators`).

Convolutions, normalisations, softmax and attention over (sample, head) were found invariant.

What is composed of many operations is dear in eager autograd, which keeps and multiplies an intermediate for each: silu and gelu
were a seventh of a guided row. So where a gradient is wanted they are functions of their own, whose derivative is written down
and computed in place. Their values are the composed form's bit for bit. A trace sees the composed form, or torch's own.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROOT_HALF = math.sqrt(0.5)
_NORMAL_DENSITY = 1 / math.sqrt(2 * math.pi)
_whole_operators = ContextVar("_whole_operators", default=False)


def silu(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """x * sigmoid(x) = x/2 (1 + tanh(x/2)): no overflow at either end, unlike x / (1 + exp(-x)) in its backward pass."""
    if _whole_operators.get() or _is_narrow(x):
        return F.silu(x)
    if _in_eager_autograd(x):
        return cast(Tensor, _SiLU.apply(x))
    return 0.5 * x * (1 + torch.tanh(0.5 * x))


def gelu(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """x/2 (1 + erf(x/sqrt 2)), the exact form."""
    if _whole_operators.get() or _is_narrow(x):
        return F.gelu(x)
    if _in_eager_autograd(x):
        return cast(Tensor, _GELU.apply(x))
    return 0.5 * x * (1 + torch.erf(x * ROOT_HALF))


def _is_narrow(x: Tensor) -> bool:
    """In 16 bits 1 + tanh and 1 + erf would lose what is left of a small share; torch's own compute in float32 and round once."""
    return x.dtype in (torch.bfloat16, torch.float16)


def _in_eager_autograd(x: Tensor) -> bool:
    """A trace's tensors are of a class of their own."""
    return type(x) is Tensor and x.requires_grad and torch.is_grad_enabled()


class _SiLU(torch.autograd.Function):
    """y = x s, s = sigmoid(x) = 1/2 + tanh(x/2)/2;  dy/dx = s + y (1 - s) = y + s (1 - y). Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        share = torch.tanh(0.5 * x).add_(1).mul_(0.5)
        y = x * share
        ctx.save_for_backward(y, share)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, share = ctx.saved_tensors
        return torch.rsub(y, 1).mul_(share).add_(y).mul_(grad)


class _GELU(torch.autograd.Function):
    """y = x P(x), P the normal distribution function;  dy/dx = P + x exp(-x^2/2)/sqrt(2 pi). Once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        below = torch.erf(x * ROOT_HALF).add_(1).mul_(0.5)
        ctx.save_for_backward(x, below)
        return x * below

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, below = ctx.saved_tensors
        return (x * x).mul_(-0.5).exp_().mul_(_NORMAL_DENSITY).mul_(x).add_(below).mul_(grad)


def gelu_tanh(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the approximate form of arXiv:1606.08415, sec. 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def linear(
    x: Float[Tensor, "batch *dims inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None,
) -> Float[Tensor, "batch *dims outputs"]:
    """x weight' + bias, one product a sample; under `whole_operators`, one."""
    if _whole_operators.get():
        rows = x.reshape(-1, x.shape[-1])
        product = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        return product.view(*x.shape[:-1], weight.shape[0])
    rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]  # [batch, rows, inputs]
    each = weight.T.expand(x.shape[0], -1, -1)
    product = torch.bmm(rows, each) if bias is None else torch.baddbmm(bias, rows, each)
    return product.view(*x.shape[:-1], weight.shape[0])


def attend(
    q: Float[Tensor, "n tokens width"],
    k: Float[Tensor, "n tokens width"],
    v: Float[Tensor, "n tokens width"],
    scale: float,
) -> Float[Tensor, "n tokens width"]:
    """softmax(scale q k') v. Two plain products, not the blocked kernel: for some 70 tokens they are as fast, every product is
    one sample's and one head's, so batch mates cannot change a bit (tests/feature/test_trunk.py), and any exporter can
    differentiate them. Of three dimensions, so that an engine sees transposition, product and scale side by side, and makes
    them one.
    """
    return torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v


@contextmanager
def whole_operators() -> Generator[None]:
    """For a trace: while it lasts, `linear` is one product over the rows of all samples, `silu` and `gelu` are torch's own."""
    token = _whole_operators.set(True)
    try:
        yield
    finally:
        _whole_operators.reset(token)


class Linear(nn.Module):
    """torch.nn.Linear's parameters under their names, `linear`'s product. Values are loaded, never initialised."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Float[Tensor, "batch *dims inputs"]) -> Float[Tensor, "batch *dims outputs"]:
        return linear(x, self.weight, self.bias)


class SiLU(nn.Module):
    """`silu` in the place of torch.nn.SiLU."""

    def forward(self, x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return silu(x)


class GELU(nn.Module):
    """`gelu` in the place of torch.nn.GELU."""

    def forward(self, x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return gelu(x)


def _same_linear(module: nn.Linear) -> Linear:
    with torch.device("meta"):
        same = Linear(module.in_features, module.out_features, bias=False)
    same.weight, same.bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    return same


def replace_modules(module: nn.Module) -> None:
    """Put the modules above in the place of torch's, all the way down a library's network, sharing its parameters.

    Changes `module`, which must be the caller's own.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, _same_linear(child))
        elif type(child) is nn.SiLU:
            setattr(module, name, SiLU())
        elif type(child) is nn.GELU and child.approximate == "none":
            setattr(module, name, GELU())
        else:
            replace_modules(child)
