"""How long a person waits before anything happens: an import, `--help`, and `tiltscope explain` up to its first row.

Each in a fresh process, the interpreter's own start included (shown beside them as the floor). p20, p50, p80 of 20 runs,
interleaved, so that a drifting machine moves all of them; exits 1 where a p20 misses its bound. Appends a line to
results/import_time.jsonl.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RUNS = 20
# The command itself, which ends where it would first tell of progress: networks loaded, lambda known, one row drawn.
FIRST_ROW = """
import os, sys, tempfile
from tiltscope.engine.cli import screen
from tiltscope.engine.cli.main import run
screen._Lines.set = lambda *told, **more: os._exit(0)
with tempfile.TemporaryDirectory() as folder:
    code = run(["explain", "blocks.5:sae:1169", "--out", folder + "/out"])
raise SystemExit(f"explain ended with {code} before it told of a row")
"""
# name: (command after the interpreter, bound on p20 in seconds)
CASES: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "import tiltscope": (["-c", "import tiltscope"], 0.3),
    "tiltscope --help": (["-m", "tiltscope", "--help"], 0.5),
    "tiltscope explain --help": (["-m", "tiltscope", "explain", "--help"], 0.5),
    "explain, to its first row": (["-c", FIRST_ROW], 5.0),
}
RESULTS = Path(__file__).parent / "results" / "import_time.jsonl"


def seconds_of(words: list[str]) -> float:
    """Wall seconds of one process. Raises CalledProcessError where it fails: what is not correct is not timed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    return time.perf_counter() - start


def main() -> int:
    for words, _ in CASES.values():
        seconds_of(words)  # byte code is compiled once, then read
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(RUNS):
        for name, (words, _) in CASES.items():
            taken[name].append(seconds_of(words))
    missed: list[str] = []
    print(f"{'':<26}{'p20':>8}{'p50':>8}{'p80':>8}{'bound':>8}   seconds, {RUNS} runs")
    rows: dict[str, dict[str, float | None]] = {}
    for name, (_, bound) in CASES.items():
        ordered = sorted(taken[name])
        p20, p50, p80 = (ordered[round(share * (RUNS - 1))] for share in (0.2, 0.5, 0.8))
        rows[name] = {"p20": p20, "p50": p50, "p80": p80, "bound": bound}
        print(f"{name:<26}{p20:>8.3f}{p50:>8.3f}{p80:>8.3f}{'-' if bound is None else f'{bound:.1f}':>8}")
        if bound is not None and p20 > bound:
            missed.append(name)
    _append(rows)
    if missed:
        print(f"over the bound: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _append(rows: dict[str, dict[str, float | None]]) -> None:
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    line = {
        "benchmark": "import_time",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision or None,
        "python": platform.python_version(),
        "machine": {"system": platform.platform(terse=True), "processors": os.cpu_count()},
        "seconds": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as results:
        results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
