"""Autoencoders as they are published, brought to the one normal form that bundles hold (engine/feature/sae.py).

folder with cfg.json, sae_weights.safetensors      SAELens
folder with sae.safetensors (config.json)          normal form
a .safetensors file                                normal form, or a linear probe's weight and bias
anything pickled (saev, overcomplete)              `tiltscope convert` first
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tiltscope.engine.bundling.sae_formats import Read, from_probe, from_saelens
from tiltscope.engine.bundling.weights import PICKLES
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.sae import KINDS, SparseAutoencoder, load_sae
from tiltscope.engine.files import read_json, read_tensors, tensor_names

FILE, CONFIG = "sae.safetensors", "config.json"
SAELENS_FILE, SAELENS_CONFIG = "sae_weights.safetensors", "cfg.json"


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
        write_normal_form(self.sae, folder)


def write_normal_form(sae: SparseAutoencoder, folder: Path) -> None:
    """sae.safetensors, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": sae.weight, "encoder.bias": sae.bias, "threshold": sae.threshold}
    temporary = folder / f".{FILE}.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, folder / FILE)


def import_sae(path: Path, *, kind: str | None = None, token_length: str | None = None) -> Autoencoder:
    """The autoencoder of a folder or file in one of the module's formats.

    kind, token_length: of the normal form, what its files do not say. Raises ConfigError where there is none, BundleError where
    it does not load.
    """
    if (path / SAELENS_CONFIG).is_file():
        files = (path / SAELENS_FILE, path / SAELENS_CONFIG)
        return _read(from_saelens(read_json(files[1]), read_tensors(files[0])), files, "SAELens")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"sae {path} is not there; give a .safetensors file, or a folder that holds {FILE}")
    if any(file.match(pattern) for pattern in PICKLES):
        raise ConfigError(f"sae {path} is pickled; `tiltscope convert` makes a folder of it that can be read")
    if not path.is_dir() and "weight" in tensor_names(file):
        return _read(from_probe(read_tensors(file)), (file,), "linear probe")
    return _normal(path, file, kind, token_length)


def _read(found: Read, sources: tuple[Path, ...], what: str) -> Autoencoder:
    return Autoencoder(sae=found.sae, kind=found.kind, hook=found.hook, sources=sources, facts={"imported_from": what})


def _normal(path: Path, file: Path, kind: str | None, token_length: str | None) -> Autoencoder:
    described = path / CONFIG if path.is_dir() else None
    config = read_json(described) if described is not None and described.is_file() else {}
    chosen = str(kind or config.get("kind") or "")
    if not chosen:
        raise ConfigError(f"sae {path} does not say its kind; give --sae-kind: {', '.join(KINDS)}")
    length = str(token_length or config.get("token_length") or "as_is")
    hook = config.get("hook")
    if hook is not None and not isinstance(hook, str):
        raise BundleError(f"{described}: hook must be a text, got {hook!r}")
    sources = (file, described) if described is not None and config else (file,)
    return Autoencoder(sae=load_sae(file, kind=chosen, token_length=length), kind=chosen, hook=hook, sources=sources)
