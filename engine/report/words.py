"""What the page says in words: the answers, the metrics with their units, and why a number is not there.

Sentences and number formats only; knows no markup. Text that comes from files passes through unchanged and is escaped where it
is shown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

MISSING = "–"
_MINUS = "−"


@dataclass(frozen=True)
class AnswerWords:
    """title; short: where space is tight; is_: what the answer is; bias: what it leans towards."""

    title: str
    short: str
    is_: str
    bias: str


ANSWERS: Mapping[str, AnswerWords] = {
    "tilt": AnswerWords(
        "KL-minimal tilt",
        "tilt",
        "Draws from the natural-picture prior, reweighted just enough for the wanted mean activation.",
        "Leans towards what the prior draws well; the guidance only approximates the reweighting.",
    ),
    "topk": AnswerWords(
        "Top-K retrieval",
        "top-K",
        "The pictures of the pool that fire most.",
        "Leans towards the extreme, and towards what happens to be in the pool.",
    ),
    "hard": AnswerWords(
        "Hard truncation",
        "hard",
        "Pool pictures drawn at random above a threshold, set so that their mean comes nearest to the tilt’s.",
        "Leans towards the pool, and cuts off everything just below the threshold.",
    ),
    "actmax": AnswerWords(
        "Activation maximisation",
        "act. max.",
        "Pictures optimised from noise until their mean activation is the tilt’s.",
        "Leans towards whatever drives the network, natural or not.",
    ),
}


@dataclass(frozen=True)
class MetricWords:
    """label; unit: shown small beside it; digits: after the point; error: the metric that is its standard error."""

    label: str
    unit: str
    digits: int
    error: str | None = None


METRIC_ROWS: Mapping[str, MetricWords] = {
    "activation_mean": MetricWords("Mean activation", "± standard error", 2, "activation_se"),
    "drive_mean": MetricWords("Mean drive", "activation before its threshold", 2),
    "z": MetricWords("z-score", "natural standard deviations", 2),
    "percentile": MetricWords("Percentile", "% of natural pictures below", 1),
    "selectivity_rank": MetricWords("Selectivity rank", "1: no other latent fires more", 0),
    "naturalness": MetricWords("Naturalness", "sd; 0: as a real picture", 2, "naturalness_se"),
    "nearest_distance": MetricWords("Nearest natural picture", "embedding distance, 0 to 2", 3),
    "diversity": MetricWords("Diversity", "mean embedding distance, 0 to 2", 3),
    "kl": MetricWords("KL from natural", "nats", 2),
    "log_z": MetricWords("log Z", "nats", 2),
    "ess": MetricWords("Effective sample size", "natural pictures", 1),
    "excess_kl": MetricWords("Excess KL over the tilt", "nats", 2),
    "seconds": MetricWords("Time", "s, all pictures", 1),
    "nfe": MetricWords("Denoiser calls", "a picture", 0),
    "n_vjp": MetricWords("Gradients", "a picture", 0),
}

# Columns of a comparison, in this order.
COMPARED: Mapping[str, MetricWords] = {
    "lam": MetricWords("Lambda", "or scale", 3),
    "activation_mean": MetricWords("Mean activation", "± standard error", 2, "activation_se"),
    "naturalness": MetricWords("Naturalness", "sd", 2, "naturalness_se"),
    "diversity": MetricWords("Diversity", "distance", 3),
    "vendi": MetricWords("Vendi score", "unlike pictures", 1),
    "kl": MetricWords("KL", "nats", 2),
    "excess_kl": MetricWords("Excess KL", "nats", 2),
    "bits_per_dim": MetricWords("Bits/dim", "under the prior", 2),
    "robustness_jpeg": MetricWords("JPEG", "share left", 2),
    "robustness_resize": MetricWords("Resize", "share left", 2),
    "robustness_noise": MetricWords("Noise", "share left", 2),
    "nfe": MetricWords("Denoiser calls", "a picture", 0),
    "n_vjp": MetricWords("Gradients", "a picture", 0),
    "seconds": MetricWords("Time", "s a picture", 2),
}

_NO_EVALUATOR = "the bundle has no network that could judge the pictures independently"
_NO_DENSITY = "optimised pictures are single points: they have no density against natural pictures"
_LOOKED_UP = "looked up in the pool, which costs next to nothing"
_REASONS: Mapping[str, Mapping[str, str]] = {
    "activation_se": {"": "one picture has no standard error"},
    "naturalness": {"": _NO_EVALUATOR},
    "naturalness_se": {"": "one picture has no standard error"},
    "nearest_distance": {"": _NO_EVALUATOR},
    "diversity": {"": "needs two pictures and an independent network"},
    "selectivity_rank": {"": "no autoencoder whose latents could be compared at this hook"},
    "kl": {"actmax": _NO_DENSITY, "": "not known where lambda was given and there are no natural activations"},
    "log_z": {
        "topk": "log Z belongs to the tilt",
        "hard": "log Z belongs to the tilt",
        "actmax": "log Z belongs to the tilt",
        "": "not known where there are no natural activations",
    },
    "ess": {"actmax": _NO_DENSITY, "": "not known where there are no natural activations"},
    "excess_kl": {
        "tilt": "the tilt is what the others are compared with",
        "actmax": _NO_DENSITY,
        "": "not defined for this answer",
    },
    "seconds": {"topk": _LOOKED_UP, "hard": _LOOKED_UP},
}


def missing_reason(metric: str, answer: str) -> str:
    """Why a metric of an answer is null, as a clause without a full stop."""
    reasons = _REASONS.get(metric, {})
    return reasons.get(answer) or reasons.get("") or "no picture of this answer is finite, or it was not measured"


def sentence(text: str) -> str:
    """A clause as a sentence: a capital first (the rest untouched, unlike str.capitalize), a full stop last."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) or not text else ".")


def number(value: float | None, digits: int = 2) -> str:
    """A number as the page shows it: a true minus sign, thousands apart, an en dash where there is none.

    A value that would round to zero keeps two significant digits.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value != 0 and abs(value) <= 0.5 * 10**-digits:
        text = f"{value:.1e}" if abs(value) < 1e-4 else f"{value:.2g}"
    else:
        text = f"{value:,.{digits}f}"
    return text.replace("-", _MINUS)


def percent(share: float) -> str:
    """A share in [0, 1] as percent, with digits enough to be told from 0 and from 100."""
    edge = min(share, 1 - share)
    digits = 1 if edge >= 0.005 or edge <= 0 else min(6, 1 - math.floor(math.log10(100 * edge)))
    return f"{number(100 * share, digits)} %"


def pictures_for(nats: float) -> str:
    """exp(nats) natural pictures, to two digits: "about 71 natural pictures"."""
    if nats > math.log(1e6):
        return f"about 10^{nats / math.log(10):.1f} natural pictures"
    num = int(float(f"{math.exp(max(nats, 0)):.2g}"))
    return f"about {num:,} natural picture{'s' if num > 1 else ''}"
