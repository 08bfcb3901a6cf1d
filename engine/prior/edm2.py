"""EDM2's U-Net as a network(x, t), t = log(sigma/alpha)/4: every layer keeps the magnitude of what it is given.

    silu(x)/.596,    (1 - w) a + w b over sqrt((1 - w)^2 + w^2),    x/|x| over the channels of a pixel

Its layers are convolutions with weights of fixed length and a few learned gains; both are folded into plain weights when a
checkpoint is converted (engine/convert/edm.py), exactly. Modules have their authors' names. No labels.
Source: Karras et al. 2024 (arXiv:2312.02696), equations 47, 75, 81, 88, 103 and figure 21.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import Linear, silu
from tiltscope.engine.prior.edm import Fourier, Resample, attention, resampled
from tiltscope.engine.prior.network import Waves

_SILU_SCALE = 0.596
# Shares of a block's new part, of its attention, and of what the decoder takes over from the encoder; bound of activations.
_NEW, _ATTENTION, _TAKEN, _BOUND = 0.3, 0.3, 0.5, 256.0
NORM_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of config.json, under the constructor's names; `channels` has one entry a level, the finest first."""

    sample_size: int
    in_channels: int
    out_channels: int
    channels: list[int]
    noise_channels: int
    emb_channels: int
    num_blocks: int
    attn_resolutions: list[int]
    channels_per_head: int = 64


def unit_length(x: Tensor, axis: int) -> Tensor:
    """x/(|x|/sqrt n + 1e-4), n entries along the axis: a mean square of 1."""
    return x / (x.square().mean(axis, keepdim=True).sqrt() + NORM_EPS)


def _silu(x: Tensor) -> Tensor:
    return silu(x) / _SILU_SCALE


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    scale = 1 / math.hypot(1 - share, share)
    return a * ((1 - share) * scale) + b * (share * scale)


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """Both along the channels, each with the magnitude that its share of them would have."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt((num_a + num_b) / ((1 - _TAKEN) ** 2 + _TAKEN**2))
    return torch.cat([a * (scale * (1 - _TAKEN) / math.sqrt(num_a)), b * (scale * _TAKEN / math.sqrt(num_b))], dim=1)


def _convolution(inputs: int, outputs: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)


class PhasedFourier(Fourier):
    """sqrt 2 cos(f t + phase); both were drawn once."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self.phases = nn.Buffer(torch.empty(num))

    def forward(self, t: Float[Tensor, "batch"]) -> Float64[Tensor, "batch channel"]:
        phase = t.to(torch.float64)[:, None] * self.freqs.to(torch.float64) + self.phases.to(torch.float64)
        return math.sqrt(2) * phase.cos()

    def waves(self) -> Waves:
        return Waves(tuple(self.freqs.double().tolist()), tuple(self.phases.double().tolist()), math.sqrt(2))


class _Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, settings: Settings, *, encodes: bool, how: Resample, attends: bool
    ) -> None:
        super().__init__()
        self.encodes = encodes
        self.how: Resample = how
        self.conv_res0 = _convolution(outputs if encodes else inputs, outputs, 3)
        self.emb_linear = Linear(settings.emb_channels, outputs, bias=False)
        self.conv_res1 = _convolution(outputs, outputs, 3)
        self.conv_skip = _convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.num_heads = outputs // settings.channels_per_head if attends else 0
        if attends:
            self.attn_qkv = _convolution(outputs, 3 * outputs, 1)
            self.attn_proj = _convolution(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resampled(x, self.how)
        if self.encodes:
            x = unit_length(self.conv_skip(x), 1)
        h = self.conv_res0(_silu(x)) * (1 + self.emb_linear(emb)[:, :, None, None])
        h = self.conv_res1(_silu(h))
        x = _mixed(x if self.encodes else self.conv_skip(x), h, _NEW)
        if self.num_heads:
            h = attention(self.attn_qkv(x), self.num_heads, lambda parts: unit_length(parts, 2))
            x = _mixed(x, self.attn_proj(h), _ATTENTION)
        return x.clamp(-_BOUND, _BOUND)


class EDM2UNet(nn.Module):
    """network(x, t) -> (F,), built without values from config.json. Raises TypeError and ValueError where that does not fit."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.time_proj = PhasedFourier(settings.noise_channels)
        self.emb_noise = Linear(settings.noise_channels, settings.emb_channels, bias=False)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [settings.sample_size >> level for level in range(len(settings.channels))]

        def block(inputs: int, outputs: int, *, encodes: bool, how: Resample = "keep", attends: bool = False) -> _Block:
            return _Block(inputs, outputs, settings, encodes=encodes, how=how, attends=attends)

        width = settings.channels[0]
        # One more channel than the picture has: of ones, in the place of biases.
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = _convolution(settings.in_channels + 1, width, 3)
        kept = [width]
        for side, outputs in zip(sides, settings.channels, strict=True):
            attends = side in settings.attn_resolutions
            if side != sides[0]:
                self.enc[f"{side}x{side}_down"] = block(width, width, encodes=True, how="down")
                kept.append(width)
            for at in range(settings.num_blocks):
                self.enc[f"{side}x{side}_block{at}"] = block(width, outputs, encodes=True, attends=attends)
                width = outputs
                kept.append(width)
        for side, outputs in zip(reversed(sides), reversed(settings.channels), strict=True):
            attends = side in settings.attn_resolutions
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = block(width, width, encodes=False, attends=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width, encodes=False)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, encodes=False, how="up")
            for at in range(settings.num_blocks + 1):
                self.dec[f"{side}x{side}_block{at}"] = block(
                    width + kept.pop(), outputs, encodes=False, attends=attends
                )
                width = outputs
        self.out_conv = _convolution(width, settings.out_channels, 3)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDM2UNet":
        return cls(Settings(**{name: value for name, value in config.items() if not name.startswith("_")}))

    def forward(
        self, x: Float[Tensor, "batch channel height width"], t: Float[Tensor, "batch"], return_dict: bool = False
    ) -> tuple[Tensor]:
        del return_dict
        emb = _silu(self.emb_noise(self.time_proj(t).to(x.dtype)))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        kept = list[Tensor]()
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, _Block) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            x = layer(_beside(x, kept.pop()) if "_block" in name else x, emb)
        return (self.out_conv(x),)
