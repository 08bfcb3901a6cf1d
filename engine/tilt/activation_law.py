"""How far a sampler's law of the activation is from the tilt's: a lower bound on its excess KL, where q itself has no density.

    KL(q || q_S)  >=  KL(law of a under q || law of a under q_S)            data processing: a is a function of x

The tilt's law is that of the weighted pool; both are compared over cells of equal tilted mass. Numpy only. Source: Cover and
Thomas, section 2.8; the bias of a plug-in estimate over k cells, (k - 1)/(2 n), Miller 1955.
"""

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from tiltscope.engine.tilt.calibrate import tilt_weights
from tiltscope.engine.tilt.log_tilt import LogTilt

CELLS = 5


def excess_kl_lower_bound(
    activation: Float64[ndarray, "num"],
    natural: Float64[ndarray, "pool"],
    lam: float,
    *,
    log_tilt: str | LogTilt = "linear",
    cells: int = CELLS,
) -> float:
    """An estimate, in nats, of the law's KL(q || q_S) at the pool's `lam`, from draws `activation` of q; at least 0.

    Cells end at the tilted pool's quantiles 1/cells, 2/cells, ...; ties make them fewer. A bound of 0 says that these draws do
    not tell the two laws apart, not that the distributions are one.
    """
    weight = tilt_weights(natural, lam, log_tilt=log_tilt)
    order = np.argsort(natural, kind="stable")
    reached = np.cumsum(weight[order])
    at = np.searchsorted(reached, np.arange(1, cells) / cells)
    edges = np.unique(natural[order][np.minimum(at, len(order) - 1)])
    # A cell takes its upper edge, so that ties stand together.
    where = np.searchsorted(edges, natural, side="left")
    drawn = np.searchsorted(edges, activation, side="left")
    p = np.bincount(where, weights=weight, minlength=len(edges) + 1)
    q = np.bincount(drawn, minlength=len(edges) + 1) / len(activation)
    # Beyond the pool's largest activation the last cell ends; a cell without tilted mass cannot be.
    carried = (q > 0) & (p > 0)
    plug_in = float(q[carried] @ np.log(q[carried] / p[carried]))
    return max(plug_in - (int((p > 0).sum()) - 1) / (2 * len(activation)), 0.0)
