"""What every benchmark writes beside its numbers: the machine, its processor's features, versions, revision and load."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "onnxruntime", "openvino", "triton")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def append_result(benchmark: str, **facts: Any) -> Path:
    """Add one JSON line to results/<benchmark>.jsonl; what is given comes last."""
    line = {"benchmark": benchmark, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | environment() | facts
    path = RESULTS / f"{benchmark}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as results:
        results.write(json.dumps(line) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Revision, versions and machine. `load`: mean number of running processes over the last minute, ours included."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "revision": found or None,
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "system": platform.platform(terse=True),
            "processors": os.cpu_count(),
            "features": [name for name in FEATURES if name in _processor_flags()],
            "load": round(os.getloadavg()[0], 2),
        },
    }


def _processor_flags() -> set[str]:
    """Of the first processor; none where the system has no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
