"""Lifts: how the tilt of a finished picture becomes a push on a noisy one. Adding a lift touches this file alone.

Exact guidance is the gradient of  h(x) = log E[exp(lam phi(a(x0))) | x],  which nobody can evaluate. With m = D(x) the posterior
mean, J = dm/dx its Jacobian, C = Cov[x0 | x] = (sigma^2/alpha) J and u = d drive / dm, a lift puts in its place

    dps           h = lam phi(drive(m)), through the denoiser                  one VJP through both networks
    none          its gradient at m, times alpha: J of a unit Gaussian           one VJP through the trunk alone
    normalized    dps's gradient at unit length: lam is the push's length        one VJP
    lgd_mc        h = log mean_i exp(lam phi(drive(m + sigma eps_i)))            n VJPs of the trunk, one of the denoiser
    covariance    Laplace's approximation, C held fixed and the tilt's Hessian at m taken as phi'' u u': the strength is
                  lam phi' / (1 - lam phi'' u'Cu)                                as dps: u'Cu = (sigma^2/alpha) <u, J'u> is free
    tfg           rho of dps's and mu of none's push, in n_iter inner steps, of an energy smoothed by gamma
    daps          no push: D becomes a draw of Langevin's chain on N(m, sigma^2) exp(lam phi(drive)), m from a short ODE

`covariance` is exact for a Gaussian prior, a feature linear in x0 and any quadratic log-tilt; for a linear log-tilt its push is
dps's. Sources: dps Chung et al. 2023; none He et al. 2024 (MPGD); normalized Pierzchlewicz et al. 2023 (EGG); lgd_mc Song et al.
2023; covariance Boys et al. 2023 and method section 3; tfg Ye et al. 2024, with rho and mu in units of dps's push; daps Zhang et
al. 2025. Proof: tests/sampler/test_lifts.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.step import Step
from tiltscope.engine.sampler.noise import STREAM_LIFT
from tiltscope.engine.tilt.log_tilt import LogTilt
from tiltscope.kernels.philox import normal

MAX_DRAWS = 64


class Push(NamedTuple):
    """What a lift says of each slot: the row moves by e * strength * grad. log_twist is its h, up to a constant of the slot."""

    x0_hat: Float[Tensor, "batch ..."]
    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    grad: Float[Tensor, "batch ..."]
    strength: Float[Tensor, "batch"]
    log_twist: Float[Tensor, "batch"]


class Slots(NamedTuple):
    """The part of a batch of slots that a lift may look at, and its energy lam phi(drive) as functions."""

    x: Float[Tensor, "batch ..."]
    sigma: Float64[Tensor, "batch"]
    alpha: Float64[Tensor, "batch"]
    readout: Readout | None
    lam: Float[Tensor, "batch"]
    log_tilt: Int[Tensor, "batch"]
    log_tilts: tuple[LogTilt, ...]
    key: Int[Tensor, "batch 2"]
    index: Int[Tensor, "batch"]  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody looks a tensor up in it
    row: Int[Tensor, "batch"]
    particle: Int[Tensor, "batch"]

    def of(self, part: slice) -> "Slots":
        """Some of them."""
        tensors = {name: each[part] for name, each in self._asdict().items() if isinstance(each, Tensor)}
        return self._replace(**tensors, readout=None if self.readout is None else self.readout[part])

    def phi(self, drive: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """phi(drive), each slot by its own log-tilt."""
        return self._each("value", drive)

    def energy(self, drive: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """lam phi(drive), exactly 0 where lam is, whatever the feature says."""
        return torch.where(self.lam == 0, 0.0, self.lam * self.phi(drive))

    def slope(self, drive: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """lam phi'(drive)."""
        return self.lam * self._each("slope", drive)

    def curvature(self, drive: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """lam phi''(drive)."""
        return self.lam * self._each("curvature", drive)

    def noise(self, draw: int) -> Float[Tensor, "batch ..."]:
        """The slot's own normals number `draw` of this row."""
        stream = STREAM_LIFT + draw
        shape = tuple(self.x.shape[1:])
        return normal(self.key, self.index, self.row, self.particle, stream=stream, shape=shape, dtype=self.x.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[batch] as [batch, 1, ...], in x's dtype."""
        return values.to(self.x.dtype).reshape(-1, *(1,) * (self.x.dim() - 1))

    def _each(self, method: str, drive: Tensor) -> Tensor:
        found = torch.zeros_like(drive)
        for at, log_tilt in enumerate(self.log_tilts):
            found = torch.where(self.log_tilt == at, getattr(log_tilt, method)(drive), found)
        return found


@runtime_checkable
class Lift(Protocol):
    """A lift's push on a batch of slots, and what a guided row of it costs.

    moves_x0: D itself is replaced, so untilted slots run the lift too, and the move has no density for particles to weigh.
    skips_denoiser: its gradient stops at D, so that a guided row needs the trunk's graph alone.
    couples: a slot's push depends on its batch mates, so that no sample can be redrawn alone.
    """

    moves_x0: ClassVar[bool]
    skips_denoiser: ClassVar[bool]

    @property
    def couples(self) -> bool: ...

    @property
    def nfe(self) -> int: ...

    @property
    def n_vjp(self) -> int: ...

    def push(self, step: Step, slots: Slots) -> Push: ...


@dataclass(frozen=True)
class Dps:
    """h = lam phi(drive(D(x))): the posterior stands at its mean. Its own Jensen gap is what particles correct.

    diversity: another target, q times exp(diversity * mean_j |D_i - D_j|), which pushes the tilted slots of a batch apart. And
    two hazards of the published code, to be had by name. clip: D is clipped to [-1, 1] in guided rows, and no gradient reaches a
    pixel outside. batch_mean: the tilted slots of a batch share phi of their mean drive, so that each is pushed by one B-th.
    With diversity or batch_mean no picture can be redrawn alone.
    """

    clip: bool = False
    batch_mean: bool = False
    diversity: float = 0.0
    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = False
    nfe: int = field(default=1, init=False)
    n_vjp: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if self.diversity < 0:
            raise ConfigError(f"lift dps: diversity must be at least 0, got {self.diversity}")

    @property
    def couples(self) -> bool:
        return self.batch_mean or self.diversity > 0

    @property
    def is_one_step(self) -> bool:
        """Whether a push is the step graph as it is, and its x0_hat D of every slot, tilted or not."""
        return not self.clip and not self.diversity

    def push(self, step: Step, slots: Slots) -> Push:
        if self.is_one_step:
            x0_hat, activation, drive, grad = step.guided(slots.x, slots.sigma, slots.alpha, slots.readout)
            return Push(x0_hat, activation, drive, grad, self._strength(slots, drive), slots.energy(drive))
        mean, pullback = step.linearise(slots.x, slots.sigma)
        x0_hat = mean.clamp(-1, 1) if self.clip else mean
        activation, drive, grad = step.gradient(x0_hat, slots.readout)
        strength = self._strength(slots, drive)
        if self.diversity:
            # One pullback for both terms: what is left of the strength is 1.
            grad = slots.spread(strength) * grad + self.diversity * _apart(x0_hat, slots)
            strength = torch.ones_like(strength)
        grad = pullback(torch.where(x0_hat == mean, grad, 0.0))
        return Push(x0_hat, activation, drive, grad, strength, slots.energy(drive))

    def _strength(self, slots: Slots, drive: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        if not self.batch_mean:
            return slots.slope(drive)
        tilted = slots.lam != 0
        count = tilted.sum().clamp(min=1)
        return slots.slope((torch.where(tilted, drive, 0.0).sum() / count).expand_as(drive)) / count


@dataclass(frozen=True)
class MeanOnly:
    """dps without the denoiser's Jacobian, in whose place stands alpha, a unit Gaussian's: half the cost, another target."""

    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = True
    couples: bool = field(default=False, init=False)
    nfe: int = field(default=1, init=False)
    n_vjp: int = field(default=1, init=False)

    def push(self, step: Step, slots: Slots) -> Push:
        x0_hat = step.unguided(slots.x, slots.sigma, slots.alpha)
        activation, drive, grad = step.gradient(x0_hat, slots.readout)
        grad = slots.spread(slots.alpha) * grad
        return Push(x0_hat, activation, drive, grad, slots.slope(drive), slots.energy(drive))


@dataclass(frozen=True)
class Normalized:
    """dps with each sample's gradient at unit length: no stated distribution; lam is a length that only calibration explains."""

    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = False
    couples: bool = field(default=False, init=False)
    nfe: int = field(default=1, init=False)
    n_vjp: int = field(default=1, init=False)

    def push(self, step: Step, slots: Slots) -> Push:
        out = Dps().push(step, slots)
        length = out.grad.flatten(1).norm(dim=1)
        return out._replace(strength=torch.where(length > 0, out.strength / length, 0.0))


@dataclass(frozen=True)
class LgdMc:
    """h over `draws` normals around D, whose spread sigma is a unit Gaussian's posterior: log mean exp of their tilts."""

    draws: float = 4
    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = False
    couples: bool = field(default=False, init=False)
    nfe: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _set_whole(self, "lgd_mc", "draws", 1)

    @property
    def n_vjp(self) -> int:
        return int(self.draws)

    def push(self, step: Step, slots: Slots) -> Push:
        x0_hat, pullback = step.linearise(slots.x, slots.sigma)
        energy, grad = _smoothed(step, slots, x0_hat, width=slots.sigma, draws=int(self.draws))
        activation, drive = step.measure(x0_hat, slots.readout)
        return Push(x0_hat, activation, drive, pullback(grad), torch.ones_like(drive), energy)


@dataclass(frozen=True)
class Covariance:
    """Laplace's approximation around D with the rank-one Hessian phi'' u u' of the tilt: exact for Gaussian and quadratic.

        h = lam phi + (lam phi')^2 v / (2 k) - log(k) / 2,   v = u'Cu = (sigma^2/alpha) <u, J'u>,   k = 1 - lam phi'' v

    By Sherman and Morrison the push is dps's divided by k. Where lam phi'' > 0 the approximation can break (k <= 0): there the
    curvature is left out, which is dps again; v is taken as at least 0, which a trained network's Jacobian does not promise.
    """

    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = False
    couples: bool = field(default=False, init=False)
    nfe: int = field(default=1, init=False)
    n_vjp: int = field(default=1, init=False)

    def push(self, step: Step, slots: Slots) -> Push:
        x0_hat, pullback = step.linearise(slots.x, slots.sigma)
        activation, drive, u = step.gradient(x0_hat, slots.readout)
        grad = pullback(u)
        variance = (slots.sigma**2 / slots.alpha).to(u.dtype) * (u * grad).flatten(1).sum(1)
        variance = torch.where(slots.alpha > 0, variance, 0.0).clamp(min=0.0)
        shrink = 1 - slots.curvature(drive).clamp(max=0.0) * variance
        slope = slots.slope(drive)
        twist = slots.energy(drive) + slope * slope * variance / (2 * shrink) - torch.log(shrink) / 2
        return Push(x0_hat, activation, drive, grad, slope / shrink, twist)


@dataclass(frozen=True)
class Tfg:
    """Training-free guidance: a share rho of dps's push and mu of the push at D, taken in n_iter inner steps.

    The energy is smoothed over one draw of spread gamma sigma. rho=1, mu=0, gamma=0 is dps; rho=0, mu=1, n_iter=1 is none. The
    paper's rho and mu are in other units; its recurrence is the plan's.
    """

    rho: float = 0.5
    mu: float = 0.5
    n_iter: float = 4
    gamma: float = 0.1
    moves_x0: ClassVar[bool] = False
    skips_denoiser: ClassVar[bool] = False
    couples: bool = field(default=False, init=False)
    nfe: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _set_whole(self, "tfg", "n_iter", 0)
        for name in ("rho", "mu", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"lift tfg: {name} must be at least 0, got {getattr(self, name)}")

    @property
    def n_vjp(self) -> int:
        return int(self.n_iter) + 1

    def push(self, step: Step, slots: Slots) -> Push:
        x0_hat, pullback = step.linearise(slots.x, slots.sigma)
        width = self.gamma * slots.sigma
        energy, at_mean = _smoothed(step, slots, x0_hat, width=width, draws=1)
        grad = self.rho * pullback(at_mean)
        # A move of D by sigma^2 g is the push alpha g: see the row's e = b sigma^2/alpha.
        moved = torch.zeros_like(x0_hat)
        for _ in range(int(self.n_iter)):
            inner = _smoothed(step, slots, x0_hat + slots.spread(slots.sigma**2) * moved, width=width, draws=1)[1]
            moved = moved + self.mu / self.n_iter * inner
        activation, drive = step.measure(x0_hat, slots.readout)
        grad = grad + slots.spread(slots.alpha) * moved
        return Push(x0_hat, activation, drive, grad, torch.ones_like(drive), energy)


@dataclass(frozen=True)
class Daps:
    """Decoupled annealing: m at the end of an ODE of `ode_steps`, then `langevin` steps on N(m, sigma^2) exp(lam phi(drive)).

    The chain is an exact Ornstein-Uhlenbeck step for the Gaussian, kicked by the tilt: exact for a linear tilt at any `pace`, the
    share of m + sigma^2 g that one step forgets. With ode_steps=1 and a unit Gaussian prior the draw is exact; more steps move m
    towards a picture, and over-disperse.
    """

    ode_steps: float = 3
    langevin: float = 5
    pace: float = 0.5
    moves_x0: ClassVar[bool] = True
    skips_denoiser: ClassVar[bool] = True
    couples: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        _set_whole(self, "daps", "ode_steps", 1)
        _set_whole(self, "daps", "langevin", 1)
        if not 0 < self.pace <= 1:
            raise ConfigError(f"lift daps: pace must lie in (0, 1], got {self.pace}")

    @property
    def nfe(self) -> int:
        return int(self.ode_steps)

    @property
    def n_vjp(self) -> int:
        return int(self.langevin)

    def push(self, step: Step, slots: Slots) -> Push:
        mean = self._ode(step, slots)
        sigma, drawn = slots.spread(slots.sigma), mean
        for at in range(int(self.langevin)):
            # The first step forgets its start, which is no draw, altogether.
            keep = 1 - self.pace if at else 0.0
            _, drive, grad = step.gradient(drawn, slots.readout)
            slope = slots.spread(slots.slope(drive))
            kick = torch.where(slope == 0, 0.0, sigma**2 * slope * grad)
            fresh = sigma * math.sqrt(1 - keep * keep) * slots.noise(at)
            drawn = mean + kick + keep * (drawn - mean - kick) + fresh
        activation, drive = step.measure(drawn, slots.readout)
        still = torch.zeros_like(drive)
        return Push(drawn, activation, drive, torch.zeros_like(drawn), still, still)

    def _ode(self, step: Step, slots: Slots) -> Float[Tensor, "batch ..."]:
        """First-order steps down the noise angle, evenly, the last one to the denoiser's answer."""
        theta = torch.asin(slots.sigma)
        x, count = slots.x, int(self.ode_steps)
        for at in range(count - 1):
            now, to = theta * (1 - at / count), theta * (1 - (at + 1) / count)
            x0_hat = step.unguided(x, torch.sin(now), torch.cos(now))
            ratio = slots.spread(torch.sin(to) / torch.sin(now))
            x = ratio * x + (slots.spread(torch.cos(to)) - ratio * slots.spread(torch.cos(now))) * x0_hat
        last = theta / count
        return step.unguided(x, torch.sin(last), torch.cos(last))


LIFTS: dict[str, type[Any]] = {
    "dps": Dps,
    "none": MeanOnly,
    "normalized": Normalized,
    "lgd_mc": LgdMc,
    "covariance": Covariance,
    "tfg": Tfg,
    "daps": Daps,
}


def _apart(x0: Float[Tensor, "batch ..."], slots: Slots) -> Float[Tensor, "batch ..."]:
    """Gradient with respect to D_i of the mean over the other tilted slots of |D_i - D_j|: unit vectors away from them."""
    tilted = slots.lam != 0
    away = (x0[:, None] - x0[None]).flatten(2)
    length = away.norm(dim=2, keepdim=True)
    pairs = (tilted[:, None] & tilted[None])[..., None] & (length > 0)
    units = torch.where(pairs, away / torch.where(pairs, length, 1.0), 0.0)
    others = (tilted.sum() - 1).clamp(min=1)
    return (units.sum(1) / others).reshape(x0.shape)


def _smoothed(
    step: Step, slots: Slots, x0: Tensor, *, width: Float64[Tensor, "batch"], draws: int
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch ..."]]:
    """(h, dh/dx0) of h = log mean_i exp(lam phi(drive(x0 + width eps_i))), the same draws for every x0 of a row."""
    energies: list[Tensor] = []
    grads: list[Tensor] = []
    for at in range(draws):
        near = x0 + slots.spread(width) * slots.noise(at)
        _, drive, grad = step.gradient(near, slots.readout)
        slope = slots.spread(slots.slope(drive))
        energies.append(slots.energy(drive))
        grads.append(torch.where(slope == 0, 0.0, slope * grad))
    energy = torch.stack(energies)
    share = torch.softmax(energy, 0)
    grad = sum((slots.spread(weight) * each for weight, each in zip(share, grads, strict=True)), torch.zeros_like(x0))
    return torch.logsumexp(energy, 0) - math.log(draws), grad


def _set_whole(lift: Any, name: str, field: str, least: int) -> None:
    value = getattr(lift, field)
    if value != int(value) or not least <= value <= MAX_DRAWS:
        raise ConfigError(f"lift {name}: {field} must be a whole number from {least} to {MAX_DRAWS}, got {value}")
    object.__setattr__(lift, field, int(value))
