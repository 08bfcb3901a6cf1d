"""Train the prior of bundle emoji64: a UNet on pixel_unshuffle(4) of the 64x64 picture that predicts x0.

    x = alpha x0 + sigma eps,   L = min(1/sigma^2, 20) * (|x0_hat - x0|^2 + c |grad(x0_hat - x0)|^2),   t uniform in [0, 999]

1/sigma^2 turns an x0 error into a v error (v = alpha eps - sigma x0; Salimans & Ho, arXiv:2202.00512, app. D). The
gradient term (differences between
neighbouring pixels, across the 4x4 blocks too) is one more quadratic form of the same error, so the minimiser is
still E[x0 | x]; it works against the
block grid that a pixel_unshuffle network shows. The network's time input is continuous: the level whose angle
atan2(sigma, alpha) is meant, between levels
by linear interpolation in the angle. t is stratified over the batch. Only training-split pictures are seen; skin-tone
variants and flags are capped.

A last sitting may learn from the network itself, guided by an earlier version of it (autoguidance.py), in place of the pictures.

Several processes of one thread each share a batch and average their gradients: on two cores 1.9 times the pictures of one
process with two threads, which wait for each other at every operator.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from autoguidance import Autoguided
from diffusers.models.attention_processor import Attention, AttnProcessor
from prior_network import build_scheduler, build_unet, denoise, export, level_angles, load_unet
from torch import Tensor, nn
from training import (
    Clock,
    MuonAndAdamW,
    average_gradients,
    learning_rate,
    load_checkpoint,
    log_line,
    prepare_machine,
    run_processes,
    save_checkpoint,
    seed_step,
    to_unit_range,
    uniform,
    update_ema,
    warp,
)

BACKGROUND = 240 / 127.5 - 1
FIXED_HANDEDNESS = ("Flags", "Symbols")
EARLY_SHARE = 0.1
"""of the minutes: then a version is kept that a later sitting can be guided by"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training; minutes is the whole budget over all sittings."""

    data: Path = Path("build/train/emoji64.npz")
    out: Path = Path("build/train/prior")
    minutes: float = 480.0
    processes: int = 1
    """of one thread each; `batch` is shared among them"""
    seed: int = 0
    batch: int = 64  # 16 serves the first thousands of steps; then the gradient's noise is what keeps the loss up
    peak_lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    weight_cap: float = 20.0
    gradient_weight: float = 0.25
    flag_share: float = 0.05
    skin_share: float = 0.10
    moved_share: float = 1.0
    """of the pictures: shifted, some rescaled; 0 in a last sitting, whose prior is then the pool's own"""
    optimiser: Literal["adamw", "muon"] = "muon"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the network's products; auto: what the machine does faster"""
    warm_start: Path | None = None
    early: Path | None = None
    """an earlier export of this prior: the network learns what `warm_start` guided by it would answer (autoguidance.py)"""
    guidance: float = 1.75
    guided_levels: tuple[float, float] = (400.0, 600.0)
    """where that guidance sets in, and is full"""
    max_steps: int = 10**9


class Pictures:
    """Fluent training pictures with sampling weights: flags and skin-tone variants have a fixed share of every batch
    in expectation.
    """

    def __init__(self, path: Path, *, flag_share: float, skin_share: float, moved_share: float) -> None:
        self.moved_share = moved_share
        arrays = np.load(path)
        own = ~arrays["fluent_heldout"]
        self.images = torch.from_numpy(arrays["fluent_images"][own])
        category, skin = arrays["fluent_category"][own], arrays["fluent_skin"][own]
        flag = category == "Flags"
        rest = ~flag & ~skin
        self.weight = torch.from_numpy(
            flag / flag.sum() * flag_share
            + skin / skin.sum() * skin_share
            + rest / rest.sum() * (1 - flag_share - skin_share)
        )
        self.may_flip = torch.tensor([c not in FIXED_HANDEDNESS for c in category])

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """[batch, 3, 64, 64] in [-1, 1]: mirrored (not flags and symbols); of `moved_share` of them, all moved by whole
        pixels and one in four rescaled a little.
        """
        rows = torch.multinomial(self.weight, batch, generator=generator)
        x = to_unit_range(self.images[rows])
        flip = self.may_flip[rows] & (torch.rand(batch, generator=generator) < 0.5)
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        # Whole pixels: an interpolated training picture is a blurred one, and the prior would learn the blur.
        moved = torch.rand(batch, generator=generator) < self.moved_share
        moves = (torch.randint(-2, 3, (batch, 2), generator=generator) * moved[:, None]).tolist()
        x = F.pad(x, (2, 2, 2, 2), value=BACKGROUND)
        x = torch.stack([one[:, 2 + dy : 66 + dy, 2 + dx : 66 + dx] for one, (dy, dx) in zip(x, moves, strict=True)])
        some = moved & (torch.rand(batch, generator=generator) < 0.25)
        scale = uniform((batch,), 0.92, 1.15, generator)
        ones, still = torch.ones(batch), torch.zeros(batch, dtype=torch.bool)
        y = warp(
            x, scale=scale, aspect=ones, shift=torch.zeros(batch, 2), flip=still, background=BACKGROUND, size_px=64
        )
        return torch.where(some[:, None, None, None], y, x)


def loss_of(
    unet: nn.Module,
    x0: Tensor,
    angles: np.ndarray,
    config: Config,
    generator: torch.Generator,
    teach: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of the formula above; teach(x, t) answers instead of x0 where it is given."""
    n = len(x0)
    t = (
        (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n * (len(angles) - 1)
    )  # stratified over the batch
    theta = torch.from_numpy(np.interp(t.numpy(), np.arange(len(angles)), angles))
    alpha, sigma = (f(theta).float()[:, None, None, None] for f in (torch.cos, torch.sin))
    x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    error = denoise(unet, x, t.float()) - (x0 if teach is None else teach(x, t.float()))
    weight = (1 / sigma.square()).clamp(max=config.weight_cap).flatten()
    plain = error.square().mean((1, 2, 3))
    rough = error.diff(dim=-1).square().mean((1, 2, 3)) + error.diff(dim=-2).square().mean((1, 2, 3))
    loss = (weight * (plain + config.gradient_weight * rough)).mean()
    third = n // 3
    x0_loss = plain.detach()
    return loss, {
        "mse_low": x0_loss[:third].mean().item(),
        "mse_mid": x0_loss[third:-third].mean().item(),
        "mse_high": x0_loss[-third:].mean().item(),
    }


def plain_attention(unet: nn.Module) -> nn.Module:
    """Heads of 8 channels: the blocked kernel's gradient in bfloat16 takes a third of a step, this a twentieth."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return unet


def autoguided(config: Config) -> Autoguided:
    """The teacher of a last sitting: the weights it starts from, guided by `config.early`. SystemExit without those."""
    if config.early is None or config.warm_start is None:
        raise SystemExit("--early teaches a trained prior: name it with --warm-start")
    network, early = (plain_attention(load_unet(folder)).eval() for folder in (config.warm_start, config.early))
    return Autoguided(network, early, weight=config.guidance, levels=config.guided_levels)


def train(rank: int, config: Config, precision: str) -> None:
    """One process of `config.processes`; process 0 writes."""
    prepare_machine(threads=1)
    torch.manual_seed(config.seed)
    generator = torch.Generator()
    pictures = Pictures(
        config.data,
        flag_share=config.flag_share,
        skin_share=config.skin_share,
        moved_share=config.moved_share,
    )
    unet = build_unet()
    plain_attention(unet)
    if config.warm_start is not None:
        unet.load_state_dict(load_unet(config.warm_start).state_dict())
    teach = None if config.early is None else autoguided(config)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    angles = level_angles(build_scheduler())
    settings = {"lr": config.peak_lr, "betas": (0.9, 0.99), "weight_decay": 0.01}
    if config.optimiser == "muon":
        optimiser = MuonAndAdamW(unet, **settings)
    else:
        optimiser = torch.optim.AdamW(unet.parameters(), fused=True, **settings)
    modules = {"unet": unet, "average": average}
    step, clock = 0, Clock(60 * config.minutes)
    if (path := config.out / "checkpoint.pt").exists():
        facts = load_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator)
        step, clock = facts["step"], Clock(60 * config.minutes, facts["seconds"])

    def save() -> None:
        facts = {"step": step, "seconds": clock.total}
        save_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator, facts=facts)
        export(average, config.out / "model")  # so an unfinished training can be looked at, and shipped

    saved, running, share = time.monotonic(), {}, clock.share
    while share < 1 and step < config.max_steps:
        seed_step(generator, seed=config.seed, step=step, rank=rank)
        lr = learning_rate(config.peak_lr, share=share, step=step, warmup=config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        x0 = pictures.draw(config.batch // config.processes, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss, facts = loss_of(unet, x0, angles, config, generator, teach)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # The schedule is a clock's, and the processes must agree on it: on its mean, as on the gradient's.
        share, *means = average_gradients(unet, [clock.share, loss.item(), *facts.values()])
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        update_ema(average, unet, min(config.ema, (1 + step) / (10 + step)))
        step += 1
        for name, value in zip(("loss", *facts), means, strict=True):
            running[name] = running.get(name, 0.0) + value / 50
        if rank > 0:
            continue
        if step % 50 == 0:
            log_line(config.out / "log.jsonl", {"step": step, "seconds": clock.total, "lr": lr, **running})
            running = {}
        if config.warm_start is None and share > EARLY_SHARE and not (config.out / "early").exists():
            export(average, config.out / "early")
        if time.monotonic() - saved > 180:
            save()
            saved = time.monotonic()
    if rank == 0:
        save()
        done = {
            "done": True,
            "step": step,
            "seconds": clock.total,
            "batch": config.batch,
            "seed": config.seed,
            "precision": precision,
            "parameters": sum(p.numel() for p in unet.parameters()),
        }
        log_line(config.out / "log.jsonl", done)
        print(json.dumps(done))


def main(config: Config) -> None:
    run_processes(train, config, processes=config.processes, precision=config.precision)


if __name__ == "__main__":
    main(tyro.cli(Config))
