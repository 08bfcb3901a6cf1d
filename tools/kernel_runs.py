"""Compiled kernels, executed: a case's tensors laid out as a launch would lay them out, poisoned outputs, what was seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kernel_builds import Variant, compile_for
from kernel_cases import GuidedCase
from ptx_executor import Kernel, Seen, launch
from readout_cases import ReadoutCase
from torch import Tensor

from tiltscope.kernels.reference import GuidedStep, Resampled

# Where the arguments of the guided step's kernel stand.
X, X0_HAT, GRAD_A, HISTORY = range(4)
X_OUT, HISTORY_OUT = 15, 16


def as_memory(t: Tensor) -> Any:
    """A copy of a tensor's elements in the order in which they lie in memory; bfloat16 as its bits."""
    if t.dim() == 4 and not t.is_contiguous():
        t = t.permute(0, 2, 3, 1).contiguous()
    return (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy().copy()


def run_guided_step(
    variant: Variant,
    target: int,
    case: GuidedCase,
    *,
    change: Callable[[str], str] = str,
    ticket: int = 0,
    short_by: int = 0,
    approximation: float = 0.0,
) -> tuple[GuidedStep, Seen]:
    """One launch of the compiled kernel on `case`, every output poisoned before.

    change: of the PTX, to plant a defect. ticket: what the counters hold before (0 is right). short_by: how many elements the
    output x' lacks at its end.
    """
    made = compile_for(variant, target)
    batch, n = case.x.shape[0], case.x[0].numel()
    blocks = -(-n // (4 * variant.constants["GROUPS"]))
    outputs: list[Any] = [np.full(batch * n - short_by, np.nan, np.float32), np.full(batch * n, np.nan, np.float32)]
    outputs += [np.full(batch, -7, np.int64), np.zeros(batch, bool)]
    outputs += [np.full(batch, np.nan, np.float32) for _ in range(3)]
    tickets = np.full(batch, ticket, np.int32)
    channels = case.x.shape[1] if variant.constants["CHANNELS_LAST"] else 1
    sizes = [case.table.shape[0], case.table.shape[1], n, channels, blocks, *[n] * 5]
    memory = [*map(as_memory, case), *outputs, np.full((batch, 4, blocks), np.nan, np.float32), tickets, *sizes]
    kernel = Kernel(change(made.asm["ptx"]))
    seen = launch(kernel, batch * blocks, memory, made.metadata.shared, approximation=approximation)
    assert tickets.tolist() == [0] * batch, f"tickets are left at {tickets.tolist()}"
    x, history, *rest = (torch.from_numpy(each) for each in outputs)
    shape = case.x.shape
    if variant.constants["CHANNELS_LAST"]:
        shape = (shape[0], *shape[2:], shape[1])
    x, history = x.view(shape), history.view(shape)
    if variant.constants["CHANNELS_LAST"]:
        x, history = x.permute(0, 3, 1, 2), history.permute(0, 3, 1, 2)
    return GuidedStep(x, history, *rest), seen


def run_readout(
    variant: Variant, vjp: Variant, target: int, case: ReadoutCase, *, change: Callable[[str], str] = str
) -> tuple[Tensor, Tensor, Tensor, Seen, Seen]:
    """-> activation, drive and the tokens' cotangent of the two compiled kernels, and what each did.

    change: of both kernels' PTX, to plant a defect. The cotangent has the type of the tokens.
    """
    batch, num_tokens, width = case.tokens.shape
    rows = case.direction.shape[1]
    pooled, pre = np.full((batch, rows, 2), np.nan, np.float32), np.full((batch, rows, num_tokens), np.nan, np.float32)
    bar = torch.full(case.tokens.shape, torch.nan, dtype=case.tokens.dtype)
    tokens, direction, bias, threshold, weight, pooling, mask, *bars = map(as_memory, case)
    sizes = [rows, num_tokens, width]
    made = compile_for(variant, target)
    memory = [tokens, direction, bias, threshold, pooling, mask, pooled, pre, *sizes]
    forward = launch(Kernel(change(made.asm["ptx"])), batch * rows, memory, made.metadata.shared)
    made = compile_for(vjp, target)
    out = as_memory(bar)
    memory = [*bars, pre, direction, threshold, weight, pooling, mask, out, *sizes]
    grid = (batch, -(-num_tokens // vjp.constants["TOKENS"]), -(-width // vjp.constants["WIDTH"]))
    backward = launch(Kernel(change(made.asm["ptx"])), grid, memory, made.metadata.shared)
    activation, drive = (case.weight[..., None] * torch.from_numpy(pooled)).sum(1).unbind(1)
    cotangent = torch.from_numpy(out)
    return activation, drive, cotangent.view(bar.dtype), forward, backward


def run_resample(
    variant: Variant, target: int, log_weight: Tensor, u: Tensor, *, change: Callable[[str], str] = str
) -> tuple[Resampled, Seen]:
    """One launch of the compiled kernel, every output poisoned before; threshold: the variant's. change: of the PTX."""
    made = compile_for(variant, target)
    groups, num = log_weight.shape
    log_mean = torch.full((groups,), torch.nan, dtype=log_weight.dtype)
    outputs: list[Any] = [np.full((groups, num), -7, np.int64), as_memory(log_mean), np.zeros(groups, bool)]
    memory = [as_memory(log_weight), as_memory(u), *outputs, num]
    seen = launch(Kernel(change(made.asm["ptx"])), groups, memory, made.metadata.shared)
    return Resampled(*map(torch.from_numpy, outputs)), seen
