"""A sparse autoencoder in one normal form: latent_j = pre_j where pre_j > threshold_j, else 0.

    pre_j(token) = encoder_j . token + bias_j                          or, convolutional, over a window of tokens (readout.py)

Whatever centring and scaling it was trained with is folded into the encoder (`normal_form`), so one row is all that one latent
needs. That is exact for ReLU, JumpReLU and BatchTopK with its learned threshold. TopK keeps a latent only while it is among the
k largest of all latents at its place, which one row cannot know: a row read alone equals TopK's latent wherever that one is kept,
and stays positive where others crowd it out. tests/feature/test_sae.py holds all of this.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.address import DEFAULT_POOLING
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.poolings import pooling_tensors
from tiltscope.engine.feature.readout import Readout, pool_latents
from tiltscope.engine.files import read_tensors

CHUNK = 512  # rows of one token at a time: [64, 512, 69] float32 is 9 MB
# kind -> whether its file must say where a latent starts; else at 0 (linear: nowhere, a latent is its pre-activation).
KINDS = {"jumprelu": True, "batchtopk": True, "relu": False, "topk": False, "linear": False}
# What a token is before the encoder sees it: itself, or brought to length sqrt(width).
TOKEN_LENGTHS = ("as_is", "sqrt_width")


@dataclass(frozen=True)
class SparseAutoencoder:
    """The encoder's rows. weight [M, d] or [M, d, h, w], bias [M], threshold [M] (0: ReLU; -inf: none), float32.

    rescales: it reads tokens of length sqrt(d), a trunk's `rescaled()`.
    """

    weight: Float[Tensor, "latents width *window"]
    bias: Float[Tensor, "latents"]
    threshold: Float[Tensor, "latents"]
    rescales: bool = False

    @property
    def num_latents(self) -> int:
        return self.weight.shape[0]

    @property
    def window(self) -> tuple[int, ...]:
        """(h, w) of a convolutional encoder, else ()."""
        return tuple(self.weight.shape[2:])

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
            mask=(mask.view(trunk.grid) if self.window else mask).expand(1, k, *(trunk.grid if self.window else (-1,))),
        )

    @torch.no_grad()
    def latents(
        self, tokens: Float[Tensor, "batch tokens width"], trunk: Trunk, *, pooling: str | None = DEFAULT_POOLING
    ) -> Float[Tensor, "batch latents"]:
        """Pooled activations of ALL latents, by the very code that sampling reads one with. No gradient."""
        rows = max(1, CHUNK // self.weight[0, 0].numel())
        chunks = (slice(start, start + rows) for start in range(0, self.num_latents, rows))
        return torch.cat([pool_latents(tokens, self.readout(c, trunk, pooling=pooling)) for c in chunks], dim=1)

    def check_index(self, index: int, hook: str) -> None:
        """Raises ConfigError beyond the last latent."""
        if not 0 <= index < self.num_latents:
            raise ConfigError(
                f"latent {index} is not in the autoencoder of {hook}; allowed: 0 to {self.num_latents - 1}"
            )

    def check_trunk(self, trunk: Trunk) -> None:
        """Raises BundleError where it cannot read this trunk's tokens."""
        if self.weight.shape[1] != trunk.width:
            raise BundleError(
                f"the autoencoder of {trunk.hook} reads {self.weight.shape[1]} channels, the trunk has {trunk.width}"
            )
        if self.window and trunk.num_prefix_tokens:
            raise BundleError(
                f"the autoencoder of {trunk.hook} is a convolution over the patch grid, but the hook has "
                f"{trunk.num_prefix_tokens} tokens beside it"
            )


def normal_form(
    weight: Float[Tensor, "latents width *window"],
    bias: Float[Tensor, "latents"],
    threshold: Float[Tensor, "latents"],
    *,
    centre: Float[Tensor, "width"] | None = None,
    input_scale: float = 1.0,
    decoder: Float[Tensor, "latents width"] | None = None,
    rescales: bool = False,
) -> SparseAutoencoder:
    """One encoder for latents n_j f(E_j . (s token - centre) + b_j), f a threshold at t_j, n_j = |decoder_j|:

        encoder_j = n_j s E_j       bias_j = n_j (b_j - E_j . centre)       threshold_j = n_j t_j

    centre: what is subtracted from every token (often the decoder's bias); input_scale: a constant s that stands before it;
    decoder: rows whose lengths are folded in (a latent is then the length of what it adds); None: latents as they are.
    Exact. Raises BundleError for a convolution with a centre, whose edge cannot be folded (beyond it a token is 0, not -centre).
    """
    length = torch.ones_like(bias) if decoder is None else torch.linalg.vector_norm(decoder, dim=1)
    if centre is not None:
        if weight.ndim > 2:
            raise BundleError(
                "a convolutional autoencoder that subtracts a centre from its input differs at the edge of the picture; "
                "only one without a centre can be read"
            )
        bias = bias - weight @ centre
    scaled = weight * (length * input_scale).view(-1, *(1,) * (weight.ndim - 1))
    # -inf times a length of 0 (a dead latent) would be NaN.
    level = torch.where(threshold.isinf(), threshold, threshold * length)
    return SparseAutoencoder(scaled, bias * length, level, rescales)


def load_sae(path: Path, *, kind: str = "jumprelu", token_length: str = "as_is") -> SparseAutoencoder:
    """encoder.weight, encoder.bias and, as its kind needs, threshold of a safetensors file, as float32; no decoder.

    kind: a key of KINDS; token_length: one of TOKEN_LENGTHS. The file is in normal form already. Raises BundleError.
    """
    for what, value, allowed in (("kind", kind, tuple(KINDS)), ("token_length", token_length, TOKEN_LENGTHS)):
        if value not in allowed:
            raise BundleError(f"sae {what} {value!r} is not known; allowed: {', '.join(allowed)}")
    names = ("encoder.weight", "encoder.bias", "threshold")
    found = read_tensors(path, names)
    needed = names if KINDS[kind] else names[:2]
    missing = [name for name in needed if name not in found]
    if missing:
        raise BundleError(
            f"{path} holds no tensor {missing[0]!r}; a sparse autoencoder of kind {kind} needs {', '.join(needed)}"
        )
    weight, bias = found[names[0]], found[names[1]]
    threshold = found.get("threshold", torch.full_like(bias, float("-inf") if kind == "linear" else 0.0))
    if weight.ndim not in (2, 4) or bias.shape != weight.shape[:1] or threshold.shape != bias.shape:
        raise BundleError(
            f"{path}: encoder.weight {list(weight.shape)}, encoder.bias {list(bias.shape)} and threshold "
            f"{list(threshold.shape)} must be [M, d] or [M, d, h, w], [M], [M]"
        )
    if any(side % 2 == 0 for side in weight.shape[2:]):
        raise BundleError(f"{path}: encoder.weight {list(weight.shape)} has no middle; its last two sizes must be odd")
    return SparseAutoencoder(weight, bias, threshold, rescales=token_length == "sqrt_width")
