"""What a noise level decides of a denoiser, as tensors on the host: so that an exported graph holds no float64 and no schedule.

D = from_x x + from_output network(x, time_embedding)
"""

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tiltscope.engine.prior.network import NetworkDenoiser

CONDITIONING = ("from_x", "from_output", "time_embedding")


def conditioning(
    denoiser: NetworkDenoiser, sigma: Float64[Tensor, "batch"], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(from_x [batch], from_output [batch], time_embedding [batch, channels]) at these noise levels, in dtype."""
    time, from_x, from_output = denoiser.coefficients(sigma)
    network: Any = denoiser.network
    return from_x.to(dtype), from_output.to(dtype), network.time_proj(time).to(dtype)
