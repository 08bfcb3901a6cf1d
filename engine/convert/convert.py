"""A checkpoint into a folder that loads here: which kind it is, and what is written beside its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltscope.engine.bundling.autoencoders import write_normal_form
from tiltscope.engine.bundling.sae_formats import Read, from_overcomplete, from_saev
from tiltscope.engine.convert.adm import convert_adm, is_adm
from tiltscope.engine.convert.checkpoint import Checkpoint, read_checkpoint
from tiltscope.engine.convert.dinov3 import NORMALISATIONS, convert_dinov3, is_dinov3
from tiltscope.engine.convert.dit import convert_dit, is_dit
from tiltscope.engine.convert.edm import convert_edm, is_edm
from tiltscope.engine.errors import BundleError, ConfigError

# ADM's own: 1000 levels, linear betas, a learned variance between two bounds.
ADM_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}
# The linear path; told its time as the noise's share itself.
SIT_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "time_scale": 1.0,
}
# As EDM and EDM2 were trained; the ends are those between which their authors sample.
EDM_SCHEDULER = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What a checkpoint does not say of itself."""

    release: str | None = None
    image_size: int = 256
    head_channels: int = 64
    sae_kind: str | None = None
    threshold: float | None = None
    centre: bool = False
    hook: str | None = None
    flow: bool | None = None


def convert(checkpoint: Path, out: Path, settings: ConvertSettings) -> str:
    """Write the folder `out` and say in a few words what it is.

    Raises ConfigError where something must be said that the checkpoint does not, or `out` is not empty; BundleError for a
    checkpoint that is damaged, of a kind not known, or would run code.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out {out} is not empty; give a new folder")
    found = read_checkpoint(checkpoint)
    if is_adm(found.tensors):
        return _write_adm(found.tensors, out, settings)
    if is_dit(found.tensors):
        return _write_dit(found.tensors, out, _is_flow(checkpoint, settings))
    if is_edm(found.tensors):
        return _write_edm(found.tensors, out, settings)
    if is_dinov3(found.tensors):
        return _write_trunk(found.tensors, out, _release(checkpoint, settings))
    if (read := _autoencoder(found, settings)) is not None:
        return _write_sae(read, out, settings)
    names = sorted(found.tensors)
    raise BundleError(
        f"{checkpoint} is of no kind that is known (its tensors: {', '.join(names[:3])} and {max(len(names) - 3, 0)} more); "
        "allowed: DINOv3 (Meta, timm), guided-diffusion's U-Net, DiT, SiT, EDM, EDM2, autoencoders of saev and overcomplete"
    )


def _is_flow(checkpoint: Path, settings: ConvertSettings) -> bool:
    named = [each for each in ("sit", "dit") if each in checkpoint.name.lower()]
    if settings.flow is None and len(named) != 1:
        raise ConfigError(
            "flow: DiT and SiT have the same names, and this file's name tells neither; say --flow True for a SiT, "
            "False for a DiT"
        )
    return settings.flow if settings.flow is not None else named == ["sit"]


def _release(checkpoint: Path, settings: ConvertSettings) -> str:
    release = settings.release or next((each for each in NORMALISATIONS if each in checkpoint.name.lower()), None)
    if release not in NORMALISATIONS:
        raise ConfigError(
            f"release: got {release!r}, allowed are {', '.join(NORMALISATIONS)}: which pictures the model was trained on decides "
            "its normalisation, and weights do not tell"
        )
    return release


def _write_trunk(tensors: Mapping[str, Tensor], out: Path, release: str) -> str:
    converted, config = convert_dinov3(tensors)
    mean, std = NORMALISATIONS[release]
    out.mkdir(parents=True, exist_ok=True)
    _save(converted, out / "model.safetensors")
    size = {"height": config["image_size"], "width": config["image_size"]}
    _json(out / "preprocessor_config.json", {"image_mean": mean, "image_std": std, "size": size})
    _json(out / "config.json", config)
    return (
        f"{config['model_type']}, {sum(each.numel() for each in converted.values()):,} numbers, normalised as {release}"
    )


def _write_adm(tensors: Mapping[str, Tensor], out: Path, settings: ConvertSettings) -> str:
    converted, config = convert_adm(tensors, image_size=settings.image_size, head_channels=settings.head_channels)
    learned = config["out_channels"] == 2 * config["in_channels"]
    variance = {"variance_type": "learned_range" if learned else "fixed_small"}
    _prior_folder(out, converted, config, ADM_SCHEDULER | variance)
    size = sum(each.numel() for each in converted.values())
    return f"UNet2DModel, {size:,} numbers, {len(config['block_out_channels'])} levels"


def _write_dit(tensors: Mapping[str, Tensor], out: Path, flow: bool) -> str:
    converted, config = convert_dit(tensors, flow=flow)
    learned = config["out_channels"] == 2 * config["in_channels"]
    variance = {"variance_type": "learned_range" if learned else "fixed_small", "clip_sample": False}
    _prior_folder(out, converted, config, SIT_SCHEDULER if flow else ADM_SCHEDULER | variance)
    what = "flow" if flow else "epsilon"
    return f"DiTTransformer2DModel, {config['num_layers']} blocks, latents of {config['in_channels']} channels, {what}"


def _write_edm(tensors: Mapping[str, Tensor], out: Path, settings: ConvertSettings) -> str:
    converted, config = convert_edm(tensors, head_channels=settings.head_channels)
    _prior_folder(out, converted, config, EDM_SCHEDULER)
    size, side = sum(each.numel() for each in converted.values()), config["sample_size"]
    return f"{config['_class_name']}, {size:,} numbers, {config['in_channels']} channels of {side}x{side}"


def _autoencoder(found: Checkpoint, settings: ConvertSettings) -> Read | None:
    if {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(found.tensors) and found.header:
        return from_saev(found.header, found.tensors, centre=settings.centre)
    if "encoder.final_block.0.weight" in found.tensors:
        return from_overcomplete(found.tensors, kind=settings.sae_kind, threshold=settings.threshold)
    return None


def _write_sae(read: Read, out: Path, settings: ConvertSettings) -> str:
    write_normal_form(read.sae, out)
    hook = settings.hook or read.hook
    config = {"kind": read.kind, "num_latents": read.sae.num_latents, "width": read.sae.weight.shape[1]}
    _json(out / "config.json", config | ({"hook": hook} if hook else {}))
    return f"an autoencoder of {read.sae.num_latents:,} latents ({read.kind})"


def _prior_folder(
    out: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> None:
    """What engine/prior/load.py reads; the configuration last, so that a folder that has one is whole."""
    out.mkdir(parents=True, exist_ok=True)
    _save(tensors, out / "diffusion_pytorch_model.safetensors")
    _json(out / "scheduler_config.json", scheduler)
    _json(out / "config.json", config)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Parts of one tensor share their memory, which the format does not allow.
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    floating = [name for name, tensor in plain.items() if tensor.dtype == torch.float64]
    save_file(plain | {name: plain[name].float() for name in floating}, path, metadata={"format": "pt"})


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
