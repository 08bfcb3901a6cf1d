"""Dual ascent on a sampler: the lambda at which its own mean of phi is the target, however biased it is.

The pool's lambda is right for the exact tilt of natural pictures. A sampler of another prior, or with plug-in guidance, reaches
another mean; so ask it:  draw a round at lambda_k, look at phi, and take the root of a line through all rounds so far,

    root = L + (c - M) / s,    L, M: weighted means of lambda_k and of the rounds' means,   s: their weighted slope

Rounds far from the root weigh little (the law is no line). While the rounds have hardly moved, s leans on the variance of phi
within them: for the exact tilt d E[phi] / d lambda = Var[phi]. With the slope known this is Robbins and Monro's
lambda += (c - m) / (k s). A round that misses for certain moves the bracket inside which the next one lies.

Knows nothing of pictures or networks. Source: Robbins and Monro 1951; method section 5. Proof: tests/tilt/test_ascent.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.errors import CalibrationError, ConfigError

# A round may go this many times further from 0 than the furthest before it.
GROWTH = 3.0
# So many growths that gain less than their error: no lambda of this sampler goes further.
PATIENCE = 2
MAX_ROUNDS = 64
# A round moves the bracket where it misses by so many of its errors: of dozens of rounds one is always off by two.
CERTAIN = 4.0
# Rounds count where their mean should lie within this share of the way from the natural mean to the target.
WINDOW = 0.1
REFITS = 4
# Beyond this many times the start lambda the sampler is not what was asked for.
LAM_LIMIT = 1000.0

Draw = Callable[[float, int], NDArray[np.float64]]


@dataclass(frozen=True)
class Round:
    """One round: lambda, and mean, standard deviation and number of the phi drawn there."""

    lam: float
    mean: float
    sd: float
    num: int

    @property
    def se(self) -> float:
        return self.sd / math.sqrt(self.num)


@dataclass(frozen=True)
class Ascent:
    """lam: where the sampler's mean of phi should be the target; se: standard error of that mean. rounds: what was drawn.

    origin: drawn now, remembered in the cache, or brought by the bundle.
    """

    lam: float
    se: float
    target: float
    rounds: tuple[Round, ...]
    origin: Literal["drawn", "cache", "bundle"] = "drawn"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rounds": [asdict(each) for each in self.rounds]}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any], origin: Literal["cache", "bundle"]) -> Self:
        rounds = tuple(Round(**each) for each in facts["rounds"])
        return cls(lam=facts["lam"], se=facts["se"], target=facts["target"], rounds=rounds, origin=origin)


def ascend(
    draw: Draw,
    target: float,
    *,
    start: float,
    natural_mean: float,
    num: int,
    tolerance: float = 0.02,
) -> Ascent:
    """The lambda with E[phi] = target under the sampler behind `draw`.

    draw(lam, round): float64 values of phi, independent between rounds, those that are finite. start: the first lambda, not 0.
    natural_mean: E[phi] without a tilt, the zero of the scale. num: draws in all, after which it ends; before that it ends where
    the standard error of the mean is below tolerance |target - natural_mean|.
    Raises CalibrationError, naming the largest mean reached, where lambda grew out of bounds or the mean no longer moves;
    ConfigError for a start of 0.
    """
    if not math.isfinite(start) or start == 0:
        raise ConfigError(f"calibration: the first lambda must be a finite number other than 0, got {start}")
    scale = abs(target - natural_mean) or abs(start)
    lam, se, drawn, rounds = start, math.inf, 0, list[Round]()
    while drawn < num and len(rounds) < MAX_ROUNDS:
        values = draw(lam, len(rounds))
        values = values[np.isfinite(values)]
        if len(values) < 2:
            raise CalibrationError(
                f"at lambda {lam:.4g} the sampler gave fewer than two finite pictures; {_furthest(rounds, target)}"
            )
        rounds.append(Round(lam, float(values.mean()), float(values.std(ddof=1)), len(values)))
        drawn += len(values)
        lam, se = _root(rounds, target, scale, lam)
        _check_progress(rounds, target, start, natural_mean)
        if len(rounds) > 1 and se < tolerance * scale and _bracketed(rounds, target):
            break
    if not _bracketed(rounds, target) and abs(rounds[-1].mean - target) > 3 * rounds[-1].se:
        raise CalibrationError(
            f"target {target:.6g} was not reached in {drawn} draws; {_furthest(rounds, target)}; allow more draws"
        )
    return Ascent(lam=_rounded(lam), se=se, target=target, rounds=tuple(rounds))


@dataclass(frozen=True)
class Integral:
    """log Z(lam) = int_0^lam E_s[phi] ds and KL(lam) = lam E_lam[phi] - log Z, nats, with the standard error of both."""

    log_z: float
    kl: float
    se: float


def integrate(rounds: Sequence[Round], lam: float) -> Integral:
    """Thermodynamic integration over rounds that hold 0, `lam` and what lies between: the sampler's own log Z and KL.

    E_s[phi] rises with s, so a monotone cubic interpolates it (PCHIP). se: the rounds' errors through their share of the
    integral; what the interpolation misses is not in it. Raises ConfigError where 0 or `lam` is missing.
    """
    from scipy.interpolate import PchipInterpolator  # half a second: only where there is something to integrate

    known = sorted({each.lam: each for each in rounds}.values(), key=lambda each: each.lam)
    lams = np.array([each.lam for each in known])
    if 0.0 not in lams or lam not in lams:
        raise ConfigError(f"integration to lambda {lam:.4g} needs rounds at 0 and there, got {lams.tolist()}")

    def area(means: NDArray[np.float64]) -> float:
        return float(PchipInterpolator(lams, means).integrate(0.0, lam))

    means = np.array([each.mean for each in known])
    log_z = area(means)
    # The interpolation is not linear in the means: each round's share by a difference of one standard error.
    steps = [area(means + each.se * (np.arange(len(known)) == at)) - log_z for at, each in enumerate(known)]
    end = int(np.flatnonzero(lams == lam)[0])
    return Integral(log_z=log_z, kl=lam * float(means[end]) - log_z, se=float(np.linalg.norm(steps)))


def _root(rounds: Sequence[Round], target: float, scale: float, guess: float) -> tuple[float, float]:
    """(the next lambda, the standard error of the mean there); guess: where the root was thought to be.

    Rounds are weighed by how near their lambda is, never by how near their mean came: that would prefer lucky draws.
    """
    lams, means, counts = (np.array([getattr(each, name) for each in rounds]) for name in ("lam", "mean", "num"))
    variance = np.array([each.sd**2 for each in rounds])
    furthest = max(abs(each.lam) for each in rounds) * GROWTH * (1 if guess > 0 else -1)
    slope = abs(scale / guess)
    root, se = guess, math.inf
    for _ in range(REFITS):
        near = (WINDOW * scale + math.sqrt(float((variance / counts).mean()))) / slope
        weight = counts / (1 + ((lams - root) / near) ** 2) ** 2
        weight = weight / weight.sum()
        middle, mean, spread = float(weight @ lams), float(weight @ means), float(weight @ variance)
        moved = float(weight @ (lams - middle) ** 2)
        # A Gaussian prior for the slope, mean and deviation Var[phi]: it rules while rounds differ by less than their errors.
        prior = float(weight**2 @ (1 / counts)) / spread if spread > 0 else 0.0
        slope = float(weight @ ((lams - middle) * (means - mean))) + prior * spread
        slope = slope / (moved + prior) if moved + prior > 0 else 0.0
        if slope <= 0:
            return _inside(furthest, rounds, target, furthest), math.inf
        root = middle + (target - mean) / slope
        of_slope = (root - middle) ** 2 * float(weight**2 @ ((lams - middle) ** 2 * variance / counts))
        se = math.sqrt(float(weight**2 @ (variance / counts)) + of_slope / (moved + prior) ** 2)
        root = _inside(root, rounds, target, furthest)
    return root, se


def _inside(root: float, rounds: Sequence[Round], target: float, furthest: float) -> float:
    """`root`, no further than `furthest`, and between the rounds that missed for certain on either side."""
    below = [each.lam for each in rounds if each.mean + CERTAIN * each.se < target]
    above = [each.lam for each in rounds if each.mean - CERTAIN * each.se > target]
    # Never to 0, where a tilt says nothing of its slope.
    nearest = min((each.lam for each in rounds), key=abs) / GROWTH
    low = max(below, default=min(nearest, furthest))
    high = min(above, default=max(nearest, furthest))
    if low >= high:
        return root
    return root if low < root < high else (low + high) / 2 if below and above else min(max(root, low), high)


def _bracketed(rounds: Sequence[Round], target: float) -> bool:
    """Whether the target lies within what was reached, errors allowed for."""
    return min(r.mean - 2 * r.se for r in rounds) <= target <= max(r.mean + 2 * r.se for r in rounds)


def _check_progress(rounds: Sequence[Round], target: float, start: float, natural_mean: float) -> None:
    side = 1.0 if target >= natural_mean else -1.0
    edge = max(rounds, key=lambda each: abs(each.lam))
    before = [each for each in rounds if abs(each.lam) * GROWTH**PATIENCE <= abs(edge.lam)]
    best = max((side * (each.mean + 2 * each.se * side) for each in before), default=-math.inf)
    stuck = side * (target - edge.mean) > 2 * edge.se and side * edge.mean < best
    far = abs(edge.lam) > LAM_LIMIT * abs(start)
    if far or stuck:
        why = "lambda grew out of bounds" if far else "a larger lambda no longer moves the mean"
        raise CalibrationError(
            f"target {target:.6g} is out of this sampler's reach: {why}; {_furthest(rounds, target)}"
        )


def _furthest(rounds: Sequence[Round], target: float) -> str:
    if not rounds:
        return "no mean was reached"
    best = min(rounds, key=lambda each: abs(each.mean - target))
    return f"the nearest mean reached is {best.mean:.6g} +- {best.se:.2g}, at lambda {best.lam:.4g}"


def _rounded(lam: float) -> float:
    """Four digits: what a machine's last bits decide must not name another run."""
    return float(f"{lam:.4g}")
