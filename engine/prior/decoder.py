"""From latents to pictures: the decoder half of an autoencoder in diffusers' format. The encoder is neither built nor read.

    AutoencoderKL      picture = decoder(post_quant_conv(x0 / scaling_factor + shift_factor))
    AutoencoderTiny    picture = decoder(x0 / scaling_factor + shift_factor)

or, of an autoencoder with latents_mean and latents_std [channel],  x0 std/scaling_factor + mean  in the place of both.

x0 is the denoiser's, of about unit variance; the picture is about [-1, 1] and not clamped, so that its gradient lives beyond.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import replace_modules
from tiltscope.engine.errors import BundleError
from tiltscope.engine.files import read_json, read_tensors, tensor_names
from tiltscope.engine.prior.diffusers_packages import defer_siblings
from tiltscope.engine.weights import assign_weights

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FILES = (CONFIG, WEIGHTS)
# Of the file and of no decoding.
_ENCODER = ("encoder.", "quant_conv.")
# Attention as diffusers named it before 0.18; Stable Diffusion's own files still do.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Decoder(nn.Module):
    """x0 [batch, *shape] -> picture [batch, 3, height, width]. picture_shape: (3, height, width) for latents of `shape`."""

    def __init__(
        self,
        decoder: nn.Module,
        post_quant_conv: nn.Module | None,
        *,
        shape: tuple[int, ...],
        factor: int,
        scale: list[float],
        shift: list[float],
    ) -> None:
        """scale, shift: of every channel, or one of all."""
        super().__init__()
        self.decoder, self.post_quant_conv = decoder, post_quant_conv
        self.shape, self.picture_shape = shape, (3, shape[1] * factor, shape[2] * factor)
        self.scale = nn.Buffer(torch.tensor(scale).view(-1, 1, 1), persistent=False)
        self.shift = nn.Buffer(torch.tensor(shift).view(-1, 1, 1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x0: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        latent = x0.to(self.dtype) / self.scale + self.shift
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent)

    def in_dtype(self, dtype: torch.dtype, device: torch.device) -> "Decoder":
        """A copy in dtype on device; self is not changed."""
        other = copy.deepcopy(self)
        other.to(device=device, dtype=dtype)
        return other


def load_decoder(folder: Path, *, shape: tuple[int, ...]) -> Decoder:
    """The decoder of an AutoencoderKL or AutoencoderTiny folder for latents of `shape`, float32, on the CPU.

    Raises BundleError naming the file and what is allowed.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise BundleError(f"{folder / CONFIG}: {kind!r} is not known; allowed: {', '.join(KINDS)}")
    defer_siblings()
    try:
        with torch.device("meta"):
            whole, factor = KINDS[kind](config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BundleError(f"{folder / CONFIG} does not describe an {kind}: {error}") from error
    if (channels := whole.config.latent_channels) != shape[0]:
        raise BundleError(
            f"{folder / CONFIG}: latent_channels is {channels!r}, but samples of the prior have {shape[0]}"
        )
    scale, shift = _of_unit_variance(whole.config, folder / CONFIG)
    decoder = Decoder(
        whole.decoder,
        getattr(whole, "post_quant_conv", None),
        shape=shape,
        factor=factor,
        scale=scale,
        shift=shift,
    )
    held = {name: _renamed(name) for name in tensor_names(folder / WEIGHTS) if not name.startswith(_ENCODER)}
    wanted = decoder.state_dict()
    tensors = {held[name]: tensor for name, tensor in read_tensors(folder / WEIGHTS, held).items()}
    for name, tensor in tensors.items():
        # The old attention was a 1x1 convolution in some files.
        if name in wanted and tensor.ndim == 4 and wanted[name].ndim == 2:
            tensors[name] = tensor[:, :, 0, 0]
    assign_weights(decoder, tensors, folder / WEIGHTS)
    replace_modules(decoder)
    return decoder.eval().requires_grad_(False)


def _of_unit_variance(config: Any, path: Path) -> tuple[list[float], list[float]]:
    """(scale, shift), x0 = (latent - shift) scale, one number or one a channel. Raises BundleError."""
    factor = float(config.scaling_factor)
    mean: Any = config.get("latents_mean")
    std: Any = config.get("latents_std")
    if mean is None and std is None:
        return [factor], [float(config.shift_factor or 0.0)]
    num = config.latent_channels
    told = [list(each) if isinstance(each, list | tuple) else [] for each in (mean, std)]
    if any(len(each) != num for each in told) or min(told[1]) <= 0:
        raise BundleError(
            f"{path}: latents_mean {mean!r} and latents_std {std!r} must both hold {num} numbers, the latter positive"
        )
    return [factor / each for each in told[1]], [float(each) for each in told[0]]


def _renamed(name: str) -> str:
    parts = name.split(".")
    if "attentions" not in parts:
        return name
    return ".".join(_RENAMED.get(part, part) for part in parts)


def _kl(config: Mapping[str, Any]) -> tuple[Any, int]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    whole: Any = AutoencoderKL.from_config(dict(config))
    return whole, 2 ** (len(whole.config.block_out_channels) - 1)


def _tiny(config: Mapping[str, Any]) -> tuple[Any, int]:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    # A name that diffusers writes for others to read, and warns about when it reads it itself.
    whole: Any = AutoencoderTiny.from_config({k: v for k, v in config.items() if k != "block_out_channels"})
    factor = whole.config.upsampling_scaling_factor ** (len(whole.config.num_decoder_blocks) - 1)
    return whole, int(factor)


# config.json's _class_name -> (the library's model, pixels of a picture a latent pixel).
KINDS = {"AutoencoderKL": _kl, "AutoencoderTiny": _tiny}
