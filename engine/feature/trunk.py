"""Vision trunks up to one hooked layer, from transformers' folders. Later layers are neither built nor read from the file.

Knows transformers' folder format; must not know features, bundles or sampling.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.convnext import ConvNeXtConfig, TruncatedConvNeXt
from tiltscope.engine.feature.dinov2 import DINOv2Config, TruncatedDINOv2, our_names
from tiltscope.engine.feature.hooked import CPU as CPU
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.vit import Block, Embeddings, ViTConfig, rope_tables
from tiltscope.engine.files import read_json, read_tensors, tensor_names
from tiltscope.engine.weights import assign_weights

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
FILES = (CONFIG, WEIGHTS, PREPROCESSOR)


class TruncatedViT(Trunk):
    """x0 -> tokens [batch, 1 + registers + patches, width] at one hook.

        blocks.N: the residual stream before block N (N = 0 .. number of blocks; N = 0 is the embedding)
        norm:     LayerNorm of the last block's output, transformers' last_hidden_state

    Parameters take no gradient. Equal to transformers' full model to 1e-6 (tests/feature/test_trunk.py).

    num_built: blocks before the hook.
    """

    def __init__(
        self,
        config: ViTConfig,
        hook: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int] | None = None,
    ) -> None:
        size = image_size or (config.image_size, config.image_size)
        self.num_built = num_blocks_before(hook, config)
        if any(side % config.patch_size for side in size):
            raise BundleError(f"pictures of {size} px do not divide into patches of {config.patch_size} px")
        super().__init__(
            hook,
            width=config.hidden_size,
            grid=(size[0] // config.patch_size, size[1] // config.patch_size),
            num_prefix_tokens=config.num_prefix_tokens,
            image_size=size,
            mean=mean,
            std=std,
        )
        self.config = config
        self.embeddings = Embeddings(config)
        self.layer = nn.ModuleList(Block(config) for _ in range(self.num_built))
        self.norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps) if hook == "norm" else None
        self._set_tables(torch.float32)

    def _set_tables(self, dtype: torch.dtype) -> None:
        super()._set_tables(dtype)
        head_width = self.width // self.config.num_attention_heads
        with torch.device("cpu"):
            cos, signed_sin = rope_tables(
                self.grid,
                num_prefix_tokens=self.num_prefix_tokens,
                head_width=head_width,
                base=self.config.rope_theta,
                dtype=dtype,
            )
        self.cos, self.signed_sin = nn.Buffer(cos, persistent=False), nn.Buffer(signed_sin, persistent=False)

    def tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        h = self.embeddings(pixels)
        for block in self.layer:
            h = block(h, (self.cos, self.signed_sin))
        return h if self.norm is None else self.norm(h)


def num_blocks_before(hook: str, config: ViTConfig) -> int:
    """How many blocks run before the hook. Raises ConfigError naming the hooks this trunk has."""
    total = config.num_hidden_layers
    if hook == "norm":
        return total
    number = hook.removeprefix("blocks.")
    if hook.startswith("blocks.") and number.isdecimal() and int(number) <= total:
        return int(number)
    raise ConfigError(f"hook {hook!r} is not in this trunk; allowed: blocks.0 to blocks.{total}, norm")


class Architecture(NamedTuple):
    """How a model_type is read: its configuration and its trunk."""

    config: Callable[[Mapping[str, Any]], ViTConfig | ConvNeXtConfig | DINOv2Config]
    trunk: Callable[..., Trunk]
    names: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    """what a tensor of the file is called here; several names: its equal parts along the first axis"""


# config.json's model_type -> how it is read.
ARCHITECTURES: dict[str, Architecture] = {
    "dinov3_vit": Architecture(ViTConfig.from_json, TruncatedViT),
    "dinov3_convnext": Architecture(ConvNeXtConfig.from_json, TruncatedConvNeXt),
    "dinov2": Architecture(DINOv2Config.from_json, TruncatedDINOv2, our_names),
    "dinov2_with_registers": Architecture(DINOv2Config.from_json, TruncatedDINOv2, our_names),
}
# Of the file and of no forward pass: what training masks patches with.
_UNUSED = {"embeddings.mask_token"}


def load_trunk(folder: Path, hook: str, *, image_size: tuple[int, int] | None = None) -> Trunk:
    """Build the trunk of a transformers folder (a key of ARCHITECTURES) up to `hook`, float32, on the CPU, in eval mode.

    folder holds config.json, preprocessor_config.json (image_mean, image_std) and model.safetensors (any floating dtype).
    image_size: the pictures' (h, w); default the config's. Raises BundleError (files), ConfigError (hook).
    """
    described = read_json(folder / CONFIG)
    kind = described.get("model_type")
    if kind not in ARCHITECTURES:
        raise BundleError(f"trunk/config.json: model_type {kind!r} is not known; allowed: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    config = architecture.config(described)
    side = config.least_side
    mean, std = _normalisation(read_json(folder / PREPROCESSOR), folder)
    with torch.device("meta"):  # no random initialisation: nothing to throw away, and no draw from the global generator
        trunk = architecture.trunk(config, hook, mean=mean, std=std, image_size=image_size)
        # All that the file may hold: a name beyond that is of another model.
        whole = architecture.trunk(config, "norm", mean=mean, std=std, image_size=(side, side))
    known = set(whole.state_dict()) | _UNUSED
    # transformers' files name blocks `layer.N`, or `model.layer.N` where they were written from memory; stages likewise.
    held = {name: architecture.names(name.removeprefix("model.")) for name in tensor_names(folder / WEIGHTS)}
    wanted = set(trunk.state_dict())
    found = read_tensors(folder / WEIGHTS, [name for name, plain in held.items() if wanted & set(plain)])
    assign_weights(
        trunk,
        {
            plain: part
            for name, tensor in found.items()
            for plain, part in zip(held[name], tensor.chunk(len(held[name])), strict=True)
        },
        folder / WEIGHTS,
        extra=tuple(name for name, plain in held.items() if not known & set(plain)),
    )
    return trunk.eval().requires_grad_(False)


def _normalisation(config: Mapping[str, Any], folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found: list[tuple[float, ...]] = []
    for name in ("image_mean", "image_std"):
        values = config.get(name)
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
            raise BundleError(f"{folder / 'preprocessor_config.json'}: {name} must be three numbers, got {values!r}")
        found.append(tuple(float(v) for v in values))
    return found[0], found[1]
