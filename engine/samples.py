"""What comes back: Samples of one distribution, and an Explanation with four of them side by side."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.tilt.calibrate import Calibration

Target = Literal["approximate", "consistent", "exact", "coupled", "started", "none"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Draws from one distribution of pictures.

    target: "approximate" for plug-in guidance, "consistent" for the particle-corrected sampler, "exact" for draws from the
    pool itself, "coupled" where a batch's samples push each other and none can be redrawn alone, "started" for what set out
    from a given picture, "none" for activation maximisation, which draws from no stated distribution.
    log_z, kl, ess: of the tilt, None where not known; their source is in the manifest.
    With particles: `particles` are every sample's weighted pictures, `weights` sum to 1 over each row, x0 is one drawn by weight;
    group_log_z, group_phi, group_ess, lineages: what each sample's own particles say (sampler/particles.py, Settled).
    stopped: on_step stopped it, so that what is not ok may be merely unfinished.
    heat: where the feature fires on each sample, in units of activation. sources: names of the pool's pictures, if any.
    """

    feature: str
    x0: Float[Tensor, "num ..."]
    images: UInt8[Tensor, "num 3 height width"] | None
    activation: Float[Tensor, "num"]
    drive: Float[Tensor, "num"]
    lam: Float[Tensor, "num"]
    seed: int
    index: Int[Tensor, "num"]
    target: Target
    nfe: Int[Tensor, "num"]
    n_vjp: Int[Tensor, "num"]
    ok: Bool[Tensor, "num"]
    log_z: float | None = None
    kl: float | None = None
    ess: float | None = None
    weights: Float[Tensor, "num particle"] | None = None
    particles: Float[Tensor, "num particle ..."] | None = None
    particle_activation: Float[Tensor, "num particle"] | None = None
    group_log_z: Float[Tensor, "num"] | None = None
    group_phi: Float[Tensor, "num"] | None = None
    group_ess: Float[Tensor, "num"] | None = None
    lineages: Int[Tensor, "num"] | None = None
    heat: Float[Tensor, "num grid_h grid_w"] | None = None
    sources: tuple[str, ...] | None = None
    stopped: bool = False
    manifest: dict[str, Any] = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.index)

    def save(self, folder: str | Path) -> Path:
        """Write pictures, tensors and manifest. Raises ConfigError where `folder` cannot hold them."""
        from tiltscope.engine.report.writer import save_samples

        return save_samples(self, Path(folder))


# Fields with one row a sample.
_A_SAMPLE = {"x0", "images", "activation", "drive", "lam", "index", "nfe", "n_vjp", "ok", "heat"} | {
    "weights", "particles", "particle_activation", "group_log_z", "group_phi", "group_ess", "lineages"
}  # fmt: skip


def join(chunks: Iterable[Samples]) -> Samples:
    """The samples of one run, in order, as one record."""
    parts = list(chunks)

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    together = {name: joined(name) for name in _A_SAMPLE}
    return replace(parts[0], stopped=any(part.stopped for part in parts), **together)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Four answers to what a feature means, with the numbers that say how far to trust each.

    answers: tilt, topk, hard, actmax. metrics: answer -> {name: number or None}. target: the wanted mean of phi(a); lam
    reaches it. natural: the pool's activations. notes: what a reader must know of one answer.
    """

    feature: str
    name: str | None
    answers: dict[str, Samples]
    metrics: dict[str, dict[str, float | None]]
    target: float
    target_quantile: float
    lam: float
    calibration: Calibration
    natural: NDArray[np.float64]
    natural_mean: float
    prior_mean: float
    prior_mean_se: float
    warnings: tuple[str, ...]
    notes: dict[str, str]
    manifest: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write the page, the four answers and the manifest. Raises ConfigError where `folder` cannot hold them."""
        from tiltscope.engine.report.writer import save_explanation

        return save_explanation(self, Path(folder))
