"""Tiny twins of real systems as whole bundles: the real architectures and formats, random weights, the tiny bundle's pictures.

build_twin(folder, "energydps")   ADM-like U-Net with a learned variance, DINOv3 ConvNeXt, 7x7 convolutional autoencoder on tokens
                                  of one length: the published set-up in small
build_twin(folder, "vitl_sit")    a flow's transformer on latents with a KL decoder, DINOv3 ViT at another size than the pictures
build_twin(folder, "vitb_sd15")   Stable Diffusion's U-Net at the empty prompt, its KL decoder, DINOv3 ViT
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_bundle import describe, draw_pictures, write_evaluator, write_feature_table, write_pool
from tiny_models import (
    LINEAR,
    write_convnext,
    write_dit,
    write_kl,
    write_stable_diffusion,
    write_unet,
    write_vit,
)
from torch import Tensor

from tiltscope.engine.bundling.parts import find_prior
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.sae import load_sae
from tiltscope.engine.feature.trunk import load_trunk

NUM_LATENTS = 8
HOOKS = {"energydps": "stages.2.1", "vitl_sit": "blocks.2", "vitb_sd15": "blocks.2"}


def _write_sae(path: Path, trunk: Trunk, x0: Tensor, window: tuple[int, ...]) -> None:
    """Rows that vary by about one over the pictures and fire on about half of them."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(NUM_LATENTS, trunk.width, *window, generator=generator)
    sae = load_sae(_saved(path, weight, torch.zeros(NUM_LATENTS)), kind="relu")
    tokens = trunk(x0)
    drive = torch.stack(
        [_centre(sae.readout(slice(k, k + 1), trunk), tokens) for k in range(NUM_LATENTS)], dim=1
    )  # [pictures, latents]
    scale = drive.std(0)
    weight = weight / scale.view(-1, *(1,) * (weight.ndim - 1))
    _saved(path, weight, -(drive / scale).median(0).values)


def _centre(readout: Any, tokens: Tensor) -> Tensor:
    from tiltscope.engine.feature.readout import read

    return read(tokens, readout)[1]


def _saved(path: Path, weight: Tensor, bias: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "encoder.weight": weight.contiguous(),
            "encoder.bias": bias.contiguous(),
            "threshold": torch.full_like(bias, 0.05),
        },
        path,
    )
    return path


@torch.no_grad()
def build_twin(folder: Path, which: str) -> Path:
    """Write the bundle into `folder` (made if need be) and return it."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    folder.mkdir(parents=True, exist_ok=True)
    pixels, names = draw_pictures()
    x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    hook = HOOKS[which]
    sae: dict[str, Any] = {"hook": hook, "path": "sae", "kind": "jumprelu", "num_latents": NUM_LATENTS}
    trunk_section: dict[str, Any] = {"kind": "dinov3_convnext", "path": "trunk"}
    prior: dict[str, Any] = {"path": "prior", "pixel_unshuffle": 1}
    if which == "energydps":
        write_unet(folder / "prior", DDPMScheduler(**LINEAR, variance_type="learned_range"))
        write_convnext(folder / "trunk")
        prior |= {"kind": "diffusers_unet2d", "shape": [3, 64, 64], "prediction_type": "epsilon"}
        trunk = load_trunk(folder / "trunk", hook, image_size=(64, 64)).rescaled()
        sae |= {"token_length": "sqrt_width"}
        size, window = (64, 64), (7, 7)
    else:
        if which == "vitl_sit":
            write_dit(folder / "prior", FlowMatchEulerDiscreteScheduler(), sample_size=32)
            write_kl(folder / "vae")
            prior |= {"kind": "diffusers_dit", "shape": [4, 32, 32], "decoder": {"path": "vae"}}
        else:
            with TemporaryDirectory() as pipeline:
                write_stable_diffusion(Path(pipeline), sample_size=32)
                parts = find_prior(Path(pipeline), decoder=None, pixel_unshuffle=1)
                for part in parts:
                    assert part is not None
                    part.copy(folder)
                prior = dict(parts[0].section)
        write_vit(folder / "trunk")
        trunk_section = {"kind": "dinov3_vit", "path": "trunk", "image_size": [32, 32]}
        trunk = load_trunk(folder / "trunk", hook, image_size=(32, 32))
        size, window = (32, 32), ()
    seen = F.interpolate(x0, size=size, mode="bilinear", antialias=True)
    _write_sae(folder / "sae/sae.safetensors", trunk, seen, window)
    loaded = load_sae(folder / "sae/sae.safetensors")
    activations = loaded.latents(trunk(seen), trunk).double().numpy()
    embeddings = write_evaluator(folder / "evaluator", torch.Generator().manual_seed(4)).embed(x0)
    write_feature_table(folder / "sae/features.parquet", activations, names, hook)
    write_pool(folder / "pool", pixels, names, activations, embeddings, hook)
    describe(folder, name=which, prior=prior, trunk=trunk_section, saes=[sae])
    return folder
