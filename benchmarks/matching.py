"""Ways of drawing held to one mean activation: the strength at which the same pictures of each way reach it.

Comparing means of a few pictures, each way's own, would compare their luck. So every way draws the same fixed seeds at every
strength that is tried, and a way is matched where the mean over exactly these pictures is the target's within MATCHED.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.report import metrics

MATCHED = 0.05
MAX_TRIES = 12
DETAIL_NUM = 256


@dataclass(frozen=True)
class Drawn:
    """Pictures of one way at the strength that was found. matched: their mean is the target's within MATCHED."""

    strength: float
    x0: Tensor
    mean: float
    se: float
    matched: bool
    tries: int


def match(
    draw: Callable[[float], Tensor], activation: Callable[[Tensor], Tensor], target: float, start: float
) -> Drawn:
    """By bisection of the logarithm once two strengths enclose the target, by doubling or halving until they do."""
    low, high, strength = 0.0, math.inf, start
    best: Drawn | None = None
    for tries in range(1, MAX_TRIES + 1):
        x0 = draw(strength)
        a = activation(x0).double()
        mean, se = float(a.mean()), float(a.std() / math.sqrt(len(a)))
        found = Drawn(strength, x0, mean, se, abs(mean - target) <= MATCHED * abs(target), tries)
        if best is None or abs(mean - target) < abs(best.mean - target):
            best = found
        print(f"    strength {strength:.4g}: mean {mean:.3g} ({target:.3g} wanted)", flush=True)
        if found.matched:
            return found
        low, high = (strength, high) if mean < target else (low, strength)
        strength = (
            math.sqrt(low * high) if low and math.isfinite(high) else 2 * strength if mean < target else strength / 2
        )
    assert best is not None
    return best


def naturalness(bundle: Bundle, x0: Tensor) -> tuple[float, float]:
    """(mean, standard error) over the pictures, defined as in every report."""
    each = each_naturalness(bundle, x0)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def each_naturalness(bundle: Bundle, x0: Tensor) -> NDArray[np.float64]:
    """Every picture's own."""
    pool = np.asarray(bundle.pool.embeddings(), np.float64)
    heldout = pool[np.flatnonzero(bundle.pool.heldout)]
    return metrics.naturalness(metrics.embed(bundle, x0), heldout / np.linalg.norm(heldout, axis=1, keepdims=True))


def detail(bundle: Bundle, x0: Tensor) -> float:
    """Mean absolute Laplacian of the brightness, as a share of held-out pictures': 1 is as crisp.

    Naturalness does not see a blur: an average of pictures lies close to many of them.
    """
    heldout = np.flatnonzero(bundle.pool.heldout)[:DETAIL_NUM]
    return float(_laplacian(x0) / _laplacian(bundle.pool.x0(heldout.tolist())))


def _laplacian(x0: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=x0.dtype)
    return torch.nn.functional.conv2d(x0.mean(1, keepdim=True), kernel[None, None]).abs().mean()


def activation_of(feature: Feature) -> Callable[[Tensor], Tensor]:
    def of(x0: Tensor) -> Tensor:
        with torch.no_grad():
            return feature.activation(x0)

    return of
