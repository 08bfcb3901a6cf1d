"""The truncated ConvNeXt is transformers' DINOv3ConvNextModel up to a hook, and nobody's picture depends on its batch mates."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import normalised, pictures, write_convnext

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.trunk import load_trunk

# 1e-6 of the largest value: some twenty float32 layers in the same order; a missing layer is off by 1e-1.
WITHIN = 1e-6


@pytest.fixture(scope="module", params=[{}, {"hidden_act": "silu", "layer_norm_eps": 1e-3}], ids=["gelu", "silu"])
def pair(request, tmp_path_factory):
    """transformers' model, and the folder it writes."""
    folder = tmp_path_factory.mktemp("convnext")
    return write_convnext(folder, **request.param), folder


@torch.no_grad()
def hooked(model, x0):
    """What a hook on each block's input sees in transformers' whole model, as tokens."""
    found = {}

    def keep(name):
        return lambda module, args: found.__setitem__(name, args[0].flatten(2).transpose(1, 2))

    handles = [
        block.register_forward_pre_hook(keep(f"stages.{s}.{b}"))
        for s, stage in enumerate(model.model.stages)
        for b, block in enumerate(stage.layers)
    ]
    output = model(normalised(x0), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    ends = {
        f"stages.{s}.{len(stage.layers)}": output.hidden_states[s + 1].flatten(2).transpose(1, 2)
        for s, stage in enumerate(model.model.stages)
    }
    return found | ends | {"norm": output.last_hidden_state}


def test_every_hook_equals_the_full_model(pair):
    model, folder = pair
    x0 = pictures()
    states = hooked(model, x0)
    assert {"stages.0.0", "stages.1.1", "stages.2.2", "stages.2.3", "stages.3.1", "norm"} <= set(states)
    for hook, expected in states.items():
        trunk = load_trunk(folder, hook)
        assert (trunk(x0) - expected).abs().max() < WITHIN * expected.abs().max(), hook
        assert trunk.width == expected.shape[2]
        assert trunk.num_tokens == expected.shape[1] == trunk.num_prefix_tokens + trunk.grid[0] * trunk.grid[1]


def test_pictures_that_are_not_square_have_their_own_grid(pair):
    model, folder = pair
    x0 = pictures()[..., :32]
    trunk = load_trunk(folder, "stages.2.1", image_size=(64, 32))
    assert trunk.grid == (4, 2)
    expected = hooked(model, x0)["stages.2.1"]
    assert (trunk(x0) - expected).abs().max() < WITHIN * expected.abs().max()


def test_only_what_comes_before_the_hook_is_built_and_read(pair):
    _, folder = pair
    trunk = load_trunk(folder, "stages.2.1")
    assert [len(stage.layers) for stage in trunk.stages] == [1, 2, 1]
    assert trunk.layer_norm is None
    assert not [name for name in trunk.state_dict() if name.startswith(("stages.3", "stages.2.layers.1", "layer_norm"))]


def test_the_file_may_lack_what_comes_after_the_hook(pair, tmp_path):
    folder = copy_of(pair[1], tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "stages.3" not in k}, folder / "model.safetensors")
    assert torch.equal(load_trunk(folder, "stages.2.2")(pictures()), load_trunk(pair[1], "stages.2.2")(pictures()))
    with pytest.raises(BundleError, match=r"missing \(stages\.3\.downsample_layers\.0\.bias, .* and \d+ more\)"):
        load_trunk(folder, "stages.3.0")


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 5), (torch.float64, 3)])
def test_batch_mates_change_no_bit_of_value_or_gradient(pair, dtype, batch):
    trunk = load_trunk(pair[1], "stages.2.2").in_dtype(dtype)
    x0 = pictures(batch).to(dtype)

    def run(x):
        x = x.detach().requires_grad_()
        tokens = trunk(x)
        return tokens.detach(), torch.autograd.grad(tokens.square().sum(), x)[0]

    order = torch.arange(batch).roll(1)
    others = 3 * pictures(batch, seed=9).to(dtype)
    others[1] = x0[1]
    for base, permuted, company in zip(run(x0), run(x0[order]), run(others), strict=True):
        assert torch.equal(permuted, base[order])
        assert torch.equal(company[1], base[1])


def test_float64_is_computed_in_float64(pair):
    model, folder = pair
    trunk = load_trunk(folder, "stages.3.1")
    x0 = pictures().double()
    try:
        expected = hooked(model.double(), x0)["stages.3.1"]
    finally:
        model.float()
    exact = trunk.in_dtype(torch.float64)
    assert (exact(x0) - expected).abs().max() < 1e-13 * expected.abs().max()
    assert exact.in_dtype(torch.float32) is trunk


def test_gradients_are_those_of_finite_differences(pair):
    trunk = load_trunk(pair[1], "stages.1.1").in_dtype(torch.float64)
    x0 = pictures(1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: trunk(x)[:, 0].sum(), x0, fast_mode=True)


@pytest.mark.parametrize("hook", ["stages.2.4", "stages.4.0", "blocks.1", "stages.2", "stages.x.1"])
def test_an_unknown_hook_names_those_there_are(pair, hook):
    with pytest.raises(ConfigError, match=r"stages\.0\.0 to stages\.0\.1, .* stages\.2\.0 to stages\.2\.3.*norm"):
        load_trunk(pair[1], hook)


def copy_of(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": [1, 2, 3]}, "one positive number a stage"),
        ({"hidden_act": "tanh"}, "gelu, silu"),
        ({"model_type": "convnext"}, "dinov3_vit, dinov3_convnext"),
        ({"hidden_sizes": [8, 12, 20, 24]}, r"of another shape \(stages\.2\..*\[16\] instead of \[20\]"),
        ({"depths": [1, 2, 3, 2]}, r"missing \(stages\.3\.layers\.1\."),
        ({"depths": [1, 2, 2, 1]}, r"not known \(stages\.2\.layers\.2\."),
        ({"image_size": 72}, "do not divide by the stride of 16 px"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(pair, tmp_path, values, message):
    folder = copy_of(pair[1], tmp_path)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    hook = "norm" if values.get("depths") == [1, 2, 3, 2] else "stages.2.1"
    with pytest.raises(BundleError, match=message):
        load_trunk(folder, hook)
