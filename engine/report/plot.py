"""The plot of the page: natural activations as a histogram, and under it where each answer lies, as inline SVG.

Text is drawn at its final size, so a plot is made for the width it is shown at. Colours are the page's (CSS classes).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from tiltscope.engine.report.words import number

_TOP, _BARS, _AXIS, _LANE = 44, 130, 40, 40
_SIDE = 44


@dataclass(frozen=True)
class Lane:
    """One answer: its name, its CSS class, and the activations of its pictures (finite)."""

    title: str
    css: str
    values: Sequence[float]


def histogram(
    natural: NDArray[np.float64],
    *,
    target: float | None,
    natural_mean: float,
    lanes: Sequence[Lane],
    width: int,
    name: str,
) -> Markup:
    """SVG of `width` CSS pixels. Bars: number of natural pictures, logarithmic, because most features are silent on most.

    target: a line through bars and lanes, None where the target is not an activation. name: distinguishes ids of two plots on
    one page. All of natural and lanes in units of activation.
    """
    values = natural[np.isfinite(natural)]
    inside = [
        *values.tolist(),
        *([] if target is None else [target]),
        *(each for lane in lanes for each in lane.values),
    ]
    low, high = min(inside), max(inside)
    if low == high:
        low, high = low - 0.5, high + 0.5
    left, right = _SIDE, width - 14
    bottom = _TOP + _BARS
    height = bottom + _AXIS + _LANE * len(lanes) + 4

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * (right - left), 2)

    counts, edges = np.histogram(values, bins=max(20, min(60, width // 14)), range=(low, high))
    most = max(1, int(counts.max()))

    def y(count: float) -> float:
        # log(1 + count): an empty bin has no height, one picture is seen.
        return round(bottom - math.log1p(count) / math.log1p(most) * _BARS, 2)

    parts: list[Markup] = []
    for count in _decades(most):
        parts.append(_line(left, y(count), right, y(count), "rule"))
        parts.append(_text(left - 6, y(count) + 4, f"{count:,}", "tick end"))
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            wide = max(0.5, x(end) - x(start) - 1)
            shape = Markup('<rect class="bar" x="{}" y="{}" width="{:.2f}" height="{:.2f}"/>')
            parts.append(shape.format(x(start), y(count), wide, bottom - y(count)))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    for value in _ticks(low, high, 4 if width < 500 else 7):
        parts.append(_line(x(value), bottom, x(value), bottom + 4, "axis"))
        parts.append(_text(x(value), bottom + 17, number(value, _digits(high - low)), "tick middle"))
    # Marks come before the lanes: a lane's text is drawn over the line, not under it.
    parts += _mark(x(natural_mean), _TOP - 6, bottom, f"natural mean {number(natural_mean)}", "natural", right)
    end = bottom + _AXIS + _LANE * len(lanes)
    if target is not None:
        parts += _mark(x(target), _TOP - 26, end, f"target {number(target)}", "target", right)
    for at, lane in enumerate(lanes):
        parts += _lane(lane, x, bottom + _AXIS + _LANE * at, left, right)
    label = _description(values, target, natural_mean, lanes)
    head = Markup(
        '<svg class="plot {name}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-labelledby="{name}-t"><title id="{name}-t">{label}</title>'
    ).format(name=name, width=width, height=height, label=label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _lane(lane: Lane, x: Callable[[float], float], top: float, left: float, right: float) -> list[Markup]:
    middle = top + 25
    mean = sum(lane.values) / len(lane.values) if lane.values else None
    parts = [
        _text(left, top + 12, f"{lane.title}, mean {number(mean)}", "lane"),
        _line(left, middle, right, middle, "rule"),
    ]
    parts += [_line(x(value), middle - 6, x(value), middle + 6, f"sample {lane.css}") for value in lane.values]
    if mean is not None:
        parts.append(Markup('<circle class="mean {}" cx="{}" cy="{}" r="5"/>').format(lane.css, x(mean), middle))
    return parts


def _mark(at: float, top: float, bottom: float, text: str, css: str, right: float) -> list[Markup]:
    """A vertical line with its label on the side that has room."""
    room = right - at > 7 * len(text)
    label = _text(at + (5 if room else -5), top + 4, text, f"{css} {'' if room else 'end'}")
    return [_line(at, top - 8, at, bottom, css), label]


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(css.strip(), x, y, escape(text))


def _decades(most: int) -> list[int]:
    """1, 10, 100, ... up to the tallest bar."""
    return [10**power for power in range(len(str(most)))]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round values inside [low, high], `about` of them."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _digits(span: float) -> int:
    return max(0, 1 - math.floor(math.log10(span)))


def _description(natural: NDArray[np.float64], target: float | None, natural_mean: float, lanes: Sequence[Lane]) -> str:
    means: Mapping[str, float] = {lane.title: sum(lane.values) / len(lane.values) for lane in lanes if lane.values}
    told = "; ".join(f"{title} has mean {number(mean)}" for title, mean in means.items())
    aim = "" if target is None else f" The target is {number(target)}."
    return (
        f"Activation of {len(natural):,} natural pictures, from {number(float(natural.min()))} to "
        f"{number(float(natural.max()))} with mean {number(natural_mean)}.{aim} {told}."
    )
