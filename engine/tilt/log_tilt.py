"""Log-tilts: the scalar map phi in  q(x) = p(x) exp(lam * phi(a(x))) / Z(lam).

Knows nothing of networks, samplers or lambda. Imports neither torch nor numpy: a configuration is checked without
them, and every operation below is a method of the tensor or array it is given.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from tiltscope.engine.choice import describe_choice, parse_choice
from tiltscope.engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
else:  # annotations are evaluated at run time where shapes are checked: they must resolve without torch
    Tensor = Any


@runtime_checkable
class LogTilt(Protocol):
    """What the sampler and the calibration ask of a log-tilt. Every map is elementwise and keeps shape and dtype.

    has_level: it carries a wanted level of its own, so that no lambda is calibrated for it.
    """

    has_level: ClassVar[bool]

    @property
    def spec(self) -> str:
        """The text that `parse_log_tilt` reads back, such as "capped(cap=3.0)"."""
        ...

    def value(self, a: Tensor) -> Tensor:
        """phi(a), differentiable; a: activations of any shape."""
        ...

    def slope(self, a: Tensor) -> Tensor:
        """phi'(a), the factor in the strength w = lam * phi'(drive)."""
        ...

    def curvature(self, a: Tensor) -> Tensor:
        """phi''(a), where it exists; what the lift `covariance` needs besides."""
        ...

    def phi(self, a: Any) -> Any:
        """phi(a) of a numpy array, for the calibration."""
        ...


@dataclass(frozen=True)
class _Parameters:
    """Finite numbers, checked on construction; the text that reads back."""

    has_level: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            given: Any = getattr(self, each.name)  # what a caller gave need not be what the annotation says
            what = f"log-tilt {_name(self)} got {each.name}={given!r}; the {each.name} is a"
            if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
                raise ConfigError(f"{what} finite number")
            if each.name in self.positive and given <= 0:
                raise ConfigError(f"{what} number above 0")
            object.__setattr__(self, each.name, float(given))

    @property
    def spec(self) -> str:
        return describe_choice(self, LOG_TILTS)


@dataclass(frozen=True)
class Linear(_Parameters):
    """phi(a) = a: the soft constraint E_q[a] = c of the KL-minimal principle (method 1)."""

    def value(self, a: Tensor) -> Tensor:
        return a

    def slope(self, a: Tensor) -> Tensor:
        return a.new_ones(a.shape)

    def curvature(self, a: Tensor) -> Tensor:
        return a.new_zeros(a.shape)

    def phi(self, a: Any) -> Any:
        return a


@dataclass(frozen=True)
class ZScored(_Parameters):
    """phi(a) = (a - mean) / sd: lambda per natural standard deviation, which compares between features (method 1)."""

    mean: float
    sd: float
    positive: ClassVar[tuple[str, ...]] = ("sd",)

    def value(self, a: Tensor) -> Tensor:
        return (a - self.mean) / self.sd

    def slope(self, a: Tensor) -> Tensor:
        return a.new_full(a.shape, 1 / self.sd)

    def curvature(self, a: Tensor) -> Tensor:
        return a.new_zeros(a.shape)

    def phi(self, a: Any) -> Any:
        return (a - self.mean) / self.sd


@dataclass(frozen=True)
class Capped(_Parameters):
    """phi(a) = min(a, cap): no reward above the cap (method 1, the published log-tilt).

    The slope at a = cap is 0, and `value` differentiates to the same. E_q[phi] = cap is the hard constraint
    q(a >= cap) = 1, which needs an infinite lambda: choose the cap above the target.
    """

    cap: float

    def value(self, a: Tensor) -> Tensor:
        # Written with >= so that a NaN stays a NaN; `clamp` would also give slope 1 at the tie.
        return a.where(~(a >= self.cap), self.cap)

    def slope(self, a: Tensor) -> Tensor:
        return (a < self.cap).to(a.dtype)

    def curvature(self, a: Tensor) -> Tensor:
        return a.new_zeros(a.shape)

    def phi(self, a: Any) -> Any:
        return a.clip(max=self.cap)


@dataclass(frozen=True)
class Hinge(_Parameters):
    """phi(a) = a - kappa relu(a - c)^2: linear up to c, then a growing price; highest at c + 1/(2 kappa) (method 1)."""

    c: float
    kappa: float = 1.0
    positive: ClassVar[tuple[str, ...]] = ("kappa",)

    def value(self, a: Tensor) -> Tensor:
        return a - self.kappa * (a - self.c).clamp(min=0) ** 2

    def slope(self, a: Tensor) -> Tensor:
        return 1 - 2 * self.kappa * (a - self.c).clamp(min=0)

    def curvature(self, a: Tensor) -> Tensor:
        return -2 * self.kappa * (a > self.c).to(a.dtype)

    def phi(self, a: Any) -> Any:
        return a - self.kappa * (a - self.c).clip(min=0) ** 2


@dataclass(frozen=True)
class Target(_Parameters):
    """phi(a) = -(a - c)^2 / (2 tau^2): activations near c, on either side (method 1). lam = 1 is a Gaussian observation of a."""

    c: float
    tau: float = 1.0
    has_level: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("tau",)

    def value(self, a: Tensor) -> Tensor:
        return -(((a - self.c) / self.tau) ** 2) / 2

    def slope(self, a: Tensor) -> Tensor:
        return (self.c - a) / self.tau**2

    def curvature(self, a: Tensor) -> Tensor:
        return a.new_full(a.shape, -1 / self.tau**2)

    def phi(self, a: Any) -> Any:
        return -(((a - self.c) / self.tau) ** 2) / 2


@dataclass(frozen=True)
class SmoothCap(_Parameters):
    """phi(a) = c - tau softplus((c - a) / tau): min(a, c) with a rounded corner, to which it tends as tau -> 0 (method 1)."""

    c: float
    tau: float = 1.0
    positive: ClassVar[tuple[str, ...]] = ("tau",)

    def value(self, a: Tensor) -> Tensor:
        return self.c - self.tau * _softplus((self.c - a) / self.tau)

    def slope(self, a: Tensor) -> Tensor:
        return ((self.c - a) / self.tau).sigmoid()

    def curvature(self, a: Tensor) -> Tensor:
        below = ((self.c - a) / self.tau).sigmoid()
        return -below * (1 - below) / self.tau

    def phi(self, a: Any) -> Any:
        import numpy as np

        return self.c - self.tau * np.logaddexp(0, (self.c - a) / self.tau)


@dataclass(frozen=True)
class SoftHard(_Parameters):
    """phi(a) = log sigmoid((a - c) / tau): with lam = 1 the hard constraint q(a >= c) = 1 as tau -> 0 (method 1)."""

    c: float
    tau: float = 1.0
    has_level: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("tau",)

    def value(self, a: Tensor) -> Tensor:
        return -_softplus((self.c - a) / self.tau)

    def slope(self, a: Tensor) -> Tensor:
        return ((self.c - a) / self.tau).sigmoid() / self.tau

    def curvature(self, a: Tensor) -> Tensor:
        below = ((self.c - a) / self.tau).sigmoid()
        return -below * (1 - below) / self.tau**2

    def phi(self, a: Any) -> Any:
        import numpy as np

        return -np.logaddexp(0, (self.c - a) / self.tau)


LOG_TILTS: dict[str, type[Any]] = {
    "linear": Linear,
    "zscored": ZScored,
    "capped": Capped,
    "hinge": Hinge,
    "target": Target,
    "smooth_cap": SmoothCap,
    "soft_hard": SoftHard,
}


def parse_log_tilt(log_tilt: str | LogTilt) -> LogTilt:
    """The log-tilt named by a text ("linear", "capped(3.0)", "capped(cap=3.0)"), or the object itself.

    Raises ConfigError for an unknown name, a missing or wrong parameter, or an object that is not a log-tilt.
    `parse_log_tilt(t.spec) == t` for every log-tilt t.
    """
    given: Any = log_tilt
    if not isinstance(given, str | type) and isinstance(given, LogTilt):
        return given
    return parse_choice(log_tilt, LOG_TILTS, "log_tilt")


def _softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)), which neither overflows nor cancels; torch's own turns linear at 20, where float64 is not."""
    return t.clamp(min=0) + (-t.abs()).exp().log1p()


def _name(log_tilt: Any) -> str:
    return next(name for name, kind in LOG_TILTS.items() if type(log_tilt) is kind)
