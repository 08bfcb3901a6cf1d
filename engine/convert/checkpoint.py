"""Reading a checkpoint that may be pickled: tensors and plain containers, and nothing that runs.

A pickle is a program. torch's weights-only unpickler knows tensors, numbers, texts and containers and refuses every other name; a
refusal here says which name it was. Nothing else in tiltscope opens a pickle.
"""

import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.files import read_tensors

# Where training scripts put the weights that are meant to be used, the averaged ones first.
_WITHIN = ("ema", "teacher", "model_ema", "state_dict", "model")
# What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
_NAME = re.compile(r"GLOBAL ([\w.]+)")


class Checkpoint(NamedTuple):
    """Tensors by name; header: the first line of JSON that saev writes before them, else empty."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """A .safetensors file, or a torch file of nothing but tensors and plain values.

    Raises ConfigError where there is no file, BundleError where it is damaged, holds no tensors, or would run code.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there; give a checkpoint's file")
    if path.suffix == ".safetensors":
        return Checkpoint(_plain(read_tensors(path, dtype=None)), {})
    header, start = _header(path)
    with path.open("rb") as file:
        file.seek(start)
        # Read whole behind a header: torch wants the archive to begin where the file does.
        held = _unpickle(io.BytesIO(file.read()) if start else file, path)
    return Checkpoint(_plain(_weights(held, path)), header)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return {}, 0
        line = b"{" + file.readline(1 << 16)
    try:
        value = json.loads(line)
    except ValueError:
        return {}, 0
    return (value, len(line)) if isinstance(value, dict) else ({}, 0)


def _unpickle(file: Any, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Of pickles that torch did not write: whatever they are, what comes out is tensors or a refusal.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _NAME.search(str(error))
        asks = f"it asks for {found[1]}, which" if found else "it asks for something that"
        raise BundleError(
            f"{path} would run code when it is read: {asks} is no tensor and no plain value. It was not read. Ask its authors "
            "for safetensors, or save the state dict alone where you trust it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}") from error


def _weights(held: Any, path: Path) -> Mapping[str, Any]:
    for _ in range(3):
        if not isinstance(held, Mapping):
            break
        if held and all(isinstance(name, str) and isinstance(each, Tensor) for name, each in held.items()):
            return held
        inner = next((held[name] for name in _WITHIN if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            tensors = {name: each for name, each in held.items() if isinstance(name, str) and isinstance(each, Tensor)}
            if tensors:
                return tensors
            break
        held = inner
    raise BundleError(f"{path} holds no weights: allowed are tensors by name, at the top or under {', '.join(_WITHIN)}")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them."""
    found = dict(tensors)
    for _ in range(len(_PREFIXES)):
        prefix = next((each for each in _PREFIXES if found and all(name.startswith(each) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
