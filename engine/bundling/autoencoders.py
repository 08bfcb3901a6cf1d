"""Autoencoders as they are published, brought to the one normal form that bundles hold (engine/feature/sae.py)."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.sae import KINDS, SparseAutoencoder, load_sae
from tiltscope.engine.files import read_json

FILE, CONFIG = "sae.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """An autoencoder in normal form, and what its files say of it. hook: where it reads, None where they do not say."""

    sae: SparseAutoencoder
    kind: str
    hook: str | None
    sources: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_latents(self) -> int:
        return self.sae.num_latents

    @property
    def token_length(self) -> str:
        return "sqrt_width" if self.sae.rescales else "as_is"

    def write(self, folder: Path) -> None:
        """sae.safetensors in normal form, float32."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"encoder.weight": self.sae.weight, "encoder.bias": self.sae.bias, "threshold": self.sae.threshold}
        temporary = folder / f".{FILE}.part"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, folder / FILE)


def import_sae(path: Path, *, kind: str | None = None, token_length: str | None = None) -> Autoencoder:
    """The autoencoder of a folder (sae.safetensors, config.json) or of a .safetensors file.

    kind, token_length: what its files do not say. Raises ConfigError where there is none, BundleError where it does not load.
    """
    folder = path if path.is_dir() else path.parent
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"sae {path} is not there; give a .safetensors file, or a folder that holds {FILE}")
    config = read_json(folder / CONFIG) if path.is_dir() and (folder / CONFIG).is_file() else {}
    chosen = str(kind or config.get("kind") or "")
    if not chosen:
        raise ConfigError(f"sae {path} does not say its kind; give --sae-kind: {', '.join(KINDS)}")
    length = str(token_length or config.get("token_length") or "as_is")
    hook = config.get("hook")
    if hook is not None and not isinstance(hook, str):
        raise BundleError(f"{folder / CONFIG}: hook must be a text, got {hook!r}")
    sources = (file, *((folder / CONFIG,) if config else ()))
    return Autoencoder(
        sae=load_sae(file, kind=chosen, token_length=length), kind=chosen, hook=hook, sources=sources, facts={}
    )
