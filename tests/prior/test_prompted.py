"""Stable Diffusion's U-Net from its pipeline's own folders: the empty prompt's tokens and the network are the library's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_stable_diffusion

from tiltscope.engine.bundling import prompt
from tiltscope.engine.bundling.parts import find_prior
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.prior.prompted import PROMPT, TOKENS

KIND, SHAPE = "diffusers_unet2d_condition", (4, 16, 16)
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype`")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(the library's pipeline, its folder)"""
    folder = tmp_path_factory.mktemp("sd")
    return write_stable_diffusion(folder), folder


@pytest.fixture(scope="module")
def copied(pipeline, tmp_path_factory):
    """What `tiltscope bundle` makes of it."""
    out = tmp_path_factory.mktemp("bundle")
    prior, decoder = find_prior(pipeline[1], decoder=None, pixel_unshuffle=1)
    assert (prior.section["kind"], prior.section["shape"]) == (KIND, list(SHAPE))
    for part in (prior, decoder):
        part.copy(out)
    return out / "prior"


def noise(num):
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(num))


@torch.no_grad()
def test_the_tokens_are_the_pipelines_own_empty_prompt(pipeline, copied):
    (tokens,) = load_file(copied / PROMPT).values()
    expected = pipeline[0].encode_prompt("", "cpu", 1, False)[0]
    assert tokens.shape == (1, 77, 12)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, pipeline[0].encode_prompt("a", "cpu", 1, False)[0])


@torch.no_grad()
def test_the_network_is_the_librarys_at_the_empty_prompt(pipeline, copied):
    denoiser = load_denoiser(copied, kind=KIND, shape=SHAPE)
    x, time = noise(3), torch.tensor([3, 400, 900])
    sigma = torch.from_numpy(denoiser.levels[::-1].copy())[time]
    alpha = torch.sqrt(1 - sigma**2)
    eps_hat = (x - alpha.view(-1, 1, 1, 1) * denoiser(x, sigma).double()) / sigma.view(-1, 1, 1, 1)
    whole = pipeline[0]
    expected = whole.unet(x, time, encoder_hidden_states=whole.encode_prompt("", "cpu", 3, False)[0]).sample
    # The library embeds time in float32: 3e-5 of its phase, most of which the layers keep to themselves.
    assert float((eps_hat - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_no_batch_mate_changes_a_bit(copied):
    denoiser = load_denoiser(copied, kind=KIND, shape=SHAPE)
    x, sigma = noise(8), torch.linspace(0.1, 0.95, 8, dtype=torch.float64)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    assert torch.equal(denoiser(x, sigma)[order], denoiser(x[order], sigma[order]))


def test_other_precisions_take_the_prompt_along(copied):
    denoiser = load_denoiser(copied, kind=KIND, shape=SHAPE)
    x, sigma = noise(2), torch.tensor([0.3, 0.8]).double()
    wide = denoiser.in_dtype(torch.float64)(x.double(), sigma)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(denoiser(x, sigma).double(), wide, rtol=1e-4, atol=1e-5)


def test_a_folder_with_its_tokens_needs_no_text_encoder(pipeline, copied, tmp_path):
    """And without either it is said what to do."""
    _, folder = pipeline
    alone = tmp_path / "alone"
    shutil.copytree(folder / "unet", alone)
    shutil.copy(folder / "scheduler/scheduler_config.json", alone)
    with pytest.raises(
        ConfigError, match=r"conditioned on text, and .*text_encoder is not there; give the whole pipeline"
    ):
        find_prior(alone, decoder=folder / "vae", pixel_unshuffle=1)
    shutil.copy(copied / PROMPT, alone)
    prior, _ = find_prior(alone, decoder=folder / "vae", pixel_unshuffle=1)
    prior.copy(tmp_path / "out")
    assert (tmp_path / "out/prior" / PROMPT).read_bytes() == (copied / PROMPT).read_bytes()


def test_tokens_of_another_width_and_a_network_that_wants_more_are_refused(copied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(copied, other)
    save_file({TOKENS: torch.zeros(1, 77, 8)}, other / PROMPT)
    with pytest.raises(
        BundleError, match=r"must be \[1, tokens, 12\], the network's cross_attention_dim; got \[1, 77, 8\]"
    ):
        load_denoiser(other, kind=KIND, shape=SHAPE)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"addition_embed_type": "text_time"}))
    with pytest.raises(BundleError, match="addition_embed_type must be None here, got 'text_time'"):
        load_denoiser(other, kind=KIND, shape=SHAPE)


def test_a_pickled_text_encoder_is_not_opened(pipeline, tmp_path):
    _, folder = pipeline
    other = tmp_path / "pipeline"
    shutil.copytree(folder, other)
    (other / "text_encoder/model.safetensors").rename(other / "text_encoder/pytorch_model.bin")
    with pytest.raises(BundleError, match="text encoder or tokenizer does not load"):
        prompt.empty_prompt(other)
