"""From the published procedure to the preset `fast`, one change a row, all at one mean activation of one feature.

    published          1,000 ancestral rows, one constant scale, the batch's mean under the cap, D clipped   (preset paper_exact)
    100 rows           the same scale times ten
    per sample         no clipping, no mean over the batch: every picture is pushed by its own activation
    tilt               the push of a constant lambda in place of a constant scale                            (preset calibrated)
    25 rows            a quarter of the rows
    10 rows            ten rows, half of them where layout and colour are settled (grid linear_beta)
    noisiest unguided  those above sigma = .99 are not guided
    8 rows, 6 rows     fewer of these
    6 rows, less noise the same grid up to another noise: its last row, too, begins at less

The preset fast is the row that benchmarks/budget.py chose on more features than this one (engine/presets.py names it).

Each row's strength is found by dual ascent on its own draws, the first one's from the second's and then by secant steps; with
--former, rows that its last line has start at their strengths there, and only secant steps follow. Memory is that of a guided
row, as foreseen (benchmarks/memory.py holds that to what is measured). The gate: a row is timed only where the mean
activation of its pictures is the target's within 5 % or two standard errors. Buckets of all rows are drawn in turn, so that a
drifting machine moves all of them. Appends a line to results/ablation.jsonl, and prints the table of docs/decisions.md.

    python benchmarks/ablation.py [--feature blocks.5:sae:1169] [--num 32]
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.calibration import calibrate_on_sampler
from tiltscope.engine.config import ExplainConfig
from tiltscope.engine.explain import Inquiry, inquire
from tiltscope.engine.report.metrics import measure
from tiltscope.engine.run import Run
from tiltscope.engine.samples import Samples, join

BUCKET = 8
MATCHED = 0.05
MAX_TRIES = 4
# A scale of 1 is far too much on a feature whose activation is of order 10: where the ascent of a constant scale starts.
FIRST_SCALE = 0.02
PUBLISHED: dict[str, Any] = {"preset": "paper_exact", "log_tilt": "capped(cap=20.0)"}
PER_SAMPLE: dict[str, Any] = {"lift": "dps", "log_tilt": "linear"}
FEW: dict[str, Any] = {"preset": "calibrated", "grid": "linear_beta"}
QUIET: dict[str, Any] = {"guidance_interval": (0.0, 0.99)}
# name: the settings that differ from the preset calibrated
STAGES: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "100 rows": PUBLISHED | {"steps": 100},
    "per sample": PUBLISHED | PER_SAMPLE | {"steps": 100},
    "tilt": {"preset": "calibrated"},
    "25 rows": {"preset": "calibrated", "steps": 25},
    "10 rows": FEW | {"steps": 10},
    "noisiest unguided": FEW | QUIET | {"steps": 10},
    "8 rows": FEW | QUIET | {"steps": 8},
    "6 rows": FEW | QUIET | {"steps": 6},
    "6 rows, less noise": {"preset": "fast"},
}
RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    feature: str = "blocks.5:sae:1169"
    num: int = 32
    """pictures of each row"""
    calibration_num: int = 64
    """draws that find each row's strength"""
    runner: str = "torch"
    """of every row; what a row holds in memory is foreseen for torch alone"""
    former: Path | None = None
    """a results file: the strengths of its last line, where the rows it has start"""


@dataclass(frozen=True)
class Stage:
    """A row of the table, ready to be drawn from."""

    name: str
    inquiry: Inquiry
    run: Run


def stages(bundle: tiltscope.Bundle, config: Config) -> Iterator[Stage]:
    """Every row with the strength that reaches the default target of the preset calibrated."""
    target = inquire(bundle, config.feature, ExplainConfig()).target

    def asked(settings: dict[str, Any]) -> Inquiry:
        wanted = {"num": config.num, "batch_size": BUCKET, "target_activation": target, "runner": config.runner}
        return inquire(
            bundle, config.feature, ExplainConfig(**settings, **wanted, calibration_num=config.calibration_num)
        )

    known: dict[str, float] = {}
    if config.former is not None:
        rows = json.loads(config.former.read_text().splitlines()[-1])["rows"]
        known = {name: float(row["lam"]) for name, row in rows.items()}
    found: dict[str, Stage] = {}
    for name, settings in list(STAGES.items())[1:]:
        inquiry = asked(settings)
        constant = inquiry.config.guidance == "constant"
        start = replace(inquiry.run, lam=known.get(name, FIRST_SCALE if constant else inquiry.run.lam))
        found[name] = Stage(name, inquiry, start if name in known else calibrate_on_sampler(start, target))
        print(f"{name}: strength {found[name].run.lam:.4g}", flush=True)
    inquiry = asked(PUBLISHED)
    # A thousand rows are too dear for an ascent of their own: their scale starts at what a hundred rows need.
    scale = known.get("published", found["100 rows"].run.lam)
    yield Stage("published", inquiry, replace(inquiry.run, lam=scale))
    yield from found.values()


def is_matched(samples: Samples, target: float) -> bool:
    mean, se = moments(samples)
    return abs(mean - target) <= max(MATCHED * abs(target), 2 * se)


def moments(samples: Samples) -> tuple[float, float]:
    activation = samples.activation[samples.ok].double()
    return float(activation.mean()), float(activation.std() / math.sqrt(len(activation)))


def rematch(stage: Stage, tries: list[tuple[float, float]]) -> Stage:
    """The strength at which a line through the last two tries (lam, mean) meets the target; the first line goes through 0."""
    target = stage.inquiry.target
    (lam, mean), (before, mean_before) = tries[-1], tries[-2] if len(tries) > 1 else (0.0, 0.0)
    step = (target - mean) * (lam - before) / (mean - mean_before)
    return replace(stage, run=replace(stage.run, lam=float(f"{min(max(lam + step, lam / 2), 2 * lam):.4g}")))


def draw(all_stages: list[Stage], num: int) -> dict[str, tuple[Samples, list[float]]]:
    """`num` pictures of every row, one bucket of each in turn, with the seconds of each bucket."""
    parts: dict[str, list[Samples]] = {stage.name: [] for stage in all_stages}
    seconds: dict[str, list[float]] = {stage.name: [] for stage in all_stages}
    draws = {stage.name: stage.run.draw() for stage in all_stages}
    for _ in range(-(-num // BUCKET)):
        for name, drawn in draws.items():
            started = time.perf_counter()
            parts[name].append(next(drawn))
            seconds[name].append(time.perf_counter() - started)
            print(f"  {name}: {seconds[name][-1]:.1f} s", flush=True)
    return {name: (join(iter(each)), seconds[name]) for name, each in parts.items()}


def main(config: Config) -> None:
    bundle = tiltscope.load("emoji64")
    todo = list(stages(bundle, config))
    done: dict[str, tuple[Stage, Samples, list[float]]] = {}
    tries: dict[str, list[tuple[float, float]]] = {stage.name: [] for stage in todo}
    for _ in range(MAX_TRIES):
        again: list[Stage] = []
        for stage, (samples, seconds) in zip(todo, draw(todo, config.num).values(), strict=True):
            # Timed where all were drawn in turn: another strength takes as long, but not beside the same neighbours.
            first = done[stage.name][2] if stage.name in done else seconds
            done[stage.name] = (stage, samples, first)
            tries[stage.name].append((float(stage.run.lam), moments(samples)[0]))  # pyright: ignore[reportArgumentType]
            if not is_matched(samples, stage.inquiry.target):
                again.append(rematch(stage, tries[stage.name]))
                print(
                    f"{stage.name}: mean {tries[stage.name][-1][1]:.3g}, again at {again[-1].run.lam:.4g}", flush=True
                )
        todo = again
        if not todo:
            break
    rows = {name: table_row(*done[name]) for name in STAGES}
    append_result(
        RESULTS,
        "ablation",
        feature=config.feature,
        prior=bundle.prior.identity,
        num=config.num,
        runner=config.runner,
        rows=rows,
    )
    print_table(rows)


def table_row(stage: Stage, samples: Samples, seconds: list[float]) -> dict[str, Any]:
    metrics = measure(
        samples,
        answer="tilt",
        bundle=stage.inquiry.bundle,
        feature=stage.inquiry.feature,
        natural=stage.inquiry.natural,
        log_tilt=stage.run.programme.log_tilts[0],
        tilt=None,
        seconds=None,
    )
    mean, se = moments(samples)
    return {
        "lam": stage.run.lam,
        "rows": stage.run.plan.num_rows,
        "matched": is_matched(samples, stage.inquiry.target),
        "target": stage.inquiry.target,
        "activation_mean": mean,
        "activation_se": se,
        "naturalness": metrics["naturalness"],
        "naturalness_se": metrics["naturalness_se"],
        "diversity": metrics["diversity"],
        "nfe": int(samples.nfe.max()),
        "memory_mib": None if stage.run.memory is None else stage.run.memory.row_mib,
        "seconds": sorted(seconds)[len(seconds) // 2] / BUCKET,
    }


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    slowest = max(row["seconds"] for row in rows.values())
    print("| | strength | activation | naturalness | diversity | NFE | MiB a row | s a picture | times faster |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        reached = (
            f"{row['activation_mean']:.2f} ± {row['activation_se']:.2f}{'' if row['matched'] else ' (not matched)'}"
        )
        natural = f"{row['naturalness']:.2f} ± {row['naturalness_se']:.2f}"
        memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        cost = f"{row['nfe']} | {memory} | {row['seconds']:.2f} | {slowest / row['seconds']:.1f}"
        print(f"| {name} | {row['lam']:.3g} | {reached} | {natural} | {row['diversity']:.2f} | {cost} |")


if __name__ == "__main__":
    main(tyro.cli(Config))
