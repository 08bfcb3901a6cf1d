"""EDM's and EDM2's networks from their authors' tensors to a folder of ours, and the settings from their names and shapes.

EDM's resampling filters are settings here, and what training told the network of augmentation is left out, as it is when
sampling. EDM2's layers divide their weights by their own length at every call and multiply by gains; both are folded in:

    w <- gain w / (|w|/sqrt n + 1e-4) / sqrt n        n weights an output

Source: Karras et al. 2022 (arXiv:2206.00364), 2024 (arXiv:2312.02696, equation 47); github.com/NVlabs/edm and edm2 for the names.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.edm2 import NORM_EPS

_BLOCK = re.compile(r"^enc\.(\d+)x\1_block(\d+)\.(?:conv1|conv_res1)\.weight$")
_ATTENDS = re.compile(r"^enc\.(\d+)x\1_block0\.(?:qkv|attn_qkv)\.weight$")
_FIRST = re.compile(r"^enc\.(\d+)x\1_conv\.weight$")
_LAST = re.compile(r"^dec\.\d+x\d+_aux_(norm|conv)\.")


def is_edm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of EDM's networks, or of EDM2's."""
    return any(_FIRST.match(name.removeprefix("unet.")) for name in tensors)


def convert_edm(tensors: Mapping[str, Tensor], *, head_channels: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in the names of engine/prior/edm.py and edm2.py, config.json). Raises BundleError for what these do not build."""
    inner = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if not name.startswith("logvar_")}
    for name in ("map_label.weight", "emb_label.weight"):
        if name in inner:
            raise BundleError(f"this network was trained with labels ({name}); allowed are unconditional ones")
    if odd := next((name for name in inner if re.search(r"_aux_(skip|down|up)\.", name)), None):
        raise BundleError(
            f"this network has a way beside its blocks that is not known ({odd}); allowed: none, or the residual one"
        )
    second = "emb_noise.weight" in inner
    need = ("emb_fourier.freqs", "out_conv.weight") if second else ("map_layer0.weight", "map_layer1.weight")
    if missing := [name for name in need if name not in inner]:
        raise BundleError(f"these weights are no whole network of EDM: {missing[0]} is missing")
    return _second(inner, head_channels) if second else _first(inner, head_channels)


def _levels(tensors: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """Of every side, the finest first: the channels of its encoder's blocks."""
    found: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if parts := _BLOCK.match(name):
            found.setdefault(int(parts[1]), []).append(tensor.shape[0])
    if not found:
        raise BundleError("these weights are no whole network of EDM: they hold no block of an encoder")
    return dict(sorted(found.items(), reverse=True))


def _shared(tensors: Mapping[str, Tensor], levels: Mapping[int, list[int]]) -> dict[str, Any]:
    return {
        "sample_size": max(levels),
        "num_blocks": len(levels[max(levels)]),
        "attn_resolutions": sorted((int(parts[1]) for parts in map(_ATTENDS.match, tensors) if parts), reverse=True),
    }


def _first(tensors: Mapping[str, Tensor], head_channels: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    levels = _levels(tensors)
    song = "out_conv.weight" not in tensors
    filters = [tensor for name, tensor in tensors.items() if name.endswith("resample_filter")]
    found = {
        _LAST.sub(r"out_\1.", name).replace("map_noise.", "time_proj."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("resample_filter") and not name.startswith("map_augment.")
    }
    opening = tensors[f"enc.{max(levels)}x{max(levels)}_conv.weight"]
    width = opening.shape[0] if song else tensors["map_layer0.weight"].shape[1]
    config = {
        "_class_name": "SongUNet" if song else "DhariwalUNet",
        **_shared(tensors, levels),
        "in_channels": opening.shape[1],
        "out_channels": found["out_conv.weight"].shape[0] if "out_conv.weight" in found else opening.shape[1],
        "model_channels": width,
        "channel_mult": [blocks[-1] // width for blocks in levels.values()],
        "channel_mult_noise": tensors["map_layer0.weight"].shape[1] // width,
        "channel_mult_emb": tensors["map_layer0.weight"].shape[0] // width,
        "channels_per_head": None if song else head_channels,
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "encoder_type": "residual" if any("_aux_residual." in name for name in tensors) else "standard",
        "resample_smooth": after_a_box(filters[0].double().sum((0, 1, 2)).tolist() if filters else [0.5, 0.5]),
    }
    return found, config


def _second(tensors: Mapping[str, Tensor], head_channels: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    levels = _levels(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_gain"):
            continue
        gain = tensors.get(name.replace("emb_linear.weight", "emb_gain").replace("out_conv.weight", "out_gain"))
        folded = name.endswith(".weight")
        ours = name.replace("emb_fourier.", "time_proj.")
        found[ours] = _folded(tensor, None if gain is tensor else gain) if folded else tensor
    opening = tensors[f"enc.{max(levels)}x{max(levels)}_conv.weight"]
    config = {
        "_class_name": "EDM2UNet",
        **_shared(tensors, levels),
        "in_channels": opening.shape[1] - 1,
        "out_channels": tensors["out_conv.weight"].shape[0],
        "channels": [blocks[-1] for blocks in levels.values()],
        "noise_channels": tensors["emb_noise.weight"].shape[1],
        "emb_channels": tensors["emb_noise.weight"].shape[0],
        "channels_per_head": head_channels,
    }
    return found, config


def _folded(weight: Tensor, gain: Tensor | None) -> Tensor:
    rows = weight.double().flatten(1)
    root = math.sqrt(rows.shape[1])
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) / root + NORM_EPS) / root
    return (rows if gain is None else rows * gain.double()).float().view_as(weight)


def after_a_box(weights: Iterable[float]) -> list[float]:
    """g where the filter is [1/2, 1/2] * g. Raises BundleError where there is none."""
    f = list(weights)
    g: list[float] = []
    for weight in f[:-1]:
        g.append(2 * weight - (g[-1] if g else 0.0))
    if not g or abs(2 * f[-1] - g[-1]) > 1e-6 or len(g) % 2 == 0:
        raise BundleError(
            f"resampling filter {f} is not known; allowed: an even number of weights, such as [1, 1], [1, 3, 3, 1]"
        )
    return g
