"""How the time of a request grows with its size: an exponent fitted to times taken in turn, 1 where it is linear."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tiltscope.engine.batching.engine import Engine
from tiltscope.engine.bench.line import Line, Options, asked_by
from tiltscope.engine.bench.timing import Timing, interleave
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.prepare import prepare

BATCHES = (1, 2, 4, 8, 16)
ROWS = (5, 10, 20, 40)
FEATURES = (1, 2, 4, 8)
_FEW_ROWS = 4
# All rows alike: a grid that starts at sigma = 1 has no guided row there, nor has the first of a prior that asks so, and few rows
# would be too cheap for many to be as dear. This one starts below.
_EVERY_ROW = {"grid": "linear_beta", "guidance_interval": (0.0, 1.0)}


def exponent(timings: dict[int, Timing]) -> float:
    """b of t = a n^b, by least squares of log p50 over log n."""
    sizes = np.log(list(timings))
    return float(np.polyfit(sizes, np.log([each.p50 for each in timings.values()]), 1)[0])


def growth(options: Options) -> Iterator[Line]:
    """Whole requests of the first runner asked for: pictures in one batch, rows of one picture, features of one engine."""
    bundle, runner = options.bundle, options.runners[0]
    feature = bundle.feature(options.feature)

    def draws(num: int, steps: int) -> Callable[[], object]:
        asked: dict[str, Any] = {**_EVERY_ROW, **asked_by(runner)}
        config = SampleConfig(num=num, lam=0.5, steps=steps, batch_size=num, **asked)
        return partial(prepare(bundle.prior, feature, config).draw_bucket, np.arange(num))

    # Of the hook asked for: the features of one engine share it.
    hook = options.feature.partition(":")[0]
    names = [each.feature for each in bundle.features() if each.feature.startswith(f"{hook}:")]
    names = [options.feature, *(name for name in names if name != options.feature)]
    with Engine(bundle, max_batch=max(FEATURES)) as engine:

        def asks(num: int) -> None:
            tickets = [engine.submit(name, num=1, lam=0.5, steps=_FEW_ROWS) for name in names[:num]]
            for ticket in tickets:
                ticket.result()

        ways = {
            "batch": {num: draws(num, _FEW_ROWS) for num in BATCHES},
            "rows": {rows: draws(1, rows) for rows in ROWS},
            "features": {num: partial(asks, num) for num in FEATURES if num <= len(names)},
        }
        for grown, each in ways.items():
            named = interleave({str(size): way for size, way in each.items()}, seconds=options.seconds)
            timings = {size: named[str(size)] for size in each}
            more = {"exponent": exponent(timings)}
            way = "torch" if grown == "features" else runner
            for size, timing in timings.items():
                yield Line(case="growth", setting=f"{grown} {size}", way=way, timing=timing, more=more)
