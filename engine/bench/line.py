"""What a case of `tiltscope bench` is asked, and what it says: a line for every way in every setting."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tiltscope.engine.bench.timing import Timing, Way, interleave
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.errors import ConfigError

# Of networks: those that cases.py knows a check for.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options:
    bundle: Bundle
    feature: str
    runners: tuple[str, ...]
    seconds: float
    """of timing for each line"""
    steps: int
    """rows of the case picture"""
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way in one setting. faster: than the baseline, by p50; None for the baseline itself, and where nothing was timed.

    refused: why it was not timed. more: other numbers by name, units in the name.
    """

    case: str
    setting: str
    way: str
    timing: Timing | None
    faster: float | None = None
    refused: str | None = None
    more: dict[str, float] = field(default_factory=dict[str, float])


def lines(
    case: str, setting: str, ways: Mapping[str, Way], options: Options, *, settle: bool = False, **more: float
) -> Iterator[Line]:
    """Time the ways in turn; the first is the baseline. settle: as `interleave` has it."""
    timings = interleave(ways, seconds=options.seconds, settle=settle)
    base = next(iter(timings.values())).p50
    for at, (way, timing) in enumerate(timings.items()):
        yield Line(
            case=case, setting=setting, way=way, timing=timing, faster=base / timing.p50 if at else None, more=more
        )


def asked_by(way: str) -> dict[str, str]:
    """What `RUNNER` or `RUNNER:DTYPE` asks of a configuration. Raises ConfigError for a dtype that no check is known for."""
    runner, _, dtype = way.partition(":")
    if (dtype or "float32") not in DTYPES:
        raise ConfigError(f"runners: got {way}, allowed behind the colon are {', '.join(DTYPES)}")
    return {"runner": runner, "dtype": dtype or "float32"}


def dtype_of(way: str) -> str:
    """float32 of the plain baseline, too."""
    return asked_by(way)["dtype"]
