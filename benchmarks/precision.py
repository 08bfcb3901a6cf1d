"""What networks in bfloat16 change of the pictures, and what they spare: the same seeds at the same strength, beside float32.

Each way is RUNNER or RUNNER:DTYPE, drawn with the preset `fast`; the first is the baseline. Activations are read in float32 off
every way's pictures. A bucket of pictures is timed in turn. Exits 1 where a way's mean activation or naturalness is further from
the baseline's than three standard errors of their paired difference plus 1 % of the baseline's, or a picture failed. Appends a
line to results/precision.jsonl, of which tools/benchmark_tables.py makes a table.
Needs a processor with bfloat16.

    python benchmarks/precision.py
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import tiltscope
from tiltscope.engine.bench.line import asked_by
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.bench.timing import interleave
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.prepare import prepare
from tiltscope.engine.samples import join

sys.path.append(str(Path(__file__).parent))

from matching import detail, each_naturalness

RESULTS = Path(__file__).parent / "results" / "precision.jsonl"
ERRORS, SHARE = 3.0, 0.01


@dataclass(frozen=True, kw_only=True)
class Config:
    feature: str = "blocks.5:sae:1169"
    ways: tuple[str, ...] = ("onnx", "openvino", "openvino:bfloat16", "torch", "torch:bfloat16")
    strength: float = 3.7
    """the one at which the preset reaches what `explain` would choose (results/peers.jsonl)"""
    num: int = 32
    bucket: int = 8
    seconds: float = 10.0


def paired(mine: Tensor, base: Tensor) -> dict[str, float]:
    """Mean, and difference from the baseline's with its standard error over the same seeds."""
    apart = (mine - base).double()
    se = float(apart.std() / len(apart) ** 0.5)
    return {"mean": float(mine.mean()), "apart": float(apart.mean()), "se": se}


def main(config: Config) -> int:
    bundle = tiltscope.load("emoji64")
    feature = bundle.feature(config.feature)
    settings = SampleConfig(num=config.num, lam=config.strength, preset="fast", batch_size=config.bucket)
    runs = {way: prepare(bundle.prior, feature, replace(settings, **asked_by(way))) for way in config.ways}
    timings = interleave(
        {way: partial(run.draw_bucket, np.arange(config.bucket)) for way, run in runs.items()},
        seconds=config.seconds,
        settle=True,
    )
    drawn = {way: join(run.draw()) for way, run in runs.items()}
    pictures = {way: each.x0 for way, each in drawn.items()}
    with torch.no_grad():
        activation = {way: feature.activation(x0) for way, x0 in pictures.items()}
    natural = {way: torch.from_numpy(each_naturalness(bundle, x0)) for way, x0 in pictures.items()}
    base, lines = config.ways[0], list[dict[str, Any]]()
    for way in config.ways:
        lines.append(
            {
                "way": way,
                "ok": bool(drawn[way].ok.all()),
                "activation": paired(activation[way], activation[base]),
                "reported": float(drawn[way].activation.mean()),
                "naturalness": paired(natural[way], natural[base]),
                "detail": detail(bundle, pictures[way]),
                "rms": float((pictures[way] - pictures[base]).square().mean().sqrt()),
                "seconds_a_picture": 1e-3 * timings[way].p50 / config.bucket,
            }
        )
        print(lines[-1], flush=True)
    append_result(RESULTS, "precision", config=vars(config), lines=lines)
    off = [
        f"{line['way']}: {name}"
        for line in lines
        for name in ("activation", "naturalness")
        if not abs(line[name]["apart"]) <= ERRORS * line[name]["se"] + SHARE * abs(lines[0][name]["mean"])
    ] + [f"{line['way']}: a picture failed" for line in lines if not line["ok"]]
    print("further off than chance and 1 %:", ", ".join(off) or "none")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
