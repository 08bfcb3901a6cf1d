"""`tiltscope export`: build a runner's files ahead, prove that its step is the reference's, and look after the cache."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import put_json, stage
from tiltscope.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Build what a runner needs, hold it to the float64 reference at every noise level, and keep it for every later run."""

    runner: str = "onnx"
    """onnx | openvino"""
    hook: str | None = None
    """which layer's features it will serve (default: that of the bundle's first feature)"""
    batch: tuple[int, ...] = (1, 2, 8)
    """batch sizes at which it is compared; the files serve any"""
    dtype: str = "float32"
    """float32"""
    list: bool = False
    """what the cache holds; builds nothing"""
    prune: bool = False
    """remove what this version cannot use from the cache; builds nothing"""
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    common: Common


def run(arguments: Arguments) -> None:
    """Build (or find) the artefact and print its parity; or list, or prune, the cache."""
    if arguments.list or arguments.prune:
        look_after(arguments)
        return
    with stage("loading torch and the models", quiet=arguments.common.quiet):
        from tiltscope.engine.bundle import load
        from tiltscope.engine.runtime.parity import check, measure
        from tiltscope.engine.runtime.runners import REFERENCE, build_step, step_for
        from tiltscope.engine.sample import DTYPES

        if arguments.runner == REFERENCE:
            raise ConfigError("runner: torch is the reference and needs no files; allowed are onnx, openvino")
        if arguments.dtype not in DTYPES:
            raise ConfigError(f"dtype: got {arguments.dtype!r}, allowed are {', '.join(DTYPES)}")
        if min(arguments.batch) < 1:
            raise ConfigError(f"batch: got {min(arguments.batch)}, allowed are whole numbers from 1")
        bundle, dtype = load(arguments.bundle), DTYPES[arguments.dtype]
        feature = bundle.feature(_a_feature(bundle, arguments.hook))
    with stage(f"building and comparing {arguments.runner}", quiet=arguments.common.quiet):
        artefact = build_step(arguments.runner, bundle.prior, feature, dtype)
        step = step_for(arguments.runner, bundle.prior, feature, dtype)
        rows = measure(step, bundle.prior, feature, dtype=dtype, batches=arguments.batch)
        check(rows, dtype, arguments.runner)
    size = sum(path.stat().st_size for path in artefact.folder.iterdir())
    if arguments.common.json:
        facts: dict[str, Any] = {"runner": arguments.runner, "folder": str(artefact.folder), "bytes": size}
        put_json(facts | {"key": artefact.key, "parity": [asdict(row) for row in rows]})
        return
    print(f"{'sigma':>8} {'batch':>5} {'D':>8} {'drive':>8} {'grad_a':>8} {'1 - cosine':>10}")
    for level in dict.fromkeys(row.sigma for row in rows):
        for batch in dict.fromkeys(row.batch for row in rows):
            here = [row for row in rows if (row.sigma, row.batch) == (level, batch)]
            worst = (max(getattr(row, name) for row in here) for name in ("x0_hat", "drive", "grad_a"))
            cosine = min(row.cosine for row in here)
            print(f"{level:>8} {batch:>5} " + " ".join(f"{each:8.1e}" for each in worst) + f" {1 - cosine:10.1e}")
    print(f"{arguments.runner} serves every feature of {feature.trunk.hook if feature.trunk else feature.name}: "
          f"{size / 1e6:.0f} MB in {artefact.folder}")  # fmt: skip


def look_after(arguments: Arguments) -> None:
    """The cache's artefacts, or what is left of them once those of other versions are gone."""
    from tiltscope.engine.runtime.artefact import cached, made_by_this_version

    kept: list[dict[str, Any]] = []
    removed = 0
    for folder, key in cached():
        if arguments.prune and not made_by_this_version(key):
            shutil.rmtree(folder)
            removed += 1
            continue
        size = sum(path.stat().st_size for path in folder.iterdir())
        kept.append({"folder": str(folder), "bytes": size, "key": key})
    if arguments.common.json:
        put_json({"artefacts": kept, "removed": removed})
        return
    for each in kept:
        key = each["key"] or {}
        words = [str(key.get(name)) for name in ("kind", "hook", "dtype")]
        print(f"{each['bytes'] / 1e6:6.0f} MB  {' '.join(words)}  {Path(each['folder']).name[:12]}")
    print(f"{len(kept)} artefacts" + (f", {removed} removed" if arguments.prune else ""))


def _a_feature(bundle: Any, hook: str | None) -> str:
    """Any feature of the hook: one file serves them all."""
    names = [info.feature for info in bundle.features()]
    if hook is None:
        return names[0]
    return next((name for name in names if name.startswith(f"{hook}:")), f"{hook}:neuron:0")
