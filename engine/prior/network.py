"""Adapters: from what a diffusion network predicts to D = E[x0 | x] in unit-variance coordinates x = alpha x0 + sigma eps.

Every prediction is an affine map of x and the network's output:

    D = from_x x + from_output network(input_scale x, t)

    epsilon        D = (x - sigma eps_hat)/alpha           t between the network's own levels; diffusers' prediction_type
    v_prediction   D = alpha x - sigma v_hat               likewise
    sample         D = x0_hat                              likewise
    flow           D = x/n - (sigma/n) u_hat               x/n = (1 - s) x0 + s eps, n = alpha + sigma, s = sigma/n, t = T s
    edm, edm_v     D = s_d^2 alpha/q^2 x +- sigma s_d/q F  q^2 = sigma^2 + s_d^2 alpha^2, input x/q, t = log(sigma/alpha)/4

This module knows networks that are called as network(x, t); it must not know files.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor, nn

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.levels import alpha_from_sigma, theta_from_sigma, time_from_sigma

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a prediction's formulas need to know of a network.

    low_sigma, low_alpha, high_alpha   its own quietest level (alpha > 0), and the smallest alpha at which it was trained
    time_scale                         T of a flow: what it is told at pure noise
    sigma_data                         s_d of EDM: the standard deviation of x0
    """

    low_sigma: float
    low_alpha: float
    high_alpha: float
    time_scale: float = 1000.0
    sigma_data: float = 0.5


Levels = Float64[Tensor, "batch"]
Coefficients = tuple[Levels, Levels]


def from_epsilon(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """(1/alpha, -sigma/alpha); beyond the network's noisiest level alpha stops falling, else the quotient has no meaning."""
    inverse = 1 / alpha.clamp(min=facts.high_alpha)
    return inverse, -sigma * inverse


def from_v(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """(alpha, -sigma), arXiv:2202.00512, app. D."""
    del facts
    return alpha, -sigma


def from_sample(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """(0, 1); below the network's quietest level (where its t stands still) the noise it implies there is kept instead:

    eps_hat = (x - alpha_0 x0_hat)/sigma_0,  D = (x - sigma eps_hat)/alpha,  so that D -> x as sigma -> 0 (continuous at sigma_0).
    """
    share = (sigma / facts.low_sigma).clamp(max=1.0)
    inside = sigma >= facts.low_sigma
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    safe_alpha = torch.where(inside, one, alpha)
    return torch.where(inside, zero, (1 - share) / safe_alpha), torch.where(
        inside, one, share * facts.low_alpha / safe_alpha
    )


def from_flow(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """(1/n, -sigma/n), n = alpha + sigma: x0 = x_s - s u of the straight path x_s = (1 - s) x0 + s eps, u = eps - x0.

    Source: arXiv:2210.02747; diffusers' FlowMatchEulerDiscreteScheduler.
    """
    del facts
    n = alpha + sigma
    return 1 / n, -sigma / n


def flow_scale(sigma: Levels, alpha: Levels, facts: Facts) -> Levels:
    """1/n: the path has x_s = x/n, of variance less than one in its middle."""
    del facts
    return 1 / (alpha + sigma)


def flow_time(sigma: Levels, alpha: Levels, facts: Facts) -> Levels:
    """T s, held at the network's quietest level."""
    lowest = facts.low_sigma / (facts.low_sigma + facts.low_alpha)
    return facts.time_scale * (sigma / (alpha + sigma)).clamp(min=lowest)


def from_edm(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """(s_d^2 alpha/q^2, sigma s_d/q): c_skip/alpha and c_out at the variance-exploding level sigma/alpha.

    Source: arXiv:2206.00364, table 1; finite at both ends, where c_skip and c_in are not written for alpha = 0.
    """
    inverse = edm_scale(sigma, alpha, facts)
    return facts.sigma_data**2 * alpha * inverse**2, sigma * facts.sigma_data * inverse


def from_edm_v(sigma: Levels, alpha: Levels, facts: Facts) -> Coefficients:
    """As `from_edm`, the network's output with the other sign: diffusers' EDM schedulers with prediction_type v_prediction."""
    from_x, from_output = from_edm(sigma, alpha, facts)
    return from_x, -from_output


def edm_scale(sigma: Levels, alpha: Levels, facts: Facts) -> Levels:
    """1/q, q^2 = sigma^2 + s_d^2 alpha^2: c_in of the variance-exploding x/alpha."""
    return torch.rsqrt(sigma * sigma + facts.sigma_data**2 * alpha * alpha)


def edm_time(sigma: Levels, alpha: Levels, facts: Facts) -> Levels:
    """log(sigma/alpha)/4, held at the network's own ends."""
    low, high_sigma = facts.low_sigma / facts.low_alpha, math.sqrt(1 - facts.high_alpha**2)
    ratio = sigma / alpha.clamp(min=facts.high_alpha)
    return 0.25 * torch.log(ratio.clamp(low, high_sigma / facts.high_alpha))


LevelsTo = Callable[[Tensor, Tensor, Facts], Tensor]


class Prediction(NamedTuple):
    """What a network predicts, as formulas of (sigma, alpha, facts); input_scale None: 1; time None: between its own levels."""

    coefficients: Callable[[Tensor, Tensor, Facts], Coefficients]
    input_scale: LevelsTo | None = None
    time: LevelsTo | None = None


# A new kind of prediction is one entry here.
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(from_epsilon),
    "v_prediction": Prediction(from_v),
    "sample": Prediction(from_sample),
    "flow": Prediction(from_flow, flow_scale, flow_time),
    "edm": Prediction(from_edm, edm_scale, edm_time),
    "edm_v": Prediction(from_edm_v, edm_scale, edm_time),
}


class Terms(NamedTuple):
    """What a noise level decides, float64 [batch] each: D = from_x x + from_output network(input_scale x, time)."""

    time: Levels
    from_x: Levels
    from_output: Levels
    input_scale: Levels


class Waves(NamedTuple):
    """A time embedding as amplitude cos(t frequency + phase), a frequency and a phase a channel: for a plan without torch."""

    frequencies: tuple[float, ...]
    phases: tuple[float, ...]
    amplitude: float


class TimeEmbedding(nn.Module):
    """(cos, sin)(t w_i), w_i = 10000^(-i/(half - shift)): diffusers' `Timesteps`, in float64 where that one computes in float32.

    t is fractional here and reaches 1000, where a float32 phase is off by 3e-5; the caller casts the result.
    """

    def __init__(self, num_channels: int, *, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift

    def frequencies(self, device: torch.device = CPU) -> Float64[Tensor, "half"]:
        half = self.num_channels // 2
        i = torch.arange(half, dtype=torch.float64, device=device)
        return torch.exp(-math.log(10000) * i / (half - self.downscale_freq_shift))

    def waves(self) -> Waves:
        each, cosine, sine = self.frequencies().tolist(), 0.0, -math.pi / 2
        first, second = (cosine, sine) if self.flip_sin_to_cos else (sine, cosine)
        odd = self.num_channels % 2  # a channel of zeros
        phases = (first,) * len(each) + (second,) * len(each) + (math.pi / 2,) * odd
        return Waves((*each, *each, *(0.0,) * odd), phases, 1.0)

    def forward(self, timesteps: Float[Tensor, "batch"]) -> Float64[Tensor, "batch channels"]:
        frequency = self.frequencies(timesteps.device)
        phase = timesteps.to(torch.float64)[:, None] * frequency[None, :]
        parts = (phase.cos(), phase.sin()) if self.flip_sin_to_cos else (phase.sin(), phase.cos())
        return F.pad(torch.cat(parts, dim=-1), (0, self.num_channels % 2))


class NetworkDenoiser:
    """denoise(x, sigma) of a network(x, t): time, scale, pixel_unshuffle and prediction type are hidden in here.

        t      = t(sigma), fractional, between the network's own levels (engine/prior/levels.py) or by its prediction's formula
        output = pixel_shuffle(network(pixel_unshuffle(input_scale(sigma) x), t))
        D      = from_x(sigma) x + from_output(sigma) output

    Coefficients are float64 on their way to x's dtype; the network runs in its own. Differentiable in x, not in parameters.

    learned_range: the network gives twice x's channels; the second half says how much noise a step adds (variance.py).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        levels: NDArray[np.float64],
        prediction: str,
        pixel_unshuffle: int = 1,
        learned_range: bool = False,
        time_scale: float = 1000.0,
        sigma_data: float = 0.5,
    ) -> None:
        """levels: sigma, strictly DEscending (index 0 the noisiest); prediction: a key of PREDICTIONS; Facts has the rest."""
        self.network = network.eval().requires_grad_(False)
        self.levels = levels
        self.prediction = prediction
        self.pixel_unshuffle = pixel_unshuffle
        self.learned_range = learned_range
        # Beside the network's parameters: a table on the host would be copied at every call.
        self.theta_levels = theta_from_sigma(torch.from_numpy(levels[::-1].copy())).to(self.device)
        alpha = np.sqrt((1 - levels) * (1 + levels))
        self.facts = Facts(
            low_sigma=float(levels[-1]),
            low_alpha=float(alpha[-1]),
            high_alpha=float(alpha[0]),
            time_scale=time_scale,
            sigma_data=sigma_data,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(
        self, x: Float[Tensor, "batch channel height width"], sigma: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch channel height width"]:
        return self._predict(x, sigma)[0]

    def with_variance(
        self, x: Float[Tensor, "batch channel height width"], sigma: Float64[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]]:
        """(D, v), v about [-1, 1] where a step's log variance lies in its range. Raises ConfigError where none was learned."""
        x0_hat, more = self._predict(x, sigma)
        if more is None:
            raise ConfigError("this network has learned no variance; allowed: a fixed one")
        return x0_hat, more

    def _predict(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        terms = self.coefficients(sigma)
        # Only where a prediction has one: a product with 1 for nothing.
        scaled = x if PREDICTIONS[self.prediction].input_scale is None else _per_sample(terms.input_scale, x) * x
        folded = F.pixel_unshuffle(scaled.to(self.dtype), self.pixel_unshuffle)
        output = F.pixel_shuffle(_call(self.network, folded, terms.time), self.pixel_unshuffle).to(x.dtype)
        more = output[:, x.shape[1] :] if self.learned_range else None
        output = output[:, : x.shape[1]] if self.learned_range else output
        return _per_sample(terms.from_x, x) * x + _per_sample(terms.from_output, x) * output, more

    def coefficients(self, sigma: Float64[Tensor, "batch"]) -> Terms:
        """What these noise levels decide, float64."""
        alpha, prediction = alpha_from_sigma(sigma), PREDICTIONS[self.prediction]
        time, scale = prediction.time, prediction.input_scale
        return Terms(
            time_from_sigma(sigma, self.theta_levels) if time is None else time(sigma, alpha, self.facts),
            *prediction.coefficients(sigma, alpha, self.facts),
            torch.ones_like(sigma) if scale is None else scale(sigma, alpha, self.facts),
        )

    def in_dtype(self, dtype: torch.dtype, device: torch.device = CPU) -> "NetworkDenoiser":
        """The same denoiser, its network in dtype on device; self is not changed."""
        # nn.Module.to itself: diffusers' override warns about modules to be kept in float32, of which there are none.
        network = nn.Module.to(copy.deepcopy(self.network), device=device, dtype=dtype)
        return NetworkDenoiser(
            network,
            levels=self.levels,
            prediction=self.prediction,
            pixel_unshuffle=self.pixel_unshuffle,
            learned_range=self.learned_range,
            time_scale=self.facts.time_scale,
            sigma_data=self.facts.sigma_data,
        )


def _per_sample(values: Float64[Tensor, "batch"], like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def _call(network: Any, x: Tensor, time: Tensor) -> Tensor:
    return network(x, time, return_dict=False)[0]
