"""The blocks of a DINOv3 ViT in plain torch, with transformers' parameter names, so that its weight files load unchanged.

Own definitions rather than transformers' classes: only what inference needs is built, nothing is imported that costs seconds,
and the attention that runs is the one written here. tests/feature/test_trunk.py holds them equal to transformers' model.

    block(h):  h = h + lambda1 * Attention(LayerNorm(h));   h = h + lambda2 * MLP(LayerNorm(h))
    RoPE:  (q1', q2') = (q1, q2) cos + (-q2, q1) sin,  halves of a head;  angle = 2 pi coordinate / base^(4i/head_width) of a
           patch, 0 of the class token and the registers

Source: DINOv3 (arXiv:2508.10104); RoPE of the axial form its released code uses.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import Linear, attend, gelu, silu
from tiltscope.engine.errors import BundleError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": silu}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The part of transformers' dinov3_vit config.json that decides the forward pass; its names and defaults."""

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_register_tokens: int = 0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Raises BundleError where its sizes do not fit together."""
        found = cls(**{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None})
        if found.hidden_act not in ACTIVATIONS:
            raise BundleError(
                f"trunk/config.json: hidden_act {found.hidden_act!r} is not known; allowed: {', '.join(ACTIVATIONS)}"
            )
        if found.hidden_size % found.num_attention_heads or (found.hidden_size // found.num_attention_heads) % 4:
            raise BundleError(
                f"trunk/config.json: hidden_size {found.hidden_size} over {found.num_attention_heads} heads must give "
                "a head width that is a multiple of 4"
            )
        return found

    @property
    def least_side(self) -> int:
        """Of the smallest picture that every layer can read."""
        return self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens


def rope_tables(
    grid: tuple[int, int], *, num_prefix_tokens: int, head_width: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "tokens head_width"], Float[Tensor, "tokens head_width"]]:
    """(cos, (-sin, sin)) [num_prefix_tokens + gh*gw, head_width] of patch centres, coordinates in [-1, 1] along each axis.

    Computed in float32 for float32 and below (bit for bit what transformers computes), in float64 for float64. A pure function:
    transformers keeps its coordinates in a global cache, whose tensors must not leak into a trace or an inference-mode run.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = 1 / base ** torch.arange(0, 1, 4 / head_width, dtype=work)  # [head_width / 4]
    rows = torch.arange(0.5, grid[0], dtype=work) / grid[0]
    columns = torch.arange(0.5, grid[1], dtype=work) / grid[1]
    centre = 2.0 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1) - 1.0  # [gh*gw, 2]
    angle = (2 * math.pi * centre[:, :, None] * inverse[None, None, :]).flatten(1, 2)  # [gh*gw, head_width / 2]
    angle = F.pad(angle, [0, 0, num_prefix_tokens, 0])
    cos, sin = torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Float[Tensor, "*dims tokens head_width"], cos: Tensor, signed_sin: Tensor
) -> Float[Tensor, "*dims tokens head_width"]:
    """RoPE with the tables of `rope_tables`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin


class Embeddings(nn.Module):
    """Picture -> class token, registers, patch tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, d))
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, d, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens d"]:
        b = pixels.shape[0]
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(b, -1, -1), self.register_tokens.expand(b, -1, -1), patches], dim=1)


class Attention(nn.Module):
    """softmax(q k' / sqrt(head_width)) v, RoPE on q and k where there are tables for it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (d // self.num_heads) ** -0.5
        self.q_proj = Linear(d, d, bias=config.query_bias)
        self.k_proj = Linear(d, d, bias=config.key_bias)
        self.v_proj = Linear(d, d, bias=config.value_bias)
        self.o_proj = Linear(d, d, bias=config.proj_bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)  # [b*heads, tokens, head_width]

    def forward(
        self, h: Float[Tensor, "batch tokens d"], rope: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "batch tokens d"]:
        q, k, v = (self._heads(project(h)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        heads = attend(q, k, v, self.scale)
        return self.o_proj(heads.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(up(h))), or down(act(gate(h)) * up(h)) where gated."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.up_proj = Linear(d, hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, d, bias=config.mlp_bias)
        self.gate_proj = Linear(d, hidden, bias=config.mlp_bias) if config.use_gated_mlp else None

    def forward(self, h: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens d"]:
        up = self.up_proj(h)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(h)) * up)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(width))

    def forward(self, h: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens d"]:
        return h * self.lambda1


class Block(nn.Module):
    """One pre-norm transformer block with layer scale; its input is what `blocks.N` hooks."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm1 = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(d)
        self.norm2 = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_scale2 = LayerScale(d)

    def forward(
        self, h: Float[Tensor, "batch tokens d"], rope: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, "batch tokens d"]:
        h = self.layer_scale1(self.attention(self.norm1(h), rope)) + h
        return self.layer_scale2(self.mlp(self.norm2(h))) + h
