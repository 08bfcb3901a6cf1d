"""A name is given where it is true on pictures that were not used, and nowhere else."""

import numpy as np
from name_features import auc, benjamini_hochberg, enrichment, name_features, words_of


def test_hypergeometric_tail_against_counting() -> None:
    """Urn of 10 with 4 marked, 3 drawn: P(X >= 2) = (6*6 + 4)/120."""
    p = enrichment(np.array([[2]]), np.array([4]), 3, 10)
    np.testing.assert_allclose(p, [[40 / 120]], rtol=1e-12)


def test_benjamini_hochberg_on_its_textbook_case() -> None:
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.5])), [0.04, 4 / 75, 4 / 75, 0.5])


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([0.0, 0.0, 1.0, 1.0]), np.array([False, True, False, True]))[0] == 0.5


def test_only_the_planted_latent_is_named() -> None:
    rng = np.random.default_rng(0)
    n = 600
    has = rng.random(n) < 0.1
    words = [
        words_of("thing", ["clock face"] if h else ["other"], "objects") | {f"w{i % 40}x"} for i, h in enumerate(has)
    ]
    activations = np.maximum(rng.standard_normal((n, 50)) - 1, 0).astype(np.float32)
    activations[:, 7] += 3 * has
    titles = [{"clock"} & w for w in words]
    names = name_features(activations, words, titles, [f"{0x1F300 + i:x}" for i in range(n)], rng.random(n) < 0.2)
    assert names[7] is not None
    assert names[7].word == "clock"  # 'face' is as frequent, and stands in no name
    assert sum(name is not None for name in names) == 1
