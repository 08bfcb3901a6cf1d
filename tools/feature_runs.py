"""The compiled kernels of preprocess and sae_rows, executed: see kernel_runs.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from feature_cases import PreprocessCase, RowsCase
from kernel_builds import Variant, compile_for
from kernel_runs import as_memory
from ptx_executor import Kernel, Seen, launch
from torch import Tensor

from tiltscope.kernels.preprocess import taps_of

Change = Callable[[str], str]
# Where the arguments of the kernels stand.
TOKENS, PRE, TOKENS_BAR = 0, 3, 2
X0, PIXELS, INSIDE = 0, 5, 6
PIXELS_BAR, X0_BAR = 0, 5


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return as_memory(torch.full(shape, torch.nan, dtype=dtype))


def _tensor(memory: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(memory).view(like.dtype).view(like.shape)


def run_sae_rows(
    variant: Variant, vjp: Variant, target: int, case: RowsCase, *, change: Change = str
) -> tuple[Tensor, Tensor, Seen, Seen]:
    """-> pre and the tokens' cotangent of the two compiled kernels, and what each did. change: of both kernels' PTX."""
    batch, num_tokens, width = case.tokens.shape
    rows = case.direction.shape[1]
    direction = case.direction.contiguous()
    window = (1, 1) if case.grid is None else tuple(direction.shape[3:])
    strides = (*direction.stride()[:3], 0 if case.grid is None else 1)
    sizes = [rows, width, *case.places, *window, *strides]
    pre = _poisoned((batch, rows, num_tokens), torch.float32)
    made = compile_for(variant, target)
    memory = [*map(as_memory, (case.tokens, direction, case.bias)), pre, *sizes]
    grid = (batch * rows, -(-num_tokens // variant.constants["TOKENS"]), 1)
    forward = launch(Kernel(change(made.asm["ptx"])), grid, memory, made.metadata.shared)
    bar = _poisoned(tuple(case.tokens.shape), case.tokens.dtype)
    made = compile_for(vjp, target)
    memory = [*map(as_memory, (case.pre_bar, direction)), bar, *sizes]
    grid = (batch, -(-num_tokens // vjp.constants["TOKENS"]), -(-width // vjp.constants["WIDTH"]))
    backward = launch(Kernel(change(made.asm["ptx"])), grid, memory, made.metadata.shared)
    return torch.from_numpy(pre), _tensor(bar, case.tokens), forward, backward


def run_preprocess(
    variant: Variant, vjp: Variant, target: int, case: PreprocessCase, *, change: Change = str
) -> tuple[Tensor, Tensor, Seen, Seen]:
    """-> pixels and the picture's cotangent of the two compiled kernels, and what each did. change: of both kernels' PTX."""
    batch, channels, *size = case.x0.shape
    new = tuple(case.pixels_bar.shape[2:])
    x0, mean, std, bar = map(as_memory, (case.x0, case.mean, case.std, case.pixels_bar))
    matrices = [x0 if each is None else as_memory(each) for each in (case.rows, case.columns)]
    pixels = _poisoned(tuple(case.pixels_bar.shape), case.dtype)
    inside = np.zeros(pixels.shape if case.clamp else 1, bool)

    def planes(place: tuple[int, ...]) -> tuple[int, int, int]:
        return batch * channels, -(-place[0] * place[1] // variant.constants["BLOCK"]), 1

    taps = [taps_of(old, made) for old, made in zip(size, new, strict=True)]
    made = compile_for(variant, target)
    memory = [x0, mean, std, *matrices, pixels, inside, channels, *size, *new, *taps]
    forward = launch(Kernel(change(made.asm["ptx"])), planes(new), memory, made.metadata.shared)
    taps = [taps_of(made, old) for old, made in zip(size, new, strict=True)]
    x0_bar = _poisoned(tuple(case.x0.shape), case.x0.dtype)
    made = compile_for(vjp, target)
    memory = [bar, inside, std, *matrices, x0_bar, channels, *size, *new, *taps]
    backward = launch(Kernel(change(made.asm["ptx"])), planes(tuple(size)), memory, made.metadata.shared)
    return _tensor(pixels, case.pixels_bar), _tensor(x0_bar, case.x0), forward, backward
