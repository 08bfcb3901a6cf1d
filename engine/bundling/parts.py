"""The models that a bundle is made of: found in the folders that diffusers and transformers write, looked at, copied.

What a folder holds is read from its own files; what is said on the command line beside them (a hook, a size) is only what they
do not say. Knows files and configurations; must not know pictures.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tiltscope.engine.bundling.autoencoders import Autoencoder
from tiltscope.engine.bundling.prompt import empty_prompt, prompt_sources
from tiltscope.engine.bundling.weights import copy_file, copy_weights, weight_files
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.trunk import ARCHITECTURES
from tiltscope.engine.feature.trunk import FILES as TRUNK_FILES
from tiltscope.engine.files import read_json
from tiltscope.engine.prior.decoder import FILES as DECODER_FILES
from tiltscope.engine.prior.decoder import KINDS as DECODERS
from tiltscope.engine.prior.load import EDM_NETWORKS
from tiltscope.engine.prior.load import FILES as PRIOR_FILES
from tiltscope.engine.prior.prompted import PROMPT, check_config

# config.json's _class_name -> bundle.json's prior.kind.
PRIOR_KINDS = {
    "UNet2DModel": "diffusers_unet2d",
    "DiTTransformer2DModel": "diffusers_dit",
    "UNet2DConditionModel": "diffusers_unet2d_condition",
} | dict.fromkeys(EDM_NETWORKS, "edm")
# Where a diffusers pipeline keeps its network.
_NETWORKS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model: files to be copied as they are, and the files its weights are in, to become one."""

    path: str
    """its folder in the bundle"""
    copied: Mapping[str, Path]
    weights: tuple[str, tuple[Path, ...]]
    section: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """what bundle.json says of it"""
    made: Mapping[str, Callable[[], Mapping[str, Tensor]]] = field(
        default_factory=dict[str, Callable[[], Mapping[str, Tensor]]]
    )
    """safetensors files that are computed rather than copied"""
    made_from: tuple[Path, ...] = ()

    @property
    def sources(self) -> list[Path]:
        return [*self.copied.values(), *self.weights[1], *self.made_from]

    def copy(self, out: Path) -> None:
        """Into the bundle `out`; a file that is there is whole, so it stays."""
        folder = out / self.path
        for name, source in self.copied.items():
            if not (folder / name).is_file():
                copy_file(source, folder / name)
        name, sources = self.weights
        if not (folder / name).is_file():
            copy_weights(list(sources), folder / name)
        for name, make in self.made.items():
            if not (folder / name).is_file():
                temporary = folder / f".{name}.part"
                save_file(dict(make()), temporary)
                os.replace(temporary, folder / name)


def find_decoder(folder: Path) -> Part:
    """An AutoencoderKL's or AutoencoderTiny's folder."""
    config, weights = DECODER_FILES
    kind = read_json(folder / config).get("_class_name")
    if kind not in DECODERS:
        raise BundleError(f"{folder / config}: {kind!r} is not known; allowed: {', '.join(DECODERS)}")
    return Part(
        path="vae",
        copied={config: folder / config},
        weights=(weights, tuple(weight_files(folder, weights))),
        section={"path": "vae"},
    )


def find_prior(folder: Path, *, decoder: Path | None, pixel_unshuffle: int) -> tuple[Part, Part | None]:
    """A diffusers model folder with its scheduler_config.json, or a whole pipeline's. (prior, decoder of its latents).

    Raises ConfigError where there is no such folder or its samples are no pictures, BundleError for files that do not load here.
    """
    if not folder.is_dir():
        raise ConfigError(f"prior {folder} is not a folder; give one in diffusers' format")
    config, weights, scheduler = PRIOR_FILES
    inside = [folder / name for name in _NETWORKS if (folder / name / config).is_file()]
    network = folder if (folder / config).is_file() or not inside else inside[0]
    places = [network / scheduler, network / "scheduler" / scheduler, folder / "scheduler" / scheduler]
    schedule = next((place for place in places if place.is_file()), None)
    if schedule is None:
        raise BundleError(
            f"{folder} holds no {scheduler}, which says what the network predicts and at which noise levels; "
            f"put it beside {config} or into scheduler/"
        )
    described = read_json(network / config)
    kind = described.get("_class_name")
    if kind not in PRIOR_KINDS:
        raise BundleError(f"{network / config}: {kind!r} is not known; allowed: {', '.join(PRIOR_KINDS)}")
    shape = _sample_shape(described, network / config, pixel_unshuffle)
    vae = decoder or (folder / "vae" if network != folder and (folder / "vae" / config).is_file() else None)
    if vae is None and shape[0] != 3:
        raise ConfigError(
            f"prior {folder}: samples of shape {shape} are no pictures; give the decoder of its latents (--decoder FOLDER), or "
            "--pixel-unshuffle where pictures were folded into channels"
        )
    found = None if vae is None else find_decoder(vae)
    section: dict[str, Any] = {
        "kind": PRIOR_KINDS[kind],
        "path": "prior",
        "shape": shape,
        "pixel_unshuffle": pixel_unshuffle,
    }
    if found is not None:
        section["decoder"] = found.section
    copied = {config: network / config, scheduler: schedule}
    told: list[Path] = []
    if kind == "UNet2DConditionModel":
        check_config(described, network / config)
        told = prompt_sources(folder, network)
        if told == [network / PROMPT]:
            copied[PROMPT] = told.pop()
    prior = Part(
        path="prior",
        copied=copied,
        weights=(weights, tuple(weight_files(network, weights))),
        section=section,
        made={PROMPT: lambda: empty_prompt(folder)} if told else {},
        made_from=tuple(told),
    )
    return prior, found


def _sample_shape(config: Mapping[str, Any], path: Path, unshuffle: int) -> list[int]:
    side, channels = config.get("sample_size"), config.get("in_channels", 3)
    sides: list[Any] = side if isinstance(side, list) else [side, side]
    if type(channels) is not int or len(sides) != 2 or not all(type(each) is int and each > 0 for each in sides):
        raise BundleError(
            f"{path}: in_channels {channels!r} and sample_size {side!r} must be whole numbers: they are a sample's shape"
        )
    if unshuffle < 1 or channels % unshuffle**2:
        raise ConfigError(f"pixel_unshuffle: got {unshuffle}, which does not divide {channels} channels of {path}")
    return [channels // unshuffle**2, sides[0] * unshuffle, sides[1] * unshuffle]


def find_trunk(folder: Path) -> Part:
    """A transformers folder. Raises ConfigError where there is none, BundleError for an architecture that is not known."""
    if not folder.is_dir():
        raise ConfigError(f"trunk {folder} is not a folder; give one in transformers' format")
    config, weights, preprocessor = TRUNK_FILES
    kind = read_json(folder / config).get("model_type")
    if kind not in ARCHITECTURES:
        raise BundleError(f"{folder / config}: model_type {kind!r} is not known; allowed: {', '.join(ARCHITECTURES)}")
    if not (folder / preprocessor).is_file():
        raise BundleError(
            f"{folder} holds no {preprocessor}, whose image_mean and image_std are the release's normalisation; add it"
        )
    return Part(
        path="trunk",
        copied={config: folder / config, preprocessor: folder / preprocessor},
        weights=(weights, tuple(weight_files(folder, weights))),
        section={"kind": kind, "path": "trunk"},
    )


def find_evaluator(folder: Path) -> Part:
    """The network that judges pictures: of another bundle."""
    copied = {name: folder / name for name in ("config.json",) if (folder / name).is_file()}
    return Part(
        path="evaluator",
        copied=copied,
        weights=("model.safetensors", tuple(weight_files(folder, "model.safetensors"))),
        section={"kind": "efficientnet_lite0", "path": "evaluator"},
    )


def sae_section(found: Autoencoder, hook: str) -> dict[str, Any]:
    """bundle.json's entry of `saes`."""
    section: dict[str, Any] = {"hook": hook, "path": "sae", "kind": found.kind, "num_latents": found.num_latents}
    return section | ({"token_length": found.token_length} if found.token_length != "as_is" else {})
