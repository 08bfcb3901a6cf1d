"""The op between a picture and a vision trunk, and its gradient. See dispatch.py and, for "reference", dispatch_feature.py."""

import torch
from torch import Tensor

from tiltscope.kernels import reference_preprocess
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

_FLOATS = (*STATE_DTYPES, *NETWORK_DTYPES)


def preprocess(
    x0: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    clamp: bool = False,
    dtype: torch.dtype,
    implementation: Implementation = "reference",
) -> Tensor:
    """-> pixels [batch, channel, new_height, new_width] in dtype, of reference_preprocess.preprocess; differentiable in x0 alone.

    x0 [batch, channel, height, width] of any floating type (triton: neither it nor dtype float64); mean, std [1, channel, 1, 1],
    rows [new_height, height], columns [new_width, width], all in dtype; of rows and columns both or neither. Raises ConfigError,
    RunnerError.
    """
    require_implementation(implementation, x0.device)
    allowed = _FLOATS if implementation != "triton" else (torch.float32, *NETWORK_DTYPES)
    require(dtype in allowed, "dtype", dtype, " or ".join(map(str, allowed)))
    require(x0.dim() == 4 and x0.numel() > 0, "x0", f"shape {list(x0.shape)}", "[batch, channel, height, width]")
    require(x0.dtype in allowed, "x0", x0.dtype, " or ".join(map(str, allowed)))
    channels, height, width = x0.shape[1:]
    for name, each in (("mean", mean), ("std", std)):
        require_like(name, each, (1, channels, 1, 1), [dtype], x0.device)
    require((rows is None) == (columns is None), "columns", columns, "given with rows, or neither")
    for name, matrix, inputs in (("rows", rows, height), ("columns", columns, width)):
        if matrix is not None:
            shape = f"shape {list(matrix.shape)}"
            require(matrix.dim() == 2 and matrix.numel() > 0, name, shape, f"[new size, {inputs}]")
            require_like(name, matrix, (matrix.shape[0], inputs), [dtype], x0.device)
    if implementation in INLINE:
        count_call("preprocess", "reference")
        return reference_preprocess.preprocess(x0, mean, std, rows, columns, clamp, dtype).pixels
    return torch.ops.tiltscope.preprocess(x0, mean, std, rows, columns, clamp, dtype, implementation)[0]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.contiguous() for each in tensors]


@torch.library.custom_op("tiltscope::preprocess", mutates_args=())
def _preprocess(
    x0: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    clamp: bool,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        from tiltscope.kernels.preprocess import preprocess as run
    else:
        run = reference_preprocess.preprocess
        run = compiled(run) if implementation == "compiled" else run
    made = run(*_contiguous(x0, mean, std, rows, columns), clamp, dtype)  # type: ignore[call-arg,arg-type]
    count_call("preprocess", implementation)
    return made.pixels.contiguous(), made.inside.contiguous()


@_preprocess.register_fake
def _preprocess_fake(
    x0: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    clamp: bool,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    height = x0.shape[2] if rows is None else rows.shape[0]
    width = x0.shape[3] if columns is None else columns.shape[0]
    pixels = x0.new_empty(x0.shape[0], x0.shape[1], height, width, dtype=dtype)
    return pixels, x0.new_empty(pixels.shape if clamp else 0, dtype=torch.bool)


@torch.library.custom_op("tiltscope::preprocess_vjp", mutates_args=())
def _preprocess_vjp(
    pixels_bar: Tensor,
    inside: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    if implementation == "triton":
        from tiltscope.kernels.preprocess import preprocess_vjp as run
    else:
        run = reference_preprocess.preprocess_vjp
        run = compiled(run) if implementation == "compiled" else run
    made = run(*_contiguous(pixels_bar, inside, std, rows, columns), dtype)  # type: ignore[call-arg,arg-type]
    count_call("preprocess_vjp", implementation)
    return made.contiguous()


@_preprocess_vjp.register_fake
def _preprocess_vjp_fake(
    pixels_bar: Tensor,
    inside: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    height = pixels_bar.shape[2] if rows is None else rows.shape[1]
    width = pixels_bar.shape[3] if columns is None else columns.shape[1]
    return pixels_bar.new_empty(pixels_bar.shape[0], pixels_bar.shape[1], height, width, dtype=dtype)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    x0, _, std, rows, columns, _, _, implementation = inputs
    ctx.save_for_backward(output[1], std, rows, columns)  # type: ignore[arg-type]
    ctx.chosen = x0.dtype, implementation  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, pixels_bar: Tensor, inside_bar: Tensor | None
) -> tuple[Tensor | None, ...]:
    inside, std, rows, columns = ctx.saved_tensors  # type: ignore[attr-defined]
    made = torch.ops.tiltscope.preprocess_vjp(pixels_bar, inside, std, rows, columns, *ctx.chosen)  # type: ignore[attr-defined]
    return made, *[None] * 7


_preprocess.register_autograd(_backward, setup_context=_keep)
