"""compare_world(): the samplers on a world whose answer is known, for anyone who doubts them.

    gaussian    N(0, 1.7^2 I), a linear feature, lam .9            plug-in guidance is exact; what is left is the solver
    quadratic   N(0, .5^2), the tilt -(a - .7)^2 / (2 .3^2)          plug-in guidance is wrong, the covariance lift exact
    mixture     three modes, a linear feature, lam 3                 plug-in guidance gives the modes wrong shares
    kernel      200 pool pictures, one of the bundle's features      the answer is a weighted sum over the pictures

Beside them the correction by particles (twisted SMC), the same without gradients (Feynman-Kac steering), and plain importance
resampling of unguided draws (SIR).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sample import sample
from tiltscope.engine.samples import Samples
from tiltscope.engine.tilt.calibrate import estimates, tilt_weights
from tiltscope.engine.tilt.evidence import combine
from tiltscope.engine.tilt.worlds import GaussianWorld, KernelWorld, MixtureWorld

CLOSED_FORM_NUM = 2048
PARTICLES = 64
KERNEL_PICTURES = 200


@dataclass(frozen=True, kw_only=True)
class World:
    """A prior, a feature and a tilt with its answer: mean and standard deviation of a, and log Z, None where not in closed form.

    excess_kl: KL(q || q_S) of a sampler whose a has this mean and standard deviation, where both are Gaussian; else None.
    """

    prior: Prior
    feature: Feature
    lam: float
    log_tilt: str
    mean: float
    sd: float
    log_z: float | None
    num: int
    caption: str
    grid: str | None = None
    excess_kl: Callable[[float, float], float] | None = None


@dataclass(frozen=True, kw_only=True)
class WorldRow:
    """One method on a world: what it says of E[a], of the spread of a and of log Z, beside the truth, and what it cost.

    nfe, n_vjp: of all that the answer took, particles included, a draw. ess: of the weighted draws, None where unweighted: where
    it is a few, the answer is not to be trusted, whatever its error.
    """

    method: str
    mean: float
    mean_se: float | None
    error: float
    sd: float
    log_z: float | None
    excess_kl: float | None
    ess: float | None
    nfe: float
    n_vjp: float
    seconds: float


def compare_world(
    name: str,
    config: CompareConfig,
    *,
    bundle: Bundle | None = None,
    feature: str = "",
    on_part: Callable[[str], None] | None = None,
) -> tuple[World, list[WorldRow]]:
    """Every lift x solver x steps of `config` on a world of WORLDS, then the corrections, on the largest number of steps.

    bundle, feature: for the world kernel. A lift that needs its own solver (daps) takes it. Raises ConfigError for another name.
    """
    if name not in WORLDS:
        raise ConfigError(f"world: got {name!r}, allowed are {', '.join(WORLDS)}")
    tell = on_part or _quiet
    world = _kernel(bundle, feature, config) if name == "kernel" else _CLOSED_FORM[name]()
    rows: list[WorldRow] = []
    for lift in config.lifts:
        for solver in ["renoise"] if lift.startswith("daps") else config.solvers:
            for steps in config.steps:
                method = f"{lift}, {solver}, {steps} steps"
                tell(f"drawing {method}")
                rows.append(_drawn(world, method, config, lift=lift, solver=solver, steps=steps))
    steps = max(config.steps)
    groups = max(world.num // PARTICLES, 4)
    common: dict[str, Any] = {"solver": "ddpm", "steps": steps, "particles": PARTICLES, "num": groups}
    for method, settings in (("SMC", {}), ("FK steering", {"guidance_interval": (0.0, 0.0)})):
        method = f"{method}, {groups} x {PARTICLES} particles, ddpm, {steps} steps"
        tell(f"drawing {method}")
        rows.append(_drawn(world, method, config, **common, **settings))
    tell("drawing SIR")
    rows.append(_sir(world, config, steps))
    return world, rows


def _drawn(world: World, method: str, config: CompareConfig, **settings: Any) -> WorldRow:
    asked: dict[str, Any] = _common(world, config) | {"lam": world.lam, "log_tilt": world.log_tilt} | settings
    started = time.perf_counter()
    samples = sample(world.prior, world.feature, **asked)
    seconds = time.perf_counter() - started
    if samples.weights is None:
        a = samples.activation[samples.ok].double().numpy()
        return _row(world, method, a, None, samples, seconds)
    return _weighted(world, method, samples, seconds)


def _common(world: World, config: CompareConfig) -> dict[str, Any]:
    return {
        "num": world.num,
        "grid": world.grid,
        "seed": config.seed,
        "batch_size": config.batch_size or min(world.num, 512),
        "dtype": config.dtype,
    }


def _weighted(world: World, method: str, samples: Samples, seconds: float) -> WorldRow:
    """Particles of all groups as one weighted set: each group counts by its own Z-hat."""
    groups = (samples.group_log_z, samples.group_phi, samples.group_ess)
    if samples.particle_activation is None or samples.weights is None or any(each is None for each in groups):
        raise ConfigError("particles: these samples carry none")
    log_z, phi, ess = (np.asarray(each) for each in groups)
    found = combine(log_z, phi, ess, world.lam)
    share = np.exp(log_z - log_z.max())
    weight = (samples.weights.numpy() * (share / share.sum())[:, None]).ravel()
    a = samples.particle_activation.double().numpy().ravel()
    row = _row(world, method, a, weight, samples, seconds)
    return row if found is None else replace(row, log_z=found.log_z, ess=found.ess)


def _sir(world: World, config: CompareConfig, steps: int) -> WorldRow:
    """Unguided draws, weighted by exp(lam phi(a)): right where enough of them lie where the tilt does."""
    asked: dict[str, Any] = _common(world, config) | {"lam": 0.0, "solver": "ddpm", "steps": steps}
    started = time.perf_counter()
    samples = sample(world.prior, world.feature, **asked)
    a = samples.activation[samples.ok].double().numpy()
    told = estimates(a, world.lam, log_tilt=world.log_tilt)
    weight = tilt_weights(a, world.lam, log_tilt=world.log_tilt)
    row = _row(world, f"SIR, {len(a)} draws, ddpm, {steps} steps", a, weight, samples, time.perf_counter() - started)
    return replace(row, log_z=told.log_z, ess=told.ess)


def _row(
    world: World,
    method: str,
    a: NDArray[np.float64],
    weight: NDArray[np.float64] | None,
    samples: Samples,
    seconds: float,
) -> WorldRow:
    mean = float(np.average(a, weights=weight))
    sd = float(np.sqrt(np.average((a - mean) ** 2, weights=weight)))
    return WorldRow(
        method=method,
        mean=mean,
        mean_se=sd / len(a) ** 0.5 if weight is None else None,
        error=mean / world.mean - 1,
        sd=sd,
        log_z=None,
        excess_kl=None if world.excess_kl is None else world.excess_kl(mean, sd),
        ess=None,
        nfe=float(samples.nfe.double().mean()),
        n_vjp=float(samples.n_vjp.double().mean()),
        seconds=seconds,
    )


def _gaussian() -> World:
    world, lam = GaussianWorld(), 0.9
    answer, size = world.tilted(lam), 2

    def excess_kl(mean: float, sd: float) -> float:
        # A sampler of this world is Gaussian with one variance in every direction.
        ratio = sd**2 / answer.variance
        return (size * (ratio - 1 - np.log(ratio)) + (mean - answer.mean) ** 2 / answer.variance) / 2

    return World(
        prior=world.prior,
        feature=world.feature,
        lam=lam,
        log_tilt="linear",
        mean=answer.mean,
        sd=answer.variance**0.5,
        log_z=world.log_z(lam),
        num=CLOSED_FORM_NUM,
        caption="p = N(0, 1.7^2 I) in 2 dimensions, a linear feature, lam .9; exact: N(2.601 u, 1.7^2 I)",
        excess_kl=excess_kl,
    )


def _quadratic() -> World:
    s, tau, y = 0.5, 0.3, 0.7
    world = GaussianWorld(s=s, shape=(1,))
    precision = 1 / s**2 + 1 / tau**2
    # Z = int N(a; 0, s^2) exp(-(a - y)^2 / 2 tau^2) da
    log_z = 0.5 * np.log(tau**2 / (s**2 + tau**2)) - y**2 / (2 * (s**2 + tau**2))
    mean, variance = y / tau**2 / precision, 1 / precision

    def excess_kl(m: float, sd: float) -> float:
        ratio = sd**2 / variance
        return (ratio - 1 - np.log(ratio) + (m - mean) ** 2 / variance) / 2

    return World(
        prior=world.prior,
        feature=world.feature,
        lam=1.0,
        log_tilt=f"target(c={y}, tau={tau})",
        mean=mean,
        sd=variance**0.5,
        log_z=float(log_z),
        num=CLOSED_FORM_NUM,
        caption="p = N(0, .5^2), the tilt -(a - .7)^2 / (2 .3^2); exact: mean .5147, variance .0662",
        excess_kl=excess_kl,
    )


def _mixture() -> World:
    world, lam = MixtureWorld(), 3.0
    shares, levels = world.shares(lam), np.array(world.levels) + lam * world.s**2
    mean = world.mean(lam)
    return World(
        prior=world.prior,
        feature=world.feature,
        lam=lam,
        log_tilt="linear",
        mean=mean,
        sd=float(np.sqrt(shares @ (levels - mean) ** 2 + world.s**2)),
        log_z=world.log_z(lam),
        num=CLOSED_FORM_NUM,
        caption="three modes of variance .2 at -.5, .6, 1.6 with shares .90, .09, .01; lam 3 makes them .10, .28, .62",
    )


def _kernel(bundle: Bundle | None, feature: str, config: CompareConfig) -> World:
    if bundle is None or not feature:
        raise ConfigError("world kernel: its pictures and its feature are a bundle's; give FEATURE too")
    chosen = bundle.feature(feature)
    natural = bundle.pool.activations(chosen)
    pick = np.sort(np.random.default_rng(config.seed).choice(len(natural), KERNEL_PICTURES, replace=False))
    a = natural[pick]
    if a.std() == 0:
        raise ConfigError(
            f"world kernel: {feature} is the same on all of {KERNEL_PICTURES} pictures; try another feature"
        )
    lam = 0.6 / float(a.std())
    weight = tilt_weights(a, lam)
    mean = float(weight @ a)
    world = KernelWorld(pictures=bundle.pool.x0(pick))
    return World(
        prior=world.prior,
        feature=chosen,
        lam=lam,
        log_tilt="linear",
        mean=mean,
        sd=float(np.sqrt(weight @ (a - mean) ** 2)),
        log_z=estimates(a, lam).log_z,
        num=config.num * 4,
        # Pictures part while alpha is a few thousandths: levels that other grids pass in a step or two.
        grid="log_snr(low=-8.0, high=-1.0)",
        caption=f"{KERNEL_PICTURES} pool pictures, each a normal of width .02; lam .6 per standard deviation of a",
    )


def _quiet(part: str) -> None:
    pass


_CLOSED_FORM: dict[str, Callable[[], World]] = {"gaussian": _gaussian, "quadratic": _quadratic, "mixture": _mixture}
WORLDS = (*_CLOSED_FORM, "kernel")
