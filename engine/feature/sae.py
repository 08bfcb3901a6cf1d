"""A sparse autoencoder in one normal form: latent_j(token) = JumpReLU(encoder_j . token + bias_j; threshold_j).

Whatever centring and scaling it was trained with is folded into the encoder, so one row is all that one latent needs (exact).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.address import DEFAULT_POOLING
from tiltscope.engine.feature.poolings import pooling_tensors
from tiltscope.engine.feature.readout import Readout, pool_latents
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.files import read_tensors

CHUNK = 512  # latents at a time: [64, 512, 69] float32 is 9 MB


@dataclass(frozen=True)
class SparseAutoencoder:
    """The encoder's rows. weight [M, d], bias [M], threshold [M] (0: ReLU; -inf: none), float32."""

    weight: Float[Tensor, "latents width"]
    bias: Float[Tensor, "latents"]
    threshold: Float[Tensor, "latents"]

    @property
    def num_latents(self) -> int:
        return self.weight.shape[0]

    def readout(self, latents: slice, trunk: Trunk, *, pooling: str | None = DEFAULT_POOLING) -> Readout:
        """The rows `latents` as one readout [1, K, ...] of weight 1."""
        weight = self.weight[latents]
        mixture, mask = pooling_tensors(pooling, grid=trunk.grid, num_prefix_tokens=trunk.num_prefix_tokens)
        k = weight.shape[0]
        return Readout(
            direction=weight[None],
            bias=self.bias[latents][None],
            threshold=self.threshold[latents][None],
            weight=torch.ones(1, k),
            pooling=mixture.expand(1, k, 3),
            mask=mask.expand(1, k, -1),
        )

    @torch.no_grad()
    def latents(
        self, tokens: Float[Tensor, "batch tokens width"], trunk: Trunk, *, pooling: str | None = DEFAULT_POOLING
    ) -> Float[Tensor, "batch latents"]:
        """Pooled activations of ALL latents, by the very code that sampling reads one with. No gradient."""
        chunks = (slice(start, start + CHUNK) for start in range(0, self.num_latents, CHUNK))
        return torch.cat([pool_latents(tokens, self.readout(c, trunk, pooling=pooling)) for c in chunks], dim=1)

    def check_index(self, index: int, hook: str) -> None:
        """Raises ConfigError beyond the last latent."""
        if not 0 <= index < self.num_latents:
            raise ConfigError(
                f"latent {index} is not in the autoencoder of {hook}; allowed: 0 to {self.num_latents - 1}"
            )


def load_sae(path: Path) -> SparseAutoencoder:
    """encoder.weight, encoder.bias, threshold of a safetensors file, as float32; no decoder. Raises BundleError."""
    names = ("encoder.weight", "encoder.bias", "threshold")
    found = read_tensors(path, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise BundleError(f"{path} holds no tensor {missing[0]!r}; a sparse autoencoder needs {', '.join(names)}")
    weight, bias, threshold = (found[name] for name in names)
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or threshold.shape != bias.shape:
        raise BundleError(
            f"{path}: encoder.weight {list(weight.shape)}, encoder.bias {list(bias.shape)} and threshold "
            f"{list(threshold.shape)} must be [M, d], [M], [M]"
        )
    return SparseAutoencoder(weight, bias, threshold)
