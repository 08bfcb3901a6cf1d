"""What a guided step costs on each runner, at batch 1 and 8, interleaved; and how long a start takes, cold and from the cache.

    python benchmarks/runners.py                              # everything built anew: half an hour, most of it runner compile
    python benchmarks/runners.py --home DIR                   # what DIR holds is not built, and has no cold start

Correctness first: a runner that misses its limits (engine/runtime/gate.py) is not timed. Rounds go through all runners in turn,
so that a drifting machine moves all of them; p20, p50, p80. Appends a line to results/runners.jsonl, with the load average: with
other work the numbers say nothing of the machine. Exits 1 where a start from the cache takes 2 s or more after imports.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "runners.jsonl"
RUNNERS = ("torch", "compile", "onnx", "openvino")
BATCHES = (1, 8)
HIT_BOUND_S = 2.0
DISTRIBUTIONS = ("tiltscope", "torch", "numpy", "diffusers", "onnxruntime", "openvino")


def start_here(runner: str, bundle_name: str, address: str) -> dict[str, Any]:
    """In this fresh process: seconds of imports, of loading the models, until the gated step is there, and of its first step."""
    at = time.perf_counter()
    import torch

    import tiltscope
    from tiltscope.engine.runtime.cache import cache_folder
    from tiltscope.engine.runtime.runners import step_for

    if runner != "torch":
        import tiltscope.export.onnx

        for module in {"onnx": ("onnxruntime",), "openvino": ("openvino",), "compile": ("torch._inductor",)}[runner]:
            __import__(module)
    found: dict[str, Any] = {"imports_s": time.perf_counter() - at}
    at = time.perf_counter()
    bundle = tiltscope.load(bundle_name)
    feature, prior = bundle.feature(address), bundle.prior
    found["models_s"] = time.perf_counter() - at
    before = set(cache_folder().glob("[!.]*"))
    at = time.perf_counter()
    step = step_for(runner, prior, feature, torch.float32).step
    found["start_s"] = time.perf_counter() - at
    found["built"] = bool(set(cache_folder().glob("[!.]*")) - before)
    at = time.perf_counter()
    step.guided(*_inputs(prior, feature, 1))
    found["first_step_s"] = time.perf_counter() - at
    return found


def start(runner: str, home: Path, bundle: str, address: str) -> dict[str, Any]:
    """`start_here` in a fresh process. Raises CalledProcessError where it fails."""
    words = [sys.executable, __file__, "--start", runner, "--bundle", bundle, "--feature", address]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env=os.environ | {"TILTSCOPE_HOME": str(home)}
    )
    return json.loads(done.stdout.splitlines()[-1])


def _inputs(prior: Any, feature: Any, batch: int) -> tuple[Any, ...]:
    import torch

    from tiltscope.engine.sampler.noise import normal

    x = torch.stack([torch.from_numpy(normal(0, at, 0, 0, shape=prior.shape)) for at in range(batch)]).float()
    sigma = torch.linspace(0.2, 0.95, batch, dtype=torch.float64)
    return x, sigma, torch.sqrt((1 - sigma) * (1 + sigma)), feature.readout.expand(batch)


def time_steps(bundle_name: str, address: str, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """({runner: {"parity": ..., "batch_1": {p20, p50, p80 in ms}, ...}}, {runner: why it was not timed})."""
    import torch

    import tiltscope
    from tiltscope.engine.errors import ParityError
    from tiltscope.engine.runtime.parity import check, measure
    from tiltscope.engine.runtime.runners import step_for

    bundle = tiltscope.load(bundle_name)
    prior, feature = bundle.prior, bundle.feature(address)
    steps: dict[str, Any] = {}
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for runner in RUNNERS:
        try:
            step = step_for(runner, prior, feature, torch.float32).step
            rows = measure(step, prior, feature, dtype=torch.float32, batches=BATCHES)
            check(rows, torch.float32, runner)
        except ParityError as error:
            refused[runner] = str(error)
            continue
        worst = {name: max(getattr(row, name) for row in rows) for name in ("x0_hat", "activation", "drive", "grad_a")}
        steps[runner], found[runner] = step, {"parity": worst | {"cosine": min(row.cosine for row in rows)}}
    taken: dict[tuple[str, int], list[float]] = {(runner, batch): [] for runner in steps for batch in BATCHES}
    inputs = {batch: _inputs(prior, feature, batch) for batch in BATCHES}
    for number in range(rounds + 2):
        for runner, batch in taken:
            at = time.perf_counter()
            steps[runner].guided(*inputs[batch])
            if number >= 2:  # the first two warm up
                taken[runner, batch].append((time.perf_counter() - at) * 1000)
    for (runner, batch), milliseconds in taken.items():
        ordered = sorted(milliseconds)
        found[runner][f"batch_{batch}"] = {
            f"p{round(share * 100)}_ms": ordered[round(share * (rounds - 1))] for share in (0.2, 0.5, 0.8)
        }
    return found, refused


def machine() -> dict[str, Any]:
    """What the numbers are of: system, processor and its instructions, processors, threads."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = dict(line.split("\t", 1) for line in reversed(lines) if "\t" in line)
    flags = facts.get("flags", "").replace(":", " ").split()
    return {
        "system": platform.platform(terse=True),
        "processor": facts.get("model name", platform.processor()).lstrip("\t: "),
        "features": [name for name in flags if name.startswith(("avx", "amx", "fma", "f16c", "bf16"))],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "niceness": os.nice(0),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="emoji64")
    parser.add_argument("--feature", default="blocks.5:sae:1169")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--home", type=Path, help="a cache to use and keep")
    parser.add_argument("--start", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.start:
        print(json.dumps(start_here(asked.start, asked.bundle, asked.feature)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        home = asked.home or Path(place)
        os.environ["TILTSCOPE_HOME"] = str(home)
        loads = [os.getloadavg()]
        starts: dict[str, Any] = {}
        for runner in RUNNERS:
            cold = start(runner, home, asked.bundle, asked.feature)
            hit = start(runner, home, asked.bundle, asked.feature)
            starts[runner] = {"cold": cold if cold["built"] else None, "hit": hit}
            print(
                f"{runner:<10}cold {cold['start_s'] if cold['built'] else float('nan'):8.2f} s   hit {hit['start_s']:6.2f} s"
            )
        loads.append(os.getloadavg())
        found, refused = time_steps(asked.bundle, asked.feature, asked.rounds)
        loads.append(os.getloadavg())
    for runner, each in found.items():
        for batch in BATCHES:
            times = "".join(f"{value:10.1f}" for value in each[f"batch_{batch}"].values())
            print(f"{runner:<10}batch {batch}{times}   ms a guided step (p20, p50, p80)")
    print(f"load average {' | '.join(f'{load[0]:.1f}' for load in loads)} (before, after starting, after timing)")
    _append(asked, starts, found, refused, loads)
    late = [name for name, each in starts.items() if name != "torch" and each["hit"]["start_s"] >= HIT_BOUND_S]
    for name, why in refused.items():
        print(f"not timed, {name}: {why}", file=sys.stderr)
    if late:
        print(f"a start from the cache takes {HIT_BOUND_S:.0f} s or more: {', '.join(late)}", file=sys.stderr)
    return 1 if late or refused else 0


def _append(asked: Any, starts: Any, found: Any, refused: Any, loads: Any) -> None:
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    line = {
        "benchmark": "runners",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision or None,
        "machine": machine(),
        "versions": versions(),
        "load_average": [list(load) for load in loads],
        "bundle": asked.bundle,
        "feature": asked.feature,
        "rounds": asked.rounds,
        "starts": starts,
        "steps": found,
        "refused": refused,
    }
    asked.results.parent.mkdir(exist_ok=True)
    with asked.results.open("a") as results:
        results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
