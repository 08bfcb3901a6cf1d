"""Decoders of latents are diffusers' own, and the trunk behind one reads what the two give one after the other."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import write_convnext, write_dit, write_kl, write_tiny_autoencoder

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.decoded import DecodedTrunk
from tiltscope.engine.feature.feature import Feature, check_activation
from tiltscope.engine.feature.hooked import CPU
from tiltscope.engine.feature.readout import read
from tiltscope.engine.feature.sae import SparseAutoencoder
from tiltscope.engine.feature.trunk import load_trunk
from tiltscope.engine.prior.decoder import load_decoder
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.step import TorchStep

LATENT = (4, 16, 16)
WRITERS = {
    "kl": write_kl,
    "kl, shifted": lambda folder: write_kl(folder, shift_factor=0.3, use_post_quant_conv=False),
    "tiny": write_tiny_autoencoder,
}


def latents(num=2, shape=LATENT, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=WRITERS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    return WRITERS[request.param](folder), folder


@torch.no_grad()
def test_it_is_the_librarys_decode(pair):
    model, folder = pair
    decoder = load_decoder(folder, shape=LATENT)
    x0 = latents()
    expected = model.decode(x0 / model.config.scaling_factor + (model.config.shift_factor or 0.0)).sample
    assert decoder.picture_shape == tuple(expected.shape[1:]) == (3, 32, 32)
    assert (decoder(x0) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not [name for name in decoder.state_dict() if name.startswith(("encoder", "quant_conv"))]


def test_its_gradient_is_that_of_finite_differences(pair):
    decoder = load_decoder(pair[1], shape=(4, 4, 4)).in_dtype(torch.float64, CPU)
    x0 = latents(1, (4, 4, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decoder(x).square().mean(), x0, fast_mode=True)


def test_old_names_of_attention_load_too(tmp_path):
    write_kl(tmp_path)
    x0 = latents()
    expected = load_decoder(tmp_path, shape=LATENT)(x0)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        if "attentions" in name:
            for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                if f".{new}." in name:
                    name, tensor = name.replace(f".{new}.", f".{was}."), tensor
                    tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor.contiguous()
    assert any(".proj_attn." in name for name in old)
    save_file(old, path)
    assert torch.equal(load_decoder(tmp_path, shape=LATENT)(x0), expected)


@torch.no_grad()
def test_statistics_of_the_latents_stand_in_for_scale_and_shift(tmp_path):
    """As diffusers' pipelines read them: x0 std/scaling_factor + mean, channel by channel."""
    vae = write_kl(tmp_path)
    mean, std = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]
    path = tmp_path / "config.json"
    told = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5, "shift_factor": 7.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    x0 = latents()
    raw = x0 * torch.tensor(std).view(-1, 1, 1) / 0.5 + torch.tensor(mean).view(-1, 1, 1)
    expected = vae.decode(raw).sample
    torch.testing.assert_close(load_decoder(tmp_path, shape=LATENT)(x0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "VQModel"}, "allowed: AutoencoderKL, AutoencoderTiny"),
        ({"latent_channels": 16}, "latent_channels is 16, but samples of the prior have 4"),
        ({"latents_mean": [0.0] * 4}, "must both hold 4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 2.0, 0.0, 1.0]}, "the latter positive"),
        ({"block_out_channels": [8, 16]}, r"of another shape \(decoder\."),
        ({"up_block_types": ["Mystery", "Mystery"]}, "does not describe an AutoencoderKL"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, values, message):
    write_kl(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(BundleError, match=message):
        load_decoder(tmp_path, shape=LATENT)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Latents of 16x16, pictures of 32x32, a trunk that reads 48x48."""
    folder = tmp_path_factory.mktemp("parts")
    vae = write_kl(folder / "vae")
    write_convnext(folder / "trunk")
    write_dit(folder / "prior", sample_size=16)
    trunk = load_trunk(folder / "trunk", "stages.2.1", image_size=(48, 48))
    decoder = load_decoder(folder / "vae", shape=LATENT)
    prior = Prior.from_network(
        load_denoiser(folder / "prior", kind="diffusers_dit", shape=LATENT),
        shape=LATENT,
        name="latent",
        identity="sha256:0",
        decoder=decoder,
    )
    return vae, trunk, decoder, prior


@torch.no_grad()
def test_the_trunk_reads_the_decoded_and_resized_picture(parts):
    vae, trunk, decoder, _ = parts
    x0 = latents()
    picture = vae.decode(x0 / vae.config.scaling_factor).sample
    expected = trunk(F.interpolate(picture, size=(48, 48), mode="bilinear", antialias=True))
    found = DecodedTrunk(trunk, shape=LATENT, decoder=decoder)(x0)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    pixels = DecodedTrunk(trunk, shape=(3, 32, 32))
    assert (pixels(picture) - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ConfigError, match=r"\[batch, 4, 16, 16\]; got \[2, 3, 32, 32\]"):
        DecodedTrunk(trunk, shape=LATENT, decoder=decoder)(picture)


def test_the_step_guides_latents_through_the_decoder(parts):
    """grad_a in float64 against finite differences of the whole chain, and float32 near it."""
    _, trunk, decoder, prior = parts
    whole = DecodedTrunk(trunk, shape=LATENT, decoder=decoder)
    sae = SparseAutoencoder(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) / 4, *torch.zeros(2, 2))
    feature = Feature.from_readout(whole, sae.readout(slice(0, 1), whole), name="latent")
    check_activation(feature, LATENT, torch.float32)
    exact, exact_prior = feature.to(torch.float64), prior.to(torch.float64)
    assert exact.trunk.dtype == torch.float64
    assert exact.to(torch.float32) is feature
    x, sigma = latents(2, seed=3).double(), torch.tensor([0.4, 0.8]).double()
    alpha = torch.sqrt(1 - sigma**2)
    out = TorchStep(exact_prior, exact).guided(x, sigma, alpha, exact.readout.expand(2))
    towards = latents(2, seed=4).double()
    step = 1e-5

    def drive(at):
        return read(exact.trunk(exact_prior.denoise(at, sigma)), exact.readout)[1].sum()

    slope = (drive(x + step * towards) - drive(x - step * towards)) / (2 * step)
    torch.testing.assert_close((out.grad_a * towards).sum(), slope, rtol=1e-6, atol=0)
    near = TorchStep(prior, feature).guided(x.float(), sigma, alpha, feature.readout.expand(2))
    assert (near.grad_a - out.grad_a).abs().max() < 1e-4 * out.grad_a.abs().max()
    assert exact_prior.decoder is decoder


def test_pictures_come_from_the_decoder(parts):
    vae, _, _, prior = parts
    assert prior.pictures
    x0 = latents(3)
    with torch.no_grad():
        picture = vae.decode(x0 / vae.config.scaling_factor).sample
    images = prior.to_images(x0)
    assert images.dtype == torch.uint8
    off = (images.float() - ((picture + 1) * 127.5).clamp(0, 255)).abs()
    assert float(off.max()) <= 0.501
    with pytest.raises(ConfigError, match="no pictures and have no decoder"):
        Prior(lambda x, sigma: x, shape=(4, 2, 2)).decode(x0)
