"""DiT and SiT under their own names give, once converted, what their own forward gives for the null class.

The reference is a plain transcription of models.py of both (they are the same network; what differs is what they are told and
what their output means).
"""

import math

import numpy as np
import pytest
import torch
from tiny_models import fill, pictures
from torch import nn

from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.prior.load import load_denoiser

D, HEADS, PATCH, SIDE, CHANNELS, CLASSES = 128, 2, 2, 8, 4, 5


def places():
    """get_2d_sincos_pos_embed of DiT's models.py: columns first."""

    def one(positions):
        omega = 1 / 10000 ** (np.arange(D // 4, dtype=np.float64) / (D / 4))
        out = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    axis = np.arange(SIDE // PATCH, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=0)
    return torch.from_numpy(np.concatenate([one(grid[0]), one(grid[1])], axis=1)).float()[None]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-2, -1) * (D // HEADS) ** -0.5).softmax(dim=-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(b, n, D))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


def norm():
    return nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = norm(), norm(), Attention(), MLP()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + h * self.mlp(self.norm2(x) * (1 + e) + d)


class Inside(nn.Module):
    """A module that holds named others, as the original's embedders and last layer do."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = Inside(proj=nn.Conv2d(CHANNELS, D, PATCH, stride=PATCH))
        self.t_embedder = Inside(mlp=nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D)))
        self.y_embedder = Inside(embedding_table=nn.Embedding(CLASSES + 1, D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.final_layer = Inside(
            norm_final=norm(), linear=nn.Linear(D, PATCH**2 * 2 * CHANNELS), adaLN_modulation=modulation
        )

    def forward(self, x, t):
        # float64 where the original has float32, whose phases at t = 700 are off by 3e-5.
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        angles = t[:, None].double() * frequency
        c = (
            self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).float())
            + self.y_embedder.embedding_table.weight[-1]
        )
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + places()
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        h = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        side = SIDE // PATCH
        h = h.reshape(len(x), side, side, PATCH, PATCH, 2 * CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), 2 * CHANNELS, SIDE, SIDE)


@pytest.fixture(scope="module")
def original():
    with torch.random.fork_rng(devices=[]):
        return fill(DiT())


def saved(original, path):
    torch.save({"ema": original.state_dict() | {"pos_embed": places()}, "args": {"model": "S/2"}}, path)
    return path


def test_its_places_are_those_that_are_loaded():
    from tiltscope.engine.prior.dit import get_places

    torch.testing.assert_close(get_places(D, SIDE // PATCH), places(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_dit_predicts_its_own_eps(original, tmp_path):
    convert(saved(original, tmp_path / "DiT-S-2.pt"), tmp_path / "out", ConvertSettings())
    denoiser = load_denoiser(tmp_path / "out", kind="diffusers_dit", shape=(CHANNELS, SIDE, SIDE))
    x, t = pictures(2, side=SIDE, channels=CHANNELS), torch.tensor([40, 700])
    sigma = torch.as_tensor(denoiser.levels[::-1].copy())[t]
    eps = original(x, t)[:, :CHANNELS].double()
    column = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        denoiser(x, sigma).double(), (x.double() - column * eps) / (1 - column**2).sqrt(), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_a_sit_gives_its_own_estimate_of_the_data(original, tmp_path):
    """x_t = t data + (1 - t) noise, v = data - noise: data = x_t + (1 - t) v."""
    convert(saved(original, tmp_path / "SiT-S-2.pt"), tmp_path / "out", ConvertSettings())
    denoiser = load_denoiser(tmp_path / "out", kind="diffusers_dit", shape=(CHANNELS, SIDE, SIDE))
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    on_path = pictures(2, side=SIDE, channels=CHANNELS)
    velocity = original(on_path, t)[:, :CHANNELS]
    expected = on_path + (1 - t).view(-1, 1, 1, 1).float() * velocity
    length = torch.hypot(t, 1 - t)
    x = on_path / length.view(-1, 1, 1, 1).float()
    torch.testing.assert_close(denoiser(x, (1 - t) / length), expected, rtol=1e-4, atol=1e-4)


def test_which_of_the_two_must_be_told(original, tmp_path):
    with pytest.raises(ConfigError, match="DiT and SiT have the same names"):
        convert(saved(original, tmp_path / "model.pt"), tmp_path / "out", ConvertSettings())
    assert "flow" in convert(tmp_path / "model.pt", tmp_path / "out", ConvertSettings(flow=True))
    state = original.state_dict()
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(BundleError, match="no whole DiT: pos_embed is missing"):
        convert(tmp_path / "dit.pt", tmp_path / "out2", ConvertSettings())
