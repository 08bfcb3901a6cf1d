"""The ops between a trunk's tokens and a feature's activation, and their gradients. See dispatch.py.

With implementation "reference" (or "native") the definition runs as it stands: autograd differentiates it and a tracer sees its
operations, so an exported graph holds it and not an opaque op; it then computes in the readout's own type, 16-bit ones of an
exported half-precision graph included. The other implementations are ops with a VJP of their own, in float32 or float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltscope.kernels import reference_feature
from tiltscope.kernels.implementation import (
    INLINE,
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

    tokens [batch, tokens, width] in the readout's type or, where that is wider, a 16-bit one; direction, bias, threshold, weight,
    pooling of one type, float32 or float64 (triton: float32; reference and native: also float16 and bfloat16); mask bool. Raises
    ConfigError, RunnerError.
    """
    require_implementation(implementation, tokens.device)
    _check_rows(tokens, direction, bias, implementation)
    require(direction.dim() == 3, "direction", f"shape {list(direction.shape)}", "[batch, rows, width]")
    _check_pooling(tokens.shape[:2], direction, threshold, weight, pooling, mask)
    if implementation in INLINE:
        count_call("readout", "reference")
        made = reference_feature.readout(tokens, direction, bias, threshold, weight, pooling, mask)
        return made.activation, made.drive
    made = torch.ops.tiltscope.readout(tokens, direction, bias, threshold, weight, pooling, mask, implementation)
    return made[0], made[1]


def readout_of_rows(
    pre: Tensor,
    threshold: Tensor,
    weight: Tensor,
    pooling: Tensor,
    mask: Tensor,
    *,
    implementation: Implementation = "reference",
) -> tuple[Tensor, Tensor]:
    """`readout` of pre-activations [batch, rows, tokens] that `sae_rows` made: the end of a convolutional readout.

    The fused op reads them as K tokens' channels through directions that are unit vectors, which changes no bit of a finite
    number. Differentiable with respect to pre alone. Raises ConfigError, RunnerError.
    """
    require_implementation(implementation, pre.device)
    require(pre.dim() == 3 and pre.numel() > 0, "pre", f"shape {list(pre.shape)}", "[batch, rows, tokens]")
    _check_dtype("pre", pre.dtype, implementation)
    batch, rows, num_tokens = pre.shape
    if implementation in INLINE:
        _check_pooling((batch, num_tokens), pre, threshold, weight, pooling, mask)
        count_call("readout", "reference")
        made = reference_feature.pooled(pre, threshold, weight, pooling, mask)
        return made.activation, made.drive
    unit = torch.eye(rows, dtype=pre.dtype, device=pre.device).expand(batch, rows, rows)
    none = pre.new_zeros(batch, rows)
    tokens = pre.transpose(1, 2)
    return readout(tokens, unit, none, threshold, weight, pooling, mask, implementation=implementation)


def sae_rows(
    tokens: Tensor,
    direction: Tensor,
    bias: Tensor,
    *,
    grid: Sequence[int] | None = None,
    implementation: Implementation = "reference",
) -> Tensor:
    """-> pre [batch, rows, tokens] of reference_feature.sae_rows; differentiable with respect to tokens alone.

    tokens as for `readout`; direction [batch, rows, width], or [batch, rows, width, h, w] with h and w odd and the tokens'
    grid (gh, gw); bias [batch, rows]. Raises ConfigError, RunnerError.
    """
    require_implementation(implementation, tokens.device)
    _check_rows(tokens, direction, bias, implementation)
    linear = direction.dim() == 3
    require(linear == (grid is None), "grid", grid, "None for directions [batch, rows, width], else (gh, gw)")
    places = (1, tokens.shape[1]) if grid is None else tuple(grid)
    fits = len(places) == 2 and places[0] * places[1] == tokens.shape[1]
    require(fits, "grid", places, f"two numbers whose product is {tokens.shape[1]}, the tokens")
    odd = linear or (direction.dim() == 5 and direction.shape[3] % 2 == direction.shape[4] % 2 == 1)
    require(odd, "direction", f"shape {list(direction.shape)}", "[batch, rows, width] or [..., h, w], both odd")
    if implementation in INLINE:
        count_call("sae_rows", "reference")
        return reference_feature.sae_rows(tokens, direction, bias, (places[0], places[1]))
    return torch.ops.tiltscope.sae_rows(tokens, direction, bias, list(places), implementation)


def _check_rows(tokens: Tensor, direction: Tensor, bias: Tensor, implementation: Implementation) -> None:
    _check_dtype("direction", direction.dtype, implementation)
    require(tokens.dim() == 3 and tokens.numel() > 0, "tokens", f"shape {list(tokens.shape)}", "[batch, tokens, width]")
    # Tokens are widened, never narrowed: a 16-bit readout reads tokens of its own type alone.
    narrower = NETWORK_DTYPES if direction.dtype in STATE_DTYPES else ()
    require_like("tokens", tokens, tokens.shape, [direction.dtype, *narrower], tokens.device)
    shape = f"shape {list(direction.shape)}"
    require(direction.dim() >= 3 and direction.numel() > 0, "direction", shape, "[batch, rows, width, ...]")
    batch, width = tokens.shape[0], tokens.shape[2]
    rows = direction.shape[1]
    like = (batch, rows, width, *direction.shape[3:])
    require_like("direction", direction, like, [direction.dtype], tokens.device)
    require_like("bias", bias, (batch, rows), [direction.dtype], tokens.device)


def _check_dtype(argument: str, dtype: torch.dtype, implementation: Implementation) -> None:
    """Raises ConfigError where `implementation` does not compute a readout in `dtype`."""
    if implementation in INLINE:
        allowed = (*STATE_DTYPES, *NETWORK_DTYPES)
    else:
        allowed = STATE_DTYPES[:1] if implementation == "triton" else STATE_DTYPES
    named = " or ".join(map(str, allowed))
    narrow = dtype in NETWORK_DTYPES and implementation not in INLINE
    hint = f" with kernels {implementation!r}; kernels 'reference' take 16-bit readouts" if narrow else ""
    require(dtype in allowed, argument, dtype, named + hint)


def _check_pooling(
    size: Sequence[int], rows_of: Tensor, threshold: Tensor, weight: Tensor, pooling: Tensor, mask: Tensor
) -> None:
    """size: (batch, tokens). rows_of: [batch, rows, ...], whose type and device the rest has."""
    (batch, num_tokens), rows = size, rows_of.shape[1]
    dtype, device = [rows_of.dtype], rows_of.device
    require_like("threshold", threshold, (batch, rows), dtype, device)
    require_like("weight", weight, (batch, rows), dtype, device)
    require_like("pooling", pooling, (batch, rows, 3), dtype, device)
    require_like("mask", mask, (batch, rows, num_tokens), [torch.bool], device)


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


@torch.library.custom_op("tiltscope::sae_rows", mutates_args=())
def _sae_rows(tokens: Tensor, direction: Tensor, bias: Tensor, grid: Sequence[int], implementation: str) -> Tensor:
    if implementation == "triton":
        from tiltscope.kernels.sae_rows import sae_rows as run
    else:
        run = reference_feature.sae_rows
        run = compiled(run) if implementation == "compiled" else run
    made = run(tokens.contiguous(), direction, bias.contiguous(), (grid[0], grid[1]))
    count_call("sae_rows", implementation)
    return made


@_sae_rows.register_fake
def _sae_rows_fake(tokens: Tensor, direction: Tensor, bias: Tensor, grid: Sequence[int], implementation: str) -> Tensor:
    return direction.new_empty(tokens.shape[0], direction.shape[1], tokens.shape[1])


@torch.library.custom_op("tiltscope::sae_rows_vjp", mutates_args=())
def _sae_rows_vjp(
    pre_bar: Tensor, direction: Tensor, grid: Sequence[int], dtype: torch.dtype, implementation: str
) -> Tensor:
    if implementation == "triton":
        from tiltscope.kernels.sae_rows import sae_rows_vjp as run
    else:
        run = reference_feature.sae_rows_vjp
        run = compiled(run) if implementation == "compiled" else run
    made = run(pre_bar.contiguous(), direction, (grid[0], grid[1]), dtype)
    count_call("sae_rows_vjp", implementation)
    return made


@_sae_rows_vjp.register_fake
def _sae_rows_vjp_fake(
    pre_bar: Tensor, direction: Tensor, grid: Sequence[int], dtype: torch.dtype, implementation: str
) -> Tensor:
    return direction.new_empty(pre_bar.shape[0], pre_bar.shape[2], direction.shape[2], dtype=dtype)


def _keep_rows(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    tokens, direction, _, grid, implementation = inputs
    ctx.save_for_backward(direction)  # type: ignore[arg-type]
    ctx.chosen = grid, tokens.dtype, implementation  # type: ignore[attr-defined]


def _rows_backward(ctx: torch.autograd.function.FunctionCtx, pre_bar: Tensor) -> tuple[Tensor | None, ...]:
    (direction,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.tiltscope.sae_rows_vjp(pre_bar, direction, *ctx.chosen), *[None] * 4  # type: ignore[attr-defined]


_sae_rows.register_autograd(_rows_backward, setup_context=_keep_rows)
