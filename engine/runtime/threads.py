"""Threads of torch that would be in the way of others: kept to one while another library draws, ended where they stand idle.

OpenMP's threads spin for a while after every operation that used them, on the very processors that the threads of ONNX Runtime or
OpenVINO wait for: on two cores a guided row of ONNX Runtime then takes a third to a half longer. What a tick does around the
networks is too little to share. OpenMP's setting of the calling thread is changed, because torch.set_num_threads would hold for
every thread that starts meanwhile, too. Where OpenMP's library is not found (it is looked for in /proc), nothing is changed.

Every thread that calls torch gets OpenMP threads of its own, which stay when it is done. As soon as there are more in the process
than processors, OpenMP lets none of them spin: each operation then puts them to sleep and wakes them up. On two cores a
guided row of a batcher's thread so takes a sixth longer beside a main thread that does nothing any more.
"""

import ctypes
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_LIBRARIES = ("libgomp", "libiomp", "libomp")
# omp_pause_soft: what the calling thread set, such as its number of threads, stays as it is.
_SOFT = 1
_outside = threading.local()


def num_threads() -> int:
    """As many as torch uses: one setting for every runner. Inside `one_thread`, as many as it uses outside."""
    return getattr(_outside, "num", None) or torch.get_num_threads()


@contextmanager
def one_thread(*, when: bool = True) -> Generator[None]:
    """torch's operations on this thread alone, for its caller; other threads and libraries keep theirs. Not `when`: nothing."""
    if not when or (openmp := _openmp()) is None or (before := torch.get_num_threads()) == 1:
        yield
        return
    openmp.omp_set_num_threads(1)
    _outside.num = before
    try:
        yield
    finally:
        _outside.num = None
        openmp.omp_set_num_threads(before)


def release_threads() -> None:
    """End the calling thread's idle OpenMP threads. Its next operation starts new ones, in less than a millisecond."""
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(_SOFT)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The library that torch's own threads come from, None where it is not found."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    for path in sorted(paths):
        if "torch" in path and Path(path).name.startswith(_LIBRARIES):
            return ctypes.CDLL(path)
    return None
