"""sample(): draw from p(x) exp(lam phi(a(x))) / Z by guided diffusion, and collect what was drawn."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tiltscope.engine.config import SampleConfig
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prepare import calibrated, prepare
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.run import OnStep, check_any_finite, failures
from tiltscope.engine.samples import Samples, join


def sample(
    prior: Prior,
    feature: Feature,
    *,
    num: int = 8,
    lam: float | Sequence[float] | None = None,
    target_activation: float | None = None,
    log_tilt: Any = None,
    lift: Any = None,
    solver: Any = None,
    steps: int | None = None,
    grid: Any = None,
    guidance: str | None = None,
    recurrence: int = 1,
    travel_length: int = 1,
    preset: str = "calibrated",
    particles: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    vjp_chunk: int | None = None,
    start: str | None = None,
    start_sigma: float = 0.8,
    guidance_interval: tuple[float, float] | None = None,
    calibration: str = "pool",
    calibration_num: int = 256,
    beyond_pool: bool = False,
    runner: str = "torch",
    allow_parity_failure: bool = False,
    kernels: str = "auto",
    device: str = "cpu",
    graphs: str = "auto",
    dtype: str = "float32",
    on_step: OnStep | None = None,
) -> Samples:
    """Draw `num` samples from q(x) = p(x) exp(lam phi(a(x))) / Z(lam).

    Exactly one of lam (a float, or num floats; 0 is the unguided prior bit for bit, negative suppresses) and
    target_activation c, which calibrates lam so that E_q[phi(a)] = c: on the pool where prior and feature come from one
    bundle, else on calibration_num unguided draws. calibration="sampler" goes on from there by dual ascent on
    calibration_num draws of the sampler itself, whose mean is then c although it is biased (engine/calibration.py).

    start: a picture's file from which, noised to start_sigma, the samples set out (target "started": neither p nor q).

    (seed, index) addresses one picture: it is bitwise the same in whatever company it is drawn inside one batch_size; across
    batch sizes within 1e-3 (guided, float32, RMS over a picture).

    Raises ConfigError for a value that is not allowed, CalibrationError for a target out of reach, NonFiniteError where no
    sample stayed finite. Source: method of DPS (Chung et al. 2023) for the lift; proof: tests/test_gaussian_world.py.
    """
    config = SampleConfig(
        num=num,
        lam=lam,  # pyright: ignore[reportArgumentType]  a list is allowed here; the config makes it a tuple
        target_activation=target_activation,
        log_tilt=log_tilt,
        lift=lift,
        solver=solver,
        steps=steps,
        grid=grid,
        guidance=guidance,
        recurrence=recurrence,
        travel_length=travel_length,
        preset=preset,
        particles=particles,
        seed=seed,
        indices=indices,  # pyright: ignore[reportArgumentType]  likewise
        batch_size=batch_size,
        vjp_chunk=vjp_chunk,
        start=start,
        start_sigma=start_sigma,
        guidance_interval=guidance_interval,
        calibration=calibration,
        calibration_num=calibration_num,
        beyond_pool=beyond_pool,
        runner=runner,
        allow_parity_failure=allow_parity_failure,
        kernels=kernels,
        device=device,
        graphs=graphs,
        dtype=dtype,
    )
    run = calibrated(prepare(prior, feature, config))
    started = time.perf_counter()
    samples = join(run.draw(on_step=on_step))
    check_any_finite(samples, run.plan)
    seconds = run.seconds | {"sampling": time.perf_counter() - started}
    samples, evidence = run.with_evidence(samples)
    facts = run.describe() | evidence | {"seconds": seconds, "failures": failures(samples, run.plan)}
    return replace(samples, manifest=complete(facts))
