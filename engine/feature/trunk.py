"""A DINOv3 ViT up to one hooked layer: pictures in, tokens out. Later blocks are neither built nor read from the file.

Knows transformers' folder format; must not know features, bundles or sampling.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.vit import Block, Embeddings, ViTConfig, rope_tables
from tiltscope.engine.files import read_json, read_tensors

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
FILES = (CONFIG, WEIGHTS, PREPROCESSOR)
CPU = torch.device("cpu")


class TruncatedViT(nn.Module):
    """x0 -> tokens [batch, 1 + registers + patches, width] at one hook.

        pixels = ((x0 + 1)/2 - mean)/std        x0 in [-1, 1]; no clamp: an estimate outside the range keeps its gradient
        blocks.N: the residual stream before block N (N = 0 .. number of blocks; N = 0 is the embedding)
        norm:     LayerNorm of the last block's output, transformers' last_hidden_state

    Parameters take no gradient. Equal to transformers' full model to 1e-6 (tests/feature/test_trunk.py).

    hook, width, num_blocks; grid = (gh, gw) patches; num_prefix_tokens = class token + registers; image_size = (h, w) pixels.
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
        super().__init__()
        self.config = config
        self.hook = hook
        self.image_size = image_size or (config.image_size, config.image_size)
        self.num_built = num_blocks_before(hook, config)
        self.width = config.hidden_size
        self.num_prefix_tokens = config.num_prefix_tokens
        if any(side % config.patch_size for side in self.image_size):
            raise BundleError(f"pictures of {self.image_size} px do not divide into patches of {config.patch_size} px")
        self.grid = (self.image_size[0] // config.patch_size, self.image_size[1] // config.patch_size)
        self.embeddings = Embeddings(config)
        self.layer = nn.ModuleList(Block(config) for _ in range(self.num_built))
        self.norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps) if hook == "norm" else None
        self._mean, self._std = tuple(mean), tuple(std)
        self._set_tables(torch.float32)
        # One sibling a dtype and device, shared by all of them, so that every feature of a hook runs the same module.
        self._siblings: dict[tuple[torch.dtype, torch.device], TruncatedViT] = {}

    def _set_tables(self, dtype: torch.dtype) -> None:
        head_width = self.width // self.config.num_attention_heads
        # On the CPU even when the parameters are being built on the meta device: these are values, not weights to be loaded.
        with torch.device("cpu"):
            cos, sin = rope_tables(self.grid, head_width=head_width, base=self.config.rope_theta, dtype=dtype)
            mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (self._mean, self._std))
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.cls_token.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.cls_token.device

    def forward(self, x0: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        if x0.ndim != 4 or x0.shape[1:] != (3, *self.image_size):
            raise ConfigError(
                f"the trunk reads pictures [batch, 3, {self.image_size[0]}, {self.image_size[1]}]; got {list(x0.shape)}"
            )
        h = self.embeddings(((x0.to(self.dtype) + 1) / 2 - self.mean) / self.std)
        for block in self.layer:
            h = block(h, self.cos, self.sin)
        return h if self.norm is None else self.norm(h)

    def in_dtype(self, dtype: torch.dtype, device: torch.device = CPU) -> "TruncatedViT":
        """This trunk with its weights in dtype on device; self is not changed, and asking twice gives the same module.

        Weights are cast from the float32 ones that were loaded; tables are computed anew (float64 gets float64 tables).
        """
        loaded, wanted = (torch.float32, CPU), (dtype, device)
        self._siblings.setdefault(loaded, self)
        if wanted not in self._siblings:
            source = self._siblings[loaded]
            siblings, source._siblings = source._siblings, {}
            sibling = copy.deepcopy(source).to(dtype)
            sibling._set_tables(dtype)
            sibling.to(device)
            source._siblings = sibling._siblings = siblings
            siblings[wanted] = sibling
        return self._siblings[wanted]


def num_blocks_before(hook: str, config: ViTConfig) -> int:
    """How many blocks run before the hook. Raises ConfigError naming the hooks this trunk has."""
    total = config.num_hidden_layers
    if hook == "norm":
        return total
    number = hook.removeprefix("blocks.")
    if hook.startswith("blocks.") and number.isdecimal() and int(number) <= total:
        return int(number)
    raise ConfigError(f"hook {hook!r} is not in this trunk; allowed: blocks.0 to blocks.{total}, norm")


def load_trunk(folder: Path, hook: str, *, image_size: tuple[int, int] | None = None) -> TruncatedViT:
    """Build the trunk of a transformers DINOv3ViTModel folder up to `hook`, float32, on the CPU, in eval mode.

    folder holds config.json, preprocessor_config.json (image_mean, image_std) and model.safetensors (any floating dtype).
    image_size: the pictures' (h, w); default the config's. Raises BundleError (files), ConfigError (hook).
    """
    config = ViTConfig.from_json(read_json(folder / CONFIG))
    mean, std = _normalisation(read_json(folder / PREPROCESSOR), folder)
    with torch.device("meta"):  # no random initialisation: nothing to throw away, and no draw from the global generator
        trunk = TruncatedViT(config, hook, mean=mean, std=std, image_size=image_size)
    wanted = set(trunk.state_dict())
    # transformers' files name blocks `layer.N`, or `model.layer.N` where they were written from memory.
    found = read_tensors(folder / WEIGHTS, wanted | {f"model.{name}" for name in wanted})
    weights = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    try:
        trunk.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise BundleError(
            f"{folder / WEIGHTS} does not hold the weights that config.json describes: {error}"
        ) from error
    return trunk.eval().requires_grad_(False)


def _normalisation(config: Mapping[str, Any], folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found: list[tuple[float, ...]] = []
    for name in ("image_mean", "image_std"):
        values = config.get(name)
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
            raise BundleError(f"{folder / 'preprocessor_config.json'}: {name} must be three numbers, got {values!r}")
        found.append(tuple(float(v) for v in values))
    return found[0], found[1]
