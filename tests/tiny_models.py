"""Tiny networks with random weights, each saved in its real format by the library that owns it: what the loaders are held to.

Each `write_*` fills a folder and returns the library's own model, whose forward is the reference.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 64


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and of order one: a library's own start (0.02, or zeros) would hide a wrong layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 and ("norm" in name or name.endswith(("gamma", "lambda1"))) and not name.endswith("bias"):
                p.copy_(1 + 0.2 * noise)
            elif p.ndim < 2:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise * (1.5 / p[0].numel()) ** 0.5)
    return module.eval().requires_grad_(False)


def pictures(num: int = 3, side: int = SIDE, seed: int = 1, channels: int = 3) -> Tensor:
    """Beyond [-1, 1] too, as estimates are."""
    return 2.4 * torch.rand(num, channels, side, side, generator=torch.Generator().manual_seed(seed)) - 1.2


def _made(kind: Any, *args: Any, **values: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        return kind(*args, **values)


def write_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))


CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 3, 1], "image_size": SIDE}


def write_convnext(folder: Path, **changes: Any) -> Any:
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    model = fill(_made(DINOv3ConvNextModel, DINOv3ConvNextConfig(**(CONVNEXT | changes))))
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


VIT = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
}


def write_vit(folder: Path, **changes: Any) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model = fill(_made(DINOv3ViTModel, DINOv3ViTConfig(**(VIT | changes))))
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


# ADM's form: residual blocks that scale and shift by time and resample themselves, attention inside, twice the channels out.
ADM = {
    "sample_size": SIDE,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def write_unet(folder: Path, scheduler: Any = None, **changes: Any) -> Any:
    """A UNet2DModel, ADM's unless told otherwise, and its scheduler (default: ADM's)."""
    from diffusers import DDPMScheduler, UNet2DModel

    model = fill(_made(UNet2DModel, **(ADM | changes)))
    model.save_pretrained(folder)
    (scheduler or DDPMScheduler(**LINEAR, variance_type="learned_range")).save_pretrained(folder)
    return model


DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def write_dit(folder: Path, scheduler: Any = None, **changes: Any) -> Any:
    """A DiTTransformer2DModel and its scheduler (default: DiT's own, DDIM on a linear schedule)."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    model = fill(_made(DiTTransformer2DModel, **(DIT | changes)))
    model.save_pretrained(folder)
    (scheduler or DDIMScheduler(**LINEAR)).save_pretrained(folder)
    return model


NCSNPP = {
    "_class_name": "SongUNet",
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "channel_mult_noise": 2,
    "num_blocks": 1,
    "attn_resolutions": [32],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_smooth": [0.25, 0.5, 0.25],
}
EDM2 = {
    "_class_name": "EDM2UNet",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "channels": [16, 24],
    "noise_channels": 16,
    "emb_channels": 24,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}


def write_edm(folder: Path, config: dict[str, Any] = NCSNPP) -> None:
    """As `tiltscope convert` writes it; tests/convert/test_edm.py holds our form of these networks to their authors'."""
    from safetensors.torch import save_file

    from tiltscope.engine.convert.convert import EDM_SCHEDULER
    from tiltscope.engine.prior.edm import EDMUNet
    from tiltscope.engine.prior.edm2 import EDM2UNet

    network = fill(_made((EDM2UNet if config is EDM2 else EDMUNet).from_config, config))
    for name, buffer in network.named_buffers():
        buffer.copy_(torch.linspace(0.1, 3.0, len(buffer)) * (4 if "freqs" in name else 1))
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler_config.json").write_text(json.dumps(EDM_SCHEDULER))


KL = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (8, 12),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}


def write_kl(folder: Path, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    model = fill(_made(AutoencoderKL, **(KL | changes)))
    model.save_pretrained(folder)
    return model


TINY_AUTOENCODER = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def write_tiny_autoencoder(folder: Path, **changes: Any) -> Any:
    from diffusers import AutoencoderTiny

    model = fill(_made(AutoencoderTiny, **(TINY_AUTOENCODER | changes)))
    model.save_pretrained(folder)
    return model


def normalised(x0: Tensor) -> Tensor:
    """What transformers' models take."""
    mean, std = (torch.tensor(v, dtype=x0.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x0 + 1) / 2 - mean) / std


# Stable Diffusion 1.5's form: attention to a prompt in every block but the innermost, SD's schedule.
SD_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_TEXT = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
    "max_position_embeddings": 77,
}


def write_stable_diffusion(folder: Path, **changes: Any) -> Any:
    """A whole StableDiffusionPipeline: U-Net, KL autoencoder, text encoder, tokenizer, scheduler, as the library saves it."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {"vocab_size": len(words), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    tokenizer = CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=77)
    text = fill(_made(CLIPTextModel, CLIPTextConfig(**SD_TEXT, **ids)), seed=5)
    pipeline = StableDiffusionPipeline(
        vae=fill(_made(AutoencoderKL, **KL), seed=6),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=fill(_made(UNet2DConditionModel, **(SD_UNET | changes)), seed=7),
        scheduler=PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline
