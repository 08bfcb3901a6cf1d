"""How much noise an ancestral step adds where the network has learned it: one variance a pixel, between two bounds.

    beta   = 1 - (alpha/alpha')^2                       what the step itself destroys, sigma -> sigma' < sigma
    beta~  = (sigma'/sigma)^2 beta                      the posterior's, were x0 known
    log variance = f log beta + (1 - f) log beta~,      f = (v + 1)/2, v the network's second output

The bounds stand in the plan (solvers.py: ddpm_learned_range), v comes with D out of one and the same network call. The row of the
plan has c = 0, and what it lacks is added here, with the very normals that c z would have had.
Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; the bounds, eq. 7 and 10 of DDPM (arXiv:2006.11239).
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tiltscope.engine.sampler.noise import STREAM_STEP
from tiltscope.engine.sampler.state import Programme, SlotState, per_slot
from tiltscope.kernels.philox import normal
from tiltscope.kernels.reference import GuidedStep


def learned_log_variance(
    v: Float[Tensor, "batch ..."], bounds: Float64[Tensor, "batch 2"]
) -> Float[Tensor, "batch ..."]:
    """log variance of every pixel, in v's dtype; v = -1 is the lower bound, 1 the upper, beyond them it goes on.

    Held against diffusers' DDPMScheduler(variance_type="learned_range") in float64: tests/sampler/test_learned_noise.py.
    """
    share = (v + 1) / 2
    least, most = (per_slot(each.to(v.dtype), v) for each in bounds.unbind(1))
    return share * most + (1 - share) * least


def add_learned_noise(
    before: SlotState, moved: GuidedStep, v: Float[Tensor, "batch ..."] | None, programme: Programme
) -> GuidedStep:
    """x' + exp(log variance / 2) z for the slots that moved on a row of learned noise; every other slot as it is.

    A slot whose noise is not finite fails as in guided_step: it keeps the state that it had `before`. Plain torch: it asks the
    device for nothing, whatever `programme.kernels` says.
    """
    if programme.log_variance is None:
        return moved
    assert v is not None  # a tick listens where a plan asks
    bounds = programme.log_variance[before.plan, before.row.clamp(max=programme.log_variance.shape[1] - 1)]
    noisy = (moved.row > before.row) & torch.isfinite(bounds).all(1)
    shape = tuple(before.x.shape[1:])
    z = normal(
        before.key, before.index, before.row, before.particle, stream=STREAM_STEP, shape=shape, dtype=before.x.dtype
    )
    noise = torch.exp(0.5 * learned_log_variance(v, bounds)) * z
    x = torch.where(per_slot(noisy, z), moved.x + noise, moved.x)
    sound = torch.isfinite(x).flatten(1).all(1)
    keep = per_slot(~sound, x)
    return moved._replace(
        x=torch.where(keep, before.x, x),
        history=torch.where(keep, before.history, moved.history),
        row=torch.where(sound, moved.row, before.row),
        ok=moved.ok & sound,
    )
