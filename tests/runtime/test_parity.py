"""Parity level by level: what it is relative to, and that one wrong level of one output is found wherever it stands."""

from dataclasses import dataclass

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ParityError
from tiltscope.engine.runtime.parity import check, measure
from tiltscope.engine.runtime.step import StepOutput, TorchStep
from tiltscope.engine.sampler.noise import normal

PRIOR = tiltscope.Prior(
    lambda x, sigma: 0.3 * x + (1 - sigma).to(x.dtype).view(-1, 1, 1, 1) * torch.tanh(x), shape=(3, 4, 4), name="small"
)
FEATURE = tiltscope.Feature(lambda x0: (x0 * x0).flatten(1).mean(1), name="energy")
LEVELS = (0.9, 0.5, 0.1)


@dataclass(frozen=True)
class Off(TorchStep):
    """The reference but for one output at one noise level."""

    output: str = "drive"
    at: float = 0.5
    factor: float = 1.0

    def guided(self, x, sigma, alpha, readout):
        out = super().guided(x, sigma, alpha, readout)
        if abs(float(sigma[0]) - self.at) > 1e-6:
            return out
        return out._replace(**{self.output: getattr(out, self.output) * self.factor})


def rows_of(step, feature=FEATURE):
    return measure(step, PRIOR, feature, dtype=torch.float32, batches=(1, 3), levels=LEVELS)


def test_the_reference_passes_with_a_row_for_every_level_and_batch():
    rows = rows_of(TorchStep(PRIOR, FEATURE))
    assert [(row.batch, row.sigma) for row in rows] == [(batch, level) for batch in (1, 3) for level in LEVELS]
    check(rows, torch.float32, "small")
    assert 0 < max(row.grad_a for row in rows) < 1e-5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("output", StepOutput._fields)
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_one_wrong_level_of_one_output_is_refused_by_name(level, output, factor):
    """A number that is none has no order, and must not be passed over where it is not the first."""
    rows = rows_of(Off(PRIOR, FEATURE, output=output, at=level, factor=factor))
    with pytest.raises(ParityError, match=rf"{output} is off .* at sigma {level}"):
        check(rows, torch.float32, "small")


def test_a_number_next_to_nothing_is_held_to_the_largest_of_all_levels():
    """A difference of large numbers that vanishes at one level: rounding there is no fault, a shift of it is one."""
    x = torch.from_numpy(normal(1, 0, 0, 0, shape=PRIOR.shape))[None]
    sigma = torch.full((1,), 0.5, dtype=torch.float64)
    there = TorchStep(PRIOR, FEATURE).guided(x.double(), sigma, torch.sqrt(1 - sigma * sigma), None).drive

    def vanishing(shift):
        return tiltscope.Feature(lambda x0: FEATURE.activation_and_drive(x0)[0] - there.to(x0.dtype) + shift, name="v")

    def rows(step):
        return measure(step, PRIOR, vanishing(1e-9), dtype=torch.float32, batches=(1,), levels=LEVELS)

    fine = rows(TorchStep(PRIOR, vanishing(1e-9)))
    check(fine, torch.float32, "small")
    assert next(row for row in fine if row.sigma == 0.5).drive > 0
    with pytest.raises(ParityError, match=r"(activation|drive) is off"):
        check(rows(TorchStep(PRIOR, vanishing(0.01 * float(there)))), torch.float32, "small")
