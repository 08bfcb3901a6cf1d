"""DINOv3 under Meta's and timm's names gives, once converted, what transformers' model of the same weights gives."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import normalised, pictures, write_convnext, write_vit

from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.convert.dinov3 import NORMALISATIONS
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.trunk import load_trunk

# Heads of the real width: the configuration is read off the shapes.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}


def meta_vit(state, gated):
    """transformers' names -> Meta's, written from facebookresearch/dinov3's vision_transformer.py."""
    outside = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "storage_tokens",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    found = {theirs: state[ours] for ours, theirs in outside.items()}
    found["mask_token"] = state["embeddings.mask_token"].reshape(1, -1)
    found["rope_embed.periods"] = torch.ones(16)
    names = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    for at in range(SIZES["num_hidden_layers"]):
        ours, theirs = f"layer.{at}", f"blocks.{at}"
        width = SIZES["hidden_size"]
        q, k, v = (state[f"{ours}.attention.{each}_proj.weight"] for each in "qkv")
        found[f"{theirs}.attn.qkv.weight"] = torch.cat([q, k, v])
        # What the release holds in the place of a key's bias is masked, whatever it is.
        q, v = (state[f"{ours}.attention.{each}_proj.bias"] for each in "qv")
        found[f"{theirs}.attn.qkv.bias"] = torch.cat([q, torch.full((width,), 7.0), v])
        found[f"{theirs}.attn.qkv.bias_mask"] = torch.cat(
            [torch.ones(width), torch.full((width,), torch.nan), torch.ones(width)]
        )
        for kind in ("weight", "bias"):
            found[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.attention.o_proj.{kind}"]
            for each in ("norm1", "norm2"):
                found[f"{theirs}.{each}.{kind}"] = state[f"{ours}.{each}.{kind}"]
            for mine, name in names.items():
                found[f"{theirs}.mlp.{name}.{kind}"] = state[f"{ours}.mlp.{mine}.{kind}"]
        for each in (1, 2):
            found[f"{theirs}.ls{each}.gamma"] = state[f"{ours}.layer_scale{each}.lambda1"]
    return found


def timm_vit(state, gated):
    """The same in the names of timm's eva.py."""
    found = {}
    for name, tensor in meta_vit(state, gated).items():
        if "rope" in name or "bias_mask" in name or name == "mask_token":
            continue
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            found[name.replace("qkv.bias", "q_bias")], found[name.replace("qkv.bias", "v_bias")] = q, v
            continue
        for a, b in (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), (".w1.", ".fc1_g."),
                     (".w2.", ".fc1_x."), (".w3.", ".fc2.")):  # fmt: skip
            name = name.replace(a, b)
        found[name] = tensor
    return found


def as_model(tensors):
    """As the file of a training run that is continued, too."""
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in tensors.items()}, "iteration": 3}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scheme", [meta_vit, timm_vit])
@torch.no_grad()
def test_a_vit_under_its_authors_names(tmp_path, scheme, gated):
    model = write_vit(tmp_path / "theirs", **SIZES, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")
    state = load_file(tmp_path / "theirs/model.safetensors")
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(as_model(scheme(state, gated)), tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    convert(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", tmp_path / "out", ConvertSettings())
    x0 = pictures(2)
    trunk = load_trunk(tmp_path / "out", "norm", image_size=(64, 64))
    expected = model(normalised(x0)).last_hidden_state
    torch.testing.assert_close(trunk(x0), expected, rtol=1e-5, atol=1e-5)
    middle = load_trunk(tmp_path / "out", "blocks.1", image_size=(64, 64))
    assert middle(x0).shape == expected.shape


def meta_convnext(state):
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if name.startswith("layer_norm"):
            found[f"norm.{parts[-1]}"] = found[f"norms.3.{parts[-1]}"] = tensor
        elif parts[2] == "downsample_layers":
            found[f"downsample_layers.{parts[1]}.{parts[3]}.{parts[4]}"] = tensor
        else:
            rest = ".".join(parts[4:]).replace("depthwise_conv", "dwconv").replace("pointwise_conv", "pwconv")
            found[f"stages.{parts[1]}.{parts[3]}.{rest.replace('layer_norm', 'norm')}"] = tensor
    return found


def timm_convnext(state):
    found = {}
    for name, tensor in meta_convnext(state).items():
        parts = name.split(".")
        if parts[0] == "norms":
            continue
        if parts[0] == "norm":
            found[f"head.norm.{parts[1]}"] = tensor
        elif parts[0] == "downsample_layers":
            found[("stem" if parts[1] == "0" else f"stages.{parts[1]}.downsample") + f".{parts[2]}.{parts[3]}"] = tensor
        else:
            rest = ".".join(parts[3:]).replace("dwconv", "conv_dw").replace("pwconv", "mlp.fc")
            found[f"stages.{parts[1]}.blocks.{parts[2]}.{rest}"] = tensor
    return found


@pytest.mark.parametrize("scheme", [meta_convnext, timm_convnext])
@torch.no_grad()
def test_a_convnext_under_its_authors_names(tmp_path, scheme):
    model = write_convnext(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs/model.safetensors")
    torch.save(scheme({name.removeprefix("model."): each for name, each in state.items()}), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="weights do not tell"):
        convert(tmp_path / "x.pth", tmp_path / "out", ConvertSettings())
    convert(tmp_path / "x.pth", tmp_path / "out", ConvertSettings(release="lvd1689m"))
    x0 = pictures(2)
    trunk = load_trunk(tmp_path / "out", "norm", image_size=(64, 64))
    torch.testing.assert_close(trunk(x0), model(normalised(x0)).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_each_release_has_its_own_normalisation(tmp_path):
    import json

    write_convnext(tmp_path / "theirs")
    state = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "theirs/model.safetensors").items()}
    torch.save(meta_convnext(state), tmp_path / "dinov3_convnext_SAT493M.pth")
    convert(tmp_path / "dinov3_convnext_SAT493M.pth", tmp_path / "out", ConvertSettings())
    found = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (tuple(found["image_mean"]), tuple(found["image_std"])) == NORMALISATIONS["sat493m"]
    assert NORMALISATIONS["sat493m"] != NORMALISATIONS["lvd1689m"]


def test_missing_and_extra_names_are_told_when_the_folder_is_loaded(tmp_path):
    write_convnext(tmp_path / "theirs")
    state = {n.removeprefix("model."): t for n, t in load_file(tmp_path / "theirs/model.safetensors").items()}
    renamed = meta_convnext(state)
    del renamed["stages.0.0.dwconv.weight"]
    torch.save(renamed | {"extra.thing": torch.zeros(1)}, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "out", ConvertSettings(release="lvd1689m"))
    with pytest.raises(
        BundleError, match=r"1 missing \(stages.0.layers.0.depthwise_conv.weight\); 1 not known \(extra.thing\)"
    ):
        load_trunk(tmp_path / "out", "norm", image_size=(64, 64))
    del renamed["norm.weight"]
    torch.save(renamed, tmp_path / "y.pth")
    with pytest.raises(BundleError, match="no whole DINOv3 ConvNeXt"):
        convert(tmp_path / "y.pth", tmp_path / "out2", ConvertSettings(release="lvd1689m"))
