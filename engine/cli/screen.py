"""What a person sees while a command runs: progress on stderr, results on stdout. Knows nothing of what is computed.

On a terminal progress is bars; elsewhere a plain line now and then, so that a log stays readable; with --quiet nothing. With
--json stdout carries one JSON object and nothing else.
"""

import json
import sys
import time
import unicodedata
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

# A plain line at most this often, in seconds: a log of an hour's run stays under 400 lines.
PLAIN_EVERY = 10.0


class Tracker(Protocol):
    """One stage of a run."""

    def begin(self, what: str) -> None:
        """What the run does from here on, in words."""
        ...

    def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None:
        """`done` of `total` steps, and how many of how many samples are finished."""
        ...


def printable(text: str) -> str:
    """Text from a file as a terminal may show it: every control character replaced, so none reaches the terminal."""
    return "".join("�" if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn") else each for each in text)


def say(text: str) -> None:
    """A line of progress or a warning, to stderr."""
    print(text, file=sys.stderr, flush=True)


def put_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of --json. NaN is not JSON: it must have become null before."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


@contextmanager
def stage(what: str, *, quiet: bool) -> Generator[Tracker]:
    """Follow one stage of a run: bars on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bars(what) as tracker:
            yield tracker
    else:
        yield _Lines(what)


class _Silent:
    def begin(self, what: str) -> None:
        pass

    def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None:
        pass


class _Lines:
    def __init__(self, what: str) -> None:
        self.begin(what)

    def begin(self, what: str) -> None:
        self.what, self.start, self.last = what, time.monotonic(), time.monotonic()
        say(f"{what} ...")

    def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None:
        now = time.monotonic()
        if now - self.last < PLAIN_EVERY:
            return
        self.last = now
        text = f"{self.what}: step {done:,} of {total:,}"
        if samples is not None:
            text += f", {samples:,} of {num:,} samples"
        if 0 < done <= total:
            text += f", about {_duration((now - self.start) * (total - done) / done)} left"
        say(text)


@contextmanager
def _bars(what: str) -> Generator[Tracker]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        steps = progress.add_task(f"{what}: steps", total=None)
        pictures = progress.add_task("samples", total=None, visible=False)

        class Bars:
            def begin(self, what: str) -> None:
                nonlocal steps
                progress.remove_task(steps)  # a total, once known, cannot be taken back from a task
                steps = progress.add_task(what, total=None)
                progress.update(pictures, visible=False)

            def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None:
                progress.update(steps, completed=done, total=total)
                if samples is not None:
                    progress.update(pictures, completed=samples, total=num, visible=True)

        yield Bars()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
