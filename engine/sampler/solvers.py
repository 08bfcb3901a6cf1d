"""Solvers: what each row of a plan holds, for the table of plan.py. Numpy only. Adding a solver touches this file alone.

To add one: write a frozen dataclass with `default_grid`, `stochastic` and `rows(thetas)`, and name it in SOLVERS.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import atan, cos, expm1, inf, log, sin, sqrt, tan
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.row import Row


@runtime_checkable
class Solver(Protocol):
    """How a solver turns noise angles into rows."""

    default_grid: ClassVar[str]

    @property
    def stochastic(self) -> bool: ...

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Ddim:
    """DDIM(eta), Song et al. 2021 eq. 12: eta = 0 is the first-order probability-flow step, eta = 1 ancestral sampling.

    x' = alpha' D + sqrt(sigma'^2 - c^2) eps_hat + c z,   c = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2),
    eps_hat = (x - alpha D) / sigma.
    """

    eta: float = 0.0
    default_grid: ClassVar[str] = "native"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"solver ddim: eta must lie in [0, 1], got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        for theta, to in _pairs(thetas):
            c = self.eta * sin(to) / sin(theta) * _destroyed(theta, to)
            a = sqrt(max(sin(to) ** 2 - c**2, 0.0)) / sin(theta)
            yield Row(theta=theta, a=a, b=cos(to) - a * cos(theta), c=c)


@dataclass(frozen=True)
class Ddpm(Ddim):
    """Ancestral sampling, Ho et al. 2020 eq. 7 (posterior variance): DDIM with eta = 1."""

    eta: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class DdpmFixedLarge(Ddpm):
    """Ancestral sampling with beta = 1 - (alpha/alpha')^2 for its variance, the upper bound of eq. 7; the last row adds none.

    The marginals are wider than the forward process's by what the posterior variance is less than beta: first order in the step.
    """

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        for row, (theta, to) in zip(super().rows(thetas), _pairs(thetas), strict=True):
            yield replace(row, c=_destroyed(theta, to) if to > 0 else 0.0)


@dataclass(frozen=True)
class DdpmLearnedRange(Ddpm):
    """Ancestral sampling whose variance a network of learned range gives for every pixel, between those of the two above.

    Nichol & Dhariwal 2021, eq. 15; the last row adds none. It has no one c, so particles cannot weigh its rows.
    """

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        for row, (theta, to) in zip(super().rows(thetas), _pairs(thetas), strict=True):
            bounds = (2 * log(row.c), 2 * log(_destroyed(theta, to))) if to > 0 else None
            yield replace(row, c=0.0, log_variance=bounds)


@dataclass(frozen=True)
class Euler(Ddim):
    """DDIM(eta = 0), on the angle grid by default."""

    eta: float = field(default=0.0, init=False)
    default_grid: ClassVar[str] = "angle"


@dataclass(frozen=True)
class FlowEuler(Ddim):
    """Euler's method of flow matching, x_t = (1 - t) x0 + t eps: in unit variance the same rows as DDIM(eta = 0)."""

    eta: float = field(default=0.0, init=False)
    default_grid: ClassVar[str] = "flow_shift"


@dataclass(frozen=True)
class Heun:
    """Heun's method for dx/dtheta = (cos(theta) x - D) / sin(theta); two rows a step, the last step first order.

    The angle is a bounded time: stepped in sigma/alpha, whose first step goes from 1000 to 20, the variance is 46 % off.
    Row one moves x to the Euler point and keeps x + h k1/2 in H; row two adds h k2/2 to it.
    """

    default_grid: ClassVar[str] = "angle"
    stochastic: ClassVar[bool] = False

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        for theta, to in _pairs(thetas):
            yield from _heun_step(theta, to)


@dataclass(frozen=True)
class Edm:
    """Heun's method with churn, Karras et al. 2022 algorithm 2: before a step from s = sigma/alpha in [s_min, s_max] noise is
    added up to s (1 + gamma), gamma = min(churn / steps, sqrt(2) - 1), folded into the end of the row before.

    s_noise multiplies the noise added. The first step has none: its start is noise already. Steps are taken in the noise
    angle, as Heun's here. churn = 0 is Heun's method.
    """

    churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.0
    default_grid: ClassVar[str] = "karras"
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and 0 <= self.s_min <= self.s_max and self.s_noise >= 0):
            raise ConfigError(
                f"solver edm: got churn={self.churn}, s_min={self.s_min}, s_max={self.s_max}, s_noise={self.s_noise}; "
                "allowed are churn >= 0, 0 <= s_min <= s_max and s_noise >= 0"
            )

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        gamma = min(self.churn / (len(thetas) - 1), sqrt(2) - 1)
        at = float(thetas[0])
        for _, to in _pairs(thetas):
            *before, last = _heun_step(at, to)
            yield from before
            churned = to > 0 and self.s_min <= tan(to) <= self.s_max
            at = atan(tan(to) * (1 + gamma)) if churned else to
            yield last.renoised(to, at, self.s_noise) if churned else last


@dataclass(frozen=True)
class Dpmpp2m:
    """DPM-Solver++(2M), Lu et al. 2022 algorithm 2, in log-SNR l = log(alpha/sigma); H holds the previous D.

    x' = (sigma'/sigma) x + k [(1 + 1/2r) D - (1/2r) H],  k = alpha' - alpha sigma'/sigma,  r = (previous step in l)/(this
    step in l); the first and the last row are first order. Guidance is split off the history, which guided is fragile:
    guided_history=true does as the plain solver would.
    """

    guided_history: bool = False
    default_grid: ClassVar[str] = "angle"
    stochastic: ClassVar[bool] = False

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        return _multistep(thetas, eta=0.0, split=not self.guided_history)


@dataclass(frozen=True)
class Dpmpp2mSde:
    """SDE-DPM-Solver++(2M), Lu et al. 2022 appendix B (midpoint), with h the step in log-SNR l:

    x' = (sigma'/sigma) e^-h x + k [(1 + 1/2r) D - (1/2r) H] + sigma' sqrt(1 - e^-2h) z,   k = alpha' (1 - e^-2h).
    """

    guided_history: bool = False
    default_grid: ClassVar[str] = "angle"
    stochastic: ClassVar[bool] = True

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        return _multistep(thetas, eta=1.0, split=not self.guided_history)


@dataclass(frozen=True)
class Renoise:
    """x' = alpha' D + sigma' z: for the lift daps, whose D is a draw of x0 and no mean. Zhang et al. 2025, algorithm 1."""

    default_grid: ClassVar[str] = "native"
    stochastic: ClassVar[bool] = True

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        for theta, to in _pairs(thetas):
            yield Row(theta=theta, a=0.0, b=cos(to), c=sin(to))


SOLVERS: dict[str, type[Any]] = {
    "ddpm": Ddpm,
    "ddpm_fixed_large": DdpmFixedLarge,
    "ddpm_learned_range": DdpmLearnedRange,
    "ddim": Ddim,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": Dpmpp2m,
    "dpmpp_2m_sde": Dpmpp2mSde,
    "edm": Edm,
    "flow_euler": FlowEuler,
    "renoise": Renoise,
}


def _pairs(thetas: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    values = [float(theta) for theta in thetas]
    yield from itertools.pairwise(values)


def _destroyed(theta: float, to: float) -> float:
    """sqrt(beta), beta = 1 - alpha^2/alpha'^2 = sin(theta - to) sin(theta + to) / alpha'^2: no cancellation at small steps."""
    return sqrt(sin(theta - to) * sin(theta + to)) / cos(to)


def _heun_step(theta: float, to: float) -> list[Row]:
    if to == 0:
        return [Row(theta=theta, a=0.0, b=1.0)]
    h = to - theta
    at, bt = h / tan(theta), -h / sin(theta)
    return [
        Row(theta=theta, a=1 + at, b=bt, p=1 + at / 2, q=bt / 2),
        Row(theta=to, a=h / 2 / tan(to), b=-h / 2 / sin(to), d=1.0),
    ]


def _multistep(thetas: NDArray[np.float64], *, eta: float, split: bool) -> Iterator[Row]:
    previous: float | None = None
    for theta, to in _pairs(thetas):
        h = _log_snr(to) - _log_snr(theta) if to > 0 else inf
        a = sin(to) / sin(theta) * (tan(to) / tan(theta)) ** eta  # e^-h = tan(to) / tan(theta)
        k = -cos(to) * expm1(-(1 + eta) * h)
        c = sin(to) * sqrt(-expm1(-2 * eta * h)) if eta and to > 0 else 0.0
        extrapolate = 0.0 if previous is None or h == inf else h / previous / 2
        yield Row(theta=theta, a=a, b=k * (1 + extrapolate), c=c, d=-k * extrapolate, q=1.0, split=split)
        previous = h


def _log_snr(theta: float) -> float:
    return log(cos(theta) / sin(theta))
