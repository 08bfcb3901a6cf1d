"""A name is given where it is true on pictures that were not used, and nowhere else."""

import numpy as np

from tiltscope.engine.bundling.naming import Naming, auc, benjamini_hochberg, enrichment, strongest, words_of


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
    naming = Naming(words, titles, [f"{i:04d}" for i in range(n)], rng.random(n) < 0.2)
    for block in np.split(activations.T, [13, 14, 40]):
        naming.see(block)
    names = naming.names()
    assert names[7] is not None
    assert names[7].word == "clock"  # 'face' is as frequent, and stands in no name
    assert sum(name is not None for name in names) == 1


def test_the_smallest_p_values_alone_give_the_same_q() -> None:
    p = np.random.default_rng(1).random(4000) ** 3
    few = p[p <= 0.05]
    np.testing.assert_allclose(benjamini_hochberg(few, len(p)), benjamini_hochberg(p)[p <= 0.05], rtol=1e-12)


def test_strongest_is_a_stable_sort_without_sorting() -> None:
    values = np.random.default_rng(2).integers(0, 6, 200).astype(np.float32)
    for num in (1, 7, 60, 200, 300):
        expected = np.argsort(-values, kind="stable")[:num]
        np.testing.assert_array_equal(strongest(values, num), expected)


def test_variants_of_one_thing_are_one_family() -> None:
    """Twelve renderings of one clock are one piece of evidence, not twelve: no name without twelve clocks."""
    rng = np.random.default_rng(3)
    n = 400
    has = np.arange(n) < 100
    words = [{"clock"} if h else {f"w{i % 30}x"} for i, h in enumerate(has)]
    activations = rng.random((1, n)).astype(np.float32) + 3 * has
    heldout = np.arange(n) % 5 == 0
    apart, together = (
        Naming(words, words, groups, held)
        for groups, held in (
            ([f"{i:03d}" for i in range(n)], heldout),
            # A hundred pictures of four clocks, one of them held out.
            ([f"c{i % 4}" if i < 100 else f"{i:03d}" for i in range(n)], np.where(has, np.arange(n) % 4 == 0, heldout)),
        )
    )
    for naming in (apart, together):
        naming.see(activations)
    assert [name and name.word for name in apart.names()] == ["clock"]
    assert together.names() == [None]
