"""What a preset is said to reach is what was measured last, on the networks that are bundled now."""

import json
from pathlib import Path

import pytest

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.presets import MEASURED_AT, MEASURED_ON, PRESETS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
DOCS = Path(__file__).parents[1] / "docs" / "method.md"
# What the ablation calls a preset.
ROWS = {"calibrated": "tilt", "paper_exact": "published"}


def last_of(name):
    return json.loads((RESULTS / f"{name}.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def ablation():
    return last_of("ablation")


@pytest.fixture(scope="module")
def budget():
    return last_of("budget")


def test_the_numbers_beside_a_preset_are_of_the_networks_that_are_bundled(ablation, budget):
    identity = tiltscope.load("emoji64").prior.identity
    assert ablation["prior"] == budget["prior"] == identity
    assert ablation["feature"] == MEASURED_ON
    assert MEASURED_ON in budget["features"]


@pytest.mark.parametrize("name", ROWS)
def test_the_number_beside_a_preset_is_the_ablations(name, ablation):
    preset, row = PRESETS[name], ablation["rows"][ROWS[name]]
    assert row["matched"]
    assert row["target"] == pytest.approx(MEASURED_AT, abs=0.01)
    assert row["rows"] == preset.settings["steps"]
    assert row["naturalness"] == pytest.approx(preset.reached.naturalness, abs=0.005)
    assert row["naturalness_se"] == pytest.approx(preset.reached.naturalness_se, abs=0.005)
    faster = ablation["rows"]["published"]["seconds"] / row["seconds"]
    assert faster == pytest.approx(preset.reached.times_faster, abs=0.05)


def test_fast_is_the_choice_of_the_budget(ablation, budget):
    """How many times faster: over the quarter of the rows that both measured."""
    preset, choice, first = PRESETS["fast"], budget["choice"], budget["candidates"][0]
    assert (choice["steps"], tuple(choice["interval"])) == (
        preset.settings["steps"],
        preset.settings["guidance_interval"],
    )
    assert first["steps"] == ablation["rows"]["25 rows"]["rows"]
    place = budget["candidates"].index(choice)
    found = budget["features"][MEASURED_ON][place]
    assert found["matched"]
    assert found["target"] == pytest.approx(MEASURED_AT, abs=0.01)
    assert found["naturalness"] == pytest.approx(preset.reached.naturalness, abs=0.005)
    assert found["naturalness_se"] == pytest.approx(preset.reached.naturalness_se, abs=0.005)
    of_25 = ablation["rows"]["published"]["seconds"] / ablation["rows"]["25 rows"]["seconds"]
    assert of_25 * first["seconds"] / choice["seconds"] == pytest.approx(preset.reached.times_faster, rel=0.01)


def test_the_budgets_choice_is_the_cheapest_that_reaches_every_feature_and_is_as_natural(budget):
    able = [
        each
        for each in budget["candidates"]
        if each["reached"] == len(budget["features"]) and each["behind"] >= -each["behind_se"]
    ]
    assert budget["choice"] == min(able, key=lambda each: each["seconds"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_its_settings_and_the_guide_shows_its_number(name):
    preset = PRESETS[name]
    filled = SampleConfig(preset=name, lam=1.0).resolved()
    assert {each: getattr(filled, each) for each in preset.settings} == preset.settings
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`") and " ± " in line)
    assert f"{preset.reached.naturalness:.2f} ± {preset.reached.naturalness_se:.2f}" in row
    assert f"| {preset.reached.times_faster:.0f} |" in row


def test_an_interval_that_is_asked_for_is_not_the_presets():
    every_row = SampleConfig(preset="fast", lam=1.0, guidance_interval=(0.0, 1.0)).resolved()
    assert every_row.guidance_interval == (0.0, 1.0)
