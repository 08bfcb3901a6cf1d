"""The paper's claim on a bundle: at one mean activation, is the tilt more natural than activation maximisation?

The features are fixed by rule before anything is looked at: every 20th of the selectivity ranking. Each is explained as a user
would, at the default target (the largest mean that 10 effective natural pictures carry), lambda calibrated on the sampler itself.
The rivals are then held to what the tilt reached.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tiltscope
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.errors import CalibrationError
from tiltscope.engine.samples import Explanation

NUM_FEATURES, EVERY = 10, 20
MATCHED = 0.05


def by_selectivity(bundle: Bundle) -> list[str]:
    """The live latents, by falling selectivity."""
    live = [f for f in bundle.features() if f.alive and ":sae:" in f.feature]
    return [f.feature for f in sorted(live, key=lambda f: (-f.selectivity, f.feature))]


def chosen_features(bundle: Bundle) -> list[str]:
    """Ranks 1, 21, 41, ..."""
    return by_selectivity(bundle)[: NUM_FEATURES * EVERY : EVERY]


def explain_at_target(bundle: Bundle, address: str, *, num: int, runner: str = "torch") -> Explanation:
    """Four answers at the activation that the tilt reached.

    Where the sampler does not reach the target, the tilt is drawn at the pool's lambda: its row says that it is not there.
    """
    feature = bundle.feature(address)
    try:
        return tiltscope.explain(bundle, feature, num=num, runner=runner)
    except CalibrationError:
        return tiltscope.explain(bundle, feature, num=num, runner=runner, calibration="pool")


def row_of(explanation: Explanation) -> dict[str, Any]:
    """What the table shows of one feature, and whether the claim holds there."""
    tilt, actmax, topk = (explanation.metrics[name] for name in ("tilt", "actmax", "topk"))
    a, b = tilt["activation_mean"], actmax["activation_mean"]
    p99 = float(np.percentile(explanation.natural, 99))
    if None in (a, b, tilt["naturalness"], actmax["naturalness"]):
        raise SystemExit(f"{explanation.feature}: the bundle has no evaluator, or no sample came out")
    return {
        "feature": explanation.feature,
        "name": explanation.name,
        "lam": explanation.lam,
        "target": explanation.target,
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
