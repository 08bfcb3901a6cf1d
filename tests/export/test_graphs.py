"""What a trace must not leave behind or take along: transformers' cache of patch coordinates, both ways round."""

import pytest
import torch
from torch import nn

import tiltscope
from tiltscope.engine.errors import ExportError
from tiltscope.export.graphs import check_no_leak, examples
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
