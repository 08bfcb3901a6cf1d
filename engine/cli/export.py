"""`tiltscope export`: build a runner's files ahead, prove that its step is the reference's, and look after the cache."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import put_json, stage
from tiltscope.engine.errors import ConfigError, ParityError

if TYPE_CHECKING:
    from tiltscope.engine.runtime.parity import Parity


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Build what a runner needs, hold it to the float64 reference at every noise level, and keep it for every later run."""

    runner: str = "onnx"
    """compile | onnx | openvino | tensorrt | tensorrt_rtx"""
    hook: str | None = None
    """which layer's features it will serve (default: that of the bundle's first feature)"""
    batch: tuple[int, ...] = (1, 2, 8)
    """batch sizes at which it is compared"""
    dtype: str = "float32"
    """float32 | float16 | bfloat16 | float64, as far as the runner has it"""
    allow_parity_failure: bool = False
    """report a step that is not the reference's, instead of failing"""
    list: bool = False
    """what the cache holds, the least recently used first; builds nothing"""
    prune: bool = False
    """remove what this version cannot use, what is damaged and what is beyond TILTSCOPE_CACHE_MIB; builds nothing"""
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
        from tiltscope.engine.runtime.gate import LIMITS
        from tiltscope.engine.runtime.runners import REFERENCE, build_step, exporter

        if arguments.runner == REFERENCE:
            raise ConfigError(f"runner: torch is the reference and needs no files; allowed are {', '.join(_others())}")
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in LIMITS}
        if arguments.dtype not in dtypes:
            raise ConfigError(f"dtype: got {arguments.dtype!r}, allowed are {', '.join(dtypes)}")
        chosen, dtype = exporter(arguments.runner), dtypes[arguments.dtype]
        if min(arguments.batch) < 1 or max(arguments.batch) > chosen.max_batch:
            raise ConfigError(
                f"batch: got {list(arguments.batch)}, allowed are whole numbers from 1 to {chosen.max_batch}"
            )
        bundle = load(arguments.bundle)
        prior, feature = bundle.prior, bundle.feature(_a_feature(bundle, arguments.hook))
    with stage(f"building {arguments.runner}", quiet=arguments.common.quiet):
        artefact = build_step(arguments.runner, prior, feature, dtype)
    failure, rows = _compare(arguments, prior, feature, dtype)
    size = sum(path.stat().st_size for path in artefact.folder.rglob("*") if path.is_file())
    if arguments.common.json:
        facts: dict[str, Any] = {
            "runner": arguments.runner,
            "folder": str(artefact.folder),
            "bytes": size,
            "failure": failure,
        }
        put_json(facts | {"key": artefact.key, "parity": None if rows is None else [asdict(row) for row in rows]})
        return
    if rows is not None:
        _print(rows)
    print(f"{arguments.runner} serves every feature of {feature.trunk.hook if feature.trunk else feature.name}: "
          f"{size / 1e6:.0f} MB in {artefact.folder}")  # fmt: skip
    if failure:
        print(f"not proven: {failure}")


def _compare(arguments: Arguments, prior: Any, feature: Any, dtype: Any) -> tuple[str | None, "list[Parity] | None"]:
    """(why the step is not proven, every comparison): None, None where this machine can build the step but not run it."""
    from tiltscope.engine.runtime.held import GRAPHS, HeldStep
    from tiltscope.engine.runtime.parity import check, measure
    from tiltscope.engine.runtime.runners import cannot_run, exporter, step_for

    if missing := cannot_run(arguments.runner):
        return missing, None
    with stage(f"comparing {arguments.runner}", quiet=arguments.common.quiet):
        allow = arguments.allow_parity_failure
        gated = step_for(arguments.runner, prior, feature, dtype, allow_parity_failure=allow)
        if isinstance(gated.step, HeldStep):
            gated.step.hold(*GRAPHS)  # here all of them, and not only what a run would need
        rows = measure(gated.step, prior, feature, dtype=dtype, batches=arguments.batch)
        try:
            check(rows, dtype, arguments.runner)
        except ParityError as error:
            if not allow:
                raise ParityError(f"{error}; {exporter(arguments.runner).locate(prior, feature, dtype)}") from error
            return gated.failure or str(error), rows
    return gated.failure, rows


def _print(rows: "Sequence[Parity]") -> None:
    print(f"{'sigma':>8} {'batch':>5} {'D':>8} {'drive':>8} {'grad_a':>8} {'1 - cosine':>10}")
    for level in dict.fromkeys(row.sigma for row in rows):
        for batch in dict.fromkeys(row.batch for row in rows):
            here = [row for row in rows if (row.sigma, row.batch) == (level, batch)]
            worst = (max(getattr(row, name) for row in here) for name in ("x0_hat", "drive", "grad_a"))
            cosine = min(row.cosine for row in here)
            print(f"{level:>8} {batch:>5} " + " ".join(f"{each:8.1e}" for each in worst) + f" {1 - cosine:10.1e}")


def look_after(arguments: Arguments) -> None:
    """The cache's artefacts, or what is left of them once what no run can use is gone."""
    from tiltscope.engine.runtime.artefact import cached, prune
    from tiltscope.engine.runtime.cache import limit_bytes

    removed, in_use = prune() if arguments.prune else (0, [])
    kept: list[dict[str, Any]] = [
        {"folder": str(entry.folder), "bytes": entry.size, "last_used": entry.last_used, "key": key}
        for entry, key in cached()
    ]
    limit = limit_bytes()
    if arguments.common.json:
        put_json(
            {"artefacts": kept, "removed": removed, "in_use": [str(each) for each in in_use], "limit_bytes": limit}
        )
        return
    for each in kept:
        key: dict[str, Any] = each["key"] or {}
        words = [str(key[name]) for name in ("kind", "hook", "dtype") if name in key]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["last_used"]))
        print(f"{each['bytes'] / 1e6:6.0f} MB  {used}  {' '.join(words)}  {Path(each['folder']).name[:12]}")
    for folder in in_use:
        print(f"in use, so not removed: {folder}")
    total = sum(each["bytes"] for each in kept)
    told = f"{len(kept)} artefacts, {total / 1e6:.0f} of {limit / 1e6:.0f} MB"
    print(told + (f", {removed} removed" if arguments.prune else ""))


def _others() -> tuple[str, ...]:
    from tiltscope.engine.runtime.runners import REFERENCE, runner_names

    return tuple(name for name in runner_names() if name != REFERENCE)


def _a_feature(bundle: Any, hook: str | None) -> str:
    """Any feature of the hook: one file serves them all."""
    names = [info.feature for info in bundle.features()]
    if hook is None:
        return names[0]
    return next((name for name in names if name.startswith(f"{hook}:")), f"{hook}:neuron:0")
