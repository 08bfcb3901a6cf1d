"""The figures of docs/method.md: samplers against worlds whose answer is known. A minute on one core.

python tools/method_figures.py docs/figures
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

import tiltscope
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.engine.tilt.worlds import GaussianWorld, MixtureWorld

NUM, STEPS, PARTICLES = 4096, 100, 64
GRID = np.linspace(-2.5, 4, 500)
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dps, euler", {"lift": "dps", "solver": "euler"}),
    ("dps, ddpm", {"lift": "dps", "solver": "ddpm"}),
    ("covariance, ddpm", {"lift": "covariance", "solver": "ddpm"}),
    (f"SMC, {PARTICLES} particles", {"solver": "ddpm", "particles": PARTICLES}),
)


def drawn(world: Any, settings: dict[str, Any], **tilt: Any) -> tuple[np.ndarray, np.ndarray]:
    """Activations and their weights: of particles all of them, each group by its own Z-hat."""
    num = NUM // settings.get("particles", 1)
    found = tiltscope.sample(world.prior, world.feature, num=num, steps=STEPS, batch_size=1024, **settings, **tilt)
    if found.weights is None:
        return found.activation.double().numpy(), np.full(num, 1 / num)
    log_z = found.group_log_z.numpy()
    share = np.exp(log_z - log_z.max())
    weight = found.weights.numpy() * (share / share.sum())[:, None]
    return found.particle_activation.double().numpy().ravel(), weight.ravel()


def worlds(path: Path) -> None:
    """Densities of a under four samplers, beside the exact tilt: a quadratic tilt of a Gaussian, a linear one of a mixture."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    quadratic = GaussianWorld(s=0.5, shape=(1,))
    precision = 1 / 0.5**2 + 1 / 0.3**2
    left.fill_between(GRID, norm.pdf(GRID, 0.7 / 0.09 / precision, precision**-0.5), color="0.85", label="exact tilt")
    mixture, lam = MixtureWorld(), 3.0
    exact = sum(
        share * norm.pdf(GRID, level + lam * mixture.s**2, mixture.s)
        for share, level in zip(mixture.shares(lam), mixture.levels, strict=True)
    )
    right.fill_between(GRID, exact, color="0.85", label="exact tilt")
    for name, settings in METHODS:
        for axes, world, span, tilt in (
            (left, quadratic, (-0.6, 1.6), {"lam": 1.0, "log_tilt": "target(c=0.7, tau=0.3)"}),
            (right, mixture, (-2.0, 4.0), {"lam": lam}),
        ):
            a, weight = drawn(world, settings, **tilt)
            counts, edges = np.histogram(a, bins=45, range=span, weights=weight, density=True)
            axes.stairs(counts, edges, label=name)
    left.set(title="N(0, .5²), tilt −(a − .7)² / (2 · .3²)", xlabel="a", xlim=(-0.6, 1.6))
    right.set(title="three modes, shares .90 .09 .01, tilt 3 a", xlabel="a", xlim=(-2, 4))
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def orders(path: Path) -> None:
    """Error of the discrete sampler's exact variance over steps, for every solver, on the angle grid."""
    world, steps = GaussianWorld(s=1.7), [16, 32, 64, 128, 256, 512]
    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for solver in ("ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "edm(churn=10)"):
        errors = [
            abs(world.discrete(make_plan(solver, steps=each, grid="angle"), 0.9).variance / 1.7**2 - 1)
            for each in steps
        ]
        rows = [make_plan(solver, steps=each, grid="angle").num_rows for each in steps]
        axes.loglog(rows, errors, marker="o", markersize=3, label=solver)
    axes.set(
        xlabel="rows (denoiser calls)", ylabel="relative error of the variance", title="N(0, 1.7² I), a linear tilt"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    worlds(folder / "worlds.png")
    orders(folder / "orders.png")
