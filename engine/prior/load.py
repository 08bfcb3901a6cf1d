"""From a folder in diffusers' format to a Prior. Offline; only JSON and safetensors are read, no code of the folder is run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltscope.engine.batch_invariant import replace_modules
from tiltscope.engine.errors import BundleError
from tiltscope.engine.files import read_json, read_tensors
from tiltscope.engine.prior.levels import sigma_levels
from tiltscope.engine.prior.network import PREDICTIONS, NetworkDenoiser, TimeEmbedding

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
FILES = (CONFIG, WEIGHTS, SCHEDULER)


def load_denoiser(folder: Path, *, kind: str, shape: tuple[int, ...], pixel_unshuffle: int) -> NetworkDenoiser:
    """The denoiser of a prior folder: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json; float32, CPU.

    kind is a key of KINDS; shape the public [channel, height, width]. Raises BundleError naming the file and what is allowed.
    """
    if kind not in KINDS:
        raise BundleError(f"prior kind {kind!r} is not known; allowed: {', '.join(KINDS)}")
    scheduler = read_json(folder / SCHEDULER)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise BundleError(
            f"{folder / SCHEDULER}: prediction_type {prediction!r} is not known; allowed: {', '.join(PREDICTIONS)}"
        )
    levels = sigma_levels(scheduler)
    if prediction == "epsilon" and levels[0] == 1.0:
        raise BundleError(f"{folder / SCHEDULER}: an epsilon prediction says nothing at sigma = 1 (zero terminal SNR)")
    return NetworkDenoiser(
        KINDS[kind](folder, shape, pixel_unshuffle),
        levels=levels,
        prediction=prediction,
        pixel_unshuffle=pixel_unshuffle,
    )


def load_unet2d(folder: Path, shape: tuple[int, ...], pixel_unshuffle: int) -> nn.Module:
    """diffusers' UNet2DModel, unconditional, positional time embedding, no learned variance. Raises BundleError."""
    from diffusers.models.unets.unet_2d import UNet2DModel  # seconds to import: only where there is a network to load

    config = read_json(folder / CONFIG)
    if config.get("_class_name") != "UNet2DModel":
        raise BundleError(f"{folder / CONFIG}: {config.get('_class_name')!r} is not known; allowed: UNet2DModel")
    channels = shape[0] * pixel_unshuffle**2
    expected = {
        "in_channels": channels,
        "out_channels": channels,
        "time_embedding_type": "positional",
        "class_embed_type": None,
        "num_class_embeds": None,
    }
    defaults = {"in_channels": 3, "out_channels": 3, "time_embedding_type": "positional"}
    for name, value in expected.items():
        if config.get(name, defaults.get(name)) != value:
            raise BundleError(f"{folder / CONFIG}: {name} must be {value!r} here, got {config.get(name)!r}")
    try:
        with torch.device("meta"):  # no random initialisation, and no draw from the global generator
            unet: Any = UNet2DModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{folder / CONFIG} does not describe a UNet2DModel: {error}") from error
    unet.time_proj = TimeEmbedding(
        unet.config.block_out_channels[0],
        flip_sin_to_cos=unet.config.flip_sin_to_cos,
        downscale_freq_shift=float(unet.config.freq_shift),
    )
    try:
        unet.load_state_dict(read_tensors(folder / WEIGHTS), assign=True)
    except RuntimeError as error:
        raise BundleError(f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: {error}") from error
    # Only now: loading needs the parameters where diffusers has them, sampling needs bits that no batch mate can change.
    replace_modules(unet)
    return unet


# bundle.json's prior.kind -> a function (folder, shape, pixel_unshuffle) -> network(x, t).
KINDS = {"diffusers_unet2d": load_unet2d}
