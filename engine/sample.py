"""sample(): draw from p(x) exp(lam phi(a(x))) / Z by guided diffusion.

`prepare` turns a request into a Run (checked, calibrated, its plan filled); `Run.draw` yields finished samples bucket by
bucket, so a million of them stream through flat memory; `sample` collects them.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tiltscope.engine.choice import parse_choice
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import CalibrationError, ConfigError, NonFiniteError, RunnerError
from tiltscope.engine.feature.feature import Feature, check_activation
from tiltscope.engine.prior.prior import CPU, Prior, check_denoise
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.runtime.auto import Choice, choose
from tiltscope.engine.runtime.graphs import CudaGraphs
from tiltscope.engine.runtime.memory import ChunkedStep, MemoryPlan, available_mib, plan_memory
from tiltscope.engine.runtime.runners import AUTO, REFERENCE, Gated, step_for
from tiltscope.engine.runtime.step import ListeningStep
from tiltscope.engine.sampler.lifts import LIFTS, Lift
from tiltscope.engine.sampler.particles import proposal_plan, settle
from tiltscope.engine.sampler.plan import GraphKind, Plan, make_plan
from tiltscope.engine.sampler.replay import GraphedTicks
from tiltscope.engine.sampler.state import Observation, Programme, SlotState, admit
from tiltscope.engine.sampler.tick import tick
from tiltscope.engine.samples import Samples, Target, join
from tiltscope.engine.start import starting_picture
from tiltscope.engine.tilt.ascent import Ascent
from tiltscope.engine.tilt.calibrate import Calibration, calibrate, estimates, largest_reachable
from tiltscope.engine.tilt.evidence import combine
from tiltscope.engine.tilt.log_tilt import LOG_TILTS, LogTilt
from tiltscope.engine.unguided import unguided_activations
from tiltscope.kernels.implementation import Calls, Implementation, count_calls, require_implementation

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Progress(NamedTuple):
    """What on_step is told after each row: place in the plan, and what the row saw of each sample in the bucket."""

    row: int
    num_rows: int
    sigma: float
    indices: tuple[int, ...]
    activation: Float[Tensor, "batch"]
    preview: Float[Tensor, "batch ..."]


OnStep = Callable[[Progress], Literal["stop"] | None]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A request that can be drawn from: everything checked, lambda known.

    natural: activations of natural pictures, None where lam was given and prior and feature share no pool; `source` says
    whose they are. estimate: KL, log Z and ESS of the tilt that `natural` gives for what was asked, None without `natural`,
    beyond its reach, or where lam differs between samples. ascent: how lam was found on the sampler, None where it was not.
    gated: the step as its self-test left it. choice: why this runner, where that was left to auto; `config` names the one taken.
    memory: what a guided row takes, None where that is not foreseen (Python functions, a device, a runner of its own memory).
    graphed: what replays the ticks, None where they run eagerly. calls: the fused operations that have run, by implementation.
    """

    prior: Prior
    feature: Feature
    config: SampleConfig
    programme: Programme
    lam: float | dict[int, float]
    natural: NDArray[np.float64] | None
    source: Literal["pool", "unguided draws"] | None
    estimate: Calibration | None
    seconds: dict[str, float]
    ascent: Ascent | None = None
    gated: Gated | None = None
    choice: Choice | None = None
    memory: MemoryPlan | None = None
    graphed: GraphedTicks | None = None
    calls: Calls = field(default_factory=Calls)

    @property
    def plan(self) -> Plan:
        return self.programme.plans[0]

    @property
    def identity(self) -> str:
        """Same identity, same pictures: over prior, feature and every setting but num and batch_size."""
        return self.config.identity("sample", self.prior.identity, self.feature.identity)

    def draw(self, *, skip: Collection[int] = (), on_step: OnStep | None = None) -> Iterator[Samples]:
        """The samples whose index is not in `skip`, in order, one bucket at a time."""
        wanted = (index for index in self.config.all_indices if index not in skip)
        # Particles fill buckets: several samples of few, or one sample of many.
        at_once = max(1, self.config.bucket // self.config.particles)
        while indices := list(islice(wanted, at_once)):
            yield self.draw_bucket(np.array(indices, np.int64), on_step)

    def draw_bucket(self, indices: NDArray[np.int64], on_step: OnStep | None = None) -> Samples:
        """The samples of these indices, advanced together."""
        num, particles, bucket = len(indices), self.config.particles, self.config.bucket
        lam = np.array([self.lam[int(index)] if isinstance(self.lam, dict) else self.lam for index in indices])
        state = admit(
            self.programme,
            seed=self.config.seed,
            indices=indices,
            lam=lam,
            readout=self.feature.readout,
            bucket=-(-num * particles // bucket) * bucket,
        )
        with count_calls() as calls:
            samples = self._advance(state, indices, on_step, calls)
        self.calls.update(calls)
        return samples

    def _advance(self, state: SlotState, indices: NDArray[np.int64], on_step: OnStep | None, calls: Calls) -> Samples:
        """Every row of the plan, eagerly or by replays, and what came of it."""
        num, particles, finished = len(indices), self.config.particles, True
        replaying = None if self.graphed is None else self.graphed.start(state, self.programme)
        seen: Observation | None = None
        for row in range(self.plan.num_rows):
            if replaying is None:
                state, seen = tick(state, self.programme)
            else:
                replaying.tick(calls)
            if on_step is None:
                continue
            seen = replaying.observation() if replaying is not None else seen
            assert seen is not None
            sigma = float(self.plan.column("sigma")[row])
            first = slice(0, num * particles, particles)  # of particles, the first is shown
            activation, preview = seen.activation[first].cpu(), seen.x0_hat[first].cpu()
            told = Progress(row, self.plan.num_rows, sigma, tuple(indices), activation, preview)
            if on_step(told) == "stop":
                finished = row + 1 == self.plan.num_rows
                break
        return self.collect(state if replaying is None else replaying.state, num, finished=finished)

    def collect(self, state: SlotState, num: int, *, finished: bool) -> Samples:
        """The first `num` samples of slots that have done their rows, measured; the rest of the slots is padding."""
        # The first and only time the host asks the device: the rows are done.
        activation, drive = (each.cpu() for each in self._measure(state))
        state = state.to(CPU)
        particles = self.config.particles
        here = replace(self.programme, device=CPU, kernels="reference")
        settled = settle(state, activation, here, num) if particles > 1 else None
        slot = torch.arange(num) if settled is None else settled.chosen
        rows, lam = state.row[slot], state.lam[slot]
        nfe, n_vjp = self._cost(rows, lam)
        x0 = state.x[slot].to(torch.float32)
        images = self.prior.to_images(x0.to(self.programme.device))
        samples = Samples(
            feature=self.feature.name,
            x0=x0,
            images=None if images is None else images.cpu(),
            activation=activation[slot].to(torch.float32),
            drive=drive[slot].to(torch.float32),
            lam=lam.to(torch.float32),
            seed=self.config.seed,
            index=state.index[slot],
            target=self._target(tilted=bool((lam != 0).any())),
            nfe=nfe * particles,
            n_vjp=n_vjp * particles,
            ok=(state.ok[slot] if settled is None else settled.ok) & finished,
            log_z=self.estimate.log_z if self.estimate else None,
            kl=self.estimate.kl if self.estimate else None,
            ess=self.estimate.ess if self.estimate else None,
            stopped=not finished,
        )
        if settled is None:
            return samples
        every = slice(0, num * particles)
        return replace(
            samples,
            weights=settled.weight,
            particles=state.x[every].to(torch.float32).unflatten(0, (num, particles)),
            particle_activation=activation[every].to(torch.float32).unflatten(0, (num, particles)),
            group_log_z=settled.log_z,
            group_phi=settled.phi,
            group_ess=settled.ess,
            lineages=settled.lineages,
        )

    def _target(self, *, tilted: bool) -> Target:
        """What the draws may be called (samples.py)."""
        if self.config.start is not None:
            return "started"
        if tilted and self.programme.lift.couples:
            return "coupled"
        return "approximate" if tilted and self.config.particles == 1 else "consistent"

    def _cost(self, rows: Int[Tensor, "num"], lam: Float[Tensor, "num"]) -> tuple[Tensor, Tensor]:
        """Evaluations of the denoiser, and backward passes, in the first `rows` rows of each sample."""
        lift = self.programme.lift
        guided = torch.from_numpy(np.concatenate([[0], np.cumsum(self.plan.kind == GraphKind.GUIDED)]))[rows]
        guided = guided if lift.moves_x0 else guided * (lam != 0)
        return rows + guided * (lift.nfe - 1), guided * lift.n_vjp

    def _measure(self, state: SlotState) -> tuple[Tensor, Tensor]:
        """(activation, drive) of the finished pictures, a bucket a call."""
        parts: list[tuple[Tensor, Tensor]] = []
        for at in range(0, len(state.x), self.config.bucket):
            part = slice(at, at + self.config.bucket)
            readout = None if state.readout is None else state.readout[part]
            parts.append(self.programme.step.measure(state.x[part], readout))
        activation, drive = (torch.cat(each) for each in zip(*parts, strict=True))
        return activation, drive

    def evidence(self, log_z: ArrayLike, phi: ArrayLike, ess: ArrayLike) -> dict[str, Any]:
        """log_z, kl and ess as the particles of many samples give them, for a manifest; {} where lambda differs between them."""
        found = None if isinstance(self.lam, dict) else combine(log_z, phi, ess, self.lam)
        if found is None:
            return {}
        values = {"log_z": found.log_z, "kl": found.kl, "ess": found.ess}
        sourced = {name: {"value": value, "source": "smc"} for name, value in values.items()}
        return sourced | {"log_z": sourced["log_z"] | {"se": found.log_z_se}, "phi_mean": found.phi_mean}

    def with_evidence(self, samples: Samples) -> tuple[Samples, dict[str, Any]]:
        """`samples` of this run with what their particles say together, and the same for the manifest."""
        if samples.group_log_z is None or samples.group_phi is None or samples.group_ess is None:
            return samples, {}
        facts = self.evidence(samples.group_log_z, samples.group_phi, samples.group_ess)
        return replace(samples, **{name: facts[name]["value"] for name in ("log_z", "kl", "ess") if facts}), facts

    def describe(self) -> dict[str, Any]:
        """The part of a manifest that is known before a picture is drawn."""
        sourced = {
            name: {"value": getattr(self.estimate, name) if self.estimate else None, "source": self.source}
            for name in ("log_z", "kl", "ess")
        }
        return {
            "command": "sample",
            "identity": self.identity,
            "prior": self.prior.identity,
            "feature": self.feature.name,
            "feature_identity": self.feature.identity,
            "config": self.config.to_json(),
            "bucket": self.config.bucket,
            "rows": self.plan.num_rows,
            "lam": list(self.lam.values()) if isinstance(self.lam, dict) else self.lam,
            "ascent": None if self.ascent is None else self.ascent.to_json(),
            **sourced,
            "runner": self.programme.step.name,
            "runner_choice": None if self.choice is None else self.choice.to_json(),
            "memory": None if self.memory is None else asdict(self.memory),
            "parity": None if self.gated is None else {"errors": self.gated.parity, "failure": self.gated.failure},
            "kernels": self.programme.kernels,
            "device": str(self.programme.device),
            **self.what_ran(),
        }

    def what_ran(self) -> dict[str, Any]:
        """For a manifest, of all draws so far, calibration included. kernel_calls: {operation: {implementation: calls}}; graphs:
        by which graphs or eager steps, None without graphs."""
        found: dict[str, dict[str, int]] = {}
        for (operation, implementation), calls in sorted(self.calls.items()):
            found.setdefault(operation, {})[implementation] = calls
        return {"kernel_calls": found, "graphs": None if self.graphed is None else self.graphed.report()}


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


def prepare(prior: Prior, feature: Feature, config: SampleConfig, *, gated: Gated | None = None) -> Run:
    """Check the request against prior and feature, fill the plan, find lambda. Raises as sample() does.

    gated: what runs this prior and feature, from who has it already; neither network is tried then.
    """
    config = config.resolved()
    if config.lam is None and config.target_activation is None:
        raise ConfigError(
            "lam and target_activation: got neither; give the tilt's lambda, or the mean activation wanted"
        )
    dtype = DTYPES[config.dtype]
    device, kernels = device_and_kernels(config)
    prior, feature = prior.to(dtype, device), feature.to(dtype, device)
    choice = None
    if gated is None:
        check_denoise(prior, dtype, guided=config.lam != 0)
        check_activation(feature, prior.shape, dtype)
        if config.runner == AUTO and device.type == "cpu":
            choice, gated = choose(prior, feature, dtype, bucket=config.bucket, kernels=kernels)
        elif config.runner == AUTO:
            raise ConfigError(f"runner auto: it has no candidates on {device.type} but torch; give --runner torch")
        else:
            gated = step_for(
                config.runner,
                prior,
                feature,
                dtype,
                allow_parity_failure=config.allow_parity_failure,
                kernels=kernels,
            )
    if config.runner == AUTO:
        # What runs is what the run is called by: another runner's pictures differ in their last bits.
        config = replace(config, runner=gated.step.name)
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
    """The device and the kernels asked for. Raises RunnerError where there is none, or where the kernels cannot run on it."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunnerError(f"device: got cuda, but torch {torch.__version__} sees no CUDA device; use device cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
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


def _memory_plan(prior: Prior, feature: Feature, config: SampleConfig, gated: Gated) -> MemoryPlan | None:
    """Raises RunnerError, with numbers, for a bucket whose gradient would not fit."""
    if config.device != "cpu" or gated.step.name != REFERENCE or prior.network is None or feature.trunk is None:
        return None
    if config.lam == 0:
        return None
    available = available_mib()
    return plan_memory(
        prior, feature, DTYPES[config.dtype], bucket=config.bucket, chunk=config.vjp_chunk, available=available
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


def failures(samples: Samples, plan: Plan) -> list[dict[str, Any]]:
    """Samples that became non-finite or were stopped, with the row and sigma of their last good state."""
    sigma = np.append(plan.column("sigma"), 0.0)
    rows = (samples.nfe // (1 if samples.weights is None else samples.weights.shape[1])).tolist()
    return [
        {"index": int(samples.index[at]), "row": rows[at], "sigma": float(sigma[rows[at]])}
        for at in torch.nonzero(~samples.ok).flatten().tolist()
    ]


def check_any_finite(samples: Samples, plan: Plan) -> None:
    """Raises NonFiniteError where every sample failed, and none was merely stopped."""
    if not samples.ok.any() and not samples.stopped:
        first = failures(samples, plan)[0]
        raise NonFiniteError(
            f"every sample became non-finite; the first, index {first['index']}, at row {first['row']} "
            f"(sigma {first['sigma']:.4f}); lower lam or take more steps"
        )
