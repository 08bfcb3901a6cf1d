"""The rule by which benchmarks/budget.py chooses the rows of the preset `fast`, on made-up measurements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import budget
import pytest
import torch
from matching import Drawn

FEATURES = ("a", "b")


def measured(naturalness: float, detail: float = 1.0, *, matched: bool = True, guided: int = 4) -> dict[str, Any]:
    return {"naturalness": naturalness, "detail": detail, "matched": matched, "guided": guided, "unguided": 0}


def choice(monkeypatch: pytest.MonkeyPatch, *candidates: list[dict[str, Any]]) -> int:
    """The place of the chosen candidate; each is given as its measurement on every feature."""
    monkeypatch.setattr(budget, "CANDIDATES", [budget.Candidate(rows, "native") for rows in range(len(candidates))])
    of_feature = {name: [each[at] for each in candidates] for at, name in enumerate(FEATURES)}
    lines = budget.summary(of_feature, {"guided": 1.0, "unguided": 0.3})
    return budget.chosen(lines, len(FEATURES))["steps"]


def both(*args: float, **more: Any) -> list[dict[str, Any]]:
    return [measured(*args, **more), measured(*args, **more)]


def test_the_cheapest_that_is_as_natural_as_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best, worse, as_good = both(-0.3, guided=9), both(-0.6, guided=2), [measured(-0.2), measured(-0.5)]
    assert choice(monkeypatch, best, worse, as_good) == 2
    assert choice(monkeypatch, best, worse) == 0


@pytest.mark.parametrize("detail", [0.85, 1.15])
def test_neither_a_blur_nor_an_overdriven_picture(detail: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(monkeypatch, both(-0.3, guided=9), both(-0.3, detail)) == 0
    assert choice(monkeypatch, both(-0.3, guided=9), both(-0.3, 1 + 0.5 * (detail - 1))) == 1


def test_one_that_misses_a_target_is_neither_chosen_nor_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = [measured(0.5, guided=1), measured(0.5, guided=1, matched=False)]
    assert choice(monkeypatch, missed, both(-0.3)) == 1
    with pytest.raises(SystemExit, match="no candidate reaches"):
        choice(monkeypatch, missed)


def test_a_search_starts_at_a_former_runs_strength_else_at_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never at the last candidate's: its strength may lie beyond where the mean still rises."""
    candidates = [budget.Candidate(rows, "native") for rows in (25, 10, 8)]
    starts: list[float] = []

    def match(draw: object, activation: object, target: float, start: float) -> Drawn:
        starts.append(start)
        return Drawn(strength=99.0, x0=torch.zeros(1), mean=target, se=0.1, matched=True, tries=1)

    replaced = {
        "CANDIDATES": candidates,
        "match": match,
        "inquire": lambda *_: SimpleNamespace(run=SimpleNamespace(lam=1.5), target=7.0),
        "asked": lambda *_: None,
        "kinds": lambda _: (3, 1),
        "naturalness": lambda *_: (-0.5, 0.1),
        "detail": lambda *_: 0.9,
        "activation_of": lambda _: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(budget, name, value)
    bundle = SimpleNamespace(feature=lambda address: address)
    found = budget.measure(bundle, "f", budget.Config(), {candidates[1]: 4.0})  # pyright: ignore[reportArgumentType]
    assert starts == [1.5, 4.0, 1.5]
    assert [(each["steps"], each["strength"], each["guided"]) for each in found] == [
        (25, 99.0, 3),
        (10, 99.0, 3),
        (8, 99.0, 3),
    ]
