"""All GPU numbers in one go, for a person with a GPU and nothing else to read: device, gate, bench, report. `make gpu` runs it.

    device   name, capability, driver, clocks, versions, revision -> the first line of results/gpu-<name>.jsonl
    gate     pytest -m gpu; the revision it passed for is remembered. What is not of this revision is not timed
    bench    the fused step beside its byte bound, torch eager and torch.compile; graph replay beside eager; whole pictures.
             A and B in turn, warm-ups apart, p20/p50/p80, peak memory
    report   docs/gpu.md's tables anew from the JSON lines

It stops at the first step that fails. Without a device it exits 2. With --dry the same four steps, the same code, run on the CPU
on the reference back ends with tiny sizes and stand-ins for graphs, events and torch.compile, into a temporary folder: the path
was walked before a stranger takes it, and no number of it means anything.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import RunnerError
from tiltscope.engine.prepare import prepare
from tiltscope.engine.runtime.graphs import CudaGraphs, Graphs, StandInGraphs
from tiltscope.engine.sampler.replay import GraphedTicks, StaticSlots, step_into
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.sampler.state import admit
from tiltscope.kernels.dispatch import guided_step
from tiltscope.kernels.reference import StepInputs, guided_update

ROOT = Path(__file__).resolve().parent.parent
RESULTS, REPORT = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md"
NOT_MEASURED = "not measured: no GPU run recorded"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"
# x, D, grad_a, H read once, x', H' written once, float32.
BYTES_AN_ELEMENT = 24
FEATURE = "blocks.5:sae:1169"


@dataclass(frozen=True)
class Place:
    """Where a run happens, and how large its cases are. dry: on the CPU, to walk the path."""

    dry: bool
    device: torch.device
    graphs: Graphs
    folder: Path
    report: Path
    gate_words: tuple[str, ...]
    warm_ups: int
    repeats: int
    shapes: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    steps: int
    bundle: str
    feature: str

    @property
    def kernels(self) -> str:
        return "reference" if self.dry else "triton"


def place(*, dry: bool) -> Place:
    """Raises RunnerError where a device is needed and there is none."""
    if not dry:
        graphs: Graphs = CudaGraphs()
        shapes, batches = ((3, 64, 64), (3, 256, 256), (4, 64, 64)), (1, 8, 32)
        words = ("-m", "gpu")
        return Place(
            False,
            torch.device("cuda", 0),
            graphs,
            RESULTS,
            REPORT,
            words,
            3,
            50,
            shapes,
            batches,
            100,
            "emoji64",
            FEATURE,
        )
    folder = Path(tempfile.mkdtemp(prefix="tiltscope-gpu-dry-"))
    tiny, report = _tiny_bundle(folder), folder / "gpu.md"
    report.write_text(REPORT.read_text())
    # One quick test in the place of the tests that need a device.
    words = ("tests/runtime/test_graphs.py", "-k", "smallest_bucket", "-p", "no:cacheprovider")
    return Place(
        True,
        torch.device("cpu"),
        StandInGraphs(),
        folder,
        report,
        words,
        1,
        1,
        ((3, 8, 8),),
        (2,),
        2,
        tiny,
        "blocks.1:sae:3",
    )


def _tiny_bundle(folder: Path) -> str:
    """The tests' bundle of random weights, built there."""
    spec = importlib.util.spec_from_file_location("tiny_bundle", ROOT / "tests" / "tiny_bundle.py")
    if spec is None or spec.loader is None:
        raise RunnerError("tests/tiny_bundle.py is missing: the walk needs the repository's tests")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.build_tiny_bundle(folder / "bundle"))


def revision() -> str:
    """The commit, and a hash of what the tree changes in it: a gate holds for one state of the code. Results change no code."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout

    commit = git("rev-parse", "HEAD").strip() or "unknown"
    changed = git("diff", "HEAD", "--", ".", ":!benchmarks/results", ":!docs/gpu.md")
    return commit + (f"+{hashlib.sha256(changed.encode()).hexdigest()[:12]}" if changed else "")


def describe(at: Place) -> dict[str, Any]:
    """Of the device and all that decides its numbers."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    facts |= {"dry": at.dry, "revision": revision(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if at.dry:
        return facts | {"name": "dry", "capability": None, "driver": None, "clocks": None}
    properties = torch.cuda.get_device_properties(0)
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    query = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
    )
    driver, *clocks = [each.strip() for each in query.stdout.split("\n")[0].split(",")]
    return facts | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory // 2**20,
        "driver": driver,
        "clocks": clocks,
    }


def record(at: Place, line: dict[str, Any]) -> None:
    """Append one line to the device's file."""
    at.folder.mkdir(parents=True, exist_ok=True)
    with results_of(at).open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def results_of(at: Place) -> Path:
    name = "dry" if at.dry else torch.cuda.get_device_name(0)
    return at.folder / f"gpu-{name.lower().replace(' ', '-')}.jsonl"


def gate(at: Place) -> int:
    """The tests; on success the revision that they passed for is written beside the results."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *at.gate_words], cwd=ROOT, check=False)
    if done.returncode == 0:
        record(at, {"step": "gate", "revision": revision(), "passed": list(at.gate_words)})
    return done.returncode


def gated(at: Place) -> bool:
    """Whether the last gate that passed was of this very revision."""
    path = results_of(at)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    passed = [line["revision"] for line in lines if line["step"] == "gate"]
    return bool(passed) and passed[-1] == revision()


def alternate(at: Place, works: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """p20, p50, p80 of each in milliseconds, in turn, so that a drifting clock moves all of them; warm-ups apart."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(at.warm_ups + at.repeats):
        for name, work in works.items():
            spent = at.graphs.milliseconds(work)
            if turn >= at.warm_ups:
                taken[name].append(spent)
    shares = (0.2, 0.5, 0.8)
    return {
        name: {f"p{round(100 * share)}_ms": sorted(each)[round(share * (len(each) - 1))] for share in shares}
        for name, each in taken.items()
    }


def copy_bandwidth(at: Place) -> float:
    """GB/s of a copy much larger than any cache: what a memory-bound kernel is held to."""
    source = torch.empty(2**12 if at.dry else 2**28, device=at.device)
    target = torch.empty_like(source)
    took = alternate(at, {"copy": lambda: target.copy_(source)})["copy"]["p50_ms"]
    return 2 * source.nbytes / took / 1e6


def bench_fused_step(at: Place) -> list[dict[str, Any]]:
    """guided_step: the kernel, the unfused torch sequence, and what torch.compile makes of that sequence."""
    bandwidth = copy_bandwidth(at)
    compiled = torch.compile(guided_update, backend="eager" if at.dry else "inductor")
    found: list[dict[str, Any]] = []
    for shape in at.shapes:
        for batch in at.batches:
            generator = torch.Generator(at.device).manual_seed(0)
            fields = [torch.randn(batch, *shape, device=at.device, generator=generator) for _ in range(4)]
            table = torch.rand(1, 4, len(COLUMNS), device=at.device, generator=generator)
            zeros = torch.zeros(batch, dtype=torch.int64, device=at.device)
            ones, key = torch.ones(batch, device=at.device), torch.zeros(batch, 2, dtype=torch.int64, device=at.device)
            yes, rows = torch.ones(batch, dtype=torch.bool, device=at.device), torch.full((1,), 4, device=at.device)
            inputs = StepInputs(*fields, table, rows, zeros, zeros, yes, ones, ones, yes, key, zeros, zeros)
            plain = (table[0, :1].expand(batch, -1).contiguous(), ones, yes, key, zeros, zeros, zeros)
            times = alternate(
                at,
                {
                    "fused": lambda i=inputs: guided_step(i, implementation=at.kernels),  # type: ignore[arg-type]
                    "torch": lambda f=fields, p=plain: guided_update(*f, *p),
                    "torch.compile": lambda f=fields, p=plain: compiled(*f, *p),
                },
            )
            moved = BYTES_AN_ELEMENT * batch * int(np.prod(shape))
            took = times["fused"]["p50_ms"]
            found.append(
                {
                    "case": f"guided_step {batch}x{'x'.join(map(str, shape))}",
                    "times": times,
                    "gb_per_s": moved / took / 1e6,
                    "copy_gb_per_s": bandwidth,
                    "bound_ms": moved / bandwidth / 1e6,
                }
            )
    return found


def bench_ticks(at: Place) -> list[dict[str, Any]]:
    """One guided tick of a bundle: graph replay against eager, at every batch. The plan is longer than the trials."""
    bundle = tiltscope.load(at.bundle)
    found: list[dict[str, Any]] = []
    for batch in at.batches:
        config = SampleConfig(
            num=batch,
            lam=1.0,
            steps=at.steps,
            batch_size=batch,
            device=at.device.type,
            kernels=at.kernels,
            graphs="off",
        )
        run = prepare(bundle.prior, bundle.feature(at.feature), config)
        work, readout = run.programme, run.feature.readout
        state = admit(work, seed=0, indices=np.arange(batch), lam=np.ones(batch), readout=readout, bucket=batch)
        needs, eager = work.ahead(state.host)[0], StaticSlots.like(state)
        replaying = GraphedTicks(at.graphs, always=True).start(state, work)
        _reset_peak(at)
        times = alternate(
            at,
            {
                "graph": lambda r=replaying: r.tick(),
                "eager": lambda e=eager, w=work, n=needs: step_into(e, w, n),
            },
        )
        found.append({"case": f"tick of {batch}", "times": times, "peak_mib": _peak_mib(at)})
    return found


def bench_pictures(at: Place) -> list[dict[str, Any]]:
    """Whole pictures of a bundle, with graphs and without, and that both are the same ones."""
    bundle = tiltscope.load(at.bundle)
    batch = at.batches[-1]
    config = SampleConfig(
        num=batch, lam=1.0, steps=at.steps, batch_size=batch, device=at.device.type, kernels=at.kernels, graphs="off"
    )
    run = prepare(bundle.prior, bundle.feature(at.feature), config)
    graphed = replace(run, graphed=GraphedTicks(at.graphs, always=True))
    indices = np.arange(batch)
    error = float((run.draw_bucket(indices).x0 - graphed.draw_bucket(indices).x0).abs().max())
    _reset_peak(at)
    fewer = replace(at, repeats=max(1, at.repeats // 10))
    times = alternate(fewer, {"graph": lambda: graphed.draw_bucket(indices), "eager": lambda: run.draw_bucket(indices)})
    return [{"case": f"{batch} pictures", "times": times, "peak_mib": _peak_mib(at), "max_difference": error}]


def _reset_peak(at: Place) -> None:
    if not at.dry:
        torch.cuda.reset_peak_memory_stats()


def _peak_mib(at: Place) -> float | None:
    return None if at.dry else torch.cuda.max_memory_allocated() / 2**20


BENCHES = {"fused": bench_fused_step, "ticks": bench_ticks, "pictures": bench_pictures}


def bench(at: Place) -> int:
    """Every case, in order. Refuses where the gate is not of this revision."""
    if not gated(at):
        print(f"bench: the gate has not passed for revision {revision()}; run make gpu", file=sys.stderr)
        return 1
    for name, measure in BENCHES.items():
        for case in measure(at):
            record(at, {"step": "bench", "bench": name, "revision": revision(), **case})
    return 0


def report(at: Place) -> int:
    """The tables between the marks of the report, from every device's lines; dry ones are never shown as measured."""
    rows = [row for path in sorted(at.folder.glob("gpu-*.jsonl")) for row in _rows_of(path)]
    before, _, rest = at.report.read_text().partition(START)
    after = rest.partition(END)[2]
    at.report.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}")
    return 0


def _rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(device, case) of a file's last run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    began = max(at for at, line in enumerate(lines) if line["step"] == "device")
    name = lines[began]["name"]
    return [(name, line) for line in lines[began:] if line["step"] == "bench"]


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown. Without a run every cell says so."""
    head = "| device | case | what | p20 ms | p50 ms | p80 ms | GB/s (copy) |\n|---|---|---|---|---|---|---|"
    if not rows:
        cases = ("guided_step, one launch", "guided tick, replay and eager", "whole pictures")
        return "\n".join([head, *(f"| - | {case} |" + f" {NOT_MEASURED} |" * 5 for case in cases)])
    lines = [head]
    for name, case in rows:
        speed = f"{case['gb_per_s']:.0f} ({case['copy_gb_per_s']:.0f})" if "gb_per_s" in case else ""
        for what, times in case["times"].items():
            numbers = " | ".join(f"{times[each]:.4f}" for each in ("p20_ms", "p50_ms", "p80_ms"))
            lines.append(f"| {name} | {case['case']} | {what} | {numbers} | {speed if what == 'fused' else ''} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """device -> gate -> bench -> report; the first failure ends it."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="All GPU numbers in one go.")
    parser.add_argument("--dry", action="store_true", help="walk the path on the CPU, into a temporary folder")
    dry = parser.parse_args(words).dry
    try:
        at = place(dry=dry)
    except RunnerError as error:
        print(f"make gpu: {error}; `make gpu DRY=1` walks the path on a CPU", file=sys.stderr)
        return 2
    print(f"device   {describe(at)['name']} -> {results_of(at)}")
    record(at, {"step": "device"} | describe(at))
    for name, step in (("gate", gate), ("bench", bench), ("report", report)):
        print(f"{name}", flush=True)
        if (code := step(at)) != 0:
            return code
    print(f"done     {at.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
