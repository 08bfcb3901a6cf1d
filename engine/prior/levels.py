"""Noise levels of a diffusion network: its schedule as sigma, and its own time t as a function of sigma.

    alpha_bar_t = prod_{s <= t} (1 - beta_s)     alpha = sqrt(alpha_bar)     sigma = sqrt(1 - alpha_bar)
    theta = asin(sigma) = atan2(sigma, alpha)    in [0, pi/2], the noise angle

Everything is float64: near sigma = 1 float32 loses alpha by up to 2 %. This module knows schedules; it must not know networks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import BundleError

DEFAULT_BETA_START = 1e-4
DEFAULT_BETA_END = 0.02


def linear_betas(start: float, end: float, num: int) -> NDArray[np.float64]:
    """beta_t uniform in [start, end] (DDPM, arXiv:2006.11239, sec. 4)."""
    return np.linspace(start, end, num)


def scaled_linear_betas(start: float, end: float, num: int) -> NDArray[np.float64]:
    """sqrt(beta_t) uniform (latent diffusion)."""
    return np.linspace(start**0.5, end**0.5, num) ** 2


def cosine_betas(start: float, end: float, num: int) -> NDArray[np.float64]:
    """beta_t = min(1 - f((t+1)/T)/f(t/T), 0.999), f(u) = cos^2((u + 0.008)/1.008 pi/2)  (arXiv:2102.09672, eq. 17).

    `start` and `end` are ignored, as diffusers does for this schedule.
    """
    del start, end
    f = np.cos((np.arange(num + 1) / num + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


# diffusers' names of `beta_schedule`. A new schedule is a function (beta_start, beta_end, num) -> betas named here.
BETA_SCHEDULES: dict[str, Callable[[float, float, int], NDArray[np.float64]]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


def alpha_bars(scheduler_config: Mapping[str, Any]) -> NDArray[np.float64]:
    """alpha_bar_t for t = 0..T-1, strictly decreasing, in [0, 1), from diffusers' scheduler_config.json.

    Read: num_train_timesteps, beta_schedule, beta_start, beta_end, trained_betas (used as they are, instead of a schedule),
    rescale_betas_zero_snr (arXiv:2305.08891, alg. 1: alpha_bar_{T-1} = 0 exactly).

    Raises BundleError for an unknown schedule, or one that is not strictly decreasing.
    """
    num = scheduler_config.get("num_train_timesteps", 1000)
    trained = scheduler_config.get("trained_betas")
    schedule = scheduler_config.get("beta_schedule", "linear")
    if trained is None and schedule not in BETA_SCHEDULES:
        raise BundleError(
            f"scheduler_config.json: beta_schedule {schedule!r} is not known; "
            f"allowed: {', '.join(BETA_SCHEDULES)}, or trained_betas"
        )
    try:
        betas: NDArray[np.float64] = (
            np.asarray(trained, dtype=np.float64)
            if trained is not None
            else BETA_SCHEDULES[schedule](
                float(scheduler_config.get("beta_start", DEFAULT_BETA_START)),
                float(scheduler_config.get("beta_end", DEFAULT_BETA_END)),
                int(num),
            )
        )
    except (TypeError, ValueError) as error:
        raise BundleError(f"scheduler_config.json: the noise schedule cannot be read ({error})") from error
    bars = np.cumprod(1 - betas, dtype=np.float64)
    if scheduler_config.get("rescale_betas_zero_snr", False):
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if bars.ndim != 1 or len(bars) < 2 or not (bars[0] < 1 and bars[-1] >= 0 and np.all(np.diff(bars) < 0)):
        raise BundleError(
            "scheduler_config.json: alpha_bar must fall strictly from below 1 to 0 or above, over at least 2 levels; "
            f"got {len(bars)} levels from {schedule!r}"
        )
    return bars


def sigma_levels(scheduler_config: Mapping[str, Any]) -> NDArray[np.float64]:
    """sigma_t = sqrt(1 - alpha_bar_t), float64 [T], strictly DEscending: index 0 is the noisiest level. Raises BundleError."""
    return np.sqrt(1 - alpha_bars(scheduler_config))[::-1].copy()


def alpha_from_sigma(sigma: Float64[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """alpha = sqrt((1 - sigma)(1 + sigma)): exact near sigma = 1, where sqrt(1 - sigma^2) cancels."""
    return torch.sqrt((1 - sigma) * (1 + sigma))


def theta_from_sigma(sigma: Float64[Tensor, "*batch"]) -> Float64[Tensor, "*batch"]:
    """theta = asin(sigma), in [0, pi/2].

    Not atan2(sigma, alpha): torch's answers differently at the end of a batch (engine/batch_invariant.py).
    """
    return torch.asin(sigma)


def time_from_sigma(
    sigma: Float64[Tensor, "batch"], theta_levels: Float64[Tensor, "levels"]
) -> Float64[Tensor, "batch"]:
    """The network's time t(sigma) in [0, T-1], fractional: linear interpolation of t in theta between the network's own levels.

    theta_levels [T]: theta_t for t = 0..T-1, strictly AScending. Clamped at both ends. t is the integer itself at a level.
    Pure tensor operations (comparison and gather; no host synchronisation, nothing an export would reject).
    """
    theta = theta_from_sigma(sigma).clamp(theta_levels[0], theta_levels[-1])
    last = theta_levels.shape[0] - 2
    below = ((theta[:, None] >= theta_levels[None, :]).sum(dim=1) - 1).clamp(0, last)  # [batch], level just under theta
    low, high = theta_levels[below], theta_levels[below + 1]
    return below + (theta - low) / (high - low)
