"""The command line: which command, which exit code, one message. What a command does is in the module of its name.

    0    done
    1    the run failed on the way; finished pictures are kept (--debug shows the traceback)
    2    the request is wrong or cannot be met here: said before anything is written
    130  interrupted; what is finished is kept

A command module holds `Arguments`, a frozen dataclass that becomes its flags, and `run(arguments) -> None`. Commands are
imported when they are called, and import torch only when they run: --help needs neither torch nor numpy.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tiltscope.engine.errors import BundleError, CalibrationError, ConfigError, RunnerError, TiltscopeError

COMMANDS = {
    "explain": "what a feature means: four answers side by side, with the numbers that say how far to trust each",
    "sample": "draw from one tilted distribution, up to a million pictures, resumable",
    "features": "what can be explained; --search WORD finds features by name",
    "compare": "every method at matched activation: table, and activation against naturalness over lambda",
    "calibrate": "the lambda that reaches a wanted mean activation, from natural pictures alone",
    "export": "build what a runner needs ahead, and prove that its step is the reference's",
    "bundle": "your own prior, trunk, autoencoder and pictures as a bundle; resumable",
    "convert": "a checkpoint as its authors publish it, into a folder that loads here; runs no code of it",
    "bench": "how long it takes on this machine, beside a named baseline",
    "doctor": "what this machine can run, what is missing, which extra installs it",
}

# The request was wrong, or cannot be met on this machine: found before a picture is written.
REFUSALS = (ConfigError, BundleError, CalibrationError, RunnerError)


def run(words: Sequence[str]) -> int:
    """Run one command line, without the program's name; returns the exit code."""
    debug = "--debug" in words
    _hush_libraries()
    name = words[0] if words else ""
    try:
        return _dispatch(words)
    except KeyboardInterrupt as stopped:
        return _leave(130, str(stopped) or "interrupted; nothing was finished, the same command starts again", name)
    except REFUSALS as error:
        return _leave(2, str(error), name, error if debug else None)
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`): there is nobody to tell, and the interpreter's own flush must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TiltscopeError as error:
        return _leave(1, str(error), name, error if debug else None)
    except MemoryError as error:
        return _leave(1, "out of memory; a smaller --batch-size needs less", name, error if debug else None)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _leave(1, f"{where}{error.strerror or error}", name, error if debug else None)
    except Exception as error:  # noqa: BLE001  the last resort: a bug still ends in one message and a code
        text = f"{type(error).__name__}: {error} (--debug shows where; please report it)"
        return _leave(1, text, name, error if debug else None)


def _dispatch(words: Sequence[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("", ())
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from tiltscope import __version__

        print(f"tiltscope {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"command: got {name!r}, allowed are {', '.join(COMMANDS)}; see tiltscope --help")
    from tiltscope.engine.cli.parse import parse

    command: Any = import_module(f"tiltscope.engine.cli.{name}")
    try:
        arguments = parse(command.Arguments, rest, prog=f"tiltscope {name}")
    except SystemExit:
        return 0
    code: int | None = command.run(arguments)
    return code or 0


def _leave(code: int, message: str, command: str, error: BaseException | None = None) -> int:
    if error is not None:
        traceback.print_exception(error)
    prefix = f"tiltscope {command}" if command in COMMANDS else "tiltscope"
    # One message on one line: what a file or an exception put into it cannot draw on the terminal.
    from tiltscope.engine.cli.screen import printable

    print(f"{prefix}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "tiltscope: what a feature of a vision model means, as a distribution of images\n\n"
        f"usage: tiltscope COMMAND ...\n\n{commands}\n\n"
        "FEATURE is HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169\n"
        "tiltscope COMMAND --help lists a command's flags; tiltscope --version tells the version"
    )


def _hush_libraries() -> None:
    """Progress bars and advice of the libraries below are not ours to print; a user's own setting wins."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
