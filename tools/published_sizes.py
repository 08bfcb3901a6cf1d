"""Published networks by their sizes, for counts on the meta device: no weights."""

from typing import Any

from tiltscope.engine.feature.convnext import ConvNeXtConfig
from tiltscope.engine.feature.vit import ViTConfig

CONVNEXT_L = ConvNeXtConfig(depths=(3, 3, 27, 3), hidden_sizes=(192, 384, 768, 1536), image_size=256)
# Dhariwal & Nichol 2021 (arXiv:2105.05233), the unconditional 256x256 network, as diffusers' UNet2DModel.
ADM_256: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
# Rombach et al. 2022 (arXiv:2112.10752), release 1.5.
SD_15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
# Its decoder of latents.
KL_DECODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}

# Width, blocks, heads.
_VIT = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def vit_config(size: str) -> ViTConfig:
    """DINOv3's ViT-S, -B or -L, which read pictures of 256 pixels."""
    width, layers, heads = _VIT[size]
    return ViTConfig(
        image_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_register_tokens=4,
    )
