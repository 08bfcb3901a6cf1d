"""The guided step on a CPU: C++ with the definition's bits (native), and torch.compile's fusion of it (compiled), beside the
definition itself, line by line; and what the definition moves: operations dispatched and bytes read and written, counted, beside
the fused kernel's.

The gate comes first: an implementation that is not the definition (native: bit for bit), or a sample that its batch mates change,
is not timed. All are timed in turns in one process, so that a drifting machine moves all. Exits 1 where the aim is missed:
native 3 times faster at every size, compiled for eight pictures, and 5 times fewer bytes.
Appends a line to results/guided_step.jsonl.

    python benchmarks/guided_step.py        one thread; a few minutes, most of them compiling
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import torch  # noqa: E402
from kernel_cases import GuidedCase, check_guided_step, guided_case  # noqa: E402

from tiltscope.engine.bench.machine import append_result  # noqa: E402
from tiltscope.engine.bench.traffic import Traffic  # noqa: E402
from tiltscope.kernels import dispatch, reference  # noqa: E402

SIZES = ((1, (3, 64, 64)), (8, (3, 64, 64)), (8, (3, 256, 256)))
SECONDS, MIN_RUNS = 6.0, 15  # of each size: at least so many turns, and more while there is time
AIM_SPEED, AIM_BYTES = 3.0, 5.0
RESULTS = ROOT / "benchmarks" / "results" / "guided_step.jsonl"


def count_unfused(case: GuidedCase) -> tuple[int, int]:
    """-> (operations, bytes) of the definition, run line by line."""
    with Traffic() as traffic:
        reference.guided_step(case)
    return len(traffic.operations), traffic.bytes


def fused_bytes(case: GuidedCase) -> int:
    """What the one fused pass must move: x, D, grad_a, H read, x', H' written, and a slot's own scalars."""
    pictures = sum(each.numel() * each.element_size() for each in (case.x, case.x0_hat, case.grad_a, case.history))
    outputs = 2 * case.x.numel() * case.x.element_size()
    # In: row of the table, num_rows, plan, row, ok, drive, strength, guided, key, index, particle. Out: row, ok, three sums.
    slots = len(case.row) * (11 * 4 + 6 * 8 + 8 + 2 + 2 * 4 + 8 + 1 + 3 * 4)
    return pictures + outputs + slots


def gate(case: GuidedCase) -> None:
    """Raises AssertionError where "compiled" is not the definition, or not alone what it is in company."""
    check_guided_step(compiled(case), case)
    exact = zip(native(case), plain(case), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in exact), "native is not the definition bit for bit"
    mixed = case.slots(torch.arange(len(case.row)).flip(0))
    backwards = compiled(mixed)
    assert all(torch.equal(mine.flip(0), theirs) for mine, theirs in zip(backwards, compiled(case), strict=True)), (
        "a sample's numbers depend on its place in the batch"
    )


def compiled(case: GuidedCase) -> reference.GuidedStep:
    return dispatch.guided_step(case, implementation="compiled")


def native(case: GuidedCase) -> reference.GuidedStep:
    return dispatch.guided_step(case, implementation="native")


def plain(case: GuidedCase) -> reference.GuidedStep:
    return dispatch.guided_step(case, implementation="reference")


def percentiles(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        name: ordered[round(share * (len(ordered) - 1))] * 1e3
        for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))
    }


def measure(case: GuidedCase) -> dict[str, Any]:
    """Milliseconds of each, in turns."""
    ways: dict[str, Callable[[GuidedCase], object]] = {"reference": plain, "native": native, "compiled": compiled}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(case)  # warm
    end = time.perf_counter() + SECONDS
    while len(taken["compiled"]) < MIN_RUNS or time.perf_counter() < end:
        for name, way in ways.items():
            start = time.perf_counter()
            way(case)
            taken[name].append(time.perf_counter() - start)
    return {name: percentiles(each) for name, each in taken.items()}


def main() -> int:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    titles = (
        "batch",
        "shape",
        "reference",
        "native",
        "faster",
        "compiled",
        "faster",
        "operations",
        "bytes/element",
        "fused",
        "fewer",
    )
    print("".join(f"{title:>14}" for title in titles))
    for batch, shape in SIZES:
        case = guided_case(batch, shape)
        start = time.perf_counter()
        compiled(case)
        build_s = time.perf_counter() - start
        gate(case)
        times = measure(case)
        operations, moved = count_unfused(case)
        # The 20th percentile is least disturbed by whatever else runs.
        faster = {name: times["reference"]["p20"] / times[name]["p20"] for name in ("native", "compiled")}
        fewer = moved / fused_bytes(case)
        each = case.x.numel()
        cells = (
            *(str(batch), "x".join(map(str, shape))),
            f"{times['reference']['p20']:.2f} ms",
            *(each for name in faster for each in (f"{times[name]['p20']:.2f} ms", f"{faster[name]:.1f}x")),
            *(
                str(operations),
                f"{moved / each:.0f}",
                f"{fused_bytes(case) / each:.1f}",
                f"{fewer:.1f}x",
            ),
        )
        print("".join(f"{cell:>14}" for cell in cells))
        rows.append(
            {
                "batch": batch,
                "shape": list(shape),
                "ms": times,
                "faster": faster,
                "build_s": build_s,
                "unfused": {"operations": operations, "bytes": moved},
                "fused": {"launches": 1, "bytes": fused_bytes(case)},
                "fewer_bytes": fewer,
            }
        )
    append_result(RESULTS, "guided_step", cases=rows)
    missed = [
        row
        for row in rows
        if row["faster"]["native"] < AIM_SPEED
        or (row["batch"] > 1 and row["faster"]["compiled"] < AIM_SPEED)
        or row["fewer_bytes"] < AIM_BYTES
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
