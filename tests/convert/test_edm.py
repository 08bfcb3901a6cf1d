"""EDM's and EDM2's networks under their authors' names give, once converted, what their own forward gives.

The reference is a plain transcription of networks.py and networks_edm2.py: transposed convolutions, filters and weight lengths as
they stand there, where ours are a box and a smoothing and weights that were folded once.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import fill, pictures
from torch import nn

from tiltscope.engine.bundling.parts import find_prior
from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.convert.edm import after_a_box
from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.load import load_denoiser

SIDE, WIDTH, MULTIPLES, PER_LEVEL, ATTENDS = 16, 32, (1, 2), 2, (8,)
HEAD = 16
WITHIN = 1e-5


def filter_of(weights):
    f = torch.tensor(weights, dtype=torch.float32)
    return (f[:, None] * f[None, :])[None, None] / f.sum() ** 2


class Conv(nn.Module):
    """EDM's Conv2d: a filter of its own where it resamples; `fused`, the convolution first."""

    def __init__(self, inputs, outputs, kernel, *, up=False, down=False, weights=(1, 1), fused=False):
        super().__init__()
        self.up, self.down, self.fused = up, down, fused
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        self.register_buffer("resample_filter", filter_of(weights) if up or down else None)

    def forward(self, x):
        f = self.resample_filter
        edge = 0 if f is None else (f.shape[-1] - 1) // 2
        if self.fused:
            x = F.conv2d(x, self.weight, padding=1 + edge)
            x = F.conv2d(x, f.tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], stride=2)
            return x + self.bias[:, None, None]
        channels = x.shape[1]
        if self.up:
            x = F.conv_transpose2d(x, (4 * f).tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=edge)
        if self.down:
            x = F.conv2d(x, f.tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=edge)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def norm(channels, eps):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Block(nn.Module):
    def __init__(self, inputs, outputs, *, song, weights=(1, 1), up=False, down=False, attends=False):
        super().__init__()
        eps = 1e-6 if song else 1e-5
        self.song, self.inputs = song, inputs
        way = {"up": up, "down": down, "weights": weights}
        self.norm0, self.conv0 = norm(inputs, eps), Conv(inputs, outputs, 3, **way)
        self.affine = nn.Linear(4 * WIDTH, outputs if song else 2 * outputs)
        self.norm1, self.conv1 = norm(outputs, eps), Conv(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            self.skip = Conv(inputs, outputs, 1 if song or inputs != outputs else 0, **way)
        self.heads = (1 if song else outputs // HEAD) if attends else 0
        if attends:
            self.norm2, self.qkv, self.proj = (
                norm(outputs, eps),
                Conv(outputs, 3 * outputs, 1),
                Conv(outputs, outputs, 1),
            )

    def forward(self, x, emb):
        scale = math.sqrt(0.5) if self.song else 1.0
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(emb)[:, :, None, None]
        if self.song:
            h = F.silu(self.norm1(h + told))
        else:
            gain, shift = told.chunk(2, dim=1)
            h = F.silu(shift + self.norm1(h) * (gain + 1))
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * scale
        if self.heads:
            b, c = x.shape[:2]
            q, k, v = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, -1).unbind(2)
            w = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
            x = (self.proj(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape)) + x) * scale
        return x


class Fourier(nn.Module):
    def __init__(self, num):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num // 2))

    def forward(self, t):
        phase = t[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class Positions(nn.Module):
    def __init__(self, num, endpoint):
        super().__init__()
        self.num, self.endpoint = num, endpoint

    def forward(self, t):
        half = self.num // 2
        frequency = (1 / 10000) ** (torch.arange(half) / (half - (1 if self.endpoint else 0)))
        phase = t[:, None] * frequency
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNet(nn.Module):
    """kind: ddpmpp, ncsnpp (both SongUNet) or adm (DhariwalUNet)."""

    def __init__(self, kind):
        super().__init__()
        song, rich = kind != "adm", kind == "ncsnpp"
        self.song = song
        weights = (1, 3, 3, 1) if rich else (1, 1)
        noise = 2 * WIDTH if rich else WIDTH
        self.map_noise = Fourier(noise) if rich else Positions(noise, endpoint=song)
        self.map_augment = nn.Linear(9, noise, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(noise, 4 * WIDTH), nn.Linear(4 * WIDTH, 4 * WIDTH)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        made = {"song": song, "weights": weights}
        width, beside, kept = WIDTH, 3, [WIDTH]
        for level, multiple in enumerate(MULTIPLES):
            side = SIDE >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(3, WIDTH, 3)
            else:
                self.enc[f"{side}x{side}_down"] = Block(width, width, down=True, **made)
                kept.append(width)
                if rich:
                    self.enc[f"{side}x{side}_aux_residual"] = Conv(
                        beside, width, 3, down=True, weights=weights, fused=True
                    )
                    beside = width
            for at in range(PER_LEVEL):
                self.enc[f"{side}x{side}_block{at}"] = Block(width, multiple * WIDTH, attends=side in ATTENDS, **made)
                width = multiple * WIDTH
                kept.append(width)
        for level, multiple in reversed(list(enumerate(MULTIPLES))):
            side = SIDE >> level
            if level == len(MULTIPLES) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(width, width, attends=True, **made)
                self.dec[f"{side}x{side}_in1"] = Block(width, width, **made)
            else:
                self.dec[f"{side}x{side}_up"] = Block(width, width, up=True, **made)
            for at in range(PER_LEVEL + 1):
                attends = side in ATTENDS and (not song or at == PER_LEVEL)
                self.dec[f"{side}x{side}_block{at}"] = Block(
                    width + kept.pop(), multiple * WIDTH, attends=attends, **made
                )
                width = multiple * WIDTH
        if song:
            self.dec[f"{SIDE}x{SIDE}_aux_norm"] = norm(width, 1e-6)
            self.dec[f"{SIDE}x{SIDE}_aux_conv"] = Conv(width, 3, 3)
        else:
            self.out_norm, self.out_conv = norm(width, 1e-5), Conv(width, 3, 3)

    def forward(self, x, t):
        emb = self.map_noise(t)
        if self.song:
            emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        kept, aux = [], x
        for name, block in self.enc.items():
            if "aux_residual" in name:
                x = kept[-1] = aux = (x + block(aux)) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, Block) else block(x)
                kept.append(x)
        for name, block in self.dec.items():
            if "aux_norm" in name:
                x = F.silu(block(x))
            elif "aux_conv" in name:
                return block(x)
            else:
                if x.shape[1] != block.inputs:
                    x = torch.cat([x, kept.pop()], dim=1)
                x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


def normalised(x, dims):
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / (1e-4 + length * math.sqrt(length.numel() / x.numel()))


def silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


class MPConv(nn.Module):
    def __init__(self, inputs, outputs, *kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))

    def forward(self, x, gain=1.0):
        w = normalised(self.weight, tuple(range(1, self.weight.ndim)))
        w = w * (gain / math.sqrt(w[0].numel()))
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(nn.Module):
    def __init__(self, num):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num))

    def forward(self, t):
        return (torch.outer(t, self.freqs) + self.phases).cos() * math.sqrt(2)


class MPBlock(nn.Module):
    def __init__(self, inputs, outputs, *, encodes, mode="keep", attends=False):
        super().__init__()
        self.encodes, self.mode = encodes, mode
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outputs if encodes else inputs, outputs, 3, 3)
        self.emb_linear = MPConv(2 * WIDTH, outputs)
        self.conv_res1 = MPConv(outputs, outputs, 3, 3)
        self.conv_skip = MPConv(inputs, outputs, 1, 1) if inputs != outputs else None
        self.heads = outputs // HEAD if attends else 0
        if attends:
            self.attn_qkv, self.attn_proj = MPConv(outputs, 3 * outputs, 1, 1), MPConv(outputs, outputs, 1, 1)

    def forward(self, x, emb):
        c = x.shape[1]
        if self.mode == "down":
            x = F.conv2d(x, filter_of((1, 1)).to(x.dtype).tile([c, 1, 1, 1]), groups=c, stride=2)
        if self.mode == "up":
            x = F.conv_transpose2d(x, (4 * filter_of((1, 1))).to(x.dtype).tile([c, 1, 1, 1]), groups=c, stride=2)
        if self.encodes:
            x = normalised(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(silu(x))
        y = self.conv_res1(silu(y * (self.emb_linear(emb, gain=self.emb_gain) + 1)[:, :, None, None]))
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:
            y = self.attn_qkv(x)
            y = normalised(y.reshape(len(y), self.heads, -1, 3, y.shape[2] * y.shape[3]), 2)
            q, k, v = y.unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            x = mp_sum(x, self.attn_proj(torch.einsum("nhqk,nhck->nhcq", w, v).reshape(x.shape)), 0.3)
        return x.clip(-256, 256)


class MPUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = MPFourier(WIDTH), MPConv(WIDTH, 2 * WIDTH)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, kept = WIDTH, [WIDTH]
        for level, multiple in enumerate(MULTIPLES):
            side = SIDE >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = MPConv(4, WIDTH, 3, 3)
            else:
                self.enc[f"{side}x{side}_down"] = MPBlock(width, width, encodes=True, mode="down")
                kept.append(width)
            for at in range(PER_LEVEL):
                made = {"encodes": True, "attends": side in ATTENDS}
                self.enc[f"{side}x{side}_block{at}"] = MPBlock(width, multiple * WIDTH, **made)
                width = multiple * WIDTH
                kept.append(width)
        for level, multiple in reversed(list(enumerate(MULTIPLES))):
            side = SIDE >> level
            if level == len(MULTIPLES) - 1:
                self.dec[f"{side}x{side}_in0"] = MPBlock(width, width, encodes=False, attends=True)
                self.dec[f"{side}x{side}_in1"] = MPBlock(width, width, encodes=False)
            else:
                self.dec[f"{side}x{side}_up"] = MPBlock(width, width, encodes=False, mode="up")
            for at in range(PER_LEVEL + 1):
                made = {"encodes": False, "attends": side in ATTENDS}
                self.dec[f"{side}x{side}_block{at}"] = MPBlock(width + kept.pop(), multiple * WIDTH, **made)
                width = multiple * WIDTH
        self.out_conv = MPConv(width, 3, 3, 3)

    def forward(self, x, t):
        emb = silu(self.emb_noise(self.emb_fourier(t)))
        x, kept = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            kept.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                a, b = x, kept.pop()
                scale = math.sqrt((a.shape[1] + b.shape[1]) / 0.5)
                x = torch.cat([scale / math.sqrt(a.shape[1]) * 0.5 * a, scale / math.sqrt(b.shape[1]) * 0.5 * b], dim=1)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Whole(nn.Module):
    """What EDM2's snapshots hold: the network under `unet.`, and an uncertainty beside it."""

    def __init__(self):
        super().__init__()
        self.unet = MPUNet()
        self.logvar_fourier, self.logvar_linear = MPFourier(8), MPConv(8, 1)

    def forward(self, x, t):
        return self.unet(x, t)


class Preconditioned(nn.Module):
    """And EDM's: under `model.`."""

    def __init__(self, kind):
        super().__init__()
        self.model = UNet(kind)

    def forward(self, x, t):
        return self.model(x, t)


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
