"""`tiltscope bench`: how long it takes on this machine, beside a named baseline."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import put_json, stage
from tiltscope.engine.errors import ConfigError, ParityError

_USUAL = ("row", "picture", "update", "throughput", "host")
# Only where they are asked for: growth takes minutes, sae_rows holds 2 GB.
CASES = (*_USUAL, "growth", "sae_rows")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the engine's parts on this machine, each beside its baseline in one run, after holding it to the reference."""

    cases: Annotated[list[str], tyro.conf.Positional] = field(default_factory=lambda: list(_USUAL))
    """row | picture | update | throughput | host | sae_rows"""
    feature: str | None = None
    """whose gradient is taken (default: the bundle's first)"""
    runners: tuple[str, ...] = ("torch",)
    """runners to time, each RUNNER or RUNNER:bfloat16 (those that are not built yet are built first)"""
    batch: tuple[int, ...] = (1, 8)
    """batch sizes of the cases row, update and host"""
    steps: int = 10
    """rows of the case picture"""
    seconds: float = 10.0
    """of timing for each group of lines"""
    out: Path | None = None
    """a .jsonl file to append the numbers to, with machine, versions and revision"""
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    common: Common


def run(arguments: Arguments) -> None:
    """A table (or JSON) of every case asked for. Raises ParityError at the end where something failed its check."""
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        raise ConfigError(f"case: got {', '.join(unknown)}, allowed are {', '.join(CASES)}")
    if min(arguments.batch) < 1 or arguments.steps < 1 or not arguments.seconds > 0:
        raise ConfigError("batch, steps and seconds: allowed are numbers from 1 (seconds: above 0)")
    with stage("loading torch and the models", quiet=arguments.common.quiet):
        from tiltscope.engine.bench import cases
        from tiltscope.engine.bench.machine import append_result, environment, peak_mib
        from tiltscope.engine.bundle import load

        bundle = load(arguments.bundle)
        options = cases.Options(
            bundle=bundle,
            feature=arguments.feature or bundle.features()[0].feature,
            runners=arguments.runners,
            seconds=arguments.seconds,
            steps=arguments.steps,
            batches=arguments.batch,
        )
    found: list[Any] = []
    for name in arguments.cases:
        with stage(f"timing {name}", quiet=arguments.common.quiet):
            found += cases.CASES[name](options)
    facts = {"feature": options.feature, "lines": [asdict(line) for line in found], "peak_mib": peak_mib()}
    if arguments.out is not None:
        append_result(arguments.out, "bench", **facts)
    if arguments.common.json:
        put_json(environment() | facts)
    else:
        _print(found, environment()["machine"])
    if refused := [line for line in found if line.refused and "differs" in line.refused]:
        raise ParityError(f"{refused[0].way}, {refused[0].setting}: {refused[0].refused}; it was not timed")


def _print(found: list[Any], machine: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{machine['processors']} processors ({', '.join(machine['features'])}), load {machine['load']}"
    )
    for column in ("case", "setting", "way", "p20 ms", "p50 ms", "p80 ms", "faster", "more"):
        table.add_column(column, justify="left" if column in ("case", "setting", "way", "more") else "right")
    for line in found:
        more = ", ".join(f"{name} {value:.3g}" for name, value in line.more.items())
        if line.timing is None:
            table.add_row(line.case, line.setting, line.way, "", "", "", "", line.refused)
            continue
        times = (f"{each:.2f}" for each in (line.timing.p20, line.timing.p50, line.timing.p80))
        faster = "baseline" if line.faster is None else f"{line.faster:.2f}x"
        table.add_row(line.case, line.setting, line.way, *times, faster, more)
    Console().print(table)
