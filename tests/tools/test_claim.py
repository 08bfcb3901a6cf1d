"""Which features the claim is tried on, and that its table says what was lost."""

from types import SimpleNamespace

from claim import chosen_features, table


def test_features_are_chosen_by_rank_alone() -> None:
    infos = [
        SimpleNamespace(feature=f"blocks.5:sae:{at}", alive=at % 7 != 0, selectivity=float(at % 50), name=None)
        for at in range(400)
    ]
    chosen = chosen_features(SimpleNamespace(features=lambda: infos))  # type: ignore[arg-type]
    ranked = sorted((f for f in infos if f.alive), key=lambda f: (-f.selectivity, f.feature))
    assert chosen == [f.feature for f in ranked[:200:20]]


def test_what_was_lost_is_said() -> None:
    won = {
        "feature": "blocks.5:sae:1", "name": "clock", "target": 2.0, "pool_p99": 1.0, "tilt_activation": 1.9,
        "actmax_activation": 1.9, "tilt_naturalness": -0.5, "tilt_naturalness_se": 0.1, "actmax_naturalness": -3.0,
        "actmax_naturalness_se": 0.1, "topk_naturalness": 0.0, "tilt_diversity": 0.9, "topk_diversity": 0.8,
        "more_natural": True, "above_p99": True, "matched": True,
    }  # fmt: skip
    lost = won | {"feature": "blocks.5:sae:2", "name": None, "more_natural": False, "above_p99": False}
    first, second = table([won, lost]).splitlines()[2:]
    assert first.startswith("| `blocks.5:sae:1` (clock) | 2.00 |")
    assert first.endswith("| - |")
    assert second.endswith("| naturalness, below the 99th percentile |")
