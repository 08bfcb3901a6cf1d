"""Lambda is found from draws alone, in few of them; the table says what was lost."""

import numpy as np
import pytest
from claim import MAX_DRAWS, raise_lambda, table


@pytest.mark.parametrize("start", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_lambda_is_found_where_the_mean_grows_with_it(start: float, target: float) -> None:
    draws: list[float] = []

    def mean_at(lam: float) -> float:
        draws.append(lam)
        return lam / (1 + lam)

    lam = raise_lambda(mean_at, lam=start, target=target)
    assert lam / (1 + lam) == pytest.approx(target, rel=0.05)
    assert len(draws) <= MAX_DRAWS


def test_out_of_reach_the_nearest_is_kept() -> None:
    peak = lambda lam: 0.5 * np.exp(-(np.log(lam / 3) ** 2))  # noqa: E731  past 3 the pictures fall apart
    lam = raise_lambda(peak, lam=1.0, target=2.0)
    assert lam in (1.0, 4.0)
    assert peak(lam) >= peak(1.0)


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
