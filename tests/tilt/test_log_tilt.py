"""Log-tilts: value and slope agree, text round-trips, and wrong requests say what is allowed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.tilt.log_tilt import LOG_TILTS, Capped, Linear, LogTilt, parse_log_tilt

finite = st.floats(-1e6, 1e6)
log_tilts = st.one_of(st.just(Linear()), st.builds(Capped, finite))


@pytest.mark.parametrize("log_tilt", [Linear(), Capped(0.5), Capped(-2.0)])
def test_slope_is_the_derivative_of_value(log_tilt: LogTilt) -> None:
    a = torch.tensor([-3.0, -2.1, 0.0, 0.4, 0.6, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_tilt.value, a)
    (derivative,) = torch.autograd.grad(log_tilt.value(a).sum(), a)
    torch.testing.assert_close(log_tilt.slope(a), derivative, rtol=0, atol=0)


def test_every_registered_log_tilt_is_one() -> None:
    assert all(isinstance(make(*([1.0] if name == "capped" else [])), LogTilt) for name, make in LOG_TILTS.items())


def test_at_the_cap_the_slope_is_zero_and_value_differentiates_to_the_same() -> None:
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (derivative,) = torch.autograd.grad(Capped(2.0).value(a).sum(), a)
    assert Capped(2.0).slope(a).tolist() == derivative.tolist() == [1.0, 0.0, 0.0]


def test_a_nan_activation_stays_a_nan() -> None:
    assert Capped(2.0).value(torch.tensor([torch.nan])).isnan().all()


@given(log_tilts, st.lists(finite, min_size=1, max_size=5))
def test_numpy_and_torch_compute_the_same_phi(log_tilt: LogTilt, a: list[float]) -> None:
    values = log_tilt.value(torch.tensor(a, dtype=torch.float64))
    assert values.tolist() == log_tilt.phi(np.array(a)).tolist()


@given(log_tilts)
def test_spec_reads_back(log_tilt: LogTilt) -> None:
    assert parse_log_tilt(log_tilt.spec) == log_tilt


def test_texts_and_objects() -> None:
    assert parse_log_tilt("linear") == Linear()
    assert parse_log_tilt("capped(3)") == parse_log_tilt("capped(cap=3.0)") == parse_log_tilt(Capped(3)) == Capped(3.0)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ("hinge", "linear, capped"),
        ("capped", "cap"),
        ("capped(nan)", "finite"),
        ("capped(inf)", "finite"),
        ("capped(x)", "number"),
        ("linear(3)", "none"),
        (Linear, "linear, capped"),
        (3.0, "linear, capped"),
    ],
)
def test_wrong_requests_are_refused(given_: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_log_tilt(given_)  # type: ignore[arg-type]


@pytest.mark.parametrize("cap", [float("nan"), float("inf"), True, "3"])
def test_a_cap_is_a_finite_number(cap: object) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        Capped(cap)  # type: ignore[arg-type]
