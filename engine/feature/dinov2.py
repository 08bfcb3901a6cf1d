"""A DINOv2 ViT, with or without registers, up to one hooked layer: the blocks of vit.py, with learned places instead of RoPE.

    h = [class, patches] + places;  registers follow the class token, without a place
    places of another grid than the trained one:  R_rows P R_columns', R the bicubic resampling of one axis

Names on disk are transformers' (`encoder.layer.N.attention.attention.query`, ...). tests/feature/test_dinov2.py holds it equal to
transformers' Dinov2Model and Dinov2WithRegistersModel. Source: DINOv2 (arXiv:2304.07193); registers (arXiv:2309.16588).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import linear
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.vit import ACTIVATIONS, Block, ViTConfig

_NAMES = (
    (r"^encoder\.layer\.", "layer."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.(?:fc2|weights_out)\.", ".mlp.down_proj."),
    (r"^layernorm\.", "norm."),
    (r"\.patch_embeddings\.projection\.", ".patch_embeddings."),
)
_GATED = re.compile(r"\.mlp\.weights_in\.")


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """The part of transformers' dinov2 or dinov2_with_registers config.json that decides the forward pass."""

    image_size: int
    patch_size: int
    vit: ViTConfig
    antialias: bool
    """whether places are resampled with antialiasing: the models with registers were"""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "DINOv2Config":
        """Raises BundleError where sizes do not fit together or the activation is not known."""
        width, ratio = int(config.get("hidden_size", 768)), float(config.get("mlp_ratio", 4))
        gated = bool(config.get("use_swiglu_ffn", False))
        hidden = int(width * ratio)
        registers = int(config.get("num_register_tokens", 4)) if config.get("model_type") != "dinov2" else 0
        act = "silu" if gated else str(config.get("hidden_act", "gelu"))
        if act not in ACTIVATIONS or width % int(config.get("num_attention_heads", 12)):
            raise BundleError(
                f"trunk/config.json: hidden_act {act!r} must be one of {', '.join(ACTIVATIONS)}, and hidden_size {width} must "
                f"divide into {config.get('num_attention_heads')} heads"
            )
        biased = bool(config.get("qkv_bias", True))
        size, patch = int(config.get("image_size", 224)), int(config.get("patch_size", 14))
        return cls(
            image_size=size,
            patch_size=patch,
            antialias=config.get("model_type") != "dinov2",
            vit=ViTConfig(
                image_size=size,
                patch_size=patch,
                num_channels=int(config.get("num_channels", 3)),
                hidden_size=width,
                # Gated: two thirds of it, rounded up to a multiple of 8.
                intermediate_size=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
                num_hidden_layers=int(config.get("num_hidden_layers", 12)),
                num_attention_heads=int(config.get("num_attention_heads", 12)),
                num_register_tokens=registers,
                hidden_act=act,
                layer_norm_eps=float(config.get("layer_norm_eps", 1e-6)),
                query_bias=biased,
                key_bias=biased,
                value_bias=biased,
                use_gated_mlp=gated,
            ),
        )

    @property
    def least_side(self) -> int:
        """Of the smallest picture that every layer can read."""
        return self.patch_size


def our_names(name: str) -> tuple[str, ...]:
    """What a tensor of the file is here; two names: its two halves (a gated MLP's gate and up)."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if _GATED.search(name):
        return _GATED.sub(".mlp.gate_proj.", name), _GATED.sub(".mlp.up_proj.", name)
    return (name,)


class _Embeddings(nn.Module):
    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        vit, d = config.vit, config.vit.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + (config.image_size // config.patch_size) ** 2, d))
        self.patch_embeddings = nn.Conv2d(vit.num_channels, d, kernel_size=vit.patch_size, stride=vit.patch_size)
        if vit.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, vit.num_register_tokens, d))


class TruncatedDINOv2(Trunk):
    """x0 -> tokens [batch, 1 + registers + patches, width] at one hook.

    blocks.N   the residual stream before block N (N = 0 .. number of blocks; N = 0 is the embedding)
    norm       LayerNorm of the last block's output, transformers' last_hidden_state
    """

    def __init__(
        self,
        config: DINOv2Config,
        hook: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """Raises ConfigError naming the hooks there are, BundleError where pictures do not divide into patches."""
        size, patch = image_size or (config.image_size, config.image_size), config.patch_size
        num_built = _num_blocks(hook, config.vit.num_hidden_layers)
        if any(side % patch for side in size):
            raise BundleError(
                f"pictures of {size} px do not divide into patches of {patch} px; give the trunk a size that does (image_size)"
            )
        vit = config.vit
        super().__init__(
            hook,
            width=vit.hidden_size,
            grid=(size[0] // patch, size[1] // patch),
            num_prefix_tokens=vit.num_prefix_tokens,
            image_size=size,
            mean=mean,
            std=std,
        )
        self.config = config
        self.trained = config.image_size // patch
        self.embeddings = _Embeddings(config)
        self.layer = nn.ModuleList(Block(vit) for _ in range(num_built))
        self.norm = nn.LayerNorm(self.width, eps=vit.layer_norm_eps) if hook == "norm" else None
        self._set_tables(torch.float32)

    def _set_tables(self, dtype: torch.dtype) -> None:
        super()._set_tables(dtype)
        with torch.device("cpu"):
            self.rows, self.columns = (
                nn.Buffer(_bicubic(self.trained, side, dtype, antialias=self.config.antialias), persistent=False)
                for side in self.grid
            )

    def _places(self) -> Float[Tensor, "1 tokens channel"]:
        places = self.embeddings.position_embeddings
        if self.grid == (self.trained, self.trained):
            return places
        patches = places[:, 1:].unflatten(1, (self.trained, self.trained)).permute(0, 3, 1, 2)  # [1, d, rows, columns]
        wide = linear(patches, self.columns, None)
        resampled = linear(wide.transpose(2, 3), self.rows, None).transpose(2, 3)
        return torch.cat([places[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        each, b = self.embeddings, pixels.shape[0]
        patches = each.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        h = torch.cat([each.cls_token.expand(b, -1, -1), patches], dim=1) + self._places()
        if self.config.vit.num_register_tokens:
            h = torch.cat([h[:, :1], each.register_tokens.expand(b, -1, -1), h[:, 1:]], dim=1)
        for block in self.layer:
            h = block(h, None)
        return h if self.norm is None else self.norm(h)


def _bicubic(inputs: int, outputs: int, dtype: torch.dtype, *, antialias: bool) -> Float[Tensor, "outputs inputs"]:
    """The resampling of one axis as a matrix, from torch's own: what it makes of every unit vector.

    The vectors are repeated along a second axis of the same size: torch 2.13 resamples an axis beside one of size 1 wrongly.
    """
    unit = torch.eye(inputs, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    square = unit[None, :, :, None].expand(-1, -1, -1, inputs).contiguous()
    resampled = F.interpolate(square, size=(outputs, outputs), mode="bicubic", align_corners=False, antialias=antialias)
    return resampled[0, :, :, 0].T.contiguous().to(dtype)


def _num_blocks(hook: str, total: int) -> int:
    number = hook.removeprefix("blocks.")
    if hook == "norm":
        return total
    if hook.startswith("blocks.") and number.isdecimal() and int(number) <= total:
        return int(number)
    raise ConfigError(f"hook {hook!r} is not in this trunk; allowed: blocks.0 to blocks.{total}, norm")
