"""`tiltscope compare FEATURE`: every method at matched activation, as a table, a plot and a page; --world: at a known answer."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltscope.engine.cli.common import Common, FeatureWord, Stopped
from tiltscope.engine.cli.screen import put_json, say, stage
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Samplers and rivals at one mean activation: cost, naturalness, diversity, distance from the tilt."""

    feature: FeatureWord = ""
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169; not needed with --world, kernel excepted"""
    config: Annotated[CompareConfig, tyro.conf.arg(name="")]
    world: str | None = None
    """gaussian | quadratic | mixture | kernel: compare on a world whose answer is known, on the terminal alone"""
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    out: Path | None = None
    """output folder (default: tiltscope-IDENTITY in the current folder)"""
    page: Path | None = None
    """an explanation's folder: the comparison goes into its folder compare, and a section of it onto its page"""
    common: Common


def run(arguments: Arguments) -> None:
    """Check all of it, then draw; nothing is written before the whole is measured."""
    quiet = arguments.common.quiet
    if arguments.world is not None:
        on_a_world(arguments, arguments.world)
        return
    if not arguments.feature:
        raise ConfigError("FEATURE is missing: HOOK:KIND:INDEX[@POOLING]; or give --world")
    with stage("loading torch and the models", quiet=quiet):
        from tiltscope.engine.bundle import load
        from tiltscope.engine.compare import compare
        from tiltscope.engine.explain import inquire
        from tiltscope.engine.report.comparison import METHODS_FOLDER, add_to_page, check_page
        from tiltscope.engine.report.writer import check_folder

        bundle = load(arguments.bundle)
        first = inquire(bundle, arguments.feature, arguments.config.methods()[0])
    identity = arguments.config.identity("compare", bundle.identity, first.feature.identity)
    if arguments.page is not None:
        if arguments.out is not None:
            raise ConfigError(f"out and page: got both ({arguments.out} and {arguments.page}); give one")
        check_page(arguments.page, first.feature.identity, first.target)
        out = arguments.page / METHODS_FOLDER
    else:
        out = arguments.out or Path(f"tiltscope-{identity[:8]}")
    check_folder(out, identity)
    try:
        with stage("comparing", quiet=quiet) as tracker:
            comparison = compare(bundle, arguments.feature, arguments.config, on_part=tracker.begin)
        if arguments.page is None:
            comparison.save(out)
        else:
            add_to_page(comparison, arguments.page)
    except KeyboardInterrupt:
        raise Stopped("interrupted; the same command starts again") from None
    if arguments.common.json:
        put_json(json.loads((out / "manifest.json").read_text()) | {"out": str(out)})
        return
    from rich.console import Console
    from rich.table import Table

    from tiltscope.engine.report.comparison import table_rows
    from tiltscope.engine.report.words import COMPARED

    table = Table()
    for label in ("", *(words.label for words in COMPARED.values())):
        table.add_column(label, justify="right" if label else "left", overflow="fold")
    for title, cells, note in table_rows(comparison):
        table.add_row(title, *cells)
        if note:
            say(f"note: {title}: {note}")
    Console(width=None if sys.stdout.isatty() else 190).print(table)
    print(f"target    {comparison.target:.4g} (quantile {comparison.target_quantile:.4f} of natural activation)")
    print(f"page      {((arguments.page or out) / 'index.html').resolve()}")


def on_a_world(arguments: Arguments, name: str) -> None:
    """The table of a world; nothing is written."""
    quiet = arguments.common.quiet
    with stage("drawing", quiet=quiet) as tracker:
        from tiltscope.engine.bundle import load
        from tiltscope.engine.compare_world import compare_world

        bundle = load(arguments.bundle) if arguments.feature else None
        world, rows = compare_world(
            name, arguments.config, bundle=bundle, feature=arguments.feature, on_part=tracker.begin
        )
    exact = {"mean": world.mean, "sd": world.sd, "log_z": world.log_z}
    if arguments.common.json:
        put_json({"world": name, "caption": world.caption, "exact": exact, "methods": [asdict(each) for each in rows]})
        return
    from rich.console import Console
    from rich.table import Table

    from tiltscope.engine.report.words import MISSING, number

    table = Table(title=world.caption)
    for label in ("", "mean of a", "error", "sd of a", "log Z", "excess KL", "ESS", "calls", "gradients", "s"):
        table.add_column(label, justify="right" if label else "left", overflow="fold")
    table.add_row("exact", number(world.mean, 4), "", number(world.sd, 4), number(world.log_z, 3), *[""] * 5)
    for row in rows:
        se = "" if row.mean_se is None else f" ± {number(row.mean_se, 4)}"
        cells = [f"{number(row.mean, 4)}{se}", f"{100 * row.error:+.1f} %", number(row.sd, 4)]
        more = ((row.log_z, 3), (row.excess_kl, 4), (row.ess, 0), (row.nfe, 0), (row.n_vjp, 0), (row.seconds, 1))
        table.add_row(
            row.method, *cells, *(MISSING if value is None else number(value, digits) for value, digits in more)
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
