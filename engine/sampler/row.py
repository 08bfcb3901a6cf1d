"""One row of a plan: its coefficients, and how guidance and re-noising enter them. Numpy-free; knows no solver."""

from dataclasses import dataclass, replace
from math import cos, hypot, sin, sqrt

COLUMNS = ("sigma", "alpha", "a", "b", "c", "d", "e", "p", "q", "f", "r")
# Below this alpha, x carries so little of the picture that sigma^2/alpha only amplifies rounding: no row there is guided.
MIN_GUIDED_ALPHA = 1e-4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row's coefficients (plan.py), float64. `split`: guidance is kept out of the history slot.

    log_variance: (least, most) of a step whose noise the network itself sizes, in place of c (learned_noise.py).
    """

    theta: float
    a: float
    b: float
    c: float = 0.0
    d: float = 0.0
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    split: bool = False
    log_variance: tuple[float, float] | None = None

    @property
    def sigma(self) -> float:
        return sin(self.theta)

    @property
    def alpha(self) -> float:
        return cos(self.theta)

    def guided_in(self, interval: tuple[float, float]) -> bool:
        return self.alpha >= MIN_GUIDED_ALPHA and interval[0] <= self.sigma <= interval[1]

    def values(self, *, guided: bool, constant: float | None = None) -> tuple[float, ...]:
        """In the order of COLUMNS. constant: e itself, the same in every row, in place of the tilt's coefficients."""
        scale = self.sigma**2 / self.alpha if guided else 0.0
        e = (self.b + self.d if self.split else self.b) * scale
        f = 0.0 if self.split else self.q * scale
        if constant is not None:
            e, f = (constant if guided else 0.0), 0.0
        return (self.sigma, self.alpha, self.a, self.b, self.c, self.d, e, self.p, self.q, f, self.r)

    def renoised(self, to: float, back: float, noise: float = 1.0) -> "Row":
        """This row, which ends at the noise angle `to`, and then the forward process up to `back`, as one row.

        x'' = s x' + sqrt(sigma''^2 - s^2 sigma'^2) z,  s = alpha''/alpha'; the two noises are one. noise: times the new one.
        """
        s = cos(back) / cos(to)
        # sigma''^2 - s^2 sigma'^2 = sin(back - to) sin(back + to) / cos(to)^2, which does not cancel at small jumps.
        fresh = sqrt(max(sin(back - to) * sin(back + to), 0.0)) / cos(to)
        return replace(self, a=s * self.a, b=s * self.b, d=s * self.d, c=hypot(s * self.c, noise * fresh))
