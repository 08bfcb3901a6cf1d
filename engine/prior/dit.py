"""diffusers' DiTTransformer2DModel as a network(x, t): the null class in the place of a class, one time embedding for all blocks.

    h = patches(x) + places;   h = block(h, c) for each block;   output = unpatchify(W (LayerNorm(h) (1 + scale(c)) + shift(c)))
    c = MLP(embedding(t)) + null

The blocks are the library's; what stands around them is written here, because the library looks classes up, embeds t in float32
in every block, and keeps its places in a buffer that its files do not hold. tests/prior/test_dit.py: equal to the library's.
Source: Peebles & Xie 2023 (arXiv:2212.09748).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import gelu_tanh, silu
from tiltscope.engine.prior.network import TimeEmbedding

_TIME_CHANNELS = 256


class _NullClass(nn.Module):
    """The last row of a class table: what training with dropped labels learned for no class at all."""

    def __init__(self, row: Float[Tensor, "width"]) -> None:
        super().__init__()
        self.row = nn.Parameter(row.clone())

    def forward(self, like: Float[Tensor, "batch _"]) -> Float[Tensor, "batch width"]:
        return self.row.expand(like.shape[0], -1)


class _TanhGELU(nn.Module):
    """diffusers' GELU(approximate="tanh") after its product, in the form that no batch mate changes."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return gelu_tanh(self.proj(hidden_states))


class DiT(nn.Module):
    """network(x, t) -> (prediction,): `transformer`'s own numbers for the null class.

    Takes the transformer over and changes it; its weights are there already. time_embedding_shift: diffusers' 1, or 0 for weights
    that were trained with the original's embedding (engine/convert/dit.py).
    """

    def __init__(self, transformer: Any, *, time_embedding_shift: float = 1.0) -> None:
        super().__init__()
        self.time_proj = TimeEmbedding(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=time_embedding_shift)
        self.patch_size: int = transformer.config.patch_size
        self.channels: int = transformer.out_channels
        self.places = nn.Buffer(_places(transformer), persistent=False)
        for block in transformer.transformer_blocks:
            embedding: Any = block.norm1.emb
            embedding.time_proj = nn.Identity()
            embedding.class_embedder = _NullClass(embedding.class_embedder.embedding_table.weight[-1])
            if getattr(block.ff.net[0], "approximate", None) == "tanh":
                block.ff.net[0] = _TanhGELU(block.ff.net[0].proj)
        self.patches: nn.Module = transformer.pos_embed.proj
        self.blocks: nn.ModuleList = transformer.transformer_blocks
        self.norm_out: nn.Module = transformer.norm_out
        self.proj_out_1: nn.Module = transformer.proj_out_1
        self.proj_out_2: nn.Module = transformer.proj_out_2

    def forward(
        self, x: Float[Tensor, "batch channel height width"], t: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        del return_dict
        embedded = self.time_proj(t).to(x.dtype)
        h = self.patches(x)
        rows, columns = h.shape[2:]
        h = h.flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            h = block(h, timestep=embedded, class_labels=embedded)
        first: Any = self.blocks[0]
        condition = first.norm1.emb(embedded, embedded, hidden_dtype=h.dtype)
        shift, scale = self.proj_out_1(silu(condition)).chunk(2, dim=1)
        h = self.proj_out_2(self.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
        h = h.unflatten(2, (self.patch_size, self.patch_size, self.channels)).unflatten(1, (rows, columns))
        # [batch, rows, columns, p, q, channel] -> [batch, channel, rows p, columns q]
        return (h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


def _places(transformer: Any) -> Float[Tensor, "1 patches width"]:
    """The sine and cosine table of places, as diffusers makes it when it builds the model on the CPU."""
    return get_places(transformer.inner_dim, transformer.config.sample_size // transformer.config.patch_size)


def get_places(width: int, side: int) -> Float[Tensor, "1 patches width"]:
    """Of a square of side * side patches."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    with torch.device("cpu"):
        table: Any = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    return table.float()[None]
