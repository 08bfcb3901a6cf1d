"""What a guided row takes of memory, foreseen (engine/runtime/memory.py) and taken: peak resident memory of a process of its own.

A setting's process loads the bundle, runs one row of one sample, returns what the allocator holds, and has the system forget its
peak; then it runs rows of the bucket. `row` is the peak beyond what was held before, `process` the peak of the whole. Foreseen is
held before + row. Also after 10 more rows: the peak must not grow. Linux alone can forget a peak. Exits 1 where a process is off
by more than 15 %. Appends a line to results/memory.jsonl.

    python benchmarks/memory.py
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

OFF = 0.15
GROWTH_ROWS = 10
# (bucket, dtype, chunk): chunk 0 for the whole bucket.
SETTINGS = ((1, "float32", 0), (8, "float32", 0), (32, "float32", 0), (8, "float64", 0), (32, "float32", 8))
RESULTS = Path(__file__).parent / "results" / "memory.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    feature: str = "blocks.5:sae:1169"
    one: tuple[int, str, int] | None = None
    """measure this setting in this process, and print it as JSON"""


def resident_mib(word: str) -> float:
    """VmRSS (held now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{word}:")).split()[1]) / 1024


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(feature_word: str, bucket: int, dtype_name: str, chunk: int) -> dict[str, Any]:
    import torch

    import tiltscope
    from tiltscope.engine.bench.cases import noisy
    from tiltscope.engine.prepare import NETWORK_DTYPES
    from tiltscope.engine.runtime.memory import ChunkedStep, row_mib
    from tiltscope.engine.runtime.step import TorchStep

    bundle, dtype = tiltscope.load("emoji64"), NETWORK_DTYPES[dtype_name]
    prior, feature = bundle.prior.to(dtype), bundle.feature(feature_word).to(dtype)
    foreseen = row_mib(prior, feature, dtype, batch=chunk or bucket)
    step = ChunkedStep(TorchStep(prior, feature), chunk or bucket)
    assert feature.readout is not None

    def row(batch: int) -> None:
        x, sigma, alpha = noisy(prior, batch)
        step.guided(x.to(torch.promote_types(dtype, torch.float32)), sigma, alpha, feature.readout.expand(batch))

    row(1)
    forget_peak()
    held = resident_mib("VmRSS")
    row(bucket)
    peak = resident_mib("VmHWM")
    for _ in range(GROWTH_ROWS):
        row(bucket)
    return {
        "bucket": bucket,
        "dtype": dtype_name,
        "chunk": chunk,
        "threads": torch.get_num_threads(),
        "row_foreseen_mib": foreseen,
        "row_mib": peak - held,
        "process_foreseen_mib": held + foreseen,
        "process_mib": peak,
        "growth_mib": resident_mib("VmHWM") - peak,
    }


def main(config: Config) -> int:
    if config.one is not None:
        print(json.dumps(measure(config.feature, *config.one)))
        return 0
    from tiltscope.engine.bench.machine import append_result

    found: list[dict[str, Any]] = []
    for setting in SETTINGS:
        words = [sys.executable, __file__, "--feature", config.feature, "--one", *map(str, setting)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    append_result(RESULTS, "memory", feature=config.feature, settings=found)
    return int(any(abs(each["process_foreseen_mib"] / each["process_mib"] - 1) > OFF for each in found))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
