"""tools/bundle_report.py: a card is not written from figures that nobody measured."""

from typing import Any

import pytest
from bundle_report import CARD_NEEDS, PARTS, Config, main, missing_parts

WHOLE = dict.fromkeys(CARD_NEEDS, "measured")


def test_a_part_is_missing_where_a_figure_of_it_is_and_nobody_asks_for_it() -> None:
    assert missing_parts(WHOLE, ()) == []
    without = {figure: value for figure, value in WHOLE.items() if figure != "fidelity"}
    assert missing_parts(without, ("trunk",)) == ["claim"]
    assert missing_parts(without, ("claim",)) == []
    assert missing_parts({}, PARTS) == []
    assert missing_parts({}, ()) == ["claim", "features", "posterior", "prior"]


def test_a_missing_part_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr("bundle_report.missing_parts", lambda reference, asked: ["claim"])
    monkeypatch.setattr("bundle_report.measure", lambda *each: measured.append(each))
    with pytest.raises(SystemExit, match="the card shows claim too"):
        main(Config(parts=("trunk",)))
    assert measured == []
