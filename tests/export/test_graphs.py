"""What a trace must not leave behind or take along: transformers' cache of patch coordinates, both ways round."""

import pytest
import torch
from torch import nn

import tiltscope
from tiltscope.engine.errors import ExportError
from tiltscope.export.graphs import check_no_leak, examples, traced_graphs
from tiltscope.export.trace import StepNetworks, trace


class TransformersTrunk(nn.Module):
    """transformers' own DINOv3, whose patch coordinates come out of an lru_cache."""

    def __init__(self, width):
        super().__init__()
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        torch.manual_seed(0)
        self.model = DINOv3ViTModel(
            DINOv3ViTConfig(
                image_size=64,
                patch_size=8,
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_register_tokens=4,
            )
        )

    def forward(self, x0):
        return self.model(pixel_values=x0).last_hidden_state


@pytest.fixture
def trap(tiny_bundle, monkeypatch):
    """(networks with transformers' trunk, inputs of `measure`, its module); the cache is transformers' own kind, and empty."""
    from transformers.models.dinov3_vit import modeling_dinov3_vit
    from transformers.pytorch_utils import compile_compatible_method_lru_cache

    plain = modeling_dinov3_vit.get_patches_center_coordinates.__wrapped__
    cached = compile_compatible_method_lru_cache(maxsize=32)(plain)
    monkeypatch.setattr(modeling_dinov3_vit, "get_patches_center_coordinates", cached)

    bundle = tiltscope.load(str(tiny_bundle))
    feature = bundle.feature("blocks.1:sae:3")
    networks = StepNetworks(bundle.prior.network, feature.trunk)
    networks.trunk = TransformersTrunk(feature.trunk.width).eval().requires_grad_(False)
    return networks, examples(bundle.prior, feature)["measure"], modeling_dinov3_vit


def test_coordinates_cached_before_the_trace_are_refused_as_a_constant(trap):
    networks, example, _ = trap
    networks.measure(*example)
    with pytest.raises(ExportError, match="constants were taken from the example"):
        trace(networks, "measure", example)


def test_coordinates_cached_by_the_trace_are_refused_after_it(trap):
    """They are fake numbers: every later eager call, the reference's too, would compute on them."""
    networks, example, _ = trap
    trace(networks, "measure", example)
    with pytest.raises(ExportError, match="__wrapped__"):
        check_no_leak(networks, "measure", example)


def test_without_the_cache_the_same_trunk_is_traced_and_right(trap, monkeypatch):
    networks, example, module = trap
    plain = module.get_patches_center_coordinates.__wrapped__
    monkeypatch.setattr(module, "get_patches_center_coordinates", plain)
    graph = trace(networks, "measure", example)
    check_no_leak(networks, "measure", example)
    more = [torch.cat([each, each[:1]]) for each in example]
    for found, expected in zip(graph(*more), networks.measure(*more), strict=True):
        torch.testing.assert_close(found, expected)


def operators_of(graph):
    return [node for node in graph.graph.graph.nodes if node.op == "call_function"]


def test_no_expansion_to_the_size_it_has_is_left(tiny_bundle):
    """Beside a symbolic batch ONNX Runtime copies all of it."""
    bundle = tiltscope.load(str(tiny_bundle))
    feature = bundle.feature("blocks.1:sae:3")
    networks = StepNetworks(bundle.prior.network, feature.trunk)
    graph = trace(networks, "measure", examples(bundle.prior, feature)["measure"])
    expansions = [node for node in operators_of(graph) if node.target is torch.ops.aten.expand.default]
    assert expansions
    assert all(str(node.args[0].meta["val"].shape) != str(node.meta["val"].shape) for node in expansions)


def test_samples_share_a_product_in_a_coarse_graph_and_operators_are_whole(tiny_bundle):
    bundle = tiltscope.load(str(tiny_bundle))
    feature = bundle.feature("blocks.1:sae:3")
    shared, apart = (next(traced_graphs(bundle.prior, feature, "onnx", coarse=coarse)) for coarse in (True, False))
    addmm, bmm = torch.ops.aten.addmm.default, torch.ops.aten.bmm.default
    sigmoid, tanh = torch.ops.aten.sigmoid.default, torch.ops.aten.tanh.default
    num = {
        each: [node.target for node in operators_of(of.graph)] for each, of in (("shared", shared), ("apart", apart))
    }
    assert num["apart"].count(addmm) == 0
    assert num["shared"].count(addmm) > 0
    assert num["shared"].count(bmm) + num["shared"].count(addmm) <= num["apart"].count(bmm)
    assert (num["shared"].count(tanh), num["apart"].count(sigmoid)) == (0, 0)
    assert num["shared"].count(sigmoid) == num["apart"].count(tanh) > 0
    more = [torch.cat([each, each[:1]]) for each in shared.example]
    torch.testing.assert_close(shared.graph(*more), apart.graph(*more))
