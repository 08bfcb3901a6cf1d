"""How much noise an ancestral step adds where a network has learned it: one variance a pixel, between two bounds.

    beta   = 1 - (alpha/alpha')^2                       what the step itself destroys, sigma -> sigma' < sigma
    beta~  = (sigma'/sigma)^2 beta                      the posterior's, were x0 known
    log variance = f log beta + (1 - f) log beta~,      f = (v + 1)/2, v the network's second output

Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; the bounds, eq. 7 and 10 of DDPM (arXiv:2006.11239).
Pure functions of tensors; knows no network, no plan.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tiltscope.engine.prior.levels import alpha_from_sigma

LEAST_VARIANCE = 1e-20


def variance_bounds(
    sigma: Float64[Tensor, "batch"], next_sigma: Float64[Tensor, "batch"]
) -> tuple[Float64[Tensor, "batch"], Float64[Tensor, "batch"]]:
    """(log beta~, log beta) of the step sigma -> next_sigma, 0 <= next_sigma < sigma < 1; beta~ at least 1e-20.

    Written as sigma^2 - (alpha/alpha')^2 sigma'^2 = beta, which does not cancel for small steps.
    """
    ratio = alpha_from_sigma(sigma) / alpha_from_sigma(next_sigma)
    beta = (1 - ratio) * (1 + ratio)
    posterior = (next_sigma / sigma).square() * beta
    return posterior.clamp(min=LEAST_VARIANCE).log(), beta.log()


def learned_log_variance(
    v: Float[Tensor, "batch channel height width"], low: Float64[Tensor, "batch"], high: Float64[Tensor, "batch"]
) -> Float[Tensor, "batch channel height width"]:
    """log variance of every pixel, in v's dtype; v = -1 is the lower bound, 1 the upper, beyond them it goes on.

    Held against diffusers' DDPMScheduler(variance_type="learned_range") in float64: tests/prior/test_variance.py.
    """
    share = (v + 1) / 2
    least, most = (each.to(v.dtype).view(-1, *(1,) * (v.ndim - 1)) for each in (low, high))
    return share * most + (1 - share) * least


def learned_noise_scale(
    v: Float[Tensor, "batch channel height width"],
    sigma: Float64[Tensor, "batch"],
    next_sigma: Float64[Tensor, "batch"],
) -> Float[Tensor, "batch channel height width"]:
    """exp(log variance / 2): what multiplies z in an ancestral step, in place of a row's one number c."""
    return torch.exp(0.5 * learned_log_variance(v, *variance_bounds(sigma, next_sigma)))
