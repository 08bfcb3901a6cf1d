"""What machine code is for: this processor's instructions. Knows no engine."""

import hashlib
import platform
from pathlib import Path

import torch


def cpu_features() -> str:
    """What this processor can do, as one hash: the code is for exactly that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    told = " ".join(sorted(flags)) or f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]
