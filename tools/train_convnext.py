"""Train a small DINOv3 ConvNeXt on emoji64's pictures: a second architecture to ask the embedded bundle's questions of.

    L = CE(Sinkhorn(teacher), student)                                          (DINO, as in train_trunk.py)
      + InfoNCE(student crop, student global crop of the same thing, in the batch)
      + 0.1 * KoLeo(student)

The embedded ViT's recipe, pictures and pairs without its masked-patch loss: a convolution has no token to mask. One process;
the weights are not shipped (tools/architectures.sh makes them anew, and docs/architectures.md says what they showed).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from train_trunk import Head, Things, augment, koleo, sinkhorn
from training import (
    Clock,
    imagenet_normalise,
    learning_rate,
    load_checkpoint,
    log_line,
    prepare_machine,
    save_checkpoint,
    seed_step,
    update_ema,
    write_trunk,
)
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training; minutes is the whole budget over all sittings."""

    data: Path = Path("build/train/emoji64.npz")
    out: Path = Path("build/architectures/trunk")
    minutes: float = 25.0
    threads: int = 1
    seed: int = 0
    batch: int = 32
    num_local: int = 2
    global_px: int = 40
    local_px: int = 32
    final_px: int = 64
    final_share: float = 0.2
    peak_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 60
    teacher_decay: float = 0.95
    teacher_temperature: float = 0.04
    student_temperature: float = 0.1
    num_prototypes: int = 256
    koleo: float = 0.1
    contrast_temperature: float = 0.15
    flag_share: float = 0.05
    max_steps: int = 10**9


def trunk_config() -> DINOv3ConvNextConfig:
    """Most of its blocks at stride 8, where the embedded ViT has its patches: both are read on an 8 x 8 grid."""
    return DINOv3ConvNextConfig(
        image_size=64,
        hidden_sizes=[64, 128, 192, 256],
        depths=[1, 4, 1, 1],
        # The published 0.02 and 1e-6 suit weeks of training: in minutes, blocks that begin as nothing stay nothing.
        initializer_range=0.05,
        layer_scale_init_value=0.1,
    )


class Student(nn.Module):
    """The trunk and the head on its pooled token."""

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        config = trunk_config()
        self.trunk = DINOv3ConvNextModel(config)
        self.head = Head(config.hidden_sizes[-1], num_prototypes)

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.trunk(pixels).pooler_output


def loss_of(
    student: Student, teacher: Student, things: Things, config: Config, global_px: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    b, num_crops = config.batch, 2 + config.num_local
    pictures, may_flip = things.draw(b, num_crops, generator)

    def crops(at: slice, area: tuple[float, float], size_px: int) -> Tensor:
        chosen = pictures[at]
        flips = may_flip.repeat(len(chosen))
        return imagenet_normalise(augment(chosen.flatten(0, 1), flips, area=area, size_px=size_px, generator=generator))

    large, small = crops(slice(2), (0.45, 1.15), global_px), crops(slice(2, None), (0.1, 0.45), config.local_px)
    with torch.no_grad():
        target = sinkhorn(teacher.head(teacher.pooled(large)), config.teacher_temperature).view(2, b, -1)
    whole = student.pooled(large)
    queries = student.head.embed(torch.cat([whole, student.pooled(small)]))
    log_p = F.log_softmax(student.head.score(queries) / config.student_temperature, dim=-1).view(num_crops, b, -1)
    pairs = [(t, s) for t in range(2) for s in range(num_crops) if s != t]
    dino = -torch.stack([(target[t] * log_p[s]).sum(-1).mean() for t, s in pairs]).mean()
    seen = queries.view(num_crops, b, -1)
    near = seen @ seen[:2, None].transpose(-1, -2) / config.contrast_temperature  # [2, crops, b, b]
    contrast = torch.stack([F.cross_entropy(near[t, s], torch.arange(b)) for t, s in pairs]).mean()
    spread = koleo(whole[:b]) + koleo(whole[b:])
    facts = {"dino": dino.item(), "contrast": contrast.item(), "koleo": spread.item()}
    return dino + contrast + config.koleo * spread, facts


def main(config: Config) -> None:
    """Train, or go on training, until the budget is spent."""
    prepare_machine(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator()
    things = Things(config.data, config.flag_share)
    student = Student(config.num_prototypes).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    decayed = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.peak_lr,
        fused=True,
    )
    modules = {"student": student, "teacher": teacher}
    step, clock = 0, Clock(60 * config.minutes)
    if (path := config.out / "checkpoint.pt").exists():
        facts = load_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator)
        step, clock = facts["step"], Clock(60 * config.minutes, facts["seconds"])

    def save() -> None:
        facts = {"step": step, "seconds": clock.total}
        save_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator, facts=facts)

    saved = time.monotonic()
    while (share := clock.share) < 1 and step < config.max_steps:
        seed_step(generator, seed=config.seed, step=step, rank=0)
        lr = learning_rate(config.peak_lr, share=share, step=step, warmup=config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        global_px = config.final_px if share > 1 - config.final_share else config.global_px
        loss, facts = loss_of(student, teacher, things, config, global_px, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimiser.step()
        # As in train_trunk.py: a teacher that follows at first and averages at the end.
        update_ema(teacher, student, 1 - (1 - config.teacher_decay) * (0.001 / (1 - config.teacher_decay)) ** share)
        step += 1
        if step % 10 == 0:
            record = {"step": step, "seconds": clock.total, "lr": lr, "global_px": global_px, "loss": loss.item()}
            log_line(config.out / "log.jsonl", record | facts)
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    save()
    # Only now: a folder with a config.json is a finished training.
    write_trunk(teacher.trunk, config.out / "model")
    done = {"done": True, "step": step, "seconds": clock.total, "batch": config.batch, "seed": config.seed}
    log_line(config.out / "log.jsonl", done)


if __name__ == "__main__":
    main(tyro.cli(Config))
