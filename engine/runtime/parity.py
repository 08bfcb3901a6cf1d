"""The whole gate, run by `tiltscope export`: a step against the float64 reference, level by level and batch by batch.

The short self-test of every load (gate.py) is one batch of this. Knows steps; knows no engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tiltscope.engine.errors import ParityError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.gate import LEVELS, LIMITS, least_cosine, relative_error, smoothed, state_dtype
from tiltscope.engine.runtime.step import Step, StepOutput, TorchStep
from tiltscope.engine.sampler.noise import normal


@dataclass(frozen=True, kw_only=True)
class Parity:
    """At one noise level, batch size and readout: each output's largest error relative to its largest value; cosine of grad_a.

    Of activation and drive that is the largest value over all levels: a batch of one is one number, a difference of large ones,
    and may be next to nothing (seen: eager float32 8.6e-4 off at one level, the activation of emoji64's blocks.5:sae:1169).
    """

    sigma: float
    batch: int
    readout: int
    x0_hat: float
    activation: float
    drive: float
    grad_a: float
    cosine: float


def measure(
    step: Step,
    prior: Prior,
    feature: Feature,
    *,
    dtype: torch.dtype,
    batches: Sequence[int] = (1, 2, 8),
    levels: Sequence[float] = LEVELS,
) -> list[Parity]:
    """Every level x batch x readout: the feature's own, and one that no trace has seen (its rows turned round, doubled)."""
    reference = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
    readouts = (
        [None]
        if feature.readout is None
        else [smoothed(each, dtype) for each in (feature.readout, _unseen(feature.readout))]
    )
    found: list[Parity] = []
    wide = state_dtype(dtype)
    for batch in batches:
        x = torch.stack([torch.from_numpy(normal(1, at, 0, 0, shape=prior.shape)) for at in range(batch)])
        for at, readout in enumerate(readouts):
            many = None if readout is None else readout.expand(batch)
            pairs: list[tuple[StepOutput, StepOutput]] = []
            for level in levels:
                sigma = torch.full((batch,), level, dtype=torch.float64)
                alpha = torch.sqrt((1 - sigma) * (1 + sigma))
                expected = reference.guided(x, sigma, alpha, None if many is None else many.to(torch.float64))
                pairs.append((step.guided(x.to(wide), sigma, alpha, None if many is None else many.to(wide)), expected))
            for level, (got, expected), numbers in zip(levels, pairs, _numbers(pairs), strict=True):
                pictures = {
                    name: relative_error(getattr(got, name), getattr(expected, name)) for name in ("x0_hat", "grad_a")
                }
                cosine = least_cosine(got.grad_a, expected.grad_a)
                found.append(Parity(sigma=level, batch=batch, readout=at, cosine=cosine, **pictures, **numbers))
    return found


def _numbers(pairs: Sequence[tuple[StepOutput, StepOutput]]) -> list[dict[str, float]]:
    """Of each (got, expected), the errors of activation and drive, relative to the largest expected of all."""
    found: list[dict[str, float]] = [{} for _ in pairs]
    for name in ("activation", "drive"):
        together = torch.stack([getattr(expected, name) for _, expected in pairs])
        for at, (got, _) in enumerate(pairs):
            # Every other level right: what is left of the error is this one's.
            found[at][name] = relative_error(
                together.index_copy(0, torch.tensor([at]), getattr(got, name)[None].double()), together
            )
    return found


def check(rows: Sequence[Parity], dtype: torch.dtype, runner: str) -> None:
    """Raises ParityError naming the worst place where a row is beyond the tolerance of its dtype."""
    limits = LIMITS[dtype]
    worst, output = max(
        ((row, name) for row in rows for name in StepOutput._fields), key=lambda at: _no_nan(getattr(*at), math.inf)
    )
    error = getattr(worst, output)
    turned = min(rows, key=lambda row: _no_nan(row.cosine, -math.inf))
    if not error <= limits.error or not turned.cosine >= limits.cosine:
        raise ParityError(
            f"runner {runner}: {output} is off by {error:.1e} of its largest value at sigma {worst.sigma}, batch {worst.batch} "
            f"(allowed {limits.error:.0e}); the gradient's least cosine is {turned.cosine:.6f} at sigma {turned.sigma}, batch "
            f"{turned.batch} (allowed {limits.cosine:.6f}); its step does not compute the reference, use --runner torch"
        )


def _no_nan(value: float, instead: float) -> float:
    """A number that has an order: one that is none compares as neither larger nor smaller, and would be passed over."""
    return instead if math.isnan(value) else value


def _unseen(readout: Readout) -> Readout:
    return Readout(
        readout.direction.flip(-1),
        readout.bias,
        readout.threshold,
        readout.weight * 2,
        readout.pooling.flip(-1),
        readout.mask,
    )
