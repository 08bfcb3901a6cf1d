"""How near a set of samples is to a set of pictures, and whether it copies them: statistics of embeddings, nothing of models.

KID  = unbiased MMD^2 with k(a, b) = (a.b/d + 1)^3                                              (arXiv:1801.01401, sec. 4)
way  = (KID - KID of real pictures) / (KID of the mean picture - KID of real pictures)          0: real, 1: one grey blur
precision, recall = share of samples (pictures) inside the other set's k-nearest-neighbour balls        (arXiv:1904.06991)
near-copy: a sample nearer to a training picture than all but 1 % of the held-out pictures are

Rows are the evaluator's 1,280 numbers; distances are between rows of unit length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

Rows = NDArray[np.float64]
NUM_BLOCKS = 10
COPY_PERCENTILE = 1.0


def kid(samples: Rows, pictures: Rows) -> tuple[float, float]:
    """(KID, its standard error): blocks of each set left out in turn, sqrt of the sum of both sets' jackknife variances.

    Subsets drawn at random overlap, and the spread of their mean says how many were drawn, not how sure the figure is.
    """
    kernel = {
        pair: polynomial_kernel(a, b, degree=3, coef0=1)
        for pair, (a, b) in {"xx": (samples, samples), "yy": (pictures, pictures), "xy": (samples, pictures)}.items()
    }

    def of(x: NDArray[np.intp], y: NDArray[np.intp]) -> float:
        def within(matrix: Rows, rows: NDArray[np.intp]) -> float:
            part, n = matrix[np.ix_(rows, rows)], len(rows)
            return (part.sum() - np.trace(part)) / (n * (n - 1))

        return within(kernel["xx"], x) + within(kernel["yy"], y) - 2 * kernel["xy"][np.ix_(x, y)].mean()

    everything = np.arange(len(samples)), np.arange(len(pictures))
    variance = 0.0
    for side in (0, 1):
        blocks = np.array_split(everything[side], NUM_BLOCKS)
        left_out = [
            of(*(np.setdiff1d(rows, block) if at == side else rows for at, rows in enumerate(everything)))
            for block in blocks
        ]
        variance += (NUM_BLOCKS - 1) * float(np.var(left_out))
    return of(*everything), variance**0.5


def way(value: float, *, real: float, mean_picture: float) -> float:
    """Where between real pictures (0) and the mean picture (1) a KID lies."""
    return (value - real) / (mean_picture - real)


def precision_recall(samples: Rows, pictures: Rows, k: int = 5) -> tuple[float, float]:
    def covered(points: Rows, centres: Rows) -> float:
        """Share of `points` within some centre's distance to its own k-th neighbour."""
        radius = NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]  # itself excluded
        squares = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
        return float((np.sqrt(np.maximum(squares, 0)) <= radius[None]).any(1).mean())

    return covered(samples, pictures), covered(pictures, samples)


@dataclass(frozen=True)
class Copies:
    """Distances to the nearest training picture: of samples, and of held-out pictures, which copy nothing."""

    samples: Rows
    heldout: Rows
    nearest: NDArray[np.intp]
    """of each sample: its nearest training picture"""

    @property
    def threshold(self) -> float:
        return float(np.percentile(self.heldout, COPY_PERCENTILE))

    @property
    def share(self) -> float:
        """Of samples that are near-copies; 0.01 is what pictures that copy nothing show."""
        return float((self.samples < self.threshold).mean())


def copies(samples: Rows, training: Rows, heldout: Rows) -> Copies:
    search = NearestNeighbors(n_neighbors=1).fit(normalize(training))
    distance, nearest = search.kneighbors(normalize(samples))
    return Copies(distance[:, 0], search.kneighbors(normalize(heldout))[0][:, 0], nearest[:, 0])
