"""What machine code is for: this processor's instructions. Knows no engine, and imports no torch: `doctor` asks without it."""

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tiltscope.engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

# x86's two kinds, and ARM's, as /proc/cpuinfo calls them.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


@cache
def processor_flags() -> list[str]:
    """Of the first processor; none where the system has no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])


def cpu_features() -> str:
    """What this processor can do, as one hash: the code is for exactly that."""
    import torch

    told = " ".join(sorted(processor_flags())) or f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 itself."""
    return not set(BFLOAT16).isdisjoint(processor_flags())


def require_bfloat16(device: "torch.device") -> None:
    """Raises ConfigError where `device` computes bfloat16 by way of something else: no faster, and less exact."""
    if device.type == "cuda":
        import torch

        there, wanted = torch.cuda.is_bf16_supported(including_emulation=False), "a GPU from SM80 on"
    else:
        there, wanted = has_bfloat16(), f"one of {', '.join(BFLOAT16)}"
    if not there:
        raise ConfigError(
            f"dtype: got bfloat16, for which this {device.type} has no instructions that are known ({wanted}): without, it takes "
            "longer than float32; give dtype float32"
        )
