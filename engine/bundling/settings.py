"""What a bundle is made of, as a request: what `tiltscope bundle` has as flags. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from tiltscope.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BundleSettings:
    """Parts, and how they are read."""

    prior: Path
    """folder of a diffusers model with its scheduler_config.json, or of a pipeline"""
    trunk: Path
    """folder of a DINO model as transformers writes it"""
    sae: Path
    """the autoencoder: a .safetensors file or a folder"""
    pool: Path
    """folder of natural pictures (PNG, JPEG, WebP), with metadata.jsonl or captions beside them where there are any"""
    out: Path
    """where the bundle goes: a new folder, or one that an earlier run of this command has begun"""
    hook: str | None = None
    """where the autoencoder reads, for example blocks.8 or stages.2.20 (default: what its files say)"""
    decoder: Path | None = None
    """folder of an AutoencoderKL or AutoencoderTiny, where the prior's samples are latents"""
    evaluator: Path | None = None
    """folder of the network that judges pictures (default: the embedded bundle's)"""
    name: str | None = None
    """what the bundle is called (default: its folder)"""
    licence: str = "see the licences of its parts"
    """what bundle.json says of the licence"""
    sae_kind: str | None = None
    """jumprelu | batchtopk | relu | topk (default: what its files say)"""
    token_length: str | None = None
    """as_is | sqrt_width: whether tokens are brought to one length before the autoencoder (default: what its files say)"""
    pixel_unshuffle: int = 1
    """pictures were folded into channels by this factor a side, before the prior saw them"""
    trunk_size: tuple[int, int] | None = None
    """height,width that the trunk reads (default: the prior's pictures' own)"""
    background: int = 255
    """grey that transparent pictures are laid on, 0 to 255"""
    workers: int = 2
    """threads that decode pictures"""
    strict: bool = False
    """stop at the first picture that cannot be used, instead of leaving it out"""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number that is out of range."""
        for name, low, high in (("background", 0, 255), ("workers", 1, 64), ("pixel_unshuffle", 1, 16)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed are whole numbers from {low} to {high}")
        if self.trunk_size is not None and min(self.trunk_size) < 1:
            raise ConfigError(f"trunk_size: got {self.trunk_size}, allowed are two positive whole numbers")
