"""Adapters: from what a diffusion network predicts to D = E[x0 | x] in unit-variance coordinates x = alpha x0 + sigma eps.

Every prediction is an affine map of x and the network's output:  D = from_x * x + from_output * output, with

    epsilon        D = (x - sigma eps_hat)/alpha        diffusers' names of prediction_type
    v_prediction   D = alpha x - sigma v_hat
    sample         D = x0_hat

This module knows networks that are called as network(x, t); it must not know files.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor, nn

from tiltscope.engine.prior.levels import alpha_from_sigma, theta_from_sigma, time_from_sigma

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ends:
    """The network's own quietest level (sigma, alpha > 0) and the smallest alpha at which it was trained (its noisiest level)."""

    low_sigma: float
    low_alpha: float
    high_alpha: float


Coefficients = tuple[Float64[Tensor, "batch"], Float64[Tensor, "batch"]]


def from_epsilon(sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"], ends: Ends) -> Coefficients:
    """(1/alpha, -sigma/alpha); beyond the network's noisiest level alpha stops falling, else the quotient has no meaning."""
    inverse = 1 / alpha.clamp(min=ends.high_alpha)
    return inverse, -sigma * inverse


def from_v(sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"], ends: Ends) -> Coefficients:
    """(alpha, -sigma), arXiv:2202.00512, app. D."""
    del ends
    return alpha, -sigma


def from_sample(sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"], ends: Ends) -> Coefficients:
    """(0, 1); below the network's quietest level (where its t stands still) the noise it implies there is kept instead:

    eps_hat = (x - alpha_0 x0_hat)/sigma_0,  D = (x - sigma eps_hat)/alpha,  so that D -> x as sigma -> 0 (continuous at sigma_0).
    """
    share = (sigma / ends.low_sigma).clamp(max=1.0)
    inside = sigma >= ends.low_sigma
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    safe_alpha = torch.where(inside, one, alpha)
    return torch.where(inside, zero, (1 - share) / safe_alpha), torch.where(
        inside, one, share * ends.low_alpha / safe_alpha
    )


# prediction_type -> (from_x, from_output). A new kind of prediction is one function here.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Ends], Coefficients]] = {
    "epsilon": from_epsilon,
    "v_prediction": from_v,
    "sample": from_sample,
}


class TimeEmbedding(nn.Module):
    """(cos, sin)(t w_i), w_i = 10000^(-i/(half - shift)): diffusers' `Timesteps`, in float64 where that one computes in float32.

    t is fractional here and reaches 1000, where a float32 phase is off by 3e-5; the caller casts the result.
    """

    def __init__(self, num_channels: int, *, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift

    def forward(self, timesteps: Float[Tensor, "batch"]) -> Float64[Tensor, "batch channels"]:
        half = self.num_channels // 2
        i = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        frequency = torch.exp(-math.log(10000) * i / (half - self.downscale_freq_shift))
        phase = timesteps.to(torch.float64)[:, None] * frequency[None, :]
        parts = (phase.cos(), phase.sin()) if self.flip_sin_to_cos else (phase.sin(), phase.cos())
        return F.pad(torch.cat(parts, dim=-1), (0, self.num_channels % 2))


class NetworkDenoiser:
    """denoise(x, sigma) of a network(x, t): time, pixel_unshuffle and prediction type are hidden in here.

        t      = t(sigma), fractional, between the network's own levels (engine/prior/levels.py)
        output = pixel_shuffle(network(pixel_unshuffle(x), t))
        D      = from_x(sigma) x + from_output(sigma) output

    Coefficients are float64 on their way to x's dtype; the network runs in its own. Differentiable in x, not in parameters.
    """

    def __init__(
        self, network: nn.Module, *, levels: NDArray[np.float64], prediction: str, pixel_unshuffle: int = 1
    ) -> None:
        """levels: sigma, strictly DEscending (index 0 the noisiest); prediction: a key of PREDICTIONS."""
        self.network = network.eval().requires_grad_(False)
        self.levels = levels
        self.prediction = prediction
        self.pixel_unshuffle = pixel_unshuffle
        # Beside the network's parameters: a table on the host would be copied at every call.
        self.theta_levels = theta_from_sigma(torch.from_numpy(levels[::-1].copy())).to(self.device)
        alpha = np.sqrt((1 - levels) * (1 + levels))
        self.ends = Ends(low_sigma=float(levels[-1]), low_alpha=float(alpha[-1]), high_alpha=float(alpha[0]))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(
        self, x: Float[Tensor, "batch channel height width"], sigma: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch channel height width"]:
        time, from_x, from_output = self.coefficients(sigma)
        folded = F.pixel_unshuffle(x.to(self.dtype), self.pixel_unshuffle)
        output = F.pixel_shuffle(_call(self.network, folded, time), self.pixel_unshuffle).to(x.dtype)
        return _per_sample(from_x, x) * x + _per_sample(from_output, x) * output

    def coefficients(
        self, sigma: Float64[Tensor, "batch"]
    ) -> tuple[Float64[Tensor, "batch"], Float64[Tensor, "batch"], Float64[Tensor, "batch"]]:
        """(t, from_x, from_output) at these noise levels, float64."""
        from_x, from_output = PREDICTIONS[self.prediction](sigma, alpha_from_sigma(sigma), self.ends)
        return time_from_sigma(sigma, self.theta_levels), from_x, from_output

    def in_dtype(self, dtype: torch.dtype, device: torch.device = CPU) -> "NetworkDenoiser":
        """The same denoiser, its network in dtype on device; self is not changed."""
        # nn.Module.to itself: diffusers' override warns about modules to be kept in float32, of which there are none.
        network = nn.Module.to(copy.deepcopy(self.network), device=device, dtype=dtype)
        return NetworkDenoiser(
            network, levels=self.levels, prediction=self.prediction, pixel_unshuffle=self.pixel_unshuffle
        )


def _per_sample(values: Float64[Tensor, "batch"], like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _call(network: Any, x: Tensor, time: Tensor) -> Tensor:
    return network(x, time, return_dict=False)[0]
