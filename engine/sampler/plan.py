"""A sampler is a table: every solver, as rows of coefficients. Nothing else in tiltscope knows that solvers exist.

State is in unit-variance coordinates x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1, and theta = atan2(sigma, alpha) is the
noise angle. With D = E[x0 | x], grad_a = d drive / dx, strength w, z ~ N(0, I) and one history slot H (zero at the start),
one row does

    delta = e w grad_a
    x'    = a x + b D + delta + c z + d H
    H'    = p x + q D + f w grad_a + r H

Guidance replaces D by D~ = D + (sigma^2 / alpha) w grad_a, hence e = b sigma^2/alpha and f = q sigma^2/alpha, except for
multistep solvers, whose guidance is split off the history: f = 0 and e = (b + d) sigma^2/alpha, the first-order
coefficient. Numpy only: an embedding without torch fills the very same table.

To add a solver: write a frozen dataclass with `default_grid`, `stochastic` and `rows(thetas)`, and name it in SOLVERS.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from math import acos, cos, log, sin, sqrt, tan
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.choice import parse_choice
from tiltscope.engine.errors import ConfigError

COLUMNS = ("sigma", "alpha", "a", "b", "c", "d", "e", "p", "q", "f", "r")
# Below this alpha, x carries so little of the picture that sigma^2/alpha only amplifies rounding: no row there is guided.
MIN_GUIDED_ALPHA = 1e-4
MAX_ROWS = 100_000


class GraphKind(IntEnum):
    """Which networks a row needs."""

    UNGUIDED = 0
    GUIDED = 1
    TRUNK_ONLY = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row's coefficients (module docstring), float64. `split`: guidance is kept out of the history slot."""

    theta: float
    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    split: bool = False

    @property
    def sigma(self) -> float:
        return sin(self.theta)

    @property
    def alpha(self) -> float:
        return cos(self.theta)

    def guided_in(self, interval: tuple[float, float]) -> bool:
        return self.alpha >= MIN_GUIDED_ALPHA and interval[0] <= self.sigma <= interval[1]

    def values(self, *, guided: bool) -> tuple[float, ...]:
        scale = self.sigma**2 / self.alpha if guided else 0.0
        e = (self.b + self.d if self.split else self.b) * scale
        f = 0.0 if self.split else self.q * scale
        return (self.sigma, self.alpha, self.a, self.b, self.c, self.d, e, self.p, self.q, f, self.r)


@dataclass(frozen=True)
class Plan:
    """A filled table: `table` float64 [rows, 11] in the order of COLUMNS, `kind` int8 [rows] of GraphKind.

    `thetas` float64 [steps + 1]: the noise angles between which the solver steps, the last one 0.
    """

    table: NDArray[np.float64]
    kind: NDArray[np.int8]
    thetas: NDArray[np.float64] = field(repr=False)

    @property
    def num_rows(self) -> int:
        return len(self.kind)

    def column(self, name: str) -> NDArray[np.float64]:
        return self.table[:, COLUMNS.index(name)]


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
            # 1 - alpha^2/alpha'^2 = sin(theta - to) sin(theta + to) / alpha'^2, which does not cancel at small steps.
            fresh = sqrt(sin(theta - to) * sin(theta + to)) / cos(to)
            c = self.eta * sin(to) / sin(theta) * fresh
            a = sqrt(max(sin(to) ** 2 - c**2, 0.0)) / sin(theta)
            yield Row(theta=theta, a=a, b=cos(to) - a * cos(theta), c=c)


@dataclass(frozen=True)
class Ddpm(Ddim):
    """Ancestral sampling, Ho et al. 2020 eq. 7 (posterior variance): DDIM with eta = 1."""

    eta: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class Euler(Ddim):
    """DDIM(eta = 0), on the angle grid by default."""

    eta: float = field(default=0.0, init=False)
    default_grid: ClassVar[str] = "angle"


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
            if to == 0:
                yield Row(theta=theta, a=0.0, b=1.0)
                continue
            h = to - theta
            at, bt = h / tan(theta), -h / sin(theta)
            yield Row(theta=theta, a=1 + at, b=bt, p=1 + at / 2, q=bt / 2)
            yield Row(theta=to, a=h / 2 / tan(to), b=-h / 2 / sin(to), d=1.0)


@dataclass(frozen=True)
class Dpmpp2m:
    """DPM-Solver++(2M), Lu et al. 2022 algorithm 2, in log-SNR l = log(alpha/sigma); H holds the previous D, unguided.

    x' = (sigma'/sigma) x + k [(1 + 1/2r) D - (1/2r) H],  k = alpha' - alpha sigma'/sigma,  r = (previous step in l)/(this
    step in l); the first and the last row are first order. Guidance is split off the history: guided history is fragile.
    """

    default_grid: ClassVar[str] = "angle"
    stochastic: ClassVar[bool] = False

    def rows(self, thetas: NDArray[np.float64]) -> Iterator[Row]:
        previous: float | None = None
        for theta, to in _pairs(thetas):
            a = sin(to) / sin(theta)
            k = cos(to) - cos(theta) * a
            step = _log_snr(to) - _log_snr(theta) if to > 0 else None
            extrapolate = 0.0 if previous is None or step is None else step / previous / 2
            yield Row(theta=theta, a=a, b=k * (1 + extrapolate), d=-k * extrapolate, q=1.0, split=True)
            previous = step


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
    "ddim": Ddim,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": Dpmpp2m,
    "renoise": Renoise,
}


@dataclass(frozen=True)
class Angle:
    """Uniform in the noise angle, from arccos(alpha_min) to 0."""

    alpha_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.alpha_min < 1:
            raise ConfigError(f"grid angle: alpha_min must lie in (0, 1), got {self.alpha_min}")

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        return np.linspace(acos(self.alpha_min), 0.0, steps + 1)


@dataclass(frozen=True)
class Native:
    """The network's own noise levels, `steps` of them evenly spaced over all, then 0."""

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if levels is None:
            raise ConfigError("grid native: this prior has no noise levels of its own; use the grid angle")
        if steps > len(levels):
            raise ConfigError(
                f"steps: got {steps}, but the network has {len(levels)} noise levels (grid native); "
                f"ask for at most {len(levels)} steps, or use the grid angle"
            )
        at = np.linspace(0, len(levels) - 1, steps).round().astype(int)
        return np.append(np.arctan2(levels[at], np.sqrt((1 - levels[at]) * (1 + levels[at]))), 0.0)


GRIDS: dict[str, type[Any]] = {"angle": Angle, "native": Native}


def make_plan(
    solver: Any,
    *,
    steps: int,
    grid: Any = None,
    levels: NDArray[np.float64] | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> Plan:
    """The table of `solver` over `steps` intervals of `grid`.

    solver, grid: a name ("heun"), a name with parameters ("ddim(eta=0.5)") or an object of SOLVERS / GRIDS. grid None: the
    solver's own, or the angle grid where the network has no levels. levels: the network's sigma levels, descending.
    guidance_interval: (sigma_lo, sigma_hi), rows outside are unguided. Raises ConfigError on anything else.
    """
    method: Solver = parse_choice(solver, SOLVERS, "solver")
    if grid is None:
        grid = method.default_grid if levels is not None else "angle"
    if type(steps) is not int or not 1 <= steps <= MAX_ROWS:
        raise ConfigError(f"steps: got {steps!r}, allowed are whole numbers from 1 to {MAX_ROWS}")
    thetas = parse_choice(grid, GRIDS, "grid").thetas(steps, levels)
    rows = list(method.rows(thetas))
    guided = [row.guided_in(guidance_interval or (0.0, 1.0)) for row in rows]
    table = np.array([row.values(guided=on) for row, on in zip(rows, guided, strict=True)])
    kind = np.array([GraphKind.GUIDED if on else GraphKind.UNGUIDED for on in guided], np.int8)
    return Plan(table=table, kind=kind, thetas=thetas)


def _pairs(thetas: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    values = [float(theta) for theta in thetas]
    yield from itertools.pairwise(values)


def _log_snr(theta: float) -> float:
    return log(cos(theta) / sin(theta))
