"""From a request to a Run: checked, its runner, device and kernels chosen, its memory foreseen, its plan filled, lambda found."""

import logging
import time
from dataclasses import replace
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tiltscope.engine.choice import parse_choice
from tiltscope.engine.config import GPU_RUNNERS, SampleConfig
from tiltscope.engine.errors import CalibrationError, ConfigError, RunnerError
from tiltscope.engine.feature.feature import Feature, check_activation
from tiltscope.engine.prior.prior import Prior, check_denoise
from tiltscope.engine.run import Run
from tiltscope.engine.runtime.auto import choose
from tiltscope.engine.runtime.cpu import require_bfloat16
from tiltscope.engine.runtime.graphs import CudaGraphs
from tiltscope.engine.runtime.memory import ChunkedStep, MemoryPlan, available_mib, plan_memory
from tiltscope.engine.runtime.runners import AUTO, REFERENCE, Gated, step_for
from tiltscope.engine.runtime.step import ListeningStep
from tiltscope.engine.sampler.lifts import LIFTS, Lift
from tiltscope.engine.sampler.particles import proposal_plan
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.engine.sampler.replay import GraphedTicks
from tiltscope.engine.sampler.state import Programme
from tiltscope.engine.start import starting_picture
from tiltscope.engine.tilt.calibrate import Calibration, calibrate, estimates, largest_reachable
from tiltscope.engine.tilt.log_tilt import LOG_TILTS, LogTilt
from tiltscope.engine.unguided import unguided_activations
from tiltscope.kernels.implementation import Implementation, require_implementation

logger = logging.getLogger(__name__)

# What the slots' state, energies and readings are in, and what the networks compute in.
STATE_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
NETWORK_DTYPES = STATE_DTYPES | {"bfloat16": torch.bfloat16}


def prepare(prior: Prior, feature: Feature, config: SampleConfig, *, gated: Gated | None = None) -> Run:
    """Check the request against prior and feature, fill the plan, find lambda. Raises as sample() does.

    gated: what runs this prior and feature, from who has it already; neither network is tried then.
    """
    config = config.resolved()
    if config.lam is None and config.target_activation is None:
        raise ConfigError(
            "lam and target_activation: got neither; give the tilt's lambda, or the mean activation wanted"
        )
    dtype, network_dtype = STATE_DTYPES[config.dtype], NETWORK_DTYPES[config.dtype]
    device, kernels = device_and_kernels(config)
    prior, feature = prior.to(dtype, device), feature.to(dtype, device)
    networks = (prior, feature) if network_dtype == dtype else _narrowed(prior, feature, network_dtype, device)
    choice = None
    if gated is None:
        check_denoise(prior, dtype, guided=config.lam != 0)
        check_activation(feature, prior.shape, dtype)
        if config.runner == AUTO and device.type == "cpu":
            choice, gated = choose(*networks, network_dtype, bucket=config.bucket, kernels=kernels)
        elif config.runner == AUTO:
            raise ConfigError(f"runner auto: it has no candidates on {device.type} but torch; give --runner torch")
        else:
            gated = step_for(
                config.runner,
                *networks,
                network_dtype,
                allow_parity_failure=config.allow_parity_failure,
                kernels=kernels,
            )
    if config.runner == AUTO:
        # What runs is what the run is called by: another runner's pictures differ in their last bits.
        config = replace(config, runner=gated.step.name)
    if config.guidance_interval is None and config.guidance == "tilt":
        config = replace(config, guidance_interval=prior.guidance_interval)
    needs = _memory_plan(prior, feature, config, gated)
    if config.vjp_chunk is not None and config.vjp_chunk < config.bucket:
        gated = gated._replace(step=ChunkedStep(gated.step, config.vjp_chunk))
    plan = make_plan(
        config.solver,
        steps=config.steps or 0,
        grid=config.grid,
        levels=prior.levels,
        guidance_interval=config.guidance_interval,
        guidance="constant" if config.guidance == "constant" else "tilt",
        recurrence=config.recurrence,
        travel_length=config.travel_length,
        start_sigma=None if config.start is None else config.start_sigma,
    )
    lift: Lift = parse_choice(config.lift, LIFTS, "lift")
    if lift.moves_x0 != (config.solver == "renoise"):
        raise ConfigError(
            f"solver and lift: got {config.solver} with {config.lift}; the lift daps and the solver renoise need each other"
        )
    if config.particles > 1:
        plan = proposal_plan(plan, lift)
    if plan.log_variance is not None:
        ListeningStep.to(gated.step)  # or why not
    log_tilt: LogTilt = parse_choice(config.log_tilt, LOG_TILTS, "log_tilt")
    programme = Programme(
        plans=(plan,),
        log_tilts=(log_tilt,),
        step=gated.step,
        lift=lift,
        shape=prior.shape,
        dtype=dtype,
        device=device,
        kernels=kernels,
        particles=config.particles,
        bucket=config.bucket,
        start=None if config.start is None else starting_picture(prior, config.start).to(device, dtype),
    )
    started = time.perf_counter()
    natural, source = _natural_activations(prior, feature, config, programme)
    lam, estimate = _strength(config, natural, log_tilt)
    if config.guidance == "constant":  # a scale, not a lambda: it says nothing of the tilt's KL
        estimate = None
    return Run(
        prior=prior,
        feature=feature,
        config=config,
        programme=programme,
        lam=lam,
        natural=natural,
        source=source,
        estimate=estimate,
        seconds={"calibration": time.perf_counter() - started},
        gated=gated,
        choice=choice,
        memory=needs,
        graphed=GraphedTicks(CudaGraphs()) if config.graphs == "auto" and device.type == "cuda" else None,
    )


def device_and_kernels(config: SampleConfig) -> tuple[torch.device, Implementation]:
    """The device and the kernels asked for.

    Raises RunnerError where there is none, or where the kernels cannot run on it, ConfigError for bfloat16 where it has none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunnerError(f"device: got cuda, but torch {torch.__version__} sees no CUDA device; use device cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
    if config.dtype == "bfloat16" and config.runner not in GPU_RUNNERS:
        require_bfloat16(device)
    if config.kernels == "auto":
        return device, _same_bits_sooner(device)
    require_implementation(config.kernels, device)
    return device, cast(Implementation, config.kernels)


def _same_bits_sooner(device: torch.device) -> Implementation:
    """ "native" where this machine has it, else "reference": the same bits, so only the time depends on a compiler."""
    if device.type != "cpu":
        return "reference"
    try:
        require_implementation("native", device)
    except RunnerError as error:
        logger.info("kernels auto: reference, because %s", error)
        return "reference"
    return "native"


def _narrowed(prior: Prior, feature: Feature, dtype: torch.dtype, device: torch.device) -> tuple[Prior, Feature]:
    """Both with their networks in a dtype narrower than the state's. Raises ConfigError for Python functions."""
    if prior.network is None or feature.trunk is None:
        raise ConfigError(
            f"dtype: got {str(dtype).removeprefix('torch.')} with a prior or a feature that is a Python function, which "
            "computes in the state's dtype; give dtype float32"
        )
    return prior.to(dtype, device), feature.to(dtype, device)


def _memory_plan(prior: Prior, feature: Feature, config: SampleConfig, gated: Gated) -> MemoryPlan | None:
    """Raises RunnerError, with numbers, for a bucket whose gradient would not fit."""
    if config.device != "cpu" or gated.step.name != REFERENCE or prior.network is None or feature.trunk is None:
        return None
    if config.lam == 0:
        return None
    available = available_mib()
    return plan_memory(
        prior, feature, NETWORK_DTYPES[config.dtype], bucket=config.bucket, chunk=config.vjp_chunk, available=available
    )


def calibrated(run: Run) -> Run:
    """`run` with lambda as its configuration wants it calibrated; draws where that is the sampler. Raises CalibrationError."""
    from tiltscope.engine.calibration import calibrate_on_sampler

    target, natural = run.config.target_activation, run.natural
    if run.config.calibration != "sampler" or target is None or natural is None:
        return run
    started = time.perf_counter()
    found = calibrate_on_sampler(run, target)
    return replace(found, seconds=run.seconds | {"calibration": time.perf_counter() - started})


def _natural_activations(
    prior: Prior, feature: Feature, config: SampleConfig, programme: Programme
) -> tuple[NDArray[np.float64] | None, Literal["pool", "unguided draws"] | None]:
    if feature.pool is not None and feature.pool is prior.pool:
        return feature.pool.activations(feature), "pool"
    if config.target_activation is None:
        return None, None
    activations = unguided_activations(programme, feature, seed=config.seed, num=config.calibration_num)
    return activations, "unguided draws"


def _strength(
    config: SampleConfig, natural: NDArray[np.float64] | None, log_tilt: LogTilt
) -> tuple[float | dict[int, float], Calibration | None]:
    """lambda (one, or by index) and what the natural activations say of it."""
    if isinstance(config.lam, tuple):
        return dict(zip(config.all_indices, config.lam, strict=True)), None
    if natural is None or config.target_activation is None:  # lam was given: prepare refuses neither
        return _given_strength(config.lam or 0.0, natural, log_tilt)
    found = calibrate(natural, config.target_activation, log_tilt=log_tilt)
    if found.feasible:
        return found.lam, found
    if not config.beyond_pool or config.target_activation < float(log_tilt.phi(natural).mean()):
        raise CalibrationError(found.reason)
    # The furthest that the pool can say something about is where the sampler's own ascent starts.
    return calibrate(natural, largest_reachable(natural, log_tilt=log_tilt), log_tilt=log_tilt).lam, None


def _given_strength(
    lam: float, natural: NDArray[np.float64] | None, log_tilt: LogTilt
) -> tuple[float, Calibration | None]:
    # lam = 0 asks nothing of the feature, not even that it varies.
    if natural is None or (lam == 0 and np.ptp(natural) == 0):
        return lam, None
    return lam, estimates(natural, lam, log_tilt=log_tilt)
