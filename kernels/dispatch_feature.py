"""The ops between a picture and a feature's activation, and their gradients. See dispatch.py."""

import torch
from torch import Tensor

from tiltscope.kernels import reference_feature
from tiltscope.kernels.implementation import (
    NETWORK_DTYPES,
    STATE_DTYPES,
    Implementation,
    compiled,
    count_call,
    require,
    require_implementation,
    require_like,
)


def readout(
    tokens: Tensor,
    direction: Tensor,
    bias: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    *,
    implementation: Implementation = "reference",
) -> tuple[Tensor, Tensor]:
    """-> (activation [batch], drive [batch]) of reference_feature.readout; differentiable with respect to tokens alone.

    tokens [batch, tokens, width] in the readout's type or a 16-bit one; direction, bias, threshold, weight, pooling of one type,
    float32 or float64 (triton: float32); mask bool. Raises ConfigError, RunnerError.
    """
    require_implementation(implementation, tokens.device)
    allowed = STATE_DTYPES if implementation != "triton" else STATE_DTYPES[:1]
    require(direction.dtype in allowed, "direction", direction.dtype, " or ".join(map(str, allowed)))
    require(tokens.dim() == 3 and tokens.numel() > 0, "tokens", f"shape {list(tokens.shape)}", "[batch, tokens, width]")
    require_like("tokens", tokens, tokens.shape, [direction.dtype, *NETWORK_DTYPES], tokens.device)
    batch, num_tokens, width = tokens.shape
    shape = f"shape {list(direction.shape)}"
    require(direction.dim() == 3 and direction.numel() > 0, "direction", shape, "[batch, rows, width]")
    rows = direction.shape[1]
    require_like("direction", direction, (batch, rows, width), [direction.dtype], tokens.device)
    for name, each in (("bias", bias), ("threshold", threshold), ("weight", weight)):
        require_like(name, each, (batch, rows), [direction.dtype], tokens.device)
    require_like("pooling", pooling, (batch, rows, 3), [direction.dtype], tokens.device)
    require_like("mask", mask, (batch, rows, num_tokens), [torch.bool], tokens.device)
    made = torch.ops.tiltscope.readout(tokens, direction, bias, threshold, weight, pooling, mask, implementation)
    return made[0], made[1]


@torch.library.custom_op("tiltscope::readout", mutates_args=())
def _readout(
    tokens: Tensor,
    direction: Tensor,
    bias: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if implementation == "triton":
        from tiltscope.kernels.readout import readout as run
    else:
        run = reference_feature.readout
        run = compiled(run) if implementation == "compiled" else run
    made = run(*(each.contiguous() for each in (tokens, direction, bias, threshold, weight, pooling, mask)))
    count_call("readout", implementation)
    return made.activation, made.drive, made.pre


@_readout.register_fake
def _readout_fake(
    tokens: Tensor,
    direction: Tensor,
    bias: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _ = tokens.shape
    each = direction.new_empty(batch), direction.new_empty(batch)
    return *each, direction.new_empty(batch, direction.shape[1], num_tokens)


@torch.library.custom_op("tiltscope::readout_vjp", mutates_args=())
def _readout_vjp(
    activation_bar: Tensor,
    drive_bar: Tensor,
    pre: Tensor,
    direction: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    if implementation == "triton":
        from tiltscope.kernels.readout import readout_vjp as run
    else:
        run = reference_feature.readout_vjp
        run = compiled(run) if implementation == "compiled" else run
    given = (activation_bar, drive_bar, pre, direction, threshold, weight, pooling, mask)
    made = run(*[each.contiguous() for each in given], dtype)  # type: ignore[call-arg]
    count_call("readout_vjp", implementation)
    return made


@_readout_vjp.register_fake
def _readout_vjp_fake(
    activation_bar: Tensor,
    drive_bar: Tensor,
    pre: Tensor,
    direction: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    batch, _, num_tokens = pre.shape
    return direction.new_empty(batch, num_tokens, direction.shape[2], dtype=dtype)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    tokens, direction, _, threshold, weight, pooling, mask, implementation = inputs
    ctx.save_for_backward(output[2], direction, threshold, weight, pooling, mask)  # type: ignore[arg-type]
    ctx.chosen = tokens.dtype, implementation  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, activation_bar: Tensor, drive_bar: Tensor, pre_bar: Tensor | None
) -> tuple[Tensor | None, ...]:
    pre, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
    made = torch.ops.tiltscope.readout_vjp(activation_bar, drive_bar, pre, *rest, *ctx.chosen)  # type: ignore[attr-defined]
    return made, *[None] * 7


_readout.register_autograd(_backward, setup_context=_keep)
