"""What a noise level decides of a denoiser, as tensors on the host: so that an exported graph holds no float64 and no schedule.

D = from_x x + from_output network(input_scale x, time_embedding)
"""

from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tiltscope.engine.prior.network import NetworkDenoiser

CONDITIONING = ("from_x", "from_output", "time_embedding", "input_scale")


def conditioning(
    denoiser: NetworkDenoiser, sigma: Float64[Tensor, "batch"], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(from_x [batch], from_output [batch], time_embedding [batch, channels], input_scale [batch]) at these levels, in dtype."""
    terms = denoiser.coefficients(sigma)
    network: Any = denoiser.network
    return (
        terms.from_x.to(dtype),
        terms.from_output.to(dtype),
        network.time_proj(terms.time).to(dtype),
        terms.input_scale.to(dtype),
    )
