"""Where a number was measured: revision, versions, processor, load; and what this machine could do at best."""

import json
import os
import platform
import resource
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.runtime.cpu import processor_flags

PACKAGES = ("tiltscope", "torch", "numpy", "diffusers", "transformers", "onnxruntime", "openvino", "triton")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def append_result(path: Path, benchmark: str, **facts: Any) -> None:
    """Add one JSON line to `path`: the machine, and what is given."""
    line = {"benchmark": benchmark, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | environment() | facts
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as results:
        results.write(json.dumps(line) + "\n")


def environment() -> dict[str, Any]:
    """Revision, versions and machine. `load`: running processes over the last minute, ours included."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "system": platform.platform(terse=True),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": [name for name in FEATURES if name in processor_flags()],
            "load": round(os.getloadavg()[0], 2),
        },
    }


def peak_mib() -> float:
    """The most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Giga floating-point operations a second of a square float32 matrix product: what a network could reach at best."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    return 2e-9 * size**3 / _best(lambda: a @ b, seconds)


def copy_gb_s(mib: int = 64, seconds: float = 0.5) -> float:
    """Gigabytes a second, read and written, of a copy too large for the caches: what an elementwise pass could reach at best."""
    source = torch.rand(mib * 2**18)
    target = torch.empty_like(source)
    return 2e-9 * source.numel() * 4 / _best(lambda: target.copy_(source), seconds)


def _best(way: Any, seconds: float) -> float:
    way()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        kept: Tensor = way()
        best = min(best, time.perf_counter() - started)
        del kept
    return best


def _revision() -> str | None:
    """Of the checkout this is part of; None where it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None
