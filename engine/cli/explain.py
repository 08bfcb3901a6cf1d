"""`tiltscope explain FEATURE`: four answers to what a feature means, a page of them, and the numbers on the terminal."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tiltscope.engine.cli.common import Common, FeatureWord, Stopped, follow
from tiltscope.engine.cli.screen import printable, put_json, say, stage
from tiltscope.engine.config import ExplainConfig

if TYPE_CHECKING:
    from tiltscope.engine.samples import Explanation

# What the terminal shows of each answer, in the page's own words; the page and the manifest have every number.
ROWS = (
    "activation_mean",
    "z",
    "percentile",
    "selectivity_rank",
    "naturalness",
    "nearest_distance",
    "diversity",
    "kl",
    "excess_kl",
    "ess",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a feature means: the KL-minimal tilt beside top-K, hard truncation and activation maximisation."""

    feature: FeatureWord
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169"""
    config: Annotated[ExplainConfig, tyro.conf.arg(name="")]
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    out: Path | None = None
    """output folder (default: tiltscope-IDENTITY in the current folder)"""
    common: Common


def run(arguments: Arguments) -> None:
    """Inquire, refuse what cannot be met before anything is written, answer, save, show."""
    quiet = arguments.common.quiet
    with stage("loading torch and the models", quiet=quiet):
        from tiltscope.engine.bundle import load
        from tiltscope.engine.explain import answer, inquire
        from tiltscope.engine.report.writer import check_folder

        inquiry = inquire(load(arguments.bundle), arguments.feature, arguments.config)
    out = arguments.out or Path(f"tiltscope-{inquiry.identity[:8]}")
    check_folder(out, inquiry.identity)
    try:
        with stage("answering", quiet=quiet) as tracker:
            on_step = follow(tracker, inquiry.run, inquiry.run.config.num)
            explanation = answer(inquiry, on_step=on_step, on_part=tracker.begin)
        explanation.save(out)
    except KeyboardInterrupt:
        raise Stopped("interrupted; the same command starts again") from None
    if arguments.common.json:
        put_json(json.loads((out / "manifest.json").read_text()) | {"out": str(out)})
    else:
        show(explanation, out)


def show(explanation: "Explanation", out: Path) -> None:
    """The table of four answers, what was reached, the feature's name and the page's path; warnings on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tiltscope.engine.report.words import ANSWERS, METRIC_ROWS, number

    named = printable(explanation.name) if explanation.name else "without a name"
    # A narrow terminal has room for the numbers or for the units; the page shows both.
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table()
    table.add_column("")
    for answer in explanation.answers:
        table.add_column(ANSWERS[answer].short, justify="right")
    for metric in ROWS:
        words, cells = METRIC_ROWS[metric], list[str]()
        for values in (explanation.metrics[answer] for answer in explanation.answers):
            error = values.get(words.error) if words.error else None
            cells.append(number(values[metric], words.digits) + (f" ± {number(error, words.digits)}" if error else ""))
        table.add_row(Text(f"{words.label} ({words.unit})" if console.width >= 110 else words.label), *cells)
    console.print(table)
    reached = explanation.metrics["tilt"]
    print(
        f"target    {number(explanation.target, 3)} (quantile {explanation.target_quantile:.4f} of natural activation), "
        f"lambda {number(explanation.lam, 3)}; reached {number(reached['activation_mean'], 3)} "
        f"± {number(reached['activation_se'], 3)}"
    )
    print(f"feature   {explanation.feature} ({named})")
    if choice := explanation.manifest.get("runner_choice"):
        print(choice["why"])
    print(f"page      {(out / 'index.html').resolve()}")
    for warning in explanation.warnings:
        say(f"note: {printable(warning)}")
    for answer, note in explanation.notes.items():
        say(f"note: {ANSWERS[answer].title}: {printable(note)}")
