"""What a scheduler_config.json says: noise levels, prediction, and whether the network tells its variance.

    DDPM, DDIM, ... (anything with betas)     prediction_type: epsilon, v_prediction, sample
    FlowMatchEulerDiscreteScheduler           flow: s = i/N, i = N .. 1, shifted;  alpha : sigma = 1 - s : s
    EDMEulerScheduler, EDMDPMSolver...        edm (epsilon) or edm_v (v_prediction): sigma/alpha from sigma_max to sigma_min

Knows JSON; must not know networks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.levels import sigma_levels

FLOW = ("FlowMatchEulerDiscreteScheduler",)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# Of diffusers' prediction_type, by family.
BETA_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample"}
EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "edm_v"}
# What a bundle may say of its prior beside the scheduler's own file; the two must be one.
STATED = ("prediction_type", "beta_schedule", "num_train_timesteps", "variance_type", "clip_sample_range")


@dataclass(frozen=True, kw_only=True)
class NoiseProcess:
    """levels: sigma, descending. prediction: a key of PREDICTIONS (network.py). variance_type: None where it is not said."""

    levels: NDArray[np.float64]
    prediction: str
    variance_type: str | None
    time_scale: float = 1000.0
    sigma_data: float = 0.5


def read_scheduler(config: Mapping[str, Any], path: Path, stated: Mapping[str, Any]) -> NoiseProcess:
    """The process that scheduler_config.json (at `path`, for messages) describes.

    stated: what bundle.json says of the same; keys beyond STATED are not looked at. Raises BundleError where the two differ,
    naming both values, or for a prediction, schedule or range that is not known.
    """
    for name in STATED:
        if name in stated and stated[name] != config.get(name):
            raise BundleError(
                f"bundle.json says {name} {stated[name]!r} of its prior, {path} says {config.get(name)!r}; they must be one"
            )
    kind = config.get("_class_name")
    if kind in FLOW:
        return _flow(config, path)
    if kind in EDM:
        return _edm(config, path)
    prediction = _prediction(config, path, BETA_PREDICTIONS)
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) != 1.0:
        raise BundleError(
            f"{path}: clip_sample_range is {config['clip_sample_range']!r}, but samples here are in [-1, 1]: 1.0 is allowed"
        )
    levels = sigma_levels(config)
    if prediction == "epsilon" and levels[0] == 1.0:
        raise BundleError(f"{path}: an epsilon prediction says nothing at sigma = 1 (zero terminal SNR)")
    return NoiseProcess(levels=levels, prediction=prediction, variance_type=config.get("variance_type"))


def _prediction(config: Mapping[str, Any], path: Path, allowed: Mapping[str, str]) -> str:
    found = config.get("prediction_type", "epsilon")
    if found not in allowed:
        raise BundleError(f"{path}: prediction_type {found!r} is not known; allowed: {', '.join(allowed)}")
    return allowed[found]


def _number(config: Mapping[str, Any], path: Path, name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise BundleError(f"{path}: {name} must be a positive number, got {value!r}")
    return float(value)


def _count(config: Mapping[str, Any], path: Path) -> int:
    value = config.get("num_train_timesteps", 1000)
    if type(value) is not int or value < 2:
        raise BundleError(f"{path}: num_train_timesteps must be a whole number, 2 or more, got {value!r}")
    return value


def _flow(config: Mapping[str, Any], path: Path) -> NoiseProcess:
    if config.get("invert_sigmas"):
        raise BundleError(f"{path}: invert_sigmas is true; allowed is false (time 1 is noise)")
    num, shift = _count(config, path), _number(config, path, "shift", 1.0)
    s = np.arange(num, 0, -1) / num
    # Shifted for the resolution only when sampling starts: its own levels are then the plain ones.
    if not config.get("use_dynamic_shifting"):
        s = shift * s / (1 + (shift - 1) * s)
    # What the network is told at pure noise: diffusers' networks the number of levels, others (SiT) 1.
    scale = _number(config, path, "time_scale", float(num))
    return NoiseProcess(levels=s / np.hypot(1 - s, s), prediction="flow", variance_type=None, time_scale=scale)


def _edm(config: Mapping[str, Any], path: Path) -> NoiseProcess:
    low, high = _number(config, path, "sigma_min", 0.002), _number(config, path, "sigma_max", 80.0)
    if low >= high:
        raise BundleError(f"{path}: sigma_min {low} must be below sigma_max {high}")
    ramp = np.linspace(0, 1, _count(config, path))
    schedule = config.get("sigma_schedule", "karras")
    if schedule == "karras":
        rho = _number(config, path, "rho", 7.0)
        ratio = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    elif schedule == "exponential":
        ratio = high * (low / high) ** ramp
    else:
        raise BundleError(f"{path}: sigma_schedule {schedule!r} is not known; allowed: karras, exponential")
    return NoiseProcess(
        levels=ratio / np.hypot(1, ratio),
        prediction=_prediction(config, path, EDM_PREDICTIONS),
        variance_type=None,
        sigma_data=_number(config, path, "sigma_data", 0.5),
    )
