"""What a trunk and its autoencoder answered when a bundle was made, and whether they still do.

A bundle keeps NUM_PICTURES of its pictures, the hook's tokens on them and a few latents. Another version
of a library, another machine or a wrong normalisation shows when the hook is first read, not in a gallery of wrong pictures.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Tensor

from tiltscope.engine.errors import BundleError
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.readout import pool_latents
from tiltscope.engine.feature.sae import SparseAutoencoder
from tiltscope.engine.files import read_tensors

NUM_PICTURES = 2
NUM_LATENTS = 8
# Of RMS: float32 on machines of different vector width differs by about 1e-5.
TOLERANCE = 1e-3


def record(
    pixels: UInt8[Tensor, "batch 3 height width"],
    trunk: Trunk,
    sae: SparseAutoencoder,
    activations: Float[Tensor, "batch latents"],
) -> bytes:
    """A safetensors file of pictures, tokens and the latents that fire most on them; activations: of all latents."""
    latents = activations.amax(dim=0).argsort(descending=True, stable=True)[:NUM_LATENTS].sort().values
    tokens, found = _answers(pixels, trunk, sae, latents)
    return save({"pixels": pixels.contiguous(), "latents": latents, "tokens": tokens, "activations": found})


def check(path: Path, trunk: Trunk, sae: SparseAutoencoder) -> None:
    """Raises BundleError where trunk (of pictures) or autoencoder answer differently from the file, saying by how much."""
    kept = read_tensors(path, dtype=None)
    missing = {"pixels", "latents", "tokens", "activations"} - set(kept)
    if missing:
        raise BundleError(f"{path} holds no tensor {min(missing)!r}; make the bundle again")
    answers = _answers(kept["pixels"], trunk, sae, kept["latents"])
    for name, found in zip(("tokens", "activations"), answers, strict=True):
        off = float((found - kept[name]).square().mean().sqrt() / kept[name].square().mean().sqrt().clamp(min=1e-6))
        if not off <= TOLERANCE:
            raise BundleError(
                f"{trunk.hook}: {name} differ from those stored when the bundle was made by {off:.1e} of their size (RMS), "
                f"more than {TOLERANCE:.0e}; a file was exchanged, or a library computes differently: see the versions in "
                "bundle.json"
            )


@torch.no_grad()
def _answers(pixels: Tensor, trunk: Trunk, sae: SparseAutoencoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    tokens = trunk(pixels.float() / 127.5 - 1)
    chosen = SparseAutoencoder(sae.weight[latents], sae.bias[latents], sae.threshold[latents], sae.rescales)
    return tokens, pool_latents(tokens, chosen.readout(slice(None), trunk))
