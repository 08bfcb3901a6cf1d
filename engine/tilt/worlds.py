"""Worlds where the answer is known: what tests and documentation hold the sampler to.

Gaussian world:  p = N(0, s^2 I),  a(x0) = u.x0 with |u| = 1,  x = alpha x0 + sigma eps

    q = p exp(lam a) / Z = N(lam s^2 u, s^2 I)      log Z = KL = lam^2 s^2 / 2      lam*(c) = c / s^2
    D = E[x0 | x] = k x,  k = alpha s^2 / v,  v = alpha^2 s^2 + sigma^2             grad_a = k u

Plug-in guidance is exact here, so a sampler's only errors are its start x ~ N(0, I) and its steps, and both are known: every
row of a plan is affine in (x, H), so the discrete sampler's mean and covariance follow from a recursion over the very table
it runs. Knows the table's columns, not which solver filled it.

Mixture world:   p = sum_k pi_k N(mu_k u, s^2 I), the same feature: plug-in guidance is wrong here, and gives modes wrong shares

    q = sum_k w_k N((mu_k + lam s^2) u, s^2 I),   w_k ~ pi_k exp(lam mu_k)   log Z = log sum_k pi_k exp(lam mu_k) + lam^2 s^2 / 2

Kernel world:    p = (1/N) sum_i N(x_i, s^2 I) over real pictures x_i, any feature: as s -> 0 its tilt is a sum over the pictures

    q -> sum_i w_i delta(x_i),   w_i ~ exp(lam phi(a(x_i)))     log Z = log (1/N) sum_i exp(lam phi(a(x_i)))

Source: method section 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, exp, log, prod, sin, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
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


@dataclass(frozen=True, kw_only=True)
class MixtureWorld:
    """p = sum_k weights_k N(levels_k u, s^2 I) in `dim` dimensions, u ~ (1, ..., dim), with a = u.x0 (module docstring).

    The default is sharp: at lam = 3 the exact shares are (.10, .28, .62), of which dps makes (.35, .29, .37).
    """

    weights: tuple[float, ...] = (0.90, 0.09, 0.01)
    levels: tuple[float, ...] = (-0.5, 0.6, 1.6)
    s: float = 0.2**0.5
    dim: int = 2

    @property
    def feature(self) -> Feature:
        return GaussianWorld(shape=(self.dim,)).feature

    @property
    def prior(self) -> Prior:
        """The closed-form denoiser: sum_k r_k(x) (m_k + k (x - alpha m_k)), float64 throughout."""
        u = torch.from_numpy(GaussianWorld(shape=(self.dim,)).u)

        def denoise(x: Float[Tensor, "batch dim"], sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch dim"]:
            given, x, sigma = x.dtype, x.double(), sigma.double()[:, None]
            along = x @ u
            mean = self._along(along[:, None], sigma)
            alpha_sq = (1 - sigma) * (1 + sigma)
            k = alpha_sq.sqrt() * self.s**2 / (alpha_sq * self.s**2 + sigma**2)
            return (k * x + (mean - k[:, 0] * along)[:, None] * u).to(given)

        return Prior(denoise, shape=(self.dim,), name=f"mixture({self.weights}, {self.levels}, s={self.s!r})")

    def shares(self, lam: float) -> NDArray[np.float64]:
        """w_k of the tilt."""
        logits = np.log(self.weights) + lam * np.array(self.levels)
        ratios = np.exp(logits - logits.max())
        return ratios / ratios.sum()

    def log_z(self, lam: float) -> float:
        return float(np.logaddexp.reduce(np.log(self.weights) + lam * np.array(self.levels))) + lam**2 * self.s**2 / 2

    def mean(self, lam: float) -> float:
        """E_q[a]."""
        return float(self.shares(lam) @ np.array(self.levels)) + lam * self.s**2

    def shares_of(
        self, activation: NDArray[np.float64], lam: float, weight: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Shares of q's modes in a sample of a, by maximum likelihood with the modes' own means and widths held (EM)."""
        weight = np.full(len(activation), 1 / len(activation)) if weight is None else weight / weight.sum()
        away = activation[:, None] - np.array(self.levels) - lam * self.s**2
        density = np.exp(-(away**2) / (2 * self.s**2)) + 1e-300
        shares = np.full(len(self.levels), 1 / len(self.levels))
        for _ in range(500):
            given = shares * density
            shares = weight @ (given / given.sum(1, keepdims=True))
        return shares

    def discrete(self, plan: Plan, lam: float) -> tuple[float, float]:
        """(log Z, E_q[a]) of what an unguided plan without history samples, by quadrature along u, where alone a lives.

        f(x) = E[exp(lam a) | x] backwards over the rows, f'(x) = int f(a x + b D(x) + c z) N(z) dz: log f by cubic splines on a
        grid, z by 32 Gauss-Hermite nodes. E_q[a] = d log Z / d lam, by central differences.
        """
        step = 1e-3
        low, middle, high = (self._discrete_log_z(plan, lam + at * step) for at in (-1, 0, 1))
        return middle, (high - low) / (2 * step)

    def _discrete_log_z(self, plan: Plan, lam: float) -> float:
        grid = np.linspace(-8, 8, 1601)
        nodes, shares = np.polynomial.hermite_e.hermegauss(32)
        log_share = np.log(shares / shares.sum())
        log_f = lam * grid
        for sigma, _, a, b, c, *_ in plan.table[::-1]:
            levels = torch.full((len(grid), 1), sigma, dtype=torch.float64)
            mean = self._along(torch.from_numpy(grid)[:, None], levels).numpy()
            to = (a * grid + b * mean)[:, None] + c * nodes
            log_f = np.logaddexp.reduce(CubicSpline(grid, log_f)(to.clip(-8, 8)) + log_share, axis=1)
        return float(np.logaddexp.reduce(CubicSpline(grid, log_f)(nodes) + log_share))

    def _along(self, x: Float[Tensor, "batch 1"], sigma: Float[Tensor, "batch 1"]) -> Float[Tensor, "batch"]:
        """E[u.x0 | u.x] for the component along u."""
        alpha_sq = (1 - sigma) * (1 + sigma)
        v = alpha_sq * self.s**2 + sigma**2
        levels = torch.tensor(self.levels, dtype=torch.float64)
        away = x - alpha_sq.sqrt() * levels
        share = torch.softmax(torch.tensor(self.weights, dtype=torch.float64).log() - away**2 / (2 * v), 1)
        return (share * (levels + alpha_sq.sqrt() * self.s**2 / v * away)).sum(1)


@dataclass(frozen=True, kw_only=True)
class KernelWorld:
    """p = (1/N) sum_i N(x_i, s^2 I) over `pictures` x_i (module docstring); what is exact about it is exact as s -> 0.

    Small s: the answer to a feature is an importance-weighted sum over the pictures (tilt_weights), which a sampler should match.
    """

    pictures: Float[Tensor, "num *shape"]
    s: float = 0.02

    def __post_init__(self) -> None:
        if not (self.s > 0 and len(self.pictures) > 0):
            raise ConfigError(
                f"s and pictures: got {self.s!r} and {len(self.pictures)} pictures; both must be positive"
            )

    @property
    def prior(self) -> Prior:
        """The closed-form denoiser: k x + (1 - alpha k) sum_i r_i(x) x_i, r = softmax(-|x - alpha x_i|^2 / 2v), in float64."""
        flat = self.pictures.flatten(1).double()
        norm_sq = (flat * flat).sum(1)

        def denoise(x: Float[Tensor, "batch ..."], sigma: Float[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
            given, shape = x.dtype, x.shape
            x, sigma = x.flatten(1).double(), sigma.double()[:, None]
            alpha_sq = (1 - sigma) * (1 + sigma)
            alpha, v = alpha_sq.sqrt(), alpha_sq * self.s**2 + sigma**2
            # |x|^2 is the same for every picture, and drops out of the softmax.
            share = torch.softmax((alpha * (x @ flat.T) - alpha_sq * norm_sq / 2) / v, 1)
            k = alpha * self.s**2 / v
            return (k * x + (1 - alpha * k) * (share @ flat)).to(given).reshape(shape)

        name = f"kernel({len(self.pictures)} pictures, s={self.s!r})"
        return Prior(denoise, shape=tuple(self.pictures.shape[1:]), name=name)

    def nearest(self, x0: Float[Tensor, "batch *shape"]) -> Int[Tensor, "batch"]:
        """Which picture each sample is."""
        return torch.cdist(x0.flatten(1).double(), self.pictures.flatten(1).double()).argmin(1)
