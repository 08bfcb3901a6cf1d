"""benchmarks/ablation.py: a row that misses the target is drawn again; its time stays that of the draw beside its neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ablation
import pytest
import torch

NAMES = ("published", "fast")


def stage(name: str, lam: float) -> SimpleNamespace:
    """One whose mean activation is its strength."""
    return SimpleNamespace(name=name, run=SimpleNamespace(lam=lam), inquiry=SimpleNamespace(target=7.0))


def test_a_row_drawn_again_keeps_the_time_of_the_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, ...]] = []
    rows: dict[str, Any] = {}

    def draw(todo: list[SimpleNamespace], num: int) -> dict[str, tuple[Any, list[float]]]:
        drawn.append(tuple(each.name for each in todo))
        return {each.name: (torch.full((num,), each.run.lam), [float(len(drawn))]) for each in todo}

    def table_row(stage: SimpleNamespace, samples: torch.Tensor, seconds: list[float]) -> dict[str, Any]:
        return {"mean": float(samples.mean()), "seconds": seconds}

    replaced = {
        "STAGES": dict.fromkeys(NAMES),
        "stages": lambda *_: [stage("published", 7.0), stage("fast", 3.0)],
        "draw": draw,
        "moments": lambda samples: (float(samples.mean()), 0.0),
        "is_matched": lambda samples, target: float(samples.mean()) == target,
        "rematch": lambda missed, tries: stage(missed.name, 7.0),
        "table_row": table_row,
        "append_result": lambda *_, **facts: rows.update(facts["rows"]),
        "print_table": lambda _: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(ablation.tiltscope, "load", lambda _: SimpleNamespace(prior=SimpleNamespace(identity="p")))
    ablation.main(ablation.Config(num=2))
    assert drawn == [NAMES, ("fast",)]
    assert rows == {"published": {"mean": 7.0, "seconds": [1.0]}, "fast": {"mean": 7.0, "seconds": [1.0]}}
