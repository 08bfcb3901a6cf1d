"""The guided step on a CPU through C++ (native.cpp), bit for bit the definition in torch, some ten times sooner.

Drawing noise is most of the definition's time: 140 operations on 64-bit words, a round of Philox at a time. C++ does what is
exact (whole numbers, and sums and products in the definition's own order); torch does logarithm, root, cosine, sine and the sums
over a sample, whose last bits are its own (its root, by MKL, is not the correctly rounded one). So whether a compiler is there
decides how long it takes, and no bit of any picture.

The library is compiled once, in about a second, into TILTSCOPE_HOME/native (default: the user's cache), under a name that says
what it was made of. It is trusted after it has redone a small step of the definition's, bit for bit, in the process that loads
it.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tiltscope.kernels import reference
from tiltscope.kernels.errors import RunnerError
from tiltscope.kernels.reference import GuidedStep, StepInputs, require_rows

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# torch's name for what the processor can do -> what the compiler may use of it; elsewhere its own defaults.
_VECTORS = {"AVX2": ("-mavx2",), "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")}
_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_SECONDS = 120  # for the compiler: some hundred times what it needs
_STREAM_STEP = 1
_MINUS_TWO = {
    dtype: torch.tensor(-2, dtype=dtype, device="cpu") for dtype in _NAMES
}  # a number would be made a tensor in every call


class _Passes(NamedTuple):
    """The two passes for one type."""

    uniforms: Callable[..., None]
    step: Callable[..., bool]


class _Room(NamedTuple):
    """Memory for what does not outlive a call, and its addresses: radius and angle stand where u and 2 pi u stood."""

    of: tuple[tuple[int, ...], torch.dtype]
    radius: Tensor
    cosine: Tensor
    sine: Tensor
    statistics: tuple[Tensor, ...]
    drawn: list[int | None]
    summed: list[int | None]


# A thread keeps the last one it used: fresh memory of this size is the system's, which clears it page by page.
_kept = threading.local()


def guided_step(inputs: StepInputs) -> GuidedStep:
    """reference.guided_step of checked arguments on the CPU (dispatch.py); grad_a in C order, and so x' and H'.

    Raises RunnerError where the library cannot be made, ConfigError for a plan or a row that is not there.
    """
    x, x0_hat, grad_a, history, table, num_rows, plan, row, ok, drive, strength, guided, key, index, particle = inputs
    # Conversions cost a microsecond each where there is nothing to convert.
    x0_hat, grad_a = (each if each is None or each.dtype == x.dtype else each.to(x.dtype) for each in (x0_hat, grad_a))
    pictures = [None if each is None else each.contiguous() for each in (x, x0_hat, grad_a, history)]
    slots = [each.contiguous() for each in (table, num_rows, plan, row, ok, drive, strength, guided)]
    room = _draws(key, index, row, particle, _STREAM_STEP, tuple(x.shape), x.dtype)
    x_out, history_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    row_out, ok_out = torch.empty_like(slots[3]), torch.empty_like(slots[4])
    known = library()[x.dtype].step(
        len(x),
        x.numel() // len(x),
        *table.shape[:2],
        *room.drawn,
        *_pointers(*pictures, *slots, x_out, history_out, row_out, ok_out),
        *room.summed,
    )
    if not known:
        require_rows(inputs)  # says what
        raise RunnerError(
            "kernels 'native': a plan or a row changed while it was read; nothing else may write to the slots"
        )
    if grad_a is None:
        statistics = [torch.zeros_like(drive) for _ in range(3)]
    else:
        over = tuple(range(1, x.dim()))
        statistics = [each.sum(over) for each in room.statistics]
    return GuidedStep(x_out, history_out, row_out, ok_out, *statistics)


def normal(
    key: Int[Tensor, "batch 2"],
    index: Int[Tensor, "batch"],
    row: Int[Tensor, "batch"],
    particle: Int[Tensor, "batch"],
    *,
    stream: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """philox.normal, bit for bit. Raises RunnerError where the library cannot be made."""
    room = _draws(key, index, row, particle, stream, (len(index), *shape), dtype)
    z = torch.stack((room.radius * room.cosine, room.radius * room.sine), dim=-1)
    return z.flatten(1)[:, : prod(shape)].reshape(-1, *shape)


def _draws(
    key: Tensor, index: Tensor, row: Tensor, particle: Tensor, stream: int, shape: tuple[int, ...], dtype: torch.dtype
) -> _Room:
    """Radius, cosine and sine of every normal of `shape` [batch, ...], until this thread's next call."""
    room = getattr(_kept, "room", None)
    if room is None or room.of != (shape, dtype):
        room = _kept.room = _make_room(shape, dtype)
    words = [each.contiguous() for each in (key, index, row, particle)]
    u, _, angle = room.drawn
    library()[dtype].uniforms(shape[0], room.radius.shape[1], stream, *_pointers(*words), u, angle)
    room.radius.log_().mul_(_MINUS_TWO[dtype]).sqrt_()
    torch.cos(room.sine, out=room.cosine)
    room.sine.sin_()
    return room


def _make_room(shape: tuple[int, ...], dtype: torch.dtype) -> _Room:
    blocks = -(-prod(shape[1:]) // 4)
    with torch.inference_mode(False):  # a tensor of that mode could not be written to outside it
        drawn = [torch.empty(shape[0], blocks, 2, dtype=dtype) for _ in range(3)]
        statistics = tuple(torch.empty(shape, dtype=dtype) for _ in range(3))
    radius, cosine, sine = drawn
    return _Room((shape, dtype), radius, cosine, sine, statistics, _pointers(*drawn), _pointers(*statistics))


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if each is None else each.data_ptr() for each in tensors]


@cache
def library() -> dict[torch.dtype, _Passes]:
    """The passes by the state's type, compiled where they are not yet. Raises RunnerError saying what is missing."""
    loaded = ctypes.CDLL(str(_built()))
    passes: dict[torch.dtype, _Passes] = {}
    for dtype, name in _NAMES.items():
        uniforms, step = (loaded[f"{each}_{name}"] for each in ("uniforms", "step"))
        uniforms.argtypes, uniforms.restype = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 6, None
        step.argtypes, step.restype = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 22, ctypes.c_bool
        passes[dtype] = _Passes(uniforms, step)
    return passes


@cache
def require_native() -> None:
    """Raises RunnerError where the library cannot be made here, or is not the definition bit for bit."""
    library()
    for dtype, unguided in product(_NAMES, (False, True)):
        case = _trial(dtype)._replace(grad_a=None) if unguided else _trial(dtype)
        for name, mine, exact in zip(GuidedStep._fields, guided_step(case), reference.guided_step(case), strict=True):
            if not torch.equal(mine, exact):
                raise RunnerError(
                    f"kernels 'native': {name} differs from the definition's in {dtype} on this machine; use kernels 'reference'"
                )


def _trial(dtype: torch.dtype) -> StepInputs:
    """Three slots, one unguided and one that fails, of 37 elements: whole vectors and what is left over."""
    place = torch.arange(3 * 37, dtype=torch.float64).reshape(3, 37)
    pictures = [torch.sin(place * step).to(dtype) for step in (0.7, 1.1, 1.7, 2.3)]
    pictures[1][2, 36] = torch.inf
    slot = torch.arange(3)
    table = torch.cos(torch.arange(2 * 5 * 11, dtype=torch.float64)).reshape(2, 5, 11).to(dtype)
    some = torch.tensor([0.5, torch.nan, 2.0], dtype=dtype)
    slots = [torch.tensor([5, 3]), slot % 2, slot, slot >= 0, some, some.nan_to_num(), slot != 1]
    key = torch.stack([slot + 2**31, slot * 7], 1)
    return StepInputs._make([*pictures, table, *slots, key, slot * 2**29, slot * 65535 // 2])


def _built() -> Path:
    """The library's file. A process that finds none makes one under a name of its own and renames it, whole."""
    compiler = _compiler()
    flags = [*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())]
    what = "\n".join([SOURCE.read_text(), *flags, _run([compiler, "--version"])])
    library = _folder() / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        made = library.with_name(f"{library.stem}.{os.getpid()}.making")
        _run([compiler, *flags, str(SOURCE), "-o", str(made)])
        made.replace(library)
    return library


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    raise RunnerError("kernels 'native' need a C++ compiler: install g++ or clang++, or use kernels 'reference'")


def _folder() -> Path:
    """TILTSCOPE_HOME/native, mode 0700. Raises RunnerError where others could write into it: what lies there is run."""
    home = os.environ.get("TILTSCOPE_HOME")
    folder = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiltscope"
    folder = folder / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise RunnerError(
            f"kernels 'native' keep a library in {folder}, which cannot be made ({error}); set TILTSCOPE_HOME to a folder "
            "of your own, or use kernels 'reference'"
        ) from error
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise RunnerError(
            f"{folder} belongs to another user or can be written by others, and a library is code; chmod 700 it, or set "
            "TILTSCOPE_HOME to a folder of your own"
        )
    return folder


def _run(words: list[str]) -> str:
    try:
        done: Any = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()[-500:]
        raise RunnerError(
            f"kernels 'native': {words[0]} failed ({said}); use kernels 'reference', or set CXX to a compiler that works"
        ) from error
    return done.stdout
