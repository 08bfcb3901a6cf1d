"""The definition, in plain torch, of what stands between a picture and a vision trunk. See reference.py."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Preprocessed(NamedTuple):
    """inside: where nothing was clamped, kept for the VJP; empty without `clamp`."""

    pixels: Float[Tensor, "batch channel new_height new_width"]
    inside: Bool[Tensor, "*dims"]


def resize_matrix(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "outputs inputs"]:
    """R [outputs, inputs] of one axis, computed in float64; the identity where the sizes are one.

        R_ij ∝ max(0, 1 - |j + 1/2 - (i + 1/2) s| / max(s, 1)),  s = inputs/outputs,  rows summing to 1

    The triangle filter of torch's F.interpolate(mode="bilinear", antialias=True) and Pillow's BILINEAR:
    tests/feature/test_resize.py.
    """
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
    """R_h x R_w': two products, one an axis and one a sample, so that no operator for resampling is needed.

    Differentiable, exportable, and no sample's rounding depends on its batch mates.
    """
    wide = _each_row(x, columns)  # [batch, channel, height, new_width]
    return _each_row(wide.transpose(2, 3), rows).transpose(2, 3)


def _each_row(
    x: Float[Tensor, "batch channel lines inputs"], matrix: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "batch channel lines outputs"]:
    product = torch.bmm(x.flatten(1, 2), matrix.T.expand(x.shape[0], -1, -1))
    return product.view(*x.shape[:-1], matrix.shape[0])


def preprocess(
    x0: Float[Tensor, "batch channel height width"],
    mean: Float[Tensor, "1 channel 1 1"],
    std: Float[Tensor, "1 channel 1 1"],
    rows: Float[Tensor, "new_height height"] | None,
    columns: Float[Tensor, "new_width width"] | None,
    clamp: bool,
    dtype: torch.dtype,
) -> Preprocessed:
    """What a trunk sees of a picture: another size, another range, another scale.

        y = R_h x0 R_w'          u = (y + 1) / 2, cut to [0, 1] where `clamp`          pixels = (u - mean) / std

    x0 is about [-1, 1]; without `clamp` an estimate beyond that keeps its gradient. rows, columns: `resize_matrix` of the two
    sizes, both or neither; a kernel reads them only where that matrix is not zero. Everything in `dtype`; kernels compute in
    float32 and round once.
    Reads x0 and writes pixels once (with clamp also a byte an element): 4 (i + o) bytes in float32 for i elements in and o out;
    bound by memory bandwidth.
    """
    picture = x0.to(dtype)
    if rows is not None and columns is not None:
        picture = resize(picture, rows, columns)
    unit = (picture + 1) / 2
    if not clamp:
        return Preprocessed((unit - mean) / std, unit.new_empty(0, dtype=torch.bool))
    inside = (unit >= 0) & (unit <= 1)
    return Preprocessed((unit.clamp(0.0, 1.0) - mean) / std, inside)


def preprocess_vjp(
    pixels_bar: Float[Tensor, "batch channel new_height new_width"],
    inside: Bool[Tensor, "*dims"],
    std: Float[Tensor, "1 channel 1 1"],
    rows: Float[Tensor, "new_height height"] | None,
    columns: Float[Tensor, "new_width width"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "batch channel height width"]:
    """The cotangent of x0, in `dtype`: of a clamped element none, else

        x0_bar = R_h' (pixels_bar / (2 std)) R_w

    Reads pixels_bar and writes x0_bar once: bound by memory bandwidth.
    """
    y_bar = pixels_bar / std / 2
    if inside.numel():
        y_bar = torch.where(inside, y_bar, torch.zeros_like(y_bar))
    if rows is not None and columns is not None:
        y_bar = resize(y_bar, rows.T, columns.T)
    return y_bar.to(dtype)
