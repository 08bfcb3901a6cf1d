"""`tiltscope sample FEATURE`: one distribution, streamed to disk bucket by bucket; the same command continues a stopped run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltscope.engine.cli.common import Common, FeatureWord, RunFailed, Stopped, follow, interrupts_wait
from tiltscope.engine.cli.screen import put_json, stage
from tiltscope.engine.config import SampleConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw from p(x) exp(lam phi(a(x))) / Z. Give --lam or --target-activation."""

    feature: FeatureWord
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:137"""
    config: Annotated[SampleConfig, tyro.conf.arg(name="")]
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    out: Path | None = None
    """output folder (default: tiltscope-IDENTITY in the current folder); a folder of the same run is continued"""
    common: Common


def run(arguments: Arguments) -> None:
    """Check, then draw what the folder does not hold yet. Memory is flat in --num: one bucket is held at a time."""
    quiet = arguments.common.quiet
    with stage("loading torch and the models", quiet=quiet):
        from tiltscope.engine.bundle import load
        from tiltscope.engine.report.writer import SampleWriter
        from tiltscope.engine.sample import prepare

        bundle = load(arguments.bundle)
        drawing = prepare(bundle.prior, bundle.feature(arguments.feature), arguments.config)
    out = arguments.out or Path(f"tiltscope-{drawing.identity[:8]}")
    writer = SampleWriter(out, drawing.identity)
    wanted = drawing.config.all_indices
    before = writer.finished() & set(wanted)
    kept = len(before)
    going_on = f"{out}; the same command continues"
    try:
        with stage("drawing", quiet=quiet) as tracker:
            on_step = follow(tracker, drawing, len(wanted), finished=len(before))
            for chunk in drawing.draw(skip=before, on_step=on_step):
                with interrupts_wait():
                    writer.add(chunk)
                    kept += len(chunk)
        with interrupts_wait():
            manifest = writer.close(drawing.describe())
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {kept:,} of {len(wanted):,} samples are kept in {going_on}") from None
    except OSError as error:
        raise RunFailed(f"{error}; {kept:,} of {len(wanted):,} samples are kept in {going_on}") from error
    if arguments.common.json:
        put_json(manifest | {"out": str(out)})
    else:
        print(f"{len(wanted):,} samples of {drawing.feature.name} in {out.resolve()}")
