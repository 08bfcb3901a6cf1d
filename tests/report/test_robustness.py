"""What is left of an activation after JPEG, resizing and noise."""

import pytest
import torch

from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.report.robustness import CHANGES, changed, robustness

Y, X = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
CHECKER = (1.0 - 2.0 * ((X + Y) % 2)).expand(3, 16, 16)


def brightness(x0):
    return x0.mean((1, 2, 3))


def fineness(x0):
    """How much of the finest checkerboard there is: what no smaller copy can hold."""
    return (x0 * CHECKER).mean((1, 2, 3))


def test_what_is_coarse_survives_and_what_is_fine_does_not():
    bright = torch.full((2, 3, 16, 16), 0.5)
    coarse = robustness(Feature(brightness, name="brightness"), bright, natural_mean=0.0)
    assert all(value == pytest.approx(1, abs=0.03) for value in coarse.values())
    fine = robustness(Feature(fineness, name="fineness"), 0.5 * CHECKER[None], natural_mean=0.0)
    assert fine["resize"] == pytest.approx(0, abs=0.05)
    assert fine["noise"] == pytest.approx(1, abs=0.1)


def test_it_is_counted_from_the_natural_mean():
    bright = torch.full((1, 3, 16, 16), 0.5)
    feature = Feature(lambda x0: brightness(x0).clamp(max=0.4), name="capped")
    found = robustness(feature, bright, natural_mean=0.3)
    assert found["resize"] == pytest.approx(1)
    assert robustness(feature, bright, natural_mean=0.7) == dict.fromkeys(CHANGES)


def test_changes_stay_in_range_and_leave_the_pictures_alone():
    x0 = torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16)
    kept = x0.clone()
    for name in CHANGES:
        after = changed(x0, name)
        assert after.shape == x0.shape
        assert float(after.abs().max()) <= 1
        assert not torch.equal(after, x0)
    assert torch.equal(x0, kept)
