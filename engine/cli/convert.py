"""`tiltscope convert`: weights under their authors' names become a folder in diffusers', transformers' or our own format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import put_json, stage


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """DINOv3 as Meta or timm name it, ADM, DiT, SiT, EDM, EDM2, autoencoders of saev and overcomplete, into safetensors.

    A pickled checkpoint is read by a reader that knows tensors and plain values; one that asks for anything else is refused.
    """

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """a .pth, .pt or .safetensors file"""
    out: Path
    """the new folder"""
    release: str | None = None
    """DINOv3: lvd1689m | sat493m, which decides the normalisation (default: what the file's name says)"""
    image_size: int = 256
    """guided-diffusion: pixels a side"""
    head_channels: int = 64
    """guided-diffusion, EDM's DhariwalUNet, EDM2: channels of an attention head"""
    sae_kind: str | None = None
    """overcomplete: relu | topk | batchtopk, which its files do not say"""
    threshold: float | None = None
    """overcomplete's batchtopk: the running threshold, which its files do not hold"""
    centre: bool = False
    """saev: the decoder's bias is subtracted before the encoder, as its releases before schema 2 did"""
    flow: bool | None = None
    """a DiT or SiT: --flow True for a SiT, --flow False for a DiT (default: what the file's name says)"""
    hook: str | None = None
    """where an autoencoder reads, for example blocks.8; kept beside it"""
    common: Common


def run(arguments: Arguments) -> None:
    """Convert one checkpoint."""
    with stage("converting", quiet=arguments.common.quiet):
        from tiltscope.engine.convert.convert import ConvertSettings, convert

        values = {name: value for name, value in vars(arguments).items() if name not in ("common", "checkpoint", "out")}
        what = convert(arguments.checkpoint, arguments.out, ConvertSettings(**values))
    if arguments.common.json:
        put_json({"out": str(arguments.out), "what": what})
    else:
        print(f"{arguments.out}: {what}")
