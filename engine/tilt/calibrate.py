"""Which lambda reaches a target, and what that costs, from natural activations alone.

    E_lam[f] = sum_i w_i f_i,   w = softmax(lam phi(a_i))                importance weights of the tilt, N samples
    lam*     : E_lam[phi] = c                                            dual of  min KL(q || p)  s.t.  E_q[phi] = c
    log Z    = log (1/N) sum_i exp(lam phi_i)
    KL       = sum_i w_i log(N w_i) = lam E_lam[phi] - log Z             nats
    ESS      = 1 / sum_i w_i^2                                           natural samples that carry the answer

Everything is float64 and shifted by the extreme phi before it is exponentiated, so activations of 1e4 and lambdas of 1e6
neither overflow nor cancel. Numpy only: knows nothing of pictures, pools or samplers. Source: method sections 1 and 5.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tiltscope.engine.errors import CalibrationError, ConfigError
from tiltscope.engine.tilt.log_tilt import LogTilt, parse_log_tilt

# Fewer natural samples than this do not make an average (N >~ exp(KL) is needed).
MIN_ESS = 10.0
# Above this share one picture is a good part of the answer: flagged, and never chosen by default.
MAX_WEIGHT = 0.2
# Where neither bound binds (ten or more activations at the very top) the default stops short of the maximum, at this
# share of the way from the natural mean: the maximum itself is the hard constraint, reached by no finite lambda.
NEAR_MAXIMUM = 0.99

_ESS_SLACK = 1 - 1e-9
_MAX_ITERATIONS = 200


@dataclass(frozen=True)
class Calibration:
    """A tilt of natural activations: lambda and what it costs (module docstring).

    lam: per unit of phi. kl, log_z: nats. ess: in natural samples. max_weight: largest w_i, in (0, 1]. feasible: the target
    is met by at least 10 effective samples. reason: why not, or a caution, else "".
    """

    lam: float
    kl: float
    log_z: float
    ess: float
    max_weight: float
    feasible: bool
    reason: str


@dataclass(frozen=True)
class DefaultTarget:
    """The furthest target that natural pictures still carry: its value c, its lambda, and c as a natural quantile."""

    target: float
    lam: float
    quantile: float


def calibrate(activations: ArrayLike, target: float, *, log_tilt: str | LogTilt = "linear") -> Calibration:
    """The lambda >= 0 with E_lam[phi(a)] = target, by safeguarded Newton  lam += (c - mean) / variance.

    activations: natural activations a_i. target: c, in units of phi(a).
    Not feasible, with the reason and the largest reachable target in it: c >= max phi (lam is inf, the other numbers those of
    that limit) and ESS < 10; c below the natural mean gives lam = 0. A weight above 0.2 is named in `reason`.
    Raises CalibrationError where phi(a) does not vary, ConfigError for values that are not finite numbers and for a log-tilt with
    a level of its own (target, soft_hard).
    Proof: tests/tilt/test_calibrate.py (Gaussian draws within 3 standard errors; invariances).
    """
    tilt = parse_log_tilt(log_tilt)
    if tilt.has_level:
        raise ConfigError(
            f"log-tilt {tilt.spec} carries its own level, so no target is calibrated for it; give lam (1, say)"
        )
    phi = _natural_phi(activations, tilt)
    c = _finite_number("target", target)
    low, mean, high = float(phi.min()), float(phi.mean()), float(phi.max())
    if len(phi) < MIN_ESS:
        reason = f"{len(phi)} natural activations cannot be tilted: at least {MIN_ESS:.0f} are needed"
        return replace(_estimates(phi, 0.0), feasible=False, reason=reason)
    if c < mean - 1e-12 * (high - low):
        reason = (
            f"target {c:.6g} is below the natural mean {mean:.6g}: lambda would be 0; ask for a target from "
            f"{_round_up(mean)} to {_round_down(_largest(phi))}, or give a negative lam to suppress the feature"
        )
        return replace(_estimates(phi, 0.0), feasible=False, reason=reason)
    if c >= high:
        reason = (
            f"target {c:.6g} is not below the largest of {len(phi)} natural activations, {high:.6g}: no tilt reaches it; "
            f"the largest reachable target is {_round_down(_largest(phi))}"
        )
        return _limit(phi, reason)
    found = _estimates(phi, _solve(phi, c))
    if found.ess < MIN_ESS * _ESS_SLACK:
        reason = (
            f"target {c:.6g} would rest on {found.ess:.1f} of {len(phi)} natural activations (ESS), at least "
            f"{MIN_ESS:.0f} are needed; the largest reachable target is {_round_down(_largest(phi))}"
        )
        return replace(found, feasible=False, reason=reason)
    return replace(found, reason=_caution(found.max_weight))


def estimates(activations: ArrayLike, lam: float, *, log_tilt: str | LogTilt = "linear") -> Calibration:
    """KL, log Z, ESS and largest weight of a given lambda of either sign; feasible: ESS >= 10.

    Raises CalibrationError where phi(a) does not vary, ConfigError for values that are not finite numbers.
    """
    phi = _natural_phi(activations, parse_log_tilt(log_tilt))
    found = _estimates(phi, _finite_number("lam", lam))
    if found.ess < MIN_ESS * _ESS_SLACK:
        reason = (
            f"lam {found.lam:.6g} rests on {found.ess:.1f} of {len(phi)} natural activations (ESS), at least "
            f"{MIN_ESS:.0f} are needed for KL and log Z to mean something"
        )
        return replace(found, feasible=False, reason=reason)
    return replace(found, reason=_caution(found.max_weight))


def tilt_weights(activations: ArrayLike, lam: float, *, log_tilt: str | LogTilt = "linear") -> NDArray[np.float64]:
    """w_i = exp(lam phi(a_i)) / sum_j exp(lam phi(a_j)): float64 [num], summing to 1; lam of either sign.

    Raises CalibrationError where phi(a) does not vary, ConfigError for values that are not finite numbers.
    """
    return _weights(_natural_phi(activations, parse_log_tilt(log_tilt)), _finite_number("lam", lam))


def tilted_mean(activations: ArrayLike, lam: float, *, log_tilt: str | LogTilt = "linear") -> float:
    """E_lam[phi(a)] of the natural activations, the target that `lam` reaches."""
    phi = _natural_phi(activations, parse_log_tilt(log_tilt))
    return _mean(phi, _finite_number("lam", lam))


def largest_reachable(activations: ArrayLike, *, log_tilt: str | LogTilt = "linear") -> float:
    """The largest target that `calibrate` accepts: E_lam[phi] where ESS = 10 (always below max phi).

    Raises CalibrationError where phi(a) does not vary or fewer than 10 activations are given.
    """
    return _largest(_enough(_natural_phi(activations, parse_log_tilt(log_tilt))))


def default_target(activations: ArrayLike, *, log_tilt: str | LogTilt = "linear") -> DefaultTarget:
    """The largest target with ESS >= 10 and largest weight <= 0.2, by bisection on lambda.

    ESS falls and the largest weight rises with lambda: d log ESS / dlam = 2 E_lam[phi] - 2 E_2lam[phi] <= 0 and
    d log max w / dlam = max phi - E_lam[phi] >= 0. Where neither binds before, 99 % of the way from the natural mean to the
    maximum. Raises CalibrationError where phi(a) does not vary or fewer than 10 activations are given.
    """
    tilt = parse_log_tilt(log_tilt)
    if tilt.has_level:
        raise ConfigError(
            f"log-tilt {tilt.spec} carries its own level, so no target is calibrated for it; give lam (1, say)"
        )
    phi = _enough(_natural_phi(activations, tilt))
    near = float(phi.mean() + NEAR_MAXIMUM * (phi.max() - phi.mean()))
    lam = _furthest_lam(phi, at_most=_solve(phi, near), max_weight=MAX_WEIGHT)
    target = _mean(phi, lam)
    return DefaultTarget(target=target, lam=lam, quantile=_quantile_of(phi, target))


def quantile_of(activations: ArrayLike, target: float, *, log_tilt: str | LogTilt = "linear") -> float:
    """The natural quantile of phi(a) that `target` is, in [0, 1]: the inverse of `target_at_quantile`."""
    return _quantile_of(_natural_phi(activations, parse_log_tilt(log_tilt)), _finite_number("target", target))


def target_at_quantile(activations: ArrayLike, quantile: float, *, log_tilt: str | LogTilt = "linear") -> float:
    """The `quantile` of phi(a) under natural pictures, linear between order statistics (numpy's default)."""
    q = _finite_number("quantile", quantile)
    if not 0 <= q <= 1:
        raise ConfigError(f"quantile got {q!r}; allowed: 0 to 1")
    return float(np.quantile(_natural_phi(activations, parse_log_tilt(log_tilt)), q))


def _natural_phi(activations: Any, tilt: LogTilt) -> NDArray[np.float64]:
    """phi(a), checked: one axis, finite, not constant."""
    if hasattr(activations, "detach"):
        activations = activations.detach().cpu().double().numpy()
    try:
        a = np.asarray(activations, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"activations got {type(activations).__name__}; allowed: a list or array of numbers"
        ) from None
    if a.ndim != 1 or len(a) < 2:
        raise ConfigError(f"activations got shape {a.shape}; allowed: one axis of at least 2 numbers")
    if num_bad := int((~np.isfinite(a)).sum()):
        raise ConfigError(f"activations got {num_bad} of {len(a)} that are not finite; drop or mend them first")
    phi = np.asarray(tilt.phi(a), np.float64)
    if phi.max() - phi.min() <= 1e-12 * np.abs(phi).max():  # what is left is rounding
        capped = a.max() > phi.max()
        raise CalibrationError(
            f"all {len(a)} natural activations are {phi[0]:.6g}{f' under the log-tilt {tilt.spec}' if capped else ''}: no tilt "
            f"can move what does not vary; choose another feature{' or a higher cap' if capped else ''}"
        )
    return phi


def _finite_number(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise ConfigError(f"{name} got {value!r}; allowed: a finite number")
    number = float(value)
    if not math.isfinite(number):
        raise ConfigError(f"{name} got {number}; allowed: a finite number")
    return number


def _enough(phi: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(phi) < MIN_ESS:
        raise CalibrationError(f"{len(phi)} natural activations cannot be tilted: at least {MIN_ESS:.0f} are needed")
    return phi


def _log_ratios(phi: NDArray[np.float64], lam: float) -> tuple[NDArray[np.float64], float]:
    """(lam (phi - ref), ref), all <= 0, with ref the end of phi that lam favours."""
    ref = float(phi.max() if lam >= 0 else phi.min())
    with np.errstate(over="ignore"):  # -inf is a weight of exactly 0
        return lam * (phi - ref), ref


def _weights(phi: NDArray[np.float64], lam: float) -> NDArray[np.float64]:
    weights = np.exp(_log_ratios(phi, lam)[0])
    return weights / weights.sum()


def _mean(phi: NDArray[np.float64], lam: float) -> float:
    ref = _log_ratios(phi, lam)[1]
    return ref + float(_weights(phi, lam) @ (phi - ref))


def _estimates(phi: NDArray[np.float64], lam: float) -> Calibration:
    logits, ref = _log_ratios(phi, lam)
    ratios = np.exp(logits)
    weights = ratios / ratios.sum()
    log_mean = math.log(ratios.mean())
    carried = weights > 0
    # lam (E[phi] - ref) - log mean ratio: the shift cancels on paper here, not in float64.
    kl = float(weights[carried] @ logits[carried]) - log_mean
    return Calibration(
        lam=lam,
        kl=max(kl, 0.0),
        log_z=lam * ref + log_mean,
        ess=min(float(1 / (weights @ weights)), float(len(phi))),
        max_weight=float(weights.max()),
        feasible=True,
        reason="",
    )


def _limit(phi: NDArray[np.float64], reason: str) -> Calibration:
    """lam -> inf: uniform on the activations that share the maximum."""
    num_top = int((phi == phi.max()).sum())
    log_share = math.log(num_top / len(phi))
    high = float(phi.max())
    log_z = log_share if high == 0 else math.copysign(math.inf, high)
    return Calibration(math.inf, -log_share, log_z, float(num_top), 1 / num_top, feasible=False, reason=reason)


def _solve(phi: NDArray[np.float64], target: float) -> float:
    """lam >= 0 with E_lam[phi] = target in [mean, max): Newton inside a bracket that every evaluation tightens."""
    unit = float(phi.std())  # in units of the natural spread, so scale and shift of phi change nothing
    b = (phi - phi.max()) / unit
    t = (target - float(phi.max())) / unit
    if t <= b.mean():
        return 0.0
    low, high = 0.0, 1.0
    while _mean(b, high) < t and high < 1e300:
        low, high = high, 2 * high
    lam = low
    for _ in range(_MAX_ITERATIONS):
        weights = _weights(b, lam)
        mean = float(weights @ b)
        low, high = (lam, high) if mean < t else (low, lam)
        variance = float(weights @ (b - mean) ** 2)
        step = lam + (t - mean) / variance if variance > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - lam) <= 4e-16 * max(lam, 1.0) or mean == t:
            break
        lam = following
    return lam / unit


def _furthest_lam(phi: NDArray[np.float64], *, at_most: float, max_weight: float = 1.0) -> float:
    """The largest lam <= at_most with ESS >= 10 and largest weight <= max_weight; 0 always qualifies."""

    def allowed(lam: float) -> bool:
        weights = _weights(phi, lam)
        return bool(1 / (weights @ weights) >= MIN_ESS * _ESS_SLACK and weights.max() <= max_weight)

    if allowed(at_most):
        return at_most
    low, high = 0.0, at_most
    for _ in range(_MAX_ITERATIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _largest(phi: NDArray[np.float64]) -> float:
    # A millionth of the range below the maximum stands for it: the maximum itself is no tilt's mean.
    nearly = float(phi.max() - 1e-6 * (phi.max() - phi.mean()))
    return _mean(phi, _furthest_lam(phi, at_most=_solve(phi, nearly)))


def _quantile_of(phi: NDArray[np.float64], target: float) -> float:
    return float(np.interp(target, np.sort(phi), np.linspace(0, 1, len(phi))))


def _caution(max_weight: float) -> str:
    return f"one natural picture carries {max_weight:.0%} of the answer" if max_weight > MAX_WEIGHT else ""


def _round_down(value: float) -> str:
    """Six digits that are never more than `value`, so that the number shown can be asked for."""
    return _round(value, math.floor)


def _round_up(value: float) -> str:
    return _round(value, math.ceil)


def _round(value: float, toward: Any) -> str:
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return f"{toward(value / unit) * unit:.6g}"
