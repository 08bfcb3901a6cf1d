"""The rivals that pick from a pool of natural pictures: top-K and hard truncation, and what they cost in KL.

    top-K             q = uniform on the K strongest                       KL(q || p) = log(N/K)
    hard truncation   q = p given a >= threshold, on the pool               KL(q || p) = log(N/M), M pictures above it

p is the pool's own empirical distribution, so these numbers are exact. Numpy only; knows indices and activations, never
pictures. Source: method section 1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.noise import STREAM_POOL, philox, seed_key
from tiltscope.engine.tilt.log_tilt import LogTilt, parse_log_tilt

MIN_MEMBERS = 5


@dataclass(frozen=True)
class HardSet:
    """The pool pictures with a >= threshold (`members`, strongest first), their mean activation, and those drawn."""

    threshold: float
    members: Int64[ndarray, "members"]
    chosen: Int64[ndarray, "chosen"]
    mean: float


def top_k(activations: Float64[ndarray, "pool"], num: int) -> Int64[ndarray, "chosen"]:
    """Pool indices of the `num` largest activations, strongest first, the smaller index first at ties; all if num > N."""
    return np.argsort(-activations, kind="stable")[:num]


def hard_truncation(activations: Float64[ndarray, "pool"], target: float, num: int, *, seed: int) -> HardSet:
    """`num` pictures drawn without replacement from those with a >= threshold (fewer where fewer are above it).

    The threshold is the pool activation whose mean above it is nearest `target`, with at least 5 pictures above it; the
    higher one where two are as near; the whole pool, which truncates nothing, only where ties leave no other. Draws follow
    the seed's own order of the members: the first 4 of 8 are the 4 of num=4.
    Raises ConfigError for a pool of fewer than 5 pictures.
    """
    if len(activations) < MIN_MEMBERS:
        raise ConfigError(f"the pool holds {len(activations)} pictures; hard truncation needs at least {MIN_MEMBERS}")
    order = top_k(activations, len(activations))
    ranked = activations[order]
    # A threshold takes all of its ties: sets end where the next activation is smaller.
    sizes = np.append(np.flatnonzero(ranked[1:] < ranked[:-1]) + 1, len(ranked))
    sizes = sizes[sizes >= MIN_MEMBERS]
    # The whole pool is no truncation: it is left only where no threshold takes less of it.
    sizes = sizes[:-1] if len(sizes) > 1 else sizes
    means = np.cumsum(ranked)[sizes - 1] / sizes
    nearest = int(np.argmin(np.abs(means - target)))
    members = order[: sizes[nearest]]
    low, high = philox((0, 0, STREAM_POOL, members.astype(np.uint64)), seed_key(seed))[:2].astype(np.uint64)
    chosen = members[np.argsort(high << np.uint64(32) | low, kind="stable")[:num]]
    return HardSet(float(ranked[sizes[nearest] - 1]), members, chosen, float(means[nearest]))


def kl_from_pool(weights: Float64[ndarray, "pool"]) -> float:
    """KL(q || p) = sum_i w_i log(N w_i) in nats, of pool weights that sum to 1 against the uniform pool."""
    carried = weights[weights > 0]
    return float(carried @ np.log(len(weights) * carried))


def excess_kl(kl: float, mean_phi: float, *, lam: float, log_z: float) -> float:
    """KL(q || q_S) = KL(q || p) - lam E_q[phi] + log Z in nats: how far q is from the tilt at lam, for any q on the pool.

    Where q has the tilt's own mean this is KL(q || p) - KL(q_S || p), the Pythagorean identity: what a method pays beyond
    the least it had to. Proof: tests/tilt/test_pool_rivals.py, to 1e-9 for random q.
    """
    return max(kl - lam * mean_phi + log_z, 0.0)


def excess_kl_of_set(
    activations: Float64[ndarray, "pool"],
    members: Int64[ndarray, "members"],
    *,
    lam: float,
    log_z: float,
    log_tilt: str | LogTilt = "linear",
) -> float:
    """`excess_kl` of the uniform distribution on `members` of the pool."""
    mean_phi = float(np.asarray(parse_log_tilt(log_tilt).phi(activations[members])).mean())
    return excess_kl(float(np.log(len(activations) / len(members))), mean_phi, lam=lam, log_z=log_z)
