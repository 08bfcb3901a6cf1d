"""The judge of the prior: exact where the answer is known, and sure of no more than it can be."""

import numpy as np
import pytest
from prior_quality import copies, kid, precision_recall, way

WIDTH = 8


def rows(seed: int, num: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, WIDTH)) + shift


def test_kid_is_the_sum_over_pairs_written_out() -> None:
    x, y = rows(0, 20), rows(1, 30, shift=0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / WIDTH + 1) ** 3)

    expected = (
        np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-10)


def test_the_error_of_kid_is_its_spread_over_repeats() -> None:
    found = [kid(rows(2 * s, 200, shift=0.3), rows(2 * s + 1, 100)) for s in range(40)]
    spread = np.std([value for value, _ in found], ddof=1)
    claimed = np.mean([error for _, error in found])
    assert 0.6 < claimed / spread < 1.6  # 40 repeats know their spread to 11 %; the jackknife errs on the large side


def test_kid_of_one_distribution_is_nothing() -> None:
    value, error = kid(rows(3, 300), rows(4, 300))
    assert abs(value) < 3 * error


def test_the_way_goes_from_real_to_the_mean_picture() -> None:
    assert [way(v, real=0.1, mean_picture=1.1) for v in (0.1, 0.6, 1.1)] == pytest.approx([0.0, 0.5, 1.0])


def test_precision_and_recall_of_a_sampler_that_knows_half_the_world() -> None:
    """Pictures at 0 and at 100, samples at 0 only, a tenth of them nowhere."""
    pictures = np.concatenate([rows(5, 200), rows(6, 200, shift=100)])
    samples = np.concatenate([rows(7, 180), rows(8, 20, shift=-1000)])
    precision, recall = precision_recall(samples, pictures)
    assert 0.8 < precision <= 0.9
    assert 0.4 < recall <= 0.5 + 1e-9


def test_copies_are_seen_and_others_are_not() -> None:
    training, heldout = rows(9, 500), rows(10, 200)
    fresh = copies(rows(11, 1000), training, heldout)
    assert fresh.share < 0.04
    copied = np.concatenate([training[:30] + 1e-6, rows(12, 70)])
    found = copies(copied, training, heldout)
    assert 0.3 <= found.share < 0.35
    assert (found.nearest[:30] == np.arange(30)).all()
