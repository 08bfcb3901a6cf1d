"""The paper's claim on a bundle: at one mean activation, is the tilt more natural than activation maximisation?

The features are fixed by rule before anything is looked at: every 20th of the selectivity ranking. For each, lambda is raised on
the sampler itself until the tilt's mean activation is the default target's (the largest mean that 10 effective natural
pictures carry): the pool's lambda falls short where sampler and pool are different p. The rivals are then held to what the
tilt reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tiltscope
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.samples import Explanation
from tiltscope.engine.tilt.calibrate import default_target

NUM_FEATURES, EVERY = 10, 20
MATCHED = 0.05
MAX_DRAWS = 6
MAX_GROWTH = 4.0


def chosen_features(bundle: Bundle) -> list[str]:
    """Ranks 1, 21, 41, ... of the live latents, by falling selectivity."""
    live = [f for f in bundle.features() if f.alive and ":sae:" in f.feature]
    ranked = sorted(live, key=lambda f: (-f.selectivity, f.feature))
    return [f.feature for f in ranked[: NUM_FEATURES * EVERY : EVERY]]


def raise_lambda(mean_at: Callable[[float], float], *, lam: float, target: float) -> float:
    """The lambda, of at most MAX_DRAWS tried, whose mean comes nearest to the target.

    A straight line through the last two (log lambda, mean) points says where to try next, by at most a factor of MAX_GROWTH at
    a time; ends within 2 % of the target.
    """
    tried: list[tuple[float, float]] = []
    for _ in range(MAX_DRAWS):
        tried.append((lam, mean_at(lam)))
        if abs(tried[-1][1] - target) <= 0.02 * abs(target):
            break
        (l1, m1), (l0, m0) = tried[-1], tried[-2] if len(tried) > 1 else (tried[-1][0] / MAX_GROWTH, -np.inf)
        slope = (m1 - m0) / np.log(l1 / l0)
        step = (target - m1) / slope if np.isfinite(slope) and slope > 0 else np.sign(target - m1) * np.log(MAX_GROWTH)
        lam = l1 * float(np.exp(np.clip(step, -np.log(MAX_GROWTH), np.log(MAX_GROWTH))))
    return min(tried, key=lambda pair: abs(pair[1] - target))[0]


def explain_at_target(bundle: Bundle, address: str, *, num: int) -> tuple[Explanation, float, float]:
    """(four answers at the activation that the tilt reached, the target, the pool's 99th percentile)."""
    feature = bundle.feature(address)
    natural = bundle.pool.activations(feature)
    chosen = default_target(natural)

    def mean_at(lam: float) -> float:
        return float(tiltscope.sample(bundle.prior, feature, num=num, lam=lam).activation.mean())

    lam = raise_lambda(mean_at, lam=chosen.lam, target=chosen.target)
    explanation = tiltscope.explain(bundle, feature, num=num, lam=lam)
    return explanation, chosen.target, float(np.percentile(natural, 99))


def row_of(explanation: Explanation, target: float, p99: float) -> dict[str, Any]:
    """What the table shows of one feature, and whether the claim holds there."""
    tilt, actmax, topk = (explanation.metrics[name] for name in ("tilt", "actmax", "topk"))
    a, b = tilt["activation_mean"], actmax["activation_mean"]
    if None in (a, b, tilt["naturalness"], actmax["naturalness"]):
        raise SystemExit(f"{explanation.feature}: the bundle has no evaluator, or no sample came out")
    return {
        "feature": explanation.feature,
        "name": explanation.name,
        "lam": explanation.lam,
        "target": target,
        "pool_p99": p99,
        "tilt_activation": a,
        "actmax_activation": b,
        "matched": bool(abs(b - a) <= MATCHED * abs(a)),
        "above_p99": bool(a > p99),
        "tilt_naturalness": tilt["naturalness"],
        "tilt_naturalness_se": tilt["naturalness_se"],
        "actmax_naturalness": actmax["naturalness"],
        "actmax_naturalness_se": actmax["naturalness_se"],
        "topk_naturalness": topk["naturalness"],
        "more_natural": bool(tilt["naturalness"] > actmax["naturalness"]),
        "tilt_diversity": tilt["diversity"],
        "topk_diversity": topk["diversity"],
        "tilt_seconds": tilt["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each with what it lost."""
    titles = ("feature", "target", "99th percentile", "tilt", "actmax", "naturalness: tilt", "actmax", "top-K")
    titles += ("diversity: tilt", "top-K", "lost")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for r in rows:
        lost = [
            *([] if r["more_natural"] else ["naturalness"]),
            *([] if r["above_p99"] else ["below the 99th percentile"]),
            *([] if r["matched"] else ["not matched"]),
        ]
        name = f" ({r['name']})" if r["name"] else ""
        cells = [
            f"`{r['feature']}`{name}",
            *(f"{r[k]:.2f}" for k in ("target", "pool_p99", "tilt_activation", "actmax_activation")),
            f"{r['tilt_naturalness']:.2f} ± {r['tilt_naturalness_se']:.2f}",
            f"{r['actmax_naturalness']:.2f} ± {r['actmax_naturalness_se']:.2f}",
            *(f"{r[k]:.2f}" for k in ("topk_naturalness", "tilt_diversity", "topk_diversity")),
            ", ".join(lost) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
