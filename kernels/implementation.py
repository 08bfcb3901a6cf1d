"""Which implementation of an op runs: asked for by name, counted, and refused where it cannot run. See dispatch.py."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tiltscope.kernels import native
from tiltscope.kernels.errors import ConfigError, RunnerError

Implementation = Literal["reference", "native", "compiled", "triton"]
# What runs a definition as it stands, where autograd and tracers see its operations ("native": of all ops but the guided step).
INLINE = ("reference", "native")
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
Calls = Counter[tuple[str, str]]

STATE_DTYPES = (torch.float32, torch.float64)
NETWORK_DTYPES = (torch.bfloat16, torch.float16)

_counting: ContextVar[tuple[Calls, ...]] = ContextVar("counting", default=())


@contextmanager
def count_calls() -> Generator[Calls]:
    """Counts, by (op, implementation), what really runs inside the block, on this thread or task.

    A replay of a CUDA graph runs no Python: who replays adds what one replay holds. Tracing counts nothing.
    """
    calls: Calls = Counter()
    token = _counting.set((*_counting.get(), calls))
    try:
        yield calls
    finally:
        _counting.reset(token)


def count_call(op: str, implementation: str) -> None:
    """Said by an op where it really runs."""
    if torch.compiler.is_compiling():
        return
    for calls in _counting.get():
        calls[op, implementation] += 1


def require_implementation(implementation: str, device: torch.device) -> None:
    """Raises ConfigError for a name that is none, RunnerError where `implementation` cannot run on `device`."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"kernels: got {implementation!r}, allowed are {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        return
    if implementation == "native":
        if device.type != "cpu":
            raise RunnerError(
                f"kernels 'native' run on a CPU, the tensors are on {device}; use kernels 'reference' or 'triton'"
            )
        return native.require_native()
    if implementation == "compiled":
        if device.type == "cpu":
            require_compiler()
        return
    if importlib.util.find_spec("triton") is None:
        raise RunnerError("kernels 'triton' need the package triton; install it: pip install 'tiltscope[triton]'")
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise RunnerError(
            f"kernels 'triton' run on a CUDA device, the tensors are on {device}; use kernels 'reference', or set "
            "TRITON_INTERPRET=1 before Python starts to have them interpreted on the CPU (slowly)"
        )


@cache
def require_compiler() -> None:
    """Raises RunnerError where torch.compile would find no C++ compiler."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunnerError(
            "kernels 'compiled' need a C++ compiler on a CPU, and torch found none; install g++ or clang, or use "
            "kernels 'reference'"
        ) from error


@cache
def compiled(definition: Callable[..., Any]) -> Callable[..., Any]:
    """A definition through torch.compile: a program for each shape, so that no number depends on which was first."""
    return torch.compile(definition, fullgraph=True, dynamic=False)


def require(condition: bool, argument: str, got: object, allowed: str) -> None:
    """Raises ConfigError naming the argument."""
    if not condition:
        raise ConfigError(f"{argument}: got {got}, allowed is {allowed}")


def require_like(
    argument: str, given: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raises ConfigError unless `given` has that shape, one of these types, and lies where x does."""
    # The words are made where they are needed: this stands before every step.
    if given.device != device:
        require(False, argument, f"a tensor on {given.device}", f"{device}, where x is")
    if given.dtype not in dtypes:
        require(False, argument, given.dtype, " or ".join(map(str, dtypes)))
    if given.shape != shape and given.shape != tuple(shape):
        require(False, argument, f"shape {list(given.shape)}", f"{list(shape)}")
