"""`tiltscope bundle`: a prior, a trunk, an autoencoder and a folder of pictures become a bundle that every command takes."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tiltscope.engine.cli.common import Common, Stopped
from tiltscope.engine.cli.screen import put_json, say, stage


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read every picture of a folder with the trunk and the autoencoder, name the latents, and put all of it into one folder.

    A run that was stopped goes on with the same command. Pictures that cannot be read are left out and listed.
    """

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
    common: Common


def run(arguments: Arguments) -> None:
    """Make the bundle, or go on making it."""
    with stage("loading torch", quiet=arguments.common.quiet) as tracker:
        from tiltscope.engine.bundling.make import BundleSettings, make_bundle

        values = {name: value for name, value in vars(arguments).items() if name != "common"}
        try:
            out = make_bundle(
                BundleSettings(**values), tracker=tracker, say=say if not arguments.common.quiet else lambda text: None
            )
        except KeyboardInterrupt:
            again = shlex.join(["tiltscope", *sys.argv[1:]])
            raise Stopped(f"interrupted; what was read is kept in {arguments.out}; to go on: {again}") from None
    from tiltscope.engine.files import read_json

    described = read_json(out / "bundle.json")
    if arguments.common.json:
        put_json({"out": str(out)} | {name: described[name] for name in ("name", "prior", "trunk", "saes", "pool")})
        return
    pool = described["pool"]
    print(
        f"{out}: {described['saes'][0]['num_latents']:,} latents on {pool['num']:,} pictures, {pool['num_heldout']:,} held out"
    )
    print(f"tiltscope features --bundle {shlex.quote(str(out))}")
