"""Which end of a run has which exit code, and that its message is one line a terminal can show."""

import signal
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tiltscope import errors
from tiltscope.engine.cli import main
from tiltscope.engine.cli.common import Flags, RunFailed, Stopped, interrupts_wait
from tiltscope.engine.cli.screen import printable


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A command that ends with what it is given."""

    def make(error: BaseException) -> None:
        module = ModuleType("tiltscope.engine.cli.fail")

        def run(_: object) -> None:
            raise error

        module.Arguments, module.run = Flags, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(main.COMMANDS, "fail", "fails")

    return make


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ConfigError("num: got 0"), 2, "num: got 0"),
        (errors.BundleError("sae.safetensors: hash"), 2, "sae.safetensors: hash"),
        (errors.CalibrationError("out of reach"), 2, "out of reach"),
        (errors.RunnerError("no such runner"), 2, "no such runner"),
        (errors.NonFiniteError("no sample stayed finite"), 1, "no sample stayed finite"),
        (errors.ParityError("differs"), 1, "differs"),
        (RunFailed("disk full; 3 kept"), 1, "disk full; 3 kept"),
        (OSError(28, "No space left on device", "out/a.png"), 1, "out/a.png: No space left on device"),
        (MemoryError(), 1, "out of memory; a smaller --batch-size"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (--debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("interrupted; 3 of 8 are kept"), 130, "interrupted; 3 of 8 are kept"),
        (errors.ConfigError("two\nlines \x1b[31mred"), 2, "two lines �[31mred"),
    ],
)
def test_exit_code_and_message(cli, failing, error: BaseException, code: int, message: str) -> None:
    failing(error)
    done = cli("fail")
    assert done.code == code
    assert done.err.startswith(f"tiltscope fail: {message}")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_debug_shows_the_traceback_and_the_message_last(cli, failing) -> None:
    failing(ZeroDivisionError("division by zero"))
    shown = cli("fail", "--debug").err
    assert shown.startswith("Traceback (most recent call last)")
    assert shown.splitlines()[-1].startswith("tiltscope fail: ZeroDivisionError")


def test_version(cli) -> None:
    from tiltscope import __version__

    assert cli("--version")[:2] == (0, f"tiltscope {__version__}\n")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A shell starts a background job with interrupts ignored; here they are Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_for_the_block_and_then_comes() -> None:
    reached = []

    def block() -> None:
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["the end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_without_an_interrupt_nothing_is_raised() -> None:
    with interrupts_wait():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "a\rb", "‮evil", "x\x00y", "\x9b31m"])
def test_text_from_files_cannot_drive_the_terminal(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
