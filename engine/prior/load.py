"""From a folder in diffusers' format to a denoiser. Offline; only JSON and safetensors are read, no code of the folder is run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltscope.engine.batch_invariant import replace_modules
from tiltscope.engine.errors import BundleError
from tiltscope.engine.files import read_json, read_tensors
from tiltscope.engine.prior.diffusers_packages import defer_siblings
from tiltscope.engine.prior.dit import DiT
from tiltscope.engine.prior.edm import FAMILIES, EDMUNet
from tiltscope.engine.prior.edm2 import EDM2UNet
from tiltscope.engine.prior.network import NetworkDenoiser, TimeEmbedding
from tiltscope.engine.prior.prompted import PROMPT, check_config, prompted_unet, read_prompt, with_prompt
from tiltscope.engine.prior.schedulers import read_scheduler
from tiltscope.engine.weights import assign_weights

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
FILES = (CONFIG, WEIGHTS, SCHEDULER)
# config.json's _class_name -> what is built, of kind `edm`.
EDM_NETWORKS: dict[str, Any] = dict.fromkeys(FAMILIES, EDMUNet) | {"EDM2UNet": EDM2UNet}


def load_denoiser(
    folder: Path,
    *,
    kind: str,
    shape: tuple[int, ...],
    pixel_unshuffle: int = 1,
    stated: Mapping[str, Any] | None = None,
) -> NetworkDenoiser:
    """The denoiser of a prior folder: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json; float32, CPU.

    kind is a key of KINDS; shape the public [channel, height, width]; stated: what bundle.json says of the prior, compared with
    the scheduler's own file. Raises BundleError naming the file and what is allowed, and both values where two differ.
    """
    if kind not in KINDS:
        raise BundleError(f"prior kind {kind!r} is not known; allowed: {', '.join(KINDS)}")
    process = read_scheduler(read_json(folder / SCHEDULER), folder / SCHEDULER, stated or {})
    config = read_json(folder / CONFIG)
    channels = shape[0] * pixel_unshuffle**2
    learned_range = _tells_variance(config, channels, folder)
    if process.variance_type is not None and (process.variance_type == "learned_range") != learned_range:
        raise BundleError(
            f"{folder / CONFIG}: out_channels is {config.get('out_channels')!r} for {channels} channels, but variance_type of "
            f"{folder / SCHEDULER} is {process.variance_type!r}; twice the channels go with 'learned_range', and only with it"
        )
    if learned_range and pixel_unshuffle > 1:
        raise BundleError(f"{folder / CONFIG}: a learned variance goes with pixel_unshuffle 1, got {pixel_unshuffle}")
    defer_siblings()
    return NetworkDenoiser(
        KINDS[kind](folder, config, (channels, shape[1] // pixel_unshuffle, shape[2] // pixel_unshuffle)),
        levels=process.levels,
        prediction=process.prediction,
        pixel_unshuffle=pixel_unshuffle,
        learned_range=learned_range,
        time_scale=process.time_scale,
        sigma_data=process.sigma_data,
    )


def _tells_variance(config: Mapping[str, Any], channels: int, folder: Path) -> bool:
    """Whether out_channels is twice the channels. Raises BundleError where channels are anything else."""
    default = config.get("in_channels") if config.get("_class_name") == "DiTTransformer2DModel" else 3
    found = config.get("out_channels", default) or config.get("in_channels")
    if config.get("in_channels", 3) != channels:
        raise BundleError(
            f"{folder / CONFIG}: in_channels must be {channels!r} here, got {config.get('in_channels')!r}"
        )
    if found not in (channels, 2 * channels):
        raise BundleError(
            f"{folder / CONFIG}: out_channels must be {channels!r} here, or {2 * channels} with a learned variance, got {found!r}"
        )
    return found == 2 * channels


def load_unet2d(folder: Path, config: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """diffusers' UNet2DModel, unconditional, positional time embedding: ADM's and DDPM's U-Nets too. Raises BundleError."""
    from diffusers.models.unets.unet_2d import UNet2DModel  # seconds to import: only where there is a network to load

    del shape
    expected = {
        "time_embedding_type": "positional",
        "class_embed_type": None,
        "num_class_embeds": None,
        "center_input_sample": False,
    }
    defaults = {"time_embedding_type": "positional", "center_input_sample": False}
    for name, value in expected.items():
        if config.get(name, defaults.get(name)) != value:
            raise BundleError(f"{folder / CONFIG}: {name} must be {value!r} here, got {config.get(name)!r}")
    unet: Any = _built(UNet2DModel, folder, config)
    unet.time_proj = TimeEmbedding(
        unet.config.block_out_channels[0],
        flip_sin_to_cos=unet.config.flip_sin_to_cos,
        downscale_freq_shift=float(unet.config.freq_shift),
    )
    assign_weights(unet, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    # Only now: loading needs the parameters where diffusers has them, sampling needs bits that no batch mate can change.
    replace_modules(unet)
    return unet


def load_dit(folder: Path, config: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the null class: DiT, and transformers of the same form trained as flows (SiT)."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    _check_side(config.get("sample_size", 32), shape, folder)
    ours = {"time_embedding_shift"}
    transformer: Any = _built(
        DiTTransformer2DModel, folder, {name: value for name, value in config.items() if name not in ours}
    )
    assign_weights(transformer, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    shift = config.get("time_embedding_shift", 1)
    if shift not in (0, 1):
        raise BundleError(
            f"{folder / CONFIG}: time_embedding_shift is {shift!r}; allowed: 1 (diffusers'), 0 (the original's)"
        )
    network = DiT(transformer, time_embedding_shift=float(shift))
    replace_modules(network)
    return network


def load_unet2d_condition(folder: Path, config: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """diffusers' UNet2DConditionModel with the empty prompt (prompted.py): Stable Diffusion 1 and 2. Raises BundleError."""
    del shape
    check_config(config, folder / CONFIG)
    tokens = read_prompt(folder / PROMPT, config.get("cross_attention_dim", 1280))
    unet: Any = _built(prompted_unet(), folder, config, name="UNet2DConditionModel")
    assign_weights(unet, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    network = with_prompt(unet, tokens)
    replace_modules(network)
    return network


def load_edm(folder: Path, config: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """A network of EDM or EDM2, as `tiltscope convert` writes it (edm.py, edm2.py). Raises BundleError."""
    name: Any = config.get("_class_name")
    _check_side(config.get("sample_size"), shape, folder)
    if name not in EDM_NETWORKS:
        raise BundleError(f"{folder / CONFIG}: {name!r} is not known; allowed: {', '.join(EDM_NETWORKS)}")
    network = _built(EDM_NETWORKS[name], folder, config, name=name)
    assign_weights(network, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return network


def _check_side(side: Any, shape: tuple[int, ...], folder: Path) -> None:
    if shape[1:] != (side, side):
        raise BundleError(
            f"{folder / CONFIG}: sample_size is {side!r}, but samples of the bundle are {list(shape[1:])}"
        )


def _built(kind: Any, folder: Path, config: Mapping[str, Any], *, name: str | None = None) -> Any:
    """The library's model without values. Raises BundleError where config.json is of another class, or describes none.

    name: what the library calls it, where `kind` is ours.
    """
    name = name or kind.__name__
    if config.get("_class_name") != name:
        raise BundleError(f"{folder / CONFIG}: {config.get('_class_name')!r} is not known; allowed: {name}")
    try:
        with torch.device("meta"):  # no random initialisation, and no draw from the global generator
            return kind.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BundleError(f"{folder / CONFIG} does not describe a {name}: {error}") from error


# bundle.json's prior.kind -> a function (folder, config.json, [channel, height, width] of its input) -> network(x, t).
KINDS: dict[str, Callable[[Path, Mapping[str, Any], tuple[int, ...]], nn.Module]] = {
    "diffusers_unet2d": load_unet2d,
    "diffusers_dit": load_dit,
    "diffusers_unet2d_condition": load_unet2d_condition,
    "edm": load_edm,
}


def files_of(kind: str) -> tuple[str, ...]:
    """The files of a prior's folder."""
    return (*FILES, PROMPT) if kind == "diffusers_unet2d_condition" else FILES
