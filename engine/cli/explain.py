"""`tiltscope explain FEATURE`: four answers to what a feature means, a page of them, and the numbers on the terminal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tiltscope.engine.cli.common import Common, FeatureWord, Stopped, follow
from tiltscope.engine.cli.screen import printable, put_json, say, stage
from tiltscope.engine.config import ExplainConfig

if TYPE_CHECKING:
    from tiltscope.engine.samples import Explanation

# What the terminal shows of each answer; the page and the manifest have every number.
ROWS = (
    ("activation_mean", "mean activation", "{:.3f}"),
    ("activation_se", "± standard error", "{:.3f}"),
    ("z", "z under natural pictures", "{:.2f}"),
    ("percentile", "percentile of natural", "{:.1f}"),
    ("selectivity_rank", "selectivity rank", "{:.0f}"),
    ("naturalness", "naturalness (natural: 0)", "{:.2f}"),
    ("nearest_distance", "distance to nearest natural", "{:.3f}"),
    ("diversity", "diversity", "{:.3f}"),
    ("kl", "KL from natural (nats)", "{:.2f}"),
    ("excess_kl", "excess KL over the tilt", "{:.2f}"),
    ("seconds", "seconds", "{:.1f}"),
)
TITLES = {"tilt": "tilt", "topk": "top-K", "hard": "hard truncation", "actmax": "activation max."}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a feature means: the KL-minimal tilt beside top-K, hard truncation and activation maximisation."""

    feature: FeatureWord
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:137"""
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
        with stage("drawing", quiet=quiet) as tracker:
            explanation = answer(inquiry, on_step=follow(tracker, inquiry.run, inquiry.run.config.num))
        explanation.save(out)
    except KeyboardInterrupt:
        raise Stopped("interrupted; the same command starts again") from None
    if arguments.common.json:
        put_json(json.loads((out / "manifest.json").read_text()) | {"out": str(out)})
    else:
        show(explanation, out)


def show(explanation: "Explanation", out: Path) -> None:
    """The page's path, the feature's name and the table of four answers, on stdout; warnings on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    named = printable(explanation.name) if explanation.name else "no name"
    table = Table(title=Text(f"{explanation.feature} ({named})"), caption=_caption(explanation))
    table.add_column("")
    for answer in explanation.answers:
        table.add_column(TITLES[answer], justify="right")
    for metric, title, form in ROWS:
        values = [explanation.metrics[answer].get(metric) for answer in explanation.answers]
        if any(value is not None for value in values):
            table.add_row(title, *("-" if value is None else form.format(value) for value in values))
    Console(soft_wrap=False).print(table)
    for warning in (*explanation.warnings, *(f"{TITLES[name]}: {note}" for name, note in explanation.notes.items())):
        say(f"note: {printable(warning)}")
    print(f"feature  {explanation.feature} ({named})")
    print(f"page     {(out / 'index.html').resolve()}")


def _caption(explanation: "Explanation") -> str:
    reached = explanation.metrics["tilt"]
    mean, error = reached["activation_mean"], reached["activation_se"]
    return (
        f"target {explanation.target:.3f} (quantile {explanation.target_quantile:.4f} of natural), "
        f"lambda {explanation.lam:.3f}; reached {mean if mean is None else round(mean, 3)}"
        f" ± {error if error is None else round(error, 3)}; {explanation.calibration.ess:.0f} effective natural pictures"
    )
