"""Compiled kernels, executed: a case's tensors laid out as a launch would lay them out, poisoned outputs, what was seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kernel_builds import Variant, compile_for
from kernel_cases import GuidedCase
from ptx_executor import Kernel, Seen, launch
from torch import Tensor

from tiltscope.kernels.reference import GuidedStep

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
