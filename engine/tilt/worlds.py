"""Worlds where the answer is known: what tests and documentation hold the sampler to.

Gaussian world:  p = N(0, s^2 I),  a(x0) = u.x0 with |u| = 1,  x = alpha x0 + sigma eps

    q = p exp(lam a) / Z = N(lam s^2 u, s^2 I)      log Z = KL = lam^2 s^2 / 2      lam*(c) = c / s^2
    D = E[x0 | x] = k x,  k = alpha s^2 / v,  v = alpha^2 s^2 + sigma^2             grad_a = k u

Plug-in guidance is exact here, so a sampler's only errors are its start x ~ N(0, I) and its steps, and both are known: every
row of a plan is affine in (x, H), so the discrete sampler's mean and covariance follow from a recursion over the very table
it runs. Knows the table's columns, not which solver filled it. Source: method section 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, exp, log, prod, sin, sqrt

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.plan import GraphKind, Plan


@dataclass(frozen=True)
class Moments:
    """Mean of u.x and variance of x in every direction (they are equal, and uncorrelated, in this world)."""

    mean: float
    variance: float


@dataclass(frozen=True, kw_only=True)
class GaussianWorld:
    """p = N(0, s^2 I) over pictures of `shape`, with the linear feature a = u.x0 (module docstring).

    direction: u in C order of the picture, normalised here; default proportional to (1, 2, ..., n), so that a transposed or
    permuted state shows.
    """

    s: float = 1.7
    shape: tuple[int, ...] = (2,)
    direction: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.s > 0:
            raise ConfigError(f"s got {self.s!r}; allowed: a positive standard deviation")
        if self.direction is not None and np.shape(self.direction) != (prod(self.shape),):
            raise ConfigError(
                f"direction got {len(self.direction)} numbers; allowed: {prod(self.shape)}, one an element"
            )

    @property
    def u(self) -> NDArray[np.float64]:
        u = np.arange(1.0, prod(self.shape) + 1) if self.direction is None else np.asarray(self.direction, np.float64)
        return u / np.linalg.norm(u)

    @property
    def prior(self) -> Prior:
        """The closed-form denoiser, in the dtype of x; its coefficient is float64 on the way."""
        variance = self.s**2

        def denoise(x: Float[Tensor, "batch ..."], sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
            sigma = sigma.to(torch.float64)
            alpha_sq = (1 - sigma) * (1 + sigma)
            k = alpha_sq.sqrt() * variance / (alpha_sq * variance + sigma**2)
            return x * k.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))

        return Prior(denoise, shape=self.shape, name=f"gaussian(s={self.s!r})")

    @property
    def feature(self) -> Feature:
        u = torch.from_numpy(self.u)

        def activation(x0: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch"]:
            return (x0.flatten(1) * u.to(x0.dtype)).sum(1)

        return Feature(activation, name="linear")

    def tilted(self, lam: float) -> Moments:
        """Of q, the continuous answer: mean lam s^2 along u, variance s^2."""
        return Moments(lam * self.s**2, self.s**2)

    def log_z(self, lam: float) -> float:
        return lam**2 * self.s**2 / 2

    def kl(self, lam: float) -> float:
        """KL(q || p) in nats."""
        return lam**2 * self.s**2 / 2

    def lam(self, target: float) -> float:
        """lambda*: E_q[a] = target."""
        return target / self.s**2

    def discrete(self, plan: Plan, lam: float) -> Moments:
        """Of what the plan samples, exactly, from its start N(0, I): the sampler's answer up to rounding."""
        return discrete_moments(plan, lam, self.s)

    def limit(self, plan: Plan, lam: float, *, eta: float) -> Moments:
        """Of the plan's solver with ever more steps from the same start N(0, I) at the plan's first noise angle.

        eta: 0 for the probability-flow ODE (euler, heun, dpmpp_2m), 1 for ancestral sampling, between for ddim(eta). A
        deviation from the marginals of q shrinks by gain = (s / sqrt(v))^(1 - eta^2) (alpha s^2 / v)^(eta^2), v and alpha at
        the start: the ODE never forgets the start (mean -0.17 % at alpha = 1e-3, s = 1.7), the SDE does.
        """
        alpha, sigma = cos(plan.thetas[0]), sin(plan.thetas[0])
        v = alpha**2 * self.s**2 + sigma**2
        gain = exp((1 - eta**2) * log(self.s / sqrt(v)) + eta**2 * log(alpha * self.s**2 / v))
        mean, variance = lam * self.s**2, self.s**2
        return Moments(mean - gain * alpha * mean, variance + gain**2 * (1 - v))


def discrete_moments(plan: Plan, lam: float, s: float) -> Moments:
    """Moments of x after the last row, in the Gaussian world, by the affine recursion of the plan's own table.

    Along u, with y = (x, H), D = k x and grad_a = k (1 where the gradient is taken at D, 0 on unguided rows):

        y' = A y + lam (e, f) grad_a + (c z, 0),     A = [[a + b k, d], [p + q k, r]]

    so mean' = A mean + lam (e, f) grad_a and cov' = A cov A' + diag(c^2, 0), from mean 0 and cov diag(1, 0). Orthogonal to u
    the same without guidance: mean 0, the same covariance. float64.
    """
    mean, covariance = np.zeros(2), np.diag([1.0, 0.0])
    for (sigma, alpha, a, b, c, d, e, p, q, f, r), kind in zip(plan.table, plan.kind, strict=True):
        k = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        grad_a = {GraphKind.UNGUIDED: 0.0, GraphKind.GUIDED: k, GraphKind.TRUNK_ONLY: 1.0}[GraphKind(kind)]
        step = np.array([[a + b * k, d], [p + q * k, r]])
        mean = step @ mean + lam * grad_a * np.array([e, f])
        covariance = step @ covariance @ step.T + np.diag([c**2, 0.0])
    return Moments(float(mean[0]), float(covariance[0, 0]))
