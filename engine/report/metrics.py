"""The numbers that stand beside every answer, one definition for all four.

    z                (mean a - natural mean) / natural sd              percentile   share of natural a below mean a, in percent
    naturalness      (mean d5 of held-out - d5) / sd of held-out d5    0: as a real picture, negative: less natural
    d5               distance to the 5th nearest held-out picture, of L2-normalised evaluator embeddings, itself excluded
    selectivity_rank 1 + how many latents of the hook have a larger mean z-score
    excess_kl        KL(q || q_S) of a pool rival's q                   tilt/pool_rivals.py

Distances are in embeddings of a network that did not guide. A number that does not exist is None, never 0. Knows samples,
pools and features by their interfaces; knows no solver and no page. Source: method section 7.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.samples import Samples
from tiltscope.engine.tilt.calibrate import Calibration
from tiltscope.engine.tilt.log_tilt import LogTilt
from tiltscope.engine.tilt.pool_rivals import excess_kl_of_set

METRICS = (
    "activation_mean",
    "activation_se",
    "drive_mean",
    "z",
    "percentile",
    "selectivity_rank",
    "naturalness",
    "naturalness_se",
    "nearest_distance",
    "diversity",
    "kl",
    "log_z",
    "ess",
    "excess_kl",
    "seconds",
    "nfe",
    "n_vjp",
)
POOL_ANSWERS = ("topk", "hard")
NEIGHBOUR = 5
EMBED_BATCH = 32
WARN_BEYOND_SE = 3.0


def measure(
    samples: Samples,
    *,
    answer: str,
    bundle: Bundle,
    feature: Feature,
    natural: Float64[ndarray, "pool"],
    log_tilt: LogTilt,
    tilt: Calibration | None,
    seconds: float | None,
    members: Int64[ndarray, "members"] | None = None,
) -> dict[str, float | None]:
    """Every name of METRICS for one answer; samples that are not ok are left out.

    answer: tilt, topk, hard or actmax. natural: the pool's activations. tilt: the calibrated tilt, on the pool; None beyond it.
    members: the pool pictures that a pool rival draws from (default: those shown), whose KL, ESS and excess KL it is given.
    activation_mean, drive_mean: units of a. kl, log_z, excess_kl: nats. ess: natural pictures. nfe, n_vjp: mean a sample.
    Standard errors are of the mean over the samples shown, with the finite-population factor for draws without replacement:
    top-K is all of its distribution, so its error is 0.
    """
    ok = samples.ok.numpy()
    activation = samples.activation.numpy().astype(np.float64)[ok]
    in_pool = samples.index.numpy()[ok] if answer in POOL_ANSWERS else None
    if in_pool is not None and members is None:
        members = in_pool
    shown_of = None if members is None else len(members)
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    values["seconds"] = seconds
    if len(activation) == 0:
        return values
    pictures = pictures_of(samples, answer, bundle)
    mean = float(activation.mean())
    values |= {
        "activation_mean": mean,
        "activation_se": _standard_error(activation, shown_of),
        "drive_mean": float(samples.drive.double()[samples.ok].mean()),
        "z": (mean - float(natural.mean())) / float(natural.std()),
        "percentile": percentile(natural, mean),
        "nfe": float(samples.nfe.double()[samples.ok].mean()),
        "n_vjp": float(samples.n_vjp.double()[samples.ok].mean()),
        "selectivity_rank": selectivity_rank(pictures, bundle, feature, natural, mean),
    }
    values |= _appearance(pictures, bundle, in_pool, shown_of)
    if answer == "tilt":
        # Particles say it of the sampler's own prior; the pool of natural pictures.
        told = tilt if samples.group_log_z is None else samples
        if told is not None:
            values |= {"kl": told.kl, "log_z": told.log_z, "ess": told.ess}
    elif members is not None:
        values |= {
            "kl": math.log(len(natural) / len(members)),
            "ess": float(len(members)),
        }
        if tilt is not None:
            values["excess_kl"] = excess_kl_of_set(natural, members, lam=tilt.lam, log_z=tilt.log_z, log_tilt=log_tilt)
    return values


def pictures_of(samples: Samples, answer: str, bundle: Bundle) -> Float[Tensor, "num 3 height width"]:
    """The samples that are ok, as pictures: what a sampler drew of latents is decoded; rivals are pictures anyway."""
    x0 = samples.x0[samples.ok]
    return bundle.prior.decode(x0) if answer == "tilt" and bundle.decoder is not None else x0


def percentile(natural: Float64[ndarray, "pool"], activation: float) -> float:
    """The share of natural activations below `activation`, in percent; ties count half."""
    return 100 * float((natural < activation).mean() + (natural == activation).mean() / 2)


def selectivity_rank(
    x0: Float[Tensor, "num channel height width"],
    bundle: Bundle,
    feature: Feature,
    natural: Float64[ndarray, "pool"],
    mean: float,
) -> float | None:
    """1 + the number of the hook's latents whose mean z-score over x0 exceeds the feature's; 1: nothing fires more.

    A latent's z-score is (pooled activation - its pool mean) / its pool sd; latents that never vary on the pool have none.
    The feature's own is taken the same way from `natural` and its mean activation. None for a feature of one's own, or where
    the bundle has no autoencoder at the feature's hook.
    """
    if feature.trunk is None:
        return None
    # A trunk whose tokens are brought to one length is called by another name than the hook.
    hook = feature.terms[0][1].hook if feature.terms else feature.trunk.hook
    if hook not in bundle.sae_hooks:
        return None
    pool_mean, pool_sd = bundle.pool.statistics(hook)
    parts = [bundle.latents(part, hook).double().numpy() for part in x0.split(EMBED_BATCH)]
    latents = np.concatenate(parts).mean(0)
    others = pool_sd > 0
    # The same latent, however pooled or scaled, is not its own rival.
    if len(feature.terms) == 1 and feature.terms[0][1].kind == "sae":
        others[int(feature.terms[0][1].index)] = False
    z = (latents[others] - pool_mean[others]) / pool_sd[others]
    return 1.0 + float((z > (mean - natural.mean()) / natural.std()).sum())


@dataclass(frozen=True)
class Neighbour:
    """Of each picture: pool index of the nearest natural picture (itself excluded) and the embedding distance to it."""

    index: Int64[ndarray, "num"]
    distance: Float64[ndarray, "num"]


def nearest_natural(
    embeddings: Float[ndarray, "num size"],
    pool: Float[ndarray, "pool size"],
    *,
    in_pool: Int64[ndarray, "num"] | None = None,
) -> Neighbour:
    """The nearest pool picture of each embedding; in_pool: where these are pool pictures, their own indices, excluded."""
    distance = _distances(embeddings, pool)
    if in_pool is not None:
        distance[np.arange(len(distance)), in_pool] = np.inf
    index = distance.argmin(1)
    return Neighbour(index, distance[np.arange(len(distance)), index])


def d5(
    embeddings: Float[ndarray, "num size"],
    heldout: Float[ndarray, "heldout size"],
    *,
    in_heldout: Int64[ndarray, "num"] | None = None,
) -> Float64[ndarray, "num"]:
    """Distance to the 5th nearest held-out picture; in_heldout: each one's own place among them (-1: none), excluded.

    Embeddings are L2-normalised, so distances lie in [0, 2].
    """
    distance = _distances(embeddings, heldout)
    if in_heldout is not None:
        own = np.flatnonzero(in_heldout >= 0)
        distance[own, in_heldout[own]] = np.inf
    return np.partition(distance, NEIGHBOUR - 1, axis=1)[:, NEIGHBOUR - 1]


def naturalness(
    embeddings: Float[ndarray, "num size"],
    heldout: Float[ndarray, "heldout size"],
    *,
    in_heldout: Int64[ndarray, "num"] | None = None,
) -> Float64[ndarray, "num"]:
    """(mean d5 of the held-out - d5) / sd of the held-out d5, for each picture; needs more than 5 held-out pictures."""
    reference = d5(heldout, heldout, in_heldout=np.arange(len(heldout)))
    return (reference.mean() - d5(embeddings, heldout, in_heldout=in_heldout)) / reference.std(ddof=1)


def diversity(embeddings: Float[ndarray, "num size"]) -> float | None:
    """Mean distance over the pairs of pictures; None for fewer than two."""
    num = len(embeddings)
    return float(_distances(embeddings, embeddings).sum() / (num * (num - 1))) if num > 1 else None


def vendi_score(embeddings: Float[ndarray, "num size"]) -> float | None:
    """exp of the entropy of the eigenvalues of K/num, K the cosine similarities: how many unlike pictures these are, 1 to num.

    Rows are L2-normalised. None for no picture. Source: Friedman and Dieng 2023, definition 3.1.
    """
    num = len(embeddings)
    if num == 0:
        return None
    rows = np.asarray(embeddings, np.float64)
    values = np.linalg.eigvalsh(rows @ rows.T / num)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def standard_error(drawn: NDArray[np.float64], natural: NDArray[np.float64]) -> float:
    """Of the mean of `drawn`, were it drawn from what `natural` is: by the larger of both standard deviations.

    Of a feature that fires on one picture in fifty, 32 draws are often all 0: their own deviation says that this is certain.
    """
    return float(max(drawn.std(ddof=1), natural.std(ddof=1)) / len(drawn) ** 0.5)


def prior_warning(natural_mean: float, prior_mean: float, prior_mean_se: float) -> str | None:
    """What to tell a reader where unguided draws' mean activation is more than 3 standard errors from the pool's."""
    away = abs(prior_mean - natural_mean)
    if away <= WARN_BEYOND_SE * prior_mean_se:
        return None
    apart = f"{away / prior_mean_se:.1f} standard errors" if prior_mean_se > 0 else "away"
    return (
        f"the unguided prior's mean activation, {prior_mean:.4g} ± {prior_mean_se:.2g}, is {apart} from the natural "
        f"pictures' {natural_mean:.4g}: lambda, KL, log Z and ESS are of the natural pictures, not of the distribution that "
        "the sampler tilts"
    )


def ess_in_words(ess: float) -> str:
    """ESS as a sentence, to two digits: "about 12 natural pictures carry this target"."""
    num = round(ess) if ess < 100 else int(float(f"{ess:.2g}"))
    return f"about {max(num, 1):,} natural picture{'s carry' if num > 1 else ' carries'} this target"


def _appearance(
    x0: Tensor, bundle: Bundle, in_pool: NDArray[np.int64] | None, shown_of: int | None
) -> dict[str, float | None]:
    """What needs the evaluator; nothing where the bundle has none."""
    if bundle.meta.get("evaluator") is None:
        return {}
    pool = _unit(bundle.pool.embeddings())
    # A pool picture's embedding is stored: the evaluator need not see it again.
    embeddings = embed(bundle, x0) if in_pool is None else pool[in_pool]
    values: dict[str, float | None] = {
        "nearest_distance": float(nearest_natural(embeddings, pool, in_pool=in_pool).distance.mean()),
        "diversity": diversity(embeddings),
    }
    heldout = np.flatnonzero(bundle.pool.heldout)
    if len(heldout) <= NEIGHBOUR:
        return values
    place = np.full(len(pool), -1)
    place[heldout] = np.arange(len(heldout))
    scores = naturalness(embeddings, pool[heldout], in_heldout=None if in_pool is None else place[in_pool])
    return values | {"naturalness": float(scores.mean()), "naturalness_se": _standard_error(scores, shown_of)}


def embed(bundle: Bundle, x0: Tensor) -> NDArray[np.float64]:
    """The evaluator's embeddings of pictures, L2-normalised in float64."""
    return _unit(bundle.evaluator().embed(x0, batch_size=EMBED_BATCH).numpy())


def _unit(embeddings: Any) -> NDArray[np.float64]:
    """L2-normalised again in float64: storage in float16 leaves lengths off by 1e-3."""
    rows = np.asarray(embeddings, np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _distances(rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float64]:
    """Euclidean, [rows, columns]. Through the Gram matrix: a difference of 1,280 numbers a pair would be 10 GB for a pool."""
    rows, columns = rows.astype(np.float64), columns.astype(np.float64)
    squares = (rows**2).sum(1)[:, None] + (columns**2).sum(1)[None, :] - 2 * rows @ columns.T
    return np.sqrt(np.maximum(squares, 0))


def _standard_error(values: NDArray[np.float64], population: int | None) -> float | None:
    """Of the mean; None for one value of an unbounded population."""
    if population is not None and population <= len(values):
        return 0.0
    if len(values) < 2:
        return None
    finite_population = 1 - len(values) / population if population is not None else 1.0
    return float(values.std(ddof=1) * math.sqrt(finite_population / len(values)))
