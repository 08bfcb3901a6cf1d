"""`tiltscope bundle`: a prior, a trunk, an autoencoder and a folder of pictures become a bundle that every command takes."""

import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from tiltscope.engine.bundling.settings import BundleSettings
from tiltscope.engine.cli.common import Common, Stopped
from tiltscope.engine.cli.screen import put_json, say, stage


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read every picture of a folder with the trunk and the autoencoder, name the latents, and put all of it into one folder.

    A run that was stopped goes on with the same command. Pictures that cannot be read are left out and listed.
    """

    settings: Annotated[BundleSettings, tyro.conf.arg(name="")]
    common: Common


def run(arguments: Arguments) -> None:
    """Make the bundle, or go on making it."""
    with stage("loading torch", quiet=arguments.common.quiet) as tracker:
        from tiltscope.engine.bundling.make import make_bundle

        try:
            out = make_bundle(
                arguments.settings, tracker=tracker, say=say if not arguments.common.quiet else lambda text: None
            )
        except KeyboardInterrupt:
            again = shlex.join(["tiltscope", *sys.argv[1:]])
            raise Stopped(
                f"interrupted; what was read is kept in {arguments.settings.out}; to go on: {again}"
            ) from None
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
