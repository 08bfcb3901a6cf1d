"""The baseline: a guided row as one would write it with diffusers, transformers and autograd, and nothing of this engine.

The libraries' own models, loaded from the bundle's folders by the libraries; the whole trunk, all latents of the autoencoder, and
one backward pass through everything. What it computes is the same, and is held to it (cases.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.address import DEFAULT_POOLING
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.files import read_json


class PlainStep:
    """D, activation, drive and grad_a of a bundle's feature: an autoencoder's latent, pooled over the central half.

    The bundle's trunk must be a DINOv3 ViT and its prior a UNet2DModel that predicts x0 on the native levels. Raises ConfigError
    for another feature.
    """

    def __init__(self, bundle: Bundle, feature: Feature) -> None:
        from diffusers.models.unets.unet_2d import UNet2DModel
        from transformers import AutoModel

        address = feature.address
        if (
            address is None
            or address.kind != "sae"
            or address.pooling != DEFAULT_POOLING
            or bundle.prior.levels is None
        ):
            raise ConfigError(f"the plain baseline reads latents pooled over the centre; got {feature.name}")
        meta = bundle.meta
        self.factor = int(meta["prior"].get("pixel_unshuffle", 1))
        self.unet: Any = UNet2DModel.from_pretrained(bundle.path / meta["prior"]["path"]).float().eval()
        self.trunk: Any = AutoModel.from_pretrained(bundle.path / meta["trunk"]["path"]).float().eval()
        # transformers' image processor of DINOv3 needs torchvision; what it would do to a tensor is these two numbers a channel.
        processor = read_json(bundle.path / meta["trunk"]["path"] / "preprocessor_config.json")
        self.mean, self.std = (torch.tensor(processor[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        folder = next(each["path"] for each in meta["saes"] if each["hook"] == address.hook)
        self.sae = {name: t.float() for name, t in load_file(bundle.path / folder / "sae.safetensors").items()}
        self.layer, self.latent = int(address.hook.removeprefix("blocks.")), int(address.index)
        self.sigmas = torch.from_numpy(bundle.prior.levels.copy()).flip(0)

    def __call__(self, x: Float[Tensor, "batch 3 height width"], level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(D, activation, drive, grad_a) at the network's own level."""
        x = x.detach().requires_grad_()
        x0_hat = self.denoise(x, level)
        activation, drive = self.measure(x0_hat)
        (grad_a,) = torch.autograd.grad(drive.sum(), x)
        return x0_hat.detach(), activation.detach(), drive.detach(), grad_a

    def denoise(self, x: Float[Tensor, "batch 3 height width"], level: int) -> Float[Tensor, "batch 3 height width"]:
        """E[x0 | x] at the network's own level."""
        folded = self.unet(F.pixel_unshuffle(x, self.factor), level).sample
        return F.pixel_shuffle(folded, self.factor)

    def measure(self, x0_hat: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """(activation, drive), by the whole trunk and every latent."""
        pixels = ((x0_hat + 1) / 2 - self.mean) / self.std
        hidden = self.trunk(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        patches = hidden[:, 1 + self.trunk.config.num_register_tokens :]
        pre = patches @ self.sae["encoder.weight"].T + self.sae["encoder.bias"]
        latents = torch.where(pre > self.sae["threshold"], pre, 0.0)
        activation, drive = (self._pool(each[..., self.latent]) for each in (latents, pre))
        return activation, drive

    def _pool(self, values: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch"]:
        side = round(values.shape[1] ** 0.5)
        centre = values.unflatten(1, (side, side))[
            :, side // 4 : side - side // 4, side // 4 : side - side // 4
        ].flatten(1)
        return 0.7 * centre.amax(1) + 0.3 * centre.mean(1)
