"""TensorRT-RTX engines built without a GPU: what every build said, into docs/runners.md's table.

    python tools/engine_table.py                                    writes the table from the recorded builds
    python tools/engine_table.py --build emoji64 --dtypes float32   the five graphs as `tiltscope export` builds them, or has
                                                                    built them, a quarter of an hour; recorded
    python tools/engine_table.py --build latent --graphs guided     some graphs; tiny, energydps and latent are tiny random
                                                                    networks of other architectures (tests/twin_bundle.py)
    python tools/engine_table.py --build tiny --graphs guided --buckets 1,8     with fewer profiles than the runner has: sooner
    python tools/engine_table.py --check                            exits 1 where the file is not what would be written

A build that falls back, or has a layer that is not supported, is not recorded: it fails (export/tensorrt.py). Records are lines
of benchmarks/results/engines.jsonl; of several of one engine the last counts. Needs the extra `tensorrt-rtx`.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs" / "runners.md", ROOT / "benchmarks" / "results" / "engines.jsonl"
BEGIN, END = "<!-- tools/engine_table.py: begin -->", "<!-- end -->"
RUNNER = "tensorrt_rtx"
RUNNERS_BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # of engine/runtime/tensorrt_step.py, without the seconds of importing it
GRAPHS = ("unguided", "guided", "measure", "gradient", "pullback")
# What is behind a name, in the table's words.
BUNDLES = {
    "emoji64": "emoji64: U-Net, DINOv3 ViT",
    "tiny": "tiny: U-Net, DINOv3 ViT with registers",
    "energydps": "tiny: ADM-like U-Net, DINOv3 ConvNeXt, 7x7 convolutional autoencoder",
    "latent": "tiny: DiT, KL decoder, DINOv3 ViT",
}


def bundle_folder(name: str, place: Path) -> str:
    """The name of an embedded bundle, or the folder of a tiny one written into `place`."""
    if name == "emoji64":
        return name
    for module in ("tiny_models", "tiny_bundle", "twin_bundle"):
        load_test_module(module)
    if name == "tiny":
        return str(sys.modules["tiny_bundle"].build_tiny_bundle(place))
    return str(sys.modules["twin_bundle"].build_twin(place, name))


def load_test_module(name: str) -> None:
    """From its file: tests/ on the path would shadow what transformers looks for, by tests/kernels."""
    spec: Any = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def build(name: str, graphs: Sequence[str], dtype_name: str, buckets: Sequence[int]) -> None:
    """Engines for all targets; a line of RESULTS each. All graphs in all of the runner's buckets: as the runner keeps them."""
    import torch

    import tiltscope
    from tiltscope.engine.bench.machine import append_result
    from tiltscope.engine.runtime.exported import needed
    from tiltscope.engine.runtime.runners import build_step
    from tiltscope.engine.runtime.tensorrt_step import BUCKETS
    from tiltscope.export.tensorrt import BUILD, TARGETS

    dtype = getattr(torch, dtype_name)
    with tempfile.TemporaryDirectory() as place:
        bundle = tiltscope.load(bundle_folder(name, Path(place) / "bundle"))
        prior, feature = bundle.prior, bundle.feature(next(iter(bundle.features())).feature)
        if set(graphs) == set(GRAPHS) and tuple(buckets) == BUCKETS:
            built = json.loads((build_step(RUNNER, prior, feature, dtype).folder / BUILD).read_text())
        else:
            built = {
                graph: build_one(prior.to(dtype), feature.to(dtype), graph, Path(place), buckets) for graph in graphs
            }
    for graph, told in built.items():
        facts = {"bundle": name, "dtype": dtype_name, "graph": graph, "targets": TARGETS}
        facts |= {"profiles": len(buckets), "largest_batch": buckets[-1]}
        append_result(RESULTS, RUNNER, **facts, **told, builder=needed(RUNNER, RUNNER).__version__)
        print(f"{name} {dtype_name} {graph}: {told['layers']} layers, {told['bytes'] / 1e6:.1f} MB", flush=True)


def build_one(prior: Any, feature: Any, graph: str, place: Path, buckets: Sequence[int]) -> dict[str, Any]:
    """What the builder tells of one graph of networks that are in their dtype already."""
    from tiltscope.export.graphs import examples
    from tiltscope.export.onnx import write_onnx
    from tiltscope.export.tensorrt import TARGETS, build_engine
    from tiltscope.export.trace import StepNetworks, trace

    example, path = examples(prior, feature)[graph], place / f"{graph}.onnx"
    traced = trace(StepNetworks(prior.network, feature.trunk), graph, example)
    write_onnx(traced, graph, example, path, {}, folded=True)
    at = time.perf_counter()
    _, told = build_engine(RUNNER, path, targets=TARGETS, buckets=buckets)
    return told | {"seconds": time.perf_counter() - at}


def records() -> list[dict[str, Any]]:
    """The last record of every engine: bundles, dtypes and graphs in their order."""
    last: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        last[record["bundle"], record["dtype"], record["graph"]] = record
    order = {name: at for at, name in enumerate(("float32", "bfloat16", "float16"))}
    return sorted(
        last.values(), key=lambda r: (list(BUNDLES).index(r["bundle"]), order[r["dtype"]], GRAPHS.index(r["graph"]))
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    builders = sorted({row["builder"] for row in rows})
    targets = sorted({", ".join(row["targets"]) for row in rows})
    lines = [
        f"TensorRT-RTX {' and '.join(builders)}; one file for {' and '.join(targets)}. The runner has 7 profiles to a "
        "batch of 64; a build with fewer shows that the graph builds, its size is not the runner's. Seconds on one busy core.",
        "",
        "| networks | dtype | graph | profiles, to batch | layers | engine, MB | seconds | warnings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        profiles = f"{row['profiles']}, {row.get('largest_batch', 64)}"
        cells = (BUNDLES[row["bundle"]], row["dtype"], f"`{row['graph']}`", profiles, f"{row['layers']:,}")
        cells += (f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}", "; ".join(row["warnings"]) or "none")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(*, check: bool) -> int:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n{table(records())}\n{END}{after}"
    if check:
        return int(made != text)
    DOCS.write_text(made)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", choices=BUNDLES)
    parser.add_argument("--dtypes", default="float32", help="comma-separated")
    parser.add_argument("--graphs", default=",".join(GRAPHS), help="comma-separated")
    parser.add_argument(
        "--buckets", help="comma-separated: the largest batch of each profile; default the runner's own"
    )
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    buckets = [int(each) for each in asked.buckets.split(",")] if asked.buckets else RUNNERS_BUCKETS
    if sorted(set(buckets)) != list(buckets) or buckets[0] < 1:
        parser.error(f"--buckets: got {asked.buckets}; whole numbers from 1, each larger than the one before")
    graphs, dtypes = asked.graphs.split(","), asked.dtypes.split(",")
    if not set(graphs) <= set(GRAPHS) or not set(dtypes) <= {"float32", "bfloat16", "float16"}:
        parser.error(f"--graphs, --dtypes: got {asked.graphs}, {asked.dtypes}; graphs are {', '.join(GRAPHS)}")
    for dtype in dtypes if asked.build else ():
        build(asked.build, graphs, dtype, buckets)
    return write_table(check=asked.check)


if __name__ == "__main__":
    sys.exit(main())
