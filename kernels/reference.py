"""The definition of every fused operation in plain torch: the specification of the kernels, and what runs on a CPU."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltscope.kernels.philox import normal

# Columns of a plan's row, in the order in which engine/sampler/plan.py writes them.
SIGMA, ALPHA, A, B, C, D, E, P, Q, F, R = range(11)
_STREAM_STEP = 1


class GuidedStep(NamedTuple):
    """What one guided step returns; the statistics are per slot."""

    x: Float[Tensor, "batch ..."]
    history: Float[Tensor, "batch ..."]
    grad_norm_sq: Float[Tensor, "batch"]
    delta_norm_sq: Float[Tensor, "batch"]
    z_dot_delta: Float[Tensor, "batch"]
    finite: Bool[Tensor, "batch"]


def guided_step(
    x: Float[Tensor, "batch ..."],
    x0_hat: Float[Tensor, "batch ..."],
    grad_a: Float[Tensor, "batch ..."],
    history: Float[Tensor, "batch ..."],
    coefficients: Float[Tensor, "batch 11"],
    strength: Float[Tensor, "batch"],
    guided: Bool[Tensor, "batch"],
    key: Int[Tensor, "batch 2"],
    index: Int[Tensor, "batch"],
    row: Int[Tensor, "batch"],
    particle: Int[Tensor, "batch"],
) -> GuidedStep:
    """One row of a plan for every slot (design: engine/sampler/plan.py).

        delta = e w grad_a;   x' = a x + b D + delta + c z + d H;   H' = p x + q D + f w grad_a + r H

    `coefficients` holds each slot's own row, cast once to the state's dtype; `strength` is w. Where `guided` is False delta
    is exactly 0, whatever grad_a holds: selected, never multiplied, so an unguided slot cannot inherit a NaN.
    Reads x, D, grad_a, H once and writes x', H' once: 6 elements of traffic each; bound by memory bandwidth.
    """
    shape = tuple(x.shape[1:])

    def per_slot(v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * len(shape))

    def column(at: int) -> Tensor:
        return per_slot(coefficients[:, at])

    z = normal(key, index, row, particle, stream=_STREAM_STEP, shape=shape, dtype=x.dtype)
    push = torch.where(per_slot(guided), per_slot(strength) * grad_a, torch.zeros((), dtype=x.dtype, device=x.device))
    delta = column(E) * push
    moved = column(A) * x + column(B) * x0_hat + delta + column(C) * z + column(D) * history
    remembered = column(P) * x + column(Q) * x0_hat + column(F) * push + column(R) * history
    finite = torch.isfinite(moved).flatten(1).all(dim=1) & torch.isfinite(remembered).flatten(1).all(dim=1)
    over = tuple(range(1, x.dim()))
    return GuidedStep(
        x=moved,
        history=remembered,
        grad_norm_sq=(grad_a * grad_a).sum(over),
        delta_norm_sq=(delta * delta).sum(over),
        z_dot_delta=(z * delta).sum(over),
        finite=finite,
    )
