"""index.html: one self-contained page, four answers side by side and how far to trust them.

Everything is inside the file: style, pictures as data: URIs, plots as inline SVG; a content security policy forbids requests.
No script. All text is escaped by the template. Knows an Explanation and its manifest; writes no file.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jinja2
import numpy as np
from markupsafe import Markup

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report.pictures import (
    GRID_LIMIT,
    data_uri,
    encode_png,
    heat_pixels,
    heat_ramp,
    reduce,
    strongest_area,
    to_array,
)
from tiltscope.engine.report.plot import Lane, histogram
from tiltscope.engine.report.trust import as_mapping, log_tilt_spec, trust_lines, warning_lines
from tiltscope.engine.report.words import (
    ANSWERS,
    METRIC_ROWS,
    MISSING,
    AnswerWords,
    missing_reason,
    number,
    percent,
    sentence,
)
from tiltscope.engine.samples import Explanation, Samples

# Twice the size of a tile, for dense screens; larger pictures only make the page heavy.
_LONGEST_SIDE = 256
_TILE = 128
# More pictures than this are shown at half the size.
_MANY = 12
# Where compare's section stands on the page, between two of these.
_METHODS_MARK = "<!-- methods -->"
_PLOT_WIDTHS = {"wide": 1136, "medium": 676, "narrow": 343}


@dataclass(frozen=True)
class Tile:
    """One picture of an answer."""

    uri: str
    alt: str
    activation: str
    source: str | None
    heat_uri: str | None
    heat_alt: str


@dataclass(frozen=True)
class Panel:
    """One answer: its pictures, its words, its headline numbers as (label, value, unit), and how many there are."""

    name: str
    words: AnswerWords
    tiles: Sequence[Tile]
    facts: Sequence[tuple[str, str, str]]
    note: str | None
    shown: str | None
    failed: int
    crisp: bool


@dataclass(frozen=True)
class Cell:
    """A number of the table; footnote: number of the note that says why there is none."""

    value: str
    error: str | None
    footnote: int | None


def render(explanation: Explanation, manifest: Mapping[str, Any]) -> str:
    """The page. manifest: as it stands in the folder (manifest.complete)."""
    answers = {name: explanation.answers[name] for name in ANSWERS if name in explanation.answers}
    largest = _largest_heat(answers.values())
    rows, footnotes = _table(explanation, list(answers))
    spec = log_tilt_spec(manifest)
    bundle = as_mapping(manifest.get("bundle"))
    return template("page.html.jinja").render(
        feature=explanation.feature,
        name=explanation.name,
        name_source=manifest.get("feature_name_source"),
        lede=_lede(explanation, spec),
        panels=[_panel(name, samples, explanation, largest) for name, samples in answers.items()],
        heat_key=data_uri(encode_png(heat_ramp())) if largest else None,
        heat_largest=number(largest),
        many=max((len(samples) for samples in answers.values()), default=0) > _MANY,
        titles={name: ANSWERS[name] for name in answers},
        rows=rows,
        footnotes=footnotes,
        methods_mark=Markup(2 * _METHODS_MARK),
        plots=_plots(explanation, answers, spec),
        num_natural=f"{len(explanation.natural):,}",
        trust=trust_lines(explanation, manifest, spec),
        warnings=warning_lines(explanation),
        repeat=unbroken(manifest.get("repeat")),
        seed=answers["tilt"].seed,
        bundle=bundle,
        attribution=[as_mapping(each) for each in cast(Iterable[Any], bundle.get("attribution") or ())],
        provenance=_provenance(manifest, bundle),
    )


def with_methods(page: str, section: str) -> str:
    """The page with compare's section in its place, in that of an earlier one. Raises ConfigError where the page has no place."""
    before, *middle, after = page.split(_METHODS_MARK)
    if len(middle) != 1:
        raise ConfigError("index.html has no place for methods; make the page again with tiltscope explain")
    return f"{before}{_METHODS_MARK}{section}{_METHODS_MARK}{after}"


def methods_of(page: str) -> str:
    """compare's section of a page, empty where it has none."""
    parts = page.split(_METHODS_MARK)
    return parts[1] if len(parts) == 3 else ""


@cache
def template(name: str) -> jinja2.Template:
    """A page of this folder; it escapes what it is given."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tiltscope.engine.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = sentence
    return environment.get_template(name)


def _lede(explanation: Explanation, spec: str) -> str:
    what = "activation" if spec == "linear" else f"φ(activation), φ = {spec},"
    return (
        f"What pictures make this feature fire at {number(explanation.target)}? Four answers to one question: the target is "
        f"a mean {what} of {number(explanation.target)}, the {percent(explanation.target_quantile)} quantile of natural "
        f"activation (mean {number(explanation.natural_mean)}, largest {number(float(explanation.natural.max()))})."
    )


def _panel(name: str, samples: Samples, explanation: Explanation, largest: float) -> Panel:
    metrics = explanation.metrics.get(name, {})
    num = len(samples)
    facts = [
        (METRIC_ROWS[metric].label, _with_error(metrics, metric), unit)
        for metric, unit in (
            ("activation_mean", ""),
            ("z", "sd"),
            ("naturalness", "sd"),
            ("diversity", ""),
            ("excess_kl", "nats"),
        )
        if metrics.get(metric) is not None
    ]
    tiles = [] if samples.images is None else [_tile(name, samples, at, largest) for at in _shown(samples)]
    sound = int(samples.ok.sum())
    return Panel(
        name=name,
        words=ANSWERS[name],
        tiles=tiles,
        facts=facts,
        note=explanation.notes.get(name),
        shown=f"The first {len(tiles)} of {sound:,}." if tiles and sound > len(tiles) else None,
        failed=num - sound,
        crisp=samples.images is not None and max(samples.images.shape[2:]) < _TILE,
    )


def _shown(samples: Samples) -> list[int]:
    return [at for at, ok in enumerate(samples.ok.tolist()) if ok][:GRID_LIMIT]


def _tile(name: str, samples: Samples, at: int, largest: float) -> Tile:
    images = samples.images
    if images is None:
        raise ValueError("a tile needs a picture")
    activation = number(float(samples.activation[at]))
    source = samples.sources[at] if samples.sources is not None else None
    which = f"{ANSWERS[name].title}, picture {at + 1} of {len(samples)}"
    heat_uri, heat_alt = None, ""
    if samples.heat is not None and largest:
        heat = samples.heat[at].detach().cpu().numpy()
        area = strongest_area(heat)
        heat_uri = data_uri(encode_png(heat_pixels(heat, largest=largest)))
        heat_alt = f"The feature fires most at the {area}." if area else "The feature does not fire on this picture."
    return Tile(
        uri=data_uri(encode_png(reduce(to_array(images[at]), longest=_LONGEST_SIDE))),
        alt=f"{which}: {source + ', ' if source else ''}activation {activation}",
        activation=activation,
        source=source,
        heat_uri=heat_uri,
        heat_alt=heat_alt,
    )


def _largest_heat(answers: Iterable[Samples]) -> float:
    """One scale for all answers, so that colours compare between them; 0 where there is no map or nothing fires."""
    largest = 0.0
    for samples in answers:
        if samples.heat is not None and samples.ok.any():
            heat = samples.heat[samples.ok].abs()
            largest = max(largest, float(heat[heat.isfinite()].max()) if heat.isfinite().any() else 0.0)
    return largest


def _with_error(metrics: Mapping[str, float | None], metric: str) -> str:
    words = METRIC_ROWS[metric]
    value = number(metrics.get(metric), words.digits)
    error = metrics.get(words.error) if words.error else None
    return f"{value} ± {number(error, words.digits)}" if error else value


def _table(explanation: Explanation, answers: Sequence[str]) -> tuple[list[tuple[Any, list[Cell]]], list[str]]:
    footnotes: list[str] = []
    rows: list[tuple[Any, list[Cell]]] = []
    for metric, words in METRIC_ROWS.items():
        cells: list[Cell] = []
        for answer in answers:
            metrics = explanation.metrics.get(answer, {})
            value = metrics.get(metric)
            if value is None or not math.isfinite(value):
                reason = missing_reason(metric, answer)
                if reason not in footnotes:
                    footnotes.append(reason)
                cells.append(Cell(MISSING, None, footnotes.index(reason) + 1))
            else:
                error = metrics.get(words.error) if words.error else None
                cells.append(
                    Cell(number(value, words.digits), None if error is None else number(error, words.digits), None)
                )
        rows.append((words, cells))
    return rows, footnotes


def _plots(explanation: Explanation, answers: Mapping[str, Samples], spec: str) -> list[Markup]:
    lanes = [
        Lane(ANSWERS[name].title, name, samples.activation[samples.ok & samples.activation.isfinite()].tolist())
        for name, samples in answers.items()
    ]
    # phi of another kind has a mean that is no place on the axis of activations.
    target = explanation.target if spec == "linear" else None
    return [
        histogram(
            np.asarray(explanation.natural, np.float64),
            target=target,
            natural_mean=explanation.natural_mean,
            lanes=lanes,
            width=width,
            name=name,
        )
        for name, width in _PLOT_WIDTHS.items()
    ]


def unbroken(command: str | None) -> list[str]:
    """The command in pieces that a line should not break: each flag with its value."""
    return [] if not command else re.split(r" (?=--[a-z])", command)


def _provenance(manifest: Mapping[str, Any], bundle: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(what, value, whether it is code) for everything that decides the pictures and is known."""
    config, prior_seconds = as_mapping(manifest.get("config")), as_mapping(manifest.get("seconds"))
    settings = ", ".join(
        f"{name} {config[name]}" for name in ("solver", "steps", "grid", "lift", "log_tilt") if config.get(name)
    )
    seconds = ", ".join(
        f"{name.replace('_', ' ')} {number(float(value), 1)}"
        for name, value in prior_seconds.items()
        if value is not None
    )
    versions = ", ".join(f"{name} {value}" for name, value in as_mapping(manifest.get("versions")).items() if value)
    runs = ", ".join(str(manifest[name]) for name in ("runner", "kernels") if manifest.get(name))
    lines = [
        ("Bundle", bundle.get("name"), False),
        ("Bundle identity", bundle.get("identity"), True),
        ("Prior", manifest.get("prior"), True),
        ("Feature", manifest.get("feature_identity"), True),
        ("Run identity", manifest.get("identity"), True),
        ("Settings", settings, False),
        ("Seed", config.get("seed"), False),
        ("Runner, kernels", runs, False),
        ("Seconds", seconds, False),
        ("Versions", versions, False),
        ("Licence", bundle.get("licence"), False),
    ]
    return [(what, str(value), code) for what, value, code in lines if value not in (None, "")]
