"""Several GPUs, or several processes of a CPU: each draws its share of the indices, and the pictures stay the same.

    python examples/several_devices.py OUT --device cuda --workers 4 --num 1024
    python examples/several_devices.py OUT --device cpu --workers 2 --num 16

A picture is (bundle, settings, seed, index) and nothing else, so nothing has to be told between the workers. The strength is
calibrated once, here, and every worker is given it as a number; all draw in buckets of one shape.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import tiltscope
from tiltscope.engine.samples import join

BUNDLE = "emoji64"


def draw(device: str, worker: int, feature: str, settings: dict[str, Any]) -> tiltscope.Samples:
    """In a worker's own process: its indices, on its own device."""
    if device == "cuda":
        torch.cuda.set_device(worker % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    bundle = tiltscope.load(BUNDLE)
    return tiltscope.sample(bundle.prior, bundle.feature(feature), device=device, **settings)


def draw_on_all(feature: str, num: int, workers: int, device: str, settings: dict[str, Any]) -> tiltscope.Samples:
    """The samples 0 .. num - 1 in order, drawn by `workers` processes."""
    ends = [num * worker // workers for worker in range(workers + 1)]
    shares = [range(first, last) for first, last in pairwise(ends) if last > first]
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(draw, device, worker, feature, settings | {"indices": list(share), "num": len(share)})
            for worker, share in enumerate(shares)
        ]
        parts = [each.result() for each in waiting]
    return replace(join(parts), manifest={"workers": [part.manifest for part in parts]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--feature", default="blocks.5:sae:1169")
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lam", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    settings = {"lam": given.lam, "steps": given.steps, "batch_size": given.batch_size}
    samples = draw_on_all(given.feature, given.num, given.workers, given.device, settings)
    print(samples.save(given.out))


if __name__ == "__main__":
    main()
