"""What a preset is said to reach is what was measured last, on the networks that are bundled now."""

import json
from pathlib import Path

import pytest

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.presets import MEASURED_AT, MEASURED_ON, PRESETS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "ablation.jsonl"
DOCS = Path(__file__).parents[1] / "docs" / "method.md"


@pytest.fixture(scope="module")
def measured():
    return json.loads(RESULTS.read_text().splitlines()[-1])


@pytest.mark.parametrize("name", PRESETS)
def test_the_number_beside_a_preset_is_the_last_measurement(name, measured):
    preset, row = PRESETS[name], measured["rows"][PRESETS[name].row]
    assert measured["feature"] == MEASURED_ON
    assert row["matched"]
    assert row["target"] == pytest.approx(MEASURED_AT, abs=0.01)
    assert row["rows"] == preset.settings["steps"]
    assert row["naturalness"] == pytest.approx(preset.reached.naturalness, abs=0.005)
    assert row["naturalness_se"] == pytest.approx(preset.reached.naturalness_se, abs=0.005)
    faster = measured["rows"]["published"]["seconds"] / row["seconds"]
    assert faster == pytest.approx(preset.reached.times_faster, abs=0.05)


def test_fast_is_what_the_budget_chose():
    """Fewer rows, or fewer guided ones, would be cheaper: docs/benchmarks.md has what they lose."""
    budget = json.loads((RESULTS.parent / "budget.jsonl").read_text().splitlines()[-1])
    settings, choice = SampleConfig(preset="fast", lam=1.0).resolved(), budget["choice"]
    assert budget["prior"] == tiltscope.load("emoji64").prior.identity
    grid = SampleConfig(lam=1.0, grid=choice["grid"]).resolved().grid
    assert (choice["steps"], grid) == (settings.steps, settings.grid)
    assert tuple(choice["interval"]) == (settings.guidance_interval or (0.0, 1.0))
    reached = [each for each in budget["candidates"] if each["reached"] == len(budget["features"])]
    best = max(reached, key=lambda each: each["naturalness"])
    able = [
        each
        for each in reached
        if each["behind"] >= -each["behind_se"] and abs(each["detail"] / best["detail"] - 1) <= 0.1
    ]
    assert choice == min(able, key=lambda each: each["seconds"])


def test_it_was_measured_on_the_bundled_prior(measured):
    assert measured["prior"] == tiltscope.load("emoji64").prior.identity


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_its_settings_and_the_guide_shows_its_number(name):
    preset = PRESETS[name]
    filled = SampleConfig(preset=name, lam=1.0).resolved()
    assert {each: getattr(filled, each) for each in preset.settings} == preset.settings
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`") and " ± " in line)
    assert f"{preset.reached.naturalness:.2f} ± {preset.reached.naturalness_se:.2f}" in row
    assert f"| {preset.reached.times_faster:.0f} |" in row
