"""Timing several ways of doing one thing in turn, so that a machine that drifts moves all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Way = Callable[[], object]
MIN_TURNS = 5


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one way over `turns` turns; first_ms: its very first call, with whatever it had to set up."""

    p20: float
    p50: float
    p80: float
    turns: int
    first_ms: float


def interleave(
    ways: Mapping[str, Way], *, seconds: float, least: int = MIN_TURNS, settle: bool = False
) -> dict[str, Timing]:
    """Each way once for the warm-up, then all in turn for `seconds`, at least `least` turns. The order turns around.

    settle: every timed call comes right after an untimed one of the same way. Threads of another library spin for some hundredths
    of a second after their last work, on the processors that a short call is timed on.
    """
    first = {name: _milliseconds(way) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    end, turns = time.perf_counter() + seconds, 0
    while turns < least or time.perf_counter() < end:
        # Whoever comes after a hot neighbour pays for its cache; nobody is always second.
        for name in list(ways) if turns % 2 == 0 else list(ways)[::-1]:
            if settle:
                ways[name]()
            taken[name].append(_milliseconds(ways[name]))
        turns += 1
    return {
        name: Timing(
            **{f"p{share}": float(np.percentile(values, share)) for share in (20, 50, 80)},
            turns=turns,
            first_ms=first[name],
        )
        for name, values in taken.items()
    }


def _milliseconds(way: Way) -> float:
    started = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - started)
