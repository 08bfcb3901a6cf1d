"""A choice by name: one of a registry's frozen dataclasses, from its name, from text with parameters, or as it is.

Solvers, grids and log-tilts are all chosen this way, so "ddim(eta=0.5)" means the same in Python, on the command line and in
a manifest. Imports neither numpy nor torch.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from math import isfinite
from typing import Any

from tiltscope.engine.errors import ConfigError

_SPEC = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def parse_choice(choice: Any, registry: Mapping[str, type[Any]], what: str) -> Any:
    """An object of the registry from its name, from text such as "ddim(eta=0.5)" or "capped(3)", or as it is.

    Parameters are numbers, or true and false, by name or by position. Raises ConfigError listing the allowed names or parameters.
    """
    if type(choice) in registry.values():
        return choice
    match = _SPEC.fullmatch(choice) if isinstance(choice, str) else None
    if match is None or match[1] not in registry:
        raise ConfigError(f"{what}: got {choice!r}, allowed are {', '.join(registry)}")
    make = registry[match[1]]
    kinds = {each.name: each.type for each in fields(make) if each.init}
    names = list(kinds)
    parameters: dict[str, float | bool] = {}
    for position, text in enumerate(filter(None, map(str.strip, (match[2] or "").split(",")))):
        name, _, value = text.rpartition("=")
        name = name.strip() or (names[position] if position < len(names) else "")
        if name not in names or name in parameters:
            raise ConfigError(f"{what} {match[1]}: got {text!r}, parameters are {', '.join(names) or 'none'}")
        read = _truth if kinds[name] is bool else _number
        parameters[name] = read(value.strip(), f"{what} {match[1]}: {name}")
    missing = [each.name for each in fields(make) if each.init and _required(each) and each.name not in parameters]
    if missing:
        raise ConfigError(f"{what} {match[1]}: {missing[0]} is missing; write {match[1]}({missing[0]}=NUMBER)")
    return make(**parameters)


def describe_choice(choice: Any, registry: Mapping[str, type[Any]]) -> str:
    """The text that parse_choice reads back: "heun", "ddim(eta=0.5)". What is off unless asked for, and was not, is left out."""
    name = next(name for name, kind in registry.items() if type(choice) is kind)
    given = {each: getattr(choice, each.name) for each in fields(choice) if each.init}
    values = [f"{each.name}={value!r}" for each, value in given.items() if value or each.default not in (False, 0.0)]
    return f"{name}({', '.join(values)})" if values else name


def _required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{what}: got {text!r}, allowed are numbers") from None
    if not isfinite(value):
        raise ConfigError(f"{what}: got {text}, allowed are finite numbers")
    return value


def _truth(text: str, what: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"{what}: got {text!r}, allowed are true and false")
    return text.lower() == "true"
