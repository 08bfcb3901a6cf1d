"""Arguments for the tests of the ops before and behind a trunk, preprocess and sae_rows, and what their definitions say."""

from typing import NamedTuple

import torch
from torch import Tensor

from tiltscope.kernels import reference_feature, reference_preprocess

# A 16-bit result is rounded once more, by half a unit in its last place: of 8 and of 11 significant bits.
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float32 against float64, as a share of the largest value of what is compared. Pixels: some 40 products of weights within half a
# unit in the last place. Rows: a sum of `width` products an h w of them, whose order is free.
PIXEL_TOLERANCE, ROW_TOLERANCE = 1e-6, 2e-6


class PreprocessCase(NamedTuple):
    """The arguments of dispatch_preprocess.preprocess, and the cotangent of its result."""

    x0: Tensor
    mean: Tensor
    std: Tensor
    rows: Tensor | None
    columns: Tensor | None
    clamp: bool
    dtype: torch.dtype
    pixels_bar: Tensor


def preprocess_case(
    batch: int,
    size: tuple[int, int],
    new_size: tuple[int, int] | None = None,
    *,
    channels: int = 3,
    clamp: bool = False,
    dtype: torch.dtype = torch.float32,
    x0_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreprocessCase:
    """Pictures beyond [-1, 1] too; new_size None: no resize."""
    generator = torch.Generator().manual_seed(seed)
    out = new_size or size
    matrices = [
        None if new_size is None else reference_preprocess.resize_matrix(old, new, torch.float64).to(dtype)
        for old, new in zip(size, out, strict=True)
    ]
    tables = (0.4 + 0.2 * torch.rand(2, 1, channels, 1, 1, generator=generator)).to(dtype)
    return PreprocessCase(
        x0=(0.8 * torch.randn(batch, channels, *size, generator=generator)).to(x0_dtype),
        mean=tables[0],
        std=tables[1],
        rows=matrices[0],
        columns=matrices[1],
        clamp=clamp,
        dtype=dtype,
        pixels_bar=torch.randn(batch, channels, *out, generator=generator).to(dtype),
    )


def check_preprocess(pixels: Tensor, x0_bar: Tensor, case: PreprocessCase) -> None:
    """Raises AssertionError where a result is not the definition's, in float64."""
    x0, mean, std, rows, columns, clamp, _, bar = (
        each.detach().double() if isinstance(each, Tensor) else each for each in case
    )
    exact = reference_preprocess.preprocess(x0, mean, std, rows, columns, clamp, torch.float64)
    exact_bar = reference_preprocess.preprocess_vjp(bar, exact.inside, std, rows, columns, torch.float64)
    _check("pixels", pixels, exact.pixels, case.dtype, PIXEL_TOLERANCE)
    _check("x0_bar", x0_bar, exact_bar, case.x0.dtype, PIXEL_TOLERANCE)


def _check(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert got.dtype == dtype, f"{name} is {got.dtype}"
    assert got.shape == exact.shape, f"{name} is {list(got.shape)}"
    scale = exact.abs().max().clamp(min=1e-30)
    error = float(((got.double() - exact).abs() / scale).max())
    assert error <= tolerance + ROUNDING[dtype], f"{name}: off by {error:.1e} of its scale"


class RowsCase(NamedTuple):
    """The arguments of dispatch_feature.sae_rows, and the cotangent of its result."""

    tokens: Tensor
    direction: Tensor
    bias: Tensor
    grid: tuple[int, int] | None
    pre_bar: Tensor

    @property
    def places(self) -> tuple[int, int]:
        """The grid, of one line where the encoder is linear."""
        return self.grid or (1, self.tokens.shape[1])


def rows_case(
    batch: int,
    grid: tuple[int, int],
    width: int,
    rows: int,
    window: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RowsCase:
    """window None: a linear encoder of grid[0] grid[1] tokens. dtype: of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    num, taps = grid[0] * grid[1], window or ()
    return RowsCase(
        tokens=torch.randn(batch, num, width, generator=generator).to(dtype),
        direction=torch.randn(batch, rows, width, *taps, generator=generator) / width**0.5,
        bias=torch.randn(batch, rows, generator=generator),
        grid=None if window is None else grid,
        pre_bar=torch.randn(batch, rows, num, generator=generator),
    )


def check_rows(pre: Tensor, tokens_bar: Tensor, case: RowsCase) -> None:
    """Raises AssertionError where a result is not the definition's, in float64."""
    tokens, direction, bias, bar = (
        each.detach().double() for each in (case.tokens, case.direction, case.bias, case.pre_bar)
    )
    exact = reference_feature.sae_rows(tokens, direction, bias, case.places)
    exact_bar = reference_feature.sae_rows_vjp(bar, direction, case.places, torch.float64)
    _check("pre", pre, exact, torch.float32, ROW_TOLERANCE)
    _check("tokens_bar", tokens_bar, exact_bar, case.tokens.dtype, ROW_TOLERANCE)
