"""Log-tilts: value and slope agree, text round-trips, and wrong requests say what is allowed."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.tilt.calibrate import calibrate, default_target, tilt_weights
from tiltscope.engine.tilt.log_tilt import (
    LOG_TILTS,
    Capped,
    Hinge,
    Linear,
    LogTilt,
    SmoothCap,
    SoftHard,
    Target,
    ZScored,
    parse_log_tilt,
)

finite = st.floats(-1e6, 1e6)
positive = st.floats(1e-2, 1e3)
log_tilts = st.one_of(
    st.just(Linear()),
    st.builds(ZScored, finite, positive),
    st.builds(Capped, finite),
    st.builds(Hinge, finite, positive),
    st.builds(Target, finite, positive),
    st.builds(SmoothCap, finite, positive),
    st.builds(SoftHard, finite, positive),
)
SMOOTH = [ZScored(1.0, 2.0), Hinge(0.5, 0.3), Target(1.0, 0.7), SmoothCap(0.2, 0.5), SoftHard(0.2, 0.5)]


@pytest.mark.parametrize("log_tilt", [Linear(), Capped(0.5), Capped(-2.0), *SMOOTH])
def test_slope_is_the_derivative_of_value(log_tilt: LogTilt) -> None:
    a = torch.tensor([-3.0, -2.1, 0.0, 0.4, 0.6, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_tilt.value, a)
    (derivative,) = torch.autograd.grad(log_tilt.value(a).sum(), a)
    torch.testing.assert_close(log_tilt.slope(a), derivative, rtol=1e-12, atol=1e-12)
    if isinstance(log_tilt, Linear | Capped | ZScored):
        assert not log_tilt.curvature(a).any()
    else:
        (second,) = torch.autograd.grad(log_tilt.slope(a).sum(), a)
        torch.testing.assert_close(log_tilt.curvature(a), second, rtol=1e-12, atol=1e-12)


def test_every_registered_log_tilt_is_one() -> None:
    for make in LOG_TILTS.values():
        assert isinstance(make(*[1.0 for each in fields(make)]), LogTilt)


def test_the_soft_ones_tend_to_the_hard_ones() -> None:
    a = torch.tensor([-1.0, 0.4, 0.6, 3.0], dtype=torch.float64)
    torch.testing.assert_close(SmoothCap(0.5, 1e-3).value(a), Capped(0.5).value(a), rtol=0, atol=1e-6)
    hard = SoftHard(0.5, 1e-3).value(a)
    assert (hard[:2] < -90).all()
    assert (hard[2:].abs() < 1e-20).all()


@pytest.mark.parametrize("log_tilt", SMOOTH)
def test_large_activations_stay_finite(log_tilt: LogTilt) -> None:
    a = torch.tensor([-1e4, 0.0, 1e4])
    for each in (log_tilt.value(a), log_tilt.slope(a), log_tilt.curvature(a)):
        assert each.isfinite().all()


@pytest.mark.parametrize("log_tilt", [Target(1.0), SoftHard(1.0)])
def test_one_with_its_own_level_is_not_calibrated(log_tilt: LogTilt) -> None:
    for calibrates in (
        lambda: calibrate(np.arange(50.0), 30.0, log_tilt=log_tilt),
        lambda: default_target(np.arange(50.0), log_tilt=log_tilt),
    ):
        with pytest.raises(ConfigError, match=r"its own level.*give lam"):
            calibrates()


@pytest.mark.parametrize("log_tilt", [Hinge(2.0, 0.3), SmoothCap(2.0, 0.5), ZScored(0.5, 2.0)])
def test_the_mean_of_phi_is_what_is_calibrated(log_tilt: LogTilt) -> None:
    natural = np.random.default_rng(0).normal(0, 1, 2000)
    phi = log_tilt.phi(natural)
    target = float(phi.mean() + 0.8 * phi.std())
    found = calibrate(natural, target, log_tilt=log_tilt)
    assert found.feasible
    assert float(tilt_weights(natural, found.lam, log_tilt=log_tilt) @ phi) == pytest.approx(target, abs=1e-9)


def test_at_the_cap_the_slope_is_zero_and_value_differentiates_to_the_same() -> None:
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (derivative,) = torch.autograd.grad(Capped(2.0).value(a).sum(), a)
    assert Capped(2.0).slope(a).tolist() == derivative.tolist() == [1.0, 0.0, 0.0]


def test_a_nan_activation_stays_a_nan() -> None:
    assert Capped(2.0).value(torch.tensor([torch.nan])).isnan().all()


@given(log_tilts, st.lists(finite, min_size=1, max_size=5))
def test_numpy_and_torch_compute_the_same_phi(log_tilt: LogTilt, a: list[float]) -> None:
    values = log_tilt.value(torch.tensor(a, dtype=torch.float64))
    np.testing.assert_allclose(values.numpy(), log_tilt.phi(np.array(a)), rtol=1e-13, atol=1e-13)


@given(log_tilts)
def test_spec_reads_back(log_tilt: LogTilt) -> None:
    assert parse_log_tilt(log_tilt.spec) == log_tilt


def test_texts_and_objects() -> None:
    assert parse_log_tilt("linear") == Linear()
    assert parse_log_tilt("capped(3)") == parse_log_tilt("capped(cap=3.0)") == parse_log_tilt(Capped(3)) == Capped(3.0)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ("bell", "linear, zscored, capped, hinge, target, smooth_cap, soft_hard"),
        ("capped", "cap"),
        ("capped(nan)", "finite"),
        ("capped(inf)", "finite"),
        ("capped(x)", "number"),
        ("linear(3)", "none"),
        (Linear, "linear, zscored, capped"),
        (3.0, "linear, zscored, capped"),
    ],
)
def test_wrong_requests_are_refused(given_: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_log_tilt(given_)  # type: ignore[arg-type]


@pytest.mark.parametrize("cap", [float("nan"), float("inf"), True, "3"])
def test_a_cap_is_a_finite_number(cap: object) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        Capped(cap)  # type: ignore[arg-type]
