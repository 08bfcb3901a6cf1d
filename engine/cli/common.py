"""What the commands share: flags, how a run ends early, and holding Ctrl-C back. Imports no torch."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from tiltscope.engine.errors import TiltscopeError

FeatureWord = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FEATURE")]]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of every command."""

    json: bool = False
    """print one JSON object on stdout, and nothing else there"""
    quiet: bool = False
    """no progress"""
    debug: bool = False
    """show the traceback of an error"""


Common = Annotated[Flags, tyro.conf.arg(name="")]


class RunFailed(TiltscopeError):
    """The run failed on the way: the message says what is kept. Exit code 1, whatever the cause was."""


class Stopped(KeyboardInterrupt):
    """Interrupted; the message says what is kept and how to go on."""


@contextmanager
def interrupts_wait() -> Generator[None]:
    """Hold Ctrl-C back until the block is done: a chunk is written whole or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def follow(tracker: Any, run: Any, num: int, *, finished: int = 0) -> Any:
    """An on_step that tells `tracker` how far a run of `num` samples is, `finished` of which were there before."""
    bucket = run.config.bucket
    rows, drawn = run.plan.num_rows, 0
    buckets = -(-(num - finished) // bucket)

    def on_step(told: Any) -> None:
        nonlocal drawn
        steps = drawn * rows + told.row + 1
        drawn += told.row + 1 == rows
        tracker.set(steps, buckets * rows, samples=min(num, finished + drawn * bucket), num=num)

    return on_step
