"""The batcher under a mixed stream: what unlike requests cost beside like ones, what sharing gains, and how long a request waits.

Requests of one picture each: five features, three solvers, 10 to 50 rows, their own lambda and seed. Counted in sample rows a
second, because requests differ in length; and while requests wait, because a stream has no end: in the last batches of so short a
one, whose requests are as long as they happen to be, slots stand empty. What it is with those stands beside it ("to the end").

    alike        the same number of rows, all of one feature, solver and length, through the batcher
    mixed        the stream, all of it at hand
    one by one   the stream, each request alone by sample(batch_size=1)
    gain         a row at batch 8 against batch 1, of requests all alike: what sharing could bring at most
    latency      the stream as a Poisson process at shares of the mixed throughput: p50 and p95 from submission to answer

The gate: a request of the stream equals its solo run bit for bit. alike, mixed and one by one are timed in turn, `--repeats`
times, and after each turn stands the peak of memory. `--stub` puts a denoiser without cost in the bundle's place, runs 2,000
requests and reports the host's own time a row and the growth of memory. Appends a line to results/batching.jsonl.
"""

import gc
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.tilt.worlds import GaussianWorld

BATCH = 8
FEATURES = tuple(f"blocks.5:sae:{index}" for index in (1169, 131, 1860, 1839, 872))
SOLVERS = ("ddpm", "ddim(eta=0.5)", "dpmpp_2m_sde")
LOADS = (0.5, 0.7, 0.9)
GAIN_ROWS = 30
POLL_S = 0.05
Asked = tuple[Any, dict[str, Any]]
RESULTS = Path(__file__).parent / "results" / "batching.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    num: int = 48
    """requests of a stream"""
    repeats: int = 2
    stub: bool = False
    """a denoiser without cost, and 2,000 requests"""


def stream(features: Sequence[Any], num: int) -> list[Asked]:
    """The mixed stream: fixed, every combination of feature and solver in turn."""
    rng = np.random.default_rng(0)
    return [
        (
            features[at % len(features)],
            {
                "num": 1,
                "seed": at,
                "lam": round(float(rng.uniform(0.2, 1.0)), 3),
                "solver": SOLVERS[at % len(SOLVERS)],
                "steps": int(rng.integers(10, 51)),
            },
        )
        for at in range(num)
    ]


def alike(asked: Sequence[Asked]) -> list[Asked]:
    """As many requests, and about as many rows, of one kind."""
    steps = round(rows_of(asked) / len(asked))
    feature, settings = asked[0]
    return [(feature, settings | {"steps": steps, "seed": at}) for at in range(len(asked))]


def rows_of(asked: Sequence[Asked]) -> int:
    return sum(settings["steps"] for _, settings in asked)


class Served(NamedTuple):
    """Sample rows a second of a stream that is all at hand: while requests waited, and over all of it."""

    waiting: float
    to_the_end: float
    answers: list[tiltscope.Samples]


def batched(model: Any, asked: Sequence[Asked]) -> Served:
    with tiltscope.Engine(model, max_batch=BATCH) as engine:
        started = time.perf_counter()
        tickets = [engine.submit(feature, **settings) for feature, settings in asked]
        while (counts := engine.counts()).waiting:
            time.sleep(POLL_S)
        waiting = counts.advanced / (time.perf_counter() - started)
        answers = [ticket.result() for ticket in tickets]
        return Served(waiting, rows_of(asked) / (time.perf_counter() - started), answers)


def one_by_one(prior: tiltscope.Prior, asked: Sequence[Asked], feature_of: Any) -> float:
    started = time.perf_counter()
    for feature, settings in asked:
        tiltscope.sample(prior, feature_of(feature), batch_size=1, **settings)
    return rows_of(asked) / (time.perf_counter() - started)


def sharing_gain(prior: tiltscope.Prior, feature: tiltscope.Feature) -> float:
    """Sample rows a second of one plan at batch 8 over those at batch 1, by sample(): the median of three, in turn.

    One plan for both: it has one unguided row, which costs less, so plans of different lengths would not compare.
    """
    taken: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(3):
        for size, seconds in taken.items():
            started = time.perf_counter()
            tiltscope.sample(prior, feature, num=size, lam=0.5, steps=GAIN_ROWS, batch_size=size)
            seconds.append((time.perf_counter() - started) / size)
    return float(np.median(taken[1]) / np.median(taken[BATCH]))


def latencies(model: Any, asked: Sequence[Asked], rows_a_second: float) -> dict[str, float]:
    """Seconds from submission to answer, where requests arrive as a Poisson process of this many rows a second."""
    gaps = np.random.default_rng(1).exponential(rows_of(asked) / len(asked) / rows_a_second, len(asked))
    ended: dict[int, float] = {}
    with tiltscope.Engine(model, max_batch=BATCH) as engine:
        begun: list[float] = []
        for at, ((feature, settings), gap) in enumerate(zip(asked, gaps, strict=True)):
            time.sleep(gap)
            begun.append(time.perf_counter())
            ticket = engine.submit(feature, **settings)
            ticket.add_done_callback(lambda _, at=at: ended.setdefault(at, time.perf_counter()))
    waited = [ended[at] - start for at, start in enumerate(begun)]
    return {"p50": float(np.quantile(waited, 0.5)), "p95": float(np.quantile(waited, 0.95))}


def check_equal(model: Any, prior: tiltscope.Prior, asked: Sequence[Asked], feature_of: Any) -> None:
    """Raises SystemExit where an answer of the batcher is not its solo run's."""
    answers = batched(model, asked[:4]).answers
    for (feature, settings), answer in zip(asked[:4], answers, strict=True):
        alone = tiltscope.sample(prior, feature_of(feature), batch_size=BATCH, **settings)
        if not torch.equal(alone.x0, answer.x0):
            raise SystemExit(f"{feature} {settings}: not the solo run's picture; nothing is timed")


def peak_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_bundle(config: Config) -> dict[str, Any]:
    bundle = tiltscope.load("emoji64")
    asked = stream(FEATURES, config.num)
    check_equal(bundle, bundle.prior, asked, bundle.feature)
    found: dict[str, list[float]] = {name: [] for name in ("alike", "mixed", "mixed, to the end", "one by one")}
    peaks: list[float] = []
    for _ in range(config.repeats):
        found["alike"].append(batched(bundle, alike(asked)).waiting)
        mixed = batched(bundle, asked)
        found["mixed"].append(mixed.waiting)
        found["mixed, to the end"].append(mixed.to_the_end)
        found["one by one"].append(one_by_one(bundle.prior, asked, bundle.feature))
        peaks.append(peak_mib())
    rate = {name: float(np.median(values)) for name, values in found.items()}
    gain = sharing_gain(bundle.prior, bundle.feature(FEATURES[0]))
    facts = {
        "sample_rows_a_second": rate,
        "mixed_over_alike": rate["mixed"] / rate["alike"],
        "mixed_over_one_by_one": rate["mixed"] / rate["one by one"],
        "batch_gain": gain,
        "peak_mib": peaks,
        "latency_s": {str(load): latencies(bundle, asked, load * rate["mixed"]) for load in LOADS},
    }
    print(f"peak memory after each of {config.repeats} turns of {3 * config.num} requests: {peaks} MiB")
    print(f"mixed {rate['mixed']:.2f} sample rows a second: {facts['mixed_over_alike']:.2f} of alike (bar .9)")
    share = facts["mixed_over_one_by_one"] / gain
    print(f"{facts['mixed_over_one_by_one']:.2f} times one by one: {share:.2f} of the gain {gain:.2f} (bar .85)")
    for load, waited in facts["latency_s"].items():
        print(f"load {load}: p50 {waited['p50']:.1f} s, p95 {waited['p95']:.1f} s")
    return facts


def run_stub() -> dict[str, Any]:
    world = GaussianWorld(s=1.3, shape=(3, 8, 8))
    prior = tiltscope.Prior(lambda x, sigma: x * 0.5, shape=world.shape, name="stub")
    asked = stream([world.feature], 3000)
    batched(prior, asked[:1000])  # what as many answers take that are all held until the end
    gc.collect()  # an engine that is done stands in a circle with its requests
    before = peak_mib()
    rate = batched(prior, asked[1000:2000]).to_the_end
    gc.collect()
    middle = peak_mib()
    batched(prior, asked[2000:])
    facts = {"us_a_tick": 1e6 * BATCH / rate, "peak_growth_mib": [middle - before, peak_mib() - middle]}
    print(f"{facts['us_a_tick']:.0f} us a tick of {BATCH}; peak memory grew by {facts['peak_growth_mib']} MiB")
    return facts


def main(config: Config) -> None:
    facts = run_stub() if config.stub else run_bundle(config)
    append_result(RESULTS, "batching", stub=config.stub, num=config.num, threads=torch.get_num_threads(), **facts)


if __name__ == "__main__":
    main(tyro.cli(Config))
