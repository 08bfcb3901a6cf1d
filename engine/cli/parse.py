"""From words on the command line to a frozen dataclass, by tyro, with every complaint as one short ConfigError.

Flags are the dataclass's fields. Numbers and lists of numbers are read here, so that their messages say what is allowed; lists
are comma-separated, because a list of words would swallow the FEATURE that follows it. Knows no command; imports no torch.
"""

import contextlib
import io
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tiltscope.engine.errors import ConfigError

Arguments = TypeVar("Arguments")

_BOX = re.compile(r"[─-╿]+")
# Commas between the values of a list, not those inside a choice's parentheses.
_BETWEEN = re.compile(r",(?![^()]*\))")
_ALLOWED = {int: "whole numbers", float: "numbers"}
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)


def parse(kind: type[Arguments], words: Sequence[str], *, prog: str) -> Arguments:
    """The dataclass `kind` from `words`. Raises ConfigError for words that do not fit; --help prints and exits 0."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=prog, args=words, config=_MARKERS, registry=_registry())
    except SystemExit as left:
        if left.code == 0:
            raise
        raise ConfigError(f"{_one_line(complaint.getvalue())}; see {prog} --help") from None


def _one_line(boxed: str) -> str:
    """The sentence inside tyro's framed, wrapped message: what stands between its title and the first rule."""
    lines: list[str] = []
    for framed in boxed.splitlines():
        line = framed.removeprefix("│").removesuffix("│").strip()
        if line.startswith(("╭", "╰")):
            continue
        if lines and _BOX.fullmatch(line):
            break
        lines.append(line)
    text = " ".join(filter(None, lines)) or "the words given cannot be read"
    for tyros, ours in _WORDING:
        text = tyros.sub(ours, text)
    return text


_WORDING = (
    (re.compile(r"^Error parsing (--)?(\S+): "), r"\2: "),
    (re.compile(r"^Missing from .*?: (.+?) HOOK:.*$"), r"\1 is missing: HOOK:KIND:INDEX[@POOLING]"),
    (re.compile(r"^Missing from .*?: (--\S+) (\S+) .*$"), r"\1 is missing: give \1 \2"),
    (re.compile(r"^Missing value for argument '(\S+)'.*$"), r"\1: a value is missing"),
    (re.compile(r"^Unrecognized options: (.+)$"), r"got \1, which is not an option here"),
    (
        re.compile(r"^invalid choice ('.*') for argument '--(\S+)'\. Expected one of \((.*)\)\.$"),
        r"\2: got \1, allowed are \3",
    ),
)


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()
    registry.primitive_rule(_read_plainly)
    return registry


def _read_plainly(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """int, float, str, Path, comma-separated tuples of them, and unions of those with None."""
    union = get_origin(info.type) in (Union, types.UnionType)
    options = [each for each in (get_args(info.type) if union else (info.type,)) if each is not type(None)]
    lists = [get_args(each) for each in options if get_origin(each) is tuple]
    scalars = [each for each in options if each in (int, float, str, Path)]
    if not scalars + lists or len(scalars) + len(lists) != len(options) or max(len(scalars), len(lists)) > 1:
        return None
    element: Any = scalars[0] if scalars else lists[0][0]
    length = None if not lists or lists[0][-1] is Ellipsis else len(lists[0])
    name = str(element.__name__).upper()

    def from_words(words: list[str]) -> Any:
        if not lists or (scalars and "," not in words[0]):
            return _element(element, words[0])
        values = tuple(_element(element, part) for part in _BETWEEN.split(words[0]))
        if length is not None and len(values) != length:
            raise ValueError(f"got {words[0]!r}, allowed are {length} numbers with a comma between")
        return values

    listed = ",".join([name] * length) if length else f"{name},..."
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([name] * bool(scalars) + [listed] * bool(lists)),
        instance_from_str=from_words,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _element(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        allowed = _ALLOWED.get(kind, "values")  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise ValueError(f"got {text!r}, allowed are {allowed}") from None
