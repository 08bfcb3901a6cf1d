"""A request that is ready to be drawn from: `Run.draw` yields finished samples bucket by bucket.

So a million of them stream through flat memory. prepare.py makes a Run of a request; sample.py draws all of one.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import NonFiniteError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import CPU, Prior
from tiltscope.engine.runtime.auto import Choice
from tiltscope.engine.runtime.memory import MemoryPlan
from tiltscope.engine.runtime.runners import Gated
from tiltscope.engine.runtime.threads import one_thread
from tiltscope.engine.sampler.particles import settle
from tiltscope.engine.sampler.plan import GraphKind, Plan
from tiltscope.engine.sampler.replay import GraphedTicks
from tiltscope.engine.sampler.state import Observation, Programme, SlotState, admit
from tiltscope.engine.sampler.tick import tick
from tiltscope.engine.samples import Samples, Target
from tiltscope.engine.tilt.ascent import Ascent
from tiltscope.engine.tilt.calibrate import Calibration
from tiltscope.engine.tilt.evidence import combine
from tiltscope.kernels.implementation import Calls, count_calls


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

    def collect(
        self, state: SlotState, num: int, *, finished: bool, measured: tuple[Tensor, Tensor] | None = None
    ) -> Samples:
        """The first `num` samples of slots that have done their rows; the rest of the slots is padding.

        measured: what `measure` said of these slots, where it was asked already.
        """
        # The first and only time the host asks the device: the rows are done.
        activation, drive = (each.cpu() for each in measured or measure(state, self.programme))
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


def measure(state: SlotState, programme: Programme) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """(activation, drive) of the finished pictures, a bucket a call."""
    parts: list[tuple[Tensor, Tensor]] = []
    bucket = programme.bucket or len(state.x)
    with one_thread(when=programme.step.has_own_threads):
        for at in range(0, len(state.x), bucket):
            part = slice(at, at + bucket)
            readout = None if state.readout is None else state.readout[part]
            parts.append(programme.step.measure(state.x[part], readout))
    activation, drive = (torch.cat(each) for each in zip(*parts, strict=True))
    return activation, drive


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
