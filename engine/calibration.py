"""Calibrating lambda on the sampler itself: rounds of draws, dual ascent over them (tilt/ascent.py), and remembering the answer.

The draws have their own indices, one fixed batch shape and seed 0, so the lambda found is the same whatever a run's seed, number
and batch size. It is kept under TILTSCOPE_HOME/calibrations by the hash of everything that decides it; a bundle brings some.
"""

import hashlib
import json
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import CalibrationError
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.run import Run
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.runtime.function_parts import answers_of_feature, answers_of_prior
from tiltscope.engine.sampler.noise import CALIBRATION_INDEX
from tiltscope.engine.tilt.ascent import Ascent, Draw, ascend
from tiltscope.engine.tilt.log_tilt import parse_log_tilt

ROUND = 16
BATCH = 8
# Above the unguided draws that calibrate where there is no pool.
FIRST_INDEX = CALIBRATION_INDEX + 2**20
# What a lambda does not depend on.
_FREE = ("num", "batch_size", "seed", "indices", "lam", "target_activation", "calibration", "beyond_pool", "graphs")


def calibrate_on_sampler(run: Run, target: float) -> Run:
    """`run` with the lambda at which its own sampler's mean of phi(a) is `target`, found from `calibration_num` draws.

    The lambda of `run`, from its natural activations, is where the ascent starts. Raises CalibrationError where the sampler does
    not reach the target, and for a run that has several lambdas or no natural activations.
    """
    if isinstance(run.lam, dict):
        raise CalibrationError("lam: one a sample was given; there is nothing to calibrate")
    if run.natural is None:
        raise CalibrationError("calibration: natural activations say where to start, and this run has none")
    key = calibration_key(run, target)
    kept = cache_folder("calibrations") / f"{key}.json"
    ascent = _remembered(run, key, kept)
    if ascent is None:
        num = run.config.calibration_num
        natural_mean = float(run.programme.log_tilts[0].phi(run.natural).mean())
        try:
            ascent = ascend(_sampler(run), target, start=run.lam, natural_mean=natural_mean, num=num)
        except CalibrationError as error:
            hint = (
                "ask for a target that it reaches, or give calibration=pool to draw at the lambda of natural pictures"
            )
            raise CalibrationError(f"{error}; {hint}") from error
        write_bytes(kept, json.dumps(ascent.to_json()).encode())
    return replace(run, lam=ascent.lam, ascent=ascent)


def _sampler(run: Run) -> Draw:
    """Rounds of phi(a) from `run`'s sampler at other lambdas, at indices that no user can ask for."""
    config, log_tilt = run.config, parse_log_tilt(run.config.log_tilt or "linear")
    sampler = replace(
        run,
        config=replace(config, num=BATCH, lam=0.0, target_activation=None, indices=None, seed=0, batch_size=BATCH),
        programme=replace(run.programme, bucket=BATCH if config.particles > 1 else None),
    )
    each, at_once = min(ROUND, config.calibration_num), max(1, BATCH // config.particles)

    def draw(lam: float, number: int) -> NDArray[np.float64]:
        indices = FIRST_INDEX + number * each + np.arange(each, dtype=np.int64)
        parts = [replace(sampler, lam=lam).draw_bucket(indices[at : at + at_once]) for at in range(0, each, at_once)]
        activation = np.concatenate([part.activation[part.ok].double().numpy() for part in parts])
        return np.asarray(log_tilt.phi(activation), np.float64)

    return draw


def calibration_key(run: Run, target: float) -> str:
    """64 hex digits over what decides the lambda: prior, feature, target and every setting of the sampler."""
    # At their defaults settings are left out: a new one changes no lambda that was found before it.
    usual = {each.name: each.default for each in fields(SampleConfig)}
    asked = run.config.decisive()
    settings = {name: value for name, value in asked.items() if name not in _FREE and value != usual[name]}
    parts = [version("tiltscope"), run.prior.identity, run.feature.identity, float(f"{target:.9g}"), settings]
    # A function of one's own has a name and no hash: it is known by its answers, or another one of that name had its lambda.
    device = run.programme.device
    if run.prior.network is None:
        parts.append(answers_of_prior(run.prior, device))
    if run.feature.trunk is None:
        parts.append(answers_of_feature(run.feature, run.prior.shape, device))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _remembered(run: Run, key: str, kept: Path) -> Ascent | None:
    pool = run.prior.pool if run.feature.pool is run.prior.pool else None
    if pool is not None and key in pool.calibrations:
        return Ascent.from_json(pool.calibrations[key], "bundle")
    return Ascent.from_json(json.loads(kept.read_text()), "cache") if kept.is_file() else None
