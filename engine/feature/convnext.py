"""A DINOv3 ConvNeXt up to one hooked layer, in plain torch, with transformers' parameter names.

    block(h):  h + gamma * (W2 gelu(W1 LayerNorm(depthwise7x7(h))))        h [batch, channel, height, width], products per place
    stage S:   LayerNorm over channels, then a 2x2 convolution of stride 2 (stage 0: 4x4 of stride 4, then LayerNorm)

Own definitions for the reasons of vit.py. tests/feature/test_convnext.py holds them equal to transformers' DINOv3ConvNextModel.
Source: DINOv3 (arXiv:2508.10104); ConvNeXt (arXiv:2201.03545).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.batch_invariant import Linear
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.vit import ACTIVATIONS

_HOOK = re.compile(r"stages\.([0-9]+)\.([0-9]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
    """The part of transformers' dinov3_convnext config.json that decides the forward pass; its names and defaults."""

    image_size: int = 224
    num_channels: int = 3
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ConvNeXtConfig":
        """Raises BundleError where sizes do not fit together or the activation is not known."""
        found = cls(
            image_size=int(config.get("image_size") or cls.image_size),
            num_channels=int(config.get("num_channels") or cls.num_channels),
            hidden_sizes=tuple(config.get("hidden_sizes") or cls.hidden_sizes),
            depths=tuple(config.get("depths") or cls.depths),
            hidden_act=str(config.get("hidden_act") or cls.hidden_act),
            layer_norm_eps=float(config.get("layer_norm_eps", cls.layer_norm_eps)),
        )
        if len(found.depths) != len(found.hidden_sizes) or min(found.depths) < 1:
            raise BundleError(
                f"trunk/config.json: depths {list(found.depths)} and hidden_sizes {list(found.hidden_sizes)} must be one "
                "positive number a stage"
            )
        if found.hidden_act not in ACTIVATIONS:
            raise BundleError(
                f"trunk/config.json: hidden_act {found.hidden_act!r} is not known; allowed: {', '.join(ACTIVATIONS)}"
            )
        return found


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channel, height, width]."""

    def forward(
        self, input: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """One residual block; its input is what `stages.S.B` hooks."""

    def __init__(self, width: int, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pointwise_conv1 = Linear(width, 4 * width)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.pointwise_conv2 = Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, h: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        inner = self.layer_norm(self.depthwise_conv(h).permute(0, 2, 3, 1))  # [batch, height, width, channel]
        inner = self.pointwise_conv2(self.activation(self.pointwise_conv1(inner))) * self.gamma
        return h + inner.permute(0, 3, 1, 2)


class _Stage(nn.Module):
    def __init__(self, stage: int, num_blocks: int, config: ConvNeXtConfig) -> None:
        super().__init__()
        width, eps = config.hidden_sizes[stage], config.layer_norm_eps
        if stage == 0:
            down: list[nn.Module] = [
                nn.Conv2d(config.num_channels, width, kernel_size=4, stride=4),
                _ChannelNorm(width, eps=eps),
            ]
        else:
            before = config.hidden_sizes[stage - 1]
            down = [_ChannelNorm(before, eps=eps), nn.Conv2d(before, width, kernel_size=2, stride=2)]
        self.downsample_layers = nn.ModuleList(down)
        self.layers = nn.ModuleList(_Block(width, config) for _ in range(num_blocks))

    def forward(self, h: Float[Tensor, "batch inputs rows columns"]) -> Float[Tensor, "batch outputs height width"]:
        for layer in self.downsample_layers:
            h = layer(h)
        for layer in self.layers:
            h = layer(h)
        return h


class TruncatedConvNeXt(Trunk):
    """x0 -> tokens [batch, height * width of the stage, channels] at one hook.

    stages.S.B   the input of block B of stage S (B = 0 .. its number of blocks; the last is the stage's output)
    norm         LayerNorm of the mean over places and of every place, transformers' last_hidden_state; one prefix token
    """

    def __init__(
        self,
        config: ConvNeXtConfig,
        hook: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """Raises ConfigError naming the hooks there are, BundleError where pictures do not divide by the stride."""
        stage, num_blocks = place_of(hook, config)
        size = image_size or (config.image_size, config.image_size)
        stride = 4 * 2**stage
        if any(side % stride for side in size):
            raise BundleError(f"pictures of {size} px do not divide by the stride of {stride} px at {hook}")
        super().__init__(
            hook,
            width=config.hidden_sizes[stage],
            grid=(size[0] // stride, size[1] // stride),
            num_prefix_tokens=1 if hook == "norm" else 0,
            image_size=size,
            mean=mean,
            std=std,
        )
        self.config = config
        self.stages = nn.ModuleList(
            _Stage(each, config.depths[each] if each < stage else num_blocks, config) for each in range(stage + 1)
        )
        self.layer_norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps) if hook == "norm" else None
        self._set_tables(torch.float32)

    def tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        h = pixels
        for stage in self.stages:
            h = stage(h)
        places = h.flatten(2).transpose(1, 2)
        if self.layer_norm is None:
            return places
        return self.layer_norm(torch.cat([places.mean(dim=1, keepdim=True), places], dim=1))


def place_of(hook: str, config: ConvNeXtConfig) -> tuple[int, int]:
    """(stage, blocks of that stage before the hook). Raises ConfigError naming the hooks this trunk has."""
    last = len(config.depths) - 1
    if hook == "norm":
        return last, config.depths[last]
    found = _HOOK.fullmatch(hook)
    if found:
        stage, block = int(found[1]), int(found[2])
        if stage <= last and block <= config.depths[stage]:
            return stage, block
    there = ", ".join(f"stages.{at}.0 to stages.{at}.{depth}" for at, depth in enumerate(config.depths))
    raise ConfigError(f"hook {hook!r} is not in this trunk; allowed: {there}, norm")
