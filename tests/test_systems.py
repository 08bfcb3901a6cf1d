"""Systems: their figures follow from their parts, their pages say them, and the published experiment runs on its tiny twin."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = sorted((ROOT / "examples/systems").glob("*.json"))
# NVIDIA's data sheet, H100 SXM, TF32 without sparsity; the share that the prediction assumes.
PEAK_TFLOPS, SHARE = 494.7, 0.40


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_figures_follow_from_the_parts(path):
    system = json.loads(path.read_text())
    forward = sum(system[part]["gmac"] for part in ("prior", "decoder", "trunk", "sae") if system[part])
    # The gradient costs as much again; a multiply-accumulate is two operations.
    assert system["row_gmac"] == pytest.approx(2 * forward, rel=1e-3)
    assert system["picture_pflop"] == pytest.approx(2 * system["row_gmac"] * system["rows"] / 1e6, rel=1e-2)
    predicted = system["picture_pflop"] * 1e3 / (PEAK_TFLOPS * SHARE)
    assert system["predicted_h100_seconds"] == pytest.approx(predicted, rel=2e-2)


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_pages_label_what_is_predicted_and_what_does_not_load(path):
    system, page = json.loads(path.read_text()), (ROOT / f"docs/systems/{path.stem}.md").read_text()
    assert "**predicted, not measured**" in page
    assert ("**Does not load yet:**" in page) == (not system["loads"])
    assert f"{system['row_gmac']:.0f} GMAC" in page


@pytest.mark.slow
def test_the_published_experiment_runs_on_its_tiny_twin(build_twin, tmp_path):
    twin = build_twin(tmp_path / "twin", "energydps")
    command = [sys.executable, str(ROOT / "examples/energydps.py"), str(twin), "stages.2.1:sae:1"]
    done = subprocess.run(
        [*command, "--rows", "5", "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (tmp_path / "out/published/manifest.json").is_file()
    assert (found["lam"] is None) == ("not_calibrated" in found)
    manifest = json.loads((tmp_path / "out/published/manifest.json").read_text())
    assert "capped" in json.dumps(manifest)
