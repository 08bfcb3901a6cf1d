"""Reading JSON and safetensors: everything that can be wrong with a file is a BundleError that names it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiltscope.engine.errors import BundleError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(
    path: Path, names: Iterable[str] | None = None, *, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """Tensors of a safetensors file, cast to dtype (None: as they are); all of them, or those of `names` that are in the file."""
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            wanted = held if names is None else held & set(names)
            return {name: file.get_tensor(name).to(dtype) for name in sorted(wanted)}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
