"""The operations as torch.library ops, `torch.ops.tiltscope.*`: one name each, and the implementation asked for by name.

    reference   plain torch (reference.py), any device, float32 and float64
    native      the guided step's definition bit for bit, on a CPU, by C++ (native.py), and the normals of a start; of the other
                ops, the definition
    compiled    the same through torch.compile, which fuses it; needs a C++ compiler on a CPU, and half a minute a shape
    triton      one kernel (the file of the op's name): a CUDA device, or the CPU under TRITON_INTERPRET=1; float32 state

What is asked for is what runs, or an error says what is missing: nothing falls back. `count_calls` tells a manifest what ran. The
ops have fake implementations, so torch.compile, make_fx and torch.export trace through them. A shape, type, stride or device that
an op cannot take is a ConfigError naming the argument; so is a row past its plan where reading it costs no synchronisation (the
CPU). On a device a row past its plan reads no memory outside the table, and its slot is one that has done its plan.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tiltscope.kernels import native, philox, reference
from tiltscope.kernels.implementation import (
    IMPLEMENTATIONS,
    NETWORK_DTYPES,
    STATE_DTYPES,
    Calls,
    Implementation,
    compiled,
    count_call,
    count_calls,
    require,
    require_implementation,
    require_like,
)
from tiltscope.kernels.reference import GuidedStep, Resampled, StepInputs, require_rows

__all__ = [
    "IMPLEMENTATIONS",
    "Calls",
    "Implementation",
    "count_calls",
    "guided_step",
    "normal_of",
    "require_implementation",
    "resample",
]

_COLUMNS = 11
_PICTURES = StepInputs._fields[:4]
_INTEGER, _TRUTH = (torch.int64,), (torch.bool,)
# Arguments of one number a slot, and their dtype; None: the state's.
_PER_SLOT = (
    *((name, _INTEGER) for name in ("plan", "row", "index", "particle")),
    *((name, _TRUTH) for name in ("ok", "guided")),
    *((name, None) for name in ("drive", "strength")),
)
MAX_PARTICLES = 4096  # of a group, with kernels 'triton': one program holds them all


def is_dense(x: Tensor, *, channels_last: bool) -> bool:
    """Whether every sample of x lies in memory as one block, in C order or channels last; the batch stride is free."""
    if channels_last:
        return x.dim() == 4 and x[:1].is_contiguous(memory_format=torch.channels_last)
    return x[:1].is_contiguous()


def guided_step(
    inputs: StepInputs, *, ticket: Tensor | None = None, implementation: Implementation = "reference"
) -> GuidedStep:
    """reference.guided_step by the implementation asked for. Shapes: StepInputs; x' and H' lie in memory as x does.

    x, history, table, drive, strength: one dtype, float32 or float64 (triton: float32). x0_hat, grad_a: that dtype, or both
    bfloat16 or both float16; grad_a None where no slot is guided, which spares reading it (compiled, triton: read zeros).
    num_rows, plan, row, key, index, particle int64, ok and guided bool. Strides: x, x0_hat, grad_a and history each C order or
    all channels last within a sample, any stride between samples (reference: any).
    ticket: int32 [batch] of zeros, zeros again afterwards, for launches that follow each other on one stream; without it triton
    fills one of its own, a second small launch. Raises ConfigError, RunnerError.
    """
    x = inputs.x
    require_implementation(implementation, x.device)
    _check_guided_step(inputs)
    if implementation == "triton":
        require(x.dtype == torch.float32, "x", x.dtype, "torch.float32 with kernels 'triton'; 'reference' has float64")
        if ticket is not None:
            require_like("ticket", ticket, x.shape[:1], [torch.int32], x.device)
        last = is_dense(x, channels_last=True) and not is_dense(x, channels_last=False)
        for name, each in zip(_PICTURES, inputs, strict=False):
            if each is None:
                continue
            order = "channels last, as x" if last else "C order (contiguous) or, all four tensors alike, channels last"
            got = f"strides {each.stride()}"
            require(is_dense(each, channels_last=last), name, got, f"a sample dense in {order}: call .contiguous()")
    # The op is for whoever watches; around a step of tens of microseconds it takes as long again.
    run = torch.ops.tiltscope.guided_step if _watched(x) else _run_guided_step
    return GuidedStep(*run(*inputs, ticket, implementation))


def _check_guided_step(inputs: StepInputs) -> None:
    x, table, dtype, device = inputs.x, inputs.table, inputs.x.dtype, inputs.x.device
    # Words are made where they are needed, and nothing is looked at twice: this stands before every step.
    if dtype not in STATE_DTYPES:
        require(False, "x", dtype, " or ".join(map(str, STATE_DTYPES)))
    whole, length = x.shape, len(x)
    if len(whole) < 2 or not x.numel():
        require(False, "x", f"shape {list(whole)}", "[batch, ...] with at least one element")
    require_like("history", inputs.history, whole, (dtype,), device)
    require_like("x0_hat", inputs.x0_hat, whole, (dtype, *NETWORK_DTYPES), device)
    if inputs.grad_a is not None:
        require_like("grad_a", inputs.grad_a, whole, (inputs.x0_hat.dtype,), device)
    plans = table.shape
    if len(plans) != 3:
        require(False, "table", f"shape {list(plans)}", "[plan, row, 11]")
    if not table.numel():
        require(False, "table", f"shape {list(plans)}", "at least one plan of at least one row")
    require_like("table", table, (plans[0], plans[1], _COLUMNS), (dtype,), device)
    require_like("num_rows", inputs.num_rows, (plans[0],), _INTEGER, device)
    require_like("key", inputs.key, (length, 2), _INTEGER, device)
    one, state = (length,), (dtype,)
    for name, dtypes in _PER_SLOT:
        require_like(name, getattr(inputs, name), one, dtypes or state, device)


def _watched(x: Tensor) -> bool:
    """Whether a tracer, a mode or autograd must see the op as one."""
    return torch.compiler.is_compiling() or x.requires_grad or type(x) is not Tensor or is_in_torch_dispatch_mode()


def _run_guided_step(*given: Any) -> tuple[Tensor, ...]:
    """given: the fields of StepInputs, the ticket or None, the implementation."""
    inputs, ticket, implementation = StepInputs(*given[:-2]), given[-2], given[-1]
    if implementation == "native" and inputs.grad_a is not None and not inputs.grad_a.is_contiguous():
        # torch adds up a gradient in the order in which it lies in memory, so another order is other bits.
        implementation = "reference"
    if implementation != "native" and inputs.x.device.type == "cpu":  # native looks itself
        require_rows(inputs)
    if inputs.grad_a is None and implementation in ("compiled", "triton"):
        # Another form of theirs would be another program for every shape.
        nothing = torch.zeros_like(inputs.x0_hat)
        inputs = inputs._replace(grad_a=nothing, guided=torch.zeros_like(inputs.guided))
    if implementation == "triton":
        from tiltscope.kernels.guided_step import guided_step as kernel

        made = kernel(inputs, ticket)
    else:
        if implementation == "native":
            run = native.guided_step
        else:
            run = compiled(reference.guided_step) if implementation == "compiled" else reference.guided_step
        made = run(inputs)
        if not (inputs.x.is_contiguous() and made.x.is_contiguous() and made.history.is_contiguous()):
            like = torch.empty_like(inputs.x)
            made = made._replace(x=_laid_out(made.x, like), history=_laid_out(made.history, like))
    count_call("guided_step", implementation)
    return tuple(made)


def _laid_out(made: Tensor, like: Tensor) -> Tensor:
    """`made` in the memory layout of `like`; itself where it is so already."""
    return made if made.stride() == like.stride() else torch.empty_like(like).copy_(made)


def normal_of(implementation: Implementation) -> Callable[..., Tensor]:
    """philox.normal, or one of the same arguments and bits that this implementation has of its own: native."""
    return native.normal if implementation == "native" else philox.normal


# The op's arguments are flat, as torch.library wants them: the fields of one record, the results those of another.
_FIELDS = ", ".join(f"Tensor{'?' if name == 'grad_a' else ''} {name}" for name in StepInputs._fields)
_SCHEMA = f"({_FIELDS}, Tensor? ticket, str implementation) -> ({', '.join('Tensor' for _ in GuidedStep._fields)})"
_guided_step = torch.library.custom_op("tiltscope::guided_step", _run_guided_step, mutates_args=(), schema=_SCHEMA)


@_guided_step.register_fake
def _guided_step_fake(*given: Any) -> tuple[Tensor, ...]:
    x, row, ok = given[0], *(given[StepInputs._fields.index(name)] for name in ("row", "ok"))
    statistics = [x.new_empty(x.shape[0]) for _ in GuidedStep._fields[4:]]
    return (torch.empty_like(x), torch.empty_like(x), torch.empty_like(row), torch.empty_like(ok), *statistics)


def resample(
    log_weight: Tensor, u: Tensor, threshold: float = 0.5, *, implementation: Implementation = "reference"
) -> Resampled:
    """reference.resample by the implementation asked for. log_weight [group, particle], u [group], float32 or float64.

    triton: at most MAX_PARTICLES particles a group. Raises ConfigError, RunnerError.
    """
    require_implementation(implementation, log_weight.device)
    require(log_weight.dtype in STATE_DTYPES, "log_weight", log_weight.dtype, " or ".join(map(str, STATE_DTYPES)))
    shape = f"shape {list(log_weight.shape)}"
    require(log_weight.dim() == 2 and log_weight.numel() > 0, "log_weight", shape, "[group, particle], neither empty")
    require_like("u", u, log_weight.shape[:1], STATE_DTYPES, log_weight.device)
    if implementation == "triton":
        few = f"at most {MAX_PARTICLES} particles a group with kernels 'triton'"
        require(log_weight.shape[1] <= MAX_PARTICLES, "log_weight", shape, few)
    return Resampled(*torch.ops.tiltscope.resample(log_weight, u, threshold, implementation))


@torch.library.custom_op("tiltscope::resample", mutates_args=())
def _resample(log_weight: Tensor, u: Tensor, threshold: float, implementation: str) -> tuple[Tensor, Tensor, Tensor]:
    if implementation == "triton":
        from tiltscope.kernels.resample import resample as run
    else:
        run = compiled(reference.resample) if implementation == "compiled" else reference.resample
    made = run(log_weight, u, threshold)
    count_call("resample", "reference" if implementation == "native" else implementation)
    return made.ancestor.clone(), made.log_mean, made.due


@_resample.register_fake
def _resample_fake(
    log_weight: Tensor, u: Tensor, threshold: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    groups, num = log_weight.shape
    return (
        log_weight.new_empty(groups, num, dtype=torch.int64),
        log_weight.new_empty(groups),
        log_weight.new_empty(groups, dtype=torch.bool),
    )
