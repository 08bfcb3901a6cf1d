"""A Comparison on disk: the page, the plot, two tables and the manifest.

    OUT/index.html          table, plot and pictures of every method        OUT/manifest.json   every number, how to repeat it
    OUT/compare.png         activation against naturalness over lambda       OUT/methods.parquet OUT/curves.parquet

In a folder of explain's it is all of that in OUT/compare, and a section of OUT/index.html.
Knows a Comparison as a record; measures nothing.
"""

import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tiltscope.engine.compare import Comparison, Method
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report import manifest as manifests
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.report.page import template, unbroken, with_methods
from tiltscope.engine.report.pictures import data_uri, encode_png, to_array
from tiltscope.engine.report.words import ANSWERS, COMPARED, MISSING, number, percent
from tiltscope.engine.report.writer import check_folder

METHODS_FOLDER = "compare"  # in a folder of explain's
# Pictures shown of each method.
SHOWN = 8
# One standard error either way would hold two thirds of the means; a reader expects 95 %.
_BAND = 1.96
_NAMES = {name: ANSWERS[name].title for name in ("topk", "hard", "actmax")} | {"maco": "Phase alone maximised (MaCo)"}


def save_comparison(comparison: Comparison, folder: Path) -> Path:
    """Comparison.save: the manifest comes last, so that a folder without one is not whole."""
    check_folder(folder, comparison.manifest["identity"])
    folder.mkdir(parents=True, exist_ok=True)
    plot = plot_png(comparison)
    write_bytes(folder / "compare.png", plot)
    for name, rows in (("methods", _method_rows(comparison)), ("curves", [asdict(each) for each in comparison.curves])):
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        write_bytes(folder / f"{name}.parquet", file.getvalue())
    write_bytes(folder / "index.html", render(comparison, plot).encode())
    manifests.write(folder, comparison.manifest)
    return folder


def check_page(folder: Path, feature_identity: str, target: float) -> None:
    """Whether `folder` holds an explanation of this feature at this target, and whole. Raises ConfigError where not."""
    held = manifests.read(folder)
    if (
        held is None
        or held.get("command") != "explain"
        or "target" not in held
        or not (folder / "index.html").is_file()
    ):
        raise ConfigError(f"page: {folder} holds no finished explanation; make one there with tiltscope explain --out")
    if held["feature_identity"] != feature_identity:
        raise ConfigError(
            f"page: {folder} explains {held['feature']}, another feature or other weights; compare that one"
        )
    if not math.isclose(held["target"], target, rel_tol=1e-6):
        asked = f"--target-activation {held['target']!r}"
        raise ConfigError(
            f"page: {folder} is at target {held['target']:.4g}, the comparison at {target:.4g}; give {asked}"
        )


def add_to_page(comparison: Comparison, folder: Path) -> Path:
    """The comparison in folder/compare, and its section on the page of the explanation in `folder`, in place of an earlier one.

    Raises ConfigError as check_page does.
    """
    check_page(folder, comparison.manifest["feature_identity"], comparison.target)
    saved = save_comparison(comparison, folder / METHODS_FOLDER)
    section = template("methods.html.jinja").render(**_methods(comparison, plot_png(comparison)))
    page = with_methods((folder / "index.html").read_text(encoding="utf-8"), section)
    write_bytes(folder / "index.html", page.encode())
    return saved


def title_of(method: Method) -> str:
    """What a method is called where people read."""
    return _NAMES.get(method.name, method.name)


def plot_png(comparison: Comparison) -> bytes:
    """Activation against naturalness: one curve a sampler over lambda with its 95 % band, one mark a rival, the target's line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = [f"C{at}" for at in range(10)]
    names = list(dict.fromkeys(each.method for each in comparison.curves))
    for name, colour in zip(names, colours, strict=False):
        points = [p for p in comparison.curves if p.method == name and p.naturalness is not None]
        x = np.array([p.activation for p in points])
        y = np.array([p.naturalness for p in points], np.float64)
        band = _BAND * np.array([p.naturalness_se or 0.0 for p in points])
        axes.fill_between(x, y - band, y + band, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, y, color=colour, marker="o", markersize=4, label=name)
        for point in points:
            axes.annotate(f"{point.lam:.3g}", (point.activation, point.naturalness or 0.0), fontsize=7, alpha=0.7)
    marks = ("s", "D", "v", "^")
    for method, mark in zip((m for m in comparison.methods if m.kind == "rival"), marks, strict=False):
        x, y = method.metrics.get("activation_mean"), method.metrics.get("naturalness")
        if x is not None and y is not None:
            error = _BAND * (method.metrics.get("naturalness_se") or 0.0)
            axes.errorbar([x], [y], [error], fmt=mark, color="0.25", markersize=6, label=title_of(method))
    axes.axvline(comparison.target, color="0.4", linestyle="--", linewidth=1)
    axes.axhline(0.0, color="0.8", linewidth=1)
    axes.set_xlabel("mean activation (dashed: the target; small figures: lambda)")
    axes.set_ylabel("naturalness (sd; 0: as a real picture), with 95 % bands")
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def table_rows(comparison: Comparison) -> list[tuple[str, list[str], str | None]]:
    """(method, cells in the order of COMPARED, note) as text."""
    rows: list[tuple[str, list[str], str | None]] = []
    for method in comparison.methods:
        cells = [_cell(method, name) for name in COMPARED]
        rows.append((title_of(method), cells, method.note))
    return rows


def _cell(method: Method, name: str) -> str:
    if name == "lam":
        return number(method.lam, 3) if method.lam is not None else MISSING
    words, value = COMPARED[name], method.metrics.get(name)
    if value is None:
        return MISSING
    text = number(value, words.digits)
    if name == "excess_kl" and method.excess_kl_kind == "lower bound":
        text = f"≥ {text}"
    error = method.metrics.get(words.error) if words.error else None
    return text if error is None else f"{text} ± {number(error, words.digits)}"


def render(comparison: Comparison, plot: bytes) -> str:
    """The page: self-contained, no script, text escaped by the template."""
    return template("comparison.html.jinja").render(
        feature=comparison.feature,
        name=comparison.feature_name,
        target=number(comparison.target, 3),
        quantile=percent(comparison.target_quantile),
        repeat=unbroken(comparison.manifest.get("repeat")),
        seed=comparison.manifest["config"]["seed"],
        **_methods(comparison, plot),
    )


def _methods(comparison: Comparison, plot: bytes) -> dict[str, Any]:
    """What methods.html.jinja needs."""
    return {
        "plot": data_uri(plot),
        "columns": COMPARED,
        "rows": table_rows(comparison),
        "unmatched": [title_of(each) for each in comparison.methods if not each.matched],
        "pictures": [(title_of(each), _tiles(each)) for each in comparison.methods if each.samples is not None],
    }


def _tiles(method: Method) -> list[tuple[str, str]]:
    samples = method.samples
    if samples is None or samples.images is None:
        return []
    shown = np.flatnonzero(samples.ok.numpy())[:SHOWN]
    return [
        (data_uri(encode_png(to_array(samples.images[at]))), f"activation {number(float(samples.activation[at]))}")
        for at in shown.tolist()
    ]


def _method_rows(comparison: Comparison) -> list[dict[str, Any]]:
    names = sorted({name for each in comparison.methods for name in each.metrics})
    return [
        {"method": title_of(each)} | each.facts() | {name: each.metrics.get(name) for name in names}
        for each in comparison.methods
    ]
