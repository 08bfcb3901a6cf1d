"""Which rows to guide: how natural pictures are at one mean activation, against the network calls they take.

Every candidate is a number of rows and an interval of noise levels that guides some of them. For each feature (the demo's and
every 60th of the selectivity ranking, fixed before looking) its strength is the one at which the same seeds reach the target that
`tiltscope explain` would choose (matching.py). What a guided and an unguided row cost is a least-squares fit to the seconds of
everything that was drawn.

    choice    the cheapest candidate that reaches every feature and whose naturalness, feature by feature, is on average no more
              than one standard error below that of the first candidate, the preset `calibrated` cut to 25 rows

Appends a line to results/budget.jsonl; tools/benchmark_tables.py writes docs/benchmarks.md; the preset `fast` is the choice.

    python benchmarks/budget.py [--num 16]
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from torch import Tensor

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.explain import inquire
from tiltscope.engine.sample import Run, prepare
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.samples import join

sys.path.append(str(Path(__file__).parent))

from matching import activation_of, match, naturalness

RESULTS = Path(__file__).parent / "results" / "budget.jsonl"
EVERY_ROW = (0.0, 1.0)
# Rows, and the noise levels between which they are guided; the first is what the others are held to.
CANDIDATES: tuple[tuple[int, tuple[float, float]], ...] = (
    (25, EVERY_ROW),
    (25, (0.5, 0.97)),
    (15, EVERY_ROW),
    (15, (0.3, 0.95)),
    (10, EVERY_ROW),
    (10, (0.15, 0.99)),
    (10, (0.3, 0.99)),
    (10, (0.3, 0.95)),
    (8, EVERY_ROW),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    demo: str = "blocks.5:sae:1169"
    every: int = 60
    """of the selectivity ranking, from its first on"""
    features: int = 3
    """of the ranking, beside the demo's"""
    num: int = 16
    """pictures of each candidate and feature"""
    batch_size: int = 8
    runner: str = "auto"


@dataclass
class Costs:
    """Seconds of everything drawn, to be split into a guided and an unguided row's."""

    rows: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    seconds: list[float] = field(default_factory=list[float])

    def seconds_a_row(self) -> tuple[float, float]:
        """(guided, unguided) of one picture."""
        fit = np.linalg.lstsq(np.array(self.rows, np.float64), np.array(self.seconds), rcond=None)[0]
        return float(fit[0]), float(fit[1])


def kinds(run: Run) -> tuple[int, int]:
    guided = sum(kind == GraphKind.GUIDED for kind in run.plan.kind)
    return guided, run.plan.num_rows - guided


def drawer(run: Run, costs: Costs) -> Callable[[float], Tensor]:
    def draw(strength: float) -> Tensor:
        started = time.perf_counter()
        x0 = join(replace(run, lam=strength).draw()).x0
        costs.rows.append(kinds(run))
        costs.seconds.append((time.perf_counter() - started) / run.config.num)
        return x0

    return draw


def ranked(bundle: Bundle, config: Config) -> list[str]:
    """The demo's feature, then ranks 1, 1 + every, ... of the live latents, by falling selectivity."""
    live = [f for f in bundle.features() if f.alive and ":sae:" in f.feature]
    live.sort(key=lambda f: (-f.selectivity, f.feature))
    return [config.demo, *(f.feature for f in live[:: config.every][: config.features])]


def measure(bundle: Bundle, address: str, config: Config, costs: Costs) -> list[dict[str, Any]]:
    """Every candidate on one feature. A search starts at the strength of the last one that was matched."""
    feature, inquiry = bundle.feature(address), inquire(bundle, address, ExplainConfig())
    start, found = float(inquiry.run.lam or 1.0), []
    print(f"{address}: target {inquiry.target:.3g}", flush=True)
    for steps, interval in CANDIDATES:
        settings = SampleConfig(
            num=config.num,
            lam=1.0,
            preset="calibrated",
            steps=steps,
            guidance_interval=interval,
            batch_size=config.batch_size,
            runner=config.runner,
        )
        run = prepare(bundle.prior, feature, settings)
        print(f"  {steps} rows, {interval}", flush=True)
        drawn = match(drawer(run, costs), activation_of(feature), inquiry.target, start)
        start = drawn.strength if drawn.matched else start
        mean, se = naturalness(bundle, drawn.x0)
        guided, unguided = kinds(run)
        found.append(
            {
                "steps": steps,
                "interval": interval,
                "guided": guided,
                "unguided": unguided,
                "strength": drawn.strength,
                "target": inquiry.target,
                "mean": drawn.mean,
                "matched": drawn.matched,
                "naturalness": mean,
                "naturalness_se": se,
            }
        )
        print(f"    {guided} guided: naturalness {mean:.2f} +- {se:.2f}", flush=True)
    return found


def summary(of_feature: dict[str, list[dict[str, Any]]], costs: Costs) -> list[dict[str, Any]]:
    """A line a candidate. behind: naturalness less the first candidate's, mean over features and its standard error over them."""
    guided, unguided = costs.seconds_a_row()
    lines: list[dict[str, Any]] = []
    for place, (steps, interval) in enumerate(CANDIDATES):
        each = [found[place] for found in of_feature.values()]
        differences = np.array([found[place]["naturalness"] - found[0]["naturalness"] for found in of_feature.values()])
        lines.append(
            {
                "steps": steps,
                "interval": interval,
                "guided": each[0]["guided"],
                "unguided": each[0]["unguided"],
                "seconds": each[0]["guided"] * guided + each[0]["unguided"] * unguided,
                "reached": sum(one["matched"] for one in each),
                "naturalness": float(np.mean([one["naturalness"] for one in each])),
                "behind": float(differences.mean()),
                "behind_se": float(differences.std(ddof=1) / math.sqrt(len(differences))),
            }
        )
    return lines


def chosen(lines: list[dict[str, Any]], features: int) -> dict[str, Any]:
    able = [line for line in lines if line["reached"] == features and line["behind"] >= -line["behind_se"]]
    return min(able, key=lambda line: line["seconds"])


def main(config: Config) -> None:
    bundle, costs = tiltscope.load("emoji64"), Costs()
    of_feature = {address: measure(bundle, address, config, costs) for address in ranked(bundle, config)}
    lines = summary(of_feature, costs)
    guided, unguided = costs.seconds_a_row()
    append_result(
        RESULTS,
        "budget",
        prior=bundle.prior.identity,
        num=config.num,
        batch_size=config.batch_size,
        runner=config.runner,
        seconds_a_row={"guided": guided, "unguided": unguided},
        candidates=lines,
        choice=chosen(lines, len(of_feature)),
        features=of_feature,
    )
    for line in lines:
        print(line)
    print("choice:", chosen(lines, len(of_feature)))


if __name__ == "__main__":
    main(tyro.cli(Config))
