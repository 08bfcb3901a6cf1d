"""Every system in small, through `tiltscope export`: the published architectures in their formats, the gate on."""

import pytest
import torch

import tiltscope
from tiltscope.engine.cli.main import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("which", ["energydps", "vitl_sit", "vitb_sd15"])
def test_export_builds_onnx_behind_its_gate_and_draws(which, build_twin, tmp_path, monkeypatch):
    """`tiltscope export`: five graphs, held to float64 at every level; and a sample by them beside eager torch's."""
    twin = tiltscope.load(str(build_twin(tmp_path / "twin", which)))
    feature = twin.feature(f"{twin.sae_hooks[0]}:sae:0")
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    assert run(["export", "--runner", "onnx", "--bundle", str(twin.path), "--batch", "1,2", "--quiet"]) == 0
    asked = {"num": 2, "steps": 3, "seed": 3, "lam": 5.0}
    drawn, eager = (tiltscope.sample(twin.prior, feature, runner=runner, **asked) for runner in ("onnx", "torch"))
    assert drawn.manifest["runner"] == "onnx"
    assert drawn.manifest["parity"]["failure"] is None
    assert max(drawn.manifest["parity"]["errors"].values()) < 1e-4
    torch.testing.assert_close(drawn.x0, eager.x0, rtol=1e-3, atol=1e-3)
