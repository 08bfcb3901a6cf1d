"""docs/benchmarks.md from benchmarks/results/*.jsonl: the last line of each benchmark, with the load it was measured under.

python tools/benchmark_tables.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Written by `python tools/benchmark_tables.py` from `benchmarks/results/`; do not edit. Ways were timed in turn in one process, so
a ratio says more than a time, and nothing says much under a high load. `load`: processes that wanted to run, on average, on the
processors named; an idle machine has about as many as threads.
"""


def lines(name: str) -> list[dict[str, Any]]:
    """A result file's lines, none where there is no file."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured(line: dict[str, Any], command: str) -> str:
    machine = line["machine"]
    return (
        f"`{command}`, {line['time'][:10]}, torch {line['versions']['torch']}, {machine['processors']} processors "
        f"({', '.join(machine['features']) or 'no AVX2'}), threads {machine['threads']}, load {machine['load']}."
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(each)} |" for each in (columns, ["---"] * len(columns), *rows))


def bundled_prior() -> str:
    """The identity of emoji64's prior, as results name it."""
    described = json.loads((ROOT / "engine/_root/bundles/emoji64/bundle.json").read_text())
    return "sha256:" + described["files"]["prior/diffusion_pytorch_model.safetensors"]["sha256"]


def peers() -> Iterator[str]:
    yield "## Whole pictures beside peers"
    yield "One feature, one mean activation (within 5 % over the same seeds), the same networks."
    found = lines("peers")
    if not found:
        yield "not measured"
        return
    line = found[-1]
    base = line["ways"][line["base"]]
    rows: list[list[str]] = []
    for name, way in line["ways"].items():
        cells = [name, str(way["rows"]), f"{way['strength']:.3g}"]
        cells.append(f"{way['mean']:.2f} ± {way['se']:.2f}{'' if way['matched'] else ' (not matched)'}")
        cells.append(f"{way['naturalness']:.2f} ± {way['naturalness_se'] or 0:.2f}")
        cells.append(f"{way['detail']:.2f}" if "detail" in way else "not measured")
        for num in (line["together"], 1):
            told = way[f"seconds_{num}"]["p50"]
            cells.append(f"{told:.2f} ({told / base[f'seconds_{num}']['p50']:.2f}x)")
        rows.append([*cells, way["cannot"] or "-"])
    if line.get("prior") != bundled_prior():  # lines that name none are of priors before
        yield (
            "**Of an earlier prior of the bundle**, and the preset `fast` of then; not measured on the present one: times of a "
            "row hold, strengths and naturalness are that prior's."
        )
    columns = ["way", "rows", "strength", "activation", "naturalness", "detail"]
    columns += [f"s a picture, {line['together']} at once", "one alone"]
    yield (
        measured(line, "benchmarks/peers.py")
        + f" {line['num']} pictures of each way. Target {line['target']:.2f}; runner {line['runner']}."
    )
    yield table([*columns, "cannot"], rows)
    yield (
        f"x: times the time of {line['base']}. Detail: mean absolute Laplacian, 1 as in held-out pictures. Few rows blur, which "
        "naturalness does not see. Published: activation and naturalness are of fewer pictures, those of the ablation before "
        '(docs/decisions.md, "Default solver", has the last one).'
    )


def memory() -> Iterator[str]:
    yield "## Memory of a guided row, foreseen and measured"
    found = lines("memory")
    if not found:
        yield "not measured"
        return
    line = found[-1]
    yield measured(line, "benchmarks/memory.py")
    yield table(
        [
            "bucket",
            "dtype",
            "chunk",
            "row foreseen, MiB",
            "row",
            "process foreseen, MiB",
            "process",
            "off",
            "growth over 10 rows",
        ],
        [
            [
                str(each["bucket"]),
                each["dtype"],
                str(each["chunk"] or "-"),
                *(
                    f"{each[name]:.0f}"
                    for name in ("row_foreseen_mib", "row_mib", "process_foreseen_mib", "process_mib")
                ),
                f"{each['process_foreseen_mib'] / each['process_mib'] - 1:+.1%}",
                f"{each['growth_mib']:.1f}",
            ]
            for each in line["settings"]
        ],
    )


def batching() -> Iterator[str]:
    yield "## A mixed stream in one batch"
    found = [line for line in lines("batching") if not line["stub"]]
    if not found:
        yield "not measured"
        return
    line = found[-1]
    yield measured(line, "benchmarks/batching.py")
    rate = line["sample_rows_a_second"]
    yield table(["stream", "sample rows a second"], [[name, f"{value:.2f}"] for name, value in rate.items()])
    yield (
        f"Mixed over alike {line['mixed_over_alike']:.2f}; over one by one {line['mixed_over_one_by_one']:.2f}, of a gain by "
        f"sharing of {line['batch_gain']:.2f}. Peak memory after each turn of {3 * line['num']} requests: "
        f"{', '.join(f'{each:.0f}' for each in line['peak_mib'])} MiB."
    )
    waited = line["latency_s"].items()
    yield table(
        ["load", "p50 s", "p95 s"], [[load, f"{each['p50']:.1f}", f"{each['p95']:.1f}"] for load, each in waited]
    )


def budget() -> Iterator[str]:
    yield "## Which rows to guide"
    found = lines("budget")
    if not found:
        yield "not measured"
        return
    line = found[-1]
    costs, names = line["seconds_a_row"], ", ".join(f"`{name}`" for name in line["features"])
    yield (
        measured(line, "benchmarks/budget.py")
        + f" {line['num']} pictures of each of {names}, at one mean activation each."
    )
    yield (
        "Behind: naturalness less that of the most natural line, mean over features and its standard error. "
        "Detail: mean absolute Laplacian, 1 as in held-out pictures. "
        f"Cost: a guided row takes {costs['guided']:.3f} s a picture, an unguided one {costs['unguided']:.3f} s."
    )
    base = line["candidates"][0]["seconds"]
    rows: list[list[str]] = []
    for each in line["candidates"]:
        low, high = each["interval"]
        where = "every row" if (low, high) == (0.0, 1.0) else f"{low:g} to {high:g}"
        chosen = each == line["choice"]
        rows.append(
            [
                f"{each['steps']} {each['grid']}",
                where + (" (chosen)" if chosen else ""),
                str(each["guided"]),
                f"{each['reached']} of {len(line['features'])}",
                f"{each['naturalness']:.2f}",
                f"{each['behind']:+.2f} ± {each['behind_se']:.2f}",
                f"{each['detail']:.2f}",
                f"{base / each['seconds']:.1f}x",
            ]
        )
    yield table(
        ["rows", "guided where sigma is", "guided", "reached", "naturalness", "behind", "detail", "faster"], rows
    )


def roofline() -> Iterator[str]:
    yield "## A guided step on an H100, predicted"
    found = lines("roofline")
    if not found:
        yield "not computed"
        return
    line = found[-1]
    yield (
        f"Predicted by `benchmarks/roofline.py`, **not measured**: {line['card']}, {line['flops_a_second'] / 1e12:.0f} TFLOP/s "
        f"dense bfloat16, {line['bytes_a_second'] / 1e12:.2f} TB/s. Bound: the arithmetic alone. Unfused: every operator the "
        f"longer of its arithmetic and its traffic, as torch launches them. Launches at {line['launch_us']:.0f} us each, which a "
        "CUDA graph spares. What will measure it on the card: `make gpu`, `tiltscope bench row --bundle DIR`."
    )
    yield table(
        ["system", "batch", "TFLOP", "GiB moved", "launches", "bound, ms", "unfused, ms", "launches, ms"],
        [
            [
                each["system"],
                str(each["batch"]),
                f"{each['gflop'] / 1e3:.3g}",
                f"{each['mib'] / 1024:.3g}",
                f"{each['launches']:,}",
                *(f"{each[name]:.3g}" for name in ("arithmetic_ms", "roofline_ms", "launch_ms")),
            ]
            for each in line["rows"]
        ],
    )


def rows() -> Iterator[str]:
    yield "## A guided row, and the sampler's own work around it"
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines("bench"):
        if {"row", "host"} <= {each["case"] for each in line["lines"]}:
            newest[tuple(line["machine"]["features"])] = line
    if not newest:
        yield "not measured"
        return
    yield (
        "Own work: what a row takes around networks that cost nothing, unguided. Bound: a guided row's convolutions and products "
        "alone, at the rate that this machine was measured to reach in float32. Faster: than autograd through diffusers and "
        "transformers as anybody would write it."
    )
    for line in newest.values():
        ways = dict.fromkeys(each["way"] for each in line["lines"] if each["case"] == "row" and each["way"] != "plain")
        yield measured(line, f"tiltscope bench row picture host --runners {','.join(ways)}")
        own = {each["setting"]: each["more"]["us_a_row"] for each in line["lines"] if each["case"] == "host"}
        yield table(
            ["batch", "way", "p50, ms", "p20 to p80", "faster", "bound, ms", "own work, ms", "share of the row"],
            [
                [
                    each["setting"].split()[1],
                    each["way"],
                    f"{each['timing']['p50']:.1f}",
                    f"{each['timing']['p20']:.1f} to {each['timing']['p80']:.1f}",
                    "baseline" if each["faster"] is None else f"{each['faster']:.2f}x",
                    f"{each['more']['bound_ms']:.1f}",
                    *(
                        ("-", "-")
                        if each["way"] == "plain"
                        else (
                            f"{own[each['setting']] / 1e3:.2f}",
                            f"{own[each['setting']] / each['timing']['p50'] / 10:.1f}%",
                        )
                    ),
                ]
                for each in line["lines"]
                if each["case"] == "row" and each["timing"]
            ],
        )


def precision() -> Iterator[str]:
    yield "## Networks in bfloat16"
    if not (found := lines("precision")):
        yield "not measured"
        return
    line = found[-1]
    config = line["config"]
    yield (
        measured(line, "benchmarks/precision.py")
        + f" {config['num']} pictures of `{config['feature']}`, preset fast, strength {config['strength']}, the same seeds for "
        "every way. Apart: mean difference from the first line's pictures, seed by seed, and its standard error. As reported: "
        "by the run, whose own networks read it; all else is read in float32."
    )
    base = line["lines"][0]["seconds_a_picture"]
    yield table(
        [
            "way",
            "activation",
            "as reported",
            "apart",
            "naturalness",
            "apart",
            "detail",
            "RMS from the first",
            "s a picture",
            "faster",
        ],
        [
            [
                each["way"],
                f"{each['activation']['mean']:.3f}",
                f"{each['reported']:.3f}",
                f"{each['activation']['apart']:+.4f} ± {each['activation']['se']:.4f}",
                f"{each['naturalness']['mean']:.3f}",
                f"{each['naturalness']['apart']:+.4f} ± {each['naturalness']['se']:.4f}",
                f"{each['detail']:.3f}",
                f"{each['rms']:.1e}",
                f"{each['seconds_a_picture']:.3f}",
                f"{base / each['seconds_a_picture']:.2f}x",
            ]
            for each in line["lines"]
        ],
    )


def growth() -> Iterator[str]:
    yield "## How time grows"
    found = [line for line in lines("bench") if any(each["case"] == "growth" for each in line["lines"])]
    if not found:
        yield "not measured"
        return
    line = found[-1]
    yield (
        measured(line, "tiltscope bench growth")
        + " The exponent b of time = a n^b, fitted; 1 is linear, less is better."
    )
    of: dict[str, list[dict[str, Any]]] = {}
    for each in line["lines"]:
        if each["case"] == "growth":
            of.setdefault(each["setting"].split()[0], []).append(each)
    yield table(
        ["over", "p50, s", "exponent"],
        [
            [
                name,
                ", ".join(f"{each['setting'].split()[1]}: {each['timing']['p50'] / 1e3:.2f}" for each in every),
                f"{every[0]['more']['exponent']:.2f}",
            ]
            for name, every in of.items()
        ],
    )


def main() -> None:
    parts = [HEAD.strip(), *peers(), *budget(), *rows(), *precision(), *memory(), *batching(), *growth(), *roofline()]
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
