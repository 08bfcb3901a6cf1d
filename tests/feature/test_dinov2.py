"""DINOv2 with and without registers: equal to transformers' own model, at every hook, at the trained size and at others."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import fill, normalised, pictures, write_preprocessor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.trunk import load_trunk

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}


def write(folder, *, registers=False, **changes):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    kinds = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    with torch.random.fork_rng(devices=[]):
        model = fill(kinds[1](kinds[0](**(SIZES | changes))))
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


@pytest.mark.parametrize("size", [(42, 42), (56, 56), (28, 70)])
@pytest.mark.parametrize("registers", [False, True])
@torch.no_grad()
def test_equal_to_transformers_at_every_hook(tmp_path, registers, size):
    model = write(tmp_path, registers=registers)
    x0 = pictures(2, side=70)[:, :, : size[0], : size[1]]
    theirs = model(normalised(x0), output_hidden_states=True)
    for hook, expected in [
        *((f"blocks.{at}", theirs.hidden_states[at]) for at in range(4)),
        ("norm", theirs.last_hidden_state),
    ]:
        trunk = load_trunk(tmp_path, hook, image_size=size)
        assert trunk.num_prefix_tokens == (5 if registers else 1)
        torch.testing.assert_close(trunk(x0), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_truncated_is_the_full_models_own_layer(tmp_path):
    write(tmp_path, registers=True)
    x0, seen = pictures(2, side=42), {}
    full = load_trunk(tmp_path, "norm", image_size=(42, 42))
    full.layer[1].register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0]))
    full(x0)
    torch.testing.assert_close(
        load_trunk(tmp_path, "blocks.1", image_size=(42, 42))(x0), seen["h"], rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_the_giants_gated_mlp(tmp_path):
    model = write(tmp_path, use_swiglu_ffn=True)
    x0 = pictures(2, side=42)
    trunk = load_trunk(tmp_path, "norm", image_size=(42, 42))
    torch.testing.assert_close(trunk(x0), model(normalised(x0)).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_double_precision_and_batch_mates(tmp_path):
    write(tmp_path)
    trunk = load_trunk(tmp_path, "blocks.3", image_size=(56, 56))
    x0 = pictures(5, side=56)
    wide = trunk.in_dtype(torch.float64)(x0.double())
    torch.testing.assert_close(trunk(x0).double(), wide, rtol=1e-4, atol=1e-4)
    assert torch.equal(trunk(x0)[3:4], trunk(x0[[3, 1, 0, 2, 4]])[:1])


def test_later_blocks_are_neither_built_nor_read(tmp_path):
    write(tmp_path)
    names = set(load_trunk(tmp_path, "blocks.1", image_size=(42, 42)).state_dict())
    assert not any(name.startswith(("layer.1.", "layer.2.", "norm.")) for name in names)


def test_what_does_not_fit_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"allowed: blocks.0 to blocks.3, norm"):
        load_trunk(tmp_path, "blocks.4")
    with pytest.raises(BundleError, match="do not divide into patches of 14 px"):
        load_trunk(tmp_path, "norm", image_size=(64, 64))
    held = load_file(tmp_path / "model.safetensors")
    held["extra.weight"] = torch.zeros(1)
    held["layernorm.bias"] = torch.zeros(7)
    del held["encoder.layer.1.mlp.fc1.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BundleError,
        match=r"1 missing \(layer.1.mlp.up_proj.weight\); 1 of another shape \(norm.bias .*\); 1 not known \(extra.weight\)",
    ):
        load_trunk(tmp_path, "norm", image_size=(42, 42))
