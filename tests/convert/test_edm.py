"""EDM's and EDM2's networks under their authors' names give, once converted, what their own forward gives.

The reference is a plain transcription, tests/edm_originals.py.
"""

import copy
import json

import pytest
import torch
from edm_originals import HEAD, SIDE, Preconditioned, Whole
from safetensors.torch import load_file, save_file
from tiny_models import fill, pictures

from tiltscope.engine.bundling.parts import find_prior
from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.convert.edm import after_a_box
from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.load import load_denoiser

WITHIN = 1e-5


KINDS = ("ddpmpp", "ncsnpp", "adm", "edm2")
SETTINGS = ConvertSettings(head_channels=HEAD)


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fill(Whole() if kind == "edm2" else Preconditioned(kind))
    for name, p in model.named_parameters():
        if name.endswith("_gain"):  # zeros would hide what they multiply
            p.fill_(0.7)
    return model


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = made(request.param)
    save_file(model.state_dict(), folder / "edm.safetensors")
    said = convert(folder / "edm.safetensors", folder / "out", SETTINGS)
    assert "3 channels of 16x16" in said
    return model, folder


def edm_denoised(model, x, ratio):
    """EDMPrecond: D(x; ratio) of x = x0 + ratio eps."""
    s = ratio.view(-1, 1, 1, 1)
    output = model(x / (s**2 + 0.25).sqrt(), ratio.log() / 4)
    return 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * output


@torch.no_grad()
def test_the_denoiser_is_the_authors_own(case):
    model, folder = case
    denoiser = load_denoiser(folder / "out", kind="edm", shape=(3, SIDE, SIDE))
    assert denoiser.prediction == "edm"
    # In float64: frequencies of 16 and more turn a float32 phase by 1e-5.
    ratio, authors = torch.tensor([0.003, 0.4, 2.0, 70.0]).double(), copy.deepcopy(model).double()
    noise = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    x = (pictures(4, side=SIDE) + ratio.view(-1, 1, 1, 1) * noise).float()
    expected = edm_denoised(authors, x.double(), ratio)
    alpha = 1 / torch.hypot(torch.ones(4).double(), ratio)
    found = denoiser((x * alpha.view(-1, 1, 1, 1)).float(), ratio * alpha)
    assert float((found - expected).abs().max()) < WITHIN * float(expected.abs().max())
    # The network itself, at a level where the skip hides nothing.
    output, wanted = denoiser.network(x, ratio.log() / 4)[0], authors(x.double(), ratio.log() / 4)
    assert float((output - wanted).abs().max()) < WITHIN * float(wanted.abs().max())


def test_its_input_gradient_is_the_authors_own(case):
    model, folder = case
    network = load_denoiser(folder / "out", kind="edm", shape=(3, SIDE, SIDE)).network
    t = torch.tensor([-0.5, 0.8]).double()
    authors = copy.deepcopy(model).double()
    direction = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))

    def gradient(forward, dtype):
        x = pictures(2, side=SIDE).to(dtype).requires_grad_()
        return torch.autograd.grad((forward(x) * direction).sum(), x)[0]

    found, wanted = (
        gradient(lambda x: network(x, t)[0], torch.float32),
        gradient(lambda x: authors(x, t), torch.float64),
    )
    assert float((found - wanted).abs().max()) < WITHIN * float(wanted.abs().max())


@torch.no_grad()
def test_no_batch_mate_changes_a_bit(case):
    _, folder = case
    denoiser = load_denoiser(folder / "out", kind="edm", shape=(3, SIDE, SIDE))
    x, sigma = pictures(5, side=SIDE), torch.tensor([0.1, 0.5, 0.7, 0.9, 0.99]).double()
    together, order = denoiser(x, sigma), torch.arange(5).roll(1)
    assert torch.equal(denoiser(x[order], sigma[order]), together[order])
    strangers, levels = pictures(5, side=SIDE, seed=9), sigma.flip(0).clone()
    strangers[1], levels[1] = x[3], sigma[3]
    assert torch.equal(denoiser(strangers, levels)[1], together[3])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ncsnpp", "edm2"])
def test_frequencies_stay_exact_in_half_precision(kind, tmp_path):
    """In bfloat16 a phase of 100 would be off by a quarter."""
    model = made(kind)
    save_file(model.state_dict(), tmp_path / "edm.safetensors")
    convert(tmp_path / "edm.safetensors", tmp_path / "out", SETTINGS)
    half = load_denoiser(tmp_path / "out", kind="edm", shape=(3, SIDE, SIDE)).in_dtype(torch.bfloat16).network
    t = torch.tensor([-1.4, 1.09]).double()
    if kind == "edm2":
        found, wanted = half.time_proj(t), model.unet.emb_fourier.double()(t)
    else:
        found, wanted = half.time_proj(t), model.model.map_noise.double()(t)
        wanted = torch.cat(wanted.chunk(2, dim=1)[::-1], dim=1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert half.enc["16x16_conv"].weight.dtype == torch.bfloat16


def test_a_bundle_takes_its_shape_from_it(case):
    prior, decoder = find_prior(case[1] / "out", decoder=None, pixel_unshuffle=1)
    assert decoder is None
    assert (prior.section["kind"], prior.section["shape"]) == ("edm", [3, SIDE, SIDE])


def test_missing_extra_and_foreign_tensors_are_named(case, tmp_path):
    _, folder = case
    held = load_file(folder / "out/diffusion_pytorch_model.safetensors")
    config = (folder / "out/config.json").read_text()
    gone = next(name for name in held if name.startswith("dec.16x16_block0"))
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "scheduler_config.json").write_text((folder / "out/scheduler_config.json").read_text())
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in held.items() if name != gone}, weights)
    with pytest.raises(BundleError, match=f"1 missing \\({gone}\\)"):
        load_denoiser(tmp_path, kind="edm", shape=(3, SIDE, SIDE))
    save_file(held | {"map_label.weight": torch.zeros(1)}, weights)
    with pytest.raises(BundleError, match=r"1 not known \(map_label.weight\)"):
        load_denoiser(tmp_path, kind="edm", shape=(3, SIDE, SIDE))
    with pytest.raises(BundleError, match="samples of the bundle are"):
        load_denoiser(folder / "out", kind="edm", shape=(3, 32, 32))
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"width": 3}))
    with pytest.raises(BundleError, match="does not describe"):
        load_denoiser(tmp_path, kind="edm", shape=(3, SIDE, SIDE))


@pytest.mark.parametrize("name", ["map_label.weight", "enc.8x8_aux_skip.weight"])
def test_what_the_network_cannot_be_asked_is_refused(name, tmp_path):
    tensors = made("ddpmpp").state_dict() | {f"model.{name}": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "edm.safetensors")
    with pytest.raises(BundleError, match=name):
        convert(tmp_path / "edm.safetensors", tmp_path / "out", SETTINGS)


def test_a_filter_is_a_box_and_what_comes_after():
    assert after_a_box([0.5, 0.5]) == [1.0]
    assert after_a_box([0.125, 0.375, 0.375, 0.125]) == [0.25, 0.5, 0.25]
    for odd in ([0.25, 0.5, 0.25], [0.1, 0.4, 0.4, 0.2]):
        with pytest.raises(BundleError, match="even number"):
            after_a_box(odd)
