"""Activation maximisation: stops at the target's mean, is a function of its seed, and starts from pictures like nature's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltscope.engine.errors import ConfigError, NonFiniteError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.tilt import actmax
from tiltscope.engine.tilt.actmax import SHIFT, activation_maximisation, natural_magnitude

SHAPE = (3, 16, 16)


def blob(height: int = 16, width: int = 16) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.exp(-4 * (x**2 + y**2))


def look(x0: Tensor) -> Tensor:
    """How red and not blue the middle is, between -1 and 1."""
    weight = blob(*x0.shape[-2:]) / blob(*x0.shape[-2:]).sum()
    return ((x0[:, 0] - x0[:, -1]) / 2 * weight).sum((1, 2))


FEATURE = Feature(look, name="red middle")


def test_it_stops_where_the_mean_reaches_the_target() -> None:
    found = activation_maximisation(FEATURE, shape=SHAPE, num=4, target_mean=0.4, seed=0)
    assert found.reached
    assert 0 < found.steps == found.n_vjp < actmax.STEPS_MAX
    assert found.activation.tolist() == look(found.x0).tolist()
    # The last step alone would overshoot by far more than this.
    assert 0.4 <= float(found.activation.mean()) < 0.401
    assert float(found.x0.abs().max()) <= 1


def test_a_target_out_of_reach_is_reported() -> None:
    found = activation_maximisation(FEATURE, shape=SHAPE, num=2, target_mean=1.5, seed=0, steps_max=7)
    assert (found.reached, found.steps, found.n_vjp) == (False, 7, 7)
    further = activation_maximisation(FEATURE, shape=SHAPE, num=2, target_mean=1.5, seed=0, steps_max=20)
    assert float(further.activation.mean()) > float(found.activation.mean()) > 0


def test_a_target_already_met_takes_no_step() -> None:
    found = activation_maximisation(FEATURE, shape=SHAPE, num=2, target_mean=-1.0, seed=0)
    assert (found.reached, found.steps) == (True, 0)


def test_pictures_are_a_function_of_their_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        activation_maximisation(FEATURE, shape=SHAPE, num=2, target_mean=0.3, seed=seed).x0 for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert float((first - other).abs().mean()) > 0.01
    assert float((first[0] - first[1]).abs().mean()) > 0.01
    assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_climbs_by_its_own_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(num: int) -> Tensor:
        return activation_maximisation(FEATURE, shape=SHAPE, num=num, target_mean=9.0, seed=1, steps_max=6).x0

    company = run(5)
    torch.testing.assert_close(run(2), company[:2], atol=1e-6, rtol=0)
    monkeypatch.setattr(actmax, "BATCH", 2)
    torch.testing.assert_close(run(5), company, atol=1e-6, rtol=0)


def test_where_a_thresholded_feature_is_silent_its_drive_is_climbed() -> None:
    class Thresholded(Feature):
        def activation_and_drive(self, x0: Tensor) -> tuple[Tensor, Tensor]:
            drive = look(x0)
            return torch.where(drive > 0.2, drive, 0), drive

    silent = Thresholded(look, name="thresholded")
    found = activation_maximisation(silent, shape=SHAPE, num=2, target_mean=0.35, seed=0)
    assert found.reached
    assert float(found.activation.mean()) == pytest.approx(0.35, abs=0.02)


def test_a_start_has_natures_spectrum() -> None:
    paint = actmax._Fourier((1, 64, 64))
    power = torch.zeros(64, 33)
    for place in range(40):
        flat = torch.atanh(paint(paint.start(0, place)[None])[0, 0])
        power += torch.fft.rfft2(flat).abs() ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None, :])
    band = (frequency > 1.5 / 64) & (frequency < 0.45)
    slope = np.polyfit(np.log(frequency[band]), np.log(power.numpy()[band]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)


def test_colours_start_decorrelated_in_natures_axes() -> None:
    paint = actmax._Fourier(SHAPE)
    spectra = torch.stack([paint.start(3, place) for place in range(60)])
    pixels = torch.atanh(paint(spectra)).permute(1, 0, 2, 3).flatten(1).numpy()
    expected = paint.colour.numpy() @ paint.colour.numpy().T
    found = np.cov(pixels)
    assert found / found[0, 0] == pytest.approx(expected / expected[0, 0], abs=0.08)


def test_each_step_moves_each_picture_by_its_own_little() -> None:
    side, num, steps = 32, 50, 8
    picture = blob(side, side).expand(num, 1, side, side)
    at = torch.arange(side) - (side - 1) / 2
    centres = []
    for step in range(steps):
        moved = actmax._moved(picture, 0, 0, step=step)[:, 0]
        mass = moved.sum((1, 2))
        centres.append(torch.stack([(moved.sum(1) * at).sum(1) / mass, (moved.sum(2) * at).sum(1) / mass], 1))
    shifts = torch.stack(centres)  # [step, picture, 2]
    assert float(shifts.abs().max()) < 1.5 * SHIFT * side
    assert float(shifts.std()) == pytest.approx(SHIFT * side / 3**0.5, rel=0.15)
    assert len(np.unique(shifts.numpy().round(4))) > 0.9 * shifts.numel()


@pytest.mark.parametrize("shape", [(1, 7, 5), (4, 8, 8)])
def test_any_number_of_channels_and_odd_sides(shape: tuple[int, ...]) -> None:
    feature = Feature(lambda x0: x0.mean((1, 2, 3)), name="bright")
    found = activation_maximisation(feature, shape=shape, num=3, target_mean=0.3, seed=0)
    assert found.x0.shape == (3, *shape)
    assert float(found.activation.mean()) == pytest.approx(0.3, abs=0.01)


def test_a_picture_that_fails_leaves_the_others_alone() -> None:
    broken = Feature(lambda x0: look(x0) * torch.tensor([1.0, torch.nan, 1.0])[: len(x0)], name="broken")
    found = activation_maximisation(broken, shape=SHAPE, num=3, target_mean=9.0, seed=1, steps_max=4)
    whole = activation_maximisation(FEATURE, shape=SHAPE, num=3, target_mean=9.0, seed=1, steps_max=4)
    assert torch.isfinite(found.activation).tolist() == [True, False, True]
    torch.testing.assert_close(found.x0[::2], whole.x0[::2], atol=1e-6, rtol=0)
    with pytest.raises(NonFiniteError, match="no picture"):
        activation_maximisation(_nan(), shape=SHAPE, num=2, target_mean=1.0, seed=0)


def _nan() -> Feature:
    return Feature(lambda x0: look(x0) * torch.nan, name="nan")


def test_samples_that_are_no_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="channels, height, width"):
        activation_maximisation(FEATURE, shape=(8,), num=1, target_mean=1.0, seed=0)


def test_with_a_magnitude_only_the_phase_is_free() -> None:
    natural = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    magnitude = natural_magnitude(natural)
    found = activation_maximisation(FEATURE, shape=SHAPE, num=3, target_mean=0.12, seed=0, magnitude=magnitude)
    assert found.reached
    assert found.steps > 0
    # Where a frequency is its own mirror image (four of them) a real picture keeps only the cosine of the phase.
    spectrum = torch.fft.rfft2(torch.atanh(found.x0.double()), norm="ortho").abs()
    inner = slice(1, SHAPE[2] // 2)
    torch.testing.assert_close(
        spectrum[..., inner], magnitude.double().expand_as(spectrum)[..., inner], rtol=1e-3, atol=1e-4
    )
    again = activation_maximisation(FEATURE, shape=SHAPE, num=3, target_mean=0.12, seed=0, magnitude=magnitude)
    assert torch.equal(found.x0, again.x0)
    with pytest.raises(ConfigError, match="magnitude got shape"):
        activation_maximisation(FEATURE, shape=SHAPE, num=1, target_mean=0.1, seed=0, magnitude=magnitude[:, :3])
