"""`tiltscope sample FEATURE`: one distribution, streamed to disk bucket by bucket; the same command continues a stopped run."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltscope.engine.cli.common import Common, FeatureWord, RunFailed, Stopped, follow, interrupts_wait
from tiltscope.engine.cli.screen import put_json, stage
from tiltscope.engine.config import SampleConfig


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw from p(x) exp(lam phi(a(x))) / Z. Give --lam or --target-activation."""

    feature: FeatureWord
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169"""
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
        from tiltscope.engine.prepare import calibrated, prepare
        from tiltscope.engine.report.writer import SampleWriter
        from tiltscope.engine.run import check_any_finite

        bundle = load(arguments.bundle)
        drawing = prepare(bundle.prior, bundle.feature(arguments.feature), arguments.config)
    out = arguments.out or Path(f"tiltscope-{drawing.identity[:8]}")
    writer = SampleWriter(out, drawing.identity)
    if drawing.config.calibration == "sampler":
        with stage("calibrating lambda on the sampler", quiet=quiet):
            drawing = calibrated(drawing)
    manifest: dict[str, Any] = drawing.describe() | {
        "bundle": bundle.describe(),
        "feature_name": bundle.label(drawing.feature),
    }
    wanted = drawing.config.all_indices
    there = sum(index in writer.finished() for index in wanted)
    drawn, started = 0, time.perf_counter()
    first = None
    try:
        with stage("drawing", quiet=quiet) as tracker:
            on_step = follow(tracker, drawing, len(wanted), finished=there)
            for chunk in drawing.draw(skip=writer.finished(), on_step=on_step):
                with interrupts_wait():
                    writer.add(chunk)
                    drawn += len(chunk)
                first = first or chunk
        seconds = drawing.seconds | {"sampling": time.perf_counter() - started}
        with interrupts_wait():
            manifest |= {"seconds": seconds, "num_drawn_last": drawn, **drawing.what_ran()}
            whole = writer.close(manifest)
            if drawing.config.particles > 1:  # over all samples of the folder, those of an earlier sitting too
                groups = writer.columns("group_log_z", "group_phi", "group_ess")
                whole = writer.close(manifest | drawing.evidence(*groups))
    except KeyboardInterrupt:
        if there + drawn:
            # A second Ctrl-C must not keep the folder from being left in order.
            with contextlib.suppress(KeyboardInterrupt), interrupts_wait():
                writer.close(manifest | {"state": "interrupted"})
        raise Stopped(f"interrupted; {_kept(there + drawn, len(wanted), out)}") from None
    except OSError as error:
        raise RunFailed(f"{error}; {_kept(there + drawn, len(wanted), out)}") from error
    if first is not None and not len(writer.finished()):
        check_any_finite(first, drawing.plan)
    if arguments.common.json:
        put_json(whole | {"out": str(out)})
    else:
        if drawing.choice is not None:
            print(drawing.choice.why)
        print(f"{whole['num_finished']:,} samples of {drawing.feature.name} in {out.resolve()}")


def _kept(num: int, wanted: int, out: Path) -> str:
    if not num:
        return "nothing was finished; the same command starts again"
    return f"{num:,} of {wanted:,} samples are kept in {out}; the same command continues"
