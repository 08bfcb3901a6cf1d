"""What a user's own denoiser or activation goes through before anything is sampled: its name, and inputs for one trial call."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tiltscope.engine.errors import ConfigError


def check_name(name: object) -> str:
    """A text that is not empty. Raises ConfigError."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name must be a text that is not empty, got {name!r}")
    return name


def trial_values(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers spread over (-1, 1) without pattern, different for each sample. No random generator is touched.

    The Weyl sequence of the golden ratio: equidistributed, and defined by one line.
    """
    count = np.arange(1, int(np.prod(shape)) + 1)
    return torch.from_numpy(2 * np.modf(count * 0.6180339887498949)[0] - 1).view(*shape).to(dtype)
