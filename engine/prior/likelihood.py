"""How likely a picture is under the prior itself: the probability-flow ODE carries its density from the picture to noise.

    dx/dtheta = (cos(theta) x - D(x, theta)) / sin(theta)                 the ODE of solvers.py, theta the noise angle
    log p_lo(x_lo) = log N(x_hi; 0, I) + int_lo^hi div(dx/dtheta) dtheta       div = (d cos(theta) - tr dD/dx) / sin(theta)

The trace is Hutchinson's, v'(dD/dx)'v with one probe v of signs, the same along a path. A picture has no density of its own
(its values are a grid), so it starts with noise at the angle `low`: the figure is of p blurred by tan(low). Source: Song et al.
2021 (score SDE), section 4.3 and appendix D.2. Proof: tests/prior/test_likelihood.py, against Gaussian worlds.
"""

import math
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.noise import STREAM_PROBE
from tiltscope.kernels.philox import normal

LOW = math.asin(0.05)
HIGH = math.acos(1e-3)
STEPS = 40


def log_density(
    prior: Prior,
    x: Float[Tensor, "num *shape"],
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    seed: int = 0,
) -> Float[Tensor, "num"]:
    """log density in nats of x at the noise angle `low`, in unit-variance coordinates; x's dtype, sums in float64.

    Heun's method over `steps` intervals, uniform in the angle: 2 steps denoiser forwards and as many VJPs. The probe of picture
    i is addressed by (seed, i). Raises ConfigError for angles out of order or no step.
    """
    if not 0 < low < high < math.pi / 2 or steps < 1:
        raise ConfigError(
            f"low, high, steps: got {low}, {high}, {steps}; allowed: 0 < low < high < pi/2 and steps >= 1"
        )
    num, size = len(x), prod(prior.shape)
    probe = _noise(x, seed, draw=0).sign()
    gained = torch.zeros(num, dtype=torch.float64)

    def flow(x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        sigma = torch.full((num,), math.sin(theta), dtype=torch.float64)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            x0_hat = prior.denoise(at, sigma)
            (pulled,) = torch.autograd.grad(x0_hat, at, probe)
        trace = (pulled * probe).flatten(1).double().sum(1)
        slope = (math.cos(theta) * x - x0_hat.detach()) / math.sin(theta)
        return slope, (size * math.cos(theta) - trace) / math.sin(theta)

    h = (high - low) / steps
    for at in range(steps):
        theta = low + h * at
        first, spread = flow(x, theta)
        second, spread_after = flow(x + h * first, theta + h)
        x = x + h / 2 * (first + second)
        gained = gained + h / 2 * (spread + spread_after)
    return gained - (x.flatten(1).double() ** 2).sum(1) / 2 - size / 2 * math.log(2 * math.pi)


def bits_per_dim(
    prior: Prior, x0: Float[Tensor, "num *shape"], *, steps: int = STEPS, seed: int = 0
) -> Float[Tensor, "num"]:
    """-log2 p(x0) / d + log2(127.5): bits a pixel's channel for pictures of 256 levels in [-1, 1], blurred by tan(low) = .05.

    Comparable between pictures under one prior; a picture of levels alone, without the blur, would need more bits.
    """
    size = prod(prior.shape)
    x = math.cos(LOW) * x0 + math.sin(LOW) * _noise(x0, seed, draw=1)
    nats = log_density(prior, x, steps=steps, seed=seed) + size * math.log(math.cos(LOW))
    return -nats / (size * math.log(2)) + math.log2(127.5)


def _noise(like: Tensor, seed: int, *, draw: int) -> Tensor:
    index = torch.arange(len(like))
    key = torch.tensor([[seed & 0xFFFFFFFF, seed >> 32]]).expand(len(like), 2)
    zero = torch.zeros_like(index)
    return normal(key, index, zero + draw, zero, stream=STREAM_PROBE, shape=tuple(like.shape[1:]), dtype=like.dtype)
