"""The network that judges pictures and never guides them: EfficientNet-Lite0, an ImageNet classifier without its last layer.

It must not know about priors, features or tilts: pictures in, 1,280 numbers out. Batch normalisation is folded into
the convolutions when
a bundle is built (`fold_batch_norm`), so a layer here is a convolution with a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE = 1280
INPUT_PX = 160
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Stages of EfficientNet-B0 (arXiv:1905.11946, table 1), Lite: no squeeze-excitation, ReLU6. (repeats, kernel, stride,
# expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: output ceil(input/stride), the odd pixel of padding at the right
    and the bottom.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        def pad(size: int, kernel: int, stride: int) -> tuple[int, int]:
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            return total // 2, total - total // 2

        rows = pad(input.shape[-2], self.kernel_size[0], self.stride[0])
        cols = pad(input.shape[-1], self.kernel_size[1], self.stride[1])
        return super().forward(F.pad(input, (*cols, *rows)))


class InvertedBottleneck(nn.Module):
    """expand 1x1 -> depthwise -> project 1x1, with a skip where the shape stays (MobileNetV2, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = SameConv(inputs, width, 1) if expansion != 1 else None
        self.depthwise = SameConv(width, width, kernel, stride, groups=width)
        self.project = SameConv(width, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class Evaluator(nn.Module):
    """EfficientNet-Lite0 up to its last feature map, averaged over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(channels, EMBEDDING_SIZE, 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [batch, 3, h, w] -> feature map [batch, 1280, ceil(h/32), ceil(w/32)]."""
        return F.relu6(self.head(self.blocks(F.relu6(self.stem(pixels)))))

    @torch.no_grad()
    def embed(self, x0: Tensor, *, batch_size: int = 64) -> Tensor:
        """Spatial mean of the last feature map: x0 [batch, 3, h, w] in [-1, 1] -> [batch, 1280], not normalised.

        Pictures are clamped to [-1, 1] (what a viewer sees), resized to 160x160 (bilinear, antialiased) and
        normalised as ImageNet's.
        Equality with the original package's own forward is proved by tests/tools/test_evaluator.py on the same weights.
        """
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        out: list[Tensor] = []
        for chunk in x0.split(batch_size):
            pixels = F.interpolate(
                chunk.float().clamp(-1, 1),
                size=(INPUT_PX, INPUT_PX),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
            out.append(self.features(((pixels + 1) / 2 - mean) / std).mean((2, 3)))
        return torch.cat(out) if out else x0.new_zeros(0, EMBEDDING_SIZE)


def load_evaluator(folder: Path) -> Evaluator:
    """The evaluator of BUNDLE/evaluator (float16 safetensors), computing in float32; BundleError where the file does not fit."""
    from safetensors.torch import load_file

    from tiltscope.engine.errors import BundleError

    path = Path(folder) / "model.safetensors"
    evaluator = Evaluator()
    try:
        evaluator.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, RuntimeError) as error:
        raise BundleError(
            f"the evaluator's weights {path} cannot be used: {error}. Build the bundle again, or take another."
        ) from error
    return evaluator.eval().requires_grad_(False)


def fold_batch_norm(state: Mapping[str, Tensor], *, eps: float = 1e-3) -> dict[str, Tensor]:
    """Weights of `efficientnet_lite_pytorch` -> this module's: w' = w * g/sqrt(var + eps), b' = beta - mean *
    g/sqrt(var + eps).
    """

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        gain = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + eps).sqrt()
        bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * gain
        return (state[f"{conv}.weight"].double() * gain[:, None, None, None]).float(), bias.float()

    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index in sorted({int(m[1]) for name in state if (m := re.match(r"_blocks\.(\d+)\.", name))}):
        theirs, ours = f"_blocks.{index}", f"blocks.{index}"
        if f"{theirs}._expand_conv.weight" in state:
            pairs[f"{ours}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        pairs[f"{ours}.depthwise"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        pairs[f"{ours}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    out = {}
    for name, (conv, norm) in pairs.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = folded(conv, norm)
    return out
