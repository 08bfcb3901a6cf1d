"""The distance to the exact tilt: nothing for draws of it, something for whatever else, and the same sum as written out."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fidelity import SETS, distance, nearer, row_of, table, weights


def rows(seed: int, num: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((num, 6))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_it_is_the_sum_over_pairs_written_out() -> None:
    x, y, w = rows(0, 5), rows(1, 7), np.random.default_rng(2).uniform(size=7)
    w /= w.sum()

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b + 1) ** 3)

    pairs = [(w[i] * w[j], k(a, b)) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    expected = (
        np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
        - 2 * np.mean([sum(v * k(a, b) for v, b in zip(w, y, strict=True)) for a in x])
    )
    assert distance(x, y, w) == pytest.approx(expected, rel=1e-12)


def test_draws_of_the_weighted_distribution_are_at_no_distance_and_others_are() -> None:
    pool, others, rng = rows(3, 800), rows(9, 800), np.random.default_rng(4)
    w, p = tilted(pool), tilted(others)
    of_tilt = [distance(others[rng.choice(800, 40, p=p)], pool, w) for _ in range(40)]
    unguided = [distance(rows(100 + at, 40), pool, w) for at in range(40)]
    assert abs(np.mean(of_tilt)) < 4 * np.std(of_tilt) / 40**0.5
    assert np.mean(unguided) > 10 * np.std(unguided) / 40**0.5


def tilted(pool: np.ndarray) -> np.ndarray:
    w = np.exp(2.0 * pool[:, 0])
    return w / w.sum()


def test_the_weights_reach_the_target() -> None:
    natural = np.maximum(np.random.default_rng(5).standard_normal(500), 0.0)
    w = weights(natural, 1.1)
    assert w.sum() == pytest.approx(1.0)
    assert w @ natural == pytest.approx(1.1, rel=1e-6)
    with pytest.raises(SystemExit, match="target"):
        weights(natural, natural.max() + 1)


def test_a_row_holds_every_set_of_pictures_to_the_tilt_that_reaches_the_target(monkeypatch) -> None:
    monkeypatch.setattr("fidelity.embed", lambda bundle, x0: x0.numpy())
    pool = rows(3, 60)
    natural = np.maximum(3 * pool[:, 0], 0.0)
    pictures = {name: rows(seed, 4) for seed, name in enumerate(SETS, start=20)}
    activation = torch.tensor([0.0, 1.0, 2.0, 3.0])
    answers = {name: SimpleNamespace(x0=torch.from_numpy(x0), activation=activation) for name, x0 in pictures.items()}
    unguided = answers.pop("unguided").x0
    explanation: Any = SimpleNamespace(feature="a", natural=natural, target=1.0, answers=answers)
    bundle: Any = SimpleNamespace(pool=SimpleNamespace(embeddings=lambda: 2 * pool))
    w = weights(natural, 1.0)
    assert row_of(bundle, explanation, unguided) == {
        "feature": "a",
        "fires_exact": pytest.approx(w[natural > 0].sum()),
        "fires": 0.75,
        "distance": {name: pytest.approx(distance(x0, pool, w)) for name, x0 in pictures.items()},
    }


def test_the_table_has_a_line_a_feature_and_their_mean() -> None:
    found = [
        {"feature": name, "fires_exact": 0.5, "fires": share, "distance": dict.fromkeys(("topk", "actmax"), 0.3) | own}
        for name, share, own in (("a", 0.4, {"tilt": 0.2, "unguided": 0.5}), ("b", 0.6, {"tilt": 0.4, "unguided": 0.3}))
    ]
    lines = table(found).splitlines()
    assert lines[2] == "| `a` | 50% | 40% | 0.20 | 0.50 | 0.30 | 0.30 |"
    assert lines[-1] == "| mean | 50% | 50% | 0.30 | 0.40 | 0.30 | 0.30 |"
    assert (nearer(found, "unguided"), nearer(found, "topk")) == (1, 1)
