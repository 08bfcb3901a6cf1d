"""diffusers' UNet2DConditionModel (Stable Diffusion 1 and 2) as a network(x, t): the empty prompt in the place of a prompt.

    output = unet(x, t, tokens),   tokens [1, number, width]: what the text encoder makes of ""

The tokens are a file of the prior's folder, made once when a bundle is made (engine/bundling/prompt.py), so no text encoder is
loaded to sample. tests/prior/test_prompted.py: equal to the library's pipeline.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tiltscope.engine.batch_invariant import gelu
from tiltscope.engine.errors import BundleError
from tiltscope.engine.files import read_tensors
from tiltscope.engine.prior.network import TimeEmbedding

PROMPT, TOKENS = "empty_prompt.safetensors", "encoder_hidden_states"
# What would need more than x, t and tokens: classes, pictures beside x, sizes (SDXL), distilled guidance.
EXPECTED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "center_input_sample": False,
}
_DEFAULTS = {"time_embedding_type": "positional", "center_input_sample": False}


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises BundleError naming what this network would have to be told beside x, t and a prompt."""
    for name, value in EXPECTED.items():
        if config.get(name, _DEFAULTS.get(name)) != value:
            raise BundleError(f"{path}: {name} must be {value!r} here, got {config.get(name)!r}")


def read_prompt(path: Path, width: object) -> Tensor:
    """The empty prompt's tokens [1, number, width]. Raises BundleError."""
    tokens = read_tensors(path, [TOKENS]).get(TOKENS)
    if tokens is None or tokens.ndim != 3 or len(tokens) != 1 or tokens.shape[2] != width:
        found = "nothing" if tokens is None else list(tokens.shape)
        raise BundleError(
            f"{path}: {TOKENS} must be [1, tokens, {width}], the network's cross_attention_dim; got {found}"
        )
    return tokens


@cache
def prompted_unet() -> Any:
    """The class: the library's own, its forward closed over the tokens. Made here, because importing it takes seconds."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    class PromptedUNet(UNet2DConditionModel):
        """network(x, t) -> (prediction,); `prompt` is set by `with_prompt`."""

        prompt: Tensor

        def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:  # pyright: ignore
            del return_dict
            tokens = self.prompt.expand(x.shape[0], -1, -1)
            told: Any = super().forward(x, t, encoder_hidden_states=tokens, return_dict=False)
            return told

    return PromptedUNet


def with_prompt(unet: Any, tokens: Tensor) -> nn.Module:
    """Give `unet` its tokens, its time embedding in float64 and a GELU that no batch mate changes; changes it."""
    unet.prompt = nn.Buffer(tokens, persistent=False)
    unet.time_proj = TimeEmbedding(
        unet.config.block_out_channels[0],
        flip_sin_to_cos=unet.config.flip_sin_to_cos,
        downscale_freq_shift=float(unet.config.freq_shift),
    )
    for module in unet.modules():
        if type(module).__name__ == "GEGLU":
            module.gelu = gelu
    return unet
