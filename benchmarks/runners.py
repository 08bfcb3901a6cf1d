"""What a guided step costs on each runner, at batch 1 and 8, interleaved; and how long a start takes, cold and from the cache.

    python benchmarks/runners.py                              # everything built anew: an hour, most of it runner compile
    python benchmarks/runners.py --home DIR                   # what DIR holds is not built, and has no cold start
    python benchmarks/runners.py --runners torch,onnx         # some of them

Correctness first: a runner that misses its limits (engine/runtime/gate.py) is not timed. Runners take turns, so that a drifting
machine moves all of them; the processor's own time is told beside the clock's, which with other work beside it says little.
Appends a line a run to results/runners.jsonl, load average included. Exits 1 where a start from the cache takes 2 s or more after
imports, or a runner is refused.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "runners.jsonl"
RUNNERS = ("torch", "compile", "onnx", "openvino")
# What a process that will run it imports sooner or later: not part of a start.
MODULES = {"torch": (), "onnx": ("onnxruntime",), "openvino": ("openvino",), "compile": ("torch._inductor",)}
BATCHES = (1, 8)
HIT_BOUND_S = 2.0


def start_here(runner: str, bundle_name: str, address: str) -> dict[str, Any]:
    """In this fresh process: seconds of imports, of loading the models, until the gated step is there, and of its first step."""
    at = time.perf_counter()
    import torch

    import tiltscope
    from tiltscope.engine.runtime.cache import cache_folder
    from tiltscope.engine.runtime.runners import registered, step_for

    if runner != "torch":
        registered()[runner]()
    for module in MODULES[runner]:
        __import__(module)
    found: dict[str, Any] = {"imports_s": time.perf_counter() - at}
    at = time.perf_counter()
    bundle = tiltscope.load(bundle_name)
    feature, prior = bundle.feature(address), bundle.prior
    found["models_s"] = time.perf_counter() - at
    before = set(cache_folder().glob("[!.]*"))
    at, cpu_at = time.perf_counter(), time.process_time()
    step = step_for(runner, prior, feature, torch.float32).step
    found |= {"start_s": time.perf_counter() - at, "start_cpu_s": time.process_time() - cpu_at}
    found["built"] = bool(set(cache_folder().glob("[!.]*")) - before)
    at = time.perf_counter()
    step.guided(*inputs(prior, feature, 1))
    return found | {"first_step_s": time.perf_counter() - at}


def start(runner: str, home: Path, bundle: str, address: str) -> dict[str, Any]:
    """`start_here` in a fresh process. Raises CalledProcessError where it fails."""
    words = [sys.executable, __file__, "--start", runner, "--bundle", bundle, "--feature", address]
    settings = os.environ | {"TILTSCOPE_HOME": str(home)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=settings)
    return json.loads(done.stdout.splitlines()[-1])


def inputs(prior: Any, feature: Any, batch: int) -> tuple[Any, ...]:
    """Of a guided step: noise, and levels from .2 to .95."""
    import torch

    from tiltscope.engine.sampler.noise import normal

    x = torch.stack([torch.from_numpy(normal(0, at, 0, 0, shape=prior.shape)) for at in range(batch)]).float()
    sigma = torch.linspace(0.2, 0.95, batch, dtype=torch.float64)
    return x, sigma, torch.sqrt((1 - sigma) * (1 + sigma)), feature.readout.expand(batch)


def time_steps(
    runners: Sequence[str], bundle_name: str, address: str, seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """({runner: {"parity": worst errors, "batch_1": Timing in ms, ...}}, {runner: why it was not timed})."""
    import torch

    import tiltscope
    from tiltscope.engine.bench.timing import interleave
    from tiltscope.engine.errors import ParityError
    from tiltscope.engine.runtime.parity import check, measure
    from tiltscope.engine.runtime.runners import step_for
    from tiltscope.engine.runtime.step import guided_as_in_a_tick

    bundle = tiltscope.load(bundle_name)
    prior, feature = bundle.prior, bundle.feature(address)
    steps: dict[str, Any] = {}
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for runner in runners:
        try:
            step = step_for(runner, prior, feature, torch.float32).step
            rows = measure(step, prior, feature, dtype=torch.float32, batches=BATCHES)
            check(rows, torch.float32, runner)
        except ParityError as error:
            refused[runner] = str(error)
            continue
        worst = {name: max(getattr(row, name) for row in rows) for name in ("x0_hat", "activation", "drive", "grad_a")}
        steps[runner], found[runner] = step, {"parity": worst | {"cosine": min(row.cosine for row in rows)}}
    for batch in BATCHES:
        given = inputs(prior, feature, batch)
        ways = {name: partial(guided_as_in_a_tick, step, *given) for name, step in steps.items()}
        for name, timing in interleave(ways, seconds=seconds, settle=True).items():
            found[name][f"batch_{batch}"] = asdict(timing)
        for name, milliseconds in processor_ms(ways).items():
            found[name][f"batch_{batch}_cpu_ms"] = milliseconds
    return found, refused


def processor_ms(ways: Mapping[str, Callable[[], object]], turns: int = 7) -> dict[str, float]:
    """The median of the processor's milliseconds, in turns: on one thread what a step costs whoever else works beside it."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            at = time.process_time()
            way()
            spent[name].append(1e3 * (time.process_time() - at))
    return {name: statistics.median(each) for name, each in spent.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="emoji64")
    parser.add_argument("--feature", default="blocks.5:sae:1169")
    parser.add_argument("--runners", default=",".join(RUNNERS), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=20, help="of timing, a batch size")
    parser.add_argument("--home", type=Path, help="a cache to use and keep")
    parser.add_argument("--start", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.start:
        print(json.dumps(start_here(asked.start, asked.bundle, asked.feature)))
        return 0
    runners = tuple(asked.runners.split(","))
    if unknown := sorted(set(runners) - set(RUNNERS)):
        parser.error(f"--runners: got {', '.join(unknown)}, allowed are {', '.join(RUNNERS)}")
    from tiltscope.engine.bench.machine import append_result

    with tempfile.TemporaryDirectory() as place:
        home = asked.home or Path(place)
        os.environ["TILTSCOPE_HOME"] = str(home)
        loads = [os.getloadavg()[0]]
        starts: dict[str, Any] = {}
        for runner in runners:
            first = start(runner, home, asked.bundle, asked.feature)
            hit = start(runner, home, asked.bundle, asked.feature) if first["built"] else first
            starts[runner] = {"cold": first if first["built"] else None, "hit": hit}
            print_start(runner, starts[runner])
        loads.append(os.getloadavg()[0])
        found, refused = time_steps(runners, asked.bundle, asked.feature, asked.seconds)
        loads.append(os.getloadavg()[0])
    for runner, each in found.items():
        for batch in BATCHES:
            times = "".join(f"{each[f'batch_{batch}'][name]:10.1f}" for name in ("p20", "p50", "p80"))
            processor = f"{each[f'batch_{batch}_cpu_ms']:10.1f}"
            print(f"{runner:<10}batch {batch}{times}   ms a guided step (p20, p50, p80);{processor} of the processor")
    print(f"load average {' | '.join(f'{load:.1f}' for load in loads)} (before, after starting, after timing)")
    append_result(
        asked.results,
        "runners",
        loads=loads,
        niceness=os.nice(0),
        bundle=asked.bundle,
        feature=asked.feature,
        starts=starts,
        steps=found,
        refused=refused,
    )
    late = [name for name, each in starts.items() if name != "torch" and each["hit"]["start_s"] >= HIT_BOUND_S]
    for name, why in refused.items():
        print(f"not timed, {name}: {why}", file=sys.stderr)
    if late:
        print(f"a start from the cache takes {HIT_BOUND_S:.0f} s or more: {', '.join(late)}", file=sys.stderr)
    return 1 if late or refused else 0


def print_start(runner: str, each: dict[str, Any]) -> None:
    cold = f"{each['cold']['start_s']:.1f} s" if each["cold"] else "not measured"
    hit = each["hit"]
    print(
        f"{runner:<10}cold {cold}, hit {hit['start_s']:.2f} s, of the processor {hit['start_cpu_s']:.2f} s", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
