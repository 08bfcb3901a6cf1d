"""EDM's and EDM2's networks, transcribed plainly from networks.py and networks_edm2.py: what their converted forms are held to.

Transposed convolutions, filters and weight lengths as they stand there, where ours are a box and a smoothing and folded weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SIDE, WIDTH, MULTIPLES, PER_LEVEL, ATTENDS = 16, 32, (1, 2), 2, (8,)
HEAD = 16


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
