"""The U-Nets of EDM as a network(x, t), t = log(sigma/alpha)/4: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM's).

    h = conv1(silu(norm1(conv0(silu(norm0(x)))) told of emb)),    x <- s (skip(x) + h),    x <- s (x + attention(norm2(x)))

A block's first convolution and its skip may halve or double the grid. Modules and settings have their authors' names, so that
tensors fit as they are, but for the time embedding, which is time_proj everywhere here; engine/convert/edm.py writes the folder.
No labels, and nothing is told of augmentation, as when sampling.
Source: Karras et al. 2022 (arXiv:2206.00364), appendix F.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import Linear, silu
from tiltscope.engine.prior.network import TimeEmbedding, Waves

Resample = Literal["keep", "up", "down"]
_BOX = (1.0,)


class Family(NamedTuple):
    """What the two networks do differently and no setting says.

    head_channels: None for one head. projects: a block that resamples has a convolution on its skip. attends_always: every
    decoder block of an attending level, not its last alone. shift: of the time embedding's frequencies; cosine_first: its halves.
    """

    adaptive_scale: bool
    skip_scale: float
    eps: float
    head_channels: int | None
    projects: bool
    attends_always: bool
    shift: float
    cosine_first: bool


FAMILIES = {
    "SongUNet": Family(False, math.sqrt(0.5), 1e-6, None, True, False, 1.0, False),
    "DhariwalUNet": Family(True, 1.0, 1e-5, 64, False, True, 0.0, True),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of config.json, under the constructors' names; resample_smooth is what a box of two pixels is smoothed by."""

    sample_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: list[int]
    channel_mult_noise: int = 1
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: list[int]
    channels_per_head: int | None = None
    embedding_type: Literal["positional", "fourier"] = "positional"
    encoder_type: Literal["standard", "residual"] = "standard"
    resample_smooth: tuple[float, ...] = _BOX


def smoothed(x: Float[Tensor, "batch channel _ _"], weights: tuple[float, ...], padding: int) -> Tensor:
    """x, with `padding` zeros around it, convolved with weights x weights in every channel."""
    if len(weights) == 1:
        return x
    x = F.pad(x, (padding,) * 4)
    for axis in (2, 3):
        length = x.shape[axis] - len(weights) + 1
        parts = [weight * x.narrow(axis, at, length) for at, weight in enumerate(weights)]
        x = torch.stack(parts).sum(0)
    return x


def resampled(x: Float[Tensor, "batch channel _ _"], how: Resample, smooth: tuple[float, ...] = _BOX) -> Tensor:
    """The grid halved or doubled by a box of two pixels convolved with `smooth`: [1, 1], or [1, 3, 3, 1] = [1, 1] * [1, 2, 1]."""
    if how == "up":
        return smoothed(F.interpolate(x, scale_factor=2.0, mode="nearest"), smooth, len(smooth) // 2)
    if how == "down":
        return F.avg_pool2d(smoothed(x, smooth, len(smooth) // 2), 2)
    return x


def attention(
    qkv: Float[Tensor, "batch channel height width"], heads: int, scaled: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "batch third height width"]:
    """softmax(q' k/sqrt d) v over places; channels are [heads, d, (q, k, v)]. scaled: of q, k and v, over dimension 2."""
    parts = qkv.unflatten(1, (heads, -1, 3)).flatten(4)
    q, k, v = (parts if scaled is None else scaled(parts)).transpose(2, 4).unbind(3)
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, qkv.shape[2:])


class Fourier(nn.Module):
    """(sin, cos)(2 pi f t) of frequencies that were drawn once: they stay in float32 whatever the network's precision."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.freqs = nn.Buffer(torch.empty(num))

    def _apply(self, fn: Any, recurse: bool = True) -> "Fourier":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(moved, recurse)

    def forward(self, t: Float[Tensor, "batch"]) -> Float64[Tensor, "batch channel"]:
        phase = t.to(torch.float64)[:, None] * (2 * math.pi * self.freqs.to(torch.float64))
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    def waves(self) -> Waves:
        each = (2 * math.pi * self.freqs.double()).tolist()
        return Waves((*each, *each), (-math.pi / 2,) * len(each) + (0.0,) * len(each), 1.0)


class _Convolution(nn.Conv2d):
    """A convolution after the grid was resampled."""

    def __init__(self, inputs: int, outputs: int, side: int, how: Resample, smooth: tuple[float, ...]) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2)
        self.how: Resample = how
        self.smooth = smooth

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(resampled(input, self.how, self.smooth))


class _Shortcut(nn.Conv2d):
    """NCSN++'s second way down, a level each: the convolution comes first, and its output beyond the edge is smoothed too."""

    def __init__(self, inputs: int, outputs: int, smooth: tuple[float, ...]) -> None:
        super().__init__(inputs, outputs, 3, padding=1 + len(smooth) // 2)
        self.smooth = smooth

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(smoothed(super().forward(input), self.smooth, 0), 2)


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class _Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, settings: Settings, family: Family, *, how: Resample, attends: bool
    ) -> None:
        super().__init__()
        embedded, smooth = settings.model_channels * settings.channel_mult_emb, settings.resample_smooth
        self.how: Resample = how
        self.family, self.smooth = family, smooth
        self.norm0 = _norm(inputs, family.eps)
        self.conv0 = _Convolution(inputs, outputs, 3, how, smooth)
        self.affine = Linear(embedded, outputs * (2 if family.adaptive_scale else 1))
        self.norm1 = _norm(outputs, family.eps)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        projects = inputs != outputs or (family.projects and how != "keep")
        self.skip = _Convolution(inputs, outputs, 1, how, smooth) if projects else None
        per_head = settings.channels_per_head or family.head_channels or outputs
        self.num_heads = outputs // per_head if attends else 0
        if attends:
            self.norm2 = _norm(outputs, family.eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        told = self.affine(emb)[:, :, None, None]
        if self.family.adaptive_scale:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(silu(h))
        x = (h + (resampled(x, self.how, self.smooth) if self.skip is None else self.skip(x))) * self.family.skip_scale
        if self.num_heads:
            x = (x + self.proj(attention(self.qkv(self.norm2(x)), self.num_heads))) * self.family.skip_scale
        return x


class EDMUNet(nn.Module):
    """network(x, t) -> (F,), built without values from config.json. Raises TypeError or ValueError where that fits no family."""

    def __init__(self, family: Family, settings: Settings) -> None:
        super().__init__()
        noise = settings.model_channels * settings.channel_mult_noise
        embedded = settings.model_channels * settings.channel_mult_emb
        self.time_proj = (
            Fourier(noise // 2)
            if settings.embedding_type == "fourier"
            else TimeEmbedding(noise, flip_sin_to_cos=family.cosine_first, downscale_freq_shift=family.shift)
        )
        self.map_layer0, self.map_layer1 = Linear(noise, embedded), Linear(embedded, embedded)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels = [settings.model_channels * multiple for multiple in settings.channel_mult]
        sides = [settings.sample_size >> level for level in range(len(channels))]

        def block(inputs: int, outputs: int, *, how: Resample = "keep", attends: bool = False) -> _Block:
            return _Block(inputs, outputs, settings, family, how=how, attends=attends)

        width = settings.model_channels
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = nn.Conv2d(settings.in_channels, width, 3, padding=1)
        kept, beside = [width], settings.in_channels
        for side, outputs in zip(sides, channels, strict=True):
            if side != sides[0]:
                self.enc[f"{side}x{side}_down"] = block(width, width, how="down")
                kept.append(width)
                if settings.encoder_type == "residual":
                    self.enc[f"{side}x{side}_aux_residual"] = _Shortcut(beside, width, settings.resample_smooth)
                    beside = width
            for at in range(settings.num_blocks):
                self.enc[f"{side}x{side}_block{at}"] = block(width, outputs, attends=side in settings.attn_resolutions)
                width = outputs
                kept.append(width)
        for side, outputs in zip(reversed(sides), reversed(channels), strict=True):
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = block(width, width, attends=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, how="up")
            for at in range(settings.num_blocks + 1):
                attends = side in settings.attn_resolutions and (family.attends_always or at == settings.num_blocks)
                self.dec[f"{side}x{side}_block{at}"] = block(width + kept.pop(), outputs, attends=attends)
                width = outputs
        self.out_norm = _norm(width, family.eps)
        self.out_conv = nn.Conv2d(width, settings.out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDMUNet":
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        return cls(FAMILIES[config["_class_name"]], Settings(**settings))

    def forward(
        self, x: Float[Tensor, "batch channel height width"], t: Float[Tensor, "batch"], return_dict: bool = False
    ) -> tuple[Tensor]:
        del return_dict
        emb = silu(self.map_layer1(silu(self.map_layer0(self.time_proj(t).to(x.dtype)))))
        beside, kept = x, list[Tensor]()
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = kept[-1] = beside = (x + layer(beside)) * math.sqrt(0.5)
                continue
            x = layer(x, emb) if isinstance(layer, _Block) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, kept.pop()], dim=1)
            x = layer(x, emb)
        return (self.out_conv(silu(self.out_norm(x))),)
