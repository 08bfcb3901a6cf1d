"""Pooling names -> the tensors of a readout: which tokens, and which mixture of max, mean and lse."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.address import ALLOWED_POOLINGS, FeatureAddress
from tiltscope.engine.feature.readout import MIXTURES

MEAN_ONLY = (0.0, 1.0, 0.0)  # of one token, any mixture is that token


def central_half(size: int) -> slice:
    """The central half of an axis: 8 -> 2..5, 16 -> 4..11; never empty."""
    return slice(size // 4, size - size // 4)


def pooling_tensors(
    pooling: str | None, *, grid: tuple[int, int], num_prefix_tokens: int
) -> tuple[Float[Tensor, "3"], Bool[Tensor, "tokens"]]:
    """-> (mixture [3], mask [tokens]) of a pooling; None is the class token alone. Raises ConfigError off the grid."""
    gh, gw = grid
    patches = torch.zeros(gh, gw, dtype=torch.bool)
    prefix = torch.zeros(num_prefix_tokens, dtype=torch.bool)
    mixture = MEAN_ONLY
    position = FeatureAddress("norm", "neuron", 0, pooling).position
    if pooling is None:
        if not num_prefix_tokens:
            raise ConfigError("this hook has no class token; allowed kinds: sae, neuron, direction")
        prefix[0] = True
    elif position is not None:
        y, x = position
        if y >= gh or x >= gw:
            raise ConfigError(f"pooling {pooling!r} is off the patch grid; allowed: y 0 to {gh - 1}, x 0 to {gw - 1}")
        patches[y, x] = True
    elif pooling in MIXTURES:
        mixture = MIXTURES[pooling]
        patches[(central_half(gh), central_half(gw)) if pooling == "centre" else slice(None)] = True
    else:
        raise ConfigError(f"pooling {pooling!r} is not known; allowed: {ALLOWED_POOLINGS}")
    return torch.tensor(mixture, dtype=torch.float32), torch.cat([prefix, patches.flatten()])
