"""Is a prior's answer the posterior mean? Tweedie's identity of second order says what its derivative must then be.

Of x = alpha x0 + sigma eps the posterior mean D = E[x0 | x] has dD/dx = (alpha / sigma^2) Cov[x0 | x], so over natural pictures

    E |x0 - D|^2 = E tr Cov[x0 | x] = (sigma^2 / alpha) E tr dD/dx .

A lambda's push is (sigma^2 / alpha) (dD/dx)^T grad a: where the right side is a third of the left, so is the push, and lambda
must be larger; what is left over is no covariance at all. The trace is Hutchinson's: v . (dD/dx) v over random signs v.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.noise import seed_key
from tiltscope.kernels.philox import normal

SIGMAS = (0.3, 0.6, 0.8, 0.9, 0.97, 0.99)
BATCH = 16


class Level(TypedDict):
    """At one noise level, means over pictures: |x0 - D|^2, (sigma^2 / alpha) tr dD/dx, and the standard error of the latter."""

    sigma: float
    error: float
    trace: float
    trace_se: float


def second_order(prior: Prior, x0: Tensor, *, sigmas: tuple[float, ...] = SIGMAS, seed: int = 0) -> list[Level]:
    """Both sides of the identity at each of `sigmas`, for natural x0 [num, *shape]; one noise and one v a picture."""
    num, shape = len(x0), tuple(x0.shape[1:])
    key, zeros = torch.tensor([seed_key(seed)]).expand(num, 2), torch.zeros(num, dtype=torch.int64)
    eps, signs = (
        normal(key, torch.arange(num), zeros, zeros, stream=stream, shape=shape, dtype=x0.dtype) for stream in (0, 1)
    )
    levels: list[Level] = []
    for sigma in sigmas:
        alpha = (1 - sigma * sigma) ** 0.5
        errors, traces = [], []
        for at in range(0, num, BATCH):
            part, v = x0[at : at + BATCH], signs[at : at + BATCH].sign()
            x = (alpha * part + sigma * eps[at : at + BATCH]).requires_grad_()
            answer = prior.denoise(x, torch.full((len(part),), sigma, dtype=torch.float64))
            (pulled,) = torch.autograd.grad((answer * v).sum(), x)
            errors.append((part - answer.detach()).square().flatten(1).sum(1))
            traces.append(sigma**2 / alpha * (pulled * v).flatten(1).sum(1))
        error, trace = torch.cat(errors).double().numpy(), torch.cat(traces).double().numpy()
        levels.append(
            {
                "sigma": sigma,
                "error": float(error.mean()),
                "trace": float(trace.mean()),
                "trace_se": float(trace.std(ddof=1) / np.sqrt(num)),
            }
        )
    return levels


def table(levels: list[Level]) -> str:
    lines = ["| sigma | E \\|x0 - D\\|^2 | (sigma^2 / alpha) E tr dD/dx | ratio |", "|---|---|---|---|"]
    for each in levels:
        sides = f"{each['error']:.0f} | {each['trace']:.0f} ± {each['trace_se']:.0f}"
        lines.append(f"| {each['sigma']:g} | {sides} | {each['trace'] / each['error']:.2f} |")
    return "\n".join(lines)
