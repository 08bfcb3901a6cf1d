"""Arguments for the readout's tests, and what the definition says of them in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from tiltscope.kernels import reference_feature


class ReadoutCase(NamedTuple):
    """The arguments of dispatch_feature.readout, and cotangents of its two results."""

    tokens: Tensor
    direction: Tensor
    bias: Tensor
    threshold: Tensor
    weight: Tensor
    pooling: Tensor
    mask: Tensor
    activation_bar: Tensor
    drive_bar: Tensor

    def to(self, dtype: torch.dtype) -> "ReadoutCase":
        """Every floating tensor in dtype."""
        return ReadoutCase(*(each.to(dtype) if each.is_floating_point() else each for each in self))


# max, mean and lse alone, the published mix, and none: a padding row.
POOLINGS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, 0.3, 0.0), (0.0, 0.0, 0.0))


def readout_case(batch: int, num_tokens: int, width: int, rows: int, *, seed: int = 0) -> ReadoutCase:
    """float32. Poolings in turn; a threshold of -inf, of 0 and one nothing reaches; about half of the tokens in a mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    number = torch.arange(batch * rows).reshape(batch, rows)
    mask = torch.rand(batch, rows, num_tokens, generator=generator) > 0.5
    mask[..., -1] = True
    return ReadoutCase(
        tokens=normal(batch, num_tokens, width),
        direction=normal(batch, rows, width) / width**0.5,
        bias=normal(batch, rows) / 4,
        threshold=torch.tensor([-torch.inf, 0.0, 100.0])[number % 3],
        weight=normal(batch, rows),
        pooling=torch.tensor(POOLINGS)[number % len(POOLINGS)],
        mask=mask,
        activation_bar=normal(batch),
        drive_bar=normal(batch),
    )


# float32 against float64, as a share of the largest value: a sum of `width` products whose order is free, and exponentials of it.
TOLERANCE = 2e-6
# A 16-bit cotangent is rounded once more, by half a unit in its last place: of 8 and of 11 significant bits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check_readout(activation: Tensor, drive: Tensor, tokens_bar: Tensor, case: ReadoutCase) -> None:
    """Raises AssertionError where a result is not the definition's."""
    wide = ReadoutCase(*(each.detach() for each in case)).to(torch.float64)
    exact = reference_feature.readout(*wide[:7])
    bar = reference_feature.readout_vjp(*wide[7:], exact.pre, wide.direction, *wide[3:7], torch.float64)
    size = wide.weight.abs().sum(1).clamp(min=1e-30) * exact.pre.abs().amax((1, 2))
    for name, got, expected, scale, more in (
        ("activation", activation, exact.activation, size, 0.0),
        ("drive", drive, exact.drive, size, 0.0),
        (
            "tokens_bar",
            tokens_bar,
            bar,
            bar.abs().amax((1, 2), keepdim=True).clamp(min=1e-30),
            ROUNDING[tokens_bar.dtype],
        ),
    ):
        error = float(((got.double() - expected).abs() / scale).max())
        assert error <= TOLERANCE + more, f"{name}: off by {error:.1e} of its scale"
