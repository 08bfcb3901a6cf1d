"""Metrics: the definitions, brute force; zero where nature is the reference; None where there is no number."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.report.metrics import (
    METRICS,
    d5,
    diversity,
    ess_in_words,
    measure,
    naturalness,
    nearest_natural,
    percentile,
    prior_warning,
    selectivity_rank,
    standard_error,
    vendi_score,
)
from tiltscope.engine.samples import Samples
from tiltscope.engine.tilt.calibrate import calibrate, tilt_weights
from tiltscope.engine.tilt.log_tilt import Linear
from tiltscope.engine.tilt.pool_rivals import hard_truncation, top_k

NUM_POOL, SIZE = 60, 8


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


EMBEDDINGS = unit(np.random.default_rng(0).normal(size=(NUM_POOL, SIZE)))
HELDOUT = np.arange(NUM_POOL) % 5 == 0
NATURAL = np.random.default_rng(1).gamma(2.0, size=NUM_POOL)
TILT = calibrate(NATURAL, float(np.quantile(NATURAL, 0.8)))


def bundle(*, evaluator: bool = True) -> Any:
    """Of a Bundle, what metrics ask for; the evaluator reads a picture's first numbers as its embedding."""
    return SimpleNamespace(
        decoder=None,
        meta={"evaluator": {}} if evaluator else {},
        sae_hooks=(),
        pool=SimpleNamespace(embeddings=lambda: EMBEDDINGS.astype(np.float16), heldout=HELDOUT),
        evaluator=lambda: SimpleNamespace(embed=lambda x0, batch_size: 3 * x0.flatten(1)[:, :SIZE]),
    )


def samples(activation: Any, *, index: Any = None, x0: Tensor | None = None, ok: Any = None) -> Samples:
    num = len(activation)
    return Samples(
        feature="f",
        x0=torch.zeros(num, 3, 4, 4) if x0 is None else x0,
        images=None,
        activation=torch.tensor(np.asarray(activation), dtype=torch.float32),
        drive=torch.tensor(np.asarray(activation), dtype=torch.float32) - 1,
        lam=torch.ones(num),
        seed=0,
        index=torch.arange(num) if index is None else torch.from_numpy(np.asarray(index)),
        target="approximate",
        nfe=torch.full((num,), 100),
        n_vjp=torch.full((num,), 90),
        ok=torch.ones(num, dtype=torch.bool) if ok is None else torch.tensor(ok),
    )


def measured(each: Samples, answer: str, **more: Any) -> dict[str, float | None]:
    settings: dict[str, Any] = {"bundle": bundle(), "natural": NATURAL, "log_tilt": Linear(), "tilt": TILT}
    feature = Feature(lambda x0: x0.mean((1, 2, 3)), name="f")
    return measure(each, answer=answer, feature=feature, seconds=1.5, **(settings | more))


def pictures(embeddings: NDArray[np.float64]) -> Tensor:
    x0 = torch.zeros(len(embeddings), 3, 4, 4)
    x0.flatten(1)[:, :SIZE] = torch.from_numpy(embeddings)
    return x0


def from_pool(index: NDArray[np.int64]) -> Samples:
    return samples(NATURAL[index], index=index, x0=pictures(EMBEDDINGS[index]))


def test_the_tilts_numbers() -> None:
    x0 = pictures(unit(np.random.default_rng(2).normal(size=(4, SIZE))))
    found = measured(samples([1.0, 2.0, 3.0, 6.0], x0=x0), "tilt")
    assert tuple(found) == METRICS
    assert found["activation_mean"] == 3
    assert found["activation_se"] == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert found["drive_mean"] == 2
    assert found["z"] == pytest.approx((3 - NATURAL.mean()) / NATURAL.std())
    assert found["percentile"] == pytest.approx(100 * (NATURAL < 3).mean())
    assert (found["kl"], found["log_z"], found["ess"]) == (TILT.kl, TILT.log_z, TILT.ess)
    assert (found["seconds"], found["nfe"], found["n_vjp"]) == (1.5, 100, 90)
    assert found["excess_kl"] is None
    assert found["selectivity_rank"] is None
    assert found["naturalness"] is not None
    assert found["nearest_distance"] == pytest.approx(
        nearest_natural(x0.flatten(1)[:, :SIZE].numpy(), EMBEDDINGS).distance.mean(), abs=1e-3
    )


def test_samples_that_failed_count_for_nothing() -> None:
    failed = samples([1.0, math.nan, 3.0], ok=[True, False, True])
    assert measured(failed, "tilt") == measured(samples([1.0, 3.0]), "tilt")
    none = measured(samples([math.nan], ok=[False]), "tilt")
    assert {name for name, value in none.items() if value is not None} == {"seconds"}
    one = measured(samples([2.0]), "actmax")
    assert (one["activation_mean"], one["activation_se"], one["diversity"]) == (2.0, None, None)


def test_top_k_is_all_of_its_distribution_and_pays_for_it() -> None:
    chosen = top_k(NATURAL, 6)
    found = measured(from_pool(chosen), "topk")
    weights = tilt_weights(NATURAL, TILT.lam)
    assert found["kl"] == pytest.approx(math.log(NUM_POOL / 6))
    assert found["ess"] == 6
    assert found["excess_kl"] == pytest.approx(np.log(1 / 6 / weights[chosen]).mean(), abs=1e-9)
    assert (found["activation_se"], found["naturalness_se"], found["log_z"]) == (0.0, 0.0, None)


def test_hard_truncation_is_priced_as_all_its_members() -> None:
    hard = hard_truncation(NATURAL, float(np.quantile(NATURAL, 0.8)), 4, seed=0)
    found = measured(from_pool(hard.chosen), "hard", members=hard.members)
    num = len(hard.members)
    weights = tilt_weights(NATURAL, TILT.lam)
    assert num > 4
    assert found["kl"] == pytest.approx(math.log(NUM_POOL / num))
    assert found["ess"] == num
    assert found["excess_kl"] == pytest.approx(np.log(1 / num / weights[hard.members]).mean(), abs=1e-9)
    spread = NATURAL[hard.chosen].std(ddof=1)
    assert found["activation_se"] == pytest.approx(spread * math.sqrt((1 - 4 / num) / 4), rel=1e-6)


def test_activation_maximisation_has_no_distribution_to_price() -> None:
    found = measured(samples([4.0, 5.0]), "actmax")
    assert [found[name] for name in ("kl", "log_z", "ess", "excess_kl")] == [None] * 4
    assert found["z"] is not None


def test_held_out_pictures_are_as_natural_as_held_out_pictures() -> None:
    heldout = np.flatnonzero(HELDOUT)
    scores = naturalness(EMBEDDINGS[heldout], EMBEDDINGS[heldout], in_heldout=np.arange(len(heldout)))
    assert scores.mean() == pytest.approx(0, abs=1e-9)
    assert scores.std(ddof=1) == pytest.approx(1)
    found = measured(from_pool(heldout), "topk")
    assert found["naturalness"] == pytest.approx(0, abs=1e-2)  # stored in float16
    # A copy that is not known to be one of them is its own nearest neighbour, and looks too natural.
    assert naturalness(EMBEDDINGS[heldout], EMBEDDINGS[heldout]).mean() > 0.1


def test_what_lies_far_from_nature_is_less_natural() -> None:
    heldout = unit(np.array([1.0, 0, 0]) + 0.1 * np.random.default_rng(3).normal(size=(40, 3)))
    near, far = naturalness(unit(np.array([[1.0, 0.1, 0], [-1.0, 0, 0]])), heldout)
    assert -2 < near < 2
    assert far < -10


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(6, 12))
def test_distances_by_brute_force(seed: int, num: int, num_pool: int) -> None:
    rng = np.random.default_rng(seed)
    rows, pool = unit(rng.normal(size=(num, 5))), unit(rng.normal(size=(num_pool, 5)))
    each = [sorted(math.dist(row, other) for other in pool) for row in rows]
    assert d5(rows, pool).tolist() == pytest.approx([line[4] for line in each])
    assert nearest_natural(rows, pool).distance.tolist() == pytest.approx([line[0] for line in each])
    itself = nearest_natural(pool, pool, in_pool=np.arange(num_pool))
    assert (itself.index != np.arange(num_pool)).all()
    pairs = [math.dist(pool[i], pool[j]) for i in range(num_pool) for j in range(i)]
    assert diversity(pool) == pytest.approx(np.mean(pairs))
    own = d5(pool, pool, in_heldout=np.arange(num_pool))
    assert own.tolist() == pytest.approx([sorted(math.dist(row, other) for other in pool)[5] for row in pool])


def test_without_an_evaluator_or_enough_held_out_pictures_there_is_no_naturalness() -> None:
    found = measured(samples([1.0, 2.0]), "tilt", bundle=bundle(evaluator=False))
    assert [found[n] for n in ("naturalness", "naturalness_se", "nearest_distance", "diversity")] == [None] * 4
    few = bundle()
    few.pool.heldout = np.arange(NUM_POOL) < 5
    found = measured(samples([1.0, 2.0], x0=pictures(EMBEDDINGS[:2])), "tilt", bundle=few)
    assert found["naturalness"] is None
    assert found["diversity"] is not None


def test_percentile_counts_ties_half() -> None:
    natural = np.array([0.0, 0.0, 0.0, 1.0])
    assert [percentile(natural, a) for a in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0, 37.5, 75, 87.5, 100]


def test_selectivity_is_the_features_place_among_all_latents(tiny_bundle: Any) -> None:
    real = Bundle(tiny_bundle)
    hook = real.sae_hooks[0]
    mean, sd = real.pool.statistics(hook)
    latents = real.latents(real.pool.x0(range(real.pool.num)), hook).double().numpy()
    for j in (0, 5, 9):
        for feature in (real.feature(f"{hook}:sae:{j}"), 2.0 * real.feature(f"{hook}:sae:{j}")):
            natural = real.pool.activations(feature)
            for chosen in (top_k(natural, 4), np.arange(4)):
                z = [(latents[chosen, k].mean() - mean[k]) / sd[k] for k in range(len(sd)) if sd[k] > 0 and k != j]
                own = (natural[chosen].mean() - natural.mean()) / natural.std()
                found = selectivity_rank(real.pool.x0(chosen), real, feature, natural, float(natural[chosen].mean()))
                assert found == 1 + sum(each > own for each in z)
    other = Feature(lambda x0: x0.mean((1, 2, 3)), name="own")
    assert selectivity_rank(real.pool.x0([0]), real, other, natural, 1.0) is None


def test_a_whole_answer_of_a_real_bundle_has_every_number(tiny_bundle: Any) -> None:
    real = Bundle(tiny_bundle)
    feature = real.feature(f"{real.sae_hooks[0]}:sae:1")
    natural = real.pool.activations(feature)
    index = top_k(natural, 3)
    each = samples(natural[index], index=index, x0=real.pool.x0(index))
    tilt = calibrate(natural, float(natural.mean() + 0.3 * natural.std()))
    shared: dict[str, Any] = {"bundle": real, "feature": feature, "natural": natural, "log_tilt": Linear()}
    stored = measure(each, answer="topk", tilt=tilt, seconds=None, **shared)
    assert {name for name, value in stored.items() if value is None} == {"log_z", "seconds"}
    seen = measure(each, answer="tilt", tilt=tilt, seconds=1.0, **shared)
    assert {name for name, value in seen.items() if value is None} == {"excess_kl"}
    # The same pictures through the evaluator, now as strangers: each finds itself in the pool.
    assert seen["nearest_distance"] == pytest.approx(0, abs=5e-3)
    assert stored["diversity"] == pytest.approx(seen["diversity"], abs=5e-3)


def test_a_prior_that_is_not_the_pools_is_told_beyond_three_standard_errors() -> None:
    assert prior_warning(1.0, 1.29, 0.1) is None
    assert prior_warning(1.0, 0.71, 0.1) is None
    warning = prior_warning(1.0, 1.31, 0.1)
    assert warning is not None
    assert "1.31 ± 0.1" in warning


def test_draws_of_a_rare_feature_that_are_all_zero_are_no_disagreement() -> None:
    natural = np.zeros(100)
    natural[:2] = 8.0
    silent, loud = np.zeros(32), np.full(32, 8.0)
    assert standard_error(silent, natural) == pytest.approx(natural.std(ddof=1) / 32**0.5)
    assert prior_warning(natural.mean(), silent.mean(), standard_error(silent, natural)) is None
    assert prior_warning(natural.mean(), loud.mean(), standard_error(loud, natural)) is not None
    spread = np.array([0.0, 20.0] * 16)
    assert standard_error(spread, natural) == pytest.approx(spread.std(ddof=1) / 32**0.5)


def test_ess_in_words() -> None:
    assert ess_in_words(12.3) == "about 12 natural pictures carry this target"
    assert ess_in_words(1.2) == "about 1 natural picture carries this target"
    assert ess_in_words(7448.6).startswith("about 7,400 natural")


@given(st.integers(1, 12), st.integers(1, 4))
def test_vendi_counts_unlike_pictures_however_often_each_is_repeated(unlike: int, times: int) -> None:
    assert vendi_score(np.repeat(np.eye(12)[:unlike], times, axis=0)) == pytest.approx(unlike)


def test_vendi_lies_between_one_and_their_number() -> None:
    found = vendi_score(EMBEDDINGS)
    assert found is not None
    assert 1 < found < len(EMBEDDINGS)
    assert vendi_score(EMBEDDINGS[:0]) is None
