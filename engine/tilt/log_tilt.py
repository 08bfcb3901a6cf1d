"""Log-tilts: the scalar map phi in  q(x) = p(x) exp(lam * phi(a(x))) / Z(lam).

Knows nothing of networks, samplers or lambda. Imports neither torch nor numpy: a configuration is checked without
them, and every operation below is a method of the tensor or array it is given.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from tiltscope.engine.choice import describe_choice, parse_choice
from tiltscope.engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
else:  # annotations are evaluated at run time where shapes are checked: they must resolve without torch
    Tensor = Any


@runtime_checkable
class LogTilt(Protocol):
    """What the sampler and the calibration ask of a log-tilt. Every map is elementwise and keeps shape and dtype."""

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

    def phi(self, a: Any) -> Any:
        """phi(a) of a numpy array, for the calibration."""
        ...


@dataclass(frozen=True)
class Linear:
    """phi(a) = a: the soft constraint E_q[a] = c of the KL-minimal principle (method 1)."""

    cap: ClassVar[float] = math.inf

    @property
    def spec(self) -> str:
        return describe_choice(self, LOG_TILTS)

    def value(self, a: Tensor) -> Tensor:
        return a

    def slope(self, a: Tensor) -> Tensor:
        return a.new_ones(a.shape)

    def phi(self, a: Any) -> Any:
        return a


@dataclass(frozen=True)
class Capped:
    """phi(a) = min(a, cap): no reward above the cap (method 1, the published log-tilt).

    The slope at a = cap is 0, and `value` differentiates to the same. E_q[phi] = cap is the hard constraint
    q(a >= cap) = 1, which needs an infinite lambda: choose the cap above the target.
    """

    cap: float

    def __post_init__(self) -> None:
        given: Any = self.cap  # what a caller gave need not be what the annotation says
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ConfigError(f"log-tilt capped got cap={given!r}; the cap is a finite number, as in capped(3.0)")
        object.__setattr__(self, "cap", float(given))

    @property
    def spec(self) -> str:
        return describe_choice(self, LOG_TILTS)

    def value(self, a: Tensor) -> Tensor:
        # Written with >= so that a NaN stays a NaN; `clamp` would also give slope 1 at the tie.
        return a.where(~(a >= self.cap), self.cap)

    def slope(self, a: Tensor) -> Tensor:
        return (a < self.cap).to(a.dtype)

    def phi(self, a: Any) -> Any:
        return a.clip(max=self.cap)


LOG_TILTS: dict[str, type[Linear] | type[Capped]] = {"linear": Linear, "capped": Capped}


def parse_log_tilt(log_tilt: str | LogTilt) -> LogTilt:
    """The log-tilt named by a text ("linear", "capped(3.0)", "capped(cap=3.0)"), or the object itself.

    Raises ConfigError for an unknown name, a missing or wrong parameter, or an object that is not a log-tilt.
    `parse_log_tilt(t.spec) == t` for every log-tilt t.
    """
    given: Any = log_tilt
    if not isinstance(given, str | type) and isinstance(given, LogTilt):
        return given
    return parse_choice(log_tilt, LOG_TILTS, "log_tilt")
