"""Grids: the noise angles theta = atan2(sigma, alpha) between which a solver steps, the last one 0. Numpy only.

To add a grid: write a frozen dataclass with `thetas(steps, levels)` -> float64 [steps + 1], descending, and name it in GRIDS.
"""

from dataclasses import dataclass
from math import acos
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.errors import ConfigError


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


@dataclass(frozen=True)
class Karras:
    """sigma/alpha = (max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho for u uniform in [0, 1], then 0. Karras et al. 2022 eq. 5.

    sigma_max, sigma_min are in units of sigma/alpha, as EDM's variance-exploding coordinates have them.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0):
            raise ConfigError(
                f"grid karras: got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, rho={self.rho}; "
                "allowed are 0 < sigma_min < sigma_max and rho > 0"
            )

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.append(np.arctan(np.linspace(high, low, steps) ** self.rho), 0.0)


@dataclass(frozen=True)
class LogSnr:
    """Uniform in log(alpha/sigma), from `low` (noise) to `high`, then 0. Lu et al. 2022, section 3."""

    low: float = -6.9
    high: float = 6.0

    def __post_init__(self) -> None:
        if not -40 < self.low < self.high < 40:
            raise ConfigError(f"grid log_snr: got low={self.low}, high={self.high}; allowed are -40 < low < high < 40")

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        return np.append(np.arctan(np.exp(-np.linspace(self.low, self.high, steps))), 0.0)


@dataclass(frozen=True)
class FlowShift:
    """Flow-matching time t = shift u / (1 + (shift - 1) u), u uniform from t_max to 0, theta = atan2(t, 1 - t).

    shift 1 is uniform in t; larger values spend more steps at high noise. Esser et al. 2024 eq. 23.
    """

    shift: float = 1.0
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not (self.shift > 0 and 0 < self.t_max < 1):
            raise ConfigError(
                f"grid flow_shift: got shift={self.shift}, t_max={self.t_max}; allowed are shift > 0 and 0 < t_max < 1"
            )

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        u = np.linspace(self.t_max, 0.0, steps + 1)
        t = self.shift * u / (1 + (self.shift - 1) * u)
        return np.arctan2(t, 1 - t)


@dataclass(frozen=True)
class LinearBeta:
    """Uniform in the time of the linear variance-preserving SDE: log alpha = -(high - low) t^2/4 - low t/2, t from 1 to 0.

    Half of its steps lie above sigma = .95, where a picture's colours and layout are settled: few steps need that, since one step
    over all of it leaves them at the mean picture's. DDPM's linear betas in continuous time.
    Source: Song et al. 2021 (arXiv:2011.13456), eq. 33.
    """

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ConfigError(f"grid linear_beta: got low={self.low}, high={self.high}; allowed are 0 <= low < high")

    def thetas(self, steps: int, levels: NDArray[np.float64] | None) -> NDArray[np.float64]:
        t = np.linspace(1.0, 0.0, steps + 1)
        decay = (self.high - self.low) * t * t / 2 + self.low * t  # -2 log alpha
        return np.arctan2(np.sqrt(-np.expm1(-decay)), np.exp(-decay / 2))


GRIDS: dict[str, type[Any]] = {
    "angle": Angle,
    "native": Native,
    "karras": Karras,
    "log_snr": LogSnr,
    "flow_shift": FlowShift,
    "linear_beta": LinearBeta,
}
