"""Which rows, and which of them to guide: how natural pictures are at one mean activation, against the network calls they take.

Every candidate is a number of rows, the grid they lie on and an interval of noise levels that guides some of them. For each
feature (the demo's and every 60th of the selectivity ranking, fixed before looking) its strength is the one at which the same
seeds reach the target that `tiltscope explain` would choose (matching.py). Guided and unguided rows are timed in turn.

    best      of the candidates that reach every feature, the most natural on average
    choice    the cheapest of those whose naturalness, feature by feature, is on average no more than one standard error below the
              best one's, and whose detail is within ROUGH of its: less is a blur, more is what a push leaves that is too strong

Appends a line to results/budget.jsonl, of which tools/benchmark_tables.py makes a table. The preset `fast` is to be the choice.

    python benchmarks/budget.py [--num 16]
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from torch import Tensor

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.bench.timing import interleave
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.explain import inquire
from tiltscope.engine.prepare import prepare
from tiltscope.engine.run import Run
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.samples import join

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tools")]

from claim import by_selectivity
from matching import activation_of, detail, match, naturalness

RESULTS = Path(__file__).parent / "results" / "budget.jsonl"
EVERY_ROW = (0.0, 1.0)
TIMED_ROWS = 10
ROUGH = 0.1


class Candidate(NamedTuple):
    """interval: the noise levels between which rows are guided."""

    steps: int
    grid: str
    interval: tuple[float, float] = EVERY_ROW


CANDIDATES = (
    Candidate(25, "native"),
    Candidate(10, "native"),
    Candidate(12, "linear_beta", (0.0, 0.99)),
    Candidate(10, "linear_beta"),
    Candidate(10, "linear_beta", (0.0, 0.99)),
    Candidate(8, "linear_beta"),
    Candidate(8, "linear_beta", (0.0, 0.99)),
    Candidate(7, "linear_beta"),
    Candidate(6, "linear_beta", (0.0, 0.99)),
    # Other ends of the grid: of six rows the last one, which goes to the picture at once, begins at .46 or .41 in place of .50.
    Candidate(6, "linear_beta(low=0.1, high=16.0)", (0.0, 0.98)),
    Candidate(6, "linear_beta(low=0.1, high=12.0)", (0.0, 0.96)),
    Candidate(5, "linear_beta(low=0.1, high=12.0)", (0.0, 0.96)),
    Candidate(5, "flow_shift(shift=2.0)", (0.0, 0.96)),
    Candidate(4, "linear_beta(low=0.1, high=16.0)", (0.0, 0.96)),
    Candidate(4, "linear_beta(low=0.1, high=12.0)", (0.0, 0.93)),
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
    former: Path | None = None
    """a results file: the search starts at its last line's strengths, which spares most of the tries"""


def kinds(run: Run) -> tuple[int, int]:
    guided = sum(kind == GraphKind.GUIDED for kind in run.plan.kind)
    return int(guided), run.plan.num_rows - int(guided)


def drawer(run: Run) -> Callable[[float], Tensor]:
    def draw(strength: float) -> Tensor:
        return join(replace(run, lam=strength).draw()).x0

    return draw


def asked(bundle: Bundle, address: str, config: Config, candidate: Candidate) -> Run:
    settings = SampleConfig(
        num=config.num,
        lam=1.0,
        preset="calibrated",
        steps=candidate.steps,
        grid=candidate.grid,
        guidance_interval=candidate.interval,
        batch_size=config.batch_size,
        runner=config.runner,
    )
    return prepare(bundle.prior, bundle.feature(address), settings)


def seconds_a_row(bundle: Bundle, config: Config) -> dict[str, float]:
    """Of one picture in a full bucket, guided and unguided, timed in turn."""
    num = config.batch_size
    run = asked(bundle, config.demo, replace(config, num=num), Candidate(TIMED_ROWS, "native"))
    indices = np.arange(num)
    ways = {"guided": run, "unguided": replace(run, lam=0.0)}
    timings = interleave({name: partial(each.draw_bucket, indices) for name, each in ways.items()}, seconds=10.0)
    unguided = 1e-3 * timings["unguided"].p50 / TIMED_ROWS / num
    # The first row of the guided one, pure noise, is unguided too.
    guided = (1e-3 * timings["guided"].p50 / num - unguided) / (TIMED_ROWS - 1)
    return {"guided": guided, "unguided": unguided}


def ranked(bundle: Bundle, config: Config) -> list[str]:
    """The demo's feature, then ranks 1, 1 + every, ... of the live latents, by falling selectivity."""
    return [config.demo, *by_selectivity(bundle)[:: config.every][: config.features]]


def measure(bundle: Bundle, address: str, config: Config, former: dict[Candidate, float]) -> list[dict[str, Any]]:
    """Every candidate on one feature. A search starts at a former run's strength, or at the pool's and then from below: where the
    mean does not rise with the strength throughout, the least that reaches the target counts.
    """
    feature, inquiry = bundle.feature(address), inquire(bundle, address, ExplainConfig())
    found: list[dict[str, Any]] = []
    start = float(inquiry.run.lam or 1.0)  # pyright: ignore[reportArgumentType]  # of one feature: a number
    print(f"{address}: target {inquiry.target:.3g}", flush=True)
    for candidate in CANDIDATES:
        run = asked(bundle, address, config, candidate)
        print(f"  {candidate}", flush=True)
        first = former.get(candidate, start)
        drawn = match(drawer(run), activation_of(feature), inquiry.target, first)
        mean, se = naturalness(bundle, drawn.x0)
        guided, unguided = kinds(run)
        found.append(
            {
                **candidate._asdict(),
                "guided": guided,
                "unguided": unguided,
                "strength": drawn.strength,
                "target": inquiry.target,
                "mean": drawn.mean,
                "matched": drawn.matched,
                "naturalness": mean,
                "naturalness_se": se,
                "detail": detail(bundle, drawn.x0),
            }
        )
        print(f"    {guided} guided: naturalness {mean:.2f} +- {se:.2f}", flush=True)
    return found


def summary(of_feature: dict[str, list[dict[str, Any]]], costs: dict[str, float]) -> list[dict[str, Any]]:
    """A line a candidate. behind: naturalness less the best one's, mean over features and its standard error over them."""
    lines: list[dict[str, Any]] = []
    for place, candidate in enumerate(CANDIDATES):
        each = [found[place] for found in of_feature.values()]
        lines.append(
            {
                **candidate._asdict(),
                "guided": each[0]["guided"],
                "unguided": each[0]["unguided"],
                "seconds": sum(each[0][kind] * cost for kind, cost in costs.items()),
                "reached": sum(one["matched"] for one in each),
                "naturalness": float(np.mean([one["naturalness"] for one in each])),
                "detail": float(np.mean([one["detail"] for one in each])),
            }
        )
    best = lines.index(most_natural(reaching(lines, len(of_feature))))
    for place, line in enumerate(lines):
        pairs = [(found[place]["naturalness"], found[best]["naturalness"]) for found in of_feature.values()]
        differences = np.array([own - other for own, other in pairs])
        line["behind"] = float(differences.mean())
        line["behind_se"] = float(differences.std(ddof=1) / math.sqrt(len(differences)))
    return lines


def reaching(lines: list[dict[str, Any]], features: int) -> list[dict[str, Any]]:
    """The lines that reach every feature. Raises SystemExit where none does."""
    able = [line for line in lines if line["reached"] == features]
    if not able:
        raise SystemExit("no candidate reaches every feature: nothing to choose from")
    return able


def most_natural(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return max(lines, key=lambda line: line["naturalness"])


def chosen(lines: list[dict[str, Any]], features: int) -> dict[str, Any]:
    able = reaching(lines, features)
    detail = most_natural(able)["detail"]
    good = [
        line for line in able if line["behind"] >= -line["behind_se"] and abs(line["detail"] - detail) <= ROUGH * detail
    ]
    return min(good, key=lambda line: line["seconds"])


def strengths(config: Config, address: str) -> dict[Candidate, float]:
    """Of a former run's candidates; none where there is no former run."""
    if config.former is None:
        return {}
    of_feature = json.loads(config.former.read_text().splitlines()[-1])["features"][address]
    return {
        Candidate(each["steps"], each["grid"], tuple(each["interval"])): float(each["strength"]) for each in of_feature
    }


def main(config: Config) -> None:
    bundle = tiltscope.load("emoji64")
    of_feature = {
        address: measure(bundle, address, config, strengths(config, address)) for address in ranked(bundle, config)
    }
    costs = seconds_a_row(bundle, config)
    lines = summary(of_feature, costs)
    append_result(
        RESULTS,
        "budget",
        prior=bundle.prior.identity,
        num=config.num,
        batch_size=config.batch_size,
        runner=config.runner,
        seconds_a_row=costs,
        candidates=lines,
        choice=chosen(lines, len(of_feature)),
        features=of_feature,
    )
    for line in lines:
        print(line)
    print("choice:", chosen(lines, len(of_feature)))


if __name__ == "__main__":
    main(tyro.cli(Config))
