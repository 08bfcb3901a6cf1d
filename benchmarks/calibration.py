"""Whether a calibrated lambda keeps its word on the embedded bundle: fresh pictures at it, beside the mean they were promised.

For every feature, explain's default target, its lambda by dual ascent on the sampler (the bundle brings it, warm-started from the
pool's), and the mean activation of pictures that the ascent has not seen. Kept: within 2 % of the target, or within two standard
errors of ascent and fresh mean together. Appends a line to results/calibration.jsonl.

    python benchmarks/calibration.py [--features blocks.5:sae:1169 ...] [--num 32]
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.calibration import calibrate_on_sampler
from tiltscope.engine.config import ExplainConfig
from tiltscope.engine.explain import inquire
from tiltscope.engine.samples import join

KEPT = 0.02
RESULTS = Path(__file__).parent / "results" / "calibration.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    features: tuple[str, ...] = ("blocks.5:sae:1169", "blocks.5:sae:131", "blocks.5:sae:1860", "blocks.5:sae:1839")
    num: int = 32
    """fresh pictures a feature"""
    seed: int = 1


def check(bundle: tiltscope.Bundle, feature: str, config: Config) -> dict[str, Any]:
    """One feature: what was promised, and what fresh pictures give."""
    inquiry = inquire(bundle, feature, ExplainConfig())
    run = calibrate_on_sampler(inquiry.run, inquiry.target)
    run = replace(run, config=replace(run.config, num=config.num, seed=config.seed))
    samples = join(run.draw())
    activation = samples.activation[samples.ok].double()
    mean, se = float(activation.mean()), float(activation.std() / math.sqrt(len(activation)))
    promised = run.ascent.se if run.ascent else 0.0
    allowed = max(KEPT * abs(inquiry.target), 2 * math.hypot(se, promised))
    return {
        "feature": feature,
        "target": inquiry.target,
        "lam": run.lam,
        "origin": run.ascent.origin if run.ascent else None,
        "ascent_se": promised,
        "mean": mean,
        "se": se,
        "pool_lam": inquiry.calibration.lam,
        "kept": abs(mean - inquiry.target) <= allowed,
    }


def main(config: Config) -> None:
    bundle = tiltscope.load("emoji64")
    rows: list[dict[str, Any]] = []
    for feature in config.features:
        rows.append(check(bundle, feature, config))
        row = rows[-1]
        print(
            f"{feature}: target {row['target']:.3g} +- {row['ascent_se']:.2g}, fresh {row['mean']:.3g} +- {row['se']:.2g}, "
            f"lambda {row['lam']:.3g} ({row['origin']}; pool {row['pool_lam']:.3g}): {'kept' if row['kept'] else 'NOT KEPT'}",
            flush=True,
        )
    append_result(RESULTS, "calibration", prior=bundle.prior.identity, num=config.num, seed=config.seed, rows=rows)
    print(f"{sum(row['kept'] for row in rows)} of {len(rows)} kept")


if __name__ == "__main__":
    main(tyro.cli(Config))
