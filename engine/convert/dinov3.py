"""DINOv3's weights from the names of Meta's release and of timm to transformers', and the configuration from their shapes.

    Meta    cls_token, storage_tokens, blocks.N.attn.qkv, .ls1.gamma, .mlp.fc1 or .w1;   stages.S.B.dwconv, downsample_layers.S.I
    timm    cls_token, reg_token, blocks.N.attn.qkv, .gamma_1, .mlp.fc1 or .fc1_g;       stages.S.blocks.B.conv_dw, stem.I

The third scheme, transformers' own (with or without `model.`), loads as it is. Tensors in, tensors out; knows no files.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError

HEAD_WIDTHS = {4096: 128}
HEAD_WIDTH = 64
# Of the release, not of the weights: LVD-1689M is web photographs, SAT-493M satellite pictures.
NORMALISATIONS = {
    "lvd1689m": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
_VIT = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^(storage_tokens|reg_token)$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layer.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.(?:ls(\d)\.gamma|gamma_(\d))$", r"layer.\1.layer_scale\2\3.lambda1"),
    (r"^blocks\.(\d+)\.mlp\.(?:w1|fc1_g)\.", r"layer.\1.mlp.gate_proj."),
    (r"^blocks\.(\d+)\.mlp\.(?:w2|fc1|fc1_x)\.", r"layer.\1.mlp.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.(?:w3|fc2)\.", r"layer.\1.mlp.down_proj."),
    (r"^blocks\.(\d+)\.(norm\d)\.", r"layer.\1.\2."),
)
_CONVNEXT = (
    (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.", r"stages.\1.layers.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers."),
    (r"^stem\.", "stages.0.downsample_layers."),
    (r"^stages\.(\d+)\.downsample\.", r"stages.\1.downsample_layers."),
    (r"\.(?:dwconv|conv_dw)\.", ".depthwise_conv."),
    (r"\.(?:pwconv|mlp\.fc)(\d)\.", r".pointwise_conv\1."),
    (r"\.layers\.(\d+)\.norm\.", r".layers.\1.layer_norm."),
    (r"^(?:head\.)?norm\.", "layer_norm."),
)
# Of the release and of no forward pass here: tables that are computed, masks, norms of training's other branches.
_UNUSED = re.compile(r"rope_embed\.|rope\.|.*\.bias_mask$|norms\.\d|(?:local_)?cls_norm\.|local_")
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.(?:qkv\.(weight|bias)|([qkv])_bias)$")


def is_dinov3(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are names of one of the two schemes."""
    return ("cls_token" in tensors and "blocks.0.norm1.weight" in tensors) or any(
        name in tensors for name in ("downsample_layers.0.0.weight", "stem.0.weight")
    )


def convert_dinov3(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in transformers' names, config.json). Raises BundleError where a DINOv3's own tensors are missing."""
    return _vit(tensors) if "cls_token" in tensors else _convnext(tensors)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _vit(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if any(name.startswith(("pos_embed", "register_tokens")) for name in tensors):
        raise BundleError(
            "these are DINOv2's weights (pos_embed): take the transformers folder of that release instead"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _UNUSED.match(name):
            continue
        if parts := _QKV.match(name):
            found |= _attention(parts, tensor)
        else:
            found[_renamed(name, _VIT)] = tensor
    if "embeddings.mask_token" in found:
        found["embeddings.mask_token"] = found["embeddings.mask_token"].reshape(1, 1, -1)
    need = ("embeddings.patch_embeddings.weight", "layer.0.mlp.up_proj.weight", "norm.weight")
    if missing := [name for name in need if name not in found]:
        raise BundleError(
            f"these weights are no whole DINOv3 ViT: {missing[0]} is missing under any name that is known"
        )
    width = found["embeddings.cls_token"].shape[-1]
    registers = found.setdefault("embeddings.register_tokens", torch.zeros(1, 0, width))
    config = {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "image_size": 224,
        "patch_size": found["embeddings.patch_embeddings.weight"].shape[-1],
        "num_channels": 3,
        "hidden_size": width,
        "intermediate_size": found["layer.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in found if name.startswith("layer.")),
        "num_attention_heads": width // HEAD_WIDTHS.get(width, HEAD_WIDTH),
        "num_register_tokens": registers.shape[1],
        "use_gated_mlp": "layer.0.mlp.gate_proj.weight" in found,
        "hidden_act": "silu" if "layer.0.mlp.gate_proj.weight" in found else "gelu",
        "query_bias": "layer.0.attention.q_proj.bias" in found,
        "key_bias": False,
        "value_bias": "layer.0.attention.v_proj.bias" in found,
        "proj_bias": "layer.0.attention.o_proj.bias" in found,
        "mlp_bias": "layer.0.mlp.up_proj.bias" in found,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
    }
    return found, config


def _attention(parts: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    block, what, single = parts.groups()
    if single is not None:
        # A key's bias moves all scores of a query alike, which softmax does not see: the release masks it to nothing.
        return {} if single == "k" else {f"layer.{block}.attention.{single}_proj.bias": tensor}
    split = dict(zip("qkv", tensor.chunk(3, dim=0), strict=True))
    return {
        f"layer.{block}.attention.{each}_proj.{what}": part.contiguous()
        for each, part in split.items()
        if not (each == "k" and what == "bias")
    }


def _convnext(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = {_renamed(name, _CONVNEXT): tensor for name, tensor in tensors.items() if not _UNUSED.match(name)}
    for name in list(found):
        if name.endswith((".pointwise_conv1.weight", ".pointwise_conv2.weight")) and found[name].ndim == 4:
            found[name] = found[name][:, :, 0, 0]
    blocks = [re.match(r"stages\.(\d+)\.layers\.(\d+)\.gamma$", name) for name in found]
    places = [(int(each[1]), int(each[2])) for each in blocks if each]
    if not places or "layer_norm.weight" not in found:
        raise BundleError("these weights are no whole DINOv3 ConvNeXt: blocks' gamma or the last norm is missing")
    stages = range(1 + max(stage for stage, _ in places))
    config = {
        "model_type": "dinov3_convnext",
        "architectures": ["DINOv3ConvNextModel"],
        "image_size": 224,
        "num_channels": 3,
        "hidden_sizes": [found[f"stages.{stage}.layers.0.gamma"].shape[0] for stage in stages],
        "depths": [1 + max(block for at, block in places if at == stage) for stage in stages],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    return found, config
