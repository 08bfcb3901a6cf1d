"""Autoencoders of other libraries: in normal form they give what those libraries' own encode gives.

The references below are plain transcriptions of each library's forward (SAELens 6: sae_lens/saes/; saev: src/saev/nn/modeling.py;
overcomplete 0.3: overcomplete/sae/), float64, one token at a time.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from tiltscope.engine.bundling.autoencoders import import_sae
from tiltscope.engine.bundling.sae_formats import from_overcomplete, from_probe, from_saev
from tiltscope.engine.errors import BundleError, ConfigError

D, M, K = 12, 30, 8


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, M, generator=generator),
        "b_enc": torch.randn(M, generator=generator),
        "W_dec": 2 * torch.randn(M, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
    }


def tokens():
    return 1.5 * torch.randn(40, D, generator=torch.Generator().manual_seed(9)) + 0.3


def ours(sae, x):
    """The normal form by its definition; the readout's own code is held to it by tests/feature/test_sae.py."""
    if sae.rescales:
        x = x * D**0.5 / x.norm(dim=-1, keepdim=True)
    pre = x @ sae.weight.T + sae.bias
    return torch.where(pre > sae.threshold, pre, torch.zeros_like(pre))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def saelens(config, held, x):
    """process_sae_in, then encode of the architecture."""
    w = {name: tensor.double() for name, tensor in held.items()}
    x = x.double()
    if config.get("normalize_activations") == "constant_norm_rescale":
        x = x * D**0.5 / x.norm(dim=-1, keepdim=True)
    x = x - w["b_dec"] * float(config.get("apply_b_dec_to_input", True))
    pre = x @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "standard":
        return pre.relu()
    if config["architecture"] == "jumprelu":
        return pre.relu() * (pre > w["threshold"].relu())
    if config.get("rescale_acts_by_decoder_norm"):
        pre = pre * w["W_dec"].norm(dim=-1)
    top = pre.topk(config["k"], dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def write_saelens(folder, config, held):
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M} | config))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("normalised", ["none", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_saelens_gives_its_own_activations(tmp_path, architecture, normalised, centred):
    held = tensors()
    if architecture == "jumprelu":
        held["threshold"] = torch.randn(M, generator=torch.Generator().manual_seed(4))  # some negative
    config = {"architecture": architecture, "normalize_activations": normalised, "apply_b_dec_to_input": centred}
    config["metadata"] = {"hook_name": "blocks.7.hook_resid_post"}
    write_saelens(tmp_path, config, held)
    found = import_sae(tmp_path)
    assert (found.hook, found.kind) == ("blocks.8", {"standard": "relu"}.get(architecture, architecture))
    assert found.token_length == ("as_is" if normalised == "none" else "sqrt_width")
    expected = saelens(config, held, tokens())
    assert 0.1 < float((expected > 0).double().mean()) < 0.9
    close(ours(found.sae, tokens()), expected)


@pytest.mark.parametrize("folds", [True, False])
def test_saelens_topk_is_equal_wherever_it_keeps_a_latent_and_positive_elsewhere(tmp_path, folds):
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": folds}
    write_saelens(tmp_path, config, tensors())
    expected = saelens(config, tensors(), tokens())
    found = ours(import_sae(tmp_path).sae, tokens())
    kept = expected > 0
    close(found[kept], expected[kept])
    assert bool((found[~kept] >= 0).all())
    assert int(kept.sum()) > 200


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "gated"}, "'gated' is not known"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "'layer_norm' is not known"),
        ({"architecture": "standard", "normalize_activations": "expected_average_only_in"}, "its factor folded in"),
        ({"architecture": "standard", "reshape_activations": "hook_z"}, "attention heads"),
        ({"architecture": "jumprelu"}, "holds no tensor 'threshold'"),
    ],
)
def test_saelens_that_one_row_cannot_express_is_refused(tmp_path, config, said):
    write_saelens(tmp_path, config, tensors())
    with pytest.raises(BundleError, match=said):
        import_sae(tmp_path)


def saev(held, x, activation, centre):
    w = {name: tensor.double() for name, tensor in held.items()}
    pre = (x.double() - (w["b_dec"] if centre else 0)) @ w["W_enc"] + w["b_enc"]
    if activation == "Relu":
        return pre.relu()
    top = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


HEADERS = {
    "before schemas": lambda name: {"d_vit": D, "exp_factor": 2, "l1_coeff": 1e-4},
    "schema 1": lambda name: {"schema": 1, "cls": name, "cfg": {"d_vit": D, "top_k": K}},
    "schema 2": lambda name: {"schema": 2, "cfg": {"d_vit": D, "activation": {"cls": name, "params": {"top_k": K}}}},
}


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("activation", ["Relu", "TopK", "BatchTopK"])
@pytest.mark.parametrize("form", HEADERS)
def test_saev_gives_its_own_activations(form, activation, centre):
    if form == "before schemas" and activation != "Relu":
        return  # there was no other
    found = from_saev(HEADERS[form](activation), tensors(), centre=centre)
    assert found.kind == ("relu" if activation == "Relu" else "topk")
    expected = saev(tensors(), tokens(), activation, centre)
    kept = expected > 0 if activation != "Relu" else torch.ones_like(expected, dtype=torch.bool)
    close(ours(found.sae, tokens())[kept], expected[kept])


def test_saev_of_another_schema_or_activation():
    with pytest.raises(BundleError, match="schema 9 is not known"):
        from_saev({"schema": 9, "cfg": {}}, tensors())
    with pytest.raises(BundleError, match="'Gelu' is not known"):
        from_saev(HEADERS["schema 2"]("Gelu"), tensors())
    with pytest.raises(BundleError, match="this is no saev autoencoder: it holds no tensor 'W_enc'"):
        from_saev({}, {"other": torch.zeros(2)})


class Encoder(torch.nn.Module):
    """overcomplete's MLPEncoder of one block: linear, norm; its codes are the ReLU."""

    def __init__(self, norm):
        super().__init__()
        self.final_block = torch.nn.Sequential(torch.nn.Linear(D, M), norm)

    def forward(self, x):
        pre = self.final_block(x)
        return pre, pre.relu()


def overcomplete(norm=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = Encoder(norm or torch.nn.BatchNorm1d(M))
        with torch.no_grad():
            for name, value in encoder.final_block[1].state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand(M) + (0.5 if "var" in name else -0.3))
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    return encoder.eval(), state | {"dictionary._weights": torch.zeros(M, D)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu"])
def test_overcomplete_gives_its_own_activations(kind):
    encoder, state = overcomplete()
    _, codes = encoder(tokens())
    expected, options = codes, {"kind": kind}
    if kind == "topk":
        top = codes.topk(K, dim=-1)
        expected = torch.zeros_like(codes).scatter(-1, top.indices, top.values)
    if kind == "batchtopk":
        options["threshold"] = 0.7
        expected = codes * (codes >= 0.7)
    if kind == "jumprelu":
        state["thresholds"] = torch.linspace(-3, 0.5, M)
        expected = torch.where(codes < state["thresholds"].exp(), 0, codes)
        options = {}
    found = from_overcomplete(state, **options)
    assert found.kind == kind
    kept = expected > 0 if kind == "topk" else torch.ones_like(expected, dtype=torch.bool)
    close(ours(found.sae, tokens())[kept], expected[kept])


def test_overcomplete_that_cannot_be_told_or_read():
    _, state = overcomplete()
    with pytest.raises(ConfigError, match="give the kind"):
        from_overcomplete(state)
    with pytest.raises(ConfigError, match="--threshold"):
        from_overcomplete(state, kind="batchtopk")
    with pytest.raises(BundleError, match="layer norm mixes all latents"):
        from_overcomplete(overcomplete(torch.nn.LayerNorm(M))[1], kind="relu")
    with pytest.raises(BundleError, match="several layers"):
        from_overcomplete(state | {"encoder.mlp_blocks.0.0.weight": torch.zeros(1)}, kind="relu")


def test_a_linear_probe_is_its_logits(tmp_path):
    weight, bias = torch.randn(5, D, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)
    save_file({"weight": weight, "bias": bias}, tmp_path / "probe.safetensors")
    found = import_sae(tmp_path / "probe.safetensors")
    assert found.kind == "linear"
    logits = tokens() @ weight.T + bias
    assert bool((logits < 0).any())
    close(ours(found.sae, tokens()), logits)
    found.write(tmp_path / "sae")
    (tmp_path / "sae/config.json").write_text('{"kind": "linear", "hook": "norm"}')
    again = import_sae(tmp_path / "sae")
    assert torch.equal(again.sae.threshold, found.sae.threshold)
    assert from_probe({"weight": weight[0]}).sae.num_latents == 1
    with pytest.raises(BundleError, match=r"got \[5, 12\] and \[4\]"):
        from_probe({"weight": weight, "bias": bias[:4]})


def test_a_pickled_autoencoder_is_sent_to_convert(tmp_path):
    (tmp_path / "sae.pt").write_bytes(b"anything")
    with pytest.raises(ConfigError, match="tiltscope convert"):
        import_sae(tmp_path / "sae.pt")
