"""Where an error enters: a weight changed, an axis swapped, nothing wrong; each named by its module."""

import pytest
import torch

import tiltscope
from tiltscope.engine.runtime.gate import LIMITS
from tiltscope.export import decompositions
from tiltscope.export.locate import locate, tap, verdict

ALLOWED = LIMITS[torch.float32].error


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


@pytest.fixture(scope="module")
def tapped(bundle):
    return tap(bundle.prior, bundle.feature("blocks.1:sae:3"), torch.float32, torch.float32)


def said(tapped):
    return verdict(tapped.modules, tapped.graph(*tapped.given), tapped.expected, ALLOWED)


def test_a_right_graph_is_right_at_every_module(tapped):
    assert len(tapped.modules) > 40
    assert tapped.modules[-1].startswith("trunk.layer.0")
    assert f"right at all {len(tapped.modules)} modules" in said(tapped)


@pytest.mark.parametrize("module", ["network.down_blocks.0.resnets.0.conv1", "trunk.layer.0.mlp.up_proj"])
def test_a_changed_weight_is_found_in_its_module(tapped, module):
    """As in an engine that was built from other weights."""
    assert module in tapped.modules
    weight = getattr(tapped.graph, f"{module}.weight".replace(".", "_"))
    kept = weight.clone()
    try:
        weight.mul_(1.01)
        found = said(tapped)
    finally:
        weight.copy_(kept)
    assert f"enters in the forward pass of {module} (module {tapped.modules.index(module) + 1} of" in found


def test_only_the_gradient_wrong_is_found_between_two_modules():
    """modules a, b, c; the gradient at b's output is right, at a's it is not: the backward pass of b."""
    right = [torch.full((2, 3), float(at + 1), dtype=torch.float64) for at in range(7)]
    wrong = [each.clone() for each in right]
    for at in (3, 6):  # at a's output, and with it at x
        wrong[at] *= 1.1
    assert "backward pass between b and a, 1.0e-01" in verdict(["a", "b", "c"], wrong, right, ALLOWED)
    wrong[5][0, 0] = torch.nan
    assert "backward pass between the readout and c, nan" in verdict(["a", "b", "c"], wrong, right, ALLOWED)
    wrong = [*right[:6], right[6] * 2]
    assert "backward pass between a and x" in verdict(["a", "b", "c"], wrong, right, ALLOWED)


@pytest.mark.slow
def test_a_swapped_axis_in_a_decomposition_is_found_at_the_patch_embedding(bundle, monkeypatch):
    right = decompositions._patch_gradient
    monkeypatch.setattr(decompositions, "_patch_gradient", lambda *given: right(*given).transpose(2, 3))

    def run_traced(graph, example, names):
        return lambda given: graph(*given)

    found = locate(bundle.prior, bundle.feature("blocks.1:sae:3"), torch.float32, run_traced)
    assert "enters in the backward pass between trunk.embeddings.patch_embeddings and network." in found
