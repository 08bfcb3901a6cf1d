"""manifest.json: everything needed to make the same pictures again, and every number shown.

The engine gives the facts of a run; this module adds what is the same for all runs (schema, versions, the command that repeats
it), makes it plain JSON, and reads it back. Knows no pictures and no page.
"""

import json
import math
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from tiltscope.engine.config import CompareConfig, ExplainConfig, SampleConfig
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.address import parse
from tiltscope.engine.report.atomic import write_bytes

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
# What decides the numbers beside our own code.
_DISTRIBUTIONS = ("tiltscope", "torch", "numpy", "diffusers", "transformers", "safetensors", "pillow")
_CONFIGS: dict[str, type[SampleConfig] | type[CompareConfig]] = {
    "explain": ExplainConfig,
    "sample": SampleConfig,
    "compare": CompareConfig,
}
_DEFAULT_BUNDLE = "emoji64"


def complete(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` as plain JSON with schema_version, versions, platform and repeat added; a second time changes nothing.

    NaN and infinity become null, numpy and torch scalars numbers, tuples lists. Raises ConfigError where the identity is not
    64 hex digits or a value has no place in JSON.
    """
    identity = manifest.get("identity")
    if not (isinstance(identity, str) and len(identity) == 64 and set(identity) <= set("0123456789abcdef")):
        raise ConfigError(f"manifest: identity must be 64 hex digits, got {identity!r}")
    known = {
        "schema_version": SCHEMA_VERSION,
        "versions": dict(versions()),
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "repeat": repeat_command(manifest),
    }
    return _plain(
        {"schema_version": SCHEMA_VERSION} | dict(manifest) | {k: v for k, v in known.items() if k not in manifest}
    )


@cache
def versions() -> dict[str, str | None]:
    """Python's and each distribution's version; None for one that is not installed. Read once: it takes longer than a row."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def repeat_command(manifest: Mapping[str, Any]) -> str | None:
    """The shell command that makes the same pictures; None where no command can (a prior or feature of one's own).

    Every setting that differs from its default is written out, those that a preset filled too, so that the command means the
    same when a preset changes.
    """
    command, config, bundle = manifest.get("command"), manifest.get("config"), manifest.get("bundle")
    if command not in _CONFIGS or not isinstance(config, Mapping) or not isinstance(bundle, Mapping):
        return None
    feature, settings = str(manifest.get("feature")), cast(Mapping[str, Any], config)
    try:
        parse(feature)
    except ConfigError:
        return None  # a sum of features, or a Python function
    words = ["tiltscope", str(command), shlex.quote(feature)]
    for each in fields(_CONFIGS[str(command)]):
        value = settings.get(each.name)
        # A reader wants to see these two even at their defaults.
        default = list(each.default) if isinstance(each.default, tuple) else each.default
        if value is not None and (value != default or each.name in ("num", "seed")):
            words.append(_flag(each.name, value))
    described = cast(Mapping[str, Any], bundle)
    name = described.get("location", described.get("name"))
    if name != _DEFAULT_BUNDLE:
        words.append(_flag("bundle", name))
    return " ".join(words)


def _flag(name: str, value: Any) -> str:
    """--name value; of a switch, the word that turns it from its default: --name or --no-name."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    text = ",".join(map(str, cast(Sequence[Any], value))) if isinstance(value, list | tuple) else str(value)
    return f"--{name.replace('_', '-')} {shlex.quote(text)}"


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json: keys in the order given, UTF-8."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """OUT/manifest.json, whole or not at all."""
    write_bytes(folder / FILE_NAME, dump(manifest))


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, None where there is none. Raises ConfigError for one that is not ours or not readable."""
    path = folder / FILE_NAME
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); choose another output folder, or remove it") from error
    if not isinstance(found, dict) or not isinstance(cast(dict[str, Any], found).get("identity"), str):
        raise ConfigError(f"{path} is not a manifest of tiltscope; choose another output folder")
    manifest = cast(dict[str, Any], found)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {manifest.get('schema_version')!r}, this version reads {SCHEMA_VERSION}; "
            "choose another output folder"
        )
    return manifest


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in cast(Mapping[Any, Any], value).items()}
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays alike
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        return [_plain(each) for each in cast(Iterable[Any], value)]
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(f"manifest: {type(value).__name__} has no place in JSON, got {value!r}")
