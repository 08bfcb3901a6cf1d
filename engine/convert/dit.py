"""DiT's and SiT's weights from their authors' names to diffusers' DiTTransformer2DModel, and the configuration from their shapes.

Both have the same names. A DiT embeds its time by w_i = 10000^(-i/half), where diffusers divides by half - 1: the configuration
says so (`time_embedding_shift` 0), and our loader heeds it. A SiT's time t runs from noise (0) to data (1) and its output is
x0 - eps; here time s = 1 - t is the noise's share and the output eps - x0. Both are folded into its weights, exactly:

    cos((1 - s) w) = cos w cos(s w) + sin w sin(s w)      sin((1 - s) w) = sin w cos(s w) - cos w sin(s w)

Source: Peebles & Xie 2023 (arXiv:2212.09748); SiT (arXiv:2401.08740), the linear path.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError

_TIME_CHANNELS = 256
# The XL sizes: 1152 channels in 16 heads; all others have heads of 64.
HEAD_WIDTHS = {1152: 72}
_BLOCK = (
    (r"^blocks\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^final_layer\.linear\.", "proj_out_2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
)
_SHARED = {
    "t_embedder.mlp.0.": "timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "timestep_embedder.linear_2.",
    "y_embedder.embedding_table.": "class_embedder.embedding_table.",
}
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def is_dit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are DiT's (or SiT's) names."""
    return {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"} <= set(tensors)


def convert_dit(tensors: Mapping[str, Tensor], *, flow: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in diffusers' names, config.json). flow: it is a SiT. Raises BundleError where its own tensors are missing."""
    need = ("pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
    if missing := [name for name in need if name not in tensors]:
        raise BundleError(f"these weights are no whole DiT: {missing[0]} is missing")
    patches = tensors["x_embedder.proj.weight"]
    width, channels, patch = patches.shape[0], patches.shape[1], patches.shape[-1]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    held = _as_noise_time(tensors, patch, channels) if flow else dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if name == "pos_embed":
            continue
        if parts := _QKV.match(name):
            for each, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
                found[f"transformer_blocks.{parts[1]}.attn1.to_{each}.{parts[2]}"] = part
        elif shared := next((each for each in _SHARED if name.startswith(each)), None):
            for block in range(layers):
                found[f"transformer_blocks.{block}.norm1.emb.{_SHARED[shared]}{name.removeprefix(shared)}"] = tensor
        else:
            found[_renamed(name)] = tensor
    head = HEAD_WIDTHS.get(width, 64)
    config: dict[str, Any] = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": found["proj_out_2.bias"].shape[0] // patch**2,
        "num_layers": layers,
        "sample_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "time_embedding_shift": 0,
    }
    return found, config


def _renamed(name: str) -> str:
    for pattern, replacement in _BLOCK:
        name = re.sub(pattern, replacement, name)
    return name


def _as_noise_time(tensors: Mapping[str, Tensor], patch: int, channels: int) -> dict[str, Tensor]:
    """A SiT told the noise's share s and answering eps - x0; what it says of a variance is left out."""
    held = dict(tensors)
    half = _TIME_CHANNELS // 2
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = tensors["t_embedder.mlp.0.weight"].double().split(half, dim=1)
    turned = [cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()]
    held["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1).to(tensors["t_embedder.mlp.0.weight"].dtype)
    for kind in ("weight", "bias"):
        rows = tensors[f"final_layer.linear.{kind}"].unflatten(0, (patch**2, -1))
        held[f"final_layer.linear.{kind}"] = -rows[:, :channels].flatten(0, 1)
    return held
