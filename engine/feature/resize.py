"""Antialiased resizing as two products, one an axis: differentiable, the same in every engine, no resampling operator needed.

    y = R_h x R_w'       R_ij ∝ max(0, 1 - |j + 1/2 - (i + 1/2) s| / max(s, 1)),  s = inputs/outputs,  rows summing to 1

The triangle filter of torch's F.interpolate(mode="bilinear", antialias=True) and Pillow's BILINEAR: tests/feature/test_resize.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.batch_invariant import linear


def resize_matrix(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "outputs inputs"]:
    """R [outputs, inputs] of one axis, computed in float64; the identity where the sizes are one."""
    step = inputs / outputs
    centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * step
    place = torch.arange(inputs, dtype=torch.float64) + 0.5
    weight = (1 - (place[None, :] - centre[:, None]).abs() / max(step, 1.0)).clamp(min=0.0)
    return (weight / weight.sum(dim=1, keepdim=True)).to(dtype)


def resize(
    x: Float[Tensor, "batch channel height width"],
    rows: Float[Tensor, "new_height height"],
    columns: Float[Tensor, "new_width width"],
) -> Float[Tensor, "batch channel new_height new_width"]:
    """R_h x R_w', one product a sample (batch_invariant.py)."""
    wide = linear(x, columns, None)  # [batch, channel, height, new_width]
    return linear(wide.transpose(2, 3), rows, None).transpose(2, 3)
