"""sample(): draw from p(x) exp(lam phi(a(x))) / Z by guided diffusion.

`prepare` turns a request into a Run (checked, calibrated, its plan filled); `Run.draw` yields finished samples bucket by
bucket, so a million of them stream through flat memory; `sample` collects them.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.choice import parse_choice
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import CalibrationError, ConfigError, NonFiniteError
from tiltscope.engine.feature.feature import Feature, check_activation
from tiltscope.engine.prior.prior import Prior, check_denoise
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.runtime.runners import step_for
from tiltscope.engine.sampler.noise import CALIBRATION_INDEX
from tiltscope.engine.sampler.plan import GraphKind, Plan, make_plan
from tiltscope.engine.sampler.state import Programme, SlotState, admit, tick
from tiltscope.engine.samples import Samples, join
from tiltscope.engine.tilt.calibrate import Calibration, calibrate, estimates
from tiltscope.engine.tilt.log_tilt import LOG_TILTS, LogTilt

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
    whose they are. estimate: KL, log Z and ESS at lam, None without `natural` or where lam differs between samples.
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
        while indices := list(islice(wanted, self.config.bucket)):
            yield self._draw_bucket(np.array(indices, np.int64), on_step)

    def _draw_bucket(self, indices: NDArray[np.int64], on_step: OnStep | None) -> Samples:
        num = len(indices)
        lam = np.array([self.lam[int(index)] if isinstance(self.lam, dict) else self.lam for index in indices])
        state = admit(
            self.programme,
            seed=self.config.seed,
            indices=indices,
            lam=lam,
            readout=self.feature.readout,
            bucket=self.config.bucket,
        )
        finished = True
        for row in range(self.plan.num_rows):
            state, seen = tick(state, self.programme)
            if on_step is None:
                continue
            sigma = float(self.plan.column("sigma")[row])
            told = Progress(row, self.plan.num_rows, sigma, tuple(indices), seen.activation[:num], seen.x0_hat[:num])
            if on_step(told) == "stop":
                finished = row + 1 == self.plan.num_rows
                break
        return self._collect(state, num, finished=finished)

    def _collect(self, state: SlotState, num: int, *, finished: bool) -> Samples:
        activation, drive = self.programme.step.measure(state.x, state.readout)
        # The first and only time the host asks the device: the rows are done.
        rows, lam = state.row[:num], state.lam[:num]
        guided = np.concatenate([[0], np.cumsum(self.plan.kind == GraphKind.GUIDED)])
        x0 = state.x[:num].to(torch.float32)
        tilted = bool((lam != 0).any())
        return Samples(
            feature=self.feature.name,
            x0=x0,
            images=self.prior.to_images(x0),
            activation=activation[:num].to(torch.float32),
            drive=drive[:num].to(torch.float32),
            lam=lam.to(torch.float32),
            seed=self.config.seed,
            index=state.index[:num],
            target="approximate" if tilted else "consistent",
            nfe=rows.clone(),
            n_vjp=torch.from_numpy(guided)[rows] * (lam != 0),
            ok=state.ok[:num] & finished,
            log_z=self.estimate.log_z if self.estimate else None,
            kl=self.estimate.kl if self.estimate else None,
            ess=self.estimate.ess if self.estimate else None,
        )

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
            **sourced,
            "runner": self.programme.step.name,
            "kernels": "reference",
        }


def sample(
    prior: Prior,
    feature: Feature,
    *,
    num: int = 8,
    lam: float | Sequence[float] | None = None,
    target_activation: float | None = None,
    log_tilt: Any = None,
    lift: str | None = None,
    solver: Any = None,
    steps: int | None = None,
    grid: Any = None,
    preset: str = "calibrated",
    particles: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    calibration_num: int = 256,
    runner: str = "torch",
    dtype: str = "float32",
    on_step: OnStep | None = None,
) -> Samples:
    """Draw `num` samples from q(x) = p(x) exp(lam phi(a(x))) / Z(lam).

    Exactly one of lam (a float, or num floats; 0 is the unguided prior bit for bit, negative suppresses) and
    target_activation c, which calibrates lam so that E_q[phi(a)] = c: on the pool where prior and feature come from one
    bundle, else on calibration_num unguided draws. (seed, index) addresses one picture: it is bitwise the same in whatever
    company it is drawn inside one batch_size; across batch sizes within 1e-3 (guided, float32, RMS over a picture).

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
        preset=preset,
        particles=particles,
        seed=seed,
        indices=indices,  # pyright: ignore[reportArgumentType]  likewise
        batch_size=batch_size,
        guidance_interval=guidance_interval,
        calibration_num=calibration_num,
        runner=runner,
        dtype=dtype,
    )
    run = prepare(prior, feature, config)
    started = time.perf_counter()
    samples = join(run.draw(on_step=on_step))
    check_any_finite(samples, run.plan)
    seconds = run.seconds | {"sampling": time.perf_counter() - started}
    facts = run.describe() | {"seconds": seconds, "failures": failures(samples, run.plan)}
    return replace(samples, manifest=complete(facts))


def prepare(prior: Prior, feature: Feature, config: SampleConfig) -> Run:
    """Check the request against prior and feature, fill the plan, find lambda. Raises as sample() does."""
    if config.lam is None and config.target_activation is None:
        raise ConfigError(
            "lam and target_activation: got neither; give the tilt's lambda, or the mean activation wanted"
        )
    config = config.resolved()
    dtype = DTYPES[config.dtype]
    prior, feature = prior.to(dtype), feature.to(dtype)
    check_denoise(prior, dtype, guided=config.lam != 0)
    check_activation(feature, prior.shape, dtype)
    plan = make_plan(
        config.solver,
        steps=config.steps or 0,
        grid=config.grid,
        levels=prior.levels,
        guidance_interval=config.guidance_interval,
    )
    log_tilt: LogTilt = parse_choice(config.log_tilt, LOG_TILTS, "log_tilt")
    programme = Programme(
        plans=(plan,),
        log_tilts=(log_tilt,),
        step=step_for(config.runner, prior, feature, dtype),
        shape=prior.shape,
        dtype=dtype,
    )
    started = time.perf_counter()
    natural, source = _natural_activations(prior, feature, config, programme)
    lam, estimate = _strength(config, natural, log_tilt)
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
    )


def _natural_activations(
    prior: Prior, feature: Feature, config: SampleConfig, programme: Programme
) -> tuple[NDArray[np.float64] | None, Literal["pool", "unguided draws"] | None]:
    if feature.pool is not None and feature.pool is prior.pool:
        return feature.pool.activations(feature), "pool"
    if config.target_activation is None:
        return None, None
    activations = unguided_activations(programme, feature, seed=config.seed, num=config.calibration_num)
    return activations, "unguided draws"


# One fixed batch shape, so that what calibration finds does not depend on the run's own batch size.
CALIBRATION_BATCH = 64


def unguided_draws(
    programme: Programme, *, seed: int, num: int, bucket: int = CALIBRATION_BATCH
) -> Float[Tensor, "num ..."]:
    """`num` samples of the prior under the programme's first plan, at indices 2^31 + i, apart from every user's own."""
    finished: list[Tensor] = []
    for at in range(0, num, bucket):
        indices = CALIBRATION_INDEX + np.arange(at, min(at + bucket, num))
        state = admit(programme, seed=seed, indices=indices, lam=np.zeros(len(indices)), readout=None, bucket=bucket)
        for _ in range(programme.plans[0].num_rows):
            state, _ = tick(state, programme)
        finished.append(state.x[: len(indices)][state.ok[: len(indices)]])
    draws = torch.cat(finished)
    if len(draws) == 0:
        raise NonFiniteError("none of the prior's unguided draws is finite; check the denoiser, or try more steps")
    return draws


def unguided_activations(
    programme: Programme, feature: Feature, *, seed: int, num: int, bucket: int = CALIBRATION_BATCH
) -> NDArray[np.float64]:
    """Activations of `unguided_draws`: float64, one for each draw that stayed finite."""
    batches: list[Tensor] = []
    for x0 in unguided_draws(programme, seed=seed, num=num, bucket=bucket).split(bucket):
        readout = None if feature.readout is None else feature.readout.expand(len(x0))
        batches.append(programme.step.measure(x0, readout)[0])
    return torch.cat(batches).double().numpy()


def _strength(
    config: SampleConfig, natural: NDArray[np.float64] | None, log_tilt: LogTilt
) -> tuple[float | dict[int, float], Calibration | None]:
    """lambda (one, or by index) and what the natural activations say of it."""
    if isinstance(config.lam, tuple):
        return dict(zip(config.all_indices, config.lam, strict=True)), None
    if natural is None or config.target_activation is None:  # lam was given: prepare refuses neither
        return _given_strength(config.lam or 0.0, natural, log_tilt)
    found = calibrate(natural, config.target_activation, log_tilt=log_tilt)
    if not found.feasible:
        raise CalibrationError(found.reason)
    return found.lam, found


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
    return [
        {"index": int(samples.index[at]), "row": int(samples.nfe[at]), "sigma": float(sigma[int(samples.nfe[at])])}
        for at in torch.nonzero(~samples.ok).flatten().tolist()
    ]


def check_any_finite(samples: Samples, plan: Plan) -> None:
    """Raises NonFiniteError where every sample failed with rows still to do."""
    if not samples.ok.any() and not torch.isfinite(samples.activation).any():
        first = failures(samples, plan)[0]
        raise NonFiniteError(
            f"every sample became non-finite; the first, index {first['index']}, at row {first['row']} "
            f"(sigma {first['sigma']:.4f}); lower lam or take more steps"
        )
