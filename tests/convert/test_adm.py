"""guided-diffusion's U-Net under its own names gives, once converted, what its own forward gives.

The reference is a plain transcription of guided_diffusion/unet.py (Dhariwal & Nichol 2021) for the published form: residual
blocks that resample, scale-shift conditioning, attention in the old order (q, k, v of each head in turn).
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import fill, pictures
from torch import nn

from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.load import load_denoiser

HEAD, WIDTH, MULTIPLES, ATTENDS, PER_LEVEL = 8, 32, (1, 2, 2), (False, False, True), 2
EMBEDDED = 4 * WIDTH


def norm(channels):
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, *, up=False, down=False):
        super().__init__()
        self.up, self.down = up, down
        self.in_layers = nn.Sequential(norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDED, 2 * outputs))
        self.out_layers = nn.Sequential(
            norm(outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resampled(self, x):
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x

    def forward(self, x, emb):
        h = self.in_layers[2](self.resampled(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resampled(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        b, c, *places = x.shape
        flat = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(b * (c // HEAD), 3 * HEAD, -1).split(HEAD, dim=1)
        scale = 1 / math.sqrt(math.sqrt(HEAD))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return (flat + self.proj_out(h)).reshape(b, c, *places)


class Sequence(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, EMBEDDED))
        self.input_blocks = nn.ModuleList([Sequence(nn.Conv2d(3, WIDTH, 3, padding=1))])
        kept, channels = [WIDTH], WIDTH
        for level, multiple in enumerate(MULTIPLES):
            for _ in range(PER_LEVEL):
                layers = [Residual(channels, multiple * WIDTH)]
                channels = multiple * WIDTH
                if ATTENDS[level]:
                    layers.append(Attention(channels))
                self.input_blocks.append(Sequence(*layers))
                kept.append(channels)
            if level < len(MULTIPLES) - 1:
                self.input_blocks.append(Sequence(Residual(channels, channels, down=True)))
                kept.append(channels)
        self.middle_block = Sequence(Residual(channels, channels), Attention(channels), Residual(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(MULTIPLES))):
            for at in range(PER_LEVEL + 1):
                layers = [Residual(channels + kept.pop(), multiple * WIDTH)]
                channels = multiple * WIDTH
                if ATTENDS[level]:
                    layers.append(Attention(channels))
                if level and at == PER_LEVEL:
                    layers.append(Residual(channels, channels, up=True))
                self.output_blocks.append(Sequence(*layers))
        self.out = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x, t):
        half = WIDTH // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        kept = []
        for block in self.input_blocks:
            x = block(x, emb)
            kept.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), emb)
        return self.out(x)


@pytest.fixture(scope="module")
def original():
    with torch.random.fork_rng(devices=[]):
        return fill(UNet())


@torch.no_grad()
def test_the_converted_network_is_the_original(original, tmp_path):
    from diffusers import UNet2DModel

    torch.save(original.state_dict(), tmp_path / "adm.pt")
    said = convert(tmp_path / "adm.pt", tmp_path / "out", ConvertSettings(image_size=32, head_channels=HEAD))
    assert "3 levels" in said
    theirs = UNet2DModel.from_pretrained(tmp_path / "out").eval()
    x, t = pictures(2, side=32), torch.tensor([3, 870])
    expected = original(x, t)
    torch.testing.assert_close(theirs(x, t).sample, expected, rtol=1e-4, atol=1e-5)
    # And as the prior that sampling runs: eps of a noised picture.
    denoiser = load_denoiser(tmp_path / "out", kind="diffusers_unet2d", shape=(3, 32, 32))
    levels = torch.as_tensor(denoiser.levels[::-1].copy())[t]
    alpha = (1 - levels**2).sqrt()
    eps = expected[:, :3].double()
    x0 = (x.double() - levels.view(-1, 1, 1, 1) * eps) / alpha.view(-1, 1, 1, 1)
    found = denoiser(x, levels)
    torch.testing.assert_close(found.double(), x0, rtol=1e-3, atol=1e-3)


def test_its_configuration_is_read_off_the_shapes(original, tmp_path):
    torch.save({"model": original.state_dict()}, tmp_path / "adm.pt")
    convert(tmp_path / "adm.pt", tmp_path / "out", ConvertSettings(image_size=32, head_channels=HEAD))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["block_out_channels"] == [32, 64, 64]
    assert config["layers_per_block"] == 2
    assert config["down_block_types"] == ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"]
    assert config["out_channels"] == 6
    scheduler = json.loads((tmp_path / "out/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_emb.weight": torch.zeros(10, EMBEDDED)}, "takes classes"),
        ({"input_blocks.3.0.op.weight": torch.zeros(1)}, "plain convolutions"),
        ({"input_blocks.20.0.in_layers.0.weight": torch.zeros(1)}, "must be as many"),
        ({"other.weight": torch.zeros(1)}, "other.weight is not known"),
    ],
)
def test_networks_of_another_form_are_refused(original, tmp_path, change, said):
    torch.save(original.state_dict() | change, tmp_path / "adm.pt")
    with pytest.raises(BundleError, match=said):
        convert(tmp_path / "adm.pt", tmp_path / "out", ConvertSettings(head_channels=HEAD))
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide(original, tmp_path):
    torch.save(original.state_dict(), tmp_path / "adm.pt")
    with pytest.raises(BundleError, match="does not divide into heads of 48"):
        convert(tmp_path / "adm.pt", tmp_path / "out", ConvertSettings(head_channels=48))
