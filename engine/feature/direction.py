"""A direction in a hooked layer's space, from a file of one vector: .safetensors, or .npy without pickle."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from tiltscope.engine.errors import ConfigError


def load_direction(path: str, *, width: int) -> tuple[Float[Tensor, "width"], str]:
    """-> (vector float32 [width], sha256 of its float32 values). Used as it is, not normalised.

    Raises ConfigError where the file cannot be read or is not one finite, real, nonzero vector of the trunk's width.
    """
    try:
        vector = _read_npy(Path(path)) if path.endswith(".npy") else _read_safetensors(Path(path))
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ConfigError(f"direction {path} cannot be read: {error}") from error
    if not (vector.is_floating_point() and vector.numel() == width and vector.squeeze().ndim <= 1):
        raise ConfigError(
            f"direction {path} must be one real vector of {width} numbers, got {vector.dtype} {list(vector.shape)}"
        )
    vector = vector.flatten().to(torch.float32)
    if not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise ConfigError(f"direction {path} must be finite and not all zero")
    return vector, hashlib.sha256(vector.numpy().tobytes()).hexdigest()


def _read_npy(path: Path) -> Tensor:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"expected floating numbers, got {getattr(array, 'dtype', type(array).__name__)}")
    return torch.from_numpy(array.astype(np.float32))


def _read_safetensors(path: Path) -> Tensor:
    tensors = load_safetensors(path.read_bytes())
    if len(tensors) != 1:
        raise ValueError(f"expected one tensor, got {len(tensors)}")
    return next(iter(tensors.values()))
