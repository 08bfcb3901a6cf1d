"""guided-diffusion's U-Net (ADM) from its own names to diffusers' UNet2DModel, and the configuration from its shapes.

    input_blocks.K.0    a residual block, or one that halves the picture     output_blocks.K.0  likewise, on the way up
    K.1                 attention, or (on the way up) the block that doubles the picture

Attention's rows are q, k, v of each head in turn (`use_new_attention_order=False`, every published model) and become three
products. tests/convert/test_adm.py holds the result equal to a transcription of the original's forward.
Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), the networks with `resblock_updown` and `use_scale_shift_norm`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_HEAD_CHANNELS = 64
_GROUPS = 32
_BLOCK = re.compile(r"^(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)$")


def is_adm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are guided-diffusion's names."""
    return "input_blocks.0.0.weight" in tensors and "time_embed.0.weight" in tensors


def convert_adm(
    tensors: Mapping[str, Tensor], *, image_size: int, head_channels: int = _HEAD_CHANNELS
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors in diffusers' names, config.json). Raises BundleError for a network with classes or of another form.

    image_size and head_channels: what shapes do not tell.
    """
    if "label_emb.weight" in tensors:
        raise BundleError("this network takes classes (label_emb); allowed are unconditional ones")
    layout = _Layout(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found.update(_renamed(name, tensor, layout, head_channels))
    widths, levels = layout.widths, len(layout.widths)
    attends = layout.attends
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": image_size,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": layout.per_level,
        "down_block_types": ["AttnDownBlock2D" if each else "ResnetDownsampleBlock2D" for each in attends],
        "up_block_types": ["AttnUpBlock2D" if each else "ResnetUpsampleBlock2D" for each in reversed(attends)],
        "attention_head_dim": head_channels,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": _GROUPS,
        # Else the middle's attention has no norm of its own.
        "attn_norm_num_groups": _GROUPS,
        "norm_eps": 1e-5,
        "act_fn": "silu",
    }
    if levels < 2:
        raise BundleError("this network has one resolution; allowed are those that halve the picture at least once")
    return found, config


class _Layout:
    """Which input and output block is which block of which level, from the shapes alone."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        numbers = sorted(
            {int(each[2]) for name in tensors if (each := _BLOCK.match(name)) and each[1] == "input_blocks"}
        )
        outputs = sorted(
            {int(each[2]) for name in tensors if (each := _BLOCK.match(name)) and each[1] == "output_blocks"}
        )
        if numbers != list(range(len(numbers))) or outputs != list(range(len(numbers))):
            raise BundleError(
                f"this network has {len(numbers)} blocks on the way down and {len(outputs)} on the way up; they must be as many"
            )
        if any(f"input_blocks.{k}.0.op.weight" in tensors for k in numbers):
            raise BundleError(
                "this network halves pictures by plain convolutions; allowed are residual blocks (resblock_updown)"
            )
        # Every level ends on the way up with one more block than on the way down; the one that doubles the picture ends it.
        doubling = [k for k in outputs if self._doubles(tensors, k)]
        ends = [*doubling, outputs[-1]]
        if not doubling or (outputs[-1] + 1) % len(ends):
            raise BundleError("the blocks of this network do not fall into levels of one length")
        self.per_level = (outputs[-1] + 1) // len(ends) - 1
        num_levels = len(ends)
        self.down: dict[int, tuple[int, int | None]] = {}
        at = 1
        for level in range(num_levels):
            for block in range(self.per_level):
                self.down[at] = (level, block)
                at += 1
            if level < num_levels - 1:
                self.down[at] = (level, None)
                at += 1
        self.up = {k: divmod(k, self.per_level + 1) for k in outputs}
        firsts = [next(k for k, place in self.down.items() if place == (level, 0)) for level in range(num_levels)]
        missing = [k for k in firsts if f"input_blocks.{k}.0.out_layers.3.weight" not in tensors]
        if missing or len(self.down) + 1 != len(numbers):
            raise BundleError("the blocks of this network do not fall into levels of one length")
        self.widths = [tensors[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0] for k in firsts]
        self.attends = [f"input_blocks.{k}.1.qkv.weight" in tensors for k in firsts]

    @staticmethod
    def _doubles(tensors: Mapping[str, Tensor], k: int) -> bool:
        last = max(
            int(each[3])
            for name in tensors
            if (each := _BLOCK.match(name)) and each.group(1, 2) == ("output_blocks", str(k))
        )
        return last > 0 and f"output_blocks.{k}.{last}.in_layers.0.weight" in tensors

    def place(self, side: str, k: int, inner: int, attention: bool) -> str:
        """The module's name in diffusers."""
        if side == "input_blocks":
            if k == 0:
                return "conv_in"
            level, block = self.down[k]
            if block is None:
                return f"down_blocks.{level}.downsamplers.0"
            return f"down_blocks.{level}.{'attentions' if attention else 'resnets'}.{block}"
        level, block = self.up[k]
        if inner and not attention:
            return f"up_blocks.{level}.upsamplers.0"
        return f"up_blocks.{level}.{'attentions' if attention else 'resnets'}.{block}"


_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}


def _renamed(name: str, tensor: Tensor, layout: _Layout, head_channels: int) -> list[tuple[str, Tensor]]:
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return [(f"{_OUTSIDE[module]}.{kind}", tensor)]
    if module.startswith("middle_block."):
        inner, _, rest = module.removeprefix("middle_block.").partition(".")
        if int(inner) not in _MIDDLE:
            raise BundleError(f"{name} is not known in this network")
        return _inside(_MIDDLE[int(inner)], rest, kind, tensor, head_channels)
    found = _BLOCK.match(name)
    if not found:
        raise BundleError(f"{name} is not known: this is no U-Net of guided-diffusion")
    side, k, inner = found[1], int(found[2]), int(found[3])
    rest = found[4].rpartition(".")[0]
    return _inside(layout.place(side, k, inner, rest in ("norm", "qkv", "proj_out")), rest, kind, tensor, head_channels)


def _inside(place: str, rest: str, kind: str, tensor: Tensor, head_channels: int) -> list[tuple[str, Tensor]]:
    if not rest:
        return [(f"{place}.{kind}", tensor)]
    if rest in _RESIDUAL:
        return [(f"{place}.{_RESIDUAL[rest]}.{kind}", tensor)]
    if rest == "norm":
        return [(f"{place}.group_norm.{kind}", tensor)]
    if rest == "proj_out":
        return [(f"{place}.to_out.0.{kind}", tensor.flatten(1) if kind == "weight" else tensor)]
    if rest == "qkv":
        flat = tensor.flatten(1) if kind == "weight" else tensor
        heads = flat.shape[0] // (3 * head_channels)
        if heads * 3 * head_channels != flat.shape[0]:
            raise BundleError(
                f"attention of {flat.shape[0] // 3} channels does not divide into heads of {head_channels}"
            )
        parts = flat.unflatten(0, (heads, 3, head_channels))
        return [
            (f"{place}.to_{each}.{kind}", torch.flatten(parts[:, at], 0, 1).contiguous())
            for at, each in enumerate("qkv")
        ]
    raise BundleError(f"{rest} is not known inside a block of guided-diffusion")
