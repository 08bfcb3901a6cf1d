"""Autoencoders in normal form against their definitions, and convolutional ones against torch's convolution."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import pictures, write_convnext

from tiltscope.engine.errors import BundleError
from tiltscope.engine.feature.readout import Readout, pool, pre_activations, read
from tiltscope.engine.feature.sae import SparseAutoencoder, load_sae, normal_form
from tiltscope.engine.feature.trunk import load_trunk

HOOK, GRID, WIDTH, LATENTS = "stages.2.1", (4, 4), 16, 10


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def encoder(window=(7, 7), seed=3):
    weight = numbers(LATENTS, WIDTH, *window, seed=seed) / (WIDTH * torch.Size(window).numel()) ** 0.5
    return weight, 0.1 * numbers(LATENTS, seed=seed + 1), 0.05 * numbers(LATENTS, seed=seed + 2).abs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convnext")
    write_convnext(folder)
    return folder


@pytest.fixture(scope="module")
def trunk(folder):
    return load_trunk(folder, HOOK)


def convolved(tokens, weight, bias):
    """torch's own convolution, pad so that the grid stays: [batch, latents, tokens]."""
    maps = tokens.transpose(1, 2).unflatten(2, GRID)
    return F.conv2d(maps, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2)).flatten(2)


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (1, 1)])
def test_a_convolutional_row_is_torchs_convolution(trunk, window):
    """Some rows of the encoder alone: what the whole encoder gives for them."""
    weight, bias, threshold = encoder(window)
    tokens = trunk(pictures())
    readout = SparseAutoencoder(weight, bias, threshold).readout(slice(2, 6), trunk, pooling="max")
    expected = convolved(tokens, weight, bias)[:, 2:6]
    found = pre_activations(tokens, readout)
    # 1e-6 of the largest: sums of some 800 float32 products.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    activation, drive = read(tokens, readout)
    latents = torch.where(expected > threshold[2:6, None], expected, 0.0)
    torch.testing.assert_close(activation, latents.amax(-1).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drive, expected.amax(-1).sum(-1), rtol=1e-5, atol=1e-5)


def test_its_gradient_is_torchs(trunk):
    weight, bias, threshold = (each.double() for each in encoder())
    sae = SparseAutoencoder(*encoder())
    tokens = trunk.in_dtype(torch.float64)(pictures().double())
    readout = sae.readout(slice(0, 4), trunk, pooling="centre").to(torch.float64)
    results = []
    for pre in (lambda t: pre_activations(t, readout), lambda t: convolved(t, weight, bias)[:, :4]):
        x = tokens.detach().requires_grad_()
        value = pool(pre(x), readout.expand(3).pooling, readout.expand(3).mask.flatten(2)).sum()
        results.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)
    assert float(threshold.min()) >= 0


def test_readouts_of_one_batch_are_each_samples_own(trunk):
    """Different windows for different samples, and a batch in which nobody's bits depend on the others."""
    sae = SparseAutoencoder(*encoder())
    tokens = trunk(pictures(4))
    each = [sae.readout(slice(k, k + 2), trunk) for k in range(4)]
    together = torch.stack(read(tokens, Readout.stack(each)))
    for at, readout in enumerate(each):
        alone = torch.stack(read(tokens[[at] * 4], Readout.stack([readout] * 4)))
        assert torch.equal(together[:, at], alone[:, 0])


def test_linear_rows_join_windows_in_a_signed_sum(trunk):
    sae = SparseAutoencoder(*encoder())
    tokens = trunk(pictures())
    linear = SparseAutoencoder(sae.weight[..., 3, 3], sae.bias, sae.threshold).readout(slice(1, 2), trunk)
    window = sae.readout(slice(0, 1), trunk)
    both = Readout.concat([window.scale(2.0), linear.scale(-1.0).as_window(sae.window, trunk.grid)]).pad(4)
    for found, one, other in zip(read(tokens, both), read(tokens, window), read(tokens, linear), strict=True):
        torch.testing.assert_close(found, 2 * one - other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"window \(7, 7\).*window \(3, 3\)"):
        window.as_window((3, 3), trunk.grid)


def test_all_latents_are_the_ones_that_sampling_reads(trunk):
    sae = SparseAutoencoder(*encoder())
    tokens = trunk(pictures())
    all_of_them = sae.latents(tokens, trunk)
    assert all_of_them.shape == (3, LATENTS)
    for k in range(LATENTS):
        torch.testing.assert_close(all_of_them[:, k], read(tokens, sae.readout(slice(k, k + 1), trunk))[0])


# Tokens of one length.


def test_rescaled_tokens_have_length_sqrt_width_and_the_gradient_through_that(trunk, folder):
    x0 = pictures()
    raw, unit = trunk(x0), trunk.rescaled()(x0)
    expected = raw * WIDTH**0.5 / raw.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit, expected, rtol=1e-5, atol=1e-6)
    assert trunk.rescaled().hook != trunk.hook
    assert torch.equal(trunk(x0), raw)
    exact = trunk.rescaled().in_dtype(torch.float64)
    assert exact.rescales
    assert not trunk.in_dtype(torch.float64).rescales
    assert torch.autograd.gradcheck(
        lambda x: exact(x)[:, 0].sum(), pictures(1).double().requires_grad_(), fast_mode=True
    )


# Normal form.


def latents_as_trained(tokens, weight, bias, threshold, centre, scale, decoder):
    """The definition, folded into nothing: [batch, tokens, latents], times the length of what a latent adds."""
    pre = (tokens * scale - centre) @ weight.T + bias
    return torch.where(pre > threshold, pre, 0.0) * decoder.norm(dim=1)


def test_folding_changes_nothing():
    weight, bias, threshold = (each.double() for each in encoder(window=()))
    tokens, centre = numbers(2, 5, WIDTH, seed=8, dtype=torch.float64), numbers(WIDTH, seed=9, dtype=torch.float64)
    decoder = numbers(LATENTS, WIDTH, seed=10, dtype=torch.float64)
    folded = normal_form(weight, bias, threshold, centre=centre, input_scale=1.7, decoder=decoder)
    pre = tokens @ folded.weight.T + folded.bias
    found = torch.where(pre > folded.threshold, pre, 0.0)
    expected = latents_as_trained(tokens, weight, bias, threshold, centre, 1.7, decoder)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert 0.1 < float((expected > 0).double().mean()) < 0.9


def test_a_dead_latent_without_a_threshold_stays_a_number():
    weight, bias, _ = encoder(window=())
    decoder = torch.ones(LATENTS, WIDTH)
    decoder[0] = 0
    folded = normal_form(weight, bias, torch.full((LATENTS,), -torch.inf), decoder=decoder)
    assert folded.threshold[0] == -torch.inf
    assert not folded.bias.isnan().any()


def test_a_centre_before_a_convolution_is_refused():
    with pytest.raises(BundleError, match="differs at the edge"):
        normal_form(*encoder(), centre=torch.zeros(WIDTH))


def test_top_k_is_the_row_wherever_the_latent_is_kept_and_0_elsewhere(trunk):
    """What reading one row instead of all of them costs, as the module's docstring says."""
    weight, bias, _ = encoder()
    tokens = trunk(pictures(8))
    pre = convolved(tokens, weight, bias).relu()
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0).bool()
    top_k = torch.where(kept, pre, 0.0)
    rows = SparseAutoencoder(weight, bias, torch.zeros(LATENTS)).readout(slice(None), trunk)
    alone = pre_activations(tokens, rows).relu()
    torch.testing.assert_close(alone[kept], top_k[kept], rtol=1e-5, atol=1e-5)
    assert bool((alone >= top_k - 1e-5).all())
    assert float((alone[~kept] > 0).float().mean()) > 0.05  # the difference is there


# Files.


def written(path, **tensors):
    save_file({name.replace("__", "."): t.contiguous() for name, t in tensors.items()}, path)
    return path


def test_kinds_of_files(tmp_path):
    weight, bias, threshold = encoder()
    plain = written(tmp_path / "a.safetensors", encoder__weight=weight, encoder__bias=bias)
    full = written(tmp_path / "b.safetensors", encoder__weight=weight, encoder__bias=bias, threshold=threshold)
    assert torch.equal(load_sae(plain, kind="topk").threshold, torch.zeros(LATENTS))
    assert torch.equal(load_sae(full, kind="batchtopk", token_length="sqrt_width").threshold, threshold)
    assert load_sae(full, token_length="sqrt_width").rescales
    assert load_sae(full).window == (7, 7)
    for kind in ("jumprelu", "batchtopk"):
        with pytest.raises(BundleError, match=rf"no tensor 'threshold'.*of kind {kind} needs"):
            load_sae(plain, kind=kind)
    with pytest.raises(BundleError, match=r"sae kind 'gated' is not known; allowed: jumprelu, batchtopk, relu, topk"):
        load_sae(full, kind="gated")
    with pytest.raises(BundleError, match="token_length 'l2' is not known; allowed: as_is, sqrt_width"):
        load_sae(full, token_length="l2")
    even = written(tmp_path / "c.safetensors", encoder__weight=weight[..., :6], encoder__bias=bias)
    with pytest.raises(BundleError, match="must be odd"):
        load_sae(even, kind="relu")
    flat = written(tmp_path / "d.safetensors", encoder__weight=weight[..., 0], encoder__bias=bias)
    with pytest.raises(BundleError, match=r"\[M, d\] or \[M, d, h, w\]"):
        load_sae(flat, kind="relu")


def test_an_autoencoder_that_does_not_fit_its_hook(trunk, folder):
    weight, bias, threshold = encoder()
    with pytest.raises(BundleError, match=r"reads 8 channels, the trunk has 16"):
        SparseAutoencoder(weight[:, :8], bias, threshold).check_trunk(trunk)
    norm = load_trunk(folder, "norm")
    wide = SparseAutoencoder(numbers(LATENTS, norm.width, 3, 3), bias, threshold)
    with pytest.raises(BundleError, match="1 tokens beside it"):
        wide.check_trunk(norm)
