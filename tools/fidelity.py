"""How near a bundle's tilt is to what it should draw: the pool's own pictures, weighed as the exact tilt weighs them.

    q*(x_i) = w_i = exp(lam phi(a(x_i))) / sum,  lam so that sum_i w_i phi(a(x_i)) is the target
    distance = unbiased MMD^2 of the samples to the weighted pool, k(a, b) = (a . b + 1)^3 on the evaluator's unit rows

0: as pictures drawn from q*; the pool's pictures of q* are other pictures than a sampler's, so none is held to equal another one.
Naturalness asks whether a picture could be real; this asks whether the pictures together are those that the feature is about.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.preprocessing import normalize
from torch import Tensor

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.report.metrics import embed
from tiltscope.engine.samples import Explanation
from tiltscope.engine.tilt.calibrate import calibrate, largest_reachable

Rows = NDArray[np.float64]
ROUNDING = 1e-9
SETS = ("tilt", "unguided", "topk", "actmax")


def weights(natural: Rows, target: float) -> Rows:
    """w of the formula. Raises SystemExit where natural pictures do not reach the target."""
    # The default target is the largest that natural pictures carry: its last bit must not decide.
    largest = largest_reachable(natural)
    found = calibrate(natural, largest if abs(target / largest - 1) < ROUNDING else target)
    if not found.feasible:
        raise SystemExit(f"target {target}: {found.reason}")
    w = np.exp(found.lam * (natural - natural.max()))
    return w / w.sum()


def distance(samples: Rows, pool: Rows, w: Rows) -> float:
    """Unbiased MMD^2 between samples [n, d] and the pool's rows [m, d] of weights w [m], both of unit length."""
    kernel = partial(polynomial_kernel, degree=3, gamma=1, coef0=1)
    n, within, of_pool = len(samples), kernel(samples, samples), kernel(pool, pool)
    pairs = np.outer(w, w)
    np.fill_diagonal(pairs, 0.0)
    of_samples = (within.sum() - np.trace(within)) / (n * (n - 1))
    return float(of_samples + (pairs * of_pool).sum() / pairs.sum() - 2 * (kernel(samples, pool) @ w).mean())


def row_of(bundle: Bundle, explanation: Explanation, unguided: Tensor) -> dict[str, Any]:
    """Of one explained feature: each answer's distance to q*, beside that of `unguided` pictures x0 [num, *shape]."""
    tilt = explanation.answers["tilt"]
    natural = np.asarray(explanation.natural, np.float64)
    w, pool = weights(natural, explanation.target), normalize(np.asarray(bundle.pool.embeddings(), np.float64))
    pictures = {name: explanation.answers[name].x0 for name in ("tilt", "topk", "actmax")} | {"unguided": unguided}
    return {
        "feature": explanation.feature,
        "fires_exact": float(w[natural > 0].sum()),
        "fires": float((tilt.activation > 0).double().mean()),
        "distance": {name: distance(embed(bundle, x0), pool, w) for name, x0 in pictures.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| feature | fires: exact | tilt | distance: tilt | unguided | top-K | actmax |", "|" + "---|" * 7]
    for each in rows:
        distances = " | ".join(f"{each['distance'][name]:.2f}" for name in SETS)
        lines.append(f"| `{each['feature']}` | {each['fires_exact']:.0%} | {each['fires']:.0%} | {distances} |")
    means = (np.mean([each["distance"][name] for each in rows]) for name in SETS)
    fires = (np.mean([each[name] for each in rows]) for name in ("fires_exact", "fires"))
    lines.append("| mean | " + " | ".join([*(f"{x:.0%}" for x in fires), *(f"{x:.2f}" for x in means)]) + " |")
    return "\n".join(lines)


def nearer(rows: list[dict[str, Any]], rival: str) -> int:
    """Features on which the tilt is nearer to q* than `rival`."""
    return sum(each["distance"]["tilt"] < each["distance"][rival] for each in rows)
