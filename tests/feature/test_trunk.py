"""The truncated trunk is transformers' DINOv3ViTModel up to a hook, and nobody's picture depends on its batch mates."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.readout import Readout, read
from tiltscope.engine.feature.trunk import TruncatedViT, load_trunk
from tiltscope.engine.feature.vit import ViTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
}
VARIANTS = {
    "as trained here": {},
    "gated MLP, silu, other biases": {
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "query_bias": False,
        "key_bias": True,
        "proj_bias": False,
        "mlp_bias": False,
        "rope_theta": 50.0,
        "num_register_tokens": 0,
        "layer_norm_eps": 1e-3,
    },
}


def reference(config):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = DINOv3ViTModel(DINOv3ViTConfig(**config)).eval()
    with torch.no_grad():
        for (
            p
        ) in model.parameters():  # transformers' own start (0.02) would hide most mistakes behind the residual stream
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.ndim < 2))
    return model


def pictures(num=3, side=32, seed=1):
    return 2.4 * torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1.2


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' model, and the folder it writes."""
    folder = tmp_path_factory.mktemp("trunk")
    model = reference(SMALL | VARIANTS[request.param])
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model, folder


@torch.no_grad()
def hidden_states(model, x0):
    mean, std = (torch.tensor(v, dtype=x0.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    output = model(((x0 + 1) / 2 - mean) / std, output_hidden_states=True)
    return {f"blocks.{n}": h for n, h in enumerate(output.hidden_states)} | {"norm": output.last_hidden_state}


def test_every_hook_equals_the_full_model(pair):
    model, folder = pair
    x0 = pictures()
    states = hidden_states(model, x0)
    assert list(states) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm"]
    for hook, expected in states.items():
        tokens = load_trunk(folder, hook)(x0)
        scale = expected.abs().max()
        assert (tokens - expected).abs().max() < 1e-6 * scale, hook
        assert scale > 1


def test_only_the_blocks_before_the_hook_are_built_and_read(pair):
    _, folder = pair
    for hook, built, has_norm in (("blocks.0", 0, False), ("blocks.2", 2, False), ("norm", 3, True)):
        trunk = load_trunk(folder, hook)
        assert len(trunk.layer) == built
        assert (trunk.norm is not None) == has_norm
    assert not any(name.startswith(("layer.2", "norm.")) for name in load_trunk(folder, "blocks.2").state_dict())


def exact_tables(side, head_width, base):
    """RoPE in float64, as written in vit.py's docstring: angle 2 pi coordinate / base^(4i/head_width), tiled over both halves."""
    centre = (np.arange(side) + 0.5) / side * 2 - 1
    place = np.stack(np.meshgrid(centre, centre, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angle = 2 * np.pi * place / base ** (4 * np.arange(head_width // 4) / head_width)
    angle = np.tile(angle.reshape(side * side, -1), 2)
    return torch.from_numpy(np.cos(angle)), torch.from_numpy(np.sin(angle))


def test_float64_is_computed_in_float64(pair):
    """Against the same formula with float64 tables; a float32 table anywhere would show at 1e-7."""
    model, folder = pair
    trunk = load_trunk(folder, "norm")
    exact = trunk.in_dtype(torch.float64)
    x0 = pictures().double()
    model = model.double()
    try:
        model.rope_embeddings.forward = lambda pixels: exact_tables(4, 16, model.config.rope_theta)
        expected = hidden_states(model, x0)["norm"]
    finally:
        del model.rope_embeddings.forward
        model.float()
    assert (exact(x0) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert exact.dtype == torch.float64
    assert exact is trunk.in_dtype(torch.float64)
    assert exact.in_dtype(torch.float32) is trunk
    assert trunk(pictures()).dtype == torch.float32


def test_a_run_in_inference_mode_leaves_nothing_behind_in_a_global_cache(pair):
    from transformers.models.dinov3_vit import modeling_dinov3_vit

    _, folder = pair
    cache = modeling_dinov3_vit.get_patches_center_coordinates
    before = cache.cache_info() if hasattr(cache, "cache_info") else None
    trunk = load_trunk(folder, "blocks.1")
    with torch.inference_mode():
        trunk(pictures())
    x0 = pictures().requires_grad_()
    assert torch.autograd.grad(trunk(x0).sum(), x0)[0].isfinite().all()
    assert before is None or cache.cache_info() == before


def test_gradients_are_those_of_finite_differences(pair):
    _, folder = pair
    trunk = load_trunk(folder, "blocks.1").in_dtype(torch.float64)
    x0 = pictures(num=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: trunk(x)[:, 0].sum(), x0, fast_mode=True)


def test_a_picture_outside_the_range_keeps_its_gradient(pair):
    _, folder = pair
    x0 = (3 * pictures(num=1)).requires_grad_()
    gradient = torch.autograd.grad(load_trunk(folder, "norm")(x0)[:, 0].square().sum(), x0)[0]
    assert (gradient[x0.detach().abs() > 1] != 0).float().mean() > 0.99


def test_loading_touches_no_global_generator_and_trains_nothing(pair):
    _, folder = pair
    before = torch.random.get_rng_state()
    trunk = load_trunk(folder, "norm")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad or p.is_meta for p in trunk.parameters())
    assert not any(b.is_meta for b in trunk.buffers())
    assert not trunk.training


def random_trunk(width=192, blocks=5, hook="blocks.5"):
    """The embedded bundle's sizes: kernels are chosen by size, so a small stand-in would prove nothing."""
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=6,
        num_register_tokens=4,
    )
    trunk = TruncatedViT(config, hook, mean=MEAN, std=STD).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in trunk.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1))
        if p.ndim < 2 and name.endswith(("weight", "lambda1")):
            p.add_(1)
    return trunk


@pytest.fixture
def threads():
    """Set torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# In float64 each of these but the first changed bits with torch's own linear and gelu.
@pytest.mark.parametrize(
    ("batch", "num_threads", "dtype"),
    [
        (8, 1, torch.float32),
        (6, 1, torch.float64),
        pytest.param(5, 2, torch.float64, marks=pytest.mark.slow),
        pytest.param(8, 5, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_batch_mates_change_no_bit_of_value_or_gradient(threads, batch, num_threads, dtype):
    trunk = random_trunk(blocks=3, hook="blocks.3").in_dtype(dtype)
    threads(num_threads)
    x0 = pictures(num=batch, side=64).to(dtype)
    readout = Readout(
        direction=torch.randn(1, 1, 192, generator=torch.Generator().manual_seed(5)),
        bias=torch.zeros(1, 1),
        threshold=torch.full((1, 1), 0.5),
        weight=torch.ones(1, 1),
        pooling=torch.tensor([[[0.7, 0.3, 0.0]]]),
        mask=torch.ones(1, 1, 69, dtype=torch.bool),
    ).to(dtype)

    def run(x):
        x = x.detach().requires_grad_()
        activation, drive = read(trunk(x), readout)
        return activation.detach(), drive.detach(), torch.autograd.grad(drive.sum(), x)[0]

    base = run(x0)
    order = torch.arange(batch).roll(1)  # no sample keeps its place
    permuted = run(x0[order])
    others = 3 * pictures(num=batch, side=64, seed=9).to(dtype)
    others[1] = x0[1]
    company = run(others)
    for before, after, among in zip(base, permuted, company, strict=True):
        assert torch.equal(after, before[order])
        assert torch.equal(among[1], before[1])


def test_the_tiny_bundles_trunk_is_transformers_own_format(tiny_bundle):
    from transformers import DINOv3ViTModel

    model = DINOv3ViTModel.from_pretrained(tiny_bundle / "trunk", dtype=torch.float32).eval()
    x0 = pictures(side=64)
    expected = hidden_states(model, x0)["norm"]
    assert (load_trunk(tiny_bundle / "trunk", "norm")(x0) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("hook", ["blocks.4", "blocks.99", "blocks.x", "blocks.-1", "layer.1", ""])
def test_an_unknown_hook_names_those_there_are(pair, hook):
    with pytest.raises(ConfigError, match=r"blocks\.0 to blocks\.3, norm"):
        load_trunk(pair[1], hook)


def test_pictures_of_another_size_are_refused(pair):
    with pytest.raises(ConfigError, match=r"\[batch, 3, 32, 32\].*64"):
        load_trunk(pair[1], "blocks.1")(pictures(side=64))


def change(folder, target, name, **values):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / name).read_text()) | values
    (target / name).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"model_type": "vit"}, "dinov3_vit"),
        ("config.json", {"hidden_act": "tanh"}, "gelu, silu"),
        ("config.json", {"num_attention_heads": 5}, "heads"),
        ("config.json", {"num_hidden_layers": 4}, "does not hold the weights"),
        ("config.json", {"intermediate_size": 40}, "does not hold the weights"),
        ("config.json", {"image_size": 30}, "patches"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean"),
        ("preprocessor_config.json", {"image_std": None}, "image_std"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(pair, tmp_path, name, values, message):
    with pytest.raises(BundleError, match=message):
        load_trunk(change(pair[1], tmp_path, name, **values), "norm")


def test_a_file_that_is_no_safetensors_is_refused(pair, tmp_path):
    folder = change(pair[1], tmp_path, "config.json")
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        load_trunk(folder, "norm")


def test_names_as_they_are_in_memory_load_too(pair, tmp_path):
    """transformers writes `layer.N`; a state dict saved directly says `model.layer.N`."""
    folder = change(pair[1], tmp_path, "config.json")
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {n.replace("layer.", "model.layer.", 1): file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    save_file(weights, folder / "model.safetensors")
    x0 = pictures()
    assert torch.equal(load_trunk(folder, "norm")(x0), load_trunk(pair[1], "norm")(x0))
