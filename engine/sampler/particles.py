"""The correction that converges: twisted sequential Monte Carlo over the particles of each sample.

A sample is a group of P slots. Guidance is their proposal; what plug-in guidance gets wrong is put right by weights:

    twist          psi_k(x) = exp(h_k(x)), the lift's (lifts.py)                of the state before row k
    start          log w = log psi_0(x_T)                                     without it log Z is biased
    row k          log w += log psi_{k+1}(x') - log psi_k(x) - <z, delta>/c - |delta|^2/(2 c^2)
    last row       unguided, log w += lam phi(a(x0)) - log psi(x)
    resampling     systematic, in a group whose ESS falls below P/2; its mean weight is banked:  log Z-hat += log mean w

-<z, delta>/c - |delta|^2/(2c^2) is log p(x'|x) - log q(x'|x) for x' = mean + delta + c z under the unguided row N(mean, c^2).
As P grows the weighted particles converge to the tilt of the *discretised* prior, and Z-hat is unbiased at every P (log Z-hat is
not). A plan whose rows are all unguided gives Feynman-Kac steering: the same correction without gradients.
Source: Wu et al. 2023 (twisted diffusion sampler), Singhal et al. 2025 (FK steering). Proof: tests/sampler/test_particles.py.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.lifts import Lift
from tiltscope.engine.sampler.noise import STREAM_RESAMPLING
from tiltscope.engine.sampler.plan import GraphKind, Plan
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.engine.sampler.state import Programme, Sight, SlotState, slots_of
from tiltscope.kernels.dispatch import resample
from tiltscope.kernels.philox import uniform

# Resample where fewer than half of the particles carry a group.
ESS_SHARE = 0.5


def proposal_plan(plan: Plan, lift: Lift) -> Plan:
    """The plan with its last row unguided, as the correction needs it.

    Raises ConfigError where another row is free of noise, or guides the history, or the lift moves D: the weights have no
    density there.
    """
    if lift.moves_x0:
        raise ConfigError("particles: the lift daps replaces the denoiser's answer, which has no density; use lift dps")
    if plan.log_variance is not None:
        raise ConfigError(
            "particles: solver ddpm_learned_range adds a noise of its own to every pixel, which the weights do not know; use ddpm"
        )
    noise, history = plan.column("c"), plan.column("f")
    guided = plan.kind != GraphKind.UNGUIDED
    if (noise[:-1] == 0).any():
        raise ConfigError(
            f"particles: row {int((noise[:-1] == 0).argmax())} of this solver adds no noise, and weights need noise in every "
            "row; use a stochastic solver, such as ddpm or ddim(eta=0.5)"
        )
    if (history[guided] != 0).any():
        raise ConfigError("particles: this solver guides its history, which has no density; leave guided_history at 0")
    table, kind = plan.table.copy(), plan.kind.copy()
    table[-1, [COLUMNS.index("e"), COLUMNS.index("f")]] = 0.0
    kind[-1] = GraphKind.UNGUIDED
    return replace(plan, table=table, kind=kind)


def weigh(state: SlotState, sight: Sight, programme: Programme) -> tuple[SlotState, Sight]:
    """The weights take in the twist of where each slot now is; groups that need it are resampled, with all they saw."""
    log_twist = sight.log_twist
    log_weight = state.log_weight + log_twist - state.log_twist
    dead = ~state.ok | ~torch.isfinite(log_twist)
    active = state.row < programme.num_rows[state.plan]
    log_weight = torch.where(active, torch.where(dead, -torch.inf, log_weight), state.log_weight)
    log_twist = torch.where(active & ~dead, log_twist, state.log_twist)
    return _resampled(replace(state, log_weight=log_weight, log_twist=log_twist), sight, programme)


def reweigh_after_move(state: SlotState, z_dot_delta: Tensor, delta_norm_sq: Tensor, noise: Tensor) -> SlotState:
    """log p(x'|x) - log q(x'|x) of the move just made; 0 where nothing pushed, -inf for a slot that failed in it."""
    pushed = delta_norm_sq > 0
    safe = torch.where(pushed, noise, 1.0)
    ratio = -z_dot_delta / safe - delta_norm_sq / (2 * safe * safe)
    log_weight = state.log_weight + torch.where(pushed, ratio, 0.0)
    return replace(state, log_weight=torch.where(state.ok, log_weight, -torch.inf))


@dataclass(frozen=True)
class Settled:
    """The groups' end: normalised weights, what each says of Z and of E_q[phi], and the slot that stands for it.

    chosen: one slot of each group, drawn by weight. log_z: log Z-hat, -inf where every particle failed. phi: sum_i w_i phi_i.
    ess: 1 / sum W^2 over the starts that particles descend from, W the weight of a start's descendants: resampling evens out the
    last weights however badly a group did, but not how few starts are left. lineages: those whose descendants weigh anything.
    """

    weight: Float[Tensor, "group particle"]
    log_z: Float[Tensor, "group"]
    phi: Float[Tensor, "group"]
    ess: Float[Tensor, "group"]
    lineages: Int[Tensor, "group"]
    chosen: Int[Tensor, "group"]
    ok: Bool[Tensor, "group"]


def settle(state: SlotState, activation: Float[Tensor, "batch"], programme: Programme, num: int) -> Settled:
    """The first `num` groups after their last row; activation: of the finished pictures, one a slot."""
    each = programme.particles
    phi = slots_of(state, programme).phi(activation)
    final = state.log_weight + state.lam * phi - state.log_twist
    final = torch.where(state.ok & torch.isfinite(final), final, -torch.inf)

    def grouped(values: Tensor) -> Tensor:
        return values[: num * each].reshape(num, each)

    log_weight, first = grouped(final).double(), torch.arange(num, device=final.device) * each
    u = uniform(state.key, state.index, programme.num_rows[state.plan], stream=STREAM_RESAMPLING, dtype=torch.float64)
    log_mean = resample(log_weight, u[first], implementation=programme.kernels).log_mean
    alive = torch.isfinite(log_mean)
    weight = torch.where(alive[:, None], torch.softmax(log_weight, 1), 1 / each)
    # One draw by weight: the first place of the running sum that reaches u.
    chosen = torch.searchsorted(weight.cumsum(1), u[first, None].clamp(max=1 - 1e-12))[:, 0].clamp(max=each - 1)
    counted = torch.where(weight > 0, grouped(phi).double(), 0.0)
    carries = (weight * each > 1e-3).long()
    start = grouped(state.lineage)
    starts = torch.zeros_like(carries).scatter_reduce(1, start, carries, "amax")
    by_start = torch.zeros_like(weight).scatter_add(1, start, weight)
    return Settled(
        weight=weight,
        log_z=grouped(state.log_z)[:, 0].double() + log_mean,
        phi=(weight * counted).sum(1),
        ess=1 / (by_start * by_start).sum(1),
        lineages=starts.sum(1),
        chosen=first + chosen,
        ok=alive,
    )


def _resampled(state: SlotState, sight: Sight, programme: Programme) -> tuple[SlotState, Sight]:
    each = programme.particles
    num, place = len(state.row) // each, state.row.device
    used = num * each  # what is left over is padding
    left = len(state.row) - used

    log_weight = state.log_weight[:used].reshape(num, each)
    first = torch.arange(num, device=place) * each
    u = uniform(state.key, state.index, state.row, stream=STREAM_RESAMPLING, dtype=torch.float64)[first]
    found = resample(log_weight, u, ESS_SHARE, implementation=programme.kernels)
    rest = torch.arange(used, used + left, device=place)
    # One value a group, for each of its particles.
    due, banked = (each_of[:, None].expand(num, each).flatten() for each_of in (found.due, found.log_mean))
    ancestor = torch.cat([(found.ancestor + first[:, None]).flatten(), rest])
    due, banked = torch.cat([due, due.new_zeros(left)]), torch.cat([banked, banked.new_zeros(left)])
    after = replace(
        state,
        x=state.x[ancestor],
        history=state.history[ancestor],
        row=state.row[ancestor],
        ok=state.ok[ancestor],
        log_twist=state.log_twist[ancestor],
        lineage=state.lineage[ancestor],
        log_weight=torch.where(due, 0.0, state.log_weight),
        log_z=torch.where(due, state.log_z + banked, state.log_z),
    )
    return after, sight.of(ancestor)
