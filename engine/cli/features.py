"""`tiltscope features`: what can be explained, and which feature is about a word."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tiltscope.engine.cli.common import Common
from tiltscope.engine.cli.screen import printable, put_json, stage
from tiltscope.engine.errors import ConfigError

# Words shown of a feature without a fitting name.
NUM_WORDS = 6
_WORD = re.compile(r"\w+")
# Best first: the most selective, the strongest, the most frequent, the alphabet with the unnamed last.
SORTS: dict[str, Callable[[Any], Any]] = {
    "selectivity": lambda each: -each.selectivity,
    "max": lambda each: -each.max,
    "density": lambda each: -each.density,
    "name": lambda each: (each.name is None, (each.name or "").casefold()),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The features of a bundle that have a name or statistics; any other address can be explained too."""

    hook: str | None = None
    """only features of this hook, for example blocks.5"""
    sort: Literal["selectivity", "max", "density", "name"] = "selectivity"
    """best first"""
    search: str | None = None
    """only features whose name, or whose strongest pictures' words, have this word"""
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    common: Common


def run(arguments: Arguments) -> None:
    """A search without a hit is an answer too (exit 0): the nearest words there are."""
    with stage("loading the bundle", quiet=arguments.common.quiet):
        from tiltscope.engine.bundle import load

        features = sorted(load(arguments.bundle).features(), key=SORTS[arguments.sort])
    if arguments.hook is not None:
        hooks = sorted({_hook(each) for each in features})
        if arguments.hook not in hooks:
            raise ConfigError(f"hook: got {arguments.hook!r}, allowed are {', '.join(hooks)}")
        features = [each for each in features if _hook(each) == arguments.hook]
    matched: dict[str, str] = {}
    nearest: list[str] = []
    if arguments.search is not None:
        matched = search(features, arguments.search)
        features = [each for each in features if each.feature in matched]
        # A name says more than the pictures' words: those hits come first, each part in the order asked for.
        features.sort(key=lambda each: matched[each.feature] != "name")
        if not matched:
            nearest = nearest_words(load(arguments.bundle).features(), arguments.search)
    if arguments.common.json:
        rows = [_row(each) | ({"matched": matched[each.feature]} if matched else {}) for each in features]
        put_json({"features": rows} | ({} if arguments.search is None else {"nearest": nearest}))
    elif arguments.search is not None and not matched:
        hint = f"; nearest words: {', '.join(map(printable, nearest))}" if nearest else ""
        print(f"no feature has {printable(arguments.search)!r} in its name or its strongest pictures' words{hint}")
    else:
        _print(features, matched, set(_words(arguments.search or "")))


def search(features: Iterable[Any], text: str) -> dict[str, str]:
    """feature -> "name" or "words": where every word of `text` was found, whole words, whatever their case."""
    wanted = set(_words(text))
    if not wanted:
        raise ConfigError(f"search: got {text!r}, allowed are words")
    found: dict[str, str] = {}
    for each in features:
        if wanted <= set(_words(each.name or "")):
            found[each.feature] = "name"
        elif wanted <= {word for phrase in each.words for word in _words(phrase)}:
            found[each.feature] = "words"
    return found


def nearest_words(features: Iterable[Any], text: str, num: int = 5) -> list[str]:
    """The words of names and pictures that are spelt most like `text`."""
    known = {word for each in features for phrase in (each.name or "", *each.words) for word in _words(phrase)}
    return difflib.get_close_matches(text.casefold(), sorted(known), n=num, cutoff=0.5)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _hook(info: Any) -> str:
    return str(info.feature).partition(":")[0]


def _row(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ("feature", "name", "density", "max", "selectivity")}


def _print(features: Sequence[Any], matched: dict[str, str], wanted: set[str]) -> None:
    width = max((len(each.feature) for each in features), default=7)
    print(f"{'feature':<{width}}  {'selectivity':>11}  {'max':>8}  {'density':>8}  name")
    for each in features:
        name = printable(each.name) if each.name else "-"
        if matched.get(each.feature) == "words":
            words = sorted(each.words, key=lambda phrase: not wanted & set(_words(phrase)))[:NUM_WORDS]
            name += f"  (words of its strongest pictures: {', '.join(map(printable, words))})"
        print(f"{each.feature:<{width}}  {each.selectivity:>11.3f}  {each.max:>8.3f}  {each.density:>8.4f}  {name}")
